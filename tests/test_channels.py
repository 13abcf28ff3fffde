"""The states of channels, against the network itself and against autograd on its bare pipes."""

import copy
from collections.abc import Collection
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from planted import (
    BLOCKS,
    CONVOLUTIONS,
    PLANTED,
    SMALL,
    Deaths,
    convolutions,
    images,
    kill,
    lively_network,
    planted_deaths,
    plumbing,
    random_network,
    run,
    run_overwritten,
    snapshot,
    with_norms,
)
from torch import Tensor, nn

from resnet import ResNet, resnet20, resnet56
from src.channels import (
    ChannelAccount,
    ChannelState,
    read_weights,
    trace_channels,
)
from src.groups import FILTERS, INPUT_SLICES, ChannelGroups, channel_groups
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, toggle_quantization

NULL, CONSTANT, ALIVE = ChannelState.NULL, ChannelState.CONSTANT, ChannelState.ALIVE


def trace(model: nn.Module) -> ChannelAccount:
    return trace_channels(model, SMALL)


def shift(account: ChannelAccount, name: str) -> Tensor:
    """What a layer gives when all its remaining inputs are zero: (O, H, W), or (O,) for the classifier."""
    use, channels = next(u for u in account.uses.values() if u[0].name == name)
    return use.shift(channels.inputs)[0]


def channel_state(model: nn.Module, layer: str, channel: int) -> ChannelState:
    return ChannelState(int(trace(model).layers[layer].states[channel]))


@dataclass(frozen=True)
class Stream:
    """The residual stream behind the stem ("conv1") or behind a block."""

    alive: Tensor  # (C,) bool
    constant: Tensor  # (C, H, W), 0 where the image reaches


def streams(account: ChannelAccount) -> dict[str, Stream]:
    nodes = {use.name: use.node.args[0] for use, _ in account.uses.values()}
    readers = {  # the convolution, or the classifier, that is fed by each stream
        "conv1": "layer1.0.conv1",
        **{"layer1.0": "layer1.1.conv1", "layer1.1": "layer2.0.conv1", "layer2.0": "layer2.1.conv1"},
        **{"layer2.1": "layer3.0.conv1", "layer3.0": "layer3.1.conv1", "layer3.1": "linear"},
    }
    found = {}
    for name, reader in readers.items():
        signal = account.signals[nodes[reader].args[0] if reader == "linear" else nodes[reader]]
        found[name] = Stream((signal.varies & signal.read)[0].flatten(1).any(1), signal.known[0])
    return found


@torch.no_grad()
def unread(model: ResNet, layer: str, channel: int) -> None:
    """Make an input slice of a layer, or a column of the classifier, all zeros."""
    model.get_submodule(layer).weight[:, channel] = 0


# The three states, planted


@pytest.mark.parametrize(("bias", "expected"), [(0.5, CONSTANT), (0.0, NULL), (-0.5, NULL)])
@pytest.mark.parametrize("layer", ["conv1", "layer1.0.conv1", "layer2.0.conv1", "layer3.1.conv1"])
def test_a_dead_filter_before_a_relu_is_constant_only_where_its_bias_is_above_zero(layer, bias, expected):
    model = lively_network()
    kill(model, layer, 3, bias)
    assert channel_state(model, layer, 3) is expected


@pytest.mark.parametrize(("bias", "expected"), [(0.5, CONSTANT), (0.0, NULL), (-0.5, CONSTANT)])
@pytest.mark.parametrize("layer", ["layer1.0.conv2", "layer2.0.conv2", "layer3.1.conv2"])
def test_a_dead_filter_before_a_sum_is_constant_where_its_bias_is_not_zero(layer, bias, expected):
    model = lively_network()
    kill(model, layer, 9, bias)
    assert channel_state(model, layer, 9) is expected


def test_it_is_the_folded_batch_norm_that_counts_and_not_its_bias():
    model = lively_network()
    kill(model, "layer1.0.conv1", 0, bias=0.0)
    model.layer1[0].bn1.running_mean[0] = -1.0  # (0 + 1) * scale / sqrt(var + eps)
    with torch.no_grad():
        model.layer1[0].bn1.weight[0] = 0.7
    assert channel_state(model, "layer1.0.conv1", 0) is CONSTANT
    with torch.no_grad():
        model.layer1[0].bn1.weight[0] = -0.7
    assert channel_state(model, "layer1.0.conv1", 0) is NULL


