"""The packed file: the same logits bit for bit, as small as its codes, and no harm from any other content."""

import hashlib
import io
import json
import lzma
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planted import Deaths, images, planted_deaths, random_network, snapshot
from torch import Tensor, nn

from resnet import ResNet, resnet20
from src import encoding, packing
from src.encoding import COMPRESSIONS, PackingError
from src.packing import pack_network, read_header, unpack_network
from src.quantizer import DeadZoneLDZCompander
from src.slim import slim_network
from utils_quantization import (
    attach_weight_quantizers,
    quantized_layers,
    quantizers,
    toggle_quantization,
    weight_bits,
    weight_quantization,
)

SETTINGS = {"preset": "debug", "epochs": 20, "exclude_layers": ["^conv1$", "linear"], "limit_train": None}
quick = settings(max_examples=60, deadline=None, derandomize=True)
fuzz = settings(max_examples=100, deadline=None, derandomize=True)
PREFIX = 20  # magic, version and the two lengths, as struct "<8sIII"
HEADER = PREFIX + 32
LZMA = [{"id": lzma.FILTER_LZMA2, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 20}]


def quantized(model: nn.Module, exclude: list[str], bits: list[float], zones: list[float]) -> nn.Module:
    attach_weight_quantizers(model, exclude, DeadZoneLDZCompander, {})
    with torch.no_grad():
        for i, q in enumerate(quantizers(model).values()):
            q.logit_bit.fill_(bits[i % len(bits)])
            q.logit_dz.fill_(zones[i % len(zones)])
    return model


def network(blocks: int = 1) -> nn.Module:
    """Every block's convolutions quantized, to 2, 3, 4, 6 and 8 bits in turn; a fifth of the filters dead."""
    model = random_network(Deaths(3, filters=0.2, streams=0.1), blocks).float()
    return quantized(model, ["^conv1$", "linear"], [0.0, 0.2, 0.35, 0.8, 3.0], [0.3, 0.5, -0.9])


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> bytes:
    return model(x).numpy().tobytes()


def same_logits(model: nn.Module, other: nn.Module) -> bool:
    x = images(3, (3, 32, 32)).float()
    return logits(model, x) == logits(other, x)


# There and back


@settings(quick, max_examples=12)
@given(
    planted_deaths,
    st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    st.lists(st.floats(-3, 3), min_size=1, max_size=6),
    st.sampled_from([["^conv1$", "linear"], ["conv1", "bn", "linear"], ["bn"], ["layer2"]]),
)
def test_the_logits_come_back_bit_for_bit(deaths, bits, zones, exclude):
    model = quantized(random_network(deaths).float(), exclude, bits, zones)
    content = pack_network(model, SETTINGS)
    back = unpack_network(content)
    assert type(back) is ResNet and not back.training
    assert same_logits(model, back)
    assert read_header(content).bits == {n: weight_bits(m)[0] for n, m in quantized_layers(model).items()}


@pytest.mark.parametrize("bits", range(2, 17))
def test_every_bit_width_comes_back(bits):
    model = random_network(Deaths(bits), 1).float()
    arguments = {"fixed_bit_val": bits, "learnable_bit": False, "init_deadzone_logit": 0.8}
    names = attach_weight_quantizers(model, ["^conv1$", "linear"], DeadZoneLDZCompander, arguments)
    content = pack_network(model, {})
    assert same_logits(model, unpack_network(content))
    assert read_header(content).bits == dict.fromkeys(names, bits)


def test_a_network_in_channels_last_comes_back_in_channels_last():
    model = network(3).to(memory_format=torch.channels_last)
    back = unpack_network(pack_network(model, SETTINGS))
    x = images(8, (3, 32, 32)).float().to(memory_format=torch.channels_last)
    assert logits(model, x) == logits(back, x)
    for layer in (back.conv1, back.layer2[1].conv2):
        assert (
            layer.weight.is_contiguous(memory_format=torch.channels_last) and not layer.weight.is_contiguous()
        )


