"""The channel groups of the dense ResNet-20 against a peer's: torch-pruning's dependency graph.

It follows what is added and what is read through the traced graph of the network, batch norms and all. Of its
groups only the convolutions' and the classifier's weights count here.
"""

import pytest
import torch
import torch_pruning
from networks import of_torchvision
from torch import Tensor, nn

from resnet import PadShortcut, resnet20
from src.groups import FILTERS, INPUT_SLICES, channel_groups

Members = frozenset[tuple[str, int]]


def peer_groups(model: nn.Module) -> dict[Members, int]:
    """The members of each coupled group, and how many channels it has, by torch-pruning."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.randn(1, 3, 32, 32))
    names = {module: name for name, module in model.named_modules()}
    side = {"prune_out_channels": FILTERS, "prune_in_channels": INPUT_SLICES}
    groups = {}
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        couplings = [(dep.target.module, side[dep.handler.__name__], len(index)) for dep, index in group]
        weights = [c for c in couplings if isinstance(c[0], nn.Conv2d | nn.Linear)]
        (channels,) = {count for _, _, count in weights}
        groups[frozenset((names[module], dim) for module, dim, _ in weights)] = channels
    assert groups.pop(frozenset({("linear", FILTERS)})) == 10  # the classes: no channels
    return groups


def our_groups(model: nn.Module) -> dict[Members, int]:
    """Ours, and what is coupled with them but is no part of the lasso: the stem's filters with the one
    convolution that reads nothing else, and the classifier's input."""
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    outside = {
        ("layer1.0.conv2", FILTERS): {("conv1", FILTERS), ("layer1.0.conv1", INPUT_SLICES)},
        ("layer3.0.conv2", FILTERS): {("linear", INPUT_SLICES)},
    }
    groups = channel_groups(model, layers)
    beside = [set().union(*(outside.get(m, ()) for m in g.members)) for g in groups]
    return {frozenset(b.union(g.members)): g.channels for b, g in zip(beside, groups, strict=True)}


class NoShortcut(nn.Module):
    """Cuts a stage from the one before: in a padded shortcut channel i becomes channel i + pad, which is
    another channel to us, and which torch-pruning takes for channel i again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.zeros = torch.zeros(1, channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.zeros


@pytest.fixture
def model() -> nn.Module:
    return resnet20().eval()


def test_with_the_padded_shortcuts_cut_every_group_is_the_peers(model):
    for stage in (model.layer2, model.layer3):
        assert isinstance(stage[0].shortcut, PadShortcut)
        stage[0].shortcut = NoShortcut(stage[0].conv2.out_channels)
    assert our_groups(model) == peer_groups(model)
    assert sorted(our_groups(model).values()) == sorted(4 * [16, 32, 64])  # 9 inner and 3 residual sets


def test_with_the_padded_shortcuts_the_peer_couples_our_three_residual_sets(model):
    ours, peers = our_groups(model), peer_groups(model)
    residual = [members for members in ours if len(members) > 2]
    assert len(residual) == 3
    assert {m: c for m, c in peers.items() if len(m) == 2} == {m: c for m, c in ours.items() if len(m) == 2}
    assert [m for m in peers if len(m) > 2] == [frozenset.union(*residual)]


def peer_slices(model: nn.Module) -> set[frozenset[tuple[str, int, int]]]:
    """The slices of convolutions that torch-pruning removes with each channel of each convolution."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, torch.randn(1, 3, 32, 32))
    names = {module: name for name, module in model.named_modules()}
    found = set()
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            for channel in range(0, conv.out_channels, 7):  # enough of them, in seconds
                group = graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, [channel])
                members = set()
                for dep, index in group:
                    module, handler = dep.target.module, dep.handler.__name__
                    if isinstance(module, nn.Conv2d):
                        depthwise = module.groups > 1
                        dim = FILTERS if depthwise or handler.endswith("out_channels") else INPUT_SLICES
                        members |= {(names[module], dim, place) for place in index}
                found.add(frozenset(members))
    return found


@pytest.mark.parametrize(
    "name", ["vgg11_bn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "mobilenet_v2"))]
)
def test_the_channels_of_torchvision_networks_are_coupled_as_the_peer_couples_them(name):
    model = of_torchvision(name)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    ours: dict[tuple[str, int, int], frozenset[tuple[str, int, int]]] = {}
    for groups in channel_groups(model, layers):
        for c in range(groups.channels):
            members = frozenset(
                (layer, dim, c if p is None else p[c])
                for (layer, dim), p in zip(groups.members, groups.places, strict=True)
            )
            ours |= dict.fromkeys(members, members)
    compared = 0
    for peers in peer_slices(model):
        held = {ours[s] for s in peers if s in ours}
        stem = any(layer == layers[0] for layer, _, _ in peers)  # what it makes is in no group of ours
        if not stem:
            assert held == {peers}
        compared += len(held)
    assert compared > 100
