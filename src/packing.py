"""A trained network as one small file, and back: weights as integer codes, the rest as float32. No pickle.

    8 bytes      magic
    4            format version
    4            bytes of the header
    4            bytes of the body
    32           SHA-256 of all other bytes of the file
    header       JSON: architecture, bits of each coded layer, settings of the run, metrics; in place of the
                 architecture of a network that is not `resnet.py`'s, its name and the shapes of its tensors
    body         compressed: all float32 numbers, then all codes (see src/encoding.py)

Integers are little-endian. The numbers are the tensors of the network's state, in its order, buffers of other
types among them as float32 where that holds their numbers exactly; a coded weight contributes its step size
and shift instead of its elements. A code q is stored as q + Q modulo 2^b, in its layer's b bits.

A file may come from an untrusted source. The architecture, or the shapes, in its header are limited, and
limit all other sizes, before any memory is taken for them. A name in the header is a name: nothing is
imported by it, and who unpacks such a network brings what builds it.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from resnet import ResNet
from src.encoding import (
    COMPRESSIONS,
    PackingError,
    code_bytes,
    compress,
    decompress,
    pack_codes,
    pack_numbers,
    unpack_codes,
    unpack_numbers,
)
from src.quantizer import MAX_BITS, MIN_BITS, Codes
from utils_quantization import (
    has_codes,
    layer_name,
    layers_of,
    quantized_layers,
    weight_bits,
    weight_name,
    weight_quantization,
    without_quantizers,
)

VERSION = 1
MAGIC = b"\x89CoDeQ\r\n"
MAX_FILE_BYTES = 1 << 30  # far more than the networks of this field take in float32
MAX_HEADER_BYTES = 1 << 18  # far more than settings and metrics take
MAX_BLOCKS_PER_STAGE = 18  # ResNet-110
MAX_CLASSES = 1000
COUNTER = "num_batches_tracked"  # of batches, by a batch norm: in evaluation mode nothing depends on it
OF_OTHERS = ("network", "tensors")  # fields of the header that a ResNet of `resnet.py` goes without

_PREFIX = struct.Struct("<8sIII")
_HEADER_START = _PREFIX.size + hashlib.sha256().digest_size


@dataclass(frozen=True)
class PackedHeader:
    """The header of a packed network."""

    blocks_per_stage: int  # of a ResNet of `resnet.py`; 0 for another network
    num_classes: int  # of a ResNet of `resnet.py`; 0 for another network
    channels_last: bool  # memory layout of the weights: the last bits of the logits depend on it
    bits: dict[str, int]  # bits of a weight, by the name of each coded layer
    settings: dict[str, Any]  # of the run that trained the network
    metrics: dict[str, Any]  # that this run measured on the network
    compression: str  # of the body, one of `COMPRESSIONS`
    network: str = ""  # the name of another network than `resnet.py`'s
    tensors: dict[str, list[int]] = field(default_factory=dict)  # its shapes, by name, in the body's order


def pack_network(
    model: nn.Module,
    run_settings: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    name: str = "",
) -> bytes:
    """Pack the model into the bytes of a file, from which `unpack_network` restores the logits to the bit.

    The weights of a layer whose quantizer is switched on are stored as codes, all else as float32. The model
    is not changed. Settings and metrics go into the header as they are. A network that is not a ResNet of
    `resnet.py` needs a `name`, such as module:callable, that tells a person what builds it.

    Raises: PackingError if the model needs a name and has none, holds what `numbers_of` refuses or a number
        that is not finite, and if the settings or metrics are not strict JSON.
    """
    plain = without_quantizers(model).cpu()
    own, state, coded = _own_like(plain), numbers_of(plain), read_codes(model)
    if own is None and not name:
        raise PackingError(f"{type(plain).__name__} is no ResNet of resnet.py, and no name is given for it")
    bits = {name: weight_bits(model.get_submodule(name))[0] for name in coded}
    numbers, codes, masks = [], [], _masks(plain)
    slots = _slots(state if own is None else own.state_dict(), bits)
    for slot in slots:
        tensor = _checked(slot.name, state[slot.name], masks)
        if slot.bits:
            layer = coded[layer_name(slot.name)]
            numbers += [layer.step_size.reshape(1), layer.shift.reshape(1)]
            q = layer.q.flatten().long().numpy()
            codes.append(pack_codes((q + _levels(slot.bits)) % 2**slot.bits, slot.bits))
        else:
            numbers.append(tensor.flatten())
    compression, body = compress(pack_numbers(torch.cat(numbers).numpy()) + b"".join(codes))
    header = PackedHeader(
        blocks_per_stage=0 if own is None else len(own.layer1),
        num_classes=0 if own is None else own.linear.out_features,
        channels_last=any(t.ndim == 4 and not t.is_contiguous() for t in state.values()),
        bits=bits,
        settings=dict(run_settings),
        metrics=dict(metrics or {}),
        compression=compression,
        network=name if own is None else "",
        tensors={slot.name: list(slot.shape) for slot in slots} if own is None else {},
    )
    return _seal(_to_json(header), body)


def unpack_network(content: bytes, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Restore the network of a packed file: a plain one, in evaluation mode, on the CPU.

    A network that is not a ResNet of `resnet.py` is built by `build`, and then given the file's numbers. As
    built stays what no file holds: buffers that are not persistent, and how tensors that are not 4-D lie in
    memory, on which the last bits of the logits depend.

    Raises: PackingError if the content is not what `pack_network` makes, if it needs a `build` and there is
        none, or if what that builds has other tensors than the file. What `build` raises.
    """
    header, compressed = _open(content)
    if not header.network:
        network: nn.Module = _blank(header.blocks_per_stage, header.num_classes)
        state = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in network.state_dict().items()}
        slots = _slots(state, header.bits)
    elif build is None:
        raise PackingError(f"the file holds the network {header.network!r:.120}, and nothing builds that")
    else:
        network = build()
        state = network.state_dict()
        slots = _slots(
            {n: torch.empty(shape, device="meta") for n, shape in header.tensors.items()}, header.bits
        )
        _check_shapes(slots, _slots(state, header.bits), header.network)
        parameters = dict(network.named_parameters())
        # Only these are counted: bits of a batch norm, say, would be no more than a claim.
        layers = {name for name in layers_of(network) if weight_name(name) in parameters}
        if others := [name for name in header.bits if name not in layers]:
            raise PackingError(f"bits are given for {others[0]!r:.60}, which is no layer of the network")
    begin = 4 * sum(slot.numbers for slot in slots)
    body = decompress(compressed, header.compression, begin + sum(slot.code_bytes for slot in slots))
    numbers = torch.from_numpy(unpack_numbers(body[:begin])).split([slot.numbers for slot in slots])
    masks = _masks(network)
    for slot, values in zip(slots, numbers, strict=True):
        if slot.bits:
            codes = unpack_codes(body[begin : begin + slot.code_bytes], slot.shape.numel(), slot.bits)
            values = _weight(Codes(_signed(codes, slot.bits), values[0], values[1]))
            begin += slot.code_bytes
        built, values = state[slot.name], _checked(slot.name, values.view(slot.shape).clone(), masks)
        # A copy into what was built keeps how that lies in memory: a transposed weight, say.
        state[slot.name] = values.to(built.dtype) if values.ndim == 4 else built.cpu().clone().copy_(values)
    network.load_state_dict(state, assign=True)
    layout = torch.channels_last if header.channels_last else torch.contiguous_format
    network.to(memory_format=layout).eval()
    for name in header.bits:
        # The stride of a dimension of 1 is free, and torch chooses by it between convolutions whose last bits
        # differ: give it the stride that it has in what a quantizer computes.
        weight = network.get_parameter(weight_name(name))
        weight.data = weight.data.neg().neg()
    return network


