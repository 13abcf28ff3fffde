"""The smaller network: a plain module without quantizers, from which all removable channels are removed.

It gives the logits of the (fake-quantized) network in evaluation mode, to the rounding of its dtype, and does
exactly the multiplications that `metrics.py` counts as structured MACs. src/channels.py decides which
channels are removed:

    alive      is kept, in a smaller convolution with the batch norm folded in
    constant   is removed and added to the shift of each layer that reads it: a number a channel or, beside
               zero padding, where a filter meets fewer copies of the constant, a map
    null       is removed

Weights are (O, I, kh, kw), activations (N, C, H, W). Layers keep the names that they have in the network.

The network's graph is built anew, operation by operation. A tensor there holds only some of its channels,
wherever an operation treats each channel by itself; any other operation gets its inputs whole again, with
the constants in their places.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_structure, tree_unflatten

from src.channels import PIPES, LayerChannels, LayerUse, trace_in_float64
from src.graph import (
    REDUCTIONS,
    aten,
    images_along,
    inputs_of,
    is_move,
    is_norm,
    is_number_of_images,
    is_pointwise,
    kind,
    move,
    reduced_dims,
    trace_network,
)
from utils_quantization import without_quantizers

_LEAF = tree_structure(0)  # of what a network gives that gives one tensor
CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}  # by the dimensions of a weight


@torch.no_grad()
def slim_network(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """Make the smaller network of a model, quantized or not, in its dtype and on its device.

    The model counts as in evaluation mode, whatever mode it is in, and is not changed. Constants and batch
    norms are folded in float64. If a shift is a map, the network takes images of `input_size` only.

    Raises: ValueError if torch.export cannot trace the model.
    """
    like = next(model.parameters(), torch.empty(0))
    builder = _Builder(without_quantizers(model).cpu(), input_size)
    return builder.network().to(like.device, like.dtype).eval()


class ChannelSelection(nn.Module):
    """Selects channels by their numbers, in the given order; number `channels` selects a channel of zeros.

    >>> ChannelSelection(torch.tensor([2, 0, 3]), channels=3)(torch.tensor([[5.0, 6.0, 7.0]]))
    tensor([[7., 5., 0.]])

    Shapes: (N, C, ...) -> (N, len(index), ...), or (..., C) -> (..., len(index)) where `dim` is -1.
    """

    index: Tensor

    def __init__(self, index: Tensor, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.with_zeros = bool((index == channels).any())
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        if self.with_zeros:
            x = torch.cat([x, torch.zeros_like(x.narrow(self.dim, 0, 1))], self.dim)
        return x.index_select(self.dim, self.index)


class Shift(nn.Module):
    """Adds a number to each channel, or a map (O, H, W), which is stored without repeated rows and columns.

    A map mostly differs from a single number only in the outermost pixels, beside zero padding: 3 x 3 stored
    numbers a channel are typical.

    Shapes: (N, O, H, W) -> the same.
    """

    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        rows = columns = None
        if shift.ndim == 3:
            shift, rows = shift.unique(dim=1, return_inverse=True)
            shift, columns = shift.unique(dim=2, return_inverse=True)
        is_map = shift.ndim == 3 and shift[0].numel() > 1
        self.values = _stored(shift)  # (O, h, w)
        self.register_buffer("rows", rows if is_map else None)
        self.register_buffer("columns", columns if is_map else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None or self.columns is None:
            return x + self.values
        return x + self.values.index_select(1, self.rows).index_select(2, self.columns)


class SlimLayer(nn.Module):
    """A convolution or linear layer with its batch norm folded in: it reads some of the channels it is given.

    `bias` is what it adds if that is a number a channel.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, reads: nn.Module, options: tuple[Any, ...]) -> None:
        super().__init__()
        self.reads, self.options = reads, options
        self.weight = nn.Parameter(weight.contiguous())
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reads(x)
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        return CONVOLUTIONS[self.weight.ndim](x, self.weight, self.bias, *self.options)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]} channels"


