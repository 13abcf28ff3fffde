"""The training step and its epoch: against a slow reference, on a small model, and where numbers end."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from random_images import random_dataset
from torch import Tensor, nn

from experiments import reference, training
from experiments.data import Dataset, TestBatches, TrainBatches
from experiments.settings import Settings
from experiments.sparsity import coupled_group_lasso, keep_dead_slices
from experiments.training import (
    EpochLosses,
    NotFiniteError,
    TrainingStep,
    make_optimizer,
    measure_accuracy,
    pace,
    predict,
    renew_batch_norms,
    set_learning_rates,
    train_epoch,
)
from metrics import count_network
from resnet import ResNet, resnet20
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, quantizers

BLOCK_CONVOLUTIONS = ["^conv1$", "^linear$"]  # excluded, so that these are quantized
INSIDE = "parametrizations.weight"  # where torch keeps a parametrized weight
COARSE = {"init_bit_logit": 0.9, "init_deadzone_logit": 0.5}  # 6 bits, three quarters of the weights zero
RATES = {f"{kind}_{what}": 0.0 for kind in ("weights", "bit", "deadzone") for what in ("lr", "decay")}
NOTHING_MOVES = Settings(**RATES)
# Typed here, so that tuning a preset changes nothing that is tested; slow enough for float32.
MEASURED = Settings(weights_lr=1e-3, bit_lr=1e-2, deadzone_lr=1e-2, bit_decay=0.1, deadzone_decay=1.0)
NAN, INF = float("nan"), float("inf")


def quantized(seed: int = 0, blocks: int = 1, **kwargs: object) -> ResNet:
    torch.manual_seed(seed)
    model = resnet20() if blocks == 3 else ResNet(blocks)
    attach_weight_quantizers(model, BLOCK_CONVOLUTIONS, DeadZoneLDZCompander, kwargs)
    return model.to(memory_format=torch.channels_last)


def bury(model: nn.Module) -> dict[str, tuple[slice | int, ...]]:
    """Put a filter and an input slice of two groups into the dead zone; where they are, by stored weight."""
    places = {
        "layer1.0.conv1.parametrizations.weight.original": (5,),
        "layer3.0.conv2.parametrizations.weight.original": (slice(None), 7),
    }
    with torch.no_grad():
        for name, place in places.items():
            model.get_parameter(name)[place] *= 1e-3
    return places


def stepper(model: nn.Module, settings: Settings | None = None, penalty=None) -> TrainingStep:
    return TrainingStep(
        model, make_optimizer(model, settings or MEASURED), penalty or coupled_group_lasso(model)
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class Planted:
    """Batches as given, as floats, so that a test can plant anything in an image."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.sizes = [len(labels) for _, labels in batches]
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def planted(steps: int, images: int = 8) -> Planted:
    generator = torch.Generator().manual_seed(0)
    return Planted(
        [
            (
                torch.randn(images, 3, 32, 32, generator=generator),
                torch.randint(10, (images,), generator=generator),
            )
            for _ in range(steps)
        ]
    )


# The optimizer


def test_the_three_groups_hold_every_parameter_once_and_each_logit_in_its_own_group():
    model = quantized(blocks=3)
    groups = {g["name"]: g["params"] for g in make_optimizer(model, Settings()).param_groups}
    everything = [id(p) for group in groups.values() for p in group]
    assert len(everything) == len(set(everything))
    assert set(everything) == {id(p) for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("logit_bit") for p in groups["bit"])
    assert all(names[id(p)].endswith("logit_dz") for p in groups["deadzone"])
    assert not any("logit" in names[id(p)] for p in groups["weights"])
    # 20 weights, a bias, 19 batch norms of two parameters; a logit of each kind for 18 layers
    assert {n: len(g) for n, g in groups.items()} == {"weights": 59, "bit": 18, "deadzone": 18}


def test_each_group_has_its_own_learning_rate_and_weight_decay_of_the_settings():
    numbers = {name: (i + 1) / 64 for i, name in enumerate(RATES)}
    for group in make_optimizer(quantized(), Settings(**numbers)).param_groups:
        assert float(group["lr"]) == numbers[f"{group['name']}_lr"]
        assert group["weight_decay"] == numbers[f"{group['name']}_decay"]


def test_what_is_not_trained_is_in_no_group():
    model = quantized(learnable_bit=False)
    model.linear.requires_grad_(False)
    groups = {g["name"]: g["params"] for g in make_optimizer(model, Settings()).param_groups}
    assert groups["bit"] == []
    assert all(p is not model.linear.weight and p is not model.linear.bias for p in groups["weights"])
    assert all(p.requires_grad for group in groups.values() for p in group)


