"""The ledger passes an epoch as it should be, and names each thing that goes another way."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from random_images import random_dataset
from torch import Tensor, nn

from experiments import debug_run, training
from experiments.checkpoint import save_checkpoint, take_checkpoint
from experiments.data import TestBatches, TrainBatches
from experiments.debug_run import one_epoch
from experiments.evaluator import Evaluator
from experiments.history import Check, EpochRecord
from experiments.ledger import (
    FAIL,
    PASS,
    SKIP,
    Chunk,
    _shares,
    adamw_reach,
    checkpoint_is_the_state,
    is_thorough,
)
from experiments.schedules import cosine_anneal, linear_warmup, warmed_up
from experiments.settings import QUANTIZED, STORED, Settings
from experiments.sparsity import coupled_group_lasso, keep_dead_slices
from experiments.training import Pipeline, TrainingStep, make_optimizer
from experiments.watch import EpochWatch, fingerprint, left_in
from metrics import count_network
from resnet import PadShortcut, ResNet
from src.quantizer import DeadZoneLDZCompander, _DeadZoneRound
from utils_quantization import attach_weight_quantizers, quantized_layers, quantizers, toggle_quantization

SETTINGS = Settings(
    epochs=4, batch_size=8, crop_padding=4, sparsity_weight=2.8e-3, sparsity_delay=0.0, sparsity_ramp=2.0,
    batch_norm_batches=2, weights_lr=8e-3,
)  # fmt: skip
PENALISED = 1  # an epoch, from 0, in which the penalty acts
IMAGES = random_dataset(24, test=10)


def pipeline(settings: Settings = SETTINGS, **changes: Any) -> Pipeline:
    torch.manual_seed(0)
    model = ResNet(1)
    evaluator = Evaluator(model)
    attach_weight_quantizers(model, ["^conv1$", "^linear$"], DeadZoneLDZCompander, {})
    batches = TrainBatches(
        IMAGES, settings.batch_size, settings.seed, "cpu", crop_padding=settings.crop_padding
    )
    optimizer = make_optimizer(model, settings, settings.epochs * len(batches))
    keep_dead = keep_dead_slices(model) if settings.keep_dead else None
    penalty = coupled_group_lasso(model, settings.penalty_on, settings.group_weights)
    step = TrainingStep(model, optimizer, penalty, settings.precision, keep_dead)
    whole = Pipeline(
        settings,
        step,
        batches,
        TestBatches(IMAGES, "cpu"),
        evaluator,
        rate_schedule=warmed_up(SETTINGS.rate_warmup, cosine_anneal(0)),
        sparsity_schedule=linear_warmup(settings.sparsity_delay, settings.sparsity_ramp),
    )
    return dataclasses.replace(whole, **changes)


def found(whole: Pipeline, epochs: int = 2) -> dict[str, Check]:
    """What the ledger says of the last of these epochs."""
    records = [one_epoch(whole, epoch)[0] for epoch in range(epochs)]
    return {check.name: check for check in records[-1].ledger}


def failures(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.status == FAIL]


def assert_only(checks: dict[str, Check], name: str, *words: str) -> None:
    """This check alone fails, with these words, in one line that has a likely cause."""
    assert failures(checks) == [name], [str(c) for c in checks.values() if c.status == FAIL]
    message = checks[name].message
    assert "Likely cause: " in message and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("precision", "batch_norm_batches", "beta2"),
    [
        ("float32", 2, 0.99),
        ("bf16", 0, 0.999),
        ("float32", 100, 0.25),
        pytest.param("float32", 0, 0.81, marks=pytest.mark.slow),
        pytest.param("bf16", 2, 0.5, marks=pytest.mark.slow),
    ],
)
def test_epochs_as_they_should_be_pass_every_check(precision, batch_norm_batches, beta2):
    settings = dataclasses.replace(
        SETTINGS, precision=precision, batch_norm_batches=batch_norm_batches, beta2=beta2
    )
    whole = pipeline(settings)
    records = [one_epoch(whole, epoch)[0] for epoch in range(settings.epochs)]
    skipped = [(r.epoch, c.name) for r in records for c in r.ledger if c.status == SKIP]
    assert [str(c) for r in records for c in r.ledger if c.status == FAIL] == []
    assert skipped == []


def test_crops_of_another_padding_than_the_settings_are_named():
    settings = dataclasses.replace(SETTINGS, crop_padding=2)
    assert failures(found(pipeline(settings), 1)) == []
    for padding in (1, 4):
        batches = TrainBatches(IMAGES, settings.batch_size, settings.seed, "cpu", crop_padding=padding)
        checks = found(pipeline(settings, train_batches=batches), 1)
        assert "images looked at" in checks["images and their order"].message


@pytest.mark.parametrize("padding", [0, 1, 2])  # 3072, 3468 and 3888 bytes an image
def test_a_pixel_or_a_label_that_is_written_changes_the_number_of_its_image_alone(padding):
    batches = TrainBatches(IMAGES, 8, 0, "cpu", crop_padding=padding)
    rows = batches.pixels.view(len(IMAGES.train_labels), -1)
    rows[3, 0], rows[3, 9] = 1, 2
    before = fingerprint(batches)
    for place in (0, 5, rows.shape[1] - 1):
        rows[3, place] += 1
        assert (fingerprint(batches) != before).nonzero().tolist() == [[3]]
        rows[3, place] -= 1
    rows[3, 0], rows[3, 9] = 2, 1
    batches.labels = batches.labels.clone()
    batches.labels[4] += 1
    assert (fingerprint(batches) != before).nonzero().tolist() == [[3], [4]]


def test_what_takes_long_is_looked_at_in_the_first_epochs_in_every_fourth_and_in_the_last():
    assert [epoch for epoch in range(20) if is_thorough(epoch, 20)] == [0, 1, 2, 4, 8, 12, 16, 19]


# Rates, the optimizer and the penalty's coefficient.


def test_a_rate_that_follows_another_schedule_is_named(monkeypatch):
    whole = pipeline(rate_schedule=warmed_up(SETTINGS.rate_warmup, cosine_anneal(1)))
    assert failures(found(whole, 1)) == []  # the same in the first epoch
    checks = found(pipeline(rate_schedule=warmed_up(SETTINGS.rate_warmup, cosine_anneal(1))), 2)
    assert failures(checks)[0] == "learning rates and decays"
    assert "expected 0.00455228" in checks["learning rates and decays"].message


def test_someone_elses_schedules_are_taken_at_their_word():
    checks = found(pipeline(rate_schedule=lambda e, total: 0.5, sparsity_schedule=lambda e, total: 0.25))
    assert failures(checks) == []
    assert checks["penalty coefficient"].message == "0.0007"


def test_rates_that_are_set_after_the_training_are_named(monkeypatch):
    monkeypatch.setattr(debug_run, "set_learning_rates", lambda optimizer, factor: None)
    assert "learning rates and decays" in failures(found(pipeline()))


@pytest.mark.parametrize("field", ["weights_lr", "weights_decay", "bit_lr", "deadzone_decay", "beta2"])
def test_an_optimizer_with_another_setting_is_named(field):
    whole = pipeline()
    other = dataclasses.replace(SETTINGS, **{field: 0.5 * getattr(SETTINGS, field) + 1e-3})
    whole.step.optimizer = make_optimizer(whole.model, other)
    assert failures(found(whole))[0] == "learning rates and decays"


def test_another_optimizer_is_named():
    whole = pipeline()
    groups = [dict(g, weight_decay=0.1) for g in whole.step.optimizer.param_groups]
    plain = dict(groups[0], params=list(whole.model.parameters()))
    whole.step.optimizer = torch.optim.Adam([plain], betas=(0.9, SETTINGS.beta2))
    assert failures(found(whole))[0] == "learning rates and decays"


def test_a_parameter_that_the_optimizer_misses_is_named():
    whole = pipeline()
    del whole.step.optimizer.param_groups[0]["params"][1]
    assert_only(found(whole), "optimizer steps", "took 0")


def test_a_frozen_parameter_is_named():
    whole = pipeline()
    whole.model.layer3[0].conv2.parametrizations.weight.original.requires_grad_(False)
    checks = found(whole)
    assert_only(checks, "optimizer steps", "frozen", "layer3.0.conv2")


def test_a_quantizer_that_does_not_learn_its_bits_by_design_is_no_fault():
    torch.manual_seed(0)
    whole = pipeline()
    for quantizer in quantizers(whole.model).values():
        quantizer.learnable_bit, quantizer.fixed_bit_val = False, 4
        quantizer.logit_bit.requires_grad_(False)
    whole.step.optimizer = make_optimizer(whole.model, SETTINGS, SETTINGS.epochs * 3)
    assert failures(found(whole)) == []


def test_a_parameter_whose_steps_round_away_is_no_fault():
    # 24 steps of half the distance between 2.1 and the next float32: together 13 times that distance.
    settings = dataclasses.replace(SETTINGS, batch_size=1, bit_lr=1.1e-7, bit_decay=0.0)
    whole = pipeline(settings, rate_schedule=lambda epoch, epochs: 1.0)
    with torch.no_grad():
        for quantizer in quantizers(whole.model).values():
            quantizer.logit_bit.fill_(2.1)
    assert failures(found(whole, 1)) == []
    assert {q.logit_bit.item() for q in quantizers(whole.model).values()} == {torch.tensor(2.1).item()}


@pytest.mark.parametrize("bits", [2, 3])
def test_a_bit_width_between_two_whole_ones_may_be_rounded_to_either(bits):
    # A logit whose bits float64 rounds to 3, while float32 may have 2.5, which is rounded to 2.
    quantizer, logit = DeadZoneLDZCompander(), torch.tensor([math.atanh(0.5 / 6)])
    while not (quantizer.get_bitwidth() == bits and 2 + 6 * math.tanh(logit.item()) > 2.5):
        logit = torch.nextafter(logit, torch.tensor([1.0]))
        with torch.no_grad():
            quantizer.logit_bit.copy_(logit)
    whole = pipeline(dataclasses.replace(SETTINGS, bit_lr=1e-12, bit_decay=0.0))
    with torch.no_grad():
        for q in quantizers(whole.model).values():
            q.logit_bit.copy_(logit)
    checks = found(whole)
    assert failures(checks) == []
    assert checks["weights are the quantizer's"].status == PASS


def test_a_parameter_that_ends_the_epoch_where_it_began_has_moved_all_the_same(monkeypatch):
    trained = EpochWatch.trained

    def back_again(self: EpochWatch, *rest: Any) -> None:
        trained(self, *rest)
        sizes = [p.numel() for p in self.parameters.values()]
        for now, then in zip(self.after.values.split(sizes), self.before.values.split(sizes), strict=True):
            if len(now) == 1:
                now.copy_(then)

    monkeypatch.setattr(EpochWatch, "trained", back_again)
    settings = dataclasses.replace(SETTINGS, bit_decay=0.0, deadzone_decay=0.0)
    assert found(pipeline(settings))["every parameter moves"].status == PASS


def test_a_parameter_without_gradient_and_decay_is_named():
    whole = pipeline(dataclasses.replace(SETTINGS, deadzone_decay=0.0))
    quantizers(whole.model)["layer2.0.conv1"].logit_dz.register_hook(torch.zeros_like)
    checks = found(whole, 1)
    assert "layer2.0.conv1" in checks["every parameter moves"].message
    assert "has not moved" in checks["every parameter moves"].message


def test_a_weight_that_something_else_writes_is_named(monkeypatch):
    step = TrainingStep.__call__

    def written(self: TrainingStep, images: Tensor, *rest: Any) -> Tensor:
        losses = step(self, images, *rest)
        with torch.no_grad():
            self.model.linear.weight.add_(1.0)
        return losses

    monkeypatch.setattr(TrainingStep, "__call__", written)
    checks = found(pipeline())
    assert failures(checks) == ["updates are AdamW's", "every parameter moves"]
    assert "times as far as AdamW can" in checks["every parameter moves"].message


def test_gradients_that_no_step_leaves_behind_are_named(monkeypatch):
    step = TrainingStep.__call__

    def cleared(self: TrainingStep, images: Tensor, *rest: Any) -> Tensor:
        losses = step(self, images, *rest)
        self.optimizer.zero_grad()
        return losses

    monkeypatch.setattr(TrainingStep, "__call__", cleared)
    message = found(pipeline(), 1)["updates are AdamW's"].message
    assert all(f"step {number} leaves no gradient at" in message for number in (1, 3))


def test_weights_that_are_averaged_behind_the_last_step_are_named(monkeypatch):
    train_epoch = training.train_epoch

    def averaged(step: TrainingStep, *rest: Any) -> Any:
        before = step.model.linear.weight.detach().clone()
        losses = train_epoch(step, *rest)
        with torch.no_grad():
            step.model.linear.weight.lerp_(before, 0.5)
        return losses

    monkeypatch.setattr("experiments.debug_run.train_epoch", averaged)
    checks = found(pipeline(), 1)
    assert_only(checks, "updates are AdamW's", "step 3: linear.weight is")
    assert "step 1: " not in checks["updates are AdamW's"].message


def the_second_of(steps: int, act: Callable[[TrainingStep], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `act` done to the step behind the second of so many, at which the ledger looks too."""
    step, taken = TrainingStep.__call__, 0

    def acted(self: TrainingStep, *rest: Any) -> Tensor:
        nonlocal taken
        losses = step(self, *rest)
        if taken % steps == 1:
            with torch.no_grad():
                act(self)
        taken += 1
        return losses

    monkeypatch.setattr(TrainingStep, "__call__", acted)
    monkeypatch.setattr(EpochWatch, "_looked_at_step", lambda self, steps: 1)