def test_every_channel_of_a_network_without_zeros_is_alive():
    account = trace(lively_network())
    assert list(account.layers) == [*CONVOLUTIONS, "linear"]
    for layer in account.layers.values():
        assert layer.states.tolist() == [ALIVE] * len(layer.states)
        assert layer.outputs.all()
        assert layer.inputs.all()


def test_a_filter_whose_weights_cancel_to_a_zero_sum_is_alive():
    model = lively_network()
    with torch.no_grad():
        w = model.layer1[0].conv1.weight
        w[2] = 0
        w[2, :, 0, 0], w[2, :, 1, 1] = 1.0, -1.0
    assert not w[2].sum((1, 2)).any()
    assert channel_state(model, "layer1.0.conv1", 2) is ALIVE


def test_an_input_slice_whose_weights_cancel_is_still_a_reader():
    model = lively_network()
    with torch.no_grad():
        w = model.layer1[0].conv2.weight
        w[:, 2] = 0
        w[:, 2, 0, 0], w[:, 2, 1, 1] = 1.0, -1.0
    account = trace(model)
    assert account.layers["layer1.0.conv2"].inputs[2]
    assert channel_state(model, "layer1.0.conv1", 2) is ALIVE


def test_one_small_weight_keeps_a_filter_alive():
    model = lively_network()
    kill(model, "layer2.1.conv1", 5)
    with torch.no_grad():
        model.layer2[1].conv1.weight[5, 7, 0, 2] = -1e-30
    assert channel_state(model, "layer2.1.conv1", 5) is ALIVE


def test_a_residual_channel_with_one_dead_branch_goes_on_alive():
    model = lively_network()
    kill(model, "layer1.1.conv2", 4, bias=-0.5)
    account = trace(model)
    assert account.layers["layer1.1.conv2"].states[4] == CONSTANT
    assert not account.layers["layer1.1.conv2"].outputs[4]
    assert streams(account)["layer1.1"].alive[4]
    assert account.layers["layer2.0.conv1"].inputs[4]
    assert account.layers["layer1.1.conv1"].inputs[4]  # the stem's and layer1.0's part of it


def test_a_residual_channel_without_a_live_producer_is_gone_from_every_reader():
    model = lively_network()
    for layer, bias in (("conv1", 0.5), ("layer1.0.conv2", -2.0), ("layer1.1.conv2", 1.0)):
        kill(model, layer, 4, bias)
    account = trace(model)
    for layer in ("conv1", "layer1.0.conv2", "layer1.1.conv2"):
        assert account.layers[layer].states[4] == CONSTANT
    for layer in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"):
        assert not account.layers[layer].inputs[4]
    emitted = {name: streams(account)[name].constant[4].unique().tolist() for name in streams(account)}
    assert emitted["conv1"] == [0.5]
    assert emitted["layer1.0"] == [0.0]  # relu(0.5 - 2)
    assert emitted["layer1.1"] == [1.0]  # relu(0 + 1)
    assert streams(account)["layer2.0"].alive[4 + 8]  # its own conv2 filter feeds it


@pytest.mark.parametrize(("stage", "padded", "carried"), [(2, 3, 8), (2, 24, 23), (3, 15, 16), (3, 48, 47)])
def test_a_channel_that_lives_in_the_padding_is_constant_until_its_first_live_producer(
    stage, padded, carried
):
    model = lively_network()
    kill(model, f"layer{stage}.0.conv2", padded, bias=0.25)
    kill(model, f"layer{stage}.0.conv2", carried, bias=0.25)
    account = trace(model)
    before, stream = streams(account)[f"layer{stage - 1}.1"], streams(account)[f"layer{stage}.0"]
    assert not stream.alive[padded]
    assert torch.equal(stream.constant[padded], torch.full_like(stream.constant[padded], 0.25))
    assert stream.alive[carried]  # the shortcut brings it
    assert before.alive[carried - (8 if stage == 2 else 16)]
    assert not account.layers[f"layer{stage}.1.conv1"].inputs[padded]
    assert account.layers[f"layer{stage}.1.conv1"].inputs[carried]
    assert streams(account)[f"layer{stage}.1"].alive[[padded, carried]].all()


