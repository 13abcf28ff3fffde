"""The coupled group lasso against a plain loop over the channels that must vanish together."""

import copy
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.settings import MACS, QUANTIZED
from experiments.sparsity import coupled_group_lasso, keep_dead_slices
from resnet import resnet20, resnet32
from src.groups import FILTERS, INPUT_SLICES, channel_groups
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, quantized_layers, quantizers, toggle_quantization

DEFAULT = ["^conv1$", "^linear$"]  # all block convolutions are quantized
PLAN = ["conv1", "bn", "linear"]  # the conv2 of the blocks alone
FIRST = ["conv2", "^conv1$", "linear"]  # the conv1 of the blocks alone
ONE_STAGE = ["^conv1$", "layer1", "layer3", "linear"]
LISTS = {"default": DEFAULT, "plan": PLAN, "first": FIRST, "one stage": ONE_STAGE}
WIDTHS = (16, 32, 64)
COARSE = {"init_bit_logit": 0.8, "init_deadzone_logit": 0.6}  # half of the weights in the dead zone


def make_model(depth=20, exclude=DEFAULT, seed=0, enabled=True, **kwargs):
    torch.manual_seed(seed)
    model = {20: resnet20, 32: resnet32}[depth]().double()
    settings_ = COARSE | kwargs
    attach_weight_quantizers(model, exclude, DeadZoneLDZCompander, settings_, enabled=enabled)
    return model.double()  # the logits too


def stored(model, name: str) -> nn.Parameter:
    return model.get_submodule(name).parametrizations.weight.original


def groups_by_hand(model) -> list[list[tuple[str, str, int]]]:
    """Every channel's weight slices, as (layer, "filter" or "input", number), quantized or not."""
    stages = [model.layer1, model.layer2, model.layer3]
    groups = []
    for s, (stage, width) in enumerate(zip(stages, WIDTHS, strict=True), 1):
        for b in range(len(stage)):  # inner channels
            for i in range(width):
                groups.append([(f"layer{s}.{b}.conv1", "filter", i), (f"layer{s}.{b}.conv2", "input", i)])
        for c in range(width):  # residual channels
            group = [(f"layer{s}.{b}.conv2", "filter", c) for b in range(len(stage))]
            group += [(f"layer{s}.{b}.conv1", "input", c) for b in range(1, len(stage))]
            if s < 3:
                group.append((f"layer{s + 1}.0.conv1", "input", c))
            groups.append(group)
    return groups


def penalty_by_loop(model) -> Tensor:
    weights = {name: layer.weight for name, layer in quantized_layers(model).items()}
    total = torch.zeros((), dtype=torch.float64)
    for group in groups_by_hand(model):
        squares = torch.zeros((), dtype=torch.float64)
        for name, kind, i in group:
            if name in weights:
                w = weights[name][i] if kind == "filter" else weights[name][:, i]
                squares = squares + (w * w).sum()
        if squares > 0:  # a group of zeros adds nothing, to the gradient neither
            total = total + squares.sqrt()
    return total