def test_the_schedule_scales_each_groups_own_rate_and_does_not_add_up():
    optimizer = make_optimizer(quantized(), Settings(weights_lr=0.5, bit_lr=0.25, deadzone_lr=0.125))
    for factor in (1.0, 0.5, 0.0, 1.0):
        set_learning_rates(optimizer, factor)
        rates = [float(g["lr"]) for g in optimizer.param_groups]
        assert rates == [0.5 * factor, 0.25 * factor, 0.125 * factor]


@pytest.mark.parametrize(
    ("pace_steps", "steps", "expected"),
    [
        (1960, 1960, 1.0),
        (1960, 20, 1.0),
        (1960, 3920, 0.5),
        (100, 1000, 0.1),
        (0, 10**6, 1.0),
        (1960, 0, 1.0),
    ],
)
def test_in_a_longer_run_logits_go_slower_and_weights_decay_less(pace_steps, steps, expected):
    assert pace(pace_steps, steps) == expected
    chosen = Settings(
        weights_lr=0.5,
        bit_lr=0.25,
        deadzone_lr=0.125,
        weights_decay=0.25,
        bit_decay=0.5,
        pace_steps=pace_steps,
    )
    optimizer = make_optimizer(quantized(), chosen, steps)
    rates = [float(g["lr"]) for g in optimizer.param_groups]
    assert rates == pytest.approx([0.5, 0.25 * expected, 0.125 * expected])
    decays = [g["weight_decay"] for g in optimizer.param_groups]
    assert decays == pytest.approx([0.25 * expected**0.5, 0.5, chosen.deadzone_decay])
    set_learning_rates(optimizer, 0.5)
    assert float(optimizer.param_groups[1]["lr"]) == pytest.approx(0.125 * expected)


def test_one_step_moves_every_tensor_by_at_most_its_groups_rate_and_decay():
    model = quantized(**COARSE)
    rates = {"weights_lr": 1e-3, "bit_lr": 2e-3, "deadzone_lr": 4e-3}
    settings = Settings(**rates, weights_decay=0.0, bit_decay=0.0, deadzone_decay=0.0)
    before = state(model)
    train_epoch(stepper(model, settings), planted(1), 0, 0.01)
    for name, p in model.named_parameters():
        rate = {"logit_bit": 2e-3, "logit_dz": 4e-3}.get(name.rpartition(".")[2], 1e-3)
        moved = (p.detach() - before[name]).abs().max().item()
        assert 0 < moved <= 1.001 * rate, name  # AdamW's first step is the rate itself, up to its epsilon


# Losses


