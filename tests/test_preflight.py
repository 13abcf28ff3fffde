"""The preflight through the command: silent where all is well, without a trace, and heard where it is not.

That it catches what is broken is shown by the catalogue of faults (faults.py), one by one.
"""

import errno
import json
import math
import os
import random
import re
from dataclasses import fields, replace

import pytest
import torch
from own_quantizers import LSQ
from runs import good_run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import experiments.history
from experiments import debug_run, report, sparsity
from experiments.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from experiments.data import TrainBatches, synthetic_dataset
from experiments.device import emulates_bf16
from experiments.distributed import Processes
from experiments.evaluator import Evaluator
from experiments.expect import BrokenError, NotApplicableError, Subject, expect_close, shows
from experiments.history import Check, History
from experiments.preflight import CHECKS, preflight
from experiments.preflight_epoch import _is_stale
from experiments.preflight_files import ranks_agree
from experiments.preflight_pictures import COEFFICIENTS, CURVES, DELAY, RAMP, small_history
from experiments.preflight_settings import read_flags
from experiments.schedules import linear_warmup
from experiments.settings import Settings, parse_settings
from experiments.training import TrainingStep, make_optimizer
from resnet import PadShortcut, ResNet, resnet20
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import WeightQuantization, attach_weight_quantizers

pytestmark = pytest.mark.usefixtures("small_stand_in", "quick_end")

SHORT = [
    *("--data", "synthetic", "--limit-train", "96", "--limit-test", "64", "--batch-size", "32"),
    *("--device", "cpu", "--threads", "1", "--epochs", "1"),
]
HERE = "own_quantizers"  # pytest puts this folder on the path


def states(subject) -> tuple[dict[str, Tensor], list[object]]:
    """All that the training after a preflight depends on."""
    model, optimizer = subject.pipeline.model, subject.step.optimizer
    tensors = {n: t.clone() for n, t in model.state_dict().items()} | {"generator": torch.get_rng_state()}
    gradients = [p.grad is None for p in model.parameters()]
    return tensors, [gradients, dict(optimizer.state), random.getstate()]


def checks_of(monkeypatch, folder, *arguments) -> tuple[dict[str, Check], int]:
    """Run the preflight alone; its checks by name, and the exit status.

    Model, optimizer and random states must be left as they were.
    """
    found: list[Check] = []

    def keep(subject, progress, tell):
        tensors, rest = states(subject)
        found.extend(preflight(subject, progress, tell))
        tensors_after, rest_after = states(subject)
        assert [name for name, t in tensors.items() if not torch.equal(t, tensors_after[name])] == []
        assert rest == rest_after
        return found

    monkeypatch.setattr(debug_run, "preflight", keep)
    status = debug_run.main([*SHORT, "--preflight", "only", "--output-dir", str(folder), *arguments])
    return {check.name: check for check in found}, status


def failed(checks: dict[str, Check]) -> list[str]:
    return [str(check) for check in checks.values() if check.status == "FAIL"]


def broken_check(subject) -> str:
    raise BrokenError("7 is not 8", "a test")


def test_without_room_for_temporary_files_the_checkpoint_is_not_checked(monkeypatch, tmp_path):
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    only(monkeypatch, "files: checkpoint")
    checks, status = checks_of(monkeypatch, tmp_path)
    check = checks["files: checkpoint"]
    assert (check.status, status) == ("SKIP", 0) and "TMPDIR" in check.message


def test_convolutions_in_a_lower_precision_than_float32_are_named(monkeypatch, tmp_path):
    plain = nn.Conv2d._conv_forward

    def rounded(self, *arguments):
        made = plain(self, *arguments)
        return made.bfloat16().float() if made.dtype == torch.float32 else made

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", rounded)
    only(monkeypatch, "network: reference")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and "lower precision than --precision says" in failed(checks)[0]


def hooked(model, *rest):
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return make_optimizer(model, *rest)