def test_a_layer_whose_quantizer_is_switched_off_is_float32():
    model = network()
    toggle_quantization(model, False)
    weight_quantization(model.layer2[0].conv1).enabled = True
    content = pack_network(model, SETTINGS)
    assert list(read_header(content).bits) == ["layer2.0.conv1"]
    assert same_logits(model, unpack_network(content))


class WithoutCodes(nn.Hardtanh):
    """A quantizer of two methods."""

    def __init__(self) -> None:
        super().__init__(-0.1, 0.1)

    def get_bitwidth(self):
        return 32


def test_a_layer_whose_quantizer_has_no_codes_is_float32():
    model = random_network(Deaths(0), 1).float()
    attach_weight_quantizers(model, ["conv"], WithoutCodes, {})
    content = pack_network(model, SETTINGS)
    assert read_header(content).bits == {}
    assert same_logits(model, unpack_network(content))


def test_a_network_without_quantizers_and_with_other_classes_comes_back():
    model = ResNet(2, num_classes=7).eval()
    content = pack_network(model, SETTINGS)
    assert (read_header(content).blocks_per_stage, read_header(content).num_classes) == (2, 7)
    assert same_logits(model, unpack_network(content))


def test_the_whole_state_comes_back_but_the_count_of_batches():
    model = network()
    back = unpack_network(pack_network(model, SETTINGS))
    assert list(back.state_dict()) == list(ResNet(1).state_dict())
    for name, tensor in back.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor == 0
        else:
            layer = model.get_submodule(name.rpartition(".")[0])
            assert torch.equal(tensor, getattr(layer, name.rpartition(".")[2]))
    assert all(p.requires_grad for p in back.parameters())


def test_nothing_of_the_model_changes_and_its_mode_does_not_matter():
    model = network()
    content = pack_network(model, SETTINGS)
    model.train()
    before = snapshot(model)
    assert pack_network(model, SETTINGS) == content
    unpack_network(content)
    assert snapshot(model) == before
    assert same_logits(model.eval(), unpack_network(content))


def test_the_smaller_network_of_a_file_is_that_of_its_model():
    model = network(3)
    x = images(2, (3, 32, 32)).float()
    assert logits(slim_network(unpack_network(pack_network(model, {}))), x) == logits(slim_network(model), x)


def test_the_header_is_readable_and_gives_settings_metrics_and_bits():
    model, metrics = (
        network(),
        {"accuracy": 0.7, "totals": {"structured_macs": 123}, "ratio": [1, None, True]},
    )
    content = pack_network(model, SETTINGS, metrics)
    header = read_header(content)
    assert (header.settings, header.metrics) == (SETTINGS, metrics)
    assert sorted(set(header.bits.values())) == [2, 3, 4, 6, 8]
    length = struct.unpack_from("<8sIII", content)[2]
    assert json.loads(content[HEADER : HEADER + length])["settings"] == SETTINGS


# Small


def float32_bytes(model: nn.Module) -> int:
    """The float32 state_dict as torch saves it."""
    file = io.BytesIO()
    torch.save({n: t for n, t in model.state_dict().items() if "quantizer" not in n}, file)
    return len(file.getvalue())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_a_file_takes_no_more_than_its_bits(bits):
    model = resnet20().eval()
    arguments = {"fixed_bit_val": bits, "learnable_bit": False, "init_deadzone_logit": 0.8}
    attach_weight_quantizers(model, ["^conv1$", "linear"], DeadZoneLDZCompander, arguments)
    size = len(pack_network(model, SETTINGS))
    coded, rest = 267_264, 4 * (269_722 - 267_264 + 2 * 688)  # all but stem, classifier, batch norms
    assert size < coded * bits / 8 + rest + 1000
    assert size < float32_bytes(model) / (30 / bits)