class Line(nn.Module):
    """A model whose loss anybody can compute."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x.flatten(1))


def squares(model: nn.Module) -> Tensor:
    return sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


@pytest.mark.parametrize(
    ("images", "batch_size"), [(12, 4), (10, 4), (9, 4), (5, 8), (1, 1)], ids=lambda n: str(n)
)
def test_the_losses_are_means_over_images_however_these_fall_into_batches(images, batch_size):
    model = Line()
    batches = TrainBatches(random_dataset(images), batch_size, 3, "cpu")
    got = train_epoch(stepper(model, NOTHING_MOVES, squares), batches, 2, 0.25)
    with torch.no_grad():
        each = [F.cross_entropy(model(x), y, reduction="none").double() for x, y in batches.epoch(2)]
        expected = torch.cat(each).mean().item()
        penalty = 0.25 * squares(model).item()
    assert len(torch.cat(each)) == images
    assert got.cross_entropy == pytest.approx(expected, rel=1e-6)
    assert got.loss == pytest.approx(expected + penalty, rel=1e-6)


def test_the_losses_of_each_step_are_kept_with_its_penalty_before_the_optimizer_moves():
    model = Line()
    batches = planted(3)
    step = stepper(model, Settings(), squares)
    expected = []
    for batch in batches.batches:
        with torch.no_grad():
            penalty, cross_entropy = squares(model).item(), F.cross_entropy(model(batch[0]), batch[1]).item()
        expected.append([cross_entropy + 0.25 * penalty, cross_entropy, penalty])
        step(*batch, 0.25)
    again = train_epoch(stepper(Line(), Settings(), squares), batches, 0, 0.25).steps
    assert again == [pytest.approx(losses, rel=1e-6) for losses in expected]


def test_the_losses_are_plain_numbers():
    got = train_epoch(stepper(Line(), NOTHING_MOVES, squares), planted(2), 0, 0.5)
    assert isinstance(got, EpochLosses)
    assert type(got.loss) is float and type(got.cross_entropy) is float


def test_with_a_coefficient_of_zero_the_loss_is_the_cross_entropy():
    got = train_epoch(stepper(quantized()), planted(2), 0, 0.0)
    assert got.loss == got.cross_entropy


def test_a_penalty_with_a_coefficient_of_zero_is_not_computed():
    def refuse(model: nn.Module) -> Tensor:
        raise AssertionError("the penalty was computed")

    train_epoch(stepper(quantized(), penalty=refuse), planted(1), 0, 0.0)
    with pytest.raises(AssertionError, match="was computed"):
        train_epoch(stepper(quantized(), penalty=refuse), planted(1), 0, 0.1)


def test_leaving_the_penalty_out_where_its_coefficient_is_zero_gives_the_same_bits_as_computing_it():
    without, with_it = quantized(**COARSE), quantized(**COARSE)
    computed = []
    lasso = coupled_group_lasso(with_it)

    def counted(model: nn.Module) -> Tensor:
        computed.append(1)
        return lasso(model)

    # 1e-300 is not zero, and is zero as soon as it meets a float32.
    losses = [
        train_epoch(stepper(without), planted(3), 0, 0.0),
        train_epoch(stepper(with_it, penalty=counted), planted(3), 0, 1e-300),
    ]
    assert len(computed) == 3
    assert losses[0] == losses[1]
    assert_same_bits(state(without), state(with_it))


def test_the_quantizers_are_evaluated_once_a_step_for_forward_pass_and_penalty_together(monkeypatch):
    model = quantized()
    step = stepper(model)
    calls: list[int] = []
    forward = DeadZoneLDZCompander.forward
    monkeypatch.setattr(
        DeadZoneLDZCompander, "forward", lambda self, w: (calls.append(id(self)), forward(self, w))[1]
    )
    train_epoch(step, planted(2), 0, 0.01)
    assert sorted(calls) == sorted([id(q) for q in quantizers(model).values()] * 2)


# What an epoch leaves behind


def test_after_an_epoch_the_model_is_in_training_mode_with_the_last_steps_gradients():
    model = quantized(**COARSE).eval()
    batches = planted(3)
    train_epoch(stepper(model, NOTHING_MOVES), batches, 0, 0.01)
    assert all(m.training for m in model.modules())
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    again = quantized(**COARSE)
    train_epoch(stepper(again, NOTHING_MOVES), Planted(batches.batches[-1:]), 0, 0.01)
    assert_same_bits(got, {n: p.grad for n, p in again.named_parameters()})
    assert all(g.isfinite().all() and g.any() for g in got.values())


def test_rates_of_zero_change_no_parameter_and_the_batch_norms_count_the_steps():
    model = quantized()
    before = {n: p.clone() for n, p in model.named_parameters()}
    train_epoch(stepper(model, NOTHING_MOVES), planted(3), 0, 0.01)
    assert_same_bits(before, dict(model.named_parameters()))
    assert model.bn1.num_batches_tracked == 3


def test_progress_is_told_after_each_step_with_the_steps_in_all_and_the_seconds():
    told: list[tuple[int, int, float]] = []
    batches = TrainBatches(random_dataset(10), 4, 0, "cpu")
    train_epoch(stepper(Line(), penalty=squares), batches, 0, 0.0, lambda *what: told.append(what))
    assert [(done, steps) for done, steps, _ in told] == [(1, 3), (2, 3), (3, 3)]
    seconds = [s for _, _, s in told]
    assert 0 <= seconds[0] <= seconds[1] <= seconds[2]


def test_whether_progress_is_shown_changes_no_bit():
    shown, silent = quantized(), quantized()
    a = train_epoch(stepper(shown), planted(2), 0, 0.01, lambda *_: None)
    b = train_epoch(stepper(silent), planted(2), 0, 0.01)
    assert a == b
    assert_same_bits(state(shown), state(silent))


def trained(seed: int, precision: str = "float32") -> tuple[list[object], dict[str, Tensor]]:
    model = quantized(seed)
    dataset = random_dataset(40)
    step = TrainingStep(
        model, make_optimizer(model, MEASURED), coupled_group_lasso(model), precision=precision
    )
    batches = TrainBatches(dataset, 16, seed, "cpu")
    told: list[object] = []
    for epoch in range(2):
        told.append(train_epoch(step, batches, epoch, 0.01 * epoch))
        told.append(measure_accuracy(model, TestBatches(dataset, "cpu"), precision))
    return told, state(model)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_same_seed_gives_the_same_losses_and_weights_digit_for_digit(precision):
    (told, weights), (again, weights_again) = trained(5, precision), trained(5, precision)
    assert told == again
    assert_same_bits(weights, weights_again)


def test_another_seed_gives_other_losses():
    assert trained(5)[0][0] != trained(6)[0][0]


def test_bf16_is_close_to_float32_and_keeps_weights_and_gradients_in_float32():
    results = []
    for precision in ("float32", "bf16"):
        model = quantized()
        step = TrainingStep(
            model, make_optimizer(model, MEASURED), coupled_group_lasso(model), precision=precision
        )
        results.append(train_epoch(step, planted(1, images=32), 0, 0.01))
        assert (
            {p.dtype for p in model.parameters()}
            == {p.grad.dtype for p in model.parameters()}
            == {torch.float32}
        )
    full, half = results
    assert half.cross_entropy != full.cross_entropy
    assert half.cross_entropy == pytest.approx(full.cross_entropy, rel=0.02)
    # The penalty is computed from the quantized weights in float32 under both.
    assert half.loss - half.cross_entropy == pytest.approx(full.loss - full.cross_entropy, rel=1e-5)


# What is dead stays dead


def steps_with(keep_dead: bool, coefficient: float) -> tuple[ResNet, dict[str, tuple[slice | int, ...]]]:
    model = quantized(**COARSE)
    buried = bury(model)
    kept = keep_dead_slices(model) if keep_dead else None
    step = TrainingStep(model, make_optimizer(model, MEASURED), coupled_group_lasso(model), keep_dead=kept)
    train_epoch(step, planted(3), 0, coefficient)
    return model, buried


def test_slices_in_the_dead_zone_are_zero_for_good_while_the_penalty_acts():
    model, buried = steps_with(keep_dead=True, coefficient=0.01)
    for name, place in buried.items():
        assert not model.get_parameter(name)[place].any()


@pytest.mark.parametrize(("keep_dead", "coefficient"), [(True, 0.0), (False, 0.01)])
def test_without_a_penalty_or_without_the_setting_they_may_come_back(keep_dead, coefficient):
    model, buried = steps_with(keep_dead, coefficient)
    for name, place in buried.items():
        assert model.get_parameter(name)[place].all()


def test_keeping_the_dead_changes_no_other_weight_in_the_step_that_begins_it():
    models = []
    for kept in (True, False):
        model = quantized(**COARSE)
        buried = bury(model)
        keep_dead = keep_dead_slices(model) if kept else None
        optimizer, penalty = make_optimizer(model, MEASURED), coupled_group_lasso(model)
        train_epoch(TrainingStep(model, optimizer, penalty, keep_dead=keep_dead), planted(1), 0, 0.01)
        with torch.no_grad():
            for name, place in buried.items():
                model.get_parameter(name)[place] = 0
        models.append(model)
    assert_same_bits(*map(state, models))


# Batch norms taken afresh


def test_batch_norms_taken_afresh_hold_the_plain_means_over_the_first_batches_and_nothing_older():
    model = quantized()
    batches = planted(5)
    train_epoch(stepper(model), batches, 0, 0.01)
    with torch.no_grad():
        outputs = [model.conv1(images) for images, _ in batches.batches[:3]]
    renew_batch_norms(model, batches, 0, 3)
    means = torch.stack([x.mean((0, 2, 3)) for x in outputs]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in outputs]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, means, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.bn1.running_var, variances, rtol=1e-4, atol=1e-6)
    again = state(model)
    renew_batch_norms(model, batches, 0, 3)
    assert_same_bits(again, state(model))


def test_a_batch_norm_that_its_network_keeps_in_evaluation_mode_is_not_taken_afresh():
    model = quantized()
    model.bn1.running_mean.fill_(0.5)
    train = model.train

    def without_first(mode: bool = True) -> nn.Module:
        train(mode)
        model.bn1.eval()
        return model

    model.train = without_first
    renew_batch_norms(model, planted(2), 0, 2)
    assert (model.bn1.running_mean == 0.5).all() and model.bn1.num_batches_tracked == 0
    assert model.layer1[0].bn1.num_batches_tracked == 2


def test_batch_norms_taken_afresh_over_more_batches_than_there_are_use_each_once():
    one, other = quantized(), quantized()
    renew_batch_norms(one, planted(2), 0, 2)
    renew_batch_norms(other, planted(2), 0, 10)
    assert_same_bits(state(one), state(other))
    assert one.bn1.num_batches_tracked == 2


def test_batch_norms_taken_afresh_leave_weights_gradients_and_later_training_alone():
    renewed, not_renewed = quantized(), quantized()
    for model in (renewed, not_renewed):
        step = stepper(model)
        train_epoch(step, planted(2), 0, 0.01)
        if model is renewed:
            before = {n: (p.clone(), p.grad.clone()) for n, p in model.named_parameters()}
            renew_batch_norms(model, planted(3), 0, 3)
            for name, p in model.named_parameters():
                assert torch.equal(p, before[name][0]) and torch.equal(p.grad, before[name][1]), name
        train_epoch(step, planted(2), 1, 0.01)
    assert_same_bits(dict(renewed.named_parameters()), dict(not_renewed.named_parameters()))
    momenta = {m.momentum for m in renewed.modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta == {0.1}


# Logits and accuracy


class Sure(nn.Module):
    """Answers with the class that the first pixel's red tells."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        red = ((x[:, 0, 0, 0] * 0.2023 + 0.4914) * 255).round().long()
        return F.one_hot(red, 10).float()