class SlimParts(nn.Module):
    """A grouped convolution whose groups keep different numbers of channels: a part for each of these."""

    def __init__(self, parts: list[SlimLayer]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


class Zeros(nn.Module):
    """A dead layer, of which an image is several rows.

    Shapes: (N, I, ...) -> (N, O, *positions), or (..., I) -> (..., O) where `positions` is None.
    """

    def __init__(self, channels: int, positions: torch.Size | None) -> None:
        super().__init__()
        self.channels, self.positions = channels, positions

    def forward(self, x: Tensor) -> Tensor:
        if self.positions is None:
            return x.new_zeros(*x.shape[:-1], self.channels)
        return x.new_zeros(x.shape[0], self.channels, *self.positions)


class Constant(nn.Module):
    """The same values for every image, or for a network with nothing left the same logits."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = _stored(values)

    def forward(self, x: Tensor) -> Tensor:
        return self.values.repeat(x.shape[0], *[1] * self.values.ndim)


def _stored(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.contiguous(), requires_grad=values.is_floating_point())


@dataclass
class _Held:
    """A tensor of the network as the smaller network has it: some of its channels."""

    index: Tensor  # (C,) where the node holds each channel, -1 where it does not
    node: fx.Node | None = None  # of the smaller network; None if it holds nothing
    count: int = 0  # channels of the node


class _Builder:
    """Builds the smaller network in float64, on the CPU; it will be of another dtype in the end."""

    def __init__(self, plain: nn.Module, input_size: tuple[int, int, int]) -> None:
        self.account = trace_in_float64(plain, input_size)
        network = trace_network(plain, input_size)
        names, self.answers = network.state, network.answers
        parameters = dict(plain.named_parameters(remove_duplicate=False))
        self.parameters = {node for node, name in names.items() if name in parameters}
        self.signals, self.uses = self.account.signals, self.account.uses
        self.graph, self.parts = fx.Graph(), dict[str, Any]()
        self.held: dict[fx.Node, Any] = {}
        self.image: Any = None
        self.entry = next(n for n in self.account.graph.nodes if self.signals[n].flow is not None)

    def network(self) -> nn.Module:
        layers = {use.out: (use, channels) for use, channels in self.uses.values()}
        folded = {use.node for use, _ in self.uses.values() if use.norm}
        *nodes, output = self.account.graph.nodes
        for node in nodes:
            signal = self.signals[node]
            if node.op == "placeholder" and signal.flow is not None:
                self.image = self.graph.placeholder("x")
                self.held[node] = self._all_of(signal.constant, self.image)
            elif node in layers:
                self.held[node] = self._layer(*layers[node])
            elif is_number_of_images(node, self.entry):
                self.held[node] = self.graph.call_function(node.target, (self.image, 0))
            elif signal.flow is not None or not isinstance(signal.constant, Tensor | tuple):
                self.held[node] = None if node in folded else self._operation(node)
            elif isinstance(signal.constant, Tensor) and any(n in self.held for n in node.all_input_nodes):
                # A constant made of the number of images has to be made anew for each batch.
                self.held[node] = self._all_of(signal.constant, self._call(node, self._given))
        (answers,) = output.args
        first = self.signals.get(answers[0])
        if self.answers == _LEAF and first is not None and not first.alive(0).any():
            return Constant(first.constant[0].clone())
        self.graph.output(tree_unflatten(fx.node.map_arg(answers, self._given), self.answers))
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        return fx.GraphModule(self.parts, self.graph, "SlimNetwork")

    # What the smaller network computes with

    def _images_along(self, node: fx.Node) -> int | None:
        return images_along(node, self.entry)

    def _module(self, name: str, module: nn.Module, x: Any) -> fx.Node:
        if isinstance(module, nn.Identity):
            return x
        first = name.partition(".")[0]
        # The module that the graph becomes has such names itself, and a part its own attributes.
        taken = first in ("meta", "self") or hasattr(fx.GraphModule, first)
        if taken or any(f"{a}.".startswith(f"{b}.") for p in self.parts for a, b in ((name, p), (p, name))):
            name = f"{name.replace('.', '_')}_{len(self.parts)}"
        self.parts[name] = module
        return self.graph.create_node("call_module", name, (x,))

    def _constant(self, name: str, node: fx.Node, value: Tensor) -> fx.Node:
        """Store the value of a node, a parameter as one: of complex numbers both parts, as `Module.to` casts
        them to real ones."""
        stored = (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).contiguous()
        self.parts[name] = nn.Parameter(stored) if node.name in self.parameters else stored
        got = self.graph.get_attr(name)
        return self.graph.call_function(aten.view_as_complex.default, (got,)) if value.is_complex() else got

    def _select(self, node: Any, wanted: Tensor) -> Any:
        """These channels of a node, with zeros for those that are not held; None where none is."""
        held: _Held = self.held[node]
        index = held.index[wanted]
        if (index < 0).all():
            return None
        return self._module(f"{node.name}_chosen", _selection(index, held.count), held.node)

    def _shifted(self, node: Any, x: Any, shift: Tensor) -> Any:
        return self._module(f"{node.name}_shift", Shift(shift), x) if shift.any() else x

    def _rest(self, node: Any, wanted: Tensor) -> Tensor:
        """What these channels of a node lack, (C, H, W): the constants of those that are not held."""
        known = self.signals[node].known[0][wanted]
        known[self.held[node].index[wanted] >= 0] = 0
        return known

    def _whole(self, node: Any, wanted: Tensor | None = None) -> Any:
        """A tensor of the network with all its channels, or with those `wanted`, constants and all."""
        signal = self.signals[node]
        if signal.flow is None and node not in self.held:
            return self._constant(f"{node.name}_constant", node, signal.constant)
        if signal.flow is None or signal.constant.ndim < 2:
            return self.held[node].node
        wanted = torch.arange(len(self.held[node].index)) if wanted is None else wanted
        x, rest = self._select(node, wanted), self._rest(node, wanted)
        if x is None:
            return self._module(f"{node.name}_constant", Constant(rest), self.image)
        return self._shifted(node, x, rest)

    def _holding(self, node: Any, made: Any, channels: Tensor) -> _Held:
        """What holds the numbered channels of a node, in their order."""
        index = torch.full([self.signals[node].constant.shape[1]], -1)
        index[channels] = torch.arange(len(channels))
        return _Held(index, made, len(channels))

    # The operations

    def _layer(self, use: LayerUse, channels: LayerChannels) -> _Held:
        """The smaller version of a layer and its batch norm."""
        weight, bias = use.parameters
        dead = not channels.outputs.any()
        if dead and self._images_along(use.out) == 0:
            return self._holding(use.out, None, torch.arange(0))
        if use.norm is not None:
            weight = weight * _scale(use.norm).view(-1, *[1] * (weight.ndim - 1))
        source: Any = use.node.args[0]
        whole = weight.ndim == 2 and (use.entering.constant.ndim > 2 or self._images_along(source) != 0)
        shift = use.shift(channels.inputs)
        if not whole:
            shift = shift[0]
        elif self._images_along(use.node) is None:  # its channels lie last, and each image has several rows
            shift = shift.flatten(0, -2)[:1]
        # It may read constants: those that differ from row to row.
        whole_input = whole or dead or bool((self.held[source].index[channels.inputs] < 0).any())
        count = len(channels.inputs)
        every = torch.arange(count)
        held = _Held(every, self._whole(source), count) if whole_input else self.held[source]
        options = (*use.node.args[3:6], *(1, 0, 1)[len(use.node.args[3:6]) :])  # stride, padding, dilation
        layers, numbers = [], []
        for outputs, inputs in _alike(channels, use.groups):
            kept = [weight[o][:, i % weight.shape[1]] for o, i in zip(outputs, inputs, strict=True)]
            reads = _selection(held.index[torch.cat(inputs)], held.count, -1 if whole else 1)
            layers.append(SlimLayer(torch.cat(kept), reads, (*options, len(outputs))))
            numbers += outputs
        name = use.name or use.node.name
        if dead:
            part: nn.Module = Zeros(len(weight), None if whole else self.signals[use.node].constant.shape[2:])
            numbers = [torch.arange(len(weight))]
        else:
            part = layers[0] if len(layers) == 1 else SlimParts(layers)
        made, order = self._module(name, part, held.node), torch.cat(numbers)
        if whole:
            places = torch.full([len(weight)], -1).index_copy(0, order, torch.arange(len(order)))
            made = self._module(f"{name}_places", _selection(places, len(order), -1), made)
            made = self._shifted(use.node, made, shift)
            return self._holding(use.out, made, torch.arange(self.signals[use.out].constant.shape[1]))
        shift = shift[order]
        flat = shift.view(len(order), -1)
        if not layers or (flat != flat[:, :1]).any():
            made = self._shifted(use.node, made, shift)
        elif bias is not None or use.norm is not None or shift.any():
            biases = flat[:, 0].split([len(layer.weight) for layer in layers])
            for layer, numbers_of_it in zip(layers, biases, strict=True):
                layer.bias = nn.Parameter(numbers_of_it.clone())
        return self._holding(use.out, made, order)

    def _operation(self, node: Any) -> Any:
        """The smaller version of an operation, by the first rule that holds for it."""
        value = self.signals[node].constant
        flowing = (n for n in inputs_of(node) if self.signals[n].flow is not None)
        first = all(self._images_along(n) == 0 for n in (node, *flowing))
        if first and isinstance(value, Tensor) and value.ndim > 1 and not value.is_complex():
            alive = self.signals[node].alive()
            if not alive.any():
                return self._holding(node, None, torch.arange(0))
            for rule in (self._sum, self._cat, self._flatten, self._moved_channels, self._by_channel):
                if (held := rule(node, alive.nonzero().flatten())) is not None:
                    return held
        if first and isinstance(value, tuple) and (held := self._moved_channels(node)) is not None:
            return held
        if node.target is getitem and isinstance(self.held[node.args[0]], tuple):
            return self.held[node.args[0]][node.args[1]]
        made = self._call(node, self._given)
        if isinstance(value, tuple):
            parts = (self.graph.call_function(getitem, (made, i)) for i in range(len(value)))
            return tuple(map(self._all_of, value, parts))
        return self._all_of(value, made) if isinstance(value, Tensor) else made

    def _call(self, node: Any, given: Callable[[fx.Node], Any]) -> fx.Node:
        """The operation of a node, on what `given` makes of its inputs.

        It was traced on the CPU: where it names that, it gets the device that the image is on.
        """

        def named(value: Any) -> Any:
            is_device = isinstance(value, torch.device)
            return self.graph.call_function(getattr, (self.image, "device")) if is_device else value

        arguments = fx.node.map_arg((node.args, node.kwargs), given)
        return self.graph.call_function(node.target, *fx.node.map_aggregate(arguments, named))

    def _given(self, node: Any) -> Any:
        """An argument of an operation: a whole tensor, or what is none."""
        return self._whole(node) if isinstance(self.signals[node].constant, Tensor) else self.held[node]

    @staticmethod
    def _all_of(value: Tensor, made: fx.Node) -> _Held:
        count = value.shape[1] if value.ndim > 1 else 1
        return _Held(torch.arange(count), made, count)

    def _sum(self, node: Any, wanted: Tensor) -> _Held | None:
        """A sum, to which what its terms do not hold is added at last."""
        value = self.signals[node].constant
        if kind(node) is not aten.add or node.kwargs or not value.is_floating_point():
            return None  # of truth values the sum is another
        terms: Any = [t for t in node.args if isinstance(t, fx.Node) and self.signals[t].flow is not None]
        if len(terms) < 2 or any(self.signals[t].constant.shape != value.shape for t in terms):
            return None
        held = [x for t in terms if (x := self._select(t, wanted)) is not None]
        made = held[0] if len(held) == 1 else self.graph.call_function(node.target, tuple(held))
        rest: Any = sum(self._rest(t, wanted) for t in terms)
        return self._holding(node, self._shifted(node, made, rest), wanted)

    def _cat(self, node: Any, wanted: Tensor) -> _Held | None:
        if kind(node) is not aten.cat or node.args[1:] != (1,):
            return None
        index, made, count = [], [], 0
        for source in node.args[0]:
            held = self.held.get(source) or _Held(torch.full(self.signals[source].constant.shape[1:2], -1))
            index.append(torch.where(held.index >= 0, held.index + count, -1))
            made += [held.node] if held.node is not None else []
            count += held.count
        cat = made[0] if len(made) == 1 else self.graph.call_function(node.target, (made, 1))
        return _Held(torch.cat(index), cat, count)

    def _flatten(self, node: Any, wanted: Tensor) -> _Held | None:
        """(N, C, H, W) -> (N, C H W): a channel becomes as many as it has positions."""
        value, source = self.signals[node].constant, node.all_input_nodes[0]
        before = self.signals[source].constant
        if kind(node) not in (aten.reshape, aten.flatten) or value.ndim != 2 or before.ndim < 3:
            return None
        if value.shape[1] != before[0].numel():
            return None
        held, places = self.held[source], before[0, 0].numel()
        index = held.index[:, None] * places + torch.arange(places)
        made = self.graph.call_function(aten.flatten.using_ints, (held.node, 1))
        return _Held(torch.where(held.index[:, None] >= 0, index, -1).flatten(), made, held.count * places)

    def _by_channel(self, node: Any, wanted: Tensor) -> _Held | None:
        """What treats each channel by itself works on the channels that are wanted."""
        value, sources = self.signals[node].constant, node.all_input_nodes
        before = self.signals[sources[0]].constant
        if not is_pointwise(node) and not is_norm(node):
            same = isinstance(before, Tensor) and before.ndim == 4 and before.shape[1] == value.shape[1]
            if not same or (kind(node) in REDUCTIONS and any(d < 2 for d in reduced_dims(node))):
                return None
            if kind(node) not in PIPES and not self._keeps_channels(node, wanted):
                return None

        def argument(source: fx.Node) -> Any:
            signal = self.signals[source]
            if not isinstance(signal.constant, Tensor):
                return self.held[source]
            axis = 1 + (signal.constant.ndim - value.ndim) * is_pointwise(node)  # of the channels
            if kind(node) in (aten.prelu, aten.batch_norm) and source is not node.args[0]:
                axis = 0
            if axis < 0 or signal.constant.shape[axis] != value.shape[1]:
                return self._whole(source)
            if signal.flow is not None and axis == 1:
                return self._whole(source, wanted)
            chosen = signal.constant.index_select(axis, wanted)
            return self._constant(f"{node.name}_{source.name}", source, chosen)

        made: Any = self._call(node, argument)
        again = kind(node) is aten.relu and made.args[0].target == node.target
        return self._holding(node, made.args[0] if again else made, wanted)

    def _origins(self, node: Any, wanted: Tensor | None = None) -> list[Tensor] | None:
        """Of what only moves the elements of one tensor: where each comes from, 0 for a padding.

        With `wanted` the tensor has these of its channels alone.
        """
        sources = [n for n in inputs_of(node) if self.signals[n].flow is not None]
        before = self.signals[sources[0]].constant if is_move(node) and len(sources) == 1 else None
        if not isinstance(before, Tensor) or not before.is_floating_point() or before.ndim < 2:
            return None
        numbers = torch.arange(1.0, before.numel() + 1, dtype=torch.float64).view(before.shape)
        numbers = numbers if wanted is None else numbers[:, wanted]

        def number(n: fx.Node) -> Tensor:
            return numbers if n is sources[0] else torch.zeros(self.signals[n].constant.shape)

        moved = move(node, number, lambda n: self.signals[n].constant)
        return [m.long() for m in (moved if isinstance(moved, tuple) else [moved])]

    def _keeps_channels(self, node: Any, wanted: Tensor) -> bool:
        """Whether a move of these channels alone gives what it gives of them among all."""
        try:
            all_of_them, few = self._origins(node), self._origins(node, wanted)
        except (RuntimeError, IndexError):  # it names channels, or their number
            return False
        return all_of_them is not None and few is not None and torch.equal(few[0], all_of_them[0][:, wanted])

    def _moved_channels(self, node: Any, wanted: Tensor | None = None) -> Any:
        """What selects whole channels, or channels of padding, only changes where they are held."""
        if (origins := self._origins(node)) is None:
            return None
        source = next(n for n in node.all_input_nodes if self.signals[n].flow is not None)
        before, held, made = self.signals[source].constant[0], self.held[source], []
        for moved in origins:
            if moved.ndim != before.ndim + 1 or moved.shape[2:] != before.shape[1:]:
                return None
            positions = before[0].numel()
            flat = moved[0].reshape(len(moved[0]), positions)
            first = flat[:, :1]
            whole = (first > 0) & ((first - 1) % positions == 0)
            if not torch.equal(flat, torch.where(whole, first + torch.arange(positions), 0)):
                return None
            index = torch.where(whole[:, 0], held.index[(first[:, 0] - 1) // positions], -1)
            made.append(_Held(index, held.node, held.count))
        return tuple(made) if isinstance(self.signals[node].constant, tuple) else made[0]


def _scale(norm: tuple[Any, ...]) -> Tensor:
    """What a batch norm multiplies each channel by, from its arguments."""
    scale, _, _, variance, _, _, eps, _ = norm
    return (torch.ones_like(variance) if scale is None else scale) / torch.sqrt(variance + eps)


def _alike(channels: LayerChannels, groups: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The numbers of the outputs and the inputs left in each group, for groups with as many left together."""
    sizes: dict[tuple[int, int], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    flags = [t.view(groups, -1) for t in (channels.outputs, channels.inputs)]
    for group, left in enumerate(zip(*flags, strict=True)):
        outputs, inputs = (t.nonzero().flatten() + group * len(t) for t in left)
        if len(outputs) and len(inputs):
            alike = sizes[len(outputs), len(inputs)]
            alike[0].append(outputs)
            alike[1].append(inputs)
    return list(sizes.values())


def _selection(index: Tensor, count: int, dim: int = 1) -> nn.Module:
    """Make a module that selects channels of `count` by their places, -1 for a channel of zeros."""
    if torch.equal(index, torch.arange(count)):
        return nn.Identity()
    return ChannelSelection(torch.where(index >= 0, index, count), count, dim)