def read_header(content: bytes) -> PackedHeader:
    """Read the header of a packed file, without decompressing the body.

    Raises: PackingError if the file or its header is not what `pack_network` makes; its body is not checked.
    """
    return _open(content)[0]


class _Slot(NamedTuple):
    """How a packed file stores one tensor of the network's state: as codes, or as float32 numbers."""

    name: str
    shape: torch.Size
    bits: int | None  # of a code; None for a tensor stored as float32

    @property
    def numbers(self) -> int:
        """How many float32 numbers the tensor takes: a coded weight takes its step size and its shift."""
        return 2 if self.bits else self.shape.numel()

    @property
    def code_bytes(self) -> int:
        return code_bytes(self.shape.numel(), self.bits) if self.bits else 0


def _slots(state: Mapping[str, Tensor], bits: Mapping[str, int]) -> list[_Slot]:
    """The tensors that the logits may depend on, in the order of the state: all but batch norms' counters."""
    return [
        _Slot(name, t.shape, bits.get(layer_name(name)))
        for name, t in state.items()
        if name.rpartition(".")[2] != COUNTER
    ]


def _blank(blocks_per_stage: int, num_classes: int) -> ResNet:
    """Build the architecture without memory for its weights. Raises: PackingError if it is too large."""
    if not 1 <= blocks_per_stage <= MAX_BLOCKS_PER_STAGE:
        raise PackingError(f"{blocks_per_stage!r:.60} blocks a stage; expected 1 to {MAX_BLOCKS_PER_STAGE}")
    if not 1 <= num_classes <= MAX_CLASSES:
        raise PackingError(f"{num_classes!r:.60} classes; expected 1 to {MAX_CLASSES}")
    with torch.device("meta"):
        return ResNet(blocks_per_stage, num_classes)


