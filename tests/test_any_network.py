"""The account of channels, the groups and the counts of any network, against the network itself."""

import copy
from collections.abc import Callable

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import TORCHVISION, Mixed, Probe, of_torchvision, plant
from planted import PLANTED, images
from torch import Tensor, nn

from metrics import count_by_torch, count_network
from resnet import ResNet, resnet20
from src import graph
from src.channels import ChannelAccount, ChannelState, trace_channels
from src.graph import trace_network
from src.groups import FILTERS, INPUT_SLICES, channel_groups
from src.slim import slim_network

SMALL, CIFAR = (3, 12, 12), (3, 32, 32)
planted_networks = st.builds(
    lambda seed, rate: plant(Mixed(), seed, rate),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.1, 0.3, 0.6]),
)


def by_channel(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).flatten(1)


@torch.no_grad()
def assert_nothing_claimed_is_wrong(
    model: nn.Module, account: ChannelAccount, size: tuple[int, int, int]
) -> int:
    """A channel that is not alive can carry what the account says, or anything if it is null.

    Returns: the number of channels that are not alive.
    """
    probe, x, gone = Probe(model, account, size), images(2, size), 0
    expected = model(x)
    torch.testing.assert_close(probe.logits(x), expected)
    notes = probe.notes
    for node, signal in account.signals.items():
        if isinstance(signal.flow, Tensor):
            known, name = ~signal.varies, node.name
            for value in notes[name].split(1):
                torch.testing.assert_close(
                    value[known], signal.constant[known], rtol=1e-9, atol=1e-9, msg=name
                )
    for use, channels in account.uses.values():
        dim, constant = use.channel_dim, account.signals[use.out].constant
        if account.signals[use.out].paths is None:
            continue
        read = by_channel(account.signals[use.out].read, dim).any(1)
        shape = [-1 if d == dim % constant.ndim else 1 for d in range(constant.ndim)]
        dead, unread = (~channels.outputs).view(shape), (~read).view(shape)
        gone += int(dead.sum())
        noise = 100 * torch.randn(constant.shape, dtype=constant.dtype)
        # Keep what varies in a dead channel: nothing reads it at these places.
        known = ~account.signals[use.out].varies
        probe.put[use.out.name] = lambda value, d=dead, u=unread, k=known, c=constant, n=noise: torch.where(
            u, n, torch.where(d & k, c, value)
        )
    torch.testing.assert_close(probe.logits(x), expected, rtol=1e-9, atol=1e-9)
    return gone


@PLANTED
@given(planted_networks)
def test_no_channel_that_is_gone_is_missed(model):
    account = trace_channels(model, SMALL)
    assert account.barriers == ()
    assert_nothing_claimed_is_wrong(model, account, SMALL)


@torch.no_grad()
def with_all_open(model: nn.Module) -> nn.Module:
    """The same wiring with positive weights: nothing cancels, and every activation passes something."""
    generator = torch.Generator().manual_seed(0)

    def positive(like: Tensor) -> Tensor:
        return 0.5 + torch.rand(like.shape, generator=generator, dtype=torch.float64)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.copy_((module.weight != 0) * positive(module.weight) / module.weight[0].numel())
            module.bias = None if module.bias is None else nn.Parameter(0.1 * positive(module.bias))
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.copy_((module.weight != 0) * positive(module.weight))
            module.running_mean.zero_()
            module.running_var.fill_(1)
            module.bias.copy_(0.1 * positive(module.bias))
    return model