def test_a_weight_that_is_written_in_the_middle_of_an_epoch_alone_is_named(monkeypatch):
    the_second_of(3, lambda step: step.model.linear.weight.mul_(1.01), monkeypatch)
    checks = found(pipeline())
    assert failures(checks)[0] == "updates are AdamW's"
    assert "step 2: linear.weight is" in checks["updates are AdamW's"].message


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_moments_that_are_cleared_between_two_steps_are_named(moment, monkeypatch):
    def clear(step: TrainingStep) -> None:
        step.optimizer.state[step.model.linear.weight][moment].zero_()

    the_second_of(3, clear, monkeypatch)
    checks = found(pipeline())
    assert failures(checks)[0] == "updates are AdamW's"
    assert "640 of 75,302 moments are others" in checks["updates are AdamW's"].message


def test_a_step_that_is_not_looked_at_but_has_another_decay_or_rate_is_named(monkeypatch):
    step, taken = TrainingStep.__call__, 0

    def taken_otherwise(self: TrainingStep, *rest: Any) -> Tensor:
        nonlocal taken
        group = self.optimizer.param_groups[0]
        kept = group["weight_decay"]
        group["weight_decay"] = 0.0 if taken % 3 == 1 else kept
        losses = step(self, *rest)
        group["weight_decay"] = kept
        taken += 1
        return losses

    monkeypatch.setattr(TrainingStep, "__call__", taken_otherwise)
    monkeypatch.setattr(EpochWatch, "_looked_at_step", lambda self, steps: 0)
    checks = found(pipeline())
    assert failures(checks)[0] == "updates are AdamW's"
    assert "after all steps conv1.weight is" in checks["updates are AdamW's"].message