def test_a_channel_that_nobody_reads_is_null_whatever_it_carries():
    model = lively_network()
    unread(model, "layer2.0.conv2", 6)  # a live filter
    kill(model, "layer2.0.conv1", 7, bias=0.5)
    unread(model, "layer2.0.conv2", 7)  # a constant
    account = trace(model)
    assert account.layers["layer2.0.conv1"].states[[6, 7]].tolist() == [NULL, NULL]
    assert not account.layers["layer2.0.conv1"].outputs[[6, 7]].any()
    assert not account.layers["layer2.0.conv2"].inputs[[6, 7]].any()


def test_a_residual_channel_is_read_through_the_shortcut_by_what_comes_later():
    model = lively_network()
    unread(model, "layer2.1.conv1", 11)  # layer2.0's channel 11 is still read by stage 3, as its channel 27
    assert channel_state(model, "layer2.0.conv2", 11) is ALIVE
    unread(model, "layer3.0.conv1", 11)
    assert channel_state(model, "layer2.0.conv2", 11) is ALIVE
    unread(model, "layer3.1.conv1", 27)
    assert channel_state(model, "layer2.0.conv2", 11) is ALIVE
    unread(model, "linear", 27)
    account = trace(model)
    assert account.layers["layer2.0.conv2"].states[11] == NULL
    assert account.layers["layer2.1.conv2"].states[11] == NULL
    assert account.layers["layer3.1.conv2"].states[27] == NULL
    assert not streams(account)["layer2.0"].alive[11]
    assert account.layers["conv1"].states[3] == ALIVE  # stage 1's channel 3 is read by its own blocks


def test_dead_columns_of_the_classifier_silence_the_last_block_alone():
    model = lively_network()
    for channel in (0, 20, 63):
        unread(model, "linear", channel)
    account = trace(model)
    assert account.layers["layer3.1.conv2"].states[[0, 20, 63]].tolist() == [NULL] * 3
    # layer3.1.conv1 still reads what comes before.
    assert account.layers["layer3.0.conv2"].states[[0, 20, 63]].tolist() == [ALIVE] * 3
    assert not account.layers["linear"].inputs[[0, 20, 63]].any()
    assert int(account.layers["linear"].inputs.sum()) == 61


def test_a_filter_that_reads_only_constant_channels_is_constant_and_so_on_down():
    model = lively_network()
    kill(model, "layer1.0.conv1", 0, bias=0.5)
    with torch.no_grad():
        model.layer1[0].conv2.weight[5, 1:] = 0  # conv2's filter 5 reads inner channel 0 alone
        model.conv1.weight[5] = 0  # so the residual channel 5 behind layer1.0 is a constant map
        model.layer1[1].conv1.weight[2] = 0
        model.layer1[1].conv1.weight[2, 5] = 0.1  # and so is the filter that reads nothing else
        model.layer1[1].bn1.bias[2] = 9.0  # above the ReLU's zero
        model.layer1[1].bn1.weight[2] = 1.0
    account = trace(model)
    assert account.layers["layer1.0.conv2"].states[5] == CONSTANT
    assert not streams(account)["layer1.0"].alive[5]
    assert account.layers["layer1.1.conv1"].states[2] == CONSTANT
    assert not account.layers["layer1.1.conv2"].inputs[2]


def test_a_filter_that_only_an_unread_filter_reads_is_null_and_so_on_up():
    model = lively_network()
    unread(model, "linear", 40)  # layer3.1.conv2's filter 40 is unread
    with torch.no_grad():
        for i in (1, 2):
            kept = model.layer3[1].conv2.weight[40, i].clone()
            model.layer3[1].conv2.weight[:, i] = 0
            model.layer3[1].conv2.weight[40, i] = kept  # inner channels 1 and 2 are read by filter 40 alone
        kept = model.layer3[1].conv1.weight[1, 60].clone()
        model.layer3[1].conv1.weight[:, 60] = 0
        model.layer3[1].conv1.weight[1, 60] = kept  # and residual channel 60 by filter 1 and the classifier
        model.linear.weight[:, 60] = 0
    account = trace(model)
    assert account.layers["layer3.1.conv2"].states[[40, 60]].tolist() == [NULL, NULL]
    assert account.layers["layer3.1.conv1"].states[[1, 2]].tolist() == [NULL, NULL]
    assert account.layers["layer3.0.conv2"].states[[40, 60]].tolist() == [ALIVE, NULL]


