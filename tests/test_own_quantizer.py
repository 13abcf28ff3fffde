"""Someone's own quantizer: what it must have, what a run does with it, what is refused before it begins."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import own_quantizers
import pytest
import torch
from own_quantizers import LSQ, PerFilter, Ternary
from programs import DEADLINE, ROOT

from experiments.debug_run import main
from experiments.history import History
from experiments.preflight import CHECKS
from experiments.quantizer_class import find_quantizer
from experiments.settings import Settings
from experiments.training import make_optimizer
from experiments.user_code import import_named
from resnet import ResNet
from src.packing import pack_network, read_codes, read_header, unpack_network
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, parameter_groups, quantizers, weight_bits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_stand_in", "quick_end")]

HERE = "own_quantizers"  # pytest puts this folder on the path
SHORT = [
    *("--data", "synthetic", "--limit-train", "128", "--limit-test", "64", "--batch-size", "64"),
    *("--epochs", "1", "--device", "cpu", "--threads", "1", "--preflight", "off"),
]


def short_run(folder, *arguments):
    """Run an epoch of two steps; its history and exit status."""
    status = main([*SHORT, "--output-dir", str(folder), *arguments])
    return History.from_json(json.loads((folder / "history.json").read_text())), status


def line(history, name):
    (found,) = [check for check in history.verdict if check.name == name]
    return found


# The protocol.


def test_two_methods_are_enough():
    model = ResNet(1)
    names = attach_weight_quantizers(model, ["^conv1$"], Ternary, {})
    assert weight_bits(model.layer1[0].conv1) == (2, 2.0)
    groups = {g["name"]: g["params"] for g in make_optimizer(model, Settings()).param_groups}
    assert len(groups["weights"]) == len(list(model.parameters())) and not groups["bit"] + groups["deadzone"]
    assert len(names) == 7 and read_codes(model) == {}


def test_a_parameter_is_trained_in_the_group_that_the_class_names_and_else_as_the_weights_are():
    model = ResNet(1)
    attach_weight_quantizers(model, ["^conv1$", "linear", "conv2"], PerFilter, {})
    groups = {g["name"]: g["params"] for g in make_optimizer(model, Settings()).param_groups}
    factors = [id(q.factor) for q in quantizers(model).values()]
    assert [id(p) for p in groups["deadzone"]] == factors
    model = ResNet(1)
    attach_weight_quantizers(model, ["^conv1$"], LSQ, {})
    groups = {g["name"]: {id(p) for p in g["params"]} for g in make_optimizer(model, Settings()).param_groups}
    assert groups["weights"] == {id(p) for p in model.parameters()}
    assert parameter_groups(LSQ()) == {"step_size": "weights"}


def test_parameters_that_are_not_trained_are_in_no_group():
    assert parameter_groups(DeadZoneLDZCompander()) == {"logit_bit": "bit", "logit_dz": "deadzone"}
    assert parameter_groups(DeadZoneLDZCompander(learnable_bit=False)) == {"logit_dz": "deadzone"}
    assert parameter_groups(Ternary()) == {}


def test_codes_with_one_more_level_below_zero_are_packed_and_come_back():
    torch.manual_seed(0)
    model = ResNet(1).eval()
    attach_weight_quantizers(model, ["^conv1$", "linear"], LSQ, {"fixed_bit_val": 3})
    with torch.no_grad():
        for quantizer in quantizers(model).values():
            quantizer.step_size /= 4  # so that weights are clipped at both ends
    assert all(codes.q.min() == -4 and codes.q.max() == 3 for codes in read_codes(model).values())
    content = pack_network(model, {})
    assert set(read_header(content).bits.values()) == {3}
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(unpack_network(content)(images), model(images))


# The flags.


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {}),
        ({"max_bits": 6}, {"max_bits": 6}),
        ({"fixed_bits": 3}, {"fixed_bit_val": 3, "learnable_bit": False}),
    ],
)
def test_the_default_class_is_made_with_what_the_flags_say_and_no_more(settings, wanted):
    made, plain = find_quantizer(Settings(**settings))(), DeadZoneLDZCompander(**wanted)
    assert type(made) is DeadZoneLDZCompander
    for name in ("max_bits", "fixed_bit_val", "learnable_bit", "learnable_deadzone"):
        assert getattr(made, name) == getattr(plain, name)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), plain.parameters(), strict=True))


def test_a_class_gets_only_the_arguments_that_it_takes():
    assert find_quantizer(Settings(quantizer=f"{HERE}:LSQ", fixed_bits=3))().get_bitwidth() == 3
    assert type(find_quantizer(Settings(quantizer=f"{HERE}:Ternary"))()) is Ternary


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantizer", "LSQ"], ["'LSQ'", "module:Class"]),
        (["--quantizer", "no.such.module:LSQ"], ["no.such.module", "ModuleNotFoundError"]),
        (["--quantizer", f"{HERE}:Missing"], ["no such name"]),
        (["--quantizer", f"{HERE}:no_class"], ["something else", "class of nn.Module"]),
        (["--quantizer", f"{HERE}:Codes"], ["something else", "class of nn.Module"]),
        (["--quantizer", f"{HERE}:WithoutBits"], ["no method get_bitwidth()"]),
        (["--quantizer", f"{HERE}:WithoutForward"], ["NotImplementedError", "forward"]),
        (["--quantizer", f"{HERE}:OtherShape"], ["(2304,)", "(16, 16, 3, 3)"]),
        (["--quantizer", f"{HERE}:NoTensor"], ["NoneType"]),
        (["--quantizer", f"{HERE}:HalfABit"], ["gives 2.5", "1 to 32"]),
        (["--quantizer", f"{HERE}:BitsOfEachFilter"], ["get_bitwidth()", "one whole number"]),
        (["--quantizer", f"{HERE}:LearnedBitsOfEachFilter"], ["get_learned_bitwidth()", "one finite number"]),
        (
            ["--quantizer", f"{HERE}:OfFourDimensions", "--exclude-layers", "^conv1$"],
            ["forward raises IndexError", "(10, 64)", "linear layer"],
        ),
        (["--quantizer", f"{HERE}:UnknownGroup"], ["'biases'", "weights, bit, deadzone"]),
        (["--quantizer", f"{HERE}:UnknownParameter"], ["'scale'", "factor"]),
        (["--quantizer", f"{HERE}:NeedsAnArgument"], ["TypeError", "levels"]),
        (["--quantizer", f"{HERE}:DividesByZero"], ["ZeroDivisionError"]),
        (["--quantizer", f"{HERE}:Writing"], ["Writing.forward writes into the weight"]),
        (["--quantizer", f"{HERE}:OtherCodes"], ["other weights"]),
        (["--quantizer", f"{HERE}:TooLargeCodes"], ["-2 to 1", "2 bits"]),
        (["--quantizer", f"{HERE}:StepOfEachFilter"], ["16 step sizes"]),
        (["--quantizer", f"{HERE}:CodesAsATensor"], ["Tensor", "Codes"]),
        (["--quantizer", f"{HERE}:FixedBitsThatDoNotAct", "--fixed-bits", "4"], ["has 2 bits"]),
        (["--quantizer", f"{HERE}:Ternary", "--fixed-bits", "4"], ["fixed_bit_val", "--fixed-bits"]),
        (["--quantizer", f"{HERE}:LSQ", "--max-bits", "4"], ["max_bits", "--max-bits"]),
        (["--max-bits", "17"], ["max_bits is 17", "2 to 16"]),
        (["--fixed-bits", "1"], ["fixed_bit_val is 1", "2 to 16"]),
        (["--fixed-bits", "33"], ["--fixed-bits is 33", "1 to 32"]),
        (["--max-bits", "6", "--fixed-bits", "4"], ["--max-bits is 6", "--fixed-bits is 4"]),
    ],
)
def test_what_cannot_be_a_quantizer_is_refused_in_one_sentence_before_the_data(
    tmp_path, capsys, monkeypatch, arguments, words
):
    monkeypatch.setattr("experiments.debug_run.load", lambda *_: pytest.fail("the data was loaded"))
    try:
        status = main([*SHORT, "--output-dir", str(tmp_path / "run"), *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in sentence for word in words), sentence


# Runs.


@pytest.mark.parametrize(
    ("name", "penalty_on"),
    [
        ("Drawing", "stored"),
        pytest.param("Drawing", "quantized", marks=pytest.mark.slow),
        *(
            ("Centred", "stored"),
            ("InFloat32", "stored"),
            ("OneBit", "stored"),
            ("AllSixteen", "quantized"),
            ("Pruning", "stored"),
        ),
    ],
)
def test_what_people_write_raises_no_alarm_and_resumes_exactly(tmp_path, name, penalty_on):
    flags = ["--quantizer", f"{HERE}:{name}", "--penalty-on", penalty_on, "--epochs", "2", "--rehearse"]
    flags += ["--preflight", "stop", "--sparsity-delay", "0", "--sparsity-ramp", "1"]
    flags += [] if (name, penalty_on) == ("Drawing", "quantized") else ["--model", "own_networks:Small"]
    history, status = short_run(tmp_path, *flags)
    failed = [check for check in (*history.preflight, *history.verdict) if check.status == "FAIL"]
    assert (failed, status) == ([], 0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("WithoutGradient", ["reaches 0 % of the stored weights"]),
        ("Caching", ["the same for other weights", "cached"]),
        ("Counting", ["other weights each time", "a counter"]),
        ("InEvaluation", ["in evaluation mode than in training mode"]),
        ("ManyLevels", ["different values where 2 bits give at most 4"]),
    ],
)
def test_a_broken_one_is_named_before_the_first_epoch(monkeypatch, tmp_path, capsys, name, words):
    last = [check for check, *_ in CHECKS].index("quantizer: properties")
    monkeypatch.setattr("experiments.preflight.CHECKS", CHECKS[: last + 1])
    flags = ["--quantizer", f"{HERE}:{name}", "--model", "own_networks:Small", "--preflight", "only"]
    assert main([*SHORT, "--output-dir", str(tmp_path), *flags]) == 1
    _, _, first = " ".join(capsys.readouterr().out.split()).partition("FAIL ")
    assert first.startswith("quantizer: properties") and all(word in first for word in words), first


def test_lsq_runs_to_its_packed_file_and_its_step_sizes_are_judged(tmp_path, capsys):
    history, _ = short_run(tmp_path, "--quantizer", f"{HERE}:LSQ", "--fixed-bits", "3")
    out = capsys.readouterr().out
    assert f"Quantizer: {HERE}:LSQ" in out and "as float32 in" not in out
    assert history.settings["quantizer"] == f"{HERE}:LSQ" and history.settings["fixed_bits"] == 3
    assert history.parameter_groups == {"step_size": "weights"} and history.without_codes == []
    for record in history.epochs[-1].layers.values():
        assert record.bits == record.learned_bits == 3 and record.gradients["step_size"]
    assert line(history, "step_size parameters learn").status == "PASS"
    for name in ("bit parameters learn", "dead-zone parameters learn", "bits fall"):
        assert line(history, name).status == "SKIP"
    assert line(history, "packed file gives the same logits").status == "PASS"
    header = read_header((tmp_path / "compressed.codeq").read_bytes())
    assert set(header.bits.values()) == {3} and len(header.bits) == 18
    assert header.settings["quantizer"] == f"{HERE}:LSQ"


def test_a_quantizer_without_codes_is_packed_as_float32_and_that_is_said(tmp_path, capsys):
    history, _ = short_run(tmp_path, "--quantizer", f"{HERE}:Ternary")
    assert "as float32 in 18 quantized layers" in capsys.readouterr().out
    assert history.without_codes == history.quantized and len(history.without_codes) == 18
    for name in ("bit parameters learn", "dead-zone parameters learn", "bits fall"):
        assert line(history, name).status == "SKIP"
    assert line(history, "packed file gives the same logits").status == "PASS"
    assert read_header((tmp_path / "compressed.codeq").read_bytes()).bits == {}


def test_a_parameter_of_several_numbers_is_recorded_by_its_mean_and_the_norm_of_its_gradient(tmp_path):
    history, _ = short_run(tmp_path, "--quantizer", f"{HERE}:PerFilter")
    assert {start.parameters["factor"] for start in history.start.values()} == {1.0}
    assert line(history, "factor parameters learn").status == "PASS"
    for record in history.epochs[-1].layers.values():
        assert record.gradients["factor"] > 0  # a norm
        assert 0 < abs(record.parameters["factor"] - 1) < 0.05  # two steps of AdamW at a rate of 0.01


def test_fixed_bits_are_no_fault(tmp_path):
    history, _ = short_run(tmp_path, "--fixed-bits", "4")
    assert history.parameter_groups == {"logit_dz": "deadzone"}
    assert line(history, "bit parameters learn").status == line(history, "bits fall").status == "SKIP"
    assert {r.bits for r in history.epochs[-1].layers.values()} == {4}


def test_a_run_with_someones_own_quantizer_goes_on_from_its_checkpoint(tmp_path):
    own = ["--quantizer", f"{HERE}:LSQ"]
    whole, _ = short_run(tmp_path / "whole", *own, "--epochs", "2")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoint_0002.pt").unlink()
    parts, _ = short_run(tmp_path / "parts", *own, "--epochs", "2", "--resume")
    assert len(parts.resumed) == 1
    for a, b in zip(whole.epochs, parts.epochs, strict=True):
        assert (a.loss, a.accuracy, a.layers) == (b.loss, b.accuracy, b.layers)
    with pytest.raises(AssertionError):
        assert whole.epochs[0].layers == whole.epochs[1].layers
    assert main([*SHORT, "--output-dir", str(tmp_path / "parts"), "--epochs", "2", "--resume"]) == 2


def test_a_class_in_the_folder_of_the_command_is_found(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "tests" / "own_quantizers.py").read_text())
    command = [sys.executable, "-m", "experiments.debug_run", *SHORT, "--quantizer", "mine:HalfABit"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 2 and "HalfABit.get_bitwidth() gives 2.5" in done.stderr


def test_every_class_of_the_examples_is_used():
    classes = [n for n, c in vars(own_quantizers).items() if isinstance(c, type) and c.__module__ == HERE]
    text = (ROOT / "tests" / "test_own_quantizer.py").read_text()
    assert [name for name in classes if name not in text] == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise KeyboardInterrupt", "raises KeyboardInterrupt (no reason given)"),
        ("class E(BaseException): pass\nraise E('mine')", "raises E (mine)"),
        (
            "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
            "raises E (no reason given)",
        ),
    ],
)
def test_whatever_a_module_raises_is_one_sentence(code, words, tmp_path, monkeypatch):
    (tmp_path / "raises_it.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        import_named("--quantizer", "raises_it:Q", "a class", callable)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_module_leaves_the_process_and_torchs_defaults_as_they_were(tmp_path, monkeypatch):
    code = "import os, sys, torch\nos.chdir('/')\nsys.stdout = None\nQ = len\n"
    code += "torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
    (tmp_path / "changes_all.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    before = Path.cwd(), sys.stdout
    assert import_named("--quantizer", "changes_all:Q", "a class", callable) is len
    assert (Path.cwd(), sys.stdout) == before
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