def test_the_step_that_is_looked_at_is_now_and_then_the_first_or_the_last():
    settings = dataclasses.replace(SETTINGS, epochs=20)
    whole = pipeline(settings)
    steps = [EpochWatch(whole, epoch)._looked_at_step(1000) for epoch in range(20)]
    assert steps[1] == 0 and [i for i, step in enumerate(steps) if step == 999] == [2, 8, 16, 19]
    assert len(set(steps)) == 17  # the others are drawn


def test_gradients_that_an_epoch_begins_with_are_named(monkeypatch):
    step, taken = TrainingStep._run, 0

    def kept(self: TrainingStep, *rest: Any) -> Tensor:
        nonlocal taken
        taken += 1
        with monkeypatch.context() as patch:
            if taken % 3 == 1:
                patch.setattr(self.optimizer, "zero_grad", lambda set_to_none=True: None)
            return step(self, *rest)

    monkeypatch.setattr(TrainingStep, "_run", kept)
    assert_only(found(pipeline()), "a step computed anew", "step 1: ", "kept from step to step")


def test_of_a_very_large_network_the_last_update_alone_is_looked_at(monkeypatch):
    monkeypatch.setattr("experiments.watch.MOST_PARAMETERS", 0)
    checks = found(pipeline())
    assert failures(checks) == []
    assert checks["updates are AdamW's"].message.endswith("in steps 3")
    assert checks["a step computed anew"].status == SKIP
    assert checks["weights are the quantizer's"].message == "6 tensors"


