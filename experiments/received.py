"""A compressed network that was received: what it is, and whether what it says of itself holds, untrained.

experiments/verify.py is the command for it; a rehearsal (experiments/rehearsal.py) does the same.
"""

import io
import json
import logging
import math
import operator
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.cifar import CIFARS
from experiments.data import STAND_IN_CLASSES, Dataset, TestBatches
from experiments.device import is_out_of_memory
from experiments.files import checksum_holds, read_file
from experiments.live import printable
from experiments.network import make_network
from experiments.training import predict
from metrics import NetworkCount, count_by_torch, count_network, ratio
from src import graph
from src.encoding import PackingError
from src.packing import MAX_FILE_BYTES, MAX_HEADER_BYTES, PackedHeader, read_header, unpack_network
from utils_quantization import FULL_PRECISION_BITS

ENDINGS = (".codeq", ".pt2")
CLAIMS_FILE = "claims.json"  # in an exported network's archive
VERIFIED, NOT_VERIFIED, NOT_CHECKED = "VERIFIED", "NOT VERIFIED", "NOT CHECKED"
ROUNDED = 1e-6  # relative; two machines' sums of ratios
TIES = 1e-3  # of the images: on another machine two logits that are almost equal may change places

# The records of an exported archive that hold numbers and text; others hold pickles and compiled code.
RECORDS = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|extra/.+|\.data/.+|[^/]+|data/"
    r"(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json))"
)
# torch makes Python text of an exported graph's names and runs it, and has Python evaluate sizes, such as
# Mul(Integer(4), Symbol('s77', integer=True)). What these patterns let through calls nothing but sympy.
NAME = re.compile(r"[\w.]*")
FORMS = {
    "expr_str": re.compile(r"([A-Z]\w*+\(|'\w++'|[a-z]\w*+=(True|False)|-?\d++(\.\d++)?+|[), ])*+"),
    **dict.fromkeys(("in_spec", "out_spec"), re.compile(  # trees of tuples and empty dictionaries
        r'([\[\]{}, 1]|"(type|context|children_spec)": |null|"null"|"\[\]"|"builtins\.(tuple|dict)")*+'
    )),
}  # fmt: skip
PRODUCTS = {"mul", "multiply", "div", "divide", "true_divide", "addcmul", "addcdiv"}  # element by element
FREE_TEXT = {"metadata", "as_string", "as_strings", "torch_version"}  # which torch only quotes
# What a graph may call besides the operations that are registered with torch.
SIMPLE = re.compile(
    r"torch\.sym_\w+|math\.[a-z]\w*"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_)"
)

Say = Callable[[str], None]
# What a file may say of its network, and of which type that is.
CLAIMS: dict[str, type] = {
    "data": str,  # the name of the data set that it was tested on
    "test_images": int,
    "accuracy": float,  # on these images, 0 to 1
    "structured_macs": int,
    "zero_weights": int,
    "mean_bits": float,
    "structured_bops_ratio": float,
    "unstructured_bops_ratio": float,
}


@dataclass
class Received:
    """What a file says of its network, what was found of it, and how they compare."""

    claims: dict[str, Any]
    found: dict[str, Any] = field(default_factory=dict)  # the same, measured again; fewer where not measured
    macs: int = 0  # as the network runs, counted by torch
    left_out: list[str] = field(default_factory=list)  # why something was not measured

    @property
    def false(self) -> list[str]:
        """The claims that do not hold, in words."""
        return [
            f"{name} is said to be {self.claims[name]!r}, found {self.found[name]!r}"
            for name in self.claims
            if name in self.found and not self._holds(name)
        ]

    @property
    def result(self) -> str:
        if self.false:
            return NOT_VERIFIED
        return NOT_CHECKED if self.left_out else VERIFIED

    def _holds(self, name: str) -> bool:
        said, found = self.claims[name], self.found[name]
        if name == "accuracy":
            return abs(said - found) * self.found["test_images"] <= max(0.5, TIES * self.found["test_images"])
        if isinstance(found, float):
            return math.isclose(said, found, rel_tol=ROUNDED)
        return bool(said == found)


