"""Ways in which people write what is between a network's layers: account, groups and the smaller network."""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import plant
from planted import images
from test_any_network import SMALL, assert_nothing_claimed_is_wrong, assert_smaller_is_the_same
from torch import Tensor, nn

from metrics import count_by_torch, count_network, in_layers, of_layers
from src.channels import trace_channels
from src.encoding import PackingError
from src.groups import FILTERS, INPUT_SLICES, channel_groups
from src.packing import pack_network, unpack_network
from src.quantizer import DeadZoneLDZCompander
from src.slim import slim_network
from utils_quantization import attach_weight_quantizers, quantized_layers, without_quantizers

WIDTH = 8
Way = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Eight channels of 12 x 12 pixels that become ten logits in one of many ways."""

    def __init__(self, way: Way, parts: Mapping[str, nn.Module | Tensor]) -> None:
        super().__init__()
        self.way = way
        self.first, self.norm = nn.Conv2d(3, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.last = nn.Linear(WIDTH, 10)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, F.relu(self.norm(self.first(x))))


def pooled(net: Net, x: Tensor) -> Tensor:
    return net.last(x.mean((2, 3)))


def folded_groups(net: Net, x: Tensor) -> Tensor:
    """Groups of channels as images of their own, as in attention by groups."""
    y = net.mix(x.reshape(x.shape[0] * 2, 4, 12, 12)).reshape(x.shape[0], WIDTH, 12, 12)
    return pooled(net, x * y.sigmoid())


def padded_pools(net: Net, x: Tensor) -> Tensor:
    x = F.adaptive_avg_pool2d(x, 1)
    return pooled(net, F.max_pool2d(F.avg_pool2d(x, 5, 1, 2), 5, 1, 2))


def added_to_itself(net: Net, x: Tensor) -> Tensor:
    y = net.bn(net.conv(x))
    return pooled(net, F.relu(y + y))


def soft_argmax(net: Net, x: Tensor) -> Tensor:
    p = x.softmax(3)
    return net.last((p * torch.arange(12, device=p.device)).sum(-1).mean(-1))


def masked(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.conv(x.masked_fill(~net.mask, 0.0)))


def permuted(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.conv(x[:, net.order]))


def looked_up(net: Net, x: Tensor) -> Tensor:
    return net.last(net.table[(net.conv(x).mean((2, 3)).sigmoid() * 6).long()].mean(1))


def spatial_attention(net: Net, x: Tensor) -> Tensor:
    where = torch.cat([torch.mean(x, 1).unsqueeze(1), x.amax(1).unsqueeze(1)], 1)
    return pooled(net, x * net.attend(where).sigmoid())


def block_attention(net: Net, x: Tensor) -> Tensor:
    """CBAM's: means and largest values, over the places and then over the channels."""
    pools = (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1))
    x = x * sum(net.gate(F.relu(net.narrow(p.flatten(1)))) for p in pools).sigmoid()[..., None, None]
    where = torch.cat([x.mean(1, keepdim=True), torch.max(x, 1, keepdim=True)[0]], 1)
    return pooled(net, x * net.attend(where).sigmoid())


def largest_less_smallest(net: Net, x: Tensor) -> Tensor:
    rows = net.conv(x).flatten(2)
    return net.last(rows.max(-1).values - rows.min(2)[0])


def pooled_to_four(net: Net, x: Tensor) -> Tensor:
    return pooled(net, F.adaptive_max_pool2d(net.conv(x), 2))


def place_of_the_largest(net: Net, x: Tensor) -> Tensor:
    values, places = net.conv(x).max(1, keepdim=True)
    return pooled(net, x * values + places)


def two_computed_weights(net: Net, x: Tensor) -> Tensor:
    x = x.mean((2, 3))
    x = F.relu(F.linear(x, F.normalize(net.up)))
    return net.last(F.linear(x, F.normalize(net.down)))


def expanded_as(net: Net, x: Tensor) -> Tensor:
    return pooled(net, x * net.gamma.expand_as(x))


def typed_as(net: Net, x: Tensor) -> Tensor:
    return pooled(net, x * (x.mean(1, keepdim=True) > 0.1).type_as(x) + torch.arange(12).type_as(x))


def viewed_as(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.conv(x).transpose(2, 3).contiguous().view_as(x))


def zeros_beside(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.wide(torch.cat([x, torch.zeros_like(x), x.new_zeros(x.shape)], 1)))


def squeezed(net: Net, x: Tensor) -> Tensor:
    return net.last(F.adaptive_avg_pool2d(x, 1).squeeze())


def norm_over_rows(net: Net, x: Tensor) -> Tensor:
    return net.last(net.rows(net.mix(x.flatten(2))).mean(2))


def gated_by_sign(net: Net, x: Tensor) -> Tensor:
    y = net.bn(net.conv(x))
    return pooled(net, x * (y > 0))


def made_on_the_way(net: Net, x: Tensor) -> Tensor:
    box = torch.ones(WIDTH, 1, 3, 3, dtype=x.dtype) / 9
    return pooled(net, F.conv2d(x, box, padding=1, groups=WIDTH))


def whole_numbers(net: Net, x: Tensor) -> Tensor:
    q = torch.empty_like(x, dtype=torch.long)
    q.copy_(10 * x)
    return pooled(net, q.to(x.dtype) / 10)


