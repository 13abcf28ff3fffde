"""The counts against numbers worked out by hand, torch's own counter, and the network as bare pipes."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import (
    PLANTED,
    SMALL,
    GivenBits,
    convolutions,
    dense_network,
    planted_deaths,
    plumbing,
    random_network,
    run,
    snapshot,
)
from torch import nn

import resnet
from metrics import (
    TOTALS,
    LayerCount,
    NetworkCount,
    count_by_torch,
    count_ceiling,
    count_network,
    format_ratio,
    ratio,
)
from resnet import ResNet, resnet20
from src.channels import ChannelState
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, quantizers, toggle_quantization

STEM_AND_CLASSIFIER = ["^conv1$", "^linear$"]
PLAN = ["conv1", "bn", "linear"]

# One image of 32x32. The stem: 3 * 16 * 9 weights at 32 * 32 places. A convolution inside a stage costs the
# same in each: 16 * 16 * 9 * 1024 = 32 * 32 * 9 * 256 = 64 * 64 * 9 * 64; the first of stages 2 and 3 half.
STEM, INSIDE, ENTRY, CLASSIFIER = 442_368, 2_359_296, 1_179_648, 640
DENSE = STEM + 16 * INSIDE + 2 * ENTRY + CLASSIFIER
assert DENSE == 40_551_040


def saved(model: nn.Module) -> int:
    count = count_network(model)
    return count.total("dense_macs") - count.total("structured_macs")


# Dense networks


def test_resnet20_costs_what_it_costs_by_hand_layer_for_layer():
    count = count_network(resnet20())
    expected = {"conv1": STEM, "linear": CLASSIFIER}
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            entry = stage > 1 and block == 0
            expected[f"layer{stage}.{block}.conv1"] = ENTRY if entry else INSIDE
            expected[f"layer{stage}.{block}.conv2"] = INSIDE
    assert {layer.name: layer.dense_macs for layer in count.layers} == expected
    assert [layer.name for layer in count.layers][:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert count.layers[-1].name == "linear"
    assert count.total("dense_macs") == 40_551_040
    assert count.total("dense_bops") == 41_524_264_960
    assert count.total("weights") == 269_722 - 10 - 2 * (16 + 6 * (16 + 32 + 64))  # less biases, batch norms


def test_a_dense_layer_without_a_quantizer_counts_32_bits_by_every_account():
    torch.manual_seed(0)  # one draw in some millions is exactly zero
    for row in count_network(resnet20()).layers:
        assert (row.bits, row.learned_bits, row.quantized) == (32, 32.0, False), row.name
        assert row.structured_macs == row.unstructured_macs == row.dense_macs, row.name
        assert row.structured_bops == row.unstructured_bops == row.dense_bops == row.dense_macs * 1024
        assert (row.zero_weights, row.zero_filters) == (0, 0), row.name
        assert row.states == (ChannelState.ALIVE,) * row.filters, row.name


@pytest.mark.parametrize(
    ("depth", "size"),
    [
        (20, (3, 33, 17)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(32, (3, 48, 48)), (44, (3, 40, 24))]),
        (56, (3, 32, 32)),
        pytest.param(110, SMALL, marks=pytest.mark.slow),
    ],
)
def test_torchs_own_counter_agrees_on_every_dense_network(depth, size):
    model = getattr(resnet, f"resnet{depth}")().eval()
    count, by_module = count_network(model, size), count_by_torch(model, size)
    assert count.total("dense_macs") == count.total("structured_macs") == by_module[""]
    for layer in count.layers:
        assert layer.dense_macs == by_module[layer.name], layer.name


@pytest.mark.parametrize("enabled", [True, False])
def test_torchs_own_counter_agrees_with_quantizers_attached(enabled):
    model = dense_network().eval()
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, DeadZoneLDZCompander, {}, enabled=enabled)
    assert count_network(model).total("dense_macs") == count_by_torch(model)[""]


def test_torchs_counter_is_read_as_multiply_accumulates_of_the_whole_and_of_each_module():
    counted = count_by_torch(resnet20().eval())
    assert counted[""] == DENSE
    assert (counted["conv1"], counted["linear"]) == (STEM, CLASSIFIER)
    assert counted["layer3.0.conv1"] == ENTRY and counted["layer3"] == ENTRY + 5 * INSIDE
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 8 * 6, 2))
    convolution, classifier = 3 * 4 * 9 * 8 * 6, 4 * 8 * 6 * 2
    counted = count_by_torch(plain, (3, 8, 6))
    assert counted == {"": convolution + classifier, "0": convolution, "2": classifier}


def test_torchs_counter_counts_nothing_in_a_network_without_multiplications():
    assert count_by_torch(nn.Flatten()) == {"": 0}


@pytest.mark.parametrize("training", [True, False])
def test_counting_with_torch_leaves_the_mode_and_the_weights_and_no_gradient(training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).train(training)
    before = snapshot(model)
    count_by_torch(model)
    assert snapshot(model) == before


# Structured counts, by hand

# An inner channel of layer1.0 is a filter of conv1 and a slice of conv2: 2 * (16 * 9) weights at 1024 places.
INNER_OF_STAGE_1 = 2 * 16 * 9 * 1024
# A filter, or an input slice, of a convolution inside stage 3: 64 * 9 weights at 8 * 8 places.
FILTER_OF_STAGE_3 = SLICE_OF_STAGE_3 = 64 * 9 * 64


@torch.no_grad()
def kill_filter(model: ResNet, layer: str, channel: int) -> None:
    model.get_submodule(layer).weight[channel] = 0


@torch.no_grad()
def kill_slice(model: ResNet, layer: str, channel: int) -> None:
    model.get_submodule(layer).weight[:, channel] = 0


def test_a_dead_inner_channel_saves_its_filter_and_its_slice():
    model = dense_network()
    kill_filter(model, "layer1.0.conv1", 3)  # a constant: folded away all the same
    assert saved(model) == INNER_OF_STAGE_1 == 294_912


def test_an_unread_inner_channel_saves_the_same():
    model = dense_network()
    kill_slice(model, "layer1.0.conv2", 3)
    assert saved(model) == INNER_OF_STAGE_1


def test_a_channel_dead_on_both_sides_is_saved_once():
    model = dense_network()
    kill_filter(model, "layer1.0.conv1", 3)
    kill_slice(model, "layer1.0.conv2", 3)
    assert saved(model) == INNER_OF_STAGE_1


def test_a_dead_branch_of_a_living_residual_channel_saves_its_filter_alone():
    model = dense_network()
    kill_filter(model, "layer3.1.conv2", 5)
    assert saved(model) == FILTER_OF_STAGE_3


def test_a_channel_in_the_padding_saves_its_readers_until_it_is_fed():
    model = dense_network()
    kill_filter(model, "layer3.0.conv2", 5)  # below 16: the shortcut brings zeros
    assert saved(model) == FILTER_OF_STAGE_3 + SLICE_OF_STAGE_3  # the slice of layer3.1.conv1
    kill_filter(model, "layer3.1.conv2", 5)
    assert saved(model) == 2 * FILTER_OF_STAGE_3 + 2 * SLICE_OF_STAGE_3  # and that of layer3.2.conv1
    kill_filter(model, "layer3.2.conv2", 5)
    assert saved(model) == 3 * FILTER_OF_STAGE_3 + 2 * SLICE_OF_STAGE_3 + 10  # and the classifier's column


def test_a_dead_filter_of_the_stem_saves_what_reads_it_before_the_first_sum():
    model = dense_network()
    kill_filter(model, "conv1", 0)
    assert saved(model) == 3 * 9 * 1024 + 16 * 9 * 1024  # the filter; the slice of layer1.0.conv1


def test_a_dead_column_of_the_classifier_saves_itself_and_the_last_filter():
    model = dense_network()
    kill_slice(model, "linear", 30)
    assert saved(model) == 10 + FILTER_OF_STAGE_3


@pytest.mark.parametrize("half", ["layer2.1.conv1", "layer2.1.conv2"])
def test_a_block_with_one_dead_half_saves_both(half):
    model = dense_network()
    with torch.no_grad():
        model.get_submodule(half).weight.zero_()
    assert saved(model) == 2 * INSIDE


def test_zeros_that_fill_no_channel_save_nothing_structured():
    model = dense_network()
    with torch.no_grad():
        model.layer1[0].conv1.weight[::2, ::2] = 0  # a quarter, and every filter and slice keeps half or more
    assert saved(model) == 0
    assert count_network(model).layers[1].unstructured_macs == INSIDE * 3 // 4


def test_a_filter_whose_weights_cancel_to_a_zero_sum_is_not_a_filter_of_zeros():
    model = dense_network()
    kill_filter(model, "layer1.0.conv1", 2)
    with torch.no_grad():
        model.layer1[0].conv1.weight[2, :, 0, 0] = 1.0
        model.layer1[0].conv1.weight[2, :, 1, 1] = -1.0
    layer = count_network(model).layers[1]
    assert (layer.zero_filters, layer.zero_weights) == (0, 16 * 7)
    assert saved(model) == 0


def test_the_unstructured_count_is_the_nonzero_weights_at_their_places():
    model = dense_network()
    with torch.no_grad():
        model.layer2[0].conv1.weight.flatten()[:1000] = 0
        model.linear.weight[3, :7] = 0
    count = {layer.name: layer for layer in count_network(model).layers}
    assert count["layer2.0.conv1"].zero_weights == 1000
    assert count["layer2.0.conv1"].unstructured_macs == ENTRY - 1000 * 256
    assert count["linear"].unstructured_macs == 640 - 7


@PLANTED
@given(planted_deaths)
def test_every_count_is_what_the_pipes_and_numpy_say(deaths):
    model = random_network(deaths)
    pipes = plumbing(model)
    outputs = run(model, torch.zeros(1, *SMALL, dtype=torch.float64)).outputs
    count = count_network(model, SMALL)
    assert [layer.name for layer in count.layers] == [n for n, _, _ in convolutions(model)] + ["linear"]
    for layer in count.layers:
        w = model.get_submodule(layer.name).weight.detach().numpy()
        positions = outputs[layer.name][0, 0].numel()
        left = int((pipes.fed[layer.name] & pipes.read[layer.name]).sum())
        kernel = 9 if w.ndim == 4 else 1
        assert layer.structured_macs == left * int(pipes.inputs[layer.name].sum()) * kernel * positions
        assert layer.alive_channels == left
        assert layer.weights == w.size
        assert layer.zero_weights == w.size - np.count_nonzero(w)
        assert layer.zero_filters == sum(not filter.any() for filter in w)
        assert layer.unstructured_macs == np.count_nonzero(w) * positions
        assert 0 <= layer.structured_macs <= layer.dense_macs == w.size * positions
        assert layer.unstructured_macs <= layer.dense_macs
        assert layer.alive_channels + layer.constant_channels + layer.null_channels == layer.filters == len(w)
    for name in (*TOTALS, "weights", "zero_weights", "filters", "zero_filters", "null_channels"):
        assert count.total(name) == sum(getattr(layer, name) for layer in count.layers)


def test_the_totals_are_the_three_counts_in_macs_and_in_bops():
    kinds = {
        f"{kind}_{unit}" for kind in ("dense", "structured", "unstructured") for unit in ("macs", "bops")
    }
    assert set(TOTALS) == kinds
    assert len(TOTALS) == 6


# Bits and sparsity


def test_bops_take_the_bits_of_each_quantizer_and_32_without():
    model = dense_network()
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, GivenBits, {"bits": 4})
    quantizers(model)["layer3.0.conv1"].bits = 6
    count = count_network(model)
    bits = {layer.name: layer.bits for layer in count.layers}
    assert bits.pop("conv1") == bits.pop("linear") == 32
    assert bits.pop("layer3.0.conv1") == 6
    assert set(bits.values()) == {4}
    inner = (16 * INSIDE + ENTRY) * 4 + ENTRY * 6
    expected = ((STEM + CLASSIFIER) * 32 + inner) * 32
    assert count.total("structured_bops") == count.total("unstructured_bops") == expected
    assert count.total("dense_bops") == DENSE * 1024
    assert [layer.name for layer in count.quantized] == list(quantizers(model))
    assert count.mean_bits == pytest.approx((17 * 4 + 6) / 18)
    assert count.mean_learned_bits == pytest.approx((17 * 4.25 + 6.25) / 18)


def test_a_quantizer_switched_off_counts_32_bits_and_no_zeros():
    model = dense_network()
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, DeadZoneLDZCompander, {"init_deadzone_logit": 0.5})
    assert count_network(model).unstructured_sparsity > 0.1
    toggle_quantization(model, enabled=False)
    count = count_network(model)
    assert {layer.bits for layer in count.layers} == {32}
    assert count.total("unstructured_bops") == count.total("structured_bops") == DENSE * 1024
    assert count.unstructured_sparsity == 0
    assert (count.mean_bits, count.mean_learned_bits) == (32, 32)
    toggle_quantization(model, enabled=True)
    assert count_network(model).mean_bits == 8


def test_the_bits_are_those_of_the_logits_by_hand():
    model = dense_network()
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, DeadZoneLDZCompander, {"max_bits": 8})
    # b = 2 + 6 |tanh(logit)|: 2.00, 4.40 and 7.60, which are 2, 4 and 8 when rounded
    learned = {0.0: 2.0, -math.atanh(0.4): 4.4, math.atanh(14 / 15): 7.6}
    with torch.no_grad():
        for quantizer, logit in zip(quantizers(model).values(), 6 * list(learned), strict=True):
            quantizer.logit_bit.fill_(logit)
    count = count_network(model)
    assert [layer.bits for layer in count.quantized] == 6 * [2, 4, 8]
    assert [layer.learned_bits for layer in count.quantized] == pytest.approx(6 * list(learned.values()))
    assert count.mean_bits == pytest.approx(14 / 3)
    assert count.mean_learned_bits == pytest.approx(14 / 3)
    assert count.layers[1].dense_bops == INSIDE * 1024
    assert count.layers[1].structured_bops == INSIDE * 2 * 32


def test_the_sparsities_are_shares_of_the_quantized_convolutions_alone():
    model = dense_network()
    for layer, filters in (("conv1", 16), ("layer1.0.conv1", 4), ("layer3.2.conv2", 10)):
        for channel in range(filters):
            kill_filter(model, layer, channel)
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, GivenBits, {})
    count = count_network(model)
    assert {layer.name: layer.zero_filters for layer in count.layers if layer.zero_filters} == {
        "conv1": 16,
        "layer1.0.conv1": 4,
        "layer3.2.conv2": 10,
    }
    assert count.structured_sparsity == pytest.approx((4 + 10) / (6 * (16 + 32 + 64)))
    weights = 9 * (6 * 16 * 16 + 5 * 32 * 32 + 16 * 32 + 5 * 64 * 64 + 32 * 64)
    assert count.unstructured_sparsity == pytest.approx((4 * 16 * 9 + 10 * 64 * 9) / weights)


def test_a_class_without_weights_is_no_filter_of_a_convolution():
    model = dense_network()
    kill_filter(model, "linear", 2)
    attach_weight_quantizers(model, ["^conv1$"], GivenBits, {})
    assert count_network(model).structured_sparsity == 0


def test_without_quantized_layers_the_sparsities_are_zero_and_the_bits_32():
    model = dense_network()
    kill_filter(model, "layer1.0.conv1", 0)
    count = count_network(model)
    assert count.quantized == ()
    assert (count.unstructured_sparsity, count.structured_sparsity) == (0, 0)
    assert (count.mean_bits, count.mean_learned_bits) == (32, 32)


def test_a_filter_that_the_dead_zone_has_emptied_counts_though_its_stored_weights_do_not_vanish():
    model = dense_network()
    with torch.no_grad():
        model.layer1[0].conv1.weight[2] *= 1e-3
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, DeadZoneLDZCompander, {"init_deadzone_logit": 2.0})
    layer = count_network(model).layers[1]
    assert model.layer1[0].conv1.parametrizations.weight.original[2].ne(0).all()
    assert layer.zero_filters == 1
    assert layer.zero_weights == int((model.layer1[0].conv1.weight == 0).sum())
    assert layer.states.count(ChannelState.CONSTANT) == 1


@pytest.mark.parametrize("training", [True, False])
def test_counting_changes_nothing_of_the_model(training):
    model = dense_network().train(training)
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, DeadZoneLDZCompander, {})
    before = snapshot(model)
    count_network(model)
    count_ceiling(model)
    assert snapshot(model) == before


def test_counting_twice_counts_the_same():
    model = dense_network()
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, DeadZoneLDZCompander, {})
    assert count_network(model) == count_network(model) == count_network(copy.deepcopy(model))


def test_another_kind_of_network_is_refused_by_name():
    for count in (count_network, count_ceiling):
        with pytest.raises(ValueError, match="Linear"):
            count(nn.Linear(3, 3))


# Ceilings, and nothing left


def test_the_ceilings_of_the_default_layers_are_those_by_hand():
    model = dense_network()
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, GivenBits, {})
    ceiling = count_ceiling(model)
    assert ceiling.total("unstructured_macs") == 443_008  # stem and classifier
    assert format_ratio(ratio(DENSE, ceiling.total("unstructured_macs"))) == "91.54x"
    # The shortcuts still carry the stem's 16 channels to the classifier, 10 weights each.
    assert ceiling.total("structured_macs") == STEM + 16 * 10


def test_the_ceilings_of_the_plans_list_are_those_by_hand():
    model = dense_network()
    assert len(attach_weight_quantizers(model, PLAN, GivenBits, {})) == 9  # the conv2 of each block
    ceiling = count_ceiling(model)
    # In full precision: stem, classifier, conv1 of nine blocks, of which two are entries at half the cost.
    assert ceiling.total("unstructured_macs") == STEM + CLASSIFIER + 7 * INSIDE + 2 * ENTRY
    assert format_ratio(ratio(DENSE, ceiling.total("unstructured_macs"))) == "2.10x"
    assert ceiling.total("structured_macs") == STEM + 16 * 10  # behind a conv1 nobody reads nothing is left


def test_where_no_layer_is_quantized_nothing_can_go():
    model = dense_network()
    assert count_ceiling(model) == count_network(model)


@PLANTED
@given(
    planted_deaths,
    st.sampled_from([STEM_AND_CLASSIFIER, PLAN, ["layer2"], ["^conv1$"], ["bn"]]),
    st.integers(2, 16),
    st.booleans(),
)
def test_no_ratio_exceeds_its_ceiling_or_falls_below_one(deaths, exclude, bits, enabled):
    model = random_network(deaths)
    attach_weight_quantizers(model, exclude, GivenBits, {"bits": bits}, enabled=enabled)
    count, ceiling = count_network(model, SMALL), count_ceiling(model, SMALL)
    for kind in ("structured", "unstructured"):
        highest = ratio(count.total("dense_macs"), ceiling.total(f"{kind}_macs"))
        for unit in ("macs", "bops"):
            reached = ratio(count.total(f"dense_{unit}"), count.total(f"{kind}_{unit}"))
            assert 1 <= reached <= highest, (kind, unit)
    for layer, lowest in zip(count.layers, ceiling.layers, strict=True):
        assert layer.structured_macs >= lowest.structured_macs, layer.name
        assert layer.unstructured_macs >= lowest.unstructured_macs, layer.name


@pytest.mark.parametrize("layers", [["conv1"], ["linear"], ["conv1", "linear", "layer1.0.conv2"]])
def test_a_network_with_nothing_left_gives_an_infinite_ratio_and_says_so(layers):
    model = dense_network()
    with torch.no_grad():
        for layer in layers:
            model.get_submodule(layer).weight.zero_()
    count = count_network(model)
    assert count.total("structured_macs") == count.total("structured_bops") == 0
    assert count.total("unstructured_macs") > 0
    assert ratio(DENSE, count.total("structured_macs")) == math.inf
    assert format_ratio(ratio(DENSE, 0)) == "infinite (nothing is left)"


def test_a_ratio_is_written_with_two_decimals():
    assert format_ratio(ratio(DENSE, 443_008)) == "91.54x"
    assert format_ratio(1.0) == "1.00x"
    assert ratio(10, 4) == 2.5


def test_a_count_is_a_record_that_nobody_changes():
    count = count_network(resnet20())
    with pytest.raises(dataclasses.FrozenInstanceError):
        count.layers[0].bits = 4
    assert isinstance(count, NetworkCount)
    assert isinstance(count.layers[0], LayerCount)