@PLANTED
@given(planted_networks)
def test_in_known_operations_every_channel_that_is_left_is_needed(model):
    model = with_all_open(model)
    account = trace_channels(model, SMALL)
    dark, light = Probe(model, account, SMALL), Probe(model, account, SMALL)
    x = torch.rand(1, *SMALL, dtype=torch.float64)
    light.logits(x + torch.rand_like(x))
    for use, _ in account.uses.values():
        dark.put[use.out.name] = lambda value: value.requires_grad_() if value.is_leaf else value
    logits = dark.logits(x.requires_grad_())
    for use, channels in account.uses.values():
        out = dark.notes[use.out.name]
        (gradient,) = torch.autograd.grad(logits.sum(), out, retain_graph=True, allow_unused=True)
        changed = (light.notes[use.out.name] - out).abs() > 1e-13
        needed = torch.zeros_like(changed) if gradient is None else gradient.abs() > 1e-13
        alive = by_channel(changed & needed, use.channel_dim).any(1)
        assert torch.equal(channels.outputs, alive), use.name
        weight = account.layers[use.name].weight
        if use.groups == 1 and use.name != "dilated":  # every tap meets more than padding
            reads = (
                (weight[alive] != 0).flatten(2).any(2).any(0)
                if weight.ndim > 2
                else (weight[alive] != 0).any(0)
            )
            entering = use.node.args[0].name
            reached = by_channel(
                (light.notes[entering] - dark.notes[entering]).abs() > 1e-13, use.channel_dim
            )
            assert torch.equal(channels.inputs, reads & reached.any(1)), use.name


@torch.no_grad()
def assert_smaller_is_the_same(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """The smaller network has the logits, in float64 and in float32, and the multiplications counted."""
    x, small = images(3, size), slim_network(model, size)
    for network, cut, share in ((model, small, 1e-9), (copy.deepcopy(model).float(), None, 1e-4)):
        cut = slim_network(network, size) if cut is None else cut
        like = next(network.parameters())
        expected, got = network(x.to(like)), cut(x.to(like))
        assert (got - expected).abs().max() <= share * expected.abs().max()
    assert count_by_torch(cut, size)[""] == count_network(model, size).total("structured_macs")
    return cut


@PLANTED
@given(planted_networks)
def test_the_smaller_network_has_the_same_logits_and_the_counted_multiplications(model):
    assert_smaller_is_the_same(model, SMALL)


@pytest.mark.slow
def test_the_smaller_network_goes_through_torch_export_and_onnx_runtime(tmp_path):
    model = plant(Mixed(), 3, 0.2)
    small, x = assert_smaller_is_the_same(model, SMALL), images(5, SMALL).float()
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(small, (x[:2],), dynamic_shapes=batch).module()
    torch.onnx.export(
        small, (x[:2],), tmp_path / "small.onnx", input_names=["x"], dynamic_shapes=batch, verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        expected = small(x[:count]).detach()
        torch.testing.assert_close(exported(x[:count]), expected)
        (logits,) = session.run(None, {"x": x[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


QUICK = ("resnet18", "squeezenet1_1")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TORCHVISION]
)
def test_the_networks_of_torchvision_are_counted(name):
    model = of_torchvision(name).double()
    count = count_network(model, CIFAR)
    assert all(b.split(" in ")[0] in {"aten.layer_norm"} for b in count.barriers)
    by_torch = count_by_torch(model.float(), CIFAR)[""]
    assert count.total("dense_macs") == by_torch
    planted = plant(model, 1, 0.15)
    account = trace_channels(planted, CIFAR)
    assert assert_nothing_claimed_is_wrong(planted, account, CIFAR) > 100
    assert count_network(planted, CIFAR).total("structured_macs") < by_torch
    assert_smaller_is_the_same(planted, CIFAR)


# What the account of one family of networks got wrong


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.leaky_relu(self.norm(self.first(x)), 0.1)).mean((2, 3))


def test_behind_a_leaky_relu_a_negative_constant_speaks():
    model = plant(Leaky(), 0, 0.0)
    with torch.no_grad():
        model.first.weight[1] = 0
        model.norm.bias[1], model.norm.running_mean[1] = -1.0, 0.0
    account = trace_channels(model, SMALL)
    assert account.layers["first"].states[1] == ChannelState.CONSTANT
    assert not account.layers["second"].inputs[1]


def test_a_forward_hook_counts_and_so_does_its_removal():
    model = resnet20().eval()
    before = count_network(model)
    handle = model.layer2.register_forward_hook(lambda _m, _x, out: out[:, :16].repeat(1, 2, 1, 1))
    hooked = count_network(model)
    assert hooked.total("structured_macs") < before.total("structured_macs")
    handle.remove()
    assert count_network(model) == before


def test_a_layer_that_is_replaced_is_counted_as_it_is():
    model = resnet20().eval()
    count_network(model)
    model.layer1[0].conv1.stride = (2, 2)
    model.layer1[0].conv2 = nn.ConvTranspose2d(16, 16, 2, stride=2)
    count = count_network(model)
    assert count.layers[1].dense_macs == 16 * 16 * 9 * 16 * 16
    assert count.barriers == ("aten.conv_transpose2d in layer1.0.conv2",)


def test_taps_that_meet_only_padding_read_nothing():
    model = resnet20().double().eval()
    with torch.no_grad():
        model.layer3[1].conv1.weight[:, 5, 1, 1] = 0  # in a map of one pixel the middle is all that is read
    layers = trace_channels(model, (3, 4, 4)).layers
    assert (~layers["layer3.1.conv1"].inputs).nonzero().tolist() == [[5]]
    assert trace_channels(model, (3, 8, 8)).layers["layer3.1.conv1"].inputs.all()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * F.hardsigmoid(self.gate(x))).mean((2, 3))


def test_a_gate_that_is_known_to_be_shut_lets_nothing_through_and_reads_nothing():
    model = plant(Gated(), 0, 0.0)
    with torch.no_grad():
        model.gate.weight[[1, 2]] = 0
        model.gate.bias[1], model.gate.bias[2] = -4.0, 0.5
    layers = trace_channels(model, SMALL).layers
    assert layers["first"].outputs.tolist() == [True, False, True, True]
    assert layers["second"].inputs.tolist() == [True, False, True, True]
    assert layers["gate"].states.tolist() == [2, 0, 1, 2]


class Projection(nn.Module):
    """The option B shortcut of He et al. 2015: a strided 1x1 convolution and its batch norm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, channels, 1, 2, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Doubled(ResNet):
    """A network of a known class that computes otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x.flip(3)).neg()


