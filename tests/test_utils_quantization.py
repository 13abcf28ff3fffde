"""Attaching quantizers to a model, switching them, and leaving the rest of the model alone."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from resnet import resnet20, resnet32
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import (
    attach_weight_quantizers,
    quantized_layers,
    quantizers,
    toggle_quantization,
    weight_bits,
    weight_quantization,
    without_quantizers,
)

PLAN = ["conv1", "bn", "linear"]
STEM_AND_CLASSIFIER = ["^conv1$", "^linear$"]
BLOCKS = [f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)]
COARSE = {"init_bit_logit": 0.3, "init_deadzone_logit": 0.5}  # few bits, a wide dead zone: easily seen


def attach(model, exclude=(), enabled=True, **kwargs):
    return attach_weight_quantizers(model, list(exclude), DeadZoneLDZCompander, kwargs, enabled=enabled)


def layer_names(model) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def image(n: int = 2):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def macs_of_resnet20_by_hand() -> dict[str, int]:
    macs = {"conv1": 9 * 3 * 16 * 32**2, "linear": 640}
    before = 16
    for stage, width, side in ((1, 16, 32), (2, 32, 16), (3, 64, 8)):
        for i in range(3):
            macs[f"layer{stage}.{i}.conv1"] = 9 * before * width * side**2
            macs[f"layer{stage}.{i}.conv2"] = 9 * width * width * side**2
            before = width
    assert sum(macs.values()) == 40_551_040
    return macs


class Doubling(nn.Module):
    """A quantizer that anybody can check, with a parameter, a buffer and a count of its calls."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.register_buffer("offset", torch.zeros(1))
        self.calls = 0

    def forward(self, w):
        self.calls += 1
        return w * self.factor

    def get_bitwidth(self):
        return 4


# Which layers


def test_a_plain_word_is_a_substring_and_hits_every_blocks_conv1_too():
    names = attach(resnet20(), ["conv1"])
    assert names == [f"{block}.conv2" for block in BLOCKS] + ["linear"]


def test_an_anchored_pattern_means_the_stem_alone():
    model = resnet20()
    every = layer_names(model)
    assert attach(model, ["^conv1$"]) == every[1:]


def test_the_plans_list_quantizes_exactly_the_nine_conv2_of_the_blocks():
    model = resnet20()
    names = attach(model, PLAN)
    assert names == [f"{block}.conv2" for block in BLOCKS]
    assert [n for n, m in model.named_modules() if parametrize.is_parametrized(m)] == names


def test_the_plans_list_leaves_47_6_percent_of_the_macs_in_full_precision():
    macs = macs_of_resnet20_by_hand()
    quantized = attach(resnet20(), PLAN)
    left = {name: count for name, count in macs.items() if name not in quantized}
    # Stem 442,368 and classifier 640, as the plan's words want, and the conv1 of all blocks besides: seven of
    # 2,359,296 and, where a stage begins, two of half as many. These alone are 46 % of the MACs.
    by_accident = 7 * 2_359_296 + 2 * 1_179_648
    assert sum(left.values()) == 442_368 + 640 + by_accident == 19_317_376
    assert sum(left.values()) / 40_551_040 == pytest.approx(0.476, abs=5e-4)
    assert by_accident / 40_551_040 == pytest.approx(0.465, abs=5e-4)


def test_the_stem_and_classifier_excluded_by_anchors_leave_all_18_block_convolutions():
    names = attach(resnet20(), STEM_AND_CLASSIFIER)
    assert names == [f"{block}.{conv}" for block in BLOCKS for conv in ("conv1", "conv2")]


@pytest.mark.parametrize(("make", "layers"), [(resnet20, 20), (resnet32, 32)])
def test_without_patterns_every_convolution_and_the_classifier_get_one_of_their_own(make, layers):
    model = make()
    names = attach(model)
    assert names == layer_names(model) and len(names) == layers
    assert len({id(q) for q in quantizers(model).values()}) == layers


def test_only_convolutions_and_linear_layers_are_candidates():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "embed": nn.Embedding(5, 4),
            "line": nn.Conv1d(2, 2, 1),
            "out": nn.Linear(4, 2),
        }
    )
    assert attach(model) == ["conv", "out"]


@pytest.mark.parametrize("pattern", ["layer1", r"^layer1\.", r"layer1\.[0-2]\.conv"])
def test_a_pattern_may_name_a_whole_stage(pattern):
    names = attach(resnet20(), [pattern])
    assert len(names) == 14 and not any(n.startswith("layer1") for n in names)


@pytest.mark.parametrize("exclude", [[], ()])
def test_no_pattern_at_all_is_fine_as_list_or_tuple(exclude):
    model = resnet20()
    assert len(attach_weight_quantizers(model, exclude, DeadZoneLDZCompander, {})) == 20


