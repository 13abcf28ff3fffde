"""Checking a received file: what it prints of each kind, its three answers, and what every mistake says."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from own_networks import Attending
from torch import nn

from experiments import cifar, received, verify
from experiments.compressed import PACKED, SLIM, CompressedRecord, exported, make_compressed
from experiments.data import TestBatches as Batches
from experiments.data import load_dataset
from experiments.files import with_checksum
from experiments.verify import main
from metrics import count_network
from resnet import resnet20
from src.packing import pack_network, read_header
from src.quantizer import DeadZoneLDZCompander
from src.slim import slim_network
from utils_quantization import attach_weight_quantizers

pytestmark = pytest.mark.usefixtures("small_stand_in")
FEW = ["--data", "synthetic", "--limit-test", "40"]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = resnet20()
    attach_weight_quantizers(
        model, ["^conv1$", "^linear$"], DeadZoneLDZCompander, {"init_deadzone_logit": 0.5}
    )
    with torch.no_grad():
        model.layer1[0].conv1.parametrizations.weight.original[:8] = 0
    return model.eval()


@pytest.fixture(scope="module")
def files(network, tmp_path_factory) -> tuple[CompressedRecord, Path]:
    """The files of a run on the first 40 test images of the stand-in, which has as few as in the tests."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.data.SYNTHETIC_TRAIN", 500)
        patch.setattr("experiments.data.SYNTHETIC_TEST", 250)
        dataset = load_dataset("synthetic", folder, 10, 40, print)
    settings = {"preset": "debug", "output_dir": "/home/someone", "data_dir": "/home/someone/data"}
    batches = Batches(dataset, "cpu")
    record = make_compressed(network, count_network(network), batches, folder, settings, dataset.name, [])
    return record, folder