def projected() -> nn.Module:
    model = resnet20()
    model.layer2[0].shortcut, model.layer3[0].shortcut = Projection(16, 32), Projection(32, 64)
    return model


def circular() -> nn.Module:
    model = resnet20()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    return model


def test_a_cifar_resnet_with_projections_has_the_known_counts_and_its_projections_are_grouped():
    model = projected().eval()
    assert sum(p.numel() for p in model.parameters()) == 272_474
    assert count_network(model).total("dense_macs") == 40_813_184
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    held = {member for groups in channel_groups(model, layers) for member in groups.members}
    assert {("layer2.0.shortcut.conv", FILTERS), ("layer3.0.shortcut.conv", INPUT_SLICES)} <= held


@pytest.mark.parametrize("make", [projected, circular, lambda: Doubled(3)])
def test_relatives_of_the_known_networks_are_no_longer_taken_for_them(make):
    for seed in range(3):
        model = plant(make(), seed, 0.2)
        account = trace_channels(model, (3, 16, 16))
        assert account.barriers == ()
        assert_nothing_claimed_is_wrong(model, account, (3, 16, 16))
        assert_smaller_is_the_same(model, (3, 16, 16))


class NamesItsDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3)) + torch.ones(4, dtype=x.dtype)


@pytest.mark.parametrize(("kind", "shared"), [(Mixed, True), (NamesItsDtype, False)])
def test_a_graph_is_of_every_dtype_unless_it_names_one(kind, shared):
    model = kind().eval()
    traced = trace_network(model, SMALL)
    assert trace_network(model, SMALL) is traced
    assert (trace_network(model.double(), SMALL) is traced) == shared


# Ways to write the same thing


class Written(nn.Module):
    """A network with one of many ways to write what is between its first and its last layer."""

    def __init__(self, way: Callable[["Written", Tensor], Tensor]) -> None:
        super().__init__()
        self.way = way
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.spare = nn.BatchNorm2d(8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.way(self, self.norm(self.first(x))).mean((2, 3)))