def test_a_pattern_that_matches_everything_quantizes_nothing():
    model = resnet20()
    assert attach(model, ["."]) == []
    assert quantized_layers(model) == {} == quantizers(model)


# What is refused


def assert_untouched(model, state):
    assert not any(parametrize.is_parametrized(m) for m in model.modules())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("exclude", "named"),
    [
        (["conv9"], "'conv9' matches no module"),
        (["conv1", "bn", "classifier"], "'classifier' matches no module"),
        (["^conv2$"], r"'\^conv2\$' matches no module"),
        (["Linear"], "'Linear' matches no module"),
        (["conv1", "["], r"'\[' is not a regular expression"),
        (["*conv"], r"'\*conv' is not a regular expression"),
    ],
)
def test_a_pattern_without_a_match_or_sense_is_named_and_the_model_left_untouched(exclude, named):
    model = resnet20()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=named):
        attach(model, exclude)
    assert_untouched(model, state)


def test_a_plain_string_is_refused_rather_than_read_letter_by_letter():
    model = resnet20()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the string 'conv1'; expected a list"):
        attach_weight_quantizers(model, "conv1", DeadZoneLDZCompander, {})
    assert_untouched(model, state)


def test_attaching_twice_is_refused_and_names_the_layer():
    model = resnet20()
    attach(model, STEM_AND_CLASSIFIER)
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1 is parametrized already"):
        attach(model, STEM_AND_CLASSIFIER)
    assert all(len(m.parametrizations.weight) == 1 for m in quantized_layers(model).values())


def test_a_partly_quantized_model_is_refused_before_anything_is_attached():
    model = resnet20()
    attach(model, ["conv1", "bn", "linear"])
    first = list(quantized_layers(model))
    with pytest.raises(ValueError, match=r"layer1\.0\.conv2 is parametrized already"):
        attach(model)
    assert list(quantized_layers(model)) == first


def test_the_layers_left_out_the_first_time_can_be_quantized_later():
    model = resnet20()
    first = attach(model, PLAN)
    second = attach(model, ["conv2"])
    assert sorted(first + second) == sorted(layer_names(model))


def test_bad_settings_of_the_quantizer_leave_the_model_untouched():
    model = resnet20()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="max_bits is 1"):
        attach(model, max_bits=1)
    assert_untouched(model, state)


def test_a_weight_that_cannot_be_quantized_leaves_the_model_untouched():
    model = resnet20()
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        attach(model)
    assert not any(parametrize.is_parametrized(m) for m in model.modules())


# Where it is found


def test_the_quantizer_of_a_layer_is_where_the_plan_looks_for_it():
    model = resnet20()
    for name in attach(model, STEM_AND_CLASSIFIER, max_bits=6, init_bit_logit=0.5):
        quantizer = model.get_submodule(name).parametrizations.weight[0].quantizer
        assert isinstance(quantizer, DeadZoneLDZCompander)
        assert quantizer.max_bits == 6
        assert quantizer.logit_bit.item() == 0.5
        assert quantizers(model)[name] is quantizer


def test_layers_are_still_convolutions_and_linear_layers():
    model = resnet20()
    attach(model)
    assert len(layer_names(model)) == 20


def test_every_layers_logits_are_parameters_of_the_model():
    model = resnet20()
    before = len(list(model.parameters()))
    names = attach(model, STEM_AND_CLASSIFIER)
    parameters = dict(model.named_parameters())
    assert len(parameters) == before + 2 * len(names)
    for name in names:
        assert f"{name}.parametrizations.weight.0.quantizer.logit_bit" in parameters
        assert f"{name}.parametrizations.weight.0.quantizer.logit_dz" in parameters
        assert f"{name}.parametrizations.weight.original" in parameters


def test_lookups_are_in_the_models_order_and_skip_what_is_not_quantized():
    model = resnet20()
    names = attach(model, PLAN)
    assert list(quantized_layers(model)) == list(quantizers(model)) == names
    assert all(quantized_layers(model)[n] is model.get_submodule(n) for n in names)
    assert weight_quantization(model.conv1) is None
    assert weight_quantization(model.bn1) is None
    assert weight_quantization(model.layer1[0].conv2) is model.layer1[0].conv2.parametrizations.weight[0]


def test_a_foreign_parametrization_is_not_taken_for_a_quantizer():
    model = nn.Sequential(nn.Linear(3, 3))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert weight_quantization(model[0]) is None
    assert quantized_layers(model) == {}
    assert weight_bits(model[0]) == (32, 32.0)


# What it computes


