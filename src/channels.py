"""What a channel is in a network: its state, and what reads it.

No other file decides this. The metrics, the pictures and the smaller network take the states of channels from
`trace_channels`, so that they cannot disagree. Which weight slices belong together src/groups.py finds in the
same graph.

A channel of a layer's output (after its batch norm) is in one of three states, in evaluation mode:

    alive     it depends on the image, and a layer that is not removed reads it
    constant  it does not depend on the image, but is a known number (or a known map, beside zero padding)
              that a layer reads: it can be removed once the constant is folded into that layer
    null      it is zero, or nothing reads it: it can be removed, and nothing else changes

A filter of zeros does not make a null channel: the batch norm behind it still emits a constant.

All of this goes by wiring: a weight that is not zero carries its input on, and a ReLU is taken to open for
some image. Two things run through the network's graph (src/graph.py), for one image. Constants run through
the operations themselves. Flow says of each element whether the image reaches it, and runs through pipes:
the operations with 1 for each weight that is not zero. Autograd takes the pipes backward from the outputs,
and finds what is read. An operation without a pipe is a barrier: it reads all that enters it, and all that
leaves it depends on the image.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from src.graph import (
    LAYERS,
    NetworkGraph,
    aten,
    images_along,
    inputs_of,
    is_move,
    is_norm,
    is_pointwise,
    kind,
    move,
    path,
    trace_network,
)
from utils_quantization import layers_of, weight_quantization


class ChannelState(IntEnum):
    """The three states of a channel, as the head of this file defines them."""

    NULL = 0
    CONSTANT = 1
    ALIVE = 2


@dataclass(frozen=True)
class LayerChannels:
    """The channels of one convolution (with the batch norm behind it) or linear layer.

    `outputs` (O,) and `inputs` (I,) say which channels remain: weight[outputs][:, inputs] are the weights
    that must still be multiplied, within each group of a grouped convolution. A layer that the network uses
    more than once has the counts of all its uses.
    """

    weight: Tensor  # that the layer computes with
    states: Tensor  # (O,) of ChannelState, int8
    outputs: Tensor  # (O,) bool
    inputs: Tensor  # (I,) bool
    positions: int  # at which each filter is applied: H_out W_out, or 1 for the classifier
    structured_macs: int  # of the weights that remain, for one image
    unstructured_macs: int  # of the weights that are not zero, for one image
    as_stored: bool  # whether each weight stands where the layer stores it: not in one that is transposed

    def with_use(self, other: "LayerChannels") -> "LayerChannels":
        """The layer with one more use: a channel, or a weight, is the most that it is in any of them."""
        weight = self.weight if self.as_stored or not other.as_stored else other.weight
        both = self.as_stored and other.as_stored
        return LayerChannels(
            weight=torch.where(weight != 0, weight, other.weight) if both else weight,
            states=torch.maximum(self.states, other.states),
            outputs=self.outputs | other.outputs,
            inputs=self.inputs | other.inputs,
            positions=self.positions + other.positions,
            structured_macs=self.structured_macs + other.structured_macs,
            unstructured_macs=self.unstructured_macs + other.unstructured_macs,
            as_stored=self.as_stored or other.as_stored,
        )


@dataclass
class Signal:
    """The value of a node of the graph, for one image. Where a node has several, all fields are tuples."""

    constant: Any  # right where the image does not reach
    flow: Any = None  # above 0 where the image reaches; None if it reaches nothing
    paths: Any = None  # to the outputs; None if there is none

    @property
    def varies(self) -> Tensor:
        return self._flags(self.flow)

    @property
    def read(self) -> Tensor:
        """Where an output depends on the value."""
        return self._flags(self.paths)

    def _flags(self, found: Tensor | None) -> Tensor:
        return torch.zeros_like(self.constant, dtype=torch.bool) if found is None else found > 0.5

    @property
    def known(self) -> Any:
        """The constant, with zeros where the image reaches."""
        return self.constant if self.flow is None else self.constant.masked_fill(self.flow > 0, 0)

    def alive(self, dim: int = 1) -> Tensor:
        """The channels along a dimension that depend on the image at a place that is read: (C,) bool."""
        return _channels(self.varies & self.read, dim)


def _channels(flags: Tensor, dim: int) -> Tensor:
    """The channels along a dimension that have a flag: (C,) bool."""
    return flags.movedim(dim, 0).reshape(flags.shape[dim], -1).any(1)


@dataclass
class LayerUse:
    """One place in the graph that a layer is used at."""

    name: str
    node: fx.Node
    out: fx.Node  # the node itself, or the batch norm behind it
    entering: Signal  # `read` is what this use alone reads
    parameters: tuple[Tensor, Tensor | None]  # weight and bias
    norm: tuple[Any, ...] | None = None  # what the batch norm does with it

    @property
    def channel_dim(self) -> int:
        return -1 if kind(self.node) is aten.linear else 1

    @property
    def groups(self) -> int:
        return int(self.node.args[6]) if len(self.node.args) > 6 else 1  # type: ignore[arg-type]

    @torch.no_grad()
    def shift(self, inputs: Tensor) -> Tensor:
        """What the layer gives for one image, batch norm included, when the flagged inputs, (I,) bool, are 0.

        Shapes: those of the layer's node, (1, O, H, W), or (1, O) for the classifier.
        """
        known = self.entering.known.movedim(self.channel_dim, 0).clone()
        known[inputs] = 0
        op: Any = self.node.target
        out = op(known.movedim(0, self.channel_dim), *self.parameters, *self.node.args[3:])
        return out if self.norm is None else aten.batch_norm(out, *self.norm)


@dataclass
class ChannelAccount:
    """What `trace_channels` finds out about the channels of a network."""

    layers: dict[str, LayerChannels]  # every convolution and linear layer that runs, in order
    barriers: tuple[str, ...]  # operations without a rule, and the modules that they are in
    graph: fx.Graph
    signals: dict[fx.Node, Signal]
    uses: dict[fx.Node, tuple[LayerUse, LayerChannels]]


@torch.no_grad()
def read_weights(model: nn.Module, stored: bool = False) -> dict[str, Tensor]:
    """The weights that the convolutions and linear layers compute with, by layer name, without gradients.

    Quantizers that are switched on are applied; with `stored` none is evaluated. They are called directly and
    not through `.weight`: inside `parametrize.cached()` that would cache weights without gradients, which the
    caller's loss would then use.
    """

    def weight(layer: Any) -> Tensor:
        if stored and weight_quantization(layer) is not None:
            return layer.parametrizations.weight.original
        computed = parametrize.is_parametrized(layer, "weight")
        return layer.parametrizations.weight() if computed else layer.weight

    return {name: weight(layer) for name, layer in layers_of(model).items()}


def trace_channels(
    model: nn.Module,
    input_size: tuple[int, int, int] = (3, 32, 32),
    weights: Mapping[str, Tensor] | None = None,
) -> ChannelAccount:
    """Find the state of every channel: forward, what depends on the image; backward, what is read.

    One pass in each direction is exact: whether a channel depends on the image follows from the layers before
    it, and whether it is read follows from the layers behind it. A weight reads its input channel if it is
    not zero, meets more of it than padding, and the batch norm behind its filter has a scale other than 0.

    Arguments: `weights` by layer name, instead of the model's own. Batch norms count as in evaluation mode,
        whatever mode the model is in. The model is not changed.
    Raises: ValueError if torch.export cannot trace the network.
    """
    graph = trace_network(model, input_size)
    values = graph.values(model, read_weights(model) if weights is None else weights)
    return _account(graph, values, input_size)


def trace_in_float64(plain: nn.Module, input_size: tuple[int, int, int]) -> ChannelAccount:
    """As `trace_channels`, but with the constants, weights and biases in float64.

    The states are those of the model's own type: a gate that is 0 in float32 may be 1e-20 in float64, and the
    smaller network has to leave out what was counted as gone.
    """
    graph = trace_network(plain, input_size)
    values = graph.values(plain, read_weights(plain))
    account = _account(graph, values, input_size)
    exact = _account(
        graph, {n: v.double() if v.is_floating_point() else v for n, v in values.items()}, input_size
    )
    for node, signal in account.signals.items():
        signal.constant = exact.signals[node].constant
    for node, (use, _) in account.uses.items():
        of64, _ = exact.uses[node]
        use.entering.constant, use.parameters, use.norm = of64.entering.constant, of64.parameters, of64.norm
    return account


def _account(
    graph: NetworkGraph, values: Mapping[str, Tensor], input_size: tuple[int, int, int]
) -> ChannelAccount:
    with torch.inference_mode(False), torch.enable_grad():
        passes = _Passes(graph, values, input_size)
        passes.forward()
        passes.backward()
    uses = {use.node: (use, passes.account(use)) for use in passes.uses}
    layers: dict[str, LayerChannels] = {}
    for use, channels in uses.values():
        layers[use.name] = layers[use.name].with_use(channels) if use.name in layers else channels
    return ChannelAccount(layers, tuple(passes.barriers), graph.graph, passes.signals, uses)


class _Flags(torch.autograd.Function):
    """1 where there is a path and 0 elsewhere, both ways: the numbers of paths overflow in a deep network."""

    @staticmethod
    def forward(ctx: Any, paths: Tensor) -> Tensor:
        return (paths > 0.5).to(paths.dtype)  # whole numbers, but for rounding

    @staticmethod
    def backward(ctx: Any, paths: Tensor) -> Tensor:
        return (paths > 0.5).to(paths.dtype)


def _pool_pipe(op: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return op(x, *args, **kwargs) * 2.0**24  # a path is less than 1 in a mean


def _max_pool_pipe(
    op: Any, x: Tensor, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Tensor | None:
    """A mean over the same windows, because the gradient of a maximum goes to one of its elements alone."""
    dilated = any(d != 1 for d in ([dilation] if isinstance(dilation, int) else dilation))
    return None if dilated else _pool_pipe(aten.avg_pool2d, x, size, stride, padding, ceil)


PIPES: dict[Any, Callable[..., Any]] = {
    aten.mean: _pool_pipe,
    aten.sum: _pool_pipe,
    aten.avg_pool2d: lambda op, x, *args: _pool_pipe(op, x, *args[:5]),  # a divisor may be negative
    aten.adaptive_avg_pool2d: _pool_pipe,
    aten.max_pool2d: _max_pool_pipe,
    **dict.fromkeys((aten.amax, aten.amin), lambda op, x, dim=(), keepdim=False: x.sum(dim, keepdim)),
}


class _Passes:
    """The two passes of `trace_channels`."""

    def __init__(
        self, network: NetworkGraph, values: Mapping[str, Tensor], input_size: tuple[int, ...]
    ) -> None:
        self.network = network
        self.values = values
        self.input_size = input_size
        self.like = next((v for v in values.values() if v.is_floating_point()), torch.empty(0))
        self.signals: dict[fx.Node, Signal] = {}
        self.uses: list[LayerUse] = []
        self.barriers: list[str] = []
        self.outputs: list[Signal] = []

    def forward(self) -> None:
        for node in self.network.graph.nodes:
            if node.op == "placeholder" and node.name in self.values:
                self.signals[node] = Signal(self.values[node.name])
            elif node.op == "placeholder":
                # Random numbers: of a black image a matrix may have no inverse, and a ratio is no number.
                image = torch.rand(
                    1, *self.input_size, generator=torch.Generator().manual_seed(0), device="cpu"
                )
                image = image.to(self.like)
                self.image, self.signals[node] = node, Signal(image, self._ones(image.shape))
            elif node.op == "output":
                self.outputs = [self.signals[n] for n in node.all_input_nodes]
            elif self._is_layer(node):
                self.signals[node] = self._layer(node)
            else:
                self.signals[node] = self._operation(node)

    def backward(self) -> None:
        reached = [*self.signals.values(), *(use.entering for use in self.uses)]
        reached = [s for s in reached if isinstance(s.flow, Tensor)]
        ends = [s.flow.sum() for s in self.outputs if s.flow is not None]
        flows = [s.flow for s in reached]
        paths = torch.autograd.grad(ends, flows, allow_unused=True) if ends else [None] * len(flows)
        for signal, found in zip(reached, paths, strict=True):
            signal.paths = found

    def _ones(self, shape: Any) -> Tensor:
        return torch.ones(shape, device=self.like.device, requires_grad=True)

    def _flows(self, node: Any) -> bool:
        return self.signals[node].flow is not None

    def _which_flow(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in inputs_of(node) if self._flows(n)]

    def _is_layer(self, node: Any) -> bool:
        """Whether a node is a layer of rows and channels, of which the image reaches the input alone."""
        if kind(node) not in LAYERS or self._which_flow(node) != [node.args[0]]:
            return False
        x, weight = (self.signals[n].constant for n in node.args[:2])
        return bool(weight.ndim == 2 if kind(node) is aten.linear else x.ndim == weight.ndim)

    def _add_barrier(self, node: fx.Node) -> None:
        self.barriers.append(f"{kind(node)} in {path(node) or 'the network'}")

    def _layer(self, node: Any) -> Signal:
        x = self.signals[node.args[0]]
        weight, bias = (n and self.signals[n].constant for n in (*node.args[1:3], None)[:2])
        # A view: its gradient is what this layer alone reads.
        flow = x.flow.view_as(x.flow)
        along = images_along(node.args[0], self.image)
        if along is None or (along > 0 and (kind(node) is not aten.linear or flow.ndim == 2)):
            # An image is several rows: no bias can hold what is another constant in each of them.
            rows = x.known.flatten(0, -2) if kind(node) is aten.linear else x.known
            flow = flow + (rows != rows[:1]).any(0).to(flow.dtype)
        pipe = _Flags.apply(node.target(flow, (weight != 0).to(flow.dtype), None, *node.args[3:]))
        known = x.known
        if known.any():
            constant = node.target(known, weight, bias, *node.args[3:])
        else:
            constant = known.new_zeros(pipe.shape)
            after = 0 if kind(node) is aten.linear else pipe.ndim - 2  # dimensions behind the channels
            constant += 0 if bias is None else bias.view(-1, *[1] * after)
        use = LayerUse(self.network.layer(node), node, node, Signal(x.constant, flow), (weight, bias))
        self.uses.append(use)
        behind = next(iter(node.users), node)
        if (
            len(node.users) == 1
            and is_norm(behind)
            and behind.args[0] is node
            and (kind(node) is not aten.linear or pipe.ndim == 2)  # else its channels are other ones
            and all(n in self.signals and not self._flows(n) for n in behind.all_input_nodes[1:])
        ):
            use.out = behind
            use.norm = fx.node.map_arg(behind.args[1:], lambda n: self.signals[n].constant)
        return Signal(constant, pipe)

    def _operation(self, node: Any) -> Signal:
        """What a node makes of its inputs, which the image may reach."""
        op: Any = node.target
        random = torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())
        product = kind(node) is aten.mul
        args, kwargs = self._args(node, lambda s: s.known if product else s.constant)
        flowing = [self.signals[n] for n in self._which_flow(node)]
        simple = flowing or is_pointwise(node) or is_move(node) or not isinstance(op, torch._ops.OpOverload)
        counter = nullcontext() if simple else FlopCounterMode(display=False)
        with torch.random.fork_rng(devices=[]) if random else nullcontext(), counter:
            try:
                found = op(*args, **kwargs)
            except Exception as error:
                raise ValueError(f"{kind(node)} raises, for an image of random numbers: {error}") from error
        constant: Any = tuple(found) if isinstance(found, list) else found
        if isinstance(constant, Tensor) and constant.is_floating_point():
            constant = constant.to(self.like.dtype)  # one that is made on the way is of torch's default
        if not isinstance(constant, Tensor | tuple) or not (flowing or random):
            if isinstance(counter, FlopCounterMode) and counter.get_total_flops():
                self._add_barrier(node)  # torch counts its multiplications, which no image enters
            return Signal(constant)
        flow = None if random else self._pipe(node, flowing, constant)
        if flow is None:
            self._add_barrier(node)
            entering = [f for s in flowing for f in (s.flow if isinstance(s.flow, tuple) else [s.flow])]
            paths = sum(f.sum() for f in entering if f is not None)
            values: Any = constant if isinstance(constant, tuple) else (constant,)
            flows = tuple(_Flags.apply(self._ones(value.shape) + paths) for value in values)
            flow = flows if isinstance(constant, tuple) else flows[0]
        return Signal(constant, flow)

    def _args(self, node: Any, value: Callable[[Signal], Any]) -> tuple[Any, Any]:
        return fx.node.map_arg((node.args, node.kwargs), lambda n: value(self.signals[n]))

    def _pipe(self, node: Any, flowing: list[Signal], constant: Any) -> Any:
        """The flow behind an operation that has a rule, else None."""

        def flow_of(n: Any) -> Any:
            if not isinstance(n, fx.Node):
                return constant.new_zeros(())
            s = self.signals[n]
            return torch.zeros(s.constant.shape, device=self.like.device) if s.flow is None else s.flow

        if is_move(node):
            numbers = all(isinstance(s.flow, tuple) or s.constant.is_floating_point() for s in flowing)
            return move(node, flow_of, lambda n: self.signals[n].constant) if numbers else None
        if kind(node) is aten.where and not self._flows(node.args[0]):
            mask = self.signals[node.args[0]].constant
            return torch.where(mask, *map(flow_of, node.args[1:]))
        if kind(node) is aten.mul:
            return _Flags.apply(self._product(*node.args).expand(constant.shape))
        if is_pointwise(node):
            if len(flowing) == 1 and flowing[0].flow.shape == constant.shape:
                return flowing[0].flow
            return _Flags.apply(sum(s.flow for s in flowing).expand(constant.shape))
        if is_norm(node) and len(flowing) == 1 and self._flows(node.args[0]):
            scale = self._args(node, lambda s: s.constant)[0][1]
            x = flowing[0].flow
            return x if scale is None else _Flags.apply(x * (scale != 0).view(-1, *[1] * (x.ndim - 2)))
        if kind(node) in PIPES and len(flowing) == 1 and self._flows(node.all_input_nodes[0]):
            args, _ = self._args(node, lambda s: s.constant if s.flow is None else s.flow)
            kwargs = {name: value for name, value in node.kwargs.items() if name != "dtype"}
            paths = PIPES[kind(node)](node.target, *args, **kwargs)
            return None if paths is None else _Flags.apply(paths)
        return None

    def _product(self, *factors: Any) -> Any:
        """A factor that is known to be zero lets nothing of the other through."""
        signals = (self.signals[f] if isinstance(f, fx.Node) else Signal(f) for f in factors)
        a, b = (s if isinstance(s.constant, Tensor) else Signal(torch.as_tensor(s.constant)) for s in signals)
        opens = [(s.known != 0) | s.varies for s in (b, a)]
        return sum(s.flow * o for s, o in zip((a, b), opens, strict=True) if s.flow is not None)

    @torch.no_grad()
    def account(self, use: LayerUse) -> LayerChannels:
        """Decide the states of a layer's channels at one of its uses."""
        weight, out, dim = use.parameters[0], self.signals[use.out], use.channel_dim
        alive, inputs = out.alive(dim), use.entering.alive(dim)
        speaks = _channels(self._spoken(use.out).known != 0, dim)
        states = torch.zeros_like(alive, dtype=torch.int8)  # NULL
        states[_channels(out.read, dim) & speaks] = ChannelState.CONSTANT
        states[alive] = ChannelState.ALIVE
        left = (alive.view(use.groups, -1).sum(1) * inputs.view(use.groups, -1).sum(1)).sum()
        positions = out.constant.numel() // len(weight)
        macs = int(left) * weight[0, 0].numel() * positions
        nonzero = int(weight.count_nonzero())
        as_stored = self.network.weighs_as_stored(use.node)
        return LayerChannels(weight, states, alive, inputs, positions, macs, nonzero * positions, as_stored)

    def _spoken(self, node: Any) -> Signal:
        """What others get of a node: its value, behind the activation if nothing else reads it."""
        behind = next(iter(node.users), node)
        if len(node.users) == 1 and is_pointwise(behind) and len(behind.all_input_nodes) == 1:
            return self._spoken(behind)
        return self.signals[node]
