"""What a channel is in a CIFAR ResNet: the weight slices that belong to it, its state, and what reads it.

No other file decides this. The group lasso takes its groups from `channel_groups`; the metrics, the pictures
and the smaller network take the states of channels from `trace_channels`, so that they cannot disagree.

A channel of a layer's output (after its batch norm) is in one of three states, in evaluation mode:

    alive     it depends on the image, and a layer that is not removed reads it
    constant  it does not depend on the image, but is a known number (or a known map, beside zero padding)
              that a layer reads: it can be removed once the constant is folded into that layer
    null      it is zero, or nothing reads it: it can be removed, and nothing else changes

A filter of zeros does not make a null channel: the batch norm behind it still emits a constant.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resnet import BasicBlock, ResNet


class ChannelState(IntEnum):
    """The three states of a channel, as the head of this file defines them."""

    NULL = 0
    CONSTANT = 1
    ALIVE = 2


FILTERS, INPUT_SLICES = 0, 1  # the dimension of a weight (O, I, kh, kw) along which a slice is taken


@dataclass(frozen=True)
class ChannelGroups:
    """The groups of one set of channels: group c is slice c of every member. All these slices must be zero
    before channel c can be removed. `members` are pairs (layer name, FILTERS or INPUT_SLICES)."""

    name: str
    channels: int
    members: tuple[tuple[str, int], ...]


def channel_groups(model: nn.Module, layers: Collection[str]) -> list[ChannelGroups]:
    """The channel groups of the model. Members in layers other than `layers` (names) are left out.

    Inner channel i of a block: filter i of its conv1 and input slice i of its conv2. Residual channel c of
    a stage: filter c of every conv2 in the stage, input slice c of every later conv1 there, and of the next
    stage's first conv1.

    Raises: ValueError if the model is not a ResNet of `resnet.py`; AssertionError if groups overlap.
    """
    inner: list[ChannelGroups] = []
    residual: dict[int, list[tuple[str, int]]] = {}
    for stage, position, name, block in _blocks(model):
        inner.append(
            ChannelGroups(
                f"{name} inner",
                block.conv1.out_channels,
                ((f"{name}.conv1", FILTERS), (f"{name}.conv2", INPUT_SLICES)),
            )
        )
        source = stage if position else stage - 1  # the stage whose residual channels conv1 reads
        if source >= 0 and residual.get(source):
            residual[source].append((f"{name}.conv1", INPUT_SLICES))
        residual.setdefault(stage, []).append((f"{name}.conv2", FILTERS))
    widths = [stage[0].conv2.out_channels for stage in _stages(model)]
    sets = inner + [ChannelGroups(f"layer{i + 1} residual", widths[i], tuple(residual[i])) for i in residual]
    sets = [ChannelGroups(s.name, s.channels, tuple(m for m in s.members if m[0] in layers)) for s in sets]
    members = [m for s in sets for m in s.members]
    assert len(members) == len(set(members)), "two channel groups share a weight slice"
    return [s for s in sets if s.members]


@dataclass(frozen=True)
class LayerChannels:
    """The channels of one convolution (with its batch norm) or of the classifier.

    `outputs` (O,) and `inputs` (I,) say which channels remain: weight[outputs][:, inputs] are the weights
    that must still be multiplied. `shift` is the layer's output, batch norm included, when all its alive
    inputs are zero: (O, H, W), or (O,) for the classifier.
    """

    states: Tensor  # (O,) of ChannelState, int8
    outputs: Tensor  # (O,) bool
    inputs: Tensor  # (I,) bool
    shift: Tensor

    @property
    def positions(self) -> int:
        """The number of positions at which each filter is applied: H_out W_out, or 1 for the classifier."""
        return self.shift[0].numel()


@dataclass(frozen=True)
class StreamChannels:
    """The residual stream behind a block or the stem."""

    alive: Tensor  # (C,) bool
    constant: Tensor  # (C, H, W), 0 where the channel depends on the image
    # (C,) the channel that the shortcut brings here from the stream before this block, -1 for none.
    source: Tensor | None  # None behind the stem


@dataclass(frozen=True)
class ChannelAccount:
    """What `trace_channels` finds out about the channels of a network."""

    layers: dict[str, LayerChannels]  # every convolution, in order, then the classifier
    streams: dict[str, StreamChannels]  # behind the stem ("conv1") and behind each block, by its name


def read_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the convolutions and the classifier compute with, by layer name, without gradients.

    Quantizers that are switched on are applied. They are called directly instead of through `.weight`: inside
    `parametrize.cached()` that would cache weights without gradients, which the caller's loss would then use.
    """
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    with torch.no_grad():
        return {
            n: m.parametrizations.weight() if parametrize.is_parametrized(m, "weight") else m.weight
            for n, m in layers.items()
        }