def test_with_macs_each_norm_counts_as_its_channel_costs():
    model = make_model(20, ["^conv1$", "^linear$"])
    weights = {name: layer.weight for name, layer in quantized_layers(model).items()}
    side = {"1": 32, "2": 16, "3": 8}  # pixels along each side of what a stage gives
    norms, macs = [], []
    for group in groups_by_hand(model):
        slices = [(n, weights[n][i] if kind == "filter" else weights[n][:, i]) for n, kind, i in group]
        norms.append(sum((w * w).sum() for _, w in slices).sqrt())
        macs.append(sum(w.numel() * side[n[len("layer")]] ** 2 for n, w in slices))
    expected = sum(norm * m for norm, m in zip(norms, macs, strict=True)) * len(macs) / sum(macs)
    found = coupled_group_lasso(model, QUANTIZED, MACS)(model)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def gradients(model, penalty: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    penalty.backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_agrees_with_the_loop(model):
    mine, theirs = coupled_group_lasso(model)(model), penalty_by_loop(model)
    assert mine.shape == ()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    by_mine, by_loop = gradients(model, mine), gradients(model, theirs)
    for name, expected in by_loop.items():
        got = by_mine[name]
        # Where the loop has nothing to say there may be no gradient or one of zeros.
        got = torch.zeros(1) if got is None else got
        assert got.isfinite().all(), name
        if expected is None:
            assert not got.any(), name
        else:
            torch.testing.assert_close(
                got, expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
            )
    return by_mine


@pytest.mark.parametrize("exclude", LISTS.values(), ids=LISTS.keys())
@pytest.mark.parametrize("depth", [20, 32])
def test_value_and_gradients_are_those_of_a_plain_loop_over_channels(depth, exclude):
    model = make_model(depth, exclude)
    grads = assert_agrees_with_the_loop(model)
    for name in quantized_layers(model):
        for leaf in ("original", "0.quantizer.logit_bit", "0.quantizer.logit_dz"):
            assert grads[f"{name}.parametrizations.weight.{leaf}"].any(), (name, leaf)


def test_value_and_gradients_are_those_of_the_loop_in_full_precision_too():
    assert_agrees_with_the_loop(make_model(enabled=False))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    dead=st.lists(st.integers(0, 447), max_size=40, unique=True),
    dz=st.floats(0.3, 3),
    bit=st.floats(-2, 2),
)
def test_value_and_gradients_are_those_of_the_loop_with_any_channels_dead(seed, dead, dz, bit):
    model = make_model(seed=seed, init_deadzone_logit=dz, init_bit_logit=bit)
    zero_groups(model, dead)
    assert_agrees_with_the_loop(model)


@torch.no_grad()
def zero_groups(model, dead: list[int]) -> None:
    groups = groups_by_hand(model)
    for number in dead:
        for name, kind, i in groups[number]:
            w = stored(model, name)
            (w[i] if kind == "filter" else w[:, i]).zero_()


def test_a_group_of_zeros_has_gradient_zero_and_not_nan():
    model = make_model()
    dead = [0, 15, 16 * 3 + 2, 447]  # two inner and a residual channel of stage 1, the last of stage 3
    zero_groups(model, dead)
    grads = gradients(model, coupled_group_lasso(model)(model))
    assert all(g is None or g.isfinite().all() for g in grads.values())
    for number in dead:
        for name, kind, i in groups_by_hand(model)[number]:
            g = grads[f"{name}.parametrizations.weight.original"]
            assert not (g[i] if kind == "filter" else g[:, i]).any(), (name, kind, i)


def test_a_group_that_lies_in_the_dead_zone_has_gradient_zero_though_its_weights_are_not():
    model = make_model()
    members = [("layer2.1.conv1", "filter", 5), ("layer2.1.conv2", "input", 5)]
    with torch.no_grad():
        stored(model, "layer2.1.conv1")[5] *= 1e-6
        stored(model, "layer2.1.conv2")[:, 5] *= 1e-6
    grads = gradients(model, coupled_group_lasso(model)(model))
    for name, kind, i in members:
        w = model.get_submodule(name).weight
        assert not (w[i] if kind == "filter" else w[:, i]).any()
    # Each of these weights lies in a second group too, an alive one, but has the value 0 there: the
    # derivative w/|w| of that group's norm is 0 for it as well.
    assert not grads["layer2.1.conv1.parametrizations.weight.original"][5].any()
    assert not grads["layer2.1.conv2.parametrizations.weight.original"][:, 5].any()


def test_a_network_of_zeros_costs_nothing_and_all_gradients_are_zero():
    model = make_model()
    zero_groups(model, list(range(448)))
    with torch.no_grad():
        stored(model, "layer1.0.conv1").zero_()
    penalty = coupled_group_lasso(model)(model)
    assert penalty.item() == 0
    grads = [g for g in gradients(model, penalty).values() if g is not None]
    assert grads and all(g.isfinite().all() and not g.any() for g in grads)