def entropy_bytes(codes: np.ndarray) -> float:
    shares = np.unique(codes, return_counts=True)[1] / codes.size
    return float(-(shares * np.log2(shares)).sum() * codes.size / 8)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_codes_come_within_a_fifth_of_their_entropy(bits):
    w = torch.from_numpy(np.random.default_rng(0).laplace(size=100_000))
    codes = DeadZoneLDZCompander(fixed_bit_val=bits, learnable_bit=False, init_deadzone_logit=1.0).codes(w)
    q = codes.q.long().numpy() + 2 ** (bits - 1) - 1
    assert len(encoding.compress(encoding.pack_codes(q, bits))[1]) < 1.2 * entropy_bytes(q)


# The format, read by another hand


def read_by_hand(content: bytes) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, np.ndarray | None]]]:
    """The header, and each tensor's numbers and codes, from the head of src/packing.py alone."""
    magic, version, header_bytes, body_bytes = struct.unpack_from("<8sIII", content)
    assert (magic, version) == (b"\x89CoDeQ\r\n", 1)
    assert len(content) == 52 + header_bytes + body_bytes
    assert hashlib.sha256(content[:20] + content[52:]).digest() == content[20:52]
    header = json.loads(content[52 : 52 + header_bytes])
    assert header["compression"] == "lzma"
    body = lzma.decompress(content[52 + header_bytes :], lzma.FORMAT_RAW, filters=LZMA)
    state = ResNet(header["blocks_per_stage"], header["num_classes"]).state_dict()
    tensors = {n: t for n, t in state.items() if t.dtype == torch.float32}
    bits = {f"{layer}.weight": b for layer, b in header["bits"].items()}
    counts = {n: 2 if n in bits else t.numel() for n, t in tensors.items()}
    total = sum(counts.values())
    planes = [body[i * total : (i + 1) * total] for i in range(4)]
    numbers = [struct.unpack("<f", bytes(four))[0] for four in zip(*planes, strict=True)]
    found, at, code_at = {}, 0, 4 * total
    for name, count in counts.items():
        codes = None
        if name in bits:
            codes, size = codes_by_hand(body[code_at:], tensors[name].numel(), bits[name])
            code_at += size
        found[name] = (np.array(numbers[at : at + count], np.float32), codes)
        at += count
    assert code_at == len(body)
    return header, found


def codes_by_hand(content: bytes, count: int, bits: int) -> tuple[np.ndarray, int]:
    """Codes as text: `8 // bits` of them from each byte, or one from two bytes; and the bytes they took."""
    width, a_row = (1, 8 // bits) if bits <= 8 else (2, 1)
    codes, used = [], 0
    while len(codes) < count:
        text = "".join(f"{byte:08b}" for byte in content[used : used + width])
        codes += [int(text[i * bits : (i + 1) * bits], 2) for i in range(a_row)]
        used += width
    return np.array(codes[:count]), used


def test_the_file_is_what_its_description_says():
    model = network()
    header, found = read_by_hand(pack_network(model, SETTINGS))
    assert header["settings"] == SETTINGS
    layers = quantized_layers(model)
    for name, (numbers, codes) in found.items():
        layer = layers.get(name.removesuffix(".weight"))
        if codes is None or layer is None:
            assert numbers.tobytes() == model.state_dict()[name].numpy().tobytes()
            continue
        bits = weight_bits(layer)[0]
        q = (codes - (2 ** (bits - 1) - 1)).astype(np.float32)
        weight = numbers[0] * q + numbers[1] * np.sign(q)
        assert np.array_equal(weight, layer.weight.detach().numpy().ravel())


@quick
@given(st.integers(2, 16), st.data())
def test_codes_of_any_width_and_number_come_back(bits, data):
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40)))
    content = encoding.pack_codes(codes, bits)
    assert len(content) == encoding.code_bytes(len(codes), bits)
    assert np.array_equal(encoding.unpack_codes(content, len(codes), bits), codes)
    by_hand, used = codes_by_hand(content, len(codes), bits)
    assert np.array_equal(by_hand, codes) and used == len(content)