@torch.no_grad()
def trace_channels(
    model: nn.Module,
    input_size: tuple[int, int, int] = (3, 32, 32),
    weights: Mapping[str, Tensor] | None = None,
) -> ChannelAccount:
    """Find the state of every channel: forward, what depends on the image; backward, what is read.

    One pass in each direction is exact: whether a channel depends on the image follows from the layers before
    it, and whether it is read follows from the layers behind it. A weight reads its input channel if it is
    not zero and the batch norm behind its filter has a scale other than 0.

    Arguments: `weights` by layer name, instead of the model's own. Batch norms count as in evaluation mode,
        whatever mode the model is in. The model is not changed.
    Raises: ValueError if the model is not a ResNet of `resnet.py`.
    """
    weights = read_weights(model) if weights is None else weights
    trace = _Trace(model, weights, input_size)
    trace.forward()
    trace.backward()
    return ChannelAccount(trace.layers, trace.streams)


@dataclass
class _Signal:
    """A tensor between layers: which channels depend on the image, and the value of the others."""

    varies: Tensor  # (C,) bool
    constant: Tensor  # (C, H, W), 0 where it varies


@dataclass
class _Step:
    """What the forward pass finds out about a layer."""

    reads: Tensor  # (O, I) bool: output o would change with input i
    varies: Tensor  # (O,) bool
    shift: Tensor  # (O, H, W)