def test_a_filter_with_batch_norm_scale_zero_is_constant_and_reads_nothing():
    model = lively_network()
    with torch.no_grad():
        model.layer1[0].bn2.weight[3] = 0
        model.layer1[0].bn2.bias[3] = -0.5
        others = torch.arange(16) != 3
        model.layer1[0].conv2.weight[others, 7] = 0  # inner channel 7 is read by filter 3 alone
    account = trace(model)
    assert account.layers["layer1.0.conv2"].states[3] == CONSTANT
    assert shift(account, "layer1.0.conv2")[3].unique().tolist() == [-0.5]
    assert account.layers["layer1.0.conv1"].states[7] == NULL
    assert not account.layers["layer1.0.conv2"].inputs[7]


@pytest.mark.parametrize("dead", ["layer2.1.conv1", "layer2.1.conv2"])
def test_a_block_whose_branch_is_dead_costs_nothing_and_lets_the_stream_through(dead):
    model = lively_network()
    with torch.no_grad():
        model.get_submodule(dead).weight.zero_()
    account = trace(model)
    for layer in ("layer2.1.conv1", "layer2.1.conv2"):
        assert not account.layers[layer].outputs.any()
        assert not account.layers[layer].inputs.any()
    assert account.layers["layer2.1.conv2"].states.tolist() == [CONSTANT] * 32
    if dead == "layer2.1.conv2":  # what conv1 makes is unread
        assert account.layers["layer2.1.conv1"].states.tolist() == [NULL] * 32
    assert streams(account)["layer2.1"].alive.all()
    assert account.layers["layer3.0.conv1"].inputs.all()


@pytest.mark.parametrize("layers", [["conv1"], ["linear"], [*CONVOLUTIONS, "linear"]])
def test_a_network_with_nothing_left_says_what_its_logits_are(layers):
    model = lively_network()
    with torch.no_grad():
        for layer in layers:
            model.get_submodule(layer).weight.zero_()
    account = trace(model)
    for layer in account.layers.values():
        assert not layer.outputs.any()
        assert not layer.inputs.any()
        assert not (layer.states == ALIVE).any()
    assert not any(stream.alive.any() for stream in streams(account).values())
    logits = model(images(2))
    torch.testing.assert_close(shift(account, "linear").expand(2, -1), logits, rtol=1e-9, atol=1e-9)


def test_a_class_that_reads_nothing_is_constant_or_null_by_its_bias():
    model = lively_network()
    with torch.no_grad():
        model.linear.weight[[2, 5]] = 0
        model.linear.bias[2] = -1.0
        model.linear.bias[5] = 0.0
    assert trace(model).layers["linear"].states.tolist() == [2, 2, 1, 2, 2, 0, 2, 2, 2, 2]


def test_a_constant_beside_zero_padding_is_a_map_and_not_a_number():
    model = with_norms(lively_network(), bias=0.0)
    kill(model, "layer1.0.conv1", 0, bias=1.0)
    with torch.no_grad():
        model.layer1[0].conv2.weight[5] = 0
        model.layer1[0].conv2.weight[5, 0] = 1.0
    scale = (1 + 1e-5) ** -0.5  # variance 1 and epsilon
    added = shift(trace(model), "layer1.0.conv2")[5] / scale
    assert added[5, 5].item() == pytest.approx(9)  # nine ones under the kernel
    assert added[0, 5].item() == pytest.approx(6)
    assert added[0, 0].item() == pytest.approx(4)


# The same, for any planted death, against the network itself


@PLANTED
@given(planted_deaths)
def test_the_account_is_what_autograd_finds_on_the_network_as_bare_pipes(deaths):
    model = random_network(deaths)
    account, pipes = trace(model), plumbing(model)
    computed = run(model, images(1))
    for name, layer in account.layers.items():
        alive = pipes.fed[name] & pipes.read[name]
        speaks = (computed.outputs[name][0] != 0).reshape(len(alive), -1).any(1)
        constant = pipes.read[name] & ~pipes.fed[name] & speaks
        assert torch.equal(layer.states == ALIVE, alive), name
        assert torch.equal(layer.states == CONSTANT, constant), name
        assert torch.equal(layer.states == NULL, ~alive & ~constant), name
        assert torch.equal(layer.outputs, alive), name
        assert torch.equal(layer.inputs, pipes.inputs[name]), name