def check_file(path: Path, load: Callable[[str], Dataset], say: Say, model: str = "") -> Received:
    """Check a file and tell `say` what is found.

    The data set is loaded once the file has been read: `load` is given the name that the file says.

    A packed file of another network than `resnet.py`'s needs the `model` that builds it, as --model names it.
    The accuracy is measured on the data set that the file names, and never on another.

    Raises: ValueError for a file that cannot be checked, and what `load` raises.
    """
    name = printable(path)
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"{name} ends in {path.suffix!r}; expected a file that ends in {' or '.join(ENDINGS)}"
        )
    try:
        content = read_file(path, MAX_FILE_BYTES + MAX_HEADER_BYTES)
    except ValueError as error:
        raise ValueError(f"{name} {error}; name a packed or exported network") from None
    say(f"File:     {name}, {len(content):,} bytes")
    if path.suffix == ".codeq":
        try:
            network, received = _open_packed(content, say, model)
        except PackingError as error:
            raise ValueError(f"{name}: {error}; get the file again") from None
    elif model:
        raise ValueError(f"{name} brings its network with it, and --model is {model!r}; leave --model out")
    else:
        network, received = open_exported(name, content)
    _say_claims(received.claims, say)
    dataset = load(received.claims.get("data", ""))
    say(f"Data:     {dataset.name}, {len(dataset.test_labels):,} test images ({dataset.source})")
    try:
        received.macs = count_by_torch(network)[""]
        if why := _not_to_score(received.claims, dataset):
            received.left_out.append(why)
        else:
            received.found |= {"data": dataset.name, "test_images": len(dataset.test_labels)}
            received.found["accuracy"] = _accuracy(network, dataset)
            say(f"Accuracy: {100 * received.found['accuracy']:.2f} %")
    except Exception as error:  # an exported network of another kind fails in its own way
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{name} holds no network for 3 x 32 x 32 images and {dataset.classes} classes "
            f"({type(error).__name__})"
        ) from None
    say(f"MACs:     {received.macs:,} as the network runs, counted by torch")
    if path.suffix == ".pt2":
        if product := _uncounted_product(network):
            received.left_out.append(f"torch counts no multiplications by {product} in structured_macs")
        else:
            received.found["structured_macs"] = received.macs
    unmeasured = [name for name in received.claims if name not in received.found]
    if unmeasured and not received.left_out:
        received.left_out.append(f"{', '.join(unmeasured)} cannot be measured of this file")
    why = "; ".join(received.false or received.left_out)
    say(received.result + (f": {why}" if why else ": what the file says of itself was found"))
    return received


def _not_to_score(claims: Mapping[str, Any], dataset: Dataset) -> str:
    """Why the accuracy is not measured on this data set; empty where it is."""
    said, images = claims.get("data"), claims.get("test_images")
    if "accuracy" not in claims or said is None or images is None:
        return "the file says no accuracy and no data set"
    if said != dataset.name:
        return f"the accuracy is of {printable(said):.60}, which is not here; give --data and --data-dir"
    if images != len(dataset.test_labels):
        here = len(dataset.test_labels)
        advice = f"; give --limit-test {images}" if 0 < images < here else ""
        return f"the accuracy is of {images:,} test images, and {here:,} are here{advice}"
    return ""


def _say_claims(claims: Mapping[str, Any], say: Say) -> None:
    shown = [f"{name} {printable(value):.60}" for name, value in claims.items()]
    say(f"Says:     {', '.join(shown) or 'nothing of itself'}")