def hooked_itself(model, *rest):
    optimizer = make_optimizer(model, *rest)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    ("made", "where"), [(hooked, "conv1.weight"), (hooked_itself, "the optimizer's step")]
)
def test_a_hook_that_no_copy_has_is_named(monkeypatch, tmp_path, made, where):
    monkeypatch.setattr(debug_run, "make_optimizer", made)
    only(monkeypatch, "model: optimizer's parameters")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and f"a hook is on {where}" in failed(checks)[0]


def test_gradients_that_are_cleared_behind_the_step_are_named(monkeypatch, tmp_path):
    step = TrainingStep.__call__

    def cleared(self, *arguments):
        losses = step(self, *arguments)
        self.optimizer.zero_grad()
        return losses

    monkeypatch.setattr(TrainingStep, "__call__", cleared)
    only(monkeypatch, "step: gradients")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and "no gradient is left behind a step" in failed(checks)[0]


def ternary_otherwise(s, h, Q):
    """The step at 2 bits is another one, and the edge of the dead zone, h + s / 2, stays."""
    other = torch.where(Q > 1, s, s / 2)
    return other, h + (s - other) / 2, Q


def with_a_narrower_dead_zone(s, h, Q):
    """Where the dead zone, of half-width h + s / 2, is more than half of the range."""
    edge, r = h + s / 2, h + s / 2 + s * (Q - 0.5)
    capped = torch.minimum(edge, r / 2)
    s = (r - capped) / (Q - 0.5)
    return s, capped - s / 2, Q


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (ternary_otherwise, "quantized weights"),
        (with_a_narrower_dead_zone, "inside the dead zone are not zero"),
    ],
)
def test_a_quantizer_that_differs_far_from_its_start_alone_is_named(monkeypatch, tmp_path, grid, words):
    real = DeadZoneLDZCompander._grid
    monkeypatch.setattr(DeadZoneLDZCompander, "_grid", lambda self, w: grid(*real(self, w)))
    only(monkeypatch, "quantizer: formula")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and words in failed(checks)[0]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (lambda w, Q: w.dtype == torch.float32 and not torch.is_grad_enabled(), "without gradients"),
        (lambda w, Q: w.dtype == torch.float32, "others in float32"),
        (lambda w, Q: w.numel() > 20_000 and Q < 2, "layer3.0.conv2"),
    ],
    ids=["without gradients", "in float32", "at 2 bits in large layers"],
)
def test_a_quantizer_that_differs_somewhere_alone_is_named(monkeypatch, tmp_path, where, words):
    real = DeadZoneLDZCompander._grid

    def elsewhere(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, h, Q = real(self, w)
        return (1.1 * s, h, Q) if where(w, Q) else (s, h, Q)

    monkeypatch.setattr(DeadZoneLDZCompander, "_grid", elsewhere)
    only(monkeypatch, "quantizer: formula")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and words in failed(checks)[0]


def rounded_gradient(x: Tensor) -> Tensor:
    if x.requires_grad and x.dtype == torch.float32:
        x.register_hook(lambda gradient: gradient.bfloat16().float())
    return x


def test_a_quantizer_whose_gradient_differs_in_float32_alone_is_named(monkeypatch, tmp_path):
    real = DeadZoneLDZCompander.forward
    monkeypatch.setattr(
        DeadZoneLDZCompander, "forward", lambda self, w: rounded_gradient(real(self, w.clone()))
    )
    only(monkeypatch, "quantizer: formula")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and "the gradient to the stored weights in float32" in failed(checks)[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.detach() if len(x) > 8 else x, "in float32, in a batch of 32 images"),
        (lambda x: x.clamp(max=1) if x.dtype == torch.float32 else x, "logits in training mode, in float32"),
    ],
)
def test_a_shortcut_that_is_another_in_large_batches_or_in_float32_alone_is_named(
    monkeypatch, tmp_path, change, words
):
    real = PadShortcut.forward

    def forward(self, x):
        return real(self, change(x) if self.training else x)

    monkeypatch.setattr(PadShortcut, "forward", forward)
    only(monkeypatch, "network: reference")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and words in failed(checks)[0]