@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_accuracy_is_the_share_of_images_whose_largest_logit_is_their_labels(batch_size):
    answers = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    labels = torch.tensor([3, 1, 4, 0, 5, 8, 2, 6, 0, 3])  # seven of ten
    images = answers.to(torch.uint8)[:, None, None, None].expand(10, 3, 32, 32).contiguous()
    dataset = Dataset("", "", True, 10, images, labels, images, labels)
    assert measure_accuracy(Sure(), TestBatches(dataset, "cpu", batch_size)) == 0.7


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_predicting_gives_the_logits_and_labels_of_all_images_in_their_order(batch_size):
    dataset = random_dataset(4, test=24)
    model = quantized().eval()
    ((images, _),) = TestBatches(dataset, "cpu", 24)
    logits, labels = predict(model, TestBatches(dataset, "cpu", batch_size))
    assert logits.shape == (24, 10) and torch.equal(labels, dataset.test_labels)
    torch.testing.assert_close(logits, model(images).detach(), rtol=1e-4, atol=1e-5)
    assert not logits.requires_grad


def test_a_rank_whose_shard_holds_no_image_predicts_none():
    logits, labels = predict(quantized().eval(), TestBatches(random_dataset(4, test=0), "cpu"))
    assert logits.shape == (0, 10) and labels.shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_predicting_leaves_the_network_in_the_mode_that_it_is_in(training):
    model = quantized().train(training)
    predict(model, TestBatches(random_dataset(4), "cpu"))
    assert all(m.training == training for m in model.modules())