def _checked(claims: Mapping[str, Any]) -> dict[str, Any]:
    """The claims that are known. Raises: PackingError for one that is not of its type."""
    for name, kind in CLAIMS.items():
        value = claims.get(name)
        fits = type(value) in ((int, float) if kind is float else (kind,))
        if value is not None and not (fits and (kind is str or abs(value) <= sys.float_info.max)):
            expected = {int: "a whole number", float: "a number", str: "a text"}[kind]
            raise PackingError(f"the file says {value!r:.60} for {name}; expected {expected}")
    return {name: claims[name] for name in CLAIMS if claims.get(name) is not None}


def _open_packed(content: bytes, say: Say, model: str) -> tuple[nn.Module, Received]:
    """The network of a packed file, and what is found in it. Raises: PackingError.

    What the file says in words is shown with its control characters escaped.
    """
    header = read_header(content)
    if header.network and not model:
        raise ValueError(
            f"the file holds the network {header.network!r:.120}, whose code is not in the file; if you have "
            f"that code and trust it, give --model module:callable"
        )
    if model and not header.network:
        raise ValueError(f"the file holds a ResNet of resnet.py, and --model is {model!r}; leave --model out")
    received = Received(_checked(header.metrics))
    classes = {files.name: files.classes for files in CIFARS.values()}.get(
        received.claims.get("data", ""), STAND_IN_CLASSES
    )
    network = unpack_network(content, (lambda: make_network(model, classes)) if model else None)
    count = count_network(network)
    received.found = _found(count, header)
    preset = header.settings.get("preset", "?")
    what = f"{header.network!r:.120}" if header.network else f"{header.blocks_per_stage} blocks a stage"
    say(f"Network:  {what}; preset {preset!r:.60}")
    say(f"Bits:     {', '.join(f'{name} {bits}' for name, bits in header.bits.items()) or 'none quantized'}")
    say(f"Zeros:    {received.found['zero_weights']:,} of {count.total('weights'):,} weights")
    left, dense = received.found["structured_macs"], count.total("dense_macs")
    say(f"Left:     {left:,} of {dense:,} MACs without the dead channels")
    return network, received


def _found(count: NetworkCount, header: PackedHeader) -> dict[str, Any]:
    """The counts that the claims are held against, with the bits that the file codes its layers in."""
    bits = {layer.name: header.bits.get(layer.name, FULL_PRECISION_BITS) for layer in count.layers}
    found: dict[str, Any] = {name: count.total(name) for name in ("structured_macs", "zero_weights")}
    coded = [bits[name] for name in bits if name in header.bits] or [FULL_PRECISION_BITS]
    found["mean_bits"] = sum(coded) / len(coded)
    for kind in ("structured", "unstructured"):
        left = sum(getattr(layer, f"{kind}_macs") * bits[layer.name] for layer in count.layers)
        found[f"{kind}_bops_ratio"] = ratio(count.total("dense_macs") * FULL_PRECISION_BITS, left)
    return found


def open_exported(name: str, content: bytes) -> tuple[nn.Module, Received]:
    """The network of an exported file, and what the file says of it. Raises: ValueError."""
    holds = checksum_holds(content)
    if holds is False:
        raise ValueError(f"{name} was altered: its checksum does not match; get the file again")
    # What torch logs of a damaged archive is a traceback; the sentence below says it.
    logging.getLogger("torch.export").setLevel(logging.CRITICAL)
    said = {CLAIMS_FILE: ""}
    try:
        with warnings.catch_warnings():
            # torch 2.11 warns of how it reads the archive's bytes, which nothing writes into.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            _refuse_code(content)
            network = torch.export.load(io.BytesIO(content), extra_files=said).module()
        claims = _checked(json.loads(said[CLAIMS_FILE] or "{}"))
    except PackingError as error:
        raise ValueError(f"{name}: {error}; get the file again") from None
    except Exception as error:  # torch raises all kinds for a damaged archive
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{name} is no network that torch.export saved ({type(error).__name__}); get the file again"
        ) from None
    received = Received(claims)
    if holds is None:
        received.left_out.append("the file carries no checksum")
    return network, received