@PLANTED
@given(planted_deaths)
def test_a_channel_that_is_not_alive_but_read_does_not_depend_on_the_image(deaths):
    model = random_network(deaths)
    account = trace(model)
    pipes, computed = plumbing(model), run(model, images(2))
    for name, layer in account.layers.items():
        known = (layer.states != ALIVE) & pipes.read[name]
        first, second = computed.outputs[name][:, known]
        assert torch.equal(first, second), name
        added = shift(account, name)[known]
        added = added.relu() if name.endswith("conv1") else added
        torch.testing.assert_close(first, added, rtol=1e-9, atol=1e-9, msg=name)


@PLANTED
@given(planted_deaths)
def test_a_constant_channel_carries_something_and_a_null_one_nothing_or_nobody_minds(deaths):
    model = random_network(deaths)
    account, x = trace(model), images(2)
    computed = run(model, x)
    overwritten, noise = {}, {}
    for name, layer in account.layers.items():
        out = computed.outputs[name]
        speaks = (out != 0).transpose(0, 1).flatten(1).any(1)
        assert speaks[layer.states == CONSTANT].all(), name
        overwritten[name] = (layer.states == NULL) & speaks
        noise[name] = 100 * torch.rand(1, *out.shape[1:], dtype=out.dtype)  # positive: it passes any ReLU
    assert not overwritten.pop("linear").any()
    logits = run_overwritten(model, x, overwritten, noise)
    torch.testing.assert_close(logits, computed.logits, rtol=0, atol=0)


@PLANTED
@given(planted_deaths)
def test_all_known_channels_overwritten_with_their_shift_change_nothing(deaths):
    model = random_network(deaths)
    account, x = trace(model), images(2)
    known = {n: layer.states == CONSTANT for n, layer in account.layers.items() if n != "linear"}
    shifts = {n: shift(account, n)[None] for n in account.layers}
    logits = model(x)
    torch.testing.assert_close(run_overwritten(model, x, known, shifts), logits, rtol=1e-9, atol=1e-9)
    zeros = {n: layer.states == NULL for n, layer in account.layers.items() if n != "linear"}
    nothing = {n: torch.zeros_like(s) for n, s in shifts.items()}
    torch.testing.assert_close(run_overwritten(model, x, zeros, nothing), logits, rtol=0, atol=0)


@PLANTED
@given(planted_deaths)
def test_what_is_left_of_a_layer_and_its_shift_make_the_layers_output(deaths):
    model = random_network(deaths)
    account, computed = trace(model), run(model, images(2))
    for name, conv, bn in convolutions(model):
        layer = account.layers[name]
        kept = conv.weight * layer.inputs[:, None, None]
        left = F.conv2d(computed.inputs[name], kept, stride=conv.stride, padding=1)
        out = left * (bn.weight / (bn.running_var + bn.eps).sqrt())[:, None, None] + shift(account, name)
        out = (out.relu() if name.endswith("conv1") else out)[:, layer.outputs]
        torch.testing.assert_close(
            out, computed.outputs[name][:, layer.outputs], rtol=1e-9, atol=1e-9, msg=name
        )
    layer = account.layers["linear"]
    left = computed.inputs["linear"][:, layer.inputs] @ model.linear.weight[:, layer.inputs].T
    left = left + shift(account, "linear")
    torch.testing.assert_close(left, computed.logits, rtol=1e-9, atol=1e-9)


@PLANTED
@given(planted_deaths)
def test_the_streams_carry_what_the_network_carries(deaths):
    model = random_network(deaths)
    account, computed = trace(model), run(model, images(2))
    readers = {
        "conv1": "layer1.0.conv1",
        **{f"layer{s}.0": f"layer{s}.1.conv1" for s in (1, 2, 3)},
        **{"layer1.1": "layer2.0.conv1", "layer2.1": "layer3.0.conv1", "layer3.1": "linear"},
    }
    pipes = plumbing(model)
    assert list(streams(account)) == ["conv1", *(f"layer{s}.{b}" for s in (1, 2, 3) for b in range(BLOCKS))]
    for name, stream in streams(account).items():
        x = computed.inputs[readers[name]]
        read = pipes.read["conv1" if name == "conv1" else f"{name}.conv2"]
        known = read & ~stream.alive
        constant = stream.constant if x.ndim == 4 else stream.constant.mean((1, 2))
        torch.testing.assert_close(x[:, known], constant[known].expand_as(x[:, known]), rtol=1e-9, atol=1e-9)
        assert not (account.layers[readers[name]].inputs & ~stream.alive).any()
        assert not (stream.alive & ~read).any()