def test_of_a_large_tensor_the_first_numbers_are_looked_at_a_few_tensors_at_a_time(monkeypatch):
    monkeypatch.setattr("experiments.ledger.LOOKED_AT", 100)  # numbers; the tensors have 1 to 36,864
    whole = pipeline()
    assert failures(found(whole)) == []
    the_second_of(3, lambda step: step.model.linear.bias[1].add_(3), monkeypatch)
    the_second_of(3, lambda step: step.model.layer3[0].bn2.bias[63].add_(3), monkeypatch)
    message = found(whole)["updates are AdamW's"].message
    assert "step 2: linear.bias is" in message and "step 2: layer3.0.bn2.bias is" in message


def test_numbers_of_several_parameters_are_computed_on_in_one_row():
    chunk = Chunk({"a": 3, "b": 1, "c": 2}, torch.device("cpu"))
    row = chunk.joined(
        {"c": torch.tensor([[5.0, 6.0], [7.0, 8.0]]), "a": torch.arange(3), "b": torch.ones(1)}
    )
    assert row.dtype == torch.float64 and row.tolist() == [0, 1, 2, 1, 5, 6]
    assert (row * chunk.spread([1, 2, 3])).tolist() == [0, 1, 2, 2, 15, 18]
    assert (row * chunk.spread([2, 2, 2])).tolist() == [0, 2, 4, 2, 10, 12]
    assert {name: part.tolist() for name, part in chunk.split(row).items()} == {
        "a": [0, 1, 2], "b": [1], "c": [5, 6]
    }  # fmt: skip
    row[1] = math.nan
    assert chunk.largest(row) == {"a": math.inf, "b": 1, "c": 6}


def test_channels_are_counted_anew_in_the_epochs_that_are_looked_at_longer(monkeypatch):
    counted = []
    monkeypatch.setattr(
        "experiments.ledger.count_network", lambda model: counted.append(1) or count_network(model)
    )
    whole = pipeline(dataclasses.replace(SETTINGS, epochs=8))
    seen = []
    for epoch in range(6):
        checks = {check.name: check for check in one_epoch(whole, epoch)[0].ledger}
        anew = len(counted)
        counted.clear()
        seen.append((anew, checks["a step computed anew"].status))
    assert seen == [(1, PASS)] * 3 + [(0, SKIP), (1, PASS), (0, SKIP)]


def test_single_weights_that_are_set_to_zero_are_named_while_the_masks_act(monkeypatch):
    def zero(step: TrainingStep) -> None:
        step.model.layer3[0].conv2.parametrizations.weight.original[0, 0, 0, 0] = 0

    the_second_of(3, zero, monkeypatch)
    checks = found(pipeline())
    assert "step 2: layer3.0.conv2" in checks["updates are AdamW's"].message