class _Trace:
    """The two passes of `trace_channels`."""

    def __init__(
        self, model: nn.Module, weights: Mapping[str, Tensor], input_size: tuple[int, int, int]
    ) -> None:
        self.model: Any = _checked(model)
        self.blocks = [(name, block) for _, _, name, block in _blocks(model)]
        self.weights = weights
        self.input_size = input_size
        self.steps: dict[str, _Step] = {}
        self.signals: dict[str, _Signal] = {}  # what enters each layer
        self.sums: dict[str, _Signal] = {}  # the residual stream behind the stem and behind each block
        self.layers: dict[str, LayerChannels] = {}
        self.streams: dict[str, StreamChannels] = {}

    def forward(self) -> None:
        channels, height, width = self.input_size
        some = self.model.bn1.weight
        image = _Signal(
            torch.ones(channels, dtype=torch.bool, device=some.device),
            some.new_zeros(channels, height, width),
        )
        stream = self._relu(self._convolve("conv1", self.model.conv1, self.model.bn1, image))
        self.sums["conv1"] = stream
        for name, block in self.blocks:
            inner = self._relu(self._convolve(f"{name}.conv1", block.conv1, block.bn1, stream))
            branch = self._convolve(f"{name}.conv2", block.conv2, block.bn2, inner)
            source = shortcut_source(block.shortcut, len(stream.varies), stream.varies.device)
            varies = branch.varies | _at(stream.varies, source)
            total = branch.shift + block.shortcut(stream.constant[None])[0]
            stream = self.sums[name] = self._relu(_Step(branch.reads, varies, total))
        self._classify(stream)

    def _convolve(self, name: str, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: _Signal) -> _Step:
        w = self.weights[name]
        reads = (w != 0).any(3).any(2) & (bn.weight != 0)[:, None]  # (O, I, kh, kw) -> (O, I)
        out = F.conv2d(x.constant[None], w, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        shift = F.batch_norm(out, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)[0]
        self.signals[name] = x
        self.steps[name] = _Step(reads, (reads & x.varies).any(1), shift)
        return self.steps[name]

    def _classify(self, x: _Signal) -> None:
        w = self.weights["linear"]
        self.signals["linear"] = x
        shift = F.linear(x.constant.mean((1, 2)), w, self.model.linear.bias)
        self.steps["linear"] = _Step(w != 0, (w[:, x.varies] != 0).any(1), shift)

    @staticmethod
    def _relu(step: _Step) -> _Signal:
        return _Signal(step.varies, step.shift.clamp_min(0).masked_fill(step.varies[:, None, None], 0))

    def backward(self) -> None:
        classes = self.weights["linear"].new_ones(len(self.weights["linear"]), dtype=torch.bool)
        needed = self._account("linear", classes)
        for name, block in reversed(self.blocks):
            before = self.signals[f"{name}.conv1"]
            source = shortcut_source(block.shortcut, len(before.varies), before.varies.device)
            self._stream(name, needed, source)
            inner = self._account(f"{name}.conv2", needed)
            needed = self._account(f"{name}.conv1", inner) | _scatter(needed, source, len(before.varies))
        self._stream("conv1", needed, None)
        self._account("conv1", needed)
        self.layers = dict(reversed(self.layers.items()))
        self.streams = dict(reversed(self.streams.items()))

    def _account(self, name: str, needed: Tensor) -> Tensor:
        """Decide the states of a layer's channels, given which of them are read: needed (O,) bool.

        Returns: which of its inputs the layer reads, (I,) bool.
        """
        step, x = self.steps[name], self.signals[name]
        reads = step.reads[needed].any(0)
        after_relu = step.shift.clamp_min(0) if name.endswith("conv1") else step.shift
        speaks = (after_relu != 0).flatten(1).any(1) if after_relu.ndim > 1 else after_relu != 0
        alive = needed & step.varies
        states = torch.zeros_like(alive, dtype=torch.int8)  # NULL
        states[needed & ~step.varies & speaks] = ChannelState.CONSTANT
        states[alive] = ChannelState.ALIVE
        self.layers[name] = LayerChannels(states, alive, x.varies & reads, step.shift)
        return reads

    def _stream(self, name: str, needed: Tensor, source: Tensor | None) -> None:
        signal = self.sums[name]
        self.streams[name] = StreamChannels(signal.varies & needed, signal.constant, source)


def shortcut_source(shortcut: Callable[[Tensor], Tensor], channels: int, device: torch.device) -> Tensor:
    """Which input channel each output channel of a shortcut is, -1 where it is padding: (C_out,)."""
    numbers = torch.arange(1.0, channels + 1, device=device)
    return shortcut(numbers[None, :, None, None])[0, :, 0, 0].long() - 1


def _at(flags: Tensor, source: Tensor) -> Tensor:
    """flags[source], False where the source is -1."""
    return flags[source.clamp_min(0)] & (source >= 0)


def _scatter(flags: Tensor, source: Tensor, channels: int) -> Tensor:
    """The transpose of `_at`: True at every input channel that some flagged output channel comes from."""
    out = torch.zeros(channels, dtype=torch.bool, device=flags.device)
    out[source[flags & (source >= 0)]] = True
    return out


def _checked(model: nn.Module) -> ResNet:
    if not isinstance(model, ResNet):
        raise ValueError(
            f"the account of channels knows the ResNets of resnet.py; got {type(model).__name__}"
        )
    return model


def _stages(model: nn.Module) -> list[Any]:
    resnet = _checked(model)
    return [resnet.layer1, resnet.layer2, resnet.layer3]


def _blocks(model: nn.Module) -> Iterator[tuple[int, int, str, BasicBlock]]:
    """(stage 0 to 2, position in it, name, block), in order."""
    for stage, blocks in enumerate(_stages(model)):
        for position, block in enumerate(blocks):
            yield stage, position, f"layer{stage + 1}.{position}", block