@pytest.mark.parametrize(
    ("padding", "cause"),
    [(2, ""), (4, "padded by more than --crop-padding"), (1, "the range of the crop's offsets")],
)
def test_crops_of_another_padding_than_the_settings_are_named(monkeypatch, tmp_path, padding, cause):
    monkeypatch.setattr(debug_run, "TrainBatches", lambda *of: TrainBatches(*of[:-1], padding))
    only(monkeypatch, "data: augmentation")
    checks, status = checks_of(monkeypatch, tmp_path, "--crop-padding", "2")
    assert status == bool(cause) and all(cause in line for line in failed(checks))


def test_a_layer_that_no_image_passes_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(ResNet, "forward", lambda self, x: F.relu(self.conv1(x))[:, :10].mean((2, 3)))
    only(monkeypatch, "model: quantizers")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and "no image passes layer1.0.conv1" in failed(checks)[0]


def test_a_record_of_bf16_that_is_not_the_devices_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments.history, "emulates_bf16", lambda of: not emulates_bf16(of))
    only(monkeypatch, "report")
    checks, status = checks_of(monkeypatch, tmp_path, "--precision", "bf16")
    assert status == 1 and "is noted for emulates_bf16" in failed(checks)[0]


def test_in_bf16_a_shortcut_that_is_detached_under_autocast_alone_is_named(monkeypatch, tmp_path):
    real = PadShortcut.forward
    monkeypatch.setattr(
        PadShortcut,
        "forward",
        lambda self, x: real(self, x.detach() if torch.is_autocast_enabled("cpu") else x),
    )
    only(monkeypatch, "network: reference")
    checks, status = checks_of(monkeypatch, tmp_path, "--precision", "bf16")
    assert status == 1 and "is left in bf16, 32 images" in failed(checks)[0]


def test_in_bf16_a_quantizer_with_another_gradient_under_autocast_alone_is_named(monkeypatch, tmp_path):
    real = DeadZoneLDZCompander.forward

    def detached(self: DeadZoneLDZCompander, w: Tensor) -> Tensor:
        w_hat = real(self, w)
        return w_hat.detach() + 0.5 * (w - w.detach()) if torch.is_autocast_enabled("cpu") else w_hat

    monkeypatch.setattr(DeadZoneLDZCompander, "forward", detached)
    only(monkeypatch, "quantizer: formula")
    checks, status = checks_of(monkeypatch, tmp_path, "--precision", "bf16")
    assert status == 1 and "the gradient to the stored weights in float32" in failed(checks)[0]


def test_a_penalty_with_something_within_its_root_in_float32_alone_is_named(monkeypatch, tmp_path):
    real = sparsity.group_norms

    def softened(*arguments) -> Tensor:
        norms = real(*arguments)
        return norms if norms.dtype == torch.float64 else (norms.square() + 1e-5).sqrt()

    monkeypatch.setattr(sparsity, "group_norms", softened)
    only(monkeypatch, "penalty")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and "the penalty in float32 is off" in failed(checks)[0]


def last_ten(history: History) -> History:
    return replace(history, epochs=history.epochs[-10:])


def exchanged(history: History) -> History:
    data = history.data
    sizes = {"train_images": data.test_images, "test_images": data.train_images}
    return replace(history, data=replace(data, **sizes))