def _own_like(plain: nn.Module) -> ResNet | None:
    """Build the architecture of `plain` if it is a ResNet of `resnet.py`, else None."""
    if type(plain) is not ResNet or not 1 <= len(plain.layer1) <= MAX_BLOCKS_PER_STAGE:
        return None
    blank = _blank(len(plain.layer1), plain.linear.out_features)
    # A network's text has the type, stride, epsilon and so on of each module.
    return blank if str(blank) == str(plain) else None


def _check_shapes(slots: list[_Slot], built: list[_Slot], name: str) -> None:
    """Raises: PackingError if a file has other tensors than the network that was built for it."""
    of_file, of_network = ({slot.name: tuple(slot.shape) for slot in of} for of in (slots, built))
    for which in of_file | of_network:
        if of_file.get(which) != of_network.get(which):
            raise PackingError(
                f"the file has the shape {of_file.get(which)!s:.60} for {which!r:.60}, the network given for "
                f"it {of_network.get(which)!s:.60}; expected the network {name!r:.120}"
            )


def read_codes(model: nn.Module) -> dict[str, Codes]:
    """The codes of each layer whose quantizer is switched on and has codes, by the layer's name, on the CPU.

    Raises: PackingError for codes that a file cannot hold, and for those that do not give the layer's weight.
    """
    coded = {}
    for name, layer in quantized_layers(model).items():
        quantization: Any = weight_quantization(layer)
        if quantization.enabled and has_codes(quantization.quantizer):
            original: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
            codes = quantization.quantizer.codes(original)
            if not isinstance(codes, Codes):
                raise PackingError(f"the codes of {name} are a {type(codes).__name__}; expected {Codes}")
            coded[name] = Codes(*(t.detach().cpu() for t in codes))
            _check_codes(name, coded[name], weight_bits(layer)[0])
            with torch.no_grad():
                weight = quantization(original).cpu()
            # Skip weights that are not finite: NaN equals nothing, and `_checked` refuses them by their name.
            if weight.isfinite().all() and not torch.equal(_weight(coded[name]), weight):
                raise PackingError(f"the codes of {name} give other weights than its quantizer does")
    return coded