def statements(net: Written, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.relu_()
    z = y + 1
    y.add_(z)
    return 0.5 * y + z


def a_view_that_is_written_to(net: Written, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2:6].relu_()
    return net.conv(x)


def a_view_of_what_is_written_to(net: Written, x: Tensor) -> Tensor:
    part, x = x[:, 2:6], x.relu_()
    return net.conv(x) + torch.cat([part, part], 1)


def a_shape_of_what_is_written_to(net: Written, x: Tensor) -> Tensor:
    y = net.conv(x)
    pairs = y.reshape(len(y), 2, 4, *y.shape[2:])
    y.relu_()
    return pairs.flatten(1, 2) + y


def a_slice_that_is_set(net: Written, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1] = 0
    return net.conv(F.relu(x))


def a_chunk_that_is_written_to(net: Written, x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1)
    left.relu_()
    return net.conv(torch.cat([right, left], 1))


def a_dropout_that_is_written_to(net: Written, x: Tensor) -> Tensor:
    dropped = F.dropout(net.conv(x), 0.5, net.training)
    return F.relu_(dropped) + dropped


def a_dropout_that_writes(net: Written, x: Tensor) -> Tensor:
    x = F.relu(x)
    return x + F.dropout2d(net.conv(x), 0.5, net.training, inplace=True)


def a_buffer_that_is_written_to(net: Written, x: Tensor) -> Tensor:
    net.calls.add_(1)
    return net.conv(F.relu(x))


def its_own_type(net: Written, x: Tensor) -> Tensor:
    same = x.type_as(x)
    same.relu_()
    return net.conv(x) + same


def several_in_a_row(net: Written, x: Tensor) -> Tensor:
    y = net.conv(F.relu_(x))
    y.clamp_(min=0.1).mul_(2)
    y -= x
    return y.masked_fill_(y < 0, 0.0)


def zeroed(net: Written, x: Tensor) -> Tensor:
    return net.conv(x).zero_() + x


def statistics_of_each_image(net: Written, x: Tensor) -> Tensor:
    return net.conv(F.relu_(F.instance_norm(x)))


def statistics_that_are_written_to(net: Written, x: Tensor) -> Tensor:
    spare = net.spare
    return net.conv(F.relu(F.instance_norm(x, spare.running_mean, spare.running_var)))


def without_gradients(net: Written, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = F.relu(x)
    return net.conv(x.detach())


def by_its_length(net: Written, x: Tensor) -> Tensor:
    return net.conv(x).view(len(x), 2, -1).relu().view(len(x), -1, *x.shape[2:])


def larger_and_smaller(net: Written, x: Tensor) -> Tensor:
    return F.relu_(F.interpolate(net.conv(F.max_pool2d(x, 2)), scale_factor=2))


WRITES = (
    *(statements, a_view_that_is_written_to, a_view_of_what_is_written_to, a_shape_of_what_is_written_to),
    *(a_slice_that_is_set, a_chunk_that_is_written_to, a_dropout_that_is_written_to, a_dropout_that_writes),
    *(a_buffer_that_is_written_to, its_own_type, several_in_a_row, zeroed, statistics_of_each_image),
    *(without_gradients, larger_and_smaller, by_its_length, statistics_that_are_written_to),
)


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_written_in_place_is_counted_as_it_is_computed(way, seed):
    model = plant(Written(way), seed, 0.2)
    assert_nothing_claimed_is_wrong(model, trace_channels(model, SMALL), SMALL)
    assert_smaller_is_the_same(model, SMALL)


@pytest.mark.parametrize("way", WRITES)
def test_counting_changes_nothing_of_a_network_that_writes(way):
    model = plant(Written(way), 2, 0.2)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        count_network(model, SMALL)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("way", WRITES)
def test_the_graph_is_torchs_own_without_writes(way, monkeypatch):
    """The oracle is torch's functionalization of the same network."""
    found = []
    for theirs in (False, True):
        monkeypatch.setattr(graph, "_TRACED", {})
        if theirs:
            monkeypatch.setattr(graph, "_make_functional", lambda _: False)
        model = plant(Written(way), 3, 0.2)
        account = trace_channels(model, SMALL)
        layers = {
            name: (layer.states.tolist(), layer.inputs.tolist(), layer.structured_macs)
            for name, layer in account.layers.items()
        }
        found.append((layers, channel_groups(model, ["first", "conv"], SMALL)))
    assert found[0] == found[1]


class Rows(nn.Module):
    """Patches whose dead channels hold what the places say; linear layers in three layouts of one network."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.merged = merged
        self.patches, self.places = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(9, 1, 8))
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute(2, 0, 1) + self.places  # (9, N, 8)
        count = x.shape[1]
        x = x.transpose(0, 1).reshape(-1, 8) if self.merged else x
        x = self.second(F.relu(self.first(x)))
        return self.last(x.view(count, 9, 8).mean(1) if self.merged else x.mean(0))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_constants_that_differ_from_row_to_row_are_kept_in_any_layout(merged, seed):
    model = plant(Rows(merged), seed, 0.3)
    with torch.no_grad():
        model.patches.weight[[1, 4]], model.patches.bias[[1, 4]] = 0, 0
    x, small = images(3, SMALL), slim_network(model, SMALL)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)


def wider(net: Written, x: Tensor) -> Tensor:
    return net.conv(x).double().relu().float()


def a_mask(net: Written, x: Tensor) -> Tensor:
    return net.conv(x) * (x > 0).float() + (x > 1).to(x.dtype)


def half_precision(net: Written, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = net.conv(x)
    return x.float()


def complex_numbers(net: Written, x: Tensor) -> Tensor:
    return torch.fft.fft2(net.conv(x)).real


@pytest.mark.parametrize(
    ("way", "near"), [(wider, 1e-6), (a_mask, 1e-6), (half_precision, 1e-2), (complex_numbers, 1e-6)]
)
@torch.no_grad()
def test_a_network_may_compute_in_several_types(way, near):
    model = plant(Written(way), 0, 0.2).float()
    x, small = images(3, SMALL).float(), slim_network(model, SMALL)
    expected = model(x)
    assert (small(x) - expected).abs().max() <= near * expected.abs().max()
    assert count_by_torch(small, SMALL)[""] == count_network(model, SMALL).total("structured_macs")
    assert channel_groups(model, ["first", "conv"], SMALL)


def flattened_by_its_length(net: Written, x: Tensor) -> Tensor:
    return net.conv(x).reshape(8 * len(x), -1).relu().reshape(x.shape)


def test_numbers_made_of_the_number_of_images_are_refused_in_a_sentence():
    model = plant(Written(flattened_by_its_length), 0, 0.2)
    with pytest.raises(ValueError, match=r"Written cannot be counted.*len\(images\)"):
        trace_channels(model, SMALL)


WRITTEN: dict[str, Callable[[Tensor, Tensor], object]] = {
    "slice": lambda x, numbers: x[:, :2].copy_(numbers),
    "assigned": lambda x, numbers: x.__setitem__((slice(None), slice(0, 2)), numbers),
    "broadcast": lambda x, numbers: x[:, :2].copy_(numbers[:1]),
    "scalar": lambda x, numbers: x.__setitem__((slice(None), 1), 2.5),
    "whole number": lambda x, numbers: x.__setitem__((slice(None), 1), 2),
    "column": lambda x, numbers: x.__setitem__((slice(None), 0), x[:, 1]),
    "index": lambda x, numbers: x.__setitem__((slice(None), torch.tensor([3, 1])), numbers),
    "mask": lambda x, numbers: x.masked_fill_(x > 0.05, 0.5),
    "all": lambda x, numbers: x.copy_(2 * x),
}


class Joined(nn.Module):
    """Pooled channels that numbers are put beside, or in the place of, before all of them are mixed."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.features, self.prompt = nn.Conv2d(3, 6, 3), nn.Parameter(torch.tensor([1.0, 3.0]))
        self.last = nn.Linear(8 if way == "beside" else 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x)).mean((2, 3))
        if self.way == "beside":
            x = torch.cat([x, self.prompt.expand(x.shape[0], 2)], -1)
        else:
            x = x.clone()
            WRITTEN[self.way](x, self.prompt)
        return self.last(F.softmax(x, 1))


@pytest.mark.parametrize("way", ["beside", *WRITTEN])
def test_numbers_beside_the_channels_are_no_channels(way):
    for seed in range(2):
        assert_smaller_is_the_same(plant(Joined(way), seed, 0.3), SMALL)


class Tokens(nn.Module):
    """Patches as the rows that a linear layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.patches = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 4, stride=4)
        self.last = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.patches(F.relu(self.stem(x))).flatten(2).transpose(1, 2)).mean(1)


def test_a_linear_layer_ties_no_channels_of_the_rows_that_it_reads():
    groups = channel_groups(Tokens(), ["patches"], SMALL)
    assert [(g.channels, g.members) for g in groups] == [(8, (("patches", FILTERS),))]