@pytest.mark.parametrize(
    ("what", "change", "words"),
    [
        ("metrics_csv", lambda csv: lambda history: csv(last_ten(history)), "10 rows of 15 epochs"),
        ("format_ratio", lambda _: lambda x: f"{x if x < 10 else math.ceil(x):.2f}x", "where the ratio is"),
        (
            "first_lines",
            lambda lines: lambda history, *rest: lines(exchanged(history), *rest),
            "765 training and",
        ),
        ("picture_title", lambda title: lambda history, _: title(history, Settings()), "says something else"),
        ("format_ratio", lambda shown: lambda x: shown(min(x, 99.99)), "where the ratio is 1234.56"),
        (
            "preflight_line",
            lambda _: lambda checks, s: f"Preflight: {len(checks)} checks hold",
            "is said where",
        ),
        (
            "layer_table",
            lambda t: lambda c: "\n".join(t(c).splitlines()[:14] + t(c).splitlines()[-1:]),
            "12 rows",
        ),
    ],
    ids=["rows", "ratios", "sizes", "flags", "large ratios", "skipped", "layers"],
)
def test_what_is_said_of_long_runs_and_other_settings_alone_is_named(
    monkeypatch, tmp_path, what, change, words
):
    monkeypatch.setattr(report, what, change(getattr(report, what)))
    only(monkeypatch, "report")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and words in failed(checks)[0]


def test_a_quantizer_that_learns_more_than_its_formula_is_named(monkeypatch, tmp_path):
    real = DeadZoneLDZCompander.__init__

    def learning(self, *arguments, **named):
        real(self, *arguments, **named)
        self.log_range = nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(DeadZoneLDZCompander, "__init__", learning)
    only(monkeypatch, "quantizer: formula")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and "trains log_range" in failed(checks)[0]


@pytest.mark.parametrize("tail", ["uniform", "laplace"])
def test_an_initialization_that_is_not_normal_is_named(monkeypatch, tmp_path, tail):
    def otherwise(weight):
        u = torch.rand_like(weight) - 0.5
        drawn = u if tail == "uniform" else -u.sign() * (1 - 2 * u.abs()).log()
        with torch.no_grad():
            return weight.copy_(drawn / drawn.std() * (2 / weight[0].numel()) ** 0.5)

    monkeypatch.setattr(nn.init, "kaiming_normal_", otherwise)
    only(monkeypatch, "model: start")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and "an initialization that is not normal" in failed(checks)[0]


def test_another_data_set_than_was_asked_for_is_named(monkeypatch, tmp_path):
    whole = synthetic_dataset("")
    monkeypatch.setattr(debug_run, "load", lambda *_: replace(whole, name="CIFAR-10", synthetic=False))
    only(monkeypatch, "data: files")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and "the data set is CIFAR-10, and --data is synthetic" in failed(checks)[0]


# Where all is well.


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        pytest.param(
            (
                "--preset",
                "plan",
                "--limit-train",
                "20",
                "--batch-size",
                "7",
                "--limit-test",
                "9",
                "--seed",
                "5",
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("--exclude-layers", ".", "--batch-size", "1", "--limit-train", "3"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("--fixed-bits", "4", "--sparsity-weight", "0", "--precision", "bf16"), marks=pytest.mark.slow
        ),
    ],
    ids=" ".join,
)
def test_no_check_fails_on_a_pipeline_that_works(monkeypatch, tmp_path, capsys, arguments):
    checks, status = checks_of(monkeypatch, tmp_path, *arguments)
    assert failed(checks) == [] and status == 0
    assert list(checks) == [name for name, *_ in CHECKS]
    assert not list(tmp_path.iterdir())
    assert re.search(r"\d+ checks hold, \d+ s", capsys.readouterr().out)


@pytest.mark.slow
def test_no_check_fails_on_a_run_that_resumes_with_moments_and_a_dead_layer(monkeypatch, tmp_path):
    run(tmp_path, "--preflight", "off", "--epochs", "1", "--sparsity-delay", "0", "--sparsity-ramp", "0")
    checkpoint = load_checkpoint(checkpoint_path(tmp_path, 1))
    checkpoint.model["layer1.0.conv1.parametrizations.weight.original"].zero_()
    save_checkpoint(tmp_path, checkpoint)
    again = ("--resume", "--epochs", "2", "--sparsity-delay", "0", "--sparsity-ramp", "0")
    checks, status = checks_of(monkeypatch, tmp_path, *again)
    assert failed(checks) == [] and status == 0
    assert {n for n, c in checks.items() if "waits for" in c.message} == set()