# The groups


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (32, 5)])
def test_there_are_as_many_groups_as_inner_and_residual_channels(depth, blocks):
    groups = channel_groups(make_model(depth), quantized_layers(make_model(depth)))
    assert sum(g.channels for g in groups) == blocks * (16 + 32 + 64) + (16 + 32 + 64)


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (32, 5)])
def test_each_slice_is_in_one_group_at_most_and_only_the_stems_readers_are_in_none(depth, blocks):
    model = make_model(depth)
    members = Counter(m for g in channel_groups(model, quantized_layers(model)) for m in g.members)
    assert set(members.values()) == {1}
    names = [f"layer{s}.{b}.{conv}" for s in (1, 2, 3) for b in range(blocks) for conv in ("conv1", "conv2")]
    slices = {(name, dim) for name in names for dim in (FILTERS, INPUT_SLICES)}
    assert slices - set(members) == {("layer1.0.conv1", INPUT_SLICES)}  # these read the stem, which stays
    assert set(members) <= slices


@pytest.mark.parametrize("exclude", LISTS.values(), ids=LISTS.keys())
def test_the_groups_have_the_members_of_the_hand_made_ones(exclude):
    model = make_model(exclude=exclude)
    layers = quantized_layers(model)
    kinds = {FILTERS: "filter", INPUT_SLICES: "input"}
    mine = {
        frozenset((name, kinds[dim], i) for name, dim in g.members)
        for g in channel_groups(model, layers)
        for i in range(g.channels)
    }
    by_hand = {frozenset(m for m in group if m[0] in layers) for group in groups_by_hand(model)}
    assert mine == by_hand - {frozenset()}


@pytest.mark.parametrize("exclude", LISTS.values(), ids=LISTS.keys())
def test_every_slice_number_of_a_group_exists_in_each_of_its_members(exclude):
    model = make_model(exclude=exclude)
    for g in channel_groups(model, quantized_layers(model)):
        for name, dim in g.members:
            assert model.get_submodule(name).weight.shape[dim] == g.channels


# By behaviour, in full precision: the weights as stored are those penalised.


@torch.no_grad()
def all_zero_model(depth=20, exclude=DEFAULT):
    model = make_model(depth, exclude, enabled=False)
    for name in quantized_layers(model):
        stored(model, name).zero_()
    return model


@torch.no_grad()
def test_a_single_weight_counts_once_for_its_filter_and_once_for_its_input_slice():
    model = all_zero_model()
    lasso = coupled_group_lasso(model)
    for name in quantized_layers(model):
        w = stored(model, name)
        w[3, 7, 1, 2] = -2
        # Nothing behind the stem can vanish with it: the input slices of layer1.0.conv1 are in no group.
        assert lasso(model).item() == (2 if name == "layer1.0.conv1" else 4), name
        w.zero_()


# Slices that share a channel, given as a weight in each at (filter, input): one of value 3 and one of 4. Each
# weight lies in a group of its own as well (its filter's where the slice is an input slice, and the other way
# round), so the penalty is sqrt(3^2 + 4^2) + 3 + 4 = 12, and 14 where they share none.
COUPLED = {
    "filter of conv1 and input slice of conv2": ("layer2.1.conv1", (9, 2), "layer2.1.conv2", (5, 9)),
    "filters of two conv2 of a stage": ("layer2.0.conv2", (9, 2), "layer2.2.conv2", (9, 5)),
    "filter of conv2 and a later conv1's slice": ("layer3.0.conv2", (9, 2), "layer3.2.conv1", (5, 9)),
    "a later conv1's slice and a later conv2": ("layer1.1.conv1", (5, 9), "layer1.2.conv2", (9, 2)),
    "filter of conv2 and the next stage's slice": ("layer1.0.conv2", (9, 2), "layer2.0.conv1", (5, 9)),
    "slices of two later conv1": ("layer2.1.conv1", (5, 9), "layer2.2.conv1", (5, 9)),
    "last conv2 of stage 2 and stage 3's slice": ("layer2.2.conv2", (9, 2), "layer3.0.conv1", (5, 9)),
}
APART = {
    "other numbers": ("layer2.1.conv1", (9, 2), "layer2.1.conv2", (5, 8)),
    "inner channels of two blocks": ("layer2.1.conv1", (9, 2), "layer2.2.conv2", (5, 9)),
    "residual channels of two stages": ("layer1.0.conv2", (9, 2), "layer2.0.conv2", (9, 5)),
    "filter of conv1 and filter of conv2": ("layer2.1.conv1", (9, 2), "layer2.1.conv2", (9, 5)),
    "where the shortcut would put the channel": ("layer1.0.conv2", (9, 2), "layer2.0.conv2", (17, 5)),
}