def test_predicting_in_bf16_gives_other_logits_that_are_close():
    model, batches = quantized().eval(), TestBatches(random_dataset(4, test=24), "cpu")
    full, half = predict(model, batches)[0], predict(model, batches, "bf16")[0].float()
    assert not torch.equal(full, half)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.05)


def test_predicting_evaluates_each_quantizer_once(monkeypatch):
    model, calls = quantized().eval(), []
    forward = DeadZoneLDZCompander.forward
    monkeypatch.setattr(
        DeadZoneLDZCompander, "forward", lambda self, w: (calls.append(id(self)), forward(self, w))[1]
    )
    predict(model, TestBatches(random_dataset(4, test=24), "cpu", batch_size=5))
    assert sorted(calls) == sorted(id(q) for q in quantizers(model).values())


def test_measuring_is_in_evaluation_mode_and_changes_no_weight_statistic_or_gradient():
    model = quantized()
    train_epoch(stepper(model), planted(1), 0, 0.01)
    before, grads = state(model), {n: p.grad.clone() for n, p in model.named_parameters()}
    dataset = random_dataset(4, test=24)
    accuracy = measure_accuracy(model, TestBatches(dataset, "cpu", batch_size=5))
    assert not any(m.training for m in model.modules())
    assert_same_bits(before, state(model))
    assert_same_bits(grads, {n: p.grad for n, p in model.named_parameters()})
    ((images, labels),) = TestBatches(dataset, "cpu", batch_size=24)
    assert accuracy == (model(images).argmax(1) == labels).double().mean().item()


def test_training_goes_on_after_measuring_as_if_nothing_had_been_measured():
    measured, not_measured = quantized(), quantized()
    test_set = TestBatches(random_dataset(4), "cpu")
    for model in (measured, not_measured):
        step = stepper(model)
        for epoch in range(2):
            train_epoch(step, planted(2), epoch, 0.01)
            if model is measured:
                measure_accuracy(model, test_set)
    assert_same_bits(state(measured), state(not_measured))


# Numbers that are not finite


def assert_stops(step: TrainingStep, batches: Planted, where: str, at: int) -> None:
    """The epoch stops at step `at`, says where it began, and leaves the parameters of the step before."""
    good = copy.deepcopy(step.model)
    if at > 1:
        train_epoch(
            TrainingStep(good, make_optimizer(good, MEASURED), coupled_group_lasso(good)),
            Planted(batches.batches[: at - 1]), 0, 0.01)  # fmt: skip
    with pytest.raises(NotFiniteError) as error:
        train_epoch(step, batches, 0, 0.01)
    sentence = str(error.value)
    assert f"step {at};" in sentence
    assert sentence.endswith(where)
    assert "\n" not in sentence
    for (name, p), q in zip(step.model.named_parameters(), good.parameters(), strict=True):
        assert torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0)), f"{name} moved in the bad step"