def _check_codes(name: str, codes: Codes, bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise PackingError(f"{name} has codes of {bits} bits; a file holds codes of {MIN_BITS} to {MAX_BITS}")
    if codes.step_size.numel() != 1 or codes.shift.numel() != 1:
        raise PackingError(
            f"{name} has {codes.step_size.numel()} step sizes and {codes.shift.numel()} shifts; "
            f"a file holds one of each for a layer"
        )
    q, Q = codes.q, _levels(bits)
    if q.isfinite().all() and not ((q == q.round()) & (q >= -Q - 1) & (q <= Q)).all():
        raise PackingError(
            f"{name} has codes that are no whole numbers from {-Q - 1} to {Q}, as {bits} bits are"
        )


def _weight(codes: Codes) -> Tensor:
    """Compute the quantized weight, with the operations of the quantizer's forward pass, in their order."""
    return codes.step_size * codes.q + codes.shift * codes.q.sign()


def _levels(bits: int) -> int:
    """Q, the levels on each side of zero."""
    return 2 ** (bits - 1) - 1


def _signed(codes: np.ndarray, bits: int) -> Tensor:
    """Turn stored codes into q, from -Q - 1 to Q."""
    q = codes - _levels(bits)
    q[q > _levels(bits)] = -_levels(bits) - 1
    return torch.from_numpy(q.astype(np.float32))


def numbers_of(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network without quantizers as a file holds it: in float32, finite or not, no counters.

    Raises: PackingError for parameters of another type, and for buffers that float32 does not hold exactly.
    """
    parameters, state = dict(network.named_parameters(remove_duplicate=False)), {}
    for name, tensor in network.state_dict().items():
        if name.rpartition(".")[2] == COUNTER:
            continue
        if not isinstance(tensor, Tensor):
            raise PackingError(f"{name} is a {type(tensor).__name__}; a packed file holds tensors alone")
        numbers = tensor if name in parameters or tensor.is_complex() else tensor.float()
        if numbers.dtype != torch.float32:
            raise PackingError(f"{name} is {tensor.dtype}; expected torch.float32")
        if not torch.allclose(numbers.to(tensor.dtype), tensor, 0, 0, equal_nan=tensor.is_floating_point()):
            raise PackingError(
                f"{name} is {tensor.dtype}, and torch.float32 does not hold its numbers exactly"
            )
        state[name] = numbers
    return state


def _masks(network: nn.Module) -> set[str]:
    """The names of the buffers that are no running statistics: they may hold infinity, as masks do."""
    statistics = ("running_mean", "running_var")
    return {name for name, _ in network.named_buffers() if name.rpartition(".")[2] not in statistics}


def _checked(name: str, tensor: Tensor, masks: set[str]) -> Tensor:
    """Raises: PackingError for numbers that are not finite; a mask may hold infinity."""
    if (tensor.isnan() if name in masks else ~tensor.isfinite()).any():
        raise PackingError(f"{name} holds a number that is not finite")
    return tensor


def _to_json(header: PackedHeader) -> bytes:
    try:
        values = {k: v for k, v in asdict(header).items() if header.network or k not in OF_OTHERS}
        content = json.dumps(values, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise PackingError(f"the settings or metrics are not strict JSON: {error}") from None
    if len(content) > MAX_HEADER_BYTES:
        raise PackingError(
            f"settings and metrics make a header of {len(content)} bytes, more than a file has"
        )
    return content


def _from_json(content: bytes) -> PackedHeader:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise PackingError("the header is not JSON") from None
    kinds = {f.name: get_origin(f.type) or f.type for f in fields(PackedHeader)}
    own = {name: kind for name, kind in kinds.items() if name not in OF_OTHERS}
    found = {name: type(value) for name, value in values.items()} if isinstance(values, dict) else None
    if found not in (kinds, own):
        raise PackingError(f"the header does not hold {', '.join(own)}, each of its type")
    header = PackedHeader(**values)
    if header.compression not in COMPRESSIONS:
        raise PackingError(f"compression is {header.compression!r:.60}; expected {', '.join(COMPRESSIONS)}")
    if found == own:
        network = _blank(header.blocks_per_stage, header.num_classes)
        layers = list(layers_of(network))
    else:
        _check_tensors(header)
        layers = [layer_name(name) for name in header.tensors if layer_name(name) != name]
    for name, bits in header.bits.items():
        if name not in layers:
            raise PackingError(f"bits are given for {name!r:.60}, which is no layer of the network")
        if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
            raise PackingError(f"{name} has {bits!r:.60} bits; expected {MIN_BITS} to {MAX_BITS}")
    return header


def _check_tensors(header: PackedHeader) -> None:
    """Raises: PackingError for shapes that are none, and for more numbers than a file has."""
    if not header.network:
        raise PackingError("the header gives shapes, and no name of a network")
    for name, shape in header.tensors.items():
        if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape) or len(shape) > 8:
            raise PackingError(f"{name!r:.60} has the shape {shape!r:.60}; expected a list of whole numbers")
    # A 0 hides no other number of a shape: torch multiplies them all.
    if 4 * sum(math.prod(max(n, 1) for n in shape) for shape in header.tensors.values()) > MAX_FILE_BYTES:
        raise PackingError(f"the header gives shapes of more than {MAX_FILE_BYTES // 4:,} numbers")


def with_claims(content: bytes, metrics: Mapping[str, Any]) -> bytes:
    """The file with other metrics, sealed anew. Raises: PackingError as `read_header`."""
    header, body = _open(content)
    return _seal(_to_json(replace(header, metrics=dict(metrics))), body)


def _seal(header: bytes, body: bytes) -> bytes:
    """Put the file together: magic, version, lengths, checksum, header, body."""
    prefix = _PREFIX.pack(MAGIC, VERSION, len(header), len(body))
    return prefix + hashlib.sha256(prefix + header + body).digest() + header + body


def _open(content: bytes) -> tuple[PackedHeader, bytes]:
    """Split a file into its header and its compressed body.

    Raises: PackingError for the first of these that is wrong: magic, version, length, checksum, header.
    """
    if content[: len(MAGIC)] != MAGIC[: len(content)]:
        raise PackingError("this is no packed network: it begins with other bytes")
    if len(content) < _HEADER_START:
        raise PackingError(f"the file is truncated: it ends after {len(content)} bytes")
    _, version, header_bytes, body_bytes = _PREFIX.unpack_from(content)
    if version != VERSION:
        raise PackingError(f"the file has format version {version}; this program reads version {VERSION}")
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_FILE_BYTES:
        raise PackingError(
            f"a header of {header_bytes} bytes and a body of {body_bytes}: more than a file has"
        )
    body_start = _HEADER_START + header_bytes
    if len(content) != body_start + body_bytes:
        state = "truncated" if len(content) < body_start + body_bytes else "followed by something else"
        raise PackingError(f"the file is {state}: {len(content)} bytes of {body_start + body_bytes}")
    header, body = content[_HEADER_START:body_start], content[body_start:]
    if _seal(header, body) != content:
        raise PackingError("the file was altered: its checksum does not match")
    return _from_json(header), body