def test_a_layer_computes_with_its_weight_as_its_quantizer_gives_it():
    model = resnet20()
    plain = {n: model.get_submodule(n).weight.detach().clone() for n in layer_names(model)}
    attach(model, PLAN, **COARSE)
    for name, w in plain.items():
        expected = DeadZoneLDZCompander(**COARSE)(w) if name in quantized_layers(model) else w
        assert torch.equal(model.get_submodule(name).weight, expected), name
    assert (model.layer1[0].conv2.weight == 0).float().mean() > 0.2


def test_any_module_will_do_as_quantizer_and_gets_the_settings():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2))
    plain = [model[i].weight.detach().clone() for i in (0, 2)]
    assert attach_weight_quantizers(model, ["2"], Doubling, {"factor": 3.0}) == ["0"]
    assert torch.equal(model[0].weight, 3 * plain[0])
    assert torch.equal(model[2].weight, plain[1])


def test_biases_are_not_quantized():
    model = resnet20()
    bias = model.linear.bias.detach().clone()
    attach(model, **COARSE)
    assert torch.equal(model.linear.bias, bias)
    assert not parametrize.is_parametrized(model.linear, "bias")


@torch.no_grad()
def test_switched_off_the_outputs_are_those_of_the_plain_model_bit_for_bit_and_back_on_the_quantized_ones():
    model = resnet20().eval()
    x = image()
    plain = model(x)
    attach(model, STEM_AND_CLASSIFIER, **COARSE)
    quantized = model(x)
    assert not torch.allclose(quantized, plain)
    toggle_quantization(model, False)
    assert torch.equal(model(x), plain)
    toggle_quantization(model, False)  # once more changes nothing
    assert torch.equal(model(x), plain)
    toggle_quantization(model, True)
    assert torch.equal(model(x), quantized)


@torch.no_grad()
def test_attached_switched_off_computes_in_full_precision_until_switched_on():
    model = resnet20().eval()
    x = image()
    plain = model(x)
    other = copy.deepcopy(model)
    attach(other, STEM_AND_CLASSIFIER, **COARSE)
    assert len(attach(model, STEM_AND_CLASSIFIER, enabled=False, **COARSE)) == 18
    assert torch.equal(model(x), plain)
    toggle_quantization(model, True)
    assert torch.equal(model(x), other(x))


def test_a_quantizer_switched_off_is_not_called():
    model = nn.Sequential(nn.Linear(3, 2))
    attach_weight_quantizers(model, [], Doubling, {}, enabled=False)
    _ = model(torch.ones(1, 3))
    assert model[0].parametrizations.weight[0].quantizer.calls == 0


def test_toggling_a_model_without_quantizers_does_nothing():
    model = resnet20()
    state = copy.deepcopy(model.state_dict())
    toggle_quantization(model, False)
    assert_untouched(model, state)


def test_toggling_one_model_leaves_its_copy_alone():
    model = resnet20()
    attach(model, PLAN)
    other = copy.deepcopy(model)
    toggle_quantization(model, False)
    assert not any(weight_quantization(m).enabled for m in quantized_layers(model).values())
    assert all(weight_quantization(m).enabled for m in quantized_layers(other).values())


@pytest.mark.parametrize("enabled", [True, False])
@torch.no_grad()
def test_a_copy_without_quantizers_gives_the_same_outputs_bit_for_bit_and_shares_no_weight(enabled):
    model = resnet20().eval()
    attach(model, STEM_AND_CLASSIFIER, enabled=enabled, **COARSE)
    state, expected = copy.deepcopy(model.state_dict()), model(image())
    plain = without_quantizers(model)
    assert all(
        type(m) in (nn.Conv2d, nn.Linear) for m in (plain.get_submodule(n) for n in layer_names(plain))
    )
    assert set(plain.state_dict()) == set(resnet20().state_dict())
    assert torch.equal(plain(image()), expected)
    for parameter in plain.parameters():
        parameter.zero_()
    assert torch.equal(model(image()), expected)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_a_copy_without_quantizers_leaves_no_weight_without_a_gradient_in_an_open_cache():
    model = resnet20()
    attach(model, STEM_AND_CLASSIFIER)
    with parametrize.cached():
        without_quantizers(model)
        model(image()).sum().backward()
    assert all(q.logit_dz.grad is not None for q in quantizers(model).values())


def test_a_foreign_parametrization_stays_on_a_copy_without_quantizers():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    attach_weight_quantizers(model, ["0"], Doubling, {})
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    plain = without_quantizers(model)
    assert parametrize.is_parametrized(plain[0]) and not parametrize.is_parametrized(plain[1])
    assert torch.equal(plain(torch.ones(1, 3)), model(torch.ones(1, 3)))