@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("at", [1, 3])
def test_a_bad_number_in_an_image_is_found_there_at_its_step_and_moves_no_weight(at, number):
    batches = planted(4)
    batches.batches[at - 1][0][2, 1, 5, 5] = number
    assert_stops(stepper(quantized()), batches, "the images themselves", at)


QUANTIZER = "parametrizations.weight.0.quantizer"


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("layer2.0.conv1.parametrizations.weight.original", NAN),  # which its quantizer refuses
        ("layer2.0.conv1.parametrizations.weight.original", INF),
        (f"layer1.0.conv2.{QUANTIZER}.logit_dz", NAN),  # at infinity a logit still means something
        (f"layer3.0.conv2.{QUANTIZER}.logit_bit", NAN),
        ("conv1.weight", NAN),  # not quantized
        ("conv1.weight", INF),
        ("layer1.0.bn2.bias", INF),
        ("linear.bias", NAN),
    ],
)
def test_a_bad_number_in_a_parameter_is_found_there_and_moves_no_weight(name, number):
    model = quantized()
    with torch.no_grad():
        model.get_parameter(name)[0] = number
    assert_stops(stepper(model), planted(2), f"parameter {name}", 1)


@pytest.mark.parametrize("name", ["bn1", "layer2.0.bn1", "layer3.0.bn2"])
def test_a_layer_whose_output_overflows_is_found_though_every_parameter_is_finite(name):
    model = quantized()
    torch.nn.init.constant_(model.get_submodule(name).weight, 3e38)
    assert_stops(stepper(model), planted(2), f"the output of {name}", 1)


def test_a_penalty_that_overflows_is_found_to_be_none_of_the_layers():
    step = stepper(quantized(), penalty=lambda model: squares(model) * INF)
    assert_stops(step, planted(2), "the loss, every layer's output being finite", 1)


def test_another_mistake_is_not_taken_for_a_number_that_is_not_finite():
    def mistaken(model: nn.Module) -> Tensor:
        raise ValueError("a mistake of the program")

    with pytest.raises(ValueError, match="a mistake of the program"):
        train_epoch(stepper(quantized(), penalty=mistaken), planted(1), 0, 0.01)


def test_after_a_bad_step_no_hook_is_left_on_the_model():
    model = quantized()
    batches = planted(1)
    batches.batches[0][0][0, 0, 0, 0] = NAN
    with pytest.raises(NotFiniteError):
        train_epoch(stepper(model), batches, 0, 0.01)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("rate", [1e39, 1e30])
def test_weights_that_stop_being_finite_in_an_epochs_last_step_stop_that_epoch_or_the_next(rate):
    """Whichever it is, what lies between the epochs must not trip over them."""
    model = quantized()
    step = stepper(model, Settings(weights_lr=rate))
    with pytest.raises(NotFiniteError):
        for epoch in range(2):
            train_epoch(step, planted(1), epoch, 0.01)
            measure_accuracy(model, TestBatches(random_dataset(4), "cpu"))
            count_network(model)


# Against the reference