def elementwise(net: Net, x: Tensor) -> Tensor:
    x = F.hardswish(net.conv(x))
    x = torch.where(x > 0, x, 0.1 * x).masked_fill(x > 3, 3.0)
    return pooled(net, torch.multiply(F.logsigmoid(x), torch.subtract(x, 1.0)))


def concatenated(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.both(torch.concat([x, net.conv(x)], 1)))


def with_prelu(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.prelu(net.conv(x)))


def awkward_names(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.graph(F.relu(net.code(x))))


def conv() -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


def _windows(x: Tensor) -> Tensor:
    """Four windows an image, as rows of an attention: (N, C, 12, 12) -> (4 N, 36, C)."""
    return x.view(-1, WIDTH, 2, 6, 2, 6).permute(0, 2, 4, 3, 5, 1).reshape(-1, 36, WIDTH)


def by_windows(net: Net, x: Tensor) -> Tensor:
    """The constant of a channel is another one in each window."""
    y = net.mix(_windows(x + net.position))
    return net.last(y.view(x.shape[0], 144, WIDTH).mean(1))


def by_columns(net: Net, x: Tensor) -> Tensor:
    """The windows of all images along the second dimension: (36, 4 N, C)."""
    y = net.mix(_windows(x).transpose(0, 1)).transpose(0, 1)
    return net.last(y.reshape(x.shape[0], 144, WIDTH).mean(1))


def by_dead_windows(net: Net, x: Tensor) -> Tensor:
    y = net.mix(_windows(x)) + _windows(x)
    return net.last(y.view(x.shape[0], 144, WIDTH).mean(1))


def by_dead_groups(net: Net, x: Tensor) -> Tensor:
    y = net.mix(x.reshape(x.shape[0] * 2, 4, 12, 12)).reshape(x.shape[0], WIDTH, 6, 6)
    return pooled(net, F.max_pool2d(x, 2) * y.sigmoid())


def by_sequence(net: Net, x: Tensor) -> Tensor:
    """Images along the second dimension, as of recurrent layers: (L, N, C)."""
    rows = x.flatten(2).permute(2, 0, 1)
    return net.last((net.mix(rows) + rows).mean(0))


def in_place(net: Net, x: Tensor) -> Tensor:
    """Operations in place, of which the function takes other types or returns another."""
    y = net.conv(x)
    mask = x.clone().gt_(0.6)
    return pooled(net, y.relu_().pow_(2) * (mask + mask))


def either_mask(net: Net, x: Tensor) -> Tensor:
    return pooled(net, x * ((x > 0.6) + (net.bn(net.conv(x)) > 0)))


def counted_places(net: Net, x: Tensor) -> Tensor:
    return pooled(net, x * (x > 0.5).sum((2, 3), dtype=torch.long, keepdim=True) + x * x.shape[1])


def overwritten(net: Net, x: Tensor) -> Tensor:
    """A row of every channel, and one channel, hold numbers in place of what they held."""
    y = net.conv(x).clone()
    y[:, :, 5] = 1.0
    y[:, 2] = 0.5
    return pooled(net, torch.select_scatter(y, torch.zeros_like(y[:, :, 0]), 2, 3))


def rolled(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.conv(x).roll(1, 1) + net.conv(x).roll(1, 3))


def strided(net: Net, x: Tensor) -> Tensor:
    """A view by places in memory, of a copy that lies in memory as (N, H, W, C)."""
    y = net.conv(x).permute(0, 2, 3, 1).contiguous()
    return pooled(net, y.as_strided((x.shape[0], WIDTH, 11, 11), (WIDTH * 144, 1, WIDTH * 12, WIDTH)))


def beside_whole_numbers(net: Net, x: Tensor) -> Tensor:
    """Coordinates and flags of other types than the channels that they go with."""
    rows = torch.arange(12).expand(x.shape[0], 1, 12, 12)
    y = torch.cat([x, rows, torch.ones(x.shape[0], 1, 12, 12, dtype=torch.bool)], -3)
    return pooled(net, net.wide(torch.cat([y, net.places.expand(x.shape[0], -1, -1, -1)], 1)))


def beside_nothing(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.conv(torch.cat([torch.tensor([], dtype=x.dtype), x], 1)))