def only(monkeypatch, name):
    """Let the preflight be this check alone."""
    monkeypatch.setattr("experiments.preflight.CHECKS", tuple((n, c, ()) for n, c, _ in CHECKS if n == name))


def test_gradients_that_are_scaled_in_bf16_alone_are_named(monkeypatch, tmp_path):
    cross_entropy = TrainingStep._cross_entropy

    def scaled(step, *arguments):
        whole = cross_entropy(step, *arguments)
        return whole if step.precision == "float32" else 0.1 * whole + 0.9 * whole.detach()

    monkeypatch.setattr(TrainingStep, "_cross_entropy", scaled)
    only(monkeypatch, "step: gradients")
    checks, status = checks_of(monkeypatch, tmp_path, "--precision", "bf16")
    assert status == 1 and "in mixed precision alone" in failed(checks)[0]


@pytest.mark.parametrize(("images", "status"), [(15, 0), (16, 1)])
def test_the_normalisation_is_not_judged_by_a_few_images(monkeypatch, tmp_path, images, status):
    dark = torch.full((images, 3, 32, 32), -1.8), torch.zeros(images, dtype=torch.long)
    monkeypatch.setattr(Subject, "first_batch", dark)
    only(monkeypatch, "data: test images")
    assert checks_of(monkeypatch, tmp_path)[1] == status


@pytest.mark.parametrize(
    ("said", "value", "shown"),
    [
        ("6.50", 6.504, True),
        ("6.50", 6.506, False),
        ("8", 8.4, True),
        ("8", 8.6, False),
        ("1,234", 1234, True),
        ("-0.5", -0.52, True),
        ("", 0, False),
    ],
)
def test_a_printed_number_shows_a_value_to_its_last_digit(said, value, shown):
    assert shows(said, value) == shown


def test_weights_that_are_held_over_a_step_are_stale():
    layer = torch.nn.Conv2d(8, 8, 3)
    attach_weight_quantizers(torch.nn.Sequential(layer), [], DeadZoneLDZCompander, {})
    with torch.no_grad(), parametrize.cached():
        assert layer.weight.any() and not _is_stale(layer)
        layer.parametrizations.weight.original.mul_(1 + 1e-7)  # as statistics move that have settled
        assert not _is_stale(layer)
        layer.parametrizations.weight.original.mul_(1.01)
        assert _is_stale(layer)


def test_a_quantized_classifier_raises_no_alarm(monkeypatch, tmp_path):
    only(monkeypatch, "report")
    checks, status = checks_of(monkeypatch, tmp_path, "--exclude-layers", "^conv1$")
    assert status == 0 and failed(checks) == []


def test_weights_that_are_rounded_under_autocast_alone_are_named(monkeypatch, tmp_path):
    forward = WeightQuantization.forward

    def rounding(self, w: Tensor) -> Tensor:
        return forward(self, w.bfloat16().to(w.dtype) if torch.is_autocast_enabled("cpu") else w)

    monkeypatch.setattr(WeightQuantization, "forward", rounding)
    only(monkeypatch, "quantizer: properties")
    checks, status = checks_of(monkeypatch, tmp_path, "--precision", "bf16")
    assert status == 1 and "other weights under autocast" in failed(checks)[0]


