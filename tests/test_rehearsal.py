"""The rehearsal: a run resumed in mid-run ends as one that was not, and a difference is found and named."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import runs
import torch
from own_quantizers import LSQ
from random_images import random_dataset
from torch import Tensor

from experiments import received, rehearsal, training
from experiments.checkpoint import save_checkpoint, take_checkpoint
from experiments.compressed import PACKED
from experiments.data import TestBatches, TrainBatches
from experiments.debug_run import main, one_epoch
from experiments.evaluator import Evaluator
from experiments.files import OutputError
from experiments.history import History
from experiments.received import Received
from experiments.rehearsal import rehearse_resuming, rehearse_verifying
from experiments.schedules import cosine_anneal, linear_warmup, warmed_up
from experiments.settings import PRESETS, Settings, parse_settings
from experiments.sparsity import coupled_group_lasso, keep_dead_slices
from experiments.training import Pipeline, TrainingStep, make_optimizer
from resnet import ResNet
from src.packing import pack_network
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers

pytestmark = pytest.mark.slow


def pipeline_of(folder, quantizer=DeadZoneLDZCompander) -> Pipeline:
    """A network of 8 layers that takes two steps an epoch, the penalty acting from the second epoch on."""
    settings = Settings(epochs=4, batch_size=8, output_dir=folder, rehearse=True, batch_norm_batches=1)
    torch.manual_seed(0)
    model = ResNet(1)
    evaluator = Evaluator(model)
    attach_weight_quantizers(model, ["^conv1$", "linear"], quantizer, {})
    images = random_dataset(16)
    optimizer = make_optimizer(model, settings, 8)
    penalty = coupled_group_lasso(model, settings.penalty_on, settings.group_weights)
    step = TrainingStep(model, optimizer, penalty, keep_dead=keep_dead_slices(model))
    return Pipeline(
        settings,
        step,
        TrainBatches(images, 8, 0, "cpu", crop_padding=settings.crop_padding),
        TestBatches(images, "cpu"),
        evaluator,
        rate_schedule=warmed_up(settings.rate_warmup, cosine_anneal(0)),
        sparsity_schedule=linear_warmup(0, 2),
    )


def rehearse(folder, quantizer=DeadZoneLDZCompander, between=lambda spare: None):
    """Train two epochs, and the second once more from the checkpoint; `between` may change the copy."""
    pipeline = pipeline_of(folder, quantizer)
    spare = replace(pipeline, step=copy.deepcopy(pipeline.step))
    between(spare)
    first, history = one_epoch(pipeline, 0)[0], runs.good_run(1)
    start = dict.fromkeys(first.layers, next(iter(history.start.values())))
    history = replace(history, epochs=[first], quantized=[*start], start=start)
    save_checkpoint(folder, take_checkpoint(history, pipeline.model, pipeline.step.optimizer))
    record, _ = one_epoch(pipeline, 1)
    said: list[str] = []
    check, again, compression = rehearse_resuming(pipeline, spare, record, one_epoch, said.append)
    return check, record, again, compression, pipeline, spare, said


def test_a_resumed_epoch_is_the_undisturbed_one_and_the_run_can_go_on_with_it(tmp_path):
    check, record, again, compression, pipeline, spare, said = rehearse(tmp_path)
    assert check.status == "PASS" and "stopped after epoch 1" in check.message
    assert replace(record, seconds=0) == replace(again, seconds=0) and record.coefficient > 0
    assert compression.count.mean_learned_bits == again.learned_bits
    assert len(said) == 1 and "equal" in said[0]
    a, b = one_epoch(pipeline, 2)[0], one_epoch(spare, 2)[0]
    assert replace(a, seconds=0) == replace(b, seconds=0)


class ForgetfulLSQ(LSQ):
    """LSQ whose step size follows a plain attribute, which no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, w: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(w) * (1 + self.calls // 12)


def test_a_state_that_no_checkpoint_holds_is_found(tmp_path):
    check, *_ = rehearse(tmp_path, ForgetfulLSQ)
    assert check.status == "FAIL"
    assert "loss" in check.message and "Likely cause: a state that the checkpoint leaves out" in check.message


def test_lsq_itself_resumes(tmp_path):
    assert rehearse(tmp_path, LSQ)[0].status == "PASS"


def test_a_moment_that_is_not_restored_is_found(tmp_path, monkeypatch):
    restore = rehearsal.restore

    def forget(checkpoint, model, optimizer):
        restore(checkpoint, model, optimizer)
        next(iter(optimizer.state.values()))["exp_avg"].zero_()

    monkeypatch.setattr(rehearsal, "restore", forget)
    assert rehearse(tmp_path)[0].status == "FAIL"


def test_without_a_checkpoint_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "last_checkpoint", lambda *_: None)
    with pytest.raises(OutputError, match="no checkpoint of epoch 1"):
        rehearse(tmp_path)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "PASS"),
        ({"found": {"accuracy": 0.5}}, "FAIL"),
        ({"found": {}}, "FAIL"),
        ({"claims": {"zero_weights": 3}, "found": {"zero_weights": 4, "accuracy": 0.8125}}, "FAIL"),
        ({"left_out": ["no data"]}, "FAIL"),
        ({"macs": 1}, "FAIL"),
    ],
)
def test_the_packed_files_check_compares_what_its_receiver_finds(tmp_path, monkeypatch, changes, status):
    made = runs.compressed()
    found = {"claims": {}, "found": {"accuracy": made.packed_accuracy}, "macs": made.dense_macs} | changes
    monkeypatch.setattr(rehearsal, "check_file", lambda *_: Received(**found))
    monkeypatch.setattr(rehearsal, "_overlooked", lambda *_: [])
    history = runs.good_run()
    history.compressed = made
    history.retest = runs.retest()
    assert rehearse_verifying(history, random_dataset(16), tmp_path, print).status == status