def exponents(net: Net, x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(net.conv(x))
    return pooled(net, x + mantissa * exponent)


def one_row(net: Net, x: Tensor) -> Tensor:
    return net.last(x.mean((2, 3)) + F.linear(x.mean((2, 3)), net.row)[:, None])


def of_a_negative_divisor(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.conv(F.avg_pool2d(x, 2, divisor_override=-4)))


def as_many_as_are_bright(net: Net, x: Tensor) -> Tensor:
    """A number of pixels is no number of images."""
    bright = x[x > 0.5]
    ones = torch.ones(bright.shape[0], dtype=x.dtype)
    return pooled(net, torch.zeros_like(x).masked_scatter(x > 0.5, bright * ones))


def chosen_by_a_mask(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.conv(torch.where(net.mask, x, net.other)))


def least(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.last(y.amin((2, 3)) + y.amin(3, keepdim=True).mean((2, 3)))


def tiled(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.both(net.conv(x).tile(1, 2, 1, 2)) + net.conv(x).tile(2))


def interleaved(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.both(net.conv(x).repeat_interleave(2, 1)).repeat_interleave(2, 3))


def triangular(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.conv(net.conv(x).triu(2)).tril())


# What is between the layers, and what it needs.
WAYS: dict[Way, Callable[[], dict[str, nn.Module | Tensor]]] = {
    folded_groups: lambda: {"mix": nn.Conv2d(4, 4, 3, padding=1)},
    padded_pools: dict,
    added_to_itself: lambda: {"conv": nn.Conv2d(WIDTH, WIDTH, 1), "bn": nn.BatchNorm2d(WIDTH)},
    soft_argmax: dict,
    masked: lambda: {"conv": conv(), "mask": torch.arange(WIDTH)[:, None, None] < 5},
    permuted: lambda: {"conv": conv(), "order": torch.tensor([3, 1, 2, 0, 7, 6, 5, 4])},
    looked_up: lambda: {"conv": conv(), "table": nn.Parameter(torch.randn(7, WIDTH))},
    spatial_attention: lambda: {"attend": nn.Conv2d(2, 1, 7, padding=3)},
    block_attention: lambda: {
        "narrow": nn.Linear(WIDTH, 4),
        "gate": nn.Linear(4, WIDTH),
        "attend": nn.Conv2d(2, 1, 7, padding=3),
    },
    largest_less_smallest: lambda: {"conv": conv()},
    pooled_to_four: lambda: {"conv": conv()},
    place_of_the_largest: lambda: {"conv": conv()},
    two_computed_weights: lambda: {
        "up": nn.Parameter(torch.randn(20, WIDTH)),
        "down": nn.Parameter(torch.randn(WIDTH, 20)),
    },
    expanded_as: lambda: {"gamma": nn.Parameter(torch.randn(WIDTH, 1, 1))},
    typed_as: dict,
    viewed_as: lambda: {"conv": conv()},
    zeros_beside: lambda: {"wide": nn.Conv2d(3 * WIDTH, WIDTH, 3, padding=1)},
    squeezed: dict,
    norm_over_rows: lambda: {"mix": nn.Linear(144, 20), "rows": nn.BatchNorm1d(WIDTH)},
    gated_by_sign: lambda: {"conv": conv(), "bn": nn.BatchNorm2d(WIDTH)},
    made_on_the_way: dict,
    whole_numbers: dict,
    elementwise: lambda: {"conv": conv()},
    concatenated: lambda: {"conv": conv(), "both": nn.Conv2d(2 * WIDTH, WIDTH, 1)},
    with_prelu: lambda: {"conv": conv(), "prelu": nn.PReLU(WIDTH)},
    awkward_names: lambda: {"code": conv(), "graph": conv()},
    by_windows: lambda: {
        "mix": nn.Linear(WIDTH, WIDTH),
        "position": nn.Parameter(torch.randn(1, WIDTH, 12, 12)),
    },
    by_columns: lambda: {"mix": nn.Linear(WIDTH, WIDTH)},
    by_dead_windows: lambda: {"mix": dead(nn.Linear(WIDTH, WIDTH))},
    by_dead_groups: lambda: {"mix": dead(nn.Conv2d(4, 4, 3, 2, padding=1))},
    by_sequence: lambda: {"mix": dead(nn.Linear(WIDTH, WIDTH))},
    in_place: lambda: {"conv": conv()},
    either_mask: lambda: {"conv": conv(), "bn": nn.BatchNorm2d(WIDTH)},
    counted_places: dict,
    overwritten: lambda: {"conv": conv()},
    rolled: lambda: {"conv": conv()},
    strided: lambda: {"conv": conv()},
    beside_whole_numbers: lambda: {
        "wide": nn.Conv2d(WIDTH + 3, WIDTH, 3, padding=1),
        "places": torch.arange(144).view(1, 1, 12, 12),
    },
    beside_nothing: lambda: {"conv": conv()},
    exponents: lambda: {"conv": conv()},
    one_row: lambda: {"row": nn.Parameter(torch.randn(WIDTH))},
    of_a_negative_divisor: lambda: {"conv": conv()},
    as_many_as_are_bright: dict,
    least: lambda: {"conv": conv()},
    tiled: lambda: {"conv": conv(), "both": nn.Conv2d(2 * WIDTH, WIDTH, 1)},
    interleaved: lambda: {"conv": conv(), "both": nn.Conv2d(2 * WIDTH, WIDTH, 1)},
    triangular: lambda: {"conv": conv()},
    chosen_by_a_mask: lambda: {
        "conv": conv(),
        "mask": torch.arange(WIDTH)[:, None, None] < 5,
        "other": torch.randn(WIDTH, 12, 12),
    },
}


SEVERAL_ROWS = (
    *(folded_groups, by_windows, by_columns, by_dead_windows, by_dead_groups, by_sequence),
    as_many_as_are_bright,
)


def dead(layer: nn.Module) -> nn.Module:
    """Mark a layer as one to be wholly dead."""
    layer.dead = True
    return layer


def planted(way: Way, seed: int) -> Net:
    torch.manual_seed(seed)
    model = plant(Net(way, WAYS[way]()), seed, 0.3)
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "dead"):
                layer.weight.zero_()
        # Dead filters that leave constants of both signs, so that what is made of them shows.
        model.first.weight[[1, 5]] = 0
        model.norm.bias[[1, 5]] = torch.tensor([0.5, 0.9], dtype=torch.float64)
        model.norm.weight[[1, 5]] = 1
    return model  # type: ignore[return-value]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_it_is_counted_grouped_and_made_smaller(way):
    for seed in range(3):
        model = planted(way, seed)
        if way not in SEVERAL_ROWS:  # an image is several rows, while the probe looks at one
            assert_nothing_claimed_is_wrong(model, trace_channels(model, SMALL), SMALL)
        assert_smaller_is_the_same(model, SMALL)
        assert not trace_channels(model, SMALL).layers["first"].outputs[[1, 5]].any()
        layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        channel_groups(model, layers, SMALL)


NO_BARRIERS = (
    block_attention, largest_less_smallest,
    padded_pools, added_to_itself, expanded_as, zeros_beside, elementwise, concatenated, with_prelu,
    viewed_as, overwritten, rolled, strided, beside_whole_numbers, beside_nothing, of_a_negative_divisor,
    chosen_by_a_mask, least, tiled, interleaved, triangular,
)  # fmt: skip


@pytest.mark.parametrize("way", NO_BARRIERS, ids=lambda way: way.__name__)
def test_it_is_no_barrier(way):
    assert trace_channels(planted(way, 0), SMALL).barriers == ()


@pytest.mark.parametrize("way", [masked, permuted, spatial_attention], ids=lambda way: way.__name__)
def test_its_channels_stay_apart(way):
    """Of the layer behind, each input slice is a channel's of its own."""
    model = Net(way, WAYS[way]() | {"before": nn.Conv2d(3, 3, 1)})
    model.way = lambda net, x: way(net, F.relu(net.between(x)))
    model.between = conv()
    # As many rows and columns as channels, so that a dimension cannot be told by its size.
    groups = channel_groups(model, ["between"], (3, WIDTH, WIDTH))
    assert [(g.channels, g.members) for g in groups] == [(WIDTH, (("between", FILTERS),))]


def test_a_convolution_of_what_has_no_batch_is_a_barrier():
    def way(net: Net, x: Tensor) -> Tensor:
        """All images as the depth of one."""
        return pooled(net, net.depth(x.transpose(0, 1)).transpose(0, 1))

    model = plant(Net(way, {"depth": nn.Conv3d(WIDTH, WIDTH, (1, 3, 3), padding=(0, 1, 1))}), 0, 0.3)
    count, x = count_network(model, SMALL), images(3, SMALL)
    assert count.barriers == ("aten.conv3d in depth",) and len(count.layers) == 2
    assert of_layers(count_by_torch(model, SMALL), count) == count.total("dense_macs")
    torch.testing.assert_close(slim_network(model, SMALL)(x), model(x), rtol=1e-9, atol=1e-9)
    channel_groups(model, ["first"], SMALL)


def over_channels_last(net: Net, x: Tensor) -> Tensor:
    y = x.permute(0, 2, 3, 1)
    return pooled(net, net.conv((y - y.mean(3, keepdim=True)).permute(0, 3, 1, 2)))


def over_tokens(net: Net, x: Tensor) -> Tensor:
    y = x.flatten(2).transpose(1, 2)
    return net.last((y * y.amax(-1, keepdim=True).sigmoid()).mean(1))


@pytest.mark.parametrize("way", [over_channels_last, over_tokens], ids=lambda way: way.__name__)
def test_channels_that_lie_last_stay_apart_where_they_are_reduced(way):
    model = Net(lambda net, x: way(net, F.relu(net.between(x))), {"between": conv(), "conv": conv()})
    groups = channel_groups(model, ["between"], SMALL)
    assert [(g.channels, g.members) for g in groups] == [(WIDTH, (("between", FILTERS),))]


def test_what_a_mask_chooses_is_what_its_product_lets_through():
    def macs(way: Way) -> int:
        model = planted(chosen_by_a_mask, 0)
        model.way, model.other = way, torch.zeros_like(model.other)
        return count_network(model, SMALL).total("structured_macs")

    chosen = macs(chosen_by_a_mask)
    assert chosen == macs(lambda net, x: pooled(net, net.conv(x * net.mask)))
    assert chosen == macs(lambda net, x: pooled(net, net.conv(x.masked_fill(~net.mask, 0.0))))
    assert chosen < macs(lambda net, x: pooled(net, net.conv(x)))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": torch.matmul,
    "tensordot": lambda u, v: torch.tensordot(u, v, 1),
    "inner": lambda u, v: torch.inner(u, v.T),
    "linalg_matmul": torch.linalg.matmul,
    "linalg_multi_dot": lambda u, v: torch.linalg.multi_dot([u, v]),
    "chain_matmul": lambda u, v: torch.chain_matmul(u, v),
    "matrix_power": lambda u, v: torch.matrix_power(u[:, :1] * v[:1], 3),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_parameters_is_counted_as_torch_counts_the_layers(name):
    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, WIDTH, 3), nn.Linear(WIDTH, 10)
            self.left, self.right = nn.Parameter(torch.randn(WIDTH, 2)), nn.Parameter(torch.randn(2, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(self.first(x).mean((2, 3)), PRODUCTS[name](self.left, self.right)))

    model = Factors().eval()
    count = count_network(model, SMALL)
    assert count.barriers == (f"aten.{name} in the network",)
    assert of_layers(count_by_torch(model, SMALL), count) == count.total("dense_macs")


def test_a_layer_that_is_no_module_takes_no_modules_name():
    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.linear, self.last = (
                nn.Conv2d(3, WIDTH, 3),
                nn.Linear(6, WIDTH),
                nn.Linear(WIDTH, 9),
            )
            self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(self.first(x).mean((2, 3)), self.left @ self.right)
            return self.last(self.linear(F.relu(x)))

    model = plant(Factors(), 0, 0.2)
    layers = {layer.name: layer.dense_macs for layer in count_network(model, SMALL).layers}
    assert list(layers.values()) == [27 * 100 * WIDTH, 6 * WIDTH, 6 * WIDTH, 9 * WIDTH]
    assert len(layers) == 4 and list(layers)[2] == "linear"
    assert_smaller_is_the_same(model, SMALL)


@pytest.mark.parametrize("first", [True, False])
def test_a_weight_that_is_used_once_more_behind_a_mask_counts_what_each_use_has(first):
    def way(net: Net, x: Tensor) -> Tensor:
        uses = [lambda: net.conv(x), lambda: F.conv2d(x, net.conv.weight * net.mask, padding=1)]
        one, other = uses if first else uses[::-1]
        return pooled(net, one() + other())

    model = plant(Net(way, {"conv": conv(), "mask": torch.tril(torch.ones(3, 3))}), 0, 0.2)
    count = count_network(model, SMALL)
    (found,) = [layer for layer in count.layers if layer.name == "conv"]
    weight = model.conv.weight
    uses = [int((w != 0).sum()) for w in (weight, weight * model.mask)]
    assert found.unstructured_macs == sum(uses) * 144 and found.zero_weights == weight.numel() - uses[0]
    assert in_layers(count_by_torch(model, SMALL), count)["conv"] == found.dense_macs


OF_THE_BATCH: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "1 / len": (lambda x: x + 1 / len(x), "gives other logits than Net itself for 5 images"),
    "float(len)": (lambda x: x * float(len(x)), "gives other logits"),
    "a branch by len": (lambda x: x * (2.0 if len(x) > 4 else 1.0), "on their number"),
    "a branch by shape": (lambda x: x * (2.0 if x.shape[0] > 1 else 1.0), "on their number"),
    "a roll": (lambda x: x + 0.5 * x.roll(1, 0), "depend on the other images"),
    "halves": (lambda x: torch.cat([x[x.shape[0] // 2 :], x[: x.shape[0] // 2]]), "other images"),
    "places": (lambda x: x + torch.arange(x.shape[0]).view(-1, 1, 1, 1), "other images"),
    "statistics": (lambda x: F.batch_norm(x, None, None, training=True), "other images"),
    "those before": (lambda x: x.cumsum(0), "other images"),
    "a loop": (lambda x: torch.stack([i * 2 for i in x]), "one image of a batch after the other, by a loop"),
}


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_a_network_of_no_single_images_is_refused_in_a_sentence(name):
    mixes, words = OF_THE_BATCH[name]
    model = plant(Net(lambda net, x: pooled(net, mixes(x)), {}), 0, 0.2)
    with pytest.raises(ValueError, match=words):
        count_network(model, SMALL)


def test_a_network_that_draws_in_evaluation_mode_is_counted():
    model = Net(lambda net, x: pooled(net, F.dropout(x, 0.3, training=True)), {}).eval()
    state = torch.get_rng_state()
    assert count_network(model, SMALL).barriers == ("aten.dropout in the network",)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_constant_in_float32_meets_weights_in_float64():
    """The constants of a network are computed in float64, in the graph that was traced in float32."""

    class Blurred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, WIDTH, 3), nn.Linear(WIDTH, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(self.first(x), torch.ones(WIDTH, 1, 3, 3) / 9, padding=1, groups=WIDTH)
            return self.last(F.relu(x).mean((2, 3)))

    model = plant(Blurred(), 0, 0.3).float()
    with torch.no_grad():
        model.first.weight[[1, 5]] = 0
        model.first.bias[[1, 5]] = torch.tensor([0.5, 0.9])
    count_network(model, SMALL)
    x = images(3, SMALL).float()
    torch.testing.assert_close(slim_network(model, SMALL)(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_is_zero_in_the_networks_type_alone_is_counted_and_removed_alike():
    def way(net: Net, x: Tensor) -> Tensor:
        gate = net.gate(x).sigmoid()
        return pooled(net, gate * F.relu(net.conv(x)) + (1 - gate) * net.norm(x))

    model = Net(way, {"gate": nn.Conv2d(WIDTH, WIDTH, 1), "conv": conv()}).eval()
    with torch.no_grad():
        model.gate.weight[2:4], model.gate.bias[2], model.gate.bias[3] = 0, 18, -120
        model.conv.weight[:, 2:4] = model.gate.weight[:, 2:4] = 0
    small, x = slim_network(model, SMALL), images(3, SMALL).float()
    counted = count_network(model, SMALL).total("structured_macs")
    assert counted == count_by_torch(small, SMALL)[""]
    assert counted < count_network(model.double(), SMALL).total("structured_macs")
    torch.testing.assert_close(small(x), model.float()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_type_that_is_named_on_the_way_is_that_of_the_weights(dtype):
    def way(net: Net, x: Tensor) -> Tensor:
        x = net.conv(F.softmax(x, 1, dtype=torch.float32).to(x.dtype) + (x > 0).float().to(x.dtype))
        return net.last(x.mean((2, 3), dtype=torch.float32).to(x.dtype))

    model, x = Net(way, {"conv": conv()}).eval().to(dtype), images(3, SMALL).to(dtype)
    small = slim_network(model, SMALL)
    assert count_by_torch(small, SMALL)[""] == count_network(model, SMALL).total("structured_macs")
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_mask_that_is_changed_is_seen():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.mask = nn.Parameter(torch.randn(WIDTH, 3, 3, 3)), torch.ones(WIDTH, 1, 1, 1)
            self.last, self.options = nn.Linear(WIDTH, 10), {"padding": 1}

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(F.conv2d(x, self.weight * self.mask, **self.options)).mean((2, 3)))

    model = Masked().eval()
    before = count_network(model, SMALL).total("structured_macs")
    model.mask[3] = 0
    after = count_network(model, SMALL).total("structured_macs")
    assert after < before
    model.options["padding"] = 0
    assert count_network(model, SMALL).total("structured_macs") < after


def test_a_module_that_is_registered_twice_is_one_layer():
    block = nn.Sequential(conv(), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), block, block, nn.Flatten(), nn.Linear(144 * WIDTH, 10))
    count = count_network(plant(model, 0, 0.2), SMALL)
    assert [layer.name for layer in count.layers] == ["0", "1.0", "4"]
    assert_smaller_is_the_same(model, SMALL)


def test_a_module_that_is_used_once_more_is_another_network():
    def macs(*blocks: nn.Module) -> dict[str, int]:
        """Of each layer behind the first, in those of one use."""
        count = count_network(nn.Sequential(nn.Conv2d(3, WIDTH, 1), *blocks), SMALL)
        return {layer.name: layer.dense_macs // (9 * 144 * WIDTH**2) for layer in count.layers[1:]}

    block, other = conv(), conv()
    assert [macs(*[block] * uses) for uses in (2, 5, 3)] == [{"1": 2}, {"1": 5}, {"1": 3}]
    assert macs(block, other, block) == {"1": 2, "2": 1} and macs(block, other, other) == {"1": 1, "2": 2}


def test_what_a_forward_looks_at_makes_another_network():
    class Config:
        def __init__(self) -> None:
            self.gate, self.itself = True, self

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.active, self.config, self.which = {0, 1, 2}, Config(), np.ones(3)
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                if i in self.active and self.which[i] > 0 and (self.config.gate or i == 0):
                    x = layer(x)
            return x

    model, one = Looking(), 144 * 9

    def layers() -> int:
        return sum(layer.dense_macs for layer in count_network(model, SMALL).layers) // one

    found = [layers()]
    model.active.discard(2)
    found.append(layers())
    model.active.add(2)
    model.which[1] = 0
    found.append(layers())
    model.which[1], model.config.gate = 1, False
    assert [*found, layers()] == [3, 2, 2, 1]


def test_a_recurrent_layer_that_has_learned_is_traced_no_second_time(monkeypatch):
    model = Net(
        lambda net, x: net.last(net.rows(x.flatten(2))[0][:, -1]),
        {"rows": nn.GRU(144, WIDTH, batch_first=True)},
    ).eval()
    before = count_network(model.eval(), SMALL)
    with torch.no_grad():
        model.rows.weight_hh_l0.mul_(2)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("it was traced again"))
    assert count_network(model, SMALL) == before


FLAG = True


def test_a_class_that_is_changed_is_another_network(monkeypatch):
    class Gated(nn.Module):
        takes = True

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x) if FLAG else x
            return self.two(x) if self.takes else x

    def of_the_first(self: Gated, x: Tensor) -> Tensor:
        return self.one(x)

    def layers() -> list[str]:
        return [layer.name for layer in count_network(model, SMALL).layers]

    model = Gated()
    assert layers() == ["one", "two"]
    monkeypatch.setattr(Gated, "takes", False)
    assert layers() == ["one"]
    monkeypatch.undo()
    monkeypatch.setitem(globals(), "FLAG", False)
    assert layers() == ["two"]
    monkeypatch.undo()
    before = Gated.forward.__code__
    Gated.forward.__code__ = of_the_first.__code__
    assert layers() == ["one"]
    Gated.forward.__code__ = before
    Gated.forward = of_the_first
    assert layers() == ["one"]


def test_a_network_that_branches_by_cond_is_refused_in_a_sentence():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 10, 12)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.layer(x).flatten(1),))

    with pytest.raises(ValueError, match="cond"):
        count_network(Branching(), SMALL)


def test_a_layer_in_a_container_called_graph_is_made_smaller():
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph, self.meta = nn.Sequential(nn.Conv2d(3, WIDTH, 1)), nn.Sequential(nn.Linear(WIDTH, 10))

        def forward(self, x: Tensor) -> Tensor:
            return self.meta(self.graph(x).mean((2, 3)))

    assert_smaller_is_the_same(plant(Held(), 0, 0.3), SMALL)


def test_channels_of_folded_rows_go_together():
    """Channel c and channel c + 4 are read by the same input slice."""
    model = Net(pooled, WAYS[folded_groups]() | {"between": conv()})
    model.way = lambda net, x: pooled(
        net, net.mix(net.between(x).reshape(-1, 4, 12, 12)).reshape(-1, WIDTH, 12, 12)
    )
    groups = channel_groups(model, ["between", "mix"], SMALL)
    (found,) = [g for g in groups if ("mix", INPUT_SLICES) in g.members]
    assert found.channels == 4 and [member for member, _ in found.members].count("between") == 2


def test_an_output_without_channels_is_made_smaller():
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 12), nn.ReLU(), nn.Flatten(), nn.Linear(WIDTH, 1), nn.Flatten(0)
    )
    plant(model, 0, 0.3)
    x = images(3, SMALL)
    torch.testing.assert_close(slim_network(model, SMALL)(x), model(x), rtol=1e-9, atol=1e-9)