@quick
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30))
def test_numbers_come_back_to_the_bit(values):
    numbers = np.array(values, np.float32)
    assert encoding.unpack_numbers(encoding.pack_numbers(numbers)).tobytes() == numbers.tobytes()


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("size", [1, 17, 100_000])
def test_every_compression_comes_back_and_knows_its_size(name, size):
    content = np.random.default_rng(size).integers(0, 3, size, dtype=np.uint8).tobytes()
    compressed = COMPRESSIONS[name][0](content)
    assert encoding.decompress(compressed, name, size) == content
    for wrong in (size - 1, size + 1):
        with pytest.raises(PackingError):
            encoding.decompress(compressed, name, max(wrong, 1) if size > 1 else 2)
    for other in (compressed[:-1], compressed + b"\0", b"", compressed + compressed):
        with pytest.raises(PackingError):
            encoding.decompress(other, name, size)


@pytest.mark.parametrize("content", [bytes(10_000), bytes(range(256)), b"abc" * 9, b"\1\0\0" * 9000], ids=len)
def test_the_smallest_compression_is_taken(content):
    name, compressed = encoding.compress(content)
    assert compressed == COMPRESSIONS[name][0](content)
    assert len(compressed) == min(len(make(content)) for make, _ in COMPRESSIONS.values())


def test_a_large_content_is_compressed_the_quick_way_and_comes_back(monkeypatch):
    content = bytes(range(256)) * 8
    assert encoding.compress(content)[0] != "zlib"
    monkeypatch.setattr(encoding, "ALL_TRIED", len(content) - 1)
    name, compressed = encoding.compress(content)
    assert name == "zlib" and encoding.decompress(compressed, name, len(content)) == content


def test_the_largest_network_fits_although_nothing_of_it_is_coded():
    with torch.device("meta"):
        largest = ResNet(packing.MAX_BLOCKS_PER_STAGE, packing.MAX_CLASSES)
    numbers = sum(t.numel() for t in largest.state_dict().values())
    assert 4 * numbers + packing.MAX_HEADER_BYTES < packing.MAX_FILE_BYTES


# What cannot be packed


def changed(change: str) -> nn.Module:
    model: Any = network()
    if change == "epsilon":
        model.bn1.eps = 1e-3
    elif change == "stride":
        model.conv1.stride = (2, 2)
    elif change == "blocks":
        model.layer2.append(nn.Identity())
    elif change == "depth":
        model = ResNet(19)
    elif change == "float64":
        model.double()
    elif change == "half":
        model.bn1.half()
    elif change == "NaN":
        with torch.no_grad():
            model.linear.bias[3] = torch.nan
    elif change == "infinite":
        model.bn1.running_var[0] = torch.inf
    elif change == "other":
        model = nn.Linear(3, 3)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("epsilon", "no name"),
        ("stride", "no name"),
        ("blocks", "no name"),
        ("depth", "no name"),
        ("float64", r"conv1.weight is torch.float64; expected torch.float32"),
        ("half", r"bn1.weight is torch.float16"),
        ("NaN", "linear.bias holds a number that is not finite"),
        ("infinite", "bn1.running_var holds a number that is not finite"),
        ("other", "Linear is no ResNet of resnet\\.py, and no name"),
    ],
)
def test_a_network_that_would_not_come_back_is_refused(change, message):
    with pytest.raises(PackingError, match=message):
        pack_network(changed(change), SETTINGS)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1, 2}, object(), b"bytes"], ids=lambda value: type(value).__name__
)
def test_settings_that_are_not_json_are_refused(value):
    for settings_, metrics in (({"a": value}, None), ({}, {"a": value})):
        with pytest.raises(PackingError, match="not strict JSON"):
            pack_network(network(), settings_, metrics)