class Both(Processes):
    """Two ranks that hold the same."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(2)


def test_shards_that_overlap_are_named(monkeypatch, tmp_path):
    def of_ranks(subject, *_):
        subject.step.processes = Both(0, 2)
        with pytest.raises(BrokenError, match=r"the shards of a batch of \d+ images hold \d+") as error:
            ranks_agree(subject)
        assert "leave images out, or overlap" in error.value.cause
        return []

    monkeypatch.setattr(debug_run, "preflight", of_ranks)
    assert debug_run.main([*SHORT, "--output-dir", str(tmp_path), "--preflight", "only"]) == 0


def test_ranks_that_draw_their_own_numbers_are_not_held_against_one(monkeypatch, tmp_path):
    def of_ranks(subject, *_):
        subject.step.processes = Both(0, 2)
        with pytest.raises(NotApplicableError, match="each draws its own numbers"):
            ranks_agree(subject)
        return []

    monkeypatch.setattr(debug_run, "preflight", of_ranks)
    network = ["--model", "own_networks:WithDropout", "--preflight", "only"]
    assert debug_run.main([*SHORT, "--output-dir", str(tmp_path), *network]) == 0


@pytest.mark.slow
def test_what_is_not_this_projects_own_is_skipped_with_the_reason(monkeypatch, tmp_path):
    assert issubclass(LSQ, torch.nn.Module) and not issubclass(LSQ, DeadZoneLDZCompander)
    real = debug_run.coupled_group_lasso

    def own_penalty(model, *how) -> object:
        lasso = real(model, *how)

        def half(model) -> Tensor:
            return 0.5 * lasso(model)

        return half

    monkeypatch.setattr(debug_run, "coupled_group_lasso", own_penalty)
    monkeypatch.setattr(debug_run, "linear_warmup", lambda delay, ramp: lambda epoch, epochs: 1.0)
    checks, status = checks_of(monkeypatch, tmp_path, "--quantizer", f"{HERE}:LSQ")
    assert failed(checks) == [] and status == 0
    assert checks["quantizer: formula"].status == "SKIP" and "not this project's" in str(checks["penalty"])
    assert "penalty" in checks["schedules"].message


# Where something is not.


@pytest.fixture
def one_broken_check(monkeypatch):
    """A preflight of two checks of which the first fails, and a third that needs it."""
    monkeypatch.setattr(
        "experiments.preflight.CHECKS",
        (
            ("first", broken_check, ()),
            ("second", lambda subject: "fine", ()),
            ("third", lambda subject: "fine", ("first",)),
        ),
    )


def run(folder, *arguments) -> int:
    return debug_run.main([*SHORT, "--output-dir", str(folder), *arguments])


def test_a_check_that_fails_stops_the_run_with_its_figures_and_cause_and_touches_no_file(
    one_broken_check, tmp_path, capsys
):
    (tmp_path / "history.json").write_text("of an earlier run")
    assert run(tmp_path) == 1
    out = capsys.readouterr().out
    assert "FAIL  first: 7 is not 8" in out and "Likely cause: a test" in out
    assert "Epoch |" not in out and "1 of 3 checks FAIL" in out and "--preflight warn goes on" in out
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of an earlier run"]


def test_what_fails_is_told_before_the_next_check_is_made(monkeypatch, tmp_path, capsys):
    told = []

    def second(subject):
        told.append(capsys.readouterr().out)
        return "fine"

    monkeypatch.setattr("experiments.preflight.CHECKS", (("first", broken_check, ()), ("second", second, ())))
    assert run(tmp_path) == 1
    assert "FAIL  first: 7 is not 8" in told[0] and "second" not in capsys.readouterr().out
    run(tmp_path, "--preflight", "only")
    assert "PASS  second: fine" in capsys.readouterr().out


@pytest.mark.slow
def test_warn_goes_on_and_the_history_keeps_what_was_found(one_broken_check, tmp_path, capsys):
    assert run(tmp_path, "--preflight", "warn") == 1
    out = capsys.readouterr().out
    assert "Epoch |" in out and out.endswith("and 1 of the preflight FAIL\n")
    history = History.from_json(json.loads((tmp_path / "history.json").read_text()))
    assert [check.status for check in history.preflight] == ["FAIL", "PASS", "SKIP"]
    assert "waits for 'first'" in history.preflight[2].message


def test_off_checks_nothing_and_says_so(one_broken_check, tmp_path, capsys):
    run(tmp_path, "--preflight", "off")
    out = capsys.readouterr().out
    assert "Preflight: off" in out and "7 is not 8" not in out
    assert History.from_json(json.loads((tmp_path / "history.json").read_text())).preflight == []


def test_an_error_in_the_runs_own_code_is_a_fail_that_names_the_place(monkeypatch, tmp_path, capsys):
    def lasso(model, *how) -> object:
        def penalty(model) -> Tensor:
            raise RuntimeError("no such layer")

        penalty.__module__ = "experiments.sparsity"
        return penalty

    monkeypatch.setattr(debug_run, "coupled_group_lasso", lasso)
    only(monkeypatch, "penalty")
    checks, status = checks_of(monkeypatch, tmp_path)
    assert status == 1 and "RuntimeError: no such layer" in str(checks["penalty"])
    assert "penalty (line" in str(checks["penalty"])


def test_no_two_curves_or_layers_of_the_small_history_are_alike():
    dense = Evaluator(resnet20()).dense
    history = small_history(good_run(), dense)
    columns = [tuple(f(r) for r in history.epochs) for c in CURVES.values() for f, _ in c.values()]
    others = [tuple(getattr(r, n) for r in history.epochs) for n in ("loss", "penalty", "bits", "seconds")]
    assert len({*columns, *others}) == len(columns) + len(others)
    assert history.final
    convolutions = [layer for layer in dense.layers if layer.is_convolution]
    counts = [layer for layer in history.final.layers if layer.is_convolution]
    assert [(x.name, x.filters) for x in counts] == [(x.name, x.filters) for x in convolutions]
    layers = [tuple(r.layers[x.name].alive_channels for r in history.epochs) for x in counts]
    assert len(set(layers)) == len(layers) == len({x.states for x in counts}) == 19
    assert [linear_warmup(DELAY, RAMP)(e, 5) * 1e-3 for e in range(5)] == list(COEFFICIENTS)


TYPED = [
    [],
    ["--preset", "plan", "--weights-lr", "1.2e-2", "--sparsity-delay=0", "--no-keep-dead", "--resume"],
    ["--exclude-layers", "a=b", "-1", "x y", "--max-bits", "none", "--fixed-bits=4", "--limit-train", "9"],
    ["--exclude-layers", "--epochs", "2", "--epochs", "3", "--output-dir", "--a b", "--threads", "none"],
    ["--exclude-layers=", "--keep-dead", "--no-keep-dead", "--data-dir=--epochs", "--preset=smoke"],
]


@pytest.mark.parametrize("arguments", TYPED, ids=" ".join)
def test_the_flags_are_read_as_the_parser_reads_them(arguments):
    parsed, typed = parse_settings(arguments), read_flags(arguments)
    assert typed == {name: getattr(parsed, name) for name in typed}
    words = {a.partition("=")[0].replace("--no-", "--") for a in arguments}
    assert set(typed) == {f.name for f in fields(Settings) if "--" + f.name.replace("_", "-") in words}


def test_a_setting_that_is_not_what_was_typed_is_named_with_both_values(monkeypatch, tmp_path):
    def other(arguments):
        return replace(parse_settings(arguments), bit_lr=0.5)

    monkeypatch.setattr(debug_run, "parse_settings", other)
    monkeypatch.setattr("experiments.preflight.CHECKS", CHECKS[:1])
    checks, status = checks_of(monkeypatch, tmp_path, "--bit-lr", "0.25")
    assert status == 1 and failed(checks)[0].startswith("FAIL  settings: --bit-lr is 0.5, and 0.25 is typed")
    checks, status = checks_of(monkeypatch, tmp_path, "--preset", "plan")
    assert "--bit-lr is 0.5, and 0.001 is the preset's" in failed(checks)[0]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1.1])
def test_numbers_that_are_not_close_are_broken_also_where_they_are_no_numbers(number):
    wanted = torch.ones(3, dtype=torch.float64)
    assert expect_close(wanted.clone(), wanted, "x", "y", 1e-8) == 0
    with pytest.raises(BrokenError):
        expect_close(torch.tensor([1.0, number, 1.0]).double(), wanted, "x", "y", 1e-8)
    with pytest.raises(BrokenError):
        expect_close(wanted[:2], wanted, "x", "y", 1e-8)