def _uncounted_product(network: Any) -> str:
    """The name of a matrix that the images are multiplied by, element by element; empty where there is none.

    torch counts convolutions and matrix products alone, and such products, summed, could stand for them. A
    vector, as a scale of each channel, stands for none.
    """
    of_image, matrices = set[Any](), dict[Any, str]()  # nodes; of the others, the matrix that they come from
    for node in network.graph.nodes:
        given = node.all_input_nodes
        if node.op == "placeholder" or any(n in of_image for n in given):
            of_image.add(node)
            factors = [matrices[n] for n in given if n in matrices]
            if factors and getattr(graph.kind(node), "__name__", "").rstrip("_") in PRODUCTS:
                return factors[0]
        elif node.op == "get_attr":
            tensor = operator.attrgetter(node.target)(network)
            if isinstance(tensor, Tensor) and sum(n > 1 for n in tensor.shape) > 1:
                matrices[node] = node.target
        elif found := [matrices[n] for n in given if n in matrices]:
            matrices[node] = found[0]
    return ""


def _refuse_code(content: bytes) -> None:
    """Raises: PackingError for an archive that could make torch run code; what torch does for a damaged one.

    torch.export.load unpickles what is marked as a pickle, loads compiled code, evaluates text as Python, and
    calls what the graph names, which may be any function that torch's modules have imported.
    """
    archive = torch._C.PyTorchFileReader(io.BytesIO(content))  # torch.export.load reads with the same
    odd = [name for name in archive.get_all_records() if not RECORDS.fullmatch(name)]
    # A file of this name has torch read the archive as older versions wrote it: all of it pickles.
    odd += [name for name in zipfile.ZipFile(io.BytesIO(content)).namelist() if name == "version"]
    for kind in ("weights", "constants"):
        tensors = json.loads(archive.get_record(f"data/{kind}/model_{kind}_config.json"))["config"]
        odd += [name for name, tensor in tensors.items() if tensor["use_pickle"]]
    odd += _no_names(json.loads(archive.get_record("models/model.json")))
    if odd:
        raise PackingError(
            f"the archive holds {printable(odd[0]):.60}, by which it could run code; expected tensors and "
            f"torch's own operations alone"
        )
    if inputs := archive.get_record("data/sample_inputs/model.pt"):
        # Where this fails, torch.export.load would go on to unpickle them whatever they are.
        torch.load(io.BytesIO(inputs), map_location="cpu", weights_only=True)


def _no_names(value: Any, key: str = "") -> Iterator[str]:
    """The text in a graph's JSON that is neither a name nor what stands under this key in a graph."""
    if isinstance(value, dict):
        for inner in value.keys() - FREE_TEXT:
            yield from _no_names(inner)
            yield from _no_names(value[inner], inner)
    elif isinstance(value, list):
        for item in value:
            yield from _no_names(item, key)
    elif isinstance(value, str):
        is_call = key in ("target", "as_operator")
        if not (_only_computes(value) if is_call else FORMS.get(key, NAME).fullmatch(value)):
            yield value


def _only_computes(name: str) -> bool:
    """Whether what a graph calls is an operation on numbers. One on a file might overwrite the user's."""
    if not name.startswith("torch.ops.") or "file" in name:
        return bool(SIMPLE.fullmatch(name))
    found = operator.attrgetter(name.removeprefix("torch.ops."))(torch.ops)
    return isinstance(found, torch._ops.OpOverload | torch._ops.HigherOrderOperator)


def _accuracy(network: nn.Module, dataset: Dataset) -> float:
    logits, labels = predict(network, TestBatches(dataset, "cpu"))
    if logits.shape != (len(labels), dataset.classes):
        raise ValueError(f"logits of shape {tuple(logits.shape)}")
    return (logits.argmax(1) == labels).double().mean().item()
