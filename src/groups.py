"""Which weight slices must all be zero before a channel can be removed, read from the network's graph.

Every channel of every tensor in the graph carries a label. The filters of a convolution give new ones; what
works on each channel by itself, a depthwise convolution too, hands them on; what only moves elements moves
them; a sum or a product of two channels ties theirs.

In no group are the channels that a layer makes from the image itself, with what reads them, because the stem
is mostly left in full precision; those that a padded shortcut brings, because behind the padding they are
others, with producers of their own; and what the network gives. An input slice of a grouped convolution
belongs to a channel of each of its groups, and is no member.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from src.channels import PIPES, LayerChannels, LayerUse, read_weights, trace_channels
from src.graph import (
    PADS,
    REDUCTIONS,
    aten,
    inputs_of,
    is_move,
    is_norm,
    is_pointwise,
    kind,
    move,
    reduced_dims,
)

FILTERS, INPUT_SLICES = 0, 1  # the dimension of a weight (O, I, kh, kw) along which a slice is taken
IMAGE, NONE = -1, 0  # labels that are no channel's

Slice = tuple[str, int, int]  # layer, FILTERS or INPUT_SLICES, number


@dataclass(frozen=True)
class ChannelGroups:
    """The groups of one set of channels: group c is slice places[m][c] of every member m, or slice c where
    `places[m]` is None. All these slices must be zero before channel c can be removed. `members` are pairs
    (layer name, FILTERS or INPUT_SLICES)."""

    channels: int
    members: tuple[tuple[str, int], ...]
    places: tuple[tuple[int, ...] | None, ...]


def channel_groups(
    model: nn.Module, layers: Collection[str], input_size: tuple[int, int, int] = (3, 32, 32)
) -> list[ChannelGroups]:
    """The channel groups of the model's convolutions. Members in layers other than `layers` are left out.

    First come the sets whose channels go into no sum or product: inner channel i of a residual block, which
    is filter i of its conv1 and input slice i of its conv2. Then come the others: residual channel c of a
    stage, which is filter c of every conv2 in the stage and input slice c of what reads their sums.

    Raises: ValueError if torch.export cannot trace the network.
    """
    walk = _Walk(model, input_size)
    sets: dict[Any, list[list[int]]] = defaultdict(list)
    for tied, slices in sorted(walk.groups(), key=lambda group: group[0]):
        sets[tied, tuple((name, dim) for name, dim, _ in slices)].append([place for *_, place in slices])
    found = []
    for (_, members), groups in sets.items():
        columns = zip(*groups, strict=True)
        kept = [(m, p) for m, p in zip(members, columns, strict=True) if m[0] in layers]
        places = tuple(None if p == tuple(range(walk.sizes[m])) else p for m, p in kept)
        if kept:
            found.append(ChannelGroups(len(groups), tuple(m for m, _ in kept), places))
    return found


class _Walk:
    """One pass through the graph, which labels channels."""

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int]) -> None:
        self.account = trace_channels(model, input_size, read_weights(model, stored=True))  # any will do
        self.parents = [NONE]  # by label: the label that it was tied to, or itself
        self.tied: set[int] = set()
        self.slices: dict[Slice, int] = {}  # label of each, in the order of the graph
        self.sizes: dict[tuple[str, int], int] = {}
        self.labels: dict[fx.Node, Any] = {}
        *nodes, output = self.account.graph.nodes
        for node in nodes:
            self.labels[node] = self._label(node)
        # The channels that the network gives.
        given = (self.labels[n] for n in output.all_input_nodes)
        self.answers = {x for labels in given if isinstance(labels, Tensor) for x in labels.unique().tolist()}

    def groups(self) -> list[tuple[bool, list[Slice]]]:
        """Each channel that can go, as its slices; with it, whether it goes into a sum or a product."""
        tied, answers = (
            {self._root(label) for label in labels if label > NONE} for labels in (self.tied, self.answers)
        )
        groups: dict[int, list[Slice]] = defaultdict(list)
        for which, label in self.slices.items():
            groups[self._root(label)].append(which)
        return [(root in tied, slices) for root, slices in groups.items() if root not in answers]

    def _root(self, label: int) -> int:
        while self.parents[label] != label:
            label = self.parents[label]
        return label

    def _join(self, one: int, other: int) -> None:
        self.parents[self._root(max(one, other))] = self._root(min(one, other))

    def _tie(self, a: Tensor, b: Tensor) -> Tensor:
        """Tie labels, element by element. Returns: the label of either, where there is one."""
        both = (a > NONE) & (b > NONE) & (a != b)
        if both.any():
            for one, other in torch.stack([a[both], b[both]]).unique(dim=1).T.tolist():
                self._join(one, other)
        return torch.where(b > NONE, torch.where(a > NONE, torch.minimum(a, b), b), a)

    def _label(self, node: Any) -> Any:
        """The labels of a node's elements; what is no tensor of numbers stands for itself."""
        signal = self.account.signals[node]
        value: Any = signal.constant
        if node.op == "placeholder" and (signal.flow is not None or value.is_floating_point()):
            return torch.full(value.shape, NONE if signal.flow is None else IMAGE)
        if node in self.account.uses:
            return self._layer(node, *self.account.uses[node], value)
        if isinstance(value, Tensor) and signal.flow is None:
            return self._none(value)
        flowing = [n for n in inputs_of(node) if self.account.signals[n].flow is not None]
        inputs = [self.labels[n] for n in flowing]
        if not isinstance(value, Tensor | tuple):
            return value
        if is_move(node) and all(self._has_numbers(n) for n in flowing):
            moved = self._moved(node)
            padded = kind(node) in PADS and moved.shape[1] != inputs[0].shape[1]
            return moved.clamp_max(NONE) if padded else moved
        if is_pointwise(node):
            labels = [self._spread_out(i, signal.constant.shape) for i in inputs]
            for other in labels[1:]:
                labels[0] = self._tie(labels[0], other)
            if len(labels) > 1:
                self.tied.update(labels[0].unique().tolist())
            return labels[0]
        if isinstance(value, Tensor) and kind(node) in REDUCTIONS:
            return self._reduced(inputs[0], reduced_dims(node)).view(value.shape)
        if isinstance(value, Tensor) and (kind(node) in PIPES or is_norm(node)):
            same = value.ndim > 1 and value.shape[1] == inputs[0].shape[1]
            return self._spread(self._of_channels(inputs[0]), value.shape) if same else self._none(value)
        return tuple(map(self._none, value)) if isinstance(value, tuple) else self._none(value)

    def _has_numbers(self, node: fx.Node) -> bool:
        value = self.account.signals[node].constant
        return isinstance(value, tuple) or value.is_floating_point()

    def _moved(self, node: Any) -> Any:
        """What an operation that moves elements makes of labels; it is given them as floating numbers."""

        def numbers(n: fx.Node) -> Any:
            return labels if isinstance(labels := self.labels[n], tuple) else labels.double()

        def index(n: fx.Node) -> Any:
            value = self.account.signals[n].constant
            return value.cpu() if isinstance(value, Tensor) else value

        moved = move(node, numbers, index)
        return tuple(m.long() for m in moved) if isinstance(moved, tuple) else moved.long()

    def _layer(self, node: Any, use: LayerUse, channels: LayerChannels, value: Tensor) -> Tensor:
        weight = use.parameters[0]
        if kind(node) is aten.linear or not channels.as_stored:
            return self._none(value)
        read = self._of_channels(self.labels[node.args[0]])
        if use.groups == 1:
            self._record(use.name, INPUT_SLICES, read)
        if use.groups == len(read) == len(weight) and use.groups > 1:
            made = read.clamp_min(NONE)
        elif (read == IMAGE).any():
            made = torch.zeros(len(weight), dtype=torch.int64)
        else:
            made = len(self.parents) + torch.arange(len(weight))
            self.parents += made.tolist()
        self._record(use.name, FILTERS, made)
        return self._spread(made, value.shape)

    def _record(self, layer: str, dim: int, labels: Tensor) -> None:
        self.sizes[layer, dim] = len(labels)
        for place, label in enumerate(labels.tolist()):
            if label > NONE:
                self._join(self.slices.setdefault((layer, dim, place), label), label)

    def _of_channels(self, labels: Tensor) -> Tensor:
        """The labels of the channels, (C,): one that is several channels in one ties them."""
        flat = labels.movedim(1, 0).flatten(1)  # an image may be several rows
        top = flat.amax(1)
        self._tie(flat, top[:, None].expand_as(flat))
        return top

    @staticmethod
    def _spread_out(labels: Tensor, shape: torch.Size) -> Tensor:
        """Labels as they are broadcast; one that is spread over all channels is none of theirs."""
        over_channels = labels.ndim == len(shape) and labels.shape[1:2] != shape[1:2]
        return (labels.clamp_max(NONE) if over_channels else labels).expand(shape)

    @staticmethod
    def _reduced(labels: Tensor, dims: list[int]) -> Tensor:
        """The label that all that is taken together has: several channels in one are none of them."""
        top = labels.amax(dims)
        least = torch.where(labels > NONE, labels, labels.max()).amin(dims)
        return torch.where(least == top, top, top.clamp_max(NONE))

    @staticmethod
    def _none(value: Tensor) -> Tensor:
        return torch.full(value.shape, NONE)

    @staticmethod
    def _spread(labels: Tensor, shape: torch.Size) -> Tensor:
        return labels.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)