def test_settings_that_no_reader_would_take_are_refused():
    with pytest.raises(PackingError, match="more than a file has"):
        pack_network(network(), {"a": "x" * packing.MAX_HEADER_BYTES})


# What cannot be unpacked


CONTENT = pack_network(network(), SETTINGS, {"accuracy": 0.5})
HEADER_BYTES = struct.unpack_from("<8sIII", CONTENT)[2]
VALUES = json.loads(CONTENT[HEADER : HEADER + HEADER_BYTES])
BODY = lzma.decompress(CONTENT[HEADER + HEADER_BYTES :], lzma.FORMAT_RAW, filters=LZMA)


def sealed(header: bytes, body: bytes, version: int = 1) -> bytes:
    """A file with the right lengths and checksum, by hand."""
    prefix = struct.pack("<8sIII", b"\x89CoDeQ\r\n", version, len(header), len(body))
    return prefix + hashlib.sha256(prefix + header + body).digest() + header + body


def with_header(**changes: Any) -> bytes:
    """The same file with lies in its header; a field that is "gone" is left out."""
    values = {k: v for k, v in (VALUES | changes).items() if v != "gone"}
    return sealed(json.dumps(values).encode(), CONTENT[HEADER + HEADER_BYTES :])


def with_body(body: bytes, compression: str = "lzma") -> bytes:
    header = json.dumps(VALUES | {"compression": compression}).encode()
    return sealed(header, COMPRESSIONS[compression][0](body))


def refusal(content: bytes) -> str:
    """The sentence with which the content is refused; it takes little memory to find out."""
    tracemalloc.start()
    try:
        with pytest.raises(PackingError) as error:
            unpack_network(content)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 300
    return sentence


def test_the_hand_made_files_are_accepted_as_long_as_nothing_is_a_lie():
    assert with_header() != CONTENT  # spaces in the JSON
    for content in (with_header(), with_body(BODY), with_body(BODY, "bz2"), with_body(BODY, "zlib")):
        assert same_logits(network(), unpack_network(content))


@pytest.mark.parametrize(
    "length", [0, 1, 7, 8, 12, 19, 20, 51, 52, 53, HEADER + HEADER_BYTES, len(CONTENT) - 1]
)
def test_a_truncated_file_is_refused(length):
    assert "truncated" in refusal(CONTENT[:length])


@pytest.mark.parametrize("more", [b"\0", b"x" * 1000, CONTENT], ids=["a byte", "many", "itself again"])
def test_a_file_with_more_behind_it_is_refused(more):
    assert "followed by something else" in refusal(CONTENT + more)


def test_another_version_is_refused_by_its_number():
    sentence = refusal(sealed(CONTENT[HEADER:][:HEADER_BYTES], CONTENT[HEADER + HEADER_BYTES :], version=7))
    assert sentence == "the file has format version 7; this program reads version 1"


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(99), b"{}", b"\x89PNG\r\n\x1a\n", CONTENT[1:]])
def test_another_kind_of_file_is_refused(content):
    assert "no packed network" in refusal(content)


@fuzz
@given(st.integers(0, len(CONTENT) - 1), st.integers(1, 255))
def test_a_changed_byte_is_always_noticed(place, change):
    content = bytearray(CONTENT)
    content[place] ^= change
    sentence = refusal(bytes(content))
    if place >= PREFIX:
        assert "checksum" in sentence


@fuzz
@given(st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT)), st.binary(max_size=40))
def test_what_is_cut_out_or_put_in_is_always_noticed(begin, end, inserted):
    content = CONTENT[:begin] + inserted + CONTENT[end:]
    if content != CONTENT:
        refusal(content)


@settings(fuzz, max_examples=20)
@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes_are_refused(content):
    refusal(content)
    refusal(CONTENT[:8] + content)
    refusal(sealed(content, CONTENT[HEADER + HEADER_BYTES :]))
    refusal(sealed(CONTENT[HEADER : HEADER + HEADER_BYTES], content))