def test_a_receiver_that_raises_an_error_is_a_line_of_the_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "check_file", lambda *_: 1 // 0)
    history = runs.good_run()
    history.compressed, history.retest = runs.compressed(), runs.retest()
    check = rehearse_verifying(history, random_dataset(16), tmp_path, print)
    assert check.status == "FAIL" and "division" in check.message


def test_a_receiver_that_takes_another_claim_is_named(tmp_path, monkeypatch):
    """Whether it compares wrongly, or takes what the file says for what it found."""
    history, images = runs.good_run(), random_dataset(16)
    history.compressed, history.retest = runs.compressed(), runs.retest()
    model = ResNet(1).eval()
    right = training.measure_accuracy(model, TestBatches(images, "cpu"))
    said = {"data": images.name, "test_images": len(images.test_labels), "accuracy": right, "zero_weights": 0}
    (tmp_path / PACKED).write_bytes(pack_network(model, {}, said))
    history.compressed = replace(history.compressed, packed_accuracy=right, dense_macs=12_239_488)
    check = rehearse_verifying(history, images, tmp_path, print)
    assert check.status == "PASS", check.message
    holds = Received._holds
    for name in said:
        with monkeypatch.context() as patch:
            patch.setattr(Received, "_holds", lambda self, n, name=name: n == name or holds(self, n))
            check = rehearse_verifying(history, images, tmp_path, print)
        assert check.status == "FAIL" and f"another {name} would be verified" in check.message
    copied: list[dict[str, Any]] = []
    monkeypatch.setattr(received, "_say_claims", lambda claims, say: copied.append(claims))
    monkeypatch.setattr(received, "_accuracy", lambda *_: copied[-1]["accuracy"])
    check = rehearse_verifying(history, images, tmp_path, print)
    assert check.status == "FAIL" and "another accuracy would be verified" in check.message


def test_behind_a_barrier_torch_may_count_otherwise(tmp_path, monkeypatch):
    made = runs.compressed()
    received = Received({}, {"accuracy": made.packed_accuracy}, macs=made.dense_macs + 1)
    monkeypatch.setattr(rehearsal, "check_file", lambda *_: received)
    monkeypatch.setattr(rehearsal, "_overlooked", lambda *_: [])
    history = runs.good_run()
    history.compressed, history.retest = made, runs.retest()
    for barriers, status in (([], "FAIL"), (["aten.matmul in the network"], "PASS")):
        history.barriers = barriers
        check = rehearse_verifying(history, random_dataset(16), tmp_path, print)
        assert check.status == status and ("experiments/compressed.py" in check.cause) == (status == "FAIL")


def test_without_a_packed_file_there_is_nothing_to_verify(tmp_path):
    assert rehearse_verifying(runs.good_run(), random_dataset(16), tmp_path, print).status == "SKIP"


# The preset.


def test_the_smoke_preset_goes_through_everything_in_few_steps():
    smoke = parse_settings(["--preset", "smoke"])
    assert smoke.rehearse and smoke.data == "synthetic" and smoke.keep_dead and smoke.preflight == "stop"
    steps = smoke.epochs * -(-smoke.limit_train // smoke.batch_size)
    assert 200 <= steps <= 700  # a minute on 2 cores
    assert smoke.sparsity_delay + smoke.sparsity_ramp < smoke.epochs - 1
    assert smoke.output_dir != Settings.output_dir
    assert not {"seed", "precision", "exclude_layers", "quantizer"} & PRESETS["smoke"].keys()


def test_help_has_the_values_of_every_preset(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    smoke, plan = PRESETS["smoke"], PRESETS["plan"]
    assert f"(default: 20; preset smoke: {smoke['epochs']})" in text
    assert f"(default: 0.0018; preset plan: 1; preset smoke: {smoke['sparsity_weight']:g})" in text
    assert f"preset plan: {plan['bit_decay']:g})" in text
    assert "(default: no; preset smoke: yes)" in text


def test_one_epoch_has_no_middle(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--preset", "smoke", "--epochs", "1"])
    assert "--epochs is 1, and --rehearse stops in between; expected 2 or more" in capsys.readouterr().err


def test_a_smoke_run_cut_to_four_steps_has_both_lines_and_no_failure(
    small_stand_in, quick_end, tmp_path, capsys
):
    short = ["--preset", "smoke", "--epochs", "2", "--limit-train", "128", "--limit-test", "64"]
    main([*short, "--device", "cpu", "--threads", "1", "--preflight", "off", "--output-dir", str(tmp_path)])
    history = History.from_json(json.loads((tmp_path / "history.json").read_text()))
    lines = {check.name: check.status for check in history.verdict}
    assert lines[rehearsal.RESUMED] == lines[rehearsal.VERIFIED] == "PASS"
    assert "FAIL" not in lines.values()
    out = capsys.readouterr().out
    assert (
        "stopped after epoch 1, resumed, and epoch 2 again" in out and "VERIFIED: what the file says" in out
    )