@pytest.mark.parametrize("pair", COUPLED.values(), ids=COUPLED.keys())
def test_slices_of_the_same_channel_share_a_norm(pair):
    assert penalty_of_two_weights(*pair) == pytest.approx(12)


@pytest.mark.parametrize("pair", APART.values(), ids=APART.keys())
def test_slices_of_different_channels_do_not(pair):
    assert penalty_of_two_weights(*pair) == pytest.approx(14)


@torch.no_grad()
def penalty_of_two_weights(first, at, second, there) -> float:
    model = all_zero_model()
    stored(model, first)[(*at, 0, 1)] = 3
    stored(model, second)[(*there, 2, 2)] = -4
    return coupled_group_lasso(model)(model).item()


@pytest.mark.parametrize(("depth", "n"), [(20, 3), (32, 5)])
@torch.no_grad()
def test_a_network_of_ones_costs_the_roots_of_the_groups_sizes(depth, n):
    model = make_model(depth, enabled=False)
    for name in quantized_layers(model):
        stored(model, name).fill_(1)
    # 9 weights for each pair of channels. Inner: those of a stage's first block read the stage before.
    size = 0.0
    for before, width in ((16, 16), (16, 32), (32, 64)):
        size += width * (math.sqrt(9 * (before + width)) + (n - 1) * math.sqrt(9 * 2 * width))
    # Residual: n filters of conv2, n - 1 slices of conv1, and one of the next stage's first conv1.
    size += 16 * math.sqrt(9 * ((2 * n - 1) * 16 + 32))
    size += 32 * math.sqrt(9 * ((2 * n - 1) * 32 + 64))
    size += 64 * math.sqrt(9 * ((2 * n - 1) * 64))
    assert coupled_group_lasso(model)(model).item() == pytest.approx(size, rel=1e-12)


@torch.no_grad()
def test_with_the_plans_list_only_the_conv2_are_penalised():
    model = make_model(exclude=PLAN, enabled=False)
    for name in quantized_layers(model):
        stored(model, name).fill_(1)
    lasso = coupled_group_lasso(model)
    # A stage of width C: 3 C input slices of 9 C weights, and C residual channels of three filters of 9 C.
    by_hand = sum(3 * c * math.sqrt(9 * c) + c * math.sqrt(3 * 9 * c) for c in WIDTHS)
    assert lasso(model).item() == pytest.approx(by_hand, rel=1e-12)
    for name in ("conv1", "layer1.0.conv1", "layer2.1.conv1", "linear"):
        model.get_submodule(name).weight.mul_(10)
    assert lasso(model).item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("exclude", [DEFAULT, PLAN, ["bn"]], ids=["default", "plan", "all quantized"])
def test_the_stem_and_the_classifier_are_not_penalised(exclude):
    model = make_model(exclude=exclude)
    grads = gradients(model, coupled_group_lasso(model)(model))
    touched = {n.split(".parametrizations")[0] for n, g in grads.items() if g is not None and g.any()}
    assert touched == {n for n in quantized_layers(model) if n.startswith("layer")}


@torch.no_grad()
def test_the_penalty_is_homogeneous():
    model = make_model(enabled=False)
    lasso = coupled_group_lasso(model)
    before = lasso(model).item()
    for name in quantized_layers(model):
        stored(model, name).mul_(-3)
    assert lasso(model).item() == pytest.approx(3 * before, rel=1e-12)


# As the training uses it


@torch.no_grad()
def test_the_weights_as_quantized_are_penalised_and_as_stored_when_switched_off():
    model = make_model()
    lasso = coupled_group_lasso(model)
    quantized = lasso(model).item()
    toggle_quantization(model, False)
    full = lasso(model).item()
    assert full == pytest.approx(penalty_by_loop(model).item(), rel=1e-12)
    assert abs(quantized - full) > 1e-3 * full
    toggle_quantization(model, True)
    assert lasso(model).item() == quantized