def test_the_account_holds_on_the_deep_network_too():
    network = random_network(Deaths(3, filters=0.3, slices=0.3, scales=0.1, streams=0.3), blocks=9)
    account, pipes = trace(network), plumbing(network)
    assert len(account.layers) == len(list(convolutions(resnet56()))) + 1
    kinds = set()
    for name, layer in account.layers.items():
        assert torch.equal(layer.outputs, pipes.fed[name] & pipes.read[name]), name
        assert torch.equal(layer.inputs, pipes.inputs[name]), name
        kinds |= set(layer.states.tolist())
    assert kinds == {NULL, CONSTANT, ALIVE}


# What it looks at, and what it leaves alone


@pytest.mark.parametrize("training", [True, False])
def test_tracing_changes_nothing_of_the_model(training):
    model = random_network(Deaths(1, filters=0.3, slices=0.3))
    attach_weight_quantizers(model, ["^conv1$", "linear"], DeadZoneLDZCompander, {})
    model.train(training)
    before = snapshot(model)
    trace(model)
    assert snapshot(model) == before


def test_the_batch_norms_count_as_in_evaluation_mode_in_training_mode_too():
    model = random_network(Deaths(2, filters=0.3, streams=0.3))
    expected = trace(model)
    model.train()
    account = trace(model)
    for name, layer in account.layers.items():
        assert torch.equal(layer.states, expected.layers[name].states)
        assert torch.equal(shift(account, name), shift(expected, name))


def test_the_account_does_not_depend_on_the_precision():
    model = random_network(Deaths(4, filters=0.3, slices=0.3, silent=0.5, streams=0.3))
    single = copy.deepcopy(model).float()
    for name, layer in trace(model).layers.items():
        other = trace(single).layers[name]
        assert shift(trace(single), name).dtype == torch.float32
        assert torch.equal(layer.states, other.states)
        assert torch.equal(layer.inputs, other.inputs)


def coarsely_quantized_network() -> ResNet:
    """Weights of which about half fall in the dead zone; one filter of each convolution wholly."""
    model = lively_network()
    with torch.no_grad():
        for _, conv, _ in convolutions(model):
            conv.weight[1] *= 0.01
    kwargs = {"init_deadzone_logit": 0.5}  # d / 2 = 0.54 r
    attach_weight_quantizers(model.float(), ["^conv1$", "linear"], DeadZoneLDZCompander, kwargs)
    return model


def test_it_is_the_quantized_weights_that_count():
    model = coarsely_quantized_network()
    account = trace(model)
    plain = lively_network().float()
    with torch.no_grad():
        for name, weight in read_weights(model).items():
            plain.get_submodule(name).weight.copy_(weight)
    for name, layer in trace(plain).layers.items():
        assert torch.equal(layer.states, account.layers[name].states)
    assert account.layers["layer2.0.conv1"].states[1] != ALIVE


def test_a_quantizer_that_is_switched_off_kills_nothing():
    model = coarsely_quantized_network()
    toggle_quantization(model, enabled=False)
    assert all((layer.states == ALIVE).all() for layer in trace(model).layers.values())


def test_the_weights_can_be_given_by_name():
    model = lively_network()
    weights = read_weights(model)
    assert list(weights) == [*CONVOLUTIONS, "linear"]
    weights["layer1.0.conv1"] = torch.zeros_like(weights["layer1.0.conv1"])
    account = trace_channels(model, SMALL, weights)
    assert not account.layers["layer1.0.conv1"].outputs.any()
    assert trace(model).layers["layer1.0.conv1"].outputs.all()


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 48, 48), (3, 33, 17)])
def test_the_positions_are_those_of_the_real_outputs(size):
    model = resnet20().eval()
    computed = run(model, torch.zeros(1, *size))
    account = trace_channels(model, size)
    for name, layer in account.layers.items():
        assert shift(account, name).shape == computed.outputs[name].shape[1:]
        assert layer.positions == computed.outputs[name][0, 0].numel()