def test_gradients_that_are_doubled_before_the_optimizer_sees_them_are_named():
    whole = pipeline()

    def double(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(2)

    whole.step.optimizer.register_step_pre_hook(double)
    assert_only(found(whole), "a step computed anew", "conv1.weight is 1 (relative) away", "scaled")


def test_a_gradient_of_one_number_is_measured_by_what_is_usual_for_its_name():
    one = torch.ones(1)
    due = {"a.weight": torch.full((4,), 1e6), "a.logit_bit": one, "b.logit_bit": 7 * one}
    assert _shares(due, due) == dict.fromkeys(due, 0)
    # The usual size of the two is 5; the weight's is a million times as large.
    assert _shares(due | {"a.logit_bit": -one}, due)["a.logit_bit"] == pytest.approx(2 / 5)
    assert _shares(due | {"b.logit_bit": -7 * one}, due)["b.logit_bit"] == pytest.approx(2)
    assert _shares(due | {"a.weight": torch.zeros(4)}, due)["a.weight"] == pytest.approx(1)
    # What should be nothing is measured by the largest there is.
    none = due | {"a.weight": torch.ones(4), "a.logit_bit": 0 * one, "b.logit_bit": 0 * one}
    assert _shares(none | {"b.logit_bit": 1e-9 * one}, none)["b.logit_bit"] < 1e-3


@pytest.mark.parametrize("of", ["the quantizer", "the penalty", "the network"])
def test_a_backward_pass_that_is_wrong_wherever_it_is_taken_is_named(monkeypatch, of):
    """A copy of the network agrees with it, and so does the run's own penalty."""
    whole = pipeline(dataclasses.replace(SETTINGS, sparsity_weight=0.05))
    if of == "the quantizer":
        backward = _DeadZoneRound.backward
        turned = lambda ctx, g: [-x if i == 1 else x for i, x in enumerate(backward(ctx, g))]  # noqa: E731
        monkeypatch.setattr(_DeadZoneRound, "backward", lambda ctx, g: tuple(turned(ctx, g)))
    elif of == "the penalty":
        penalty = whole.step.penalty
        detached = lambda model: penalty(model).detach()  # noqa: E731
        detached.__module__ = penalty.__module__
        whole.step.penalty = detached
    else:
        forward = PadShortcut.forward
        monkeypatch.setattr(PadShortcut, "forward", lambda self, x: forward(self, x.detach()))
    assert_only(found(whole), "a step computed anew", "is not its formula's")


def test_a_gradient_that_is_a_little_smaller_wherever_it_is_taken_is_named(monkeypatch):
    forward = PadShortcut.forward

    def lessened(self: PadShortcut, x: Tensor) -> Tensor:
        return forward(self, 0.9 * x + 0.1 * x.detach())

    monkeypatch.setattr(PadShortcut, "forward", lessened)
    assert_only(found(pipeline()), "a step computed anew", "of conv1.weight 0.", "is left")


def test_live_filters_that_are_set_to_zero_are_named_while_the_masks_act(monkeypatch):
    def prune(step: TrainingStep) -> None:
        step.model.layer3[0].conv2.parametrizations.weight.original[5] = 0

    the_second_of(3, prune, monkeypatch)
    assert "step 2: layer3.0.conv2" in found(pipeline())["updates are AdamW's"].message


def test_an_activation_that_is_another_in_training_mode_is_named():
    whole = pipeline()
    clamp = lambda module, inputs, out: out.clamp(max=0.5) if module.training else out  # noqa: E731
    whole.model.layer1.register_forward_hook(clamp)
    assert_only(found(whole), "a step computed anew", "logits are", "training mode")


def test_a_quantizer_of_another_formula_in_training_mode_is_named(monkeypatch):
    forward = DeadZoneLDZCompander.forward
    narrowed = lambda self, w: forward(self, w) * (0.9 if self.training else 1)  # noqa: E731
    monkeypatch.setattr(DeadZoneLDZCompander, "forward", narrowed)
    checks = found(pipeline())
    assert_only(checks, "weights are the quantizer's", "in step", "layer1.0.conv1")
    assert "in the test pass" not in checks["weights are the quantizer's"].message


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.99), (0.9, 0.999), (0.9, 0.81), (0.9, 0.7), (0.5, 0.9)])
def test_no_gradients_move_adamw_further_than_its_reach_and_the_worst_ones_come_near(beta1, beta2):
    steps, furthest = 40, 0.0
    generator = torch.Generator().manual_seed(0)
    ratio = beta1 / beta2  # gradients in this proportion make Cauchy and Schwarz an equality
    for gradients in (
        *(torch.randn(steps, generator=generator).mul(10.0**k).exp() for k in (-1, 0, 0.5)),
        torch.tensor([ratio**-t for t in range(steps)], dtype=torch.double),
        torch.tensor([ratio**t for t in range(steps)], dtype=torch.double),
    ):
        w = nn.Parameter(torch.zeros(1, dtype=torch.double))
        optimizer = torch.optim.AdamW([w], lr=1.0, betas=(beta1, beta2), eps=1e-300, weight_decay=0.0)
        for t, g in enumerate(gradients.double()):
            before = w.item()
            w.grad = g.reshape(1).clone()
            optimizer.step()
            moved = abs(w.item() - before)
            reach = adamw_reach(beta1, beta2, t, 1)
            assert moved <= reach * (1 + 1e-9), t
            furthest = max(furthest, moved / reach)
        assert abs(w.item()) <= adamw_reach(beta1, beta2, 0, steps) * (1 + 1e-9)
    assert furthest > 0.99


def test_a_coefficient_that_leaves_zero_in_another_epoch_is_named():
    checks = found(pipeline(sparsity_schedule=linear_warmup(1.0, 2.0)))
    assert_only(checks, "penalty coefficient", "expected 0.0014", "used 0")


@pytest.mark.parametrize("penalty_on", [STORED, QUANTIZED])
def test_a_penalty_that_is_not_added_is_named(monkeypatch, penalty_on):
    run = TrainingStep._run
    monkeypatch.setattr(TrainingStep, "_run", lambda self, x, y, penalised, *a: run(self, x, y, False, *a))
    checks = found(pipeline(dataclasses.replace(SETTINGS, penalty_on=penalty_on)))
    assert "loss and penalty" in failures(checks)
    assert "the first step's penalty is 0" in checks["loss and penalty"].message


def test_a_penalty_that_is_weighted_otherwise_is_named():
    whole = pipeline()
    lasso = whole.step.penalty
    whole.step.penalty = lambda model: 0.5 * lasso(model)
    whole.step.penalty.__module__ = "experiments.sparsity"
    assert_only(found(whole), "loss and penalty", "counted anew")


def test_someone_elses_penalty_is_left_alone_and_said_so():
    whole = pipeline()
    whole.step.penalty = lambda model: sum(p.square().sum() for p in model.parameters())
    checks = found(whole)
    assert failures(checks) == []
    assert checks["loss and penalty"].status == SKIP


# Images and losses.


class Wrapped:
    """Training batches that were tampered with, and that still say they are `TrainBatches`."""


def tampered(change: Callable[[Any, int], Iterator[tuple[Tensor, Tensor]]], monkeypatch) -> Pipeline:
    epoch = TrainBatches.epoch
    monkeypatch.setattr(TrainBatches, "epoch", lambda self, e: change(lambda i: epoch(self, i), e))
    return pipeline()


def test_the_same_order_in_every_epoch_is_named(monkeypatch):
    checks = found(tampered(lambda epoch, e: epoch(0), monkeypatch))
    assert failures(checks) == ["images and their order", "cross-entropy"]
    assert "order of epoch 0, not 1" in checks["images and their order"].message


def test_labels_moved_against_images_are_named(monkeypatch):
    whole = tampered(lambda epoch, e: ((x, y.roll(1)) for x, y in epoch(e)), monkeypatch)
    assert failures(found(whole)) == ["images and their order", "cross-entropy"]


@pytest.mark.parametrize("other", ["labels", "images"])
def test_a_replay_of_another_batch_is_named(monkeypatch, other):
    """No graph is captured on the CPU: this one is a stand-in that holds the batch, or another."""
    take = TrainingStep.__call__

    def replaying(step, images, labels, *rest):
        losses = take(step, images, labels, *rest)
        step.replayed = SimpleNamespace(**({"images": images, "labels": labels} | held))
        return losses

    monkeypatch.setattr(TrainingStep, "__call__", replaying)
    held: dict[str, Tensor] = {}
    assert failures(found(pipeline())) == []
    held[other] = torch.tensor(-1)
    assert_only(found(pipeline()), "images and their order", "3 replays", "captured step")