@torch.no_grad()
def test_the_model_of_the_call_counts_not_the_one_of_the_construction():
    model = make_model()
    lasso = coupled_group_lasso(model)
    other = copy.deepcopy(model)
    for name in quantized_layers(other):
        stored(other, name).mul_(2)
    assert lasso(other).item() == pytest.approx(penalty_by_loop(other).item(), rel=1e-12)
    assert lasso(other).item() > 1.9 * lasso(model).item()


@pytest.mark.parametrize("exclude", [DEFAULT, PLAN, ["bn"]], ids=["default", "plan", "all quantized"])
def test_inside_cached_each_quantizer_is_evaluated_once_for_forward_pass_and_penalty(exclude):
    model = make_model(exclude=exclude).float()
    lasso = coupled_group_lasso(model)
    calls = Counter()
    for name, quantizer in quantizers(model).items():
        quantizer.register_forward_hook(lambda _m, _x, _out, name=name: calls.update([name]))
    for step in (1, 2):  # the second step must not see the first one's weights
        with parametrize.cached():
            loss = model(torch.randn(2, 3, 32, 32)).square().mean() + lasso(model)
        loss.backward()
        assert calls == dict.fromkeys(quantized_layers(model), step)


def test_inside_cached_the_gradients_are_those_of_loss_and_penalty_apart():
    model = make_model()
    lasso = coupled_group_lasso(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.eval()
    with parametrize.cached():
        together = gradients(model, model(x).square().mean() + lasso(model))
    loss = gradients(model, model(x).square().mean())
    penalty = gradients(model, lasso(model))
    for name, got in together.items():
        expected = loss[name] + (0 if penalty[name] is None else penalty[name])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_without_quantizers_the_penalty_is_a_scalar_zero():
    model = resnet20()
    penalty = coupled_group_lasso(model)(model)
    assert penalty.shape == () and penalty.item() == 0


@pytest.mark.parametrize("training", [True, False])
def test_mode_weights_buffers_and_random_numbers_stay(training):
    model = make_model().train(training)
    modes = {n: m.training for n, m in model.named_modules()}
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    coupled_group_lasso(model)(model).backward()
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_few_steps_of_descent_on_the_penalty_lower_it():
    model = make_model(enabled=False)
    lasso = coupled_group_lasso(model)
    optimizer = torch.optim.SGD([stored(model, n) for n in quantized_layers(model)], lr=0.02)
    values = []
    for _ in range(4):
        penalty = lasso(model)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        values.append(penalty.item())
    assert values == sorted(values, reverse=True) and values[-1] < values[0]


class Concatenated(nn.Module):
    """The last convolution reads the filters of both others, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1)
        self.reads, self.head = nn.Conv2d(5, 6, 1), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.a(x), self.b(x)], 1).relu()
        return self.head(self.reads(x).relu().mean((2, 3)))


class Operations(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_slices_at_other_places_are_coupled_and_a_step_makes_no_tensor_of_them_anew():
    torch.manual_seed(0)
    model = Concatenated().double()
    attach_weight_quantizers(model, ["stem", "head"], DeadZoneLDZCompander, {})
    penalty = coupled_group_lasso(model, "stored")
    with torch.no_grad(), Operations() as seen:
        found = penalty(model)
    # Numbers that come from Python at each step cannot be part of a captured CUDA graph.
    assert "index" in " ".join(seen.names) and not {"lift_fresh", "_to_copy"} & set(seen.names)
    w = {n: m.parametrizations.weight.original.detach() for n, m in quantized_layers(model).items()}
    made = [*w["a"], *w["b"]]
    coupled = [torch.cat([made[c].flatten(), w["reads"][:, c].flatten()]).norm() for c in range(len(made))]
    alone = [row.norm() for row in w["reads"]]
    # What the last layer makes is read by the classifier alone, and is a group of its own.
    assert found.item() == pytest.approx((sum(coupled) + sum(alone)).item())


def test_images_may_be_of_another_size():
    size = (1, 28, 28)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 10, 24), nn.Flatten())
    attach_weight_quantizers(model, [], DeadZoneLDZCompander, {})
    assert coupled_group_lasso(model, group_weights=MACS, input_size=size)(model) > 0
    assert keep_dead_slices(model, size)(model)