LIES = [
    ({"blocks_per_stage": 0}, "0 blocks a stage; expected 1 to 18"),
    ({"blocks_per_stage": 19}, "19 blocks a stage"),
    ({"blocks_per_stage": 10**9}, "1000000000 blocks a stage"),
    ({"blocks_per_stage": -1}, "-1 blocks a stage"),
    ({"blocks_per_stage": 10**4000}, "blocks a stage"),
    ({"blocks_per_stage": 2}, "does not hold the"),
    ({"blocks_per_stage": 18, "num_classes": 1000}, "does not hold the"),
    ({"blocks_per_stage": 1.0}, "each of its type"),
    ({"blocks_per_stage": True}, "each of its type"),
    ({"blocks_per_stage": "1"}, "each of its type"),
    ({"blocks_per_stage": None}, "each of its type"),
    ({"num_classes": 0}, "0 classes; expected 1 to 1000"),
    ({"num_classes": 1001}, "1001 classes"),
    ({"num_classes": 10**12}, "1000000000000 classes"),
    ({"num_classes": 11}, "does not hold the"),
    ({"channels_last": 1}, "each of its type"),
    ({"bits": []}, "each of its type"),
    ({"bits": {}}, "does not hold the"),
    ({"bits": {"layer9.0.conv1": 4}}, "bits are given for 'layer9.0.conv1', which is no layer"),
    ({"bits": {"bn1": 4}}, "which is no layer"),
    ({"bits": {"x" * 5000: 4}}, "which is no layer"),
    ({"bits": VALUES["bits"] | {"layer1.0.conv1": 1}}, "layer1.0.conv1 has 1 bits; expected 2 to 16"),
    ({"bits": VALUES["bits"] | {"layer1.0.conv1": 17}}, "has 17 bits"),
    ({"bits": VALUES["bits"] | {"layer1.0.conv1": -(10**4000)}}, "expected 2 to 16"),
    ({"bits": VALUES["bits"] | {"layer1.0.conv1": True}}, "has True bits"),
    ({"bits": VALUES["bits"] | {"layer1.0.conv1": 4.0}}, "has 4.0 bits"),
    ({"bits": VALUES["bits"] | {"layer1.0.conv1": "4"}}, "has '4' bits"),
    ({"bits": VALUES["bits"] | {"layer1.0.conv1": [[]]}}, "expected 2 to 16"),
    ({"bits": VALUES["bits"] | {"layer1.0.conv1": 9}}, "does not hold the"),
    ({"bits": VALUES["bits"] | {"linear": 2}}, "does not hold the"),
    ({"compression": "none"}, "compression is 'none'; expected lzma, bz2, zlib"),
    ({"compression": "zlib"}, "cannot be decompressed"),
    ({"compression": "bz2"}, "cannot be decompressed"),
    ({"settings": []}, "each of its type"),
    ({"metrics": "gone"}, "does not hold"),
    ({"more": 1}, "does not hold"),
]


@pytest.mark.parametrize(("changes", "message"), LIES, ids=lambda x: str(x)[:40])
def test_a_header_that_lies_is_refused(changes, message):
    assert message in refusal(with_header(**changes))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"9" * 100_000,
        b"1e999",
        b'""',
    ],
    ids=lambda x: str(x[:6]),
)
def test_a_header_that_is_no_header_is_refused(header):
    sentence = refusal(sealed(header, CONTENT[HEADER + HEADER_BYTES :]))
    assert "not JSON" in sentence or "each of its type" in sentence