def test_images_without_augmentation_are_named(monkeypatch):
    whole = tampered(lambda epoch, e: ((x.flip(3), y) for x, y in epoch(e)), monkeypatch)
    assert_only(found(whole), "images and their order", "images looked at are not what their draw gives")


def test_images_in_the_middle_of_a_batch_without_augmentation_are_named(monkeypatch):
    def flipped(x: Tensor) -> Tensor:
        return torch.cat([x[:1], x[1:-1].flip(3), x[-1:]])

    whole = tampered(lambda epoch, e: ((flipped(x), y) for x, y in epoch(e)), monkeypatch)
    assert_only(found(whole), "images and their order", "9 of 17 images looked at")


def test_stored_images_that_an_epoch_writes_into_are_named(monkeypatch):
    whole = pipeline()
    the_second_of(3, lambda step: whole.train_batches.pixels[:1600].zero_(), monkeypatch)
    assert "1 of the stored training images" in found(whole, 1)["images and their order"].message


def test_stored_images_whose_rows_an_epoch_turns_round_are_named(monkeypatch):
    whole = pipeline()

    def turn(step: TrainingStep) -> None:
        images = whole.train_batches.pixels.view(-1, 40, 40, 3)
        images[2] = images[2].flip(0)

    the_second_of(3, turn, monkeypatch)
    assert "1 of the stored training images" in found(whole, 1)["images and their order"].message


def test_a_batch_left_out_is_named(monkeypatch):
    def train(step: TrainingStep, batches: Any, epoch: int, *rest: Any) -> Any:
        real = batches.epoch
        batches.epoch = lambda e: list(real(e))[1:]
        return training.train_epoch(step, batches, epoch, *rest)

    monkeypatch.setattr(debug_run, "train_epoch", train)
    assert "optimizer steps" in failures(found(pipeline()))


def test_a_second_softmax_is_named(monkeypatch):
    cross_entropy = TrainingStep._cross_entropy
    monkeypatch.setattr(
        TrainingStep, "_cross_entropy", lambda self, logits, *a: cross_entropy(self, logits.softmax(1), *a)
    )
    assert_only(found(pipeline()), "cross-entropy", "its logits give", "second softmax")


def test_an_epoch_that_reports_another_mean_is_named(monkeypatch):
    def train(*arguments: Any) -> Any:
        losses = training.train_epoch(*arguments)
        return dataclasses.replace(losses, loss=losses.loss / 2, cross_entropy=losses.cross_entropy / 2)

    monkeypatch.setattr(debug_run, "train_epoch", train)
    assert failures(found(pipeline())) == ["cross-entropy", "loss and penalty"]


def test_batches_of_another_kind_are_trained_on_without_an_alarm():
    class Few:
        def __init__(self, batches: TrainBatches) -> None:
            self.batches, self.sizes = batches, batches.sizes[:2]

        def __len__(self) -> int:
            return 2

        def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(list(self.batches.epoch(epoch))[:2])

    whole = pipeline()
    whole = dataclasses.replace(whole, train_batches=Few(whole.train_batches))
    record, _ = one_epoch(whole, 3)
    checks = {c.name: c for c in record.ledger}
    assert failures(checks) == []
    assert checks["images and their order"].status == SKIP


# Modes, statistics, the test pass.


def test_training_in_evaluation_mode_is_named(monkeypatch):
    monkeypatch.setattr(ResNet, "train", lambda self, mode=True: nn.Module.train(self, False))
    checks = found(pipeline())
    assert "training mode" in failures(checks)


def test_testing_in_training_mode_is_named(monkeypatch):
    def measure(model: nn.Module, batches: TestBatches, *_: Any) -> float:
        logits, labels = training.predict(model.train(), batches)
        return (logits.argmax(1) == labels).double().mean().item()

    monkeypatch.setattr(debug_run, "measure_accuracy", measure)
    assert "test pass" in failures(found(pipeline()))


def test_batch_norms_that_are_not_renewed_are_named(monkeypatch):
    monkeypatch.setattr(debug_run, "renew_batch_norms", lambda *_: None)
    assert_only(found(pipeline()), "batch norm statistics", "expected 2")


def test_a_renewal_by_the_moving_average_is_named(monkeypatch):
    def renew(model: nn.Module, batches: TrainBatches, epoch: int, count: int, precision: str) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.reset_running_stats()
        with torch.no_grad():
            for images, _ in list(batches.epoch(epoch))[:count]:
                model.train()(images)

    monkeypatch.setattr(debug_run, "renew_batch_norms", renew)
    assert_only(found(pipeline()), "batch norm statistics", "from the mean over these batches")


def test_one_batch_norm_that_is_renewed_otherwise_is_named(monkeypatch):
    def renew(model: ResNet, *rest: Any) -> None:
        training.renew_batch_norms(model, *rest)
        model.layer1[0].bn1.running_mean.add_(1.0)

    monkeypatch.setattr(debug_run, "renew_batch_norms", renew)
    monkeypatch.setattr(EpochWatch, "_draw", lambda self, what, count: 1)
    assert_only(found(pipeline()), "batch norm statistics", "layer1.0.bn1 is", "from the mean")