def test_infinity_in_a_mask_is_packed_and_not_a_number_is_not():
    def of(number: float) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.Flatten(), nn.Linear(144 * WIDTH, 10)).eval()
        model.register_buffer("mask", torch.full((2,), number))
        return model

    content = pack_network(of(-math.inf), {}, {}, "own:net")
    assert unpack_network(content, lambda: of(0.0)).mask.tolist() == [-math.inf] * 2
    with pytest.raises(PackingError, match="mask"):
        pack_network(of(math.nan), {}, {}, "own:net")


def adapted(name: str, groups: int) -> nn.Conv2d:
    """A convolution that holds another by a name that is taken in the smaller layer."""

    class Adapted(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + getattr(self, name)(x)

    layer = Adapted(WIDTH, WIDTH, 3, padding=1, groups=groups)
    setattr(layer, name, nn.Conv2d(WIDTH, WIDTH, 1))
    return layer


@pytest.mark.parametrize("name", ["reads", "options", "parts", "up"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_within_a_layer_is_made_smaller_whatever_its_name(name, groups):
    model = plant(Net(lambda net, x: pooled(net, net.conv(x)), {"conv": adapted(name, groups)}), 0, 0.3)
    assert_smaller_is_the_same(model, SMALL)


def test_a_layer_called_self_is_made_smaller():
    model = nn.Sequential(nn.Flatten())
    model.add_module("self", nn.Linear(432, 10))
    assert_smaller_is_the_same(plant(model, 0, 0.3), SMALL)


def test_a_quantized_layer_within_a_quantized_layer_is_packed_and_comes_back():
    def build() -> nn.Module:
        return Net(lambda net, x: pooled(net, net.conv(x)), {"conv": adapted("up", 1)}).eval()

    model, x = build(), images(3, SMALL).float()
    assert {"conv", "conv.up"} < set(attach_weight_quantizers(model, [], DeadZoneLDZCompander, {}))
    assert quantized_layers(without_quantizers(model)) == {}
    assert [layer.name for layer in count_network(model, SMALL).layers] == [
        "first",
        "conv",
        "conv.up",
        "last",
    ]
    assert torch.equal(unpack_network(pack_network(model, {}, name="own:net"), build)(x), model(x))


class Flat(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


@pytest.mark.parametrize(
    "build", [lambda: Flat(432, 10), lambda: nn.Conv2d(3, 10, 12)], ids=["linear", "conv"]
)
def test_a_network_that_is_itself_a_layer_is_quantized_counted_and_packed(build):
    model, x = build().eval(), images(3, SMALL).float()
    assert attach_weight_quantizers(model, [], DeadZoneLDZCompander, {}) == [""]
    count = count_network(model, SMALL)
    assert [layer.dense_macs for layer in count.quantized] == [4320]
    assert in_layers(count_by_torch(model, SMALL), count) == {"": 4320}
    assert torch.equal(unpack_network(pack_network(model, {}, name="own:net"), build)(x), model(x))
    torch.testing.assert_close(slim_network(model, SMALL)(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_weight_of_a_network_is_no_layer_of_all_its_layers():
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(WIDTH, 3, 3, 3)), nn.Linear(WIDTH, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.conv2d(x, self.weight).mean((2, 3)))

    model = Owner().eval()
    count = count_network(model, SMALL)
    assert in_layers(count_by_torch(model, SMALL), count) == {"": 27 * WIDTH * 100, "last": 10 * WIDTH}


def test_a_weight_that_is_another_layers_too_gets_no_quantizer():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="the weight of 0 is another's too"):
        attach_weight_quantizers(model, [], DeadZoneLDZCompander, {})


def test_slices_of_a_transposed_weight_are_in_no_group():
    def groups(weight: Callable[[Tensor], Tensor]) -> list[tuple[tuple[str, int], ...]]:
        def way(net: Net, x: Tensor) -> Tensor:
            return pooled(net, F.conv2d(F.relu(net.between(x)), weight(net.conv.weight)))

        model = Net(way, {"between": conv(), "conv": conv()})
        return [g.members for g in channel_groups(model, ["between", "conv"], SMALL)]

    both = [(("between", FILTERS), ("conv", INPUT_SLICES)), (("conv", FILTERS),)]
    assert groups(lambda w: w * torch.ones(3, 3).tril()) == groups(lambda w: w) == both
    assert groups(lambda w: w.transpose(0, 1)) == [(("between", FILTERS),)]


@pytest.mark.parametrize("first", [True, False])
def test_the_zeros_of_a_weight_that_is_used_once_more_transposed_are_those_it_stores(first):
    def way(net: Net, x: Tensor) -> Tensor:
        one, other = net.square.weight, net.square.weight.t()
        x = F.relu(F.linear(x.mean((2, 3)), one if first else other))
        return net.last(F.linear(x, other if first else one))

    model = Net(way, {"square": nn.Linear(WIDTH, WIDTH, bias=False)}).eval()
    with torch.no_grad():
        model.square.weight.triu_()
        model.square.weight[0] = 0
    (found,) = [layer for layer in count_network(model, SMALL).layers if layer.name == "square"]
    assert found.zero_weights == 28 + WIDTH and found.zero_filters == 1


class OfTheImage(nn.Module):
    """What has no value for a black image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table = nn.Conv2d(3, WIDTH, 1), nn.Parameter(torch.randn(6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        sums = x.abs().sum((2, 3))
        inverse = torch.linalg.inv(x.mean(1))[:, :WIDTH, :1].flatten(1)
        looked_up = self.table[(5 * sums / sums.amax(1, True)).long()]
        return self.first(x).mean((2, 3)) + inverse + looked_up.mean(1)


def test_what_is_undefined_of_a_black_image_is_counted():
    model, x = plant(OfTheImage(), 0, 0.0).double(), images(3, SMALL)
    assert "aten.linalg_inv in the network" in count_network(model, SMALL).barriers
    assert count_by_torch(slim_network(model, SMALL), SMALL)[""] == 24 * 144
    torch.testing.assert_close(slim_network(model, SMALL)(x), model(x), rtol=1e-9, atol=1e-9)


def test_an_operation_that_raises_is_named():
    model = Net(lambda net, x: net.last(torch.linalg.inv(x.mean(1)).mean(1)[:, :WIDTH]), {}).eval()
    with pytest.raises(ValueError, match="linalg_inv"):
        count_network(model, SMALL)


def test_buffers_are_told_by_the_last_part_of_their_names():
    def build() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(432, 10))
        model.register_buffer("my_num_batches_tracked", torch.tensor(0.0))
        model.register_buffer("running_max", torch.tensor(math.inf))
        return model

    model = build()
    model.my_num_batches_tracked.fill_(3)
    again = unpack_network(pack_network(model, {}, name="own:net"), build)
    assert (again.my_num_batches_tracked, again.running_max) == (3, math.inf)


def test_a_weight_that_is_built_transposed_comes_back_to_the_bit():
    def build() -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(432, 64), nn.Linear(64, 10))
        model[1].weight = nn.Parameter(torch.randn(432, 64).t() * 0.05)
        return model

    model, x = build(), images(5, SMALL).float()
    again = unpack_network(pack_network(model, {}, name="own:net"), build)
    assert again[1].weight.stride() == model[1].weight.stride() and torch.equal(again(x), model(x))


ANSWERS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "number of images": lambda logits, x: (logits, x.shape[0]),
    "twice": lambda logits, x: [logits, logits],
    "with nothing": lambda logits, x: (logits, None),
    "alone": lambda logits, x: (logits,),
    "named": lambda logits, x: {"logits": logits, "features": [x, x.relu()]},
    "numbers": lambda logits, x: (logits, x.shape[2], 2.5),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("gone", [False, True])
def test_the_smaller_network_gives_what_the_network_gives(name, gone):
    model = plant(Net(lambda net, x: ANSWERS[name](pooled(net, x), x), {}), 0, 0.3)
    x = images(3, SMALL)
    if gone:
        model.first.weight.data.zero_()
    torch.testing.assert_close(slim_network(model, SMALL)(x), model(x), rtol=1e-9, atol=1e-9)
    channel_groups(model, ["first"], SMALL)


@dataclass(slots=True)
class Slotted:
    on: bool = True


class Called:
    def __init__(self) -> None:
        self.on = True

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.on else 0 * x


LOOKED_AT: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Callable[[Any], object]]] = {
    "slots": (Slotted, lambda o, x: x if o.on else 0 * x, lambda o: setattr(o, "on", False)),
    "a deque": (lambda: deque([1]), lambda o, x: x if o else 0 * x, lambda o: o.clear()),
    "called": (Called, lambda o, x: o(x), lambda o: setattr(o, "on", False)),
    "data": (lambda: torch.ones(()), lambda o, x: o * x, lambda o: o.data.zero_()),
    "numpy": (lambda: [torch.ones(())], lambda o, x: o[0] * x, lambda o: o[0].numpy().fill(0)),
}


@pytest.mark.parametrize("name", LOOKED_AT)
def test_what_changes_within_an_attribute_is_seen(name):
    make, use, change = LOOKED_AT[name]
    model = Net(lambda net, x: pooled(net, use(net.__dict__["attribute"], x)), {}).eval()
    model.__dict__["attribute"] = attribute = make()
    assert count_network(model, SMALL).total("structured_macs") > 0
    change(attribute)
    assert count_network(model, SMALL).total("structured_macs") == 0