class Fickle(nn.Module):
    """Its operations depend on the pixels, so that it has no one graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("look", [trace_channels, lambda model: channel_groups(model, [])])
def test_a_network_without_a_graph_is_refused_by_name(look):
    with pytest.raises(ValueError, match=r"torch\.export cannot trace Fickle on images \(3, 32, 32\): "):
        look(Fickle())


# The groups


def quantizable(model: ResNet) -> list[str]:
    return [name for name, _, _ in convolutions(model) if name != "conv1"]


def memberships(model: ResNet, layers: Collection[str]) -> dict[str, tuple[list[int], list[int]]]:
    """How many groups hold each filter and each input slice of each convolution."""
    counts = {n: ([0] * m.out_channels, [0] * m.in_channels) for n, m, _ in convolutions(model)}
    for groups in channel_groups(model, layers):
        for name, dim in groups.members:
            assert len(counts[name][dim]) == groups.channels
            for channel in range(groups.channels):
                counts[name][dim][channel] += 1
    return counts


@pytest.mark.parametrize("make", [resnet20, resnet56])
def test_the_groups_hold_every_filter_and_every_input_slice_once(make):
    model = make()
    layers = quantizable(model)
    counts = memberships(model, layers)
    for name in layers:
        filters, slices = counts[name]
        assert filters == [1] * len(filters), name
        # Nobody shares a group with what the stem feeds: the residual groups hold the later conv1s alone.
        assert slices == [int(name != "layer1.0.conv1")] * len(slices), name


def test_resnet20_has_448_groups_and_their_members_are_those_of_the_plan():
    groups = channel_groups(resnet20(), quantizable(resnet20()))
    assert sum(g.channels for g in groups) == 3 * (16 + 32 + 64) + (16 + 32 + 64)
    inner, residual = with_filters(groups, "layer2.1.conv1"), with_filters(groups, "layer2.1.conv2")
    assert inner.channels == 32
    assert inner.members == (("layer2.1.conv1", FILTERS), ("layer2.1.conv2", INPUT_SLICES))
    assert residual.channels == 32
    assert set(residual.members) == {
        ("layer2.0.conv2", FILTERS),
        ("layer2.1.conv1", INPUT_SLICES),
        ("layer2.1.conv2", FILTERS),
        ("layer2.2.conv1", INPUT_SLICES),
        ("layer2.2.conv2", FILTERS),
        ("layer3.0.conv1", INPUT_SLICES),
    }


@pytest.mark.slow
@PLANTED
@given(st.sets(st.sampled_from([*CONVOLUTIONS, "linear"])))
def test_the_groups_of_some_layers_are_the_groups_of_all_without_the_others(layers):
    model = ResNet(BLOCKS)
    groups = channel_groups(model, layers)
    held = [member for g in groups for member in g.members]
    everything = [member for g in channel_groups(model, CONVOLUTIONS) for member in g.members]
    assert sorted(held) == sorted(member for member in everything if member[0] in layers)
    assert all(g.members for g in groups)


def with_filters(groups: list[ChannelGroups], layer: str) -> ChannelGroups:
    """The groups that the filters of a layer are in."""
    (found,) = [g for g in groups if (layer, FILTERS) in g.members]
    return found


@torch.no_grad()
def without_group(model: ResNet, layer: str, channel: int) -> ResNet:
    """The model without the group that a layer's filter is in."""
    for name, dim in with_filters(channel_groups(model, quantizable(model)), layer).members:
        model.get_submodule(name).weight.select(dim, channel).zero_()
    return model


@pytest.mark.parametrize("block", ["layer1.0", "layer2.0", "layer3.1"])
def test_an_inner_channel_whose_group_has_vanished_is_gone_without_a_trace(block):
    account = trace(without_group(lively_network(), f"{block}.conv1", 3))
    alone = [int(i == 3) for i in range(len(account.layers[f"{block}.conv1"].states))]
    assert (account.layers[f"{block}.conv1"].states == NULL).int().tolist() == alone
    assert (~account.layers[f"{block}.conv2"].inputs).int().tolist() == alone
    gone = sum(int((layer.states != ALIVE).sum()) for layer in account.layers.values())
    assert gone == 1


@pytest.mark.parametrize(("stage", "channel", "left"), [(2, 3, 0), (3, 60, 0), (1, 7, 1)])
def test_a_residual_channel_whose_group_has_vanished_has_no_producer_but_the_stem(stage, channel, left):
    model = without_group(lively_network(), f"layer{stage}.1.conv2", channel)  # padding in stages 2 and 3
    account = trace(model)
    for block in range(BLOCKS):
        name = f"layer{stage}.{block}"
        assert account.layers[f"{name}.conv2"].states[channel] != ALIVE
        assert int(streams(account)[name].alive[channel]) == left
    for layer in [f"layer{stage}.1.conv1"] + ([f"layer{stage + 1}.0.conv1"] if stage < 3 else []):
        assert not account.layers[layer].inputs[channel]