class InDouble:
    """The same batches in float64."""

    def __init__(self, batches: TrainBatches) -> None:
        self.batches, self.sizes, self.device = batches, batches.sizes, batches.device

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images.double(), labels) for images, labels in self.batches.epoch(epoch))


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state in the default memory layout."""
    return {n: v.clone(memory_format=torch.contiguous_format) for n, v in model.state_dict().items()}


class Reference:
    """A ResNet with quantizers that trains by the formulas of experiments/reference.py alone.

    It starts from a copy of a model's state, with the learning rates and weight decays of `MEASURED`.
    """

    def __init__(self, model: ResNet) -> None:
        self.blocks = len(model.layer1)
        self.values = plain_state(model)
        self.trained = [name for name, _ in model.named_parameters()]
        nothing = {name: torch.zeros_like(self.values[name]) for name in self.trained}
        self.moments = {name: (value, value) for name, value in nothing.items()}
        self.steps = 0

    def weights(self) -> dict[str, Tensor]:
        """What each layer computes with, by its name: (O, I, kh, kw), or (classes, I) of the classifier."""
        found = {n.removesuffix(".weight"): v for n, v in self.values.items() if n.endswith(".weight")}
        for name in self.quantized():
            inside = f"{name}.{INSIDE}"
            logits = [self.values[f"{inside}.0.quantizer.{kind}"] for kind in ("logit_bit", "logit_dz")]
            bits = 2 + 6 * logits[0].tanh().abs()  # from 2 to 8
            found[name] = reference.quantize(self.values[f"{inside}.original"], bits, logits[1])
        return found

    def quantized(self) -> list[str]:
        return [n.partition(f".{INSIDE}")[0] for n in self.values if n.endswith(".original")]

    def step(
        self, images: Tensor, labels: Tensor, sparsity_weight: float, keep_dead: bool = False
    ) -> tuple[float, float]:
        """One training step; the loss, and its cross-entropy part."""
        parameters = {name: self.values[name].requires_grad_() for name in self.trained}
        weights = self.weights()
        penalised = {name: weights[name] for name in self.quantized()}
        logits = reference.Network(self.values, weights, self.blocks)(images)
        penalty = sparsity_weight * reference.penalty(penalised, self.blocks)
        cross_entropy = reference.cross_entropy(logits, labels)
        loss = cross_entropy + penalty
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        dead = reference.dead_members(penalised, self.blocks) if keep_dead and sparsity_weight else []
        self.steps += 1
        for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
            kind = {"logit_bit": "bit", "logit_dz": "deadzone"}.get(name.rpartition(".")[2], "weights")
            rate, decay = getattr(MEASURED, f"{kind}_lr"), getattr(MEASURED, f"{kind}_decay")
            adamw = reference.AdamW(rate, decay, 0.9, MEASURED.beta2)
            self.values[name], *moments = adamw.step(p.detach(), gradient, *self.moments[name], self.steps)
            self.moments[name] = (moments[0], moments[1])
        for layer, side, number in dead:
            stored = self.values[f"{layer}.{INSIDE}.original"]
            reference.slice_of(stored, side, number).zero_()
        return loss.item(), cross_entropy.item()

    def zeros(self) -> dict[str, tuple[int, int]]:
        """(weights that are zero, filters that are all zero) of each quantized layer."""
        weights = self.weights()
        found = {name: weights[name] == 0 for name in self.quantized()}
        return {n: (int(zero.sum()), int(zero.flatten(1).all(1).sum())) for n, zero in found.items()}

    def copy_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go on from where the model and its optimizer are."""
        self.values = plain_state(model)
        for name, p in model.named_parameters():
            if moments := optimizer.state[p]:
                self.moments[name] = (moments["exp_avg"].clone(), moments["exp_avg_sq"].clone())