@pytest.fixture
def made(files, tmp_path) -> CompressedRecord:
    """What was measured of the files, which lie in the test's own folder."""
    record, folder = files
    for name in (PACKED, SLIM):
        shutil.copy(folder / name, tmp_path / name)
    return record


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status, and the last line."""
    capsys.readouterr()
    status = main(arguments)
    return status, capsys.readouterr().out.splitlines()[-1]


def changed(network: torch.nn.Module, made: CompressedRecord, **claims: object) -> bytes:
    """The packed file with other claims."""
    return pack_network(network, {}, made.packed_metrics | claims)


# The three answers.


@pytest.mark.parametrize("name", ["compressed.codeq", "slim.pt2"])
def test_what_a_run_left_is_verified_on_the_data_that_it_names(name, made, tmp_path, capsys):
    assert main([str(tmp_path / name), *FEW]) == 0
    out = capsys.readouterr().out
    assert f"{(tmp_path / name).stat().st_size:,} bytes" in out and "40 test images" in out
    assert f"Accuracy: {100 * made.packed_accuracy:.2f} %" in out
    macs = made.dense_macs if name == "compressed.codeq" else made.slim_macs
    assert f"{macs:,} as the network runs" in out
    assert out.splitlines()[-1].startswith("VERIFIED")


def test_without_a_data_set_it_is_the_one_that_the_file_says(made, tmp_path, capsys):
    status, line = answer([str(tmp_path / "compressed.codeq"), "--limit-test", "40"], capsys)
    assert status == 0 and line.startswith("VERIFIED")


def test_a_data_set_that_cannot_be_had_leaves_the_accuracy_unchecked(
    network, made, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(cifar.CIFARS, "cifar10", replace(cifar.CIFARS["cifar10"], sources=()))
    path = tmp_path / "other.codeq"
    path.write_bytes(changed(network, made, data="CIFAR-10"))
    status, line = answer([str(path), "--data-dir", str(tmp_path)], capsys)
    assert status == 3 and line.startswith("NOT CHECKED: the accuracy is of CIFAR-10, which is not here")


def test_the_exported_network_of_one_with_attention_is_verified_as_it_is_counted(tmp_path, capsys):
    """torch counts the products of activations in it too."""
    network = Attending()
    attach_weight_quantizers(network, ["^patches$", "^head$"], DeadZoneLDZCompander, {})
    dataset = load_dataset("synthetic", tmp_path, 10, 40, print)
    count, batches = count_network(network), Batches(dataset, "cpu")
    settings = {"model": "own_networks:Attending"}
    record = make_compressed(network, count, batches, tmp_path, settings, dataset.name, [])
    assert record.slim_macs == count.total("structured_macs")
    status, line = answer([str(tmp_path / SLIM), *FEW], capsys)
    assert status == 0 and line.startswith("VERIFIED")


def test_a_packed_file_is_described(made, tmp_path, capsys):
    main([str(tmp_path / "compressed.codeq"), *FEW])
    out = capsys.readouterr().out
    assert f"Left:     {made.structured_macs:,} of 40,551,040 MACs" in out
    assert "layer3.2.conv2 8" in out and "preset 'debug'" in out


@pytest.mark.parametrize(
    ("claim", "value"),
    [
        ("structured_macs", 7),
        ("zero_weights", 1),
        ("mean_bits", 2.0),
        ("structured_bops_ratio", 99.5),
        ("unstructured_bops_ratio", 99.5),
        ("accuracy", 0.99),
    ],
)
def test_a_claim_that_does_not_hold_is_named(claim, value, network, made, tmp_path, capsys):
    path = tmp_path / "boasts.codeq"
    path.write_bytes(changed(network, made, **{claim: value}))
    status, line = answer([str(path), *FEW], capsys)
    assert status == 1 and line.startswith(f"NOT VERIFIED: {claim} is said to be {value!r}, found ")


@pytest.mark.parametrize(
    ("claims", "arguments", "why"),
    [
        ({"data": "CIFAR-10"}, FEW, "the accuracy is of CIFAR-10, which is not here"),
        ({}, FEW[:2], "the accuracy is of 40 test images, and 250 are here; give --limit-test 40"),
        ({"accuracy": None}, FEW, "says no accuracy"),
    ],
)
def test_on_other_data_nothing_is_scored(claims, arguments, why, network, made, tmp_path, capsys):
    path = tmp_path / "other.codeq"
    path.write_bytes(changed(network, made, **claims))
    assert main([str(path), *arguments]) == 3
    out = capsys.readouterr().out
    assert "Accuracy:" not in out
    assert out.splitlines()[-1].startswith("NOT CHECKED: ") and why in out.splitlines()[-1]


def test_a_false_count_is_told_where_the_accuracy_cannot_be(network, made, tmp_path, capsys):
    path = tmp_path / "both.codeq"
    path.write_bytes(changed(network, made, data="CIFAR-10", zero_weights=3))
    status, line = answer([str(path), *FEW], capsys)
    assert status == 1 and line.startswith("NOT VERIFIED: zero_weights")


def test_an_exported_file_without_a_checksum_is_not_checked(made, tmp_path, capsys):
    content = (tmp_path / "slim.pt2").read_bytes()
    (tmp_path / "bare.pt2").write_bytes(content[:-66] + bytes(2))
    status, line = answer([str(tmp_path / "bare.pt2"), *FEW], capsys)
    assert status == 3 and "carries no checksum" in line


def test_a_claim_that_cannot_be_measured_is_not_verified(made, network, tmp_path, capsys):
    claims = {"data": "synthetic stand-in", "test_images": 40, "accuracy": made.slim_accuracy}
    claims |= {"structured_macs": made.slim_macs, "mean_bits": 2.0}
    path = tmp_path / "boasts.pt2"
    path.write_bytes(exported(slim_network(network), claims))
    status, line = answer([str(path), *FEW], capsys)
    assert status == 3 and line == "NOT CHECKED: mean_bits cannot be measured of this file"


def test_bits_are_claimed_in_vain_of_a_file_in_full_precision(made, tmp_path, capsys):
    path = tmp_path / "boasts.codeq"
    path.write_bytes(pack_network(resnet20().eval(), {}, {"mean_bits": 2.0}))
    status, line = answer([str(path), *FEW], capsys)
    assert status == 1 and "mean_bits is said to be 2.0, found 32.0" in line


def test_products_that_torch_does_not_count_leave_the_multiplications_unchecked(made, tmp_path, capsys):
    class Summing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(10, 3072))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.flatten(1)[:, None] * self.weight[None]).sum(-1)

    claims = {"data": "synthetic stand-in", "test_images": 40, "accuracy": 0.1, "structured_macs": 0}
    path = tmp_path / "boasts.pt2"
    path.write_bytes(exported(Summing(), claims))
    status, line = answer([str(path), *FEW], capsys)
    assert status == 3 and "torch counts no multiplications by weight in structured_macs" in line


def test_a_lack_of_memory_is_not_blamed_on_the_file(made, tmp_path, monkeypatch, capsys):
    def lacking(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("experiments.received.predict", lacking)
    assert "there is not enough memory" in refusal(tmp_path / "compressed.codeq", capsys)
    monkeypatch.setattr(torch.export, "load", lacking)
    assert "there is not enough memory" in refusal(tmp_path / "slim.pt2", capsys)


def test_of_a_network_with_nothing_left_no_finite_ratio_is_true(tmp_path, capsys):
    network = resnet20().eval()
    torch.nn.init.zeros_(network.linear.weight)
    path = tmp_path / "nothing.codeq"
    path.write_bytes(pack_network(network, {}, {"structured_bops_ratio": 17.5}))
    status, line = answer([str(path), *FEW], capsys)
    assert status == 1 and "structured_bops_ratio is said to be 17.5, found inf" in line
    main([str(path), *FEW, "--json"])
    said = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert said["found"]["structured_bops_ratio"] == "inf"


def test_as_json_it_is_one_object_with_claims_and_findings(made, tmp_path, capsys):
    assert main([str(tmp_path / "compressed.codeq"), *FEW, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["result"] == "VERIFIED" and said["false"] == [] and said["left_out"] == []
    assert said["claims"]["accuracy"] == said["found"]["accuracy"] == made.packed_accuracy
    assert said["claims"].keys() == said["found"].keys() and len(said["claims"]) == 8


def test_a_file_that_goes_to_others_names_none_of_its_makers_folders(made, tmp_path):
    header = read_header((tmp_path / "compressed.codeq").read_bytes())
    assert header.settings == {"preset": "debug"}
    exported = (tmp_path / "slim.pt2").read_bytes()
    assert b"someone" not in exported and str(Path(verify.__file__).parents[1]).encode() not in exported


# What is refused.


def refusal(path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence, of a command that is refused."""
    capsys.readouterr()
    assert main([str(path), *FEW]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    return sentence


def test_any_byte_of_an_exported_file_altered_is_refused(made, tmp_path, capsys):
    content, path = (tmp_path / "slim.pt2").read_bytes(), tmp_path / "altered.pt2"
    for place in (0, 40, len(content) // 3, len(content) // 2, len(content) - 90, len(content) - 66, -1):
        altered = bytearray(content)
        altered[place] ^= 1
        path.write_bytes(altered)
        assert "checksum" in refusal(path, capsys) or "no network that torch.export saved" in refusal(
            path, capsys
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut.codeq", "truncated"),
        ("cut.pt2", "no network that torch.export saved"),
        ("other.txt", "expected a file that ends in .codeq or .pt2"),
        ("missing.codeq", "cannot be read (No such file or directory)"),
        ("folder.codeq", "cannot be read (Is a directory)"),
        ("odd.codeq", "the file says 'many' for zero_weights; expected a whole number"),
        ("huge.codeq", "for accuracy; expected a number"),
    ],
)
def test_a_bad_file_gets_one_sentence(name, words, network, made, tmp_path, capsys):
    for kind in ("codeq", "pt2"):
        whole = tmp_path / ("compressed.codeq" if kind == "codeq" else "slim.pt2")
        (tmp_path / f"cut.{kind}").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "other.txt").write_text("something else")
    (tmp_path / "folder.codeq").mkdir()
    (tmp_path / "odd.codeq").write_bytes(changed(network, made, zero_weights="many"))
    (tmp_path / "huge.codeq").write_bytes(changed(network, made, accuracy=10**400))
    assert words in refusal(tmp_path / name, capsys)