def test_a_renewal_on_a_part_of_each_batch_is_named(monkeypatch):
    def renew(model: ResNet, batches: TrainBatches, *rest: Any) -> None:
        training.renew_batch_norms(model, TrainBatches(IMAGES, 6, SETTINGS.seed, "cpu"), *rest)

    monkeypatch.setattr(debug_run, "renew_batch_norms", renew)
    assert_only(found(pipeline()), "batch norm statistics", "of 12 images, expected 16")


def test_a_renewal_on_another_epochs_images_is_named(monkeypatch):
    def renew(model: ResNet, batches: TrainBatches, epoch: int, *rest: Any) -> None:
        training.renew_batch_norms(model, batches, 0, *rest)

    monkeypatch.setattr(debug_run, "renew_batch_norms", renew)
    assert_only(found(pipeline()), "batch norm statistics", "6 of 6 images", "other images")


def test_batch_norms_of_another_momentum_are_named():
    whole = pipeline(dataclasses.replace(SETTINGS, batch_norm_batches=0))
    for norm in (m for m in whole.model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.05
    assert_only(found(whole), "batch norm statistics", "momenta are [0.05]")


def test_a_test_with_quantizers_off_is_named(monkeypatch):
    def measure(model: nn.Module, *rest: Any) -> float:
        toggle_quantization(model, False)
        accuracy = training.measure_accuracy(model, *rest)
        toggle_quantization(model, True)
        return accuracy

    monkeypatch.setattr(debug_run, "measure_accuracy", measure)
    assert "quantizers switched off" in found(pipeline())["test pass"].message


def test_a_weight_changed_by_the_test_pass_is_named(monkeypatch):
    def measure(model: nn.Module, *rest: Any) -> float:
        with torch.no_grad():
            model.linear.bias[0] += 1e-3
        return training.measure_accuracy(model, *rest)

    monkeypatch.setattr(debug_run, "measure_accuracy", measure)
    assert_only(found(pipeline()), "test pass", "linear.bias")


def test_test_images_that_are_mirrored_on_their_way_are_named(monkeypatch):
    def mirrored(batches: TestBatches) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images.flip(3), labels) for images, labels in through(batches))

    through = TestBatches.__iter__
    monkeypatch.setattr(TestBatches, "__iter__", mirrored)
    assert_only(found(pipeline()), "test pass", "3 of 3 images", "other images")


def test_test_labels_that_the_test_writes_into_are_named(monkeypatch):
    def measure(model: nn.Module, batches: TestBatches, *rest: Any) -> float:
        batches.labels.copy_(training.predict(model.eval(), batches)[0].argmax(1))
        return training.measure_accuracy(model, batches, *rest)

    monkeypatch.setattr(debug_run, "measure_accuracy", measure)
    whole = pipeline()
    whole.test_batches.labels = whole.test_batches.labels.clone()
    assert_only(found(whole, 1), "accuracy", "of the stored test images, or their labels, have been changed")


@pytest.mark.parametrize("change", [lambda a: a + 0.1, lambda a: a + 0.03, lambda a: 100 * a + 1])
def test_an_accuracy_that_is_not_the_logits_is_named(monkeypatch, change):
    monkeypatch.setattr(debug_run, "measure_accuracy", lambda *args: change(training.measure_accuracy(*args)))
    assert_only(found(pipeline()), "accuracy", "10 images")


def test_an_accuracy_over_a_part_of_the_test_set_is_named(monkeypatch):
    iterate = TestBatches.__iter__
    monkeypatch.setattr(TestBatches, "__iter__", lambda self: ((x[:7], y[:7]) for x, y in iterate(self)))
    predict = training.predict
    monkeypatch.setattr(training, "predict", lambda n, b, p: (predict(n, b, p)[0], b.labels[:7]))
    assert_only(found(pipeline()), "accuracy", "7 images were tested, the test set has 10")


# What the epoch left.


@torch.no_grad()
@pytest.mark.parametrize("part", ["parameters", "batch norm statistics", "the optimizer's moments"])
def test_what_writes_into_the_run_between_two_epochs_is_named(part):
    whole = pipeline()
    with torch.enable_grad():
        one_epoch(whole, 0)
    norm = whole.model.bn1
    first_moment = whole.step.optimizer.state[norm.weight]["exp_avg"]
    written = {"parameters": norm.bias, "batch norm statistics": norm.running_var}.get(part, first_moment)
    written[0] += 1e-3
    with torch.enable_grad():
        record, _ = one_epoch(whole, 1)
    checks = {check.name: check for check in record.ledger}
    assert_only(checks, "begins where the last epoch ended", part, "1 of ")


@pytest.mark.parametrize("part", ["parameters", "batch norm statistics", "the optimizer's moments"])
def test_a_checkpoint_that_holds_another_state_than_the_epoch_left_is_named(tmp_path, part):
    whole = pipeline()
    with torch.enable_grad():
        record, _ = one_epoch(whole, 0)
    history = runs.good_run(1)
    history.epochs[0], start = record, next(iter(history.start.values()))
    history.quantized, history.start = [*record.layers], dict.fromkeys(record.layers, start)
    taken = take_checkpoint(history, whole.model, whole.step.optimizer)
    save_checkpoint(tmp_path, taken)
    path = tmp_path / "checkpoint_0001.pt"
    assert checkpoint_is_the_state(path, whole.step).status == PASS
    assert all(torch.equal(row, whole.step.left[p]) for p, row in left_in(taken, whole.step).items())
    written = {
        "parameters": taken.model["linear.bias"],
        "batch norm statistics": taken.model["bn1.running_var"],
    }
    written.get(part, taken.optimizer[0]["exp_avg_sq"]).view(-1)[0] += 1
    save_checkpoint(tmp_path, taken)
    found = checkpoint_is_the_state(path, whole.step)
    assert found.status == FAIL and part in found.message
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in checkpoint_is_the_state(path, whole.step).message


