"""Checking a received file: what it prints of each kind, and what every mistake says."""

import pytest
import torch

from experiments.compressed import exported
from experiments.verify import main
from metrics import count_network
from resnet import resnet20
from src.packing import pack_network
from src.quantizer import DeadZoneLDZCompander
from src.slim import slim_network
from utils_quantization import attach_weight_quantizers

FEW = ["--data", "synthetic", "--limit-test", "40"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("received")
    torch.manual_seed(0)
    model = resnet20()
    attach_weight_quantizers(model, ["^conv1$", "^linear$"], DeadZoneLDZCompander, {})
    with torch.no_grad():
        model.layer1[0].conv1.parametrizations.weight.original[:8] = 0
    left = count_network(model).total("structured_macs")
    (folder / "good.codeq").write_bytes(pack_network(model, {"preset": "debug"}, {"structured_macs": left}))
    (folder / "boasts.codeq").write_bytes(pack_network(model, {}, {"structured_macs": left - 1}))
    (folder / "good.pt2").write_bytes(exported(slim_network(model)))
    (folder / "cut.codeq").write_bytes((folder / "good.codeq").read_bytes()[:-1])
    (folder / "cut.pt2").write_bytes((folder / "good.pt2").read_bytes()[:-100])
    (folder / "other.txt").write_text("something else")
    return folder, left


def test_a_packed_file_is_described_and_its_claim_checked(files, capsys):
    folder, left = files
    assert main([str(folder / "good.codeq"), *FEW]) == 0
    out = capsys.readouterr().out
    assert f"{(folder / 'good.codeq').stat().st_size:,} bytes" in out
    assert f"Left:     {left:,} of 40,551,040 MACs" in out and "NOT TRUE" not in out
    assert "layer3.2.conv2 8" in out and "Accuracy:" in out and "40 test images" in out


def test_a_packed_file_with_a_false_claim_fails(files, capsys):
    folder, _ = files
    assert main([str(folder / "boasts.codeq"), *FEW]) == 1
    assert "NOT TRUE" in capsys.readouterr().out


def test_an_exported_network_has_the_accuracy_of_the_packed_one_and_the_macs_it_claims(files, capsys):
    folder, left = files
    accuracies = []
    for name in ("good.codeq", "good.pt2"):
        assert main([str(folder / name), *FEW]) == 0
        out = capsys.readouterr().out
        accuracies += [line for line in out.splitlines() if line.startswith("Accuracy")]
    assert f"{left:,} as the network runs" in out
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut.codeq", "truncated"),
        ("cut.pt2", "no network that torch.export saved"),
        ("other.txt", "expected a file that ends in .codeq or .pt2"),
        ("missing.codeq", "cannot read"),
    ],
)
def test_a_bad_file_gets_one_sentence_and_exit_status_2(files, name, words, capsys):
    folder, _ = files
    assert main([str(folder / name), *FEW]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and "Traceback" not in err