def test_gradients_reach_the_stored_weights_and_both_logits_of_every_layer():
    torch.manual_seed(0)
    model = resnet20()
    names = attach(model, STEM_AND_CLASSIFIER, **COARSE)
    model(image(4)).square().sum().backward()
    for name in names:
        layer = model.get_submodule(name)
        stored = layer.parametrizations.weight.original
        quantizer = layer.parametrizations.weight[0].quantizer
        for grad in (stored.grad, quantizer.logit_bit.grad, quantizer.logit_dz.grad):
            assert grad.isfinite().all() and grad.any(), name


def test_bits_are_the_quantizers_while_it_is_on_and_32_otherwise():
    model = resnet20()
    # 2 + 6 (1.3/6) = 3.3, which rounds to 3
    attach(model, PLAN, init_bit_logit=math.atanh(1.3 / 6))
    rounded, learned = weight_bits(model.layer1[0].conv2)
    assert (rounded, learned) == (3, pytest.approx(3.3, abs=1e-5))
    assert isinstance(rounded, int) and isinstance(learned, float)
    assert weight_bits(model.conv1) == (32, 32.0)
    toggle_quantization(model, False)
    assert weight_bits(model.layer1[0].conv2) == (32, 32.0)


# What stays as it was


@pytest.mark.parametrize("training", [True, False])
def test_train_or_eval_mode_stays_and_reaches_the_quantizers(training):
    model = resnet20().train(training)
    attach(model, PLAN)
    assert {m.training for m in model.modules()} == {training}
    toggle_quantization(model, False)
    toggle_quantization(model, True)
    assert {m.training for m in model.modules()} == {training}


def test_a_mixed_mode_stays_mixed():
    model = resnet20().train()
    model.layer2.eval()
    before = {n: m.training for n, m in model.named_modules()}
    attach(model, PLAN)
    assert {n: m.training for n, m in model.named_modules() if n in before} == before
    assert {n: q.training for n, q in quantizers(model).items()} == {n: before[n] for n in quantizers(model)}


def test_the_device_of_a_model_stays_and_its_quantizers_come_to_it():
    model = nn.Sequential(nn.Linear(3, 2)).to("meta")  # the one other device that every machine has
    attach_weight_quantizers(model, [], Doubling, {})
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert len(model.state_dict()) == 4  # weight, bias, factor, offset


@pytest.mark.parametrize("enabled", [True, False])
def test_stored_weights_and_buffers_stay_the_same_bits_and_the_same_parameters(enabled):
    model = resnet20()
    layers = {n: model.get_submodule(n).weight for n in layer_names(model)}
    values = copy.deepcopy(model.state_dict())
    attach(model, PLAN, enabled=enabled, **COARSE)
    toggle_quantization(model, not enabled)
    toggle_quantization(model, enabled)
    for name, w in model.state_dict().items():
        plain = name.replace("parametrizations.weight.original", "weight")
        assert "quantizer" in name or torch.equal(w, values[plain]), name
    for name, layer in quantized_layers(model).items():
        assert layer.parametrizations.weight.original is layers[name]


def test_the_type_of_float64_weights_stays():
    model = resnet20().double()
    attach(model, PLAN)
    assert {p.dtype for n, p in model.named_parameters() if "logit" not in n} == {torch.float64}
    assert model.layer1[0].conv2.weight.dtype == torch.float64


def test_nothing_is_drawn_from_the_random_number_generator():
    model = resnet20()
    state = torch.get_rng_state()
    attach(model, PLAN)
    toggle_quantization(model, False)
    toggle_quantization(model, True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_frozen_weight_stays_frozen():
    model = resnet20()
    model.layer1.requires_grad_(False)
    attach(model, PLAN)
    assert not model.layer1[0].conv2.parametrizations.weight.original.requires_grad
    assert model.layer2[0].conv2.parametrizations.weight.original.requires_grad


@torch.no_grad()
def test_a_state_dict_makes_another_model_give_the_same_outputs():
    torch.manual_seed(0)
    model, other = resnet20().eval(), resnet20().eval()
    attach(model, PLAN, **COARSE)
    for i, quantizer in enumerate(quantizers(model).values()):
        quantizer.logit_bit.fill_(-0.2 * i)
        quantizer.logit_dz.fill_(0.3 + 0.1 * i)
    attach(other, PLAN)
    assert not torch.allclose(model(image()), other(image()))
    result = other.load_state_dict(model.state_dict())
    assert not (result.missing_keys or result.unexpected_keys)
    assert torch.equal(model(image()), other(image()))
    assert [weight_bits(m) for m in quantized_layers(other).values()] == [
        weight_bits(m) for m in quantized_layers(model).values()
    ]


@torch.no_grad()
def test_a_state_dict_survives_the_disk(tmp_path):
    model, other = resnet20().eval(), resnet20().eval()
    attach(model, PLAN, **COARSE)
    attach(other, PLAN)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(model(image()), other(image()))