def after_deaths(whole: Pipeline) -> dict[str, Check]:
    """What the ledger says of an epoch with a penalty, before which a filter and an input slice had died."""
    one_epoch(whole, 0)
    with torch.no_grad():
        whole.model.layer1[0].conv1.parametrizations.weight.original[3] = 0
        whole.model.layer2[0].conv2.parametrizations.weight.original[:, 5] = 0
    whole.step.left.clear()  # as in a run that was resumed here
    record, _ = one_epoch(whole, PENALISED)
    return {check.name: check for check in record.ledger}


def test_dead_slices_that_are_kept_are_counted():
    check = after_deaths(pipeline())["dead slices stay dead"]
    assert (check.status, check.message) == (PASS, "2 slices")


def test_dead_slices_that_are_not_kept_are_named():
    whole = pipeline()
    whole.step.keep_dead = lambda model: []
    assert_only(after_deaths(whole), "dead slices stay dead", "layer1.0.conv1", "layer2.0.conv2", "revive")


def test_dead_slices_that_are_stored_as_other_than_zero_are_named():
    whole = pipeline()
    masks = whole.step.keep_dead
    whole.step.keep_dead = lambda model: [(w, 1 - 0.5 * (1 - m.float())) for w, m in masks(model)]
    assert "dead slices stay dead" in failures(after_deaths(whole))


class Subclassed(ResNet):
    """Another network than resnet.py's, as far as its class says."""


@pytest.mark.parametrize("network", [ResNet, Subclassed])
def test_a_step_without_the_masks_that_the_setting_asks_for_is_named(network):
    whole = pipeline()
    whole.model.__class__ = network
    whole.step.keep_dead = None
    assert failures(found(whole)) == ["dead slices stay dead"]


@pytest.mark.parametrize(
    "changes",
    [
        *({"zero_weights": 1}, {"weights": 8}, {"zero_filters": 1}, {"bits": 1}, {"learned_bits": 0.01}),
        {"alive_channels": -1, "null_channels": 1},
    ],
)
def test_a_count_of_a_layer_that_is_wrong_is_named(monkeypatch, changes):
    record_of = debug_run.epoch_record

    def wrong(*args: Any, **kwargs: Any) -> EpochRecord:
        record = record_of(*args, **kwargs)
        layer = record.layers["layer2.0.conv1"]
        by = {name: getattr(layer, name) + much for name, much in changes.items()}
        layers = record.layers | {"layer2.0.conv1": dataclasses.replace(layer, **by)}
        return dataclasses.replace(record, layers=layers)

    monkeypatch.setattr(debug_run, "epoch_record", wrong)
    assert_only(found(pipeline()), "counts of the row", "layer2.0.conv1")


@pytest.mark.parametrize("field", ["unstructured_sparsity", "structured_sparsity", "bits", "learned_bits"])
def test_a_mean_of_the_row_that_is_wrong_is_named(monkeypatch, field):
    record_of = debug_run.epoch_record

    def wrong(*args: Any, **kwargs: Any) -> EpochRecord:
        record = record_of(*args, **kwargs)
        return dataclasses.replace(record, **{field: getattr(record, field) + 1e-3})

    monkeypatch.setattr(debug_run, "epoch_record", wrong)
    assert_only(found(pipeline()), "counts of the row", "counted anew")


def test_watching_changes_no_bit_and_leaves_no_hook():
    watched, alone = pipeline(), pipeline()
    for epoch in (0, 1):
        record, _ = one_epoch(watched, epoch)
        training.set_learning_rates(alone.step.optimizer, alone.rate_schedule(epoch, SETTINGS.epochs))
        coefficient = SETTINGS.sparsity_weight * alone.sparsity_schedule(epoch, SETTINGS.epochs)
        losses = training.train_epoch(alone.step, alone.train_batches, epoch, coefficient)
        training.renew_batch_norms(alone.model, alone.train_batches, epoch, 2)
        accuracy = training.measure_accuracy(alone.model, alone.test_batches)
        assert (record.loss, record.accuracy) == (losses.loss, accuracy)
    theirs = alone.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in watched.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.model.modules())


def test_an_epoch_that_is_cut_short_leaves_no_hook():
    whole = pipeline()
    with torch.no_grad():
        whole.model.linear.weight[0, 0] = math.nan
    with pytest.raises(training.NotFiniteError):
        one_epoch(whole, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in whole.model.modules())


def test_every_quantized_layer_was_looked_at():
    whole = pipeline()
    record, _ = one_epoch(whole, PENALISED)
    assert list(record.layers) == list(quantized_layers(whole.model))


def test_what_computes_on_the_device_makes_no_tensor_anywhere_else():
    whole = pipeline()
    whole.model.unused = nn.Linear(2, 2)  # that the optimizer has no state of
    whole.step.optimizer.add_param_group(
        {"params": list(whole.model.unused.parameters())} | whole.step.optimizer.defaults
    )
    images, labels = next(iter(whole.train_batches.epoch(0)))
    # As on a GPU: what is made without saying where does not meet what lies on the device, the CPU here.
    with torch.device("meta"):
        for _ in range(2):
            assert whole.step(images, labels, 0.01).isfinite().all()
        state = EpochWatch(whole, 0).state()
        count = whole.evaluator.evaluate(whole.model).count
    steps = dict(zip((n for n, _ in whole.model.named_parameters()), state.steps, strict=True))
    assert {n for n, step in steps.items() if step == 0} == {"unused.weight", "unused.bias"}
    assert count.total("dense_macs") > 0