def zeros(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {x.name: (x.zero_weights, x.zero_filters) for x in count_network(model).quantized}


def coefficient(step: int) -> float:
    """The penalty's coefficient at a step (from 0)."""
    return 0.0 if step < 4 else min(step - 3, 8) / 1024  # exact in binary, up to 2^-7


@pytest.mark.slow
def test_over_twelve_steps_in_float64_the_losses_and_counts_are_those_of_the_slow_reference():
    """From one start, each on its own. In float32 no two orders of summation stay together that long: the
    first weight that another last digit puts into another bin of its quantizer sends them apart."""
    model = quantized(blocks=3, **COARSE).double()
    buried = bury(model)
    slow = Reference(model)
    batches = InDouble(TrainBatches(random_dataset(8), 8, 0, "cpu"))
    optimizer, penalty = make_optimizer(model, MEASURED), coupled_group_lasso(model)
    step = TrainingStep(model, optimizer, penalty, keep_dead=keep_dead_slices(model))
    for i in range(12):
        losses = train_epoch(step, batches, i, coefficient(i))
        ((images, labels),) = batches.epoch(i)
        expected = slow.step(images, labels, coefficient(i), keep_dead=True)
        assert (losses.loss, losses.cross_entropy) == pytest.approx(expected, rel=1e-6), f"step {i}"
        assert zeros(model) == slow.zeros(), f"step {i}"
    assert all(not model.get_parameter(name)[place].any() for name, place in buried.items())
    assert sum(n for n, _ in zeros(model).values()) > 200_000
    for name, value in state(model).items():
        if name.rpartition(".")[2] != "num_batches_tracked":
            torch.testing.assert_close(value, slow.values[name], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_each_of_twelve_float32_steps_has_the_loss_and_counts_of_the_slow_reference_from_the_same_state():
    model = quantized(blocks=3)
    slow = Reference(model)
    batches = TrainBatches(random_dataset(16), 16, 0, "cpu")
    optimizer = make_optimizer(model, MEASURED)
    step = TrainingStep(model, optimizer, coupled_group_lasso(model))
    weights = sum(x.weights for x in count_network(model).quantized)
    for i in range(12):
        slow.copy_state(model, optimizer)
        losses = train_epoch(step, batches, i, coefficient(i))
        ((images, labels),) = batches.epoch(i)
        expected = slow.step(images, labels, coefficient(i))
        assert (losses.loss, losses.cross_entropy) == pytest.approx(expected, rel=1e-5), f"step {i}"
        ours, theirs = zeros(model), slow.zeros()
        assert sum(abs(ours[n][0] - theirs[n][0]) for n in ours) <= 5e-5 * weights, f"step {i}"
        assert [n for _, n in ours.values()] == [n for _, n in theirs.values()], f"step {i}"


# On a GPU


class Watched(TrainBatches):
    """Batches that make every wait of the host for the GPU an error, from the first one to the last."""

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = super().epoch(epoch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from batches
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_replayed_graph_leaves_its_own_gradients_and_not_those_of_the_graph_captured_last():
    parameter = nn.Parameter(torch.zeros(2))
    graphs = {}
    for name, value in (("whole batch", 1.0), ("last batch", 2.0)):
        held = torch.full((2,), value)
        replay = SimpleNamespace(replay=lambda held=held: held.mul_(10))
        graphs[name] = training._Graph(replay, torch.zeros(1), torch.zeros(1), held, [(parameter, held)])
    for name, due in (("last batch", 20.0), ("whole batch", 10.0)):
        graphs[name].replay(torch.ones(1), torch.ones(1))
        assert parameter.grad is not None and parameter.grad.tolist() == [due, due]


def test_a_step_that_no_graph_can_hold_is_taken_without_one_and_keeps_why(monkeypatch):
    """As on a GPU, where capturing raises an error; the steps are those of a run without graphs."""
    streams: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    plain, refused = (stepper(quantized(**COARSE)) for _ in range(2))
    refused.captures = True
    refused._capture = mock.Mock(side_effect=RuntimeError("not permitted while capturing\nmore"))
    dataset = random_dataset(8 * (TrainingStep.EAGER_STEPS + 2))
    losses = [train_epoch(s, TrainBatches(dataset, 8, 0, s.device), 0, 0.01).steps for s in (plain, refused)]
    assert losses[0] == losses[1] and refused._capture.call_count == 1
    assert (refused.captures, refused.graphs, streams) == (False, {}, ["the stream before"])
    assert refused.not_captured == "not permitted while capturing" and plain.not_captured == ""
    refused.captures = True
    refused._capture = mock.Mock(side_effect=torch.OutOfMemoryError("full"))
    with pytest.raises(torch.OutOfMemoryError):
        train_epoch(refused, TrainBatches(dataset, 8, 0, refused.device), 1, 0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_on_cuda_no_step_makes_the_host_wait(precision):
    model = quantized(blocks=3).cuda()
    step = TrainingStep(
        model, make_optimizer(model, MEASURED), coupled_group_lasso(model), precision, keep_dead_slices(model)
    )
    dataset = random_dataset(32 * 6 + 8)
    for epoch, coefficient in enumerate((0.0, 0.0, 0.01, 0.01)):
        kind = TrainBatches if epoch % 2 == 0 else Watched  # the first epoch of a kind sets things up
        losses = train_epoch(step, kind(dataset, 32, 0, "cuda"), epoch, coefficient, lambda *_: None)
        assert losses.loss > losses.cross_entropy if coefficient else losses.loss == losses.cross_entropy
    assert step.graphs and step.not_captured == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_watch_itself_sees_a_step_that_waits():
    step = stepper(quantized().cuda(), penalty=lambda model: squares(model) * squares(model).item())
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            train_epoch(step, Watched(random_dataset(16), 8, 0, "cuda"), 0, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_steps_are_those_of_the_cpu():
    """Through eager steps, captured ones and a smaller last batch; float64 keeps the two together."""
    models = [quantized(**COARSE).double(), quantized(**COARSE).double().cuda()]
    steps = [stepper(model) for model in models]
    dataset = random_dataset(8 * 5 + 3)
    for epoch, coefficient in enumerate((0.0, 2**-7, 2**-6, 0.0)):
        ours = [
            train_epoch(step, InDouble(TrainBatches(dataset, 8, 0, step.device)), epoch, coefficient)
            for step in steps
        ]
        assert ours[1].loss == pytest.approx(ours[0].loss, rel=1e-5), f"epoch {epoch}"
        assert zeros(models[0]) == zeros(models[1])
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            close = torch.allclose(q.grad.cpu(), p.grad, rtol=1e-3, atol=1e-4)
            assert close, f"epoch {epoch}, gradient of {name}"