@pytest.mark.parametrize("place", [12, 16], ids=["header", "body"])
@pytest.mark.parametrize("claim", [0, 2**18 + 1, 2**31, 2**32 - 1])
def test_a_length_that_lies_is_refused(place, claim):
    content = bytearray(CONTENT)
    struct.pack_into("<I", content, place, claim)
    sentence = refusal(bytes(content))
    assert any(word in sentence for word in ("truncated", "followed", "more than a file has"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=5,
)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from([f for f in VALUES if f not in ("settings", "metrics")]), JSON, min_size=1
    )
)
def test_a_header_of_anything_gives_this_network_or_a_refusal(changes):
    content = with_header(**changes)
    try:
        back = unpack_network(content)
    except PackingError:
        refusal(content)
    else:  # "channels_last" has a say in the last bits
        x = images(1, (3, 32, 32)).float()
        torch.testing.assert_close(back(x), network()(x))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_small_body_that_would_become_gigabytes_is_stopped(compression):
    bomb = with_body(bytes(1 << 26), compression)
    assert len(bomb) < 1 << 18
    assert "does not hold the" in refusal(bomb)


@pytest.mark.parametrize("body", [b"", BODY[:-1], BODY + b"\0"], ids=["none", "short", "long"])
def test_a_body_of_another_size_is_refused(body):
    assert "does not hold the" in refusal(with_body(body))


CODES_BEGIN = {}  # by layer, in BODY
at = len(BODY)
for layer, width in reversed(VALUES["bits"].items()):
    at -= encoding.code_bytes(ResNet(1).get_submodule(layer).weight.numel(), width)
    CODES_BEGIN[layer] = at
NUMBERS = at // 4


@pytest.mark.parametrize("layer", VALUES["bits"])
def test_the_code_beyond_the_levels_of_ours_is_the_least_of_twos_complement(layer):
    body = bytearray(BODY)
    bits = VALUES["bits"][layer]
    before = unpack_network(CONTENT).get_submodule(layer).weight
    body[CODES_BEGIN[layer]] = 0xFF  # 2^b - 1, where 2 Q = 2^b - 2 is the largest of the dead-zone quantizer
    weight = unpack_network(with_body(bytes(body))).get_submodule(layer).weight
    # Every code in that byte is -2^(b - 1); the weights of all other bytes stay.
    changed = weight.flatten()[: max(8 // bits, 1)]
    assert changed.unique().numel() == 1 and (changed < before.min()).all()
    assert torch.equal(weight.flatten()[len(changed) :], before.flatten()[len(changed) :])


@pytest.mark.parametrize("high_bytes", [(0xC0, 0x7F), (0x80, 0xFF)], ids=["NaN", "-inf"])
def test_a_number_that_is_not_finite_is_refused(high_bytes):
    body = bytearray(BODY)
    body[2 * NUMBERS], body[3 * NUMBERS] = high_bytes
    assert refusal(with_body(bytes(body))) == "conv1.weight holds a number that is not finite"


def test_a_step_that_overflows_its_codes_is_refused():
    body = bytearray(BODY)
    first = 3 * 16 * 9 + 4 * 16  # behind the stem and its batch norm
    for plane, byte in enumerate((0xFF, 0xFF, 0x7F, 0x7F)):  # the largest float32
        body[plane * NUMBERS + first + 2 + 4 * 16] = byte  # the step of the first block's conv2: 3 bits
    assert refusal(with_body(bytes(body))) == "layer1.0.conv2.weight holds a number that is not finite"


@settings(fuzz, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, len(BODY) - 1), st.integers(0, 255)), min_size=1, max_size=5),
    st.sampled_from(["lzma", "zlib"]),
    st.booleans(),
)
def test_a_body_of_anything_gives_some_network_or_a_refusal(changes, compression, behind_the_compression):
    """With a checksum that fits, as a stranger can make it."""
    body = COMPRESSIONS[compression][0](BODY) if behind_the_compression else BODY
    changed_body = bytearray(body)
    for place, byte in changes:
        changed_body[place % len(body)] = byte
    header = json.dumps(VALUES | {"compression": compression}).encode()
    made = (
        bytes(changed_body) if behind_the_compression else COMPRESSIONS[compression][0](bytes(changed_body))
    )
    content = sealed(header, made)
    try:
        assert type(unpack_network(content)) is ResNet
    except PackingError:
        refusal(content)