class Runs:
    """What makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def torch_pickle() -> bytes:
    content = io.BytesIO()
    torch.save(Runs(), content)
    return content.getvalue()


CODE = "__import__('os').mkdir('ran')"
WEIGHTS, GRAPH = "archive/data/weights/model_weights_config.json", "archive/models/model.json"
# What is altered in an archive: a record of these bytes, or the first such text in a record.
SMUGGLED = {
    "a pickled weight": {"archive/data/weights/weight_0": torch_pickle(), WEIGHTS: ("false", "true")},
    "a pickled input": {"archive/data/sample_inputs/model.pt": torch_pickle()},
    "pickled weights of older versions": {"archive/data/weights/model.pt": torch_pickle()},
    "an object": {"archive/data/constants/opaque_obj_0": pickle.dumps(Runs())},
    "compiled code": {"archive/data/aotinductor/model/model.so": b"ELF"},
    "the archive of older versions": {"version": b"1.0"},
    "a call": {GRAPH: ("torch.ops.aten.relu.default", "torch.os.mkdir")},
    "a guard": {GRAPH: ('"guards_code": [', f'"guards_code": ["{CODE}"')},
    "a size": {GRAPH: ("Symbol('", f"{CODE} or Symbol('")},
    "a name": {GRAPH: ('"name": "relu"', f'"name": "relu = {CODE}; x"')},
    "a module to import": {GRAPH: ('"context\\": \\"[]', '"context\\": \\"[1]')},
}


@pytest.mark.parametrize("kind", SMUGGLED)
def test_an_exported_file_that_could_run_code_is_refused_and_runs_none(
    kind, made, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("slim.pt2") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for name, change in SMUGGLED[kind].items():
        if isinstance(change, tuple):
            old, new = (text.encode() for text in change)
            assert old in records[name]
            change = records[name].replace(old, new, 1)
        records[name] = change
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    Path("evil.pt2").write_bytes(with_checksum(content.getvalue()))
    # torch's own readers refuse these two, and what they say is not passed on.
    by_torch = kind in ("a pickled input", "the archive of older versions")
    said = "no network that torch.export saved" if by_torch else "could run code"
    assert said in refusal("evil.pt2", capsys)
    assert not Path("ran").exists()


def test_an_exported_file_needs_no_model(made, tmp_path, capsys):
    assert main([str(tmp_path / "slim.pt2"), *FEW, "--model", "own_networks:Attending"]) == 2
    assert "brings its network with it" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["vgg11_bn", "F", "resnet21"])
def test_a_model_without_its_module_is_refused(model, tmp_path, capsys):
    path = tmp_path / "own.codeq"
    path.write_bytes(pack_network(Attending().eval(), {}, {}, "own_networks:Attending"))
    assert main([str(path), *FEW, "--model", model]) == 2
    assert f"--model is {model!r}; expected resnet20" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["codeq", "pt2"])
def test_a_file_of_many_gigabytes_is_not_read(ending, tmp_path, capsys):
    path = tmp_path / f"sparse.{ending}"
    with path.open("wb") as file:
        file.truncate(30 << 30)
    assert "32,212,254,720 bytes; expected" in refusal(path, capsys)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("ending", ["codeq", "pt2"])
def test_a_pipe_is_not_waited_for(ending, tmp_path, capsys):
    path = tmp_path / f"pipe.{ending}"
    os.mkfifo(path)
    # Should the program open the pipe, this ends the wait, and the test fails.
    release = threading.Timer(600, lambda: os.close(os.open(path, os.O_WRONLY)))
    release.daemon = True
    release.start()
    assert "is no plain file" in refusal(path, capsys)
    release.cancel()


def test_the_name_of_a_file_cannot_speak_to_the_terminal(made, tmp_path, capsys):
    path = tmp_path / "a\x1b[2J\nVERIFIED\x07.codeq"
    path.write_bytes((tmp_path / "compressed.codeq").read_bytes())
    assert main([str(path), *FEW]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and r"a\x1b[2J\nVERIFIED\x07.codeq" in out


@pytest.mark.slow
def test_without_docstrings_it_runs_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-OO", "-m", "experiments.verify", str(tmp_path / "none.codeq")],
        cwd=Path(verify.__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "cannot be read" in done.stderr and done.stderr.count("\n") == 1


def test_bits_of_a_layer_that_is_never_used_are_not_in_the_mean():
    count = count_network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 10)))
    header = SimpleNamespace(bits={"0": 4, "2": 2, "unused": 8})
    assert received._found(count, header)["mean_bits"] == 3
