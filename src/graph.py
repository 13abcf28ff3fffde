"""The graph of a network's operations in evaluation mode, traced once for all the weights that it may have.

It is torch.export's ATen graph, not torch.fx's: operations in place are functions there, and own forwards,
hooks, activations with a slope, circular padding and modules used twice all stand in it as what they compute.
Parameters are inputs of the graph, which keep their names.
"""

import contextlib
import io
import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from utils_quantization import quantized_layers, without_quantizers

aten = torch.ops.aten
Hook = TypeVar("Hook", bound=Callable[..., Any])

LAYERS = {aten.conv1d, aten.conv2d, aten.conv3d, aten.linear}
NORM = aten._native_batch_norm_legit_no_training
PADS = {aten.pad, aten.constant_pad_nd}
# What only moves elements, next to the views, which say so themselves.
_MOVES = """
    cat stack index index_select flip roll repeat copy slice_scatter select_scatter reflection_pad2d
    replication_pad2d pixel_shuffle pixel_unshuffle channel_shuffle upsample_nearest2d
"""
MOVES: set[Any] = {operator.getitem, *PADS, *(getattr(aten, name) for name in _MOVES.split())}


@dataclass(frozen=True)
class NetworkGraph:
    """A traced network: its graph, and where the graph's inputs come from."""

    graph: fx.Graph
    state: dict[str, str]  # the name of each parameter or buffer, by the name of its node
    constants: dict[str, Tensor]  # tensors that are no parameter or buffer, by the name of their node
    kept: tuple[Any, ...]  # what the fingerprint names by its id

    def layer(self, node: Any) -> str:
        """The name of the layer that a convolution or linear operation is: that of its weight's owner."""
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        return self.state[weight.name].removesuffix(".weight") if weight.name in self.state else path(node)

    def values(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The graph's inputs but the image, by the name of their node; `weights` are by layer name."""
        state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        state |= dict(model.named_buffers(remove_duplicate=False))
        state |= {f"{name}.weight": weight for name, weight in weights.items()}
        like = next(model.parameters(), torch.empty(0))
        constants = {n: t.to(like.dtype) if t.is_floating_point() else t for n, t in self.constants.items()}
        return constants | {node: state[name].detach() for node, name in self.state.items()}


def kind(node: Any) -> Any:
    """The operation of a node, whichever of its overloads."""
    return _kind(node.target)


@cache
def _kind(target: Any) -> Any:
    return getattr(target, "overloadpacket", target)


def path(node: Any) -> str:
    """The name of the module that a node was traced in."""
    return next(reversed(node.meta.get("nn_module_stack", {"": ("", "")}).values()))[0]


@cache
def is_pointwise(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ())


@cache
def is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


@cache
def is_move(target: Any) -> bool:
    """Whether an operation only moves elements: each of its outputs is an element of an input, or padding."""
    schema = getattr(target, "_schema", None)
    return _kind(target) in MOVES or (schema is not None and any(r.alias_info for r in schema.returns))


def move(node: Any, args: Any, kwargs: Any) -> Any:
    """Do what a node that moves elements does; it pads with 0, whatever it pads with in the network."""
    if kind(node) in PADS and len(args) + len(kwargs) > 2:
        args, kwargs = (args[:3] if kind(node) is aten.pad else args[:2]), {}
    return node.target(*args, **kwargs)


def only_looks(hook: Hook) -> Hook:
    """Mark a hook of a module as one that changes no tensor: the graph is traced without it."""
    hook.only_looks = True  # type: ignore[attr-defined]
    return hook


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_hooks, module._forward_pre_hooks]


_TRACED: dict[Hashable, NetworkGraph] = {}
_MOST = 64  # graphs that are remembered


@torch.no_grad()
def trace_network(model: nn.Module, input_size: tuple[int, int, int]) -> NetworkGraph:
    """The graph of the model without its quantizers; a model of the same structure is traced only once.

    A graph that names no dtype is that of the model in any dtype.
    Raises: ValueError if torch.export cannot trace the network.
    """
    like = next(model.parameters(), torch.empty(0))
    parts, kept = _fingerprint(model)
    keys = [(parts, input_size, like.device, dtype) for dtype in (None, like.dtype)]
    key = next((key for key in keys if key in _TRACED), None)
    if key is None:
        plain = without_quantizers(model, stored=True).eval()
        for hooks in (hooks for module in plain.modules() for hooks in _hooks(module)):
            for handle in [h for h, hook in hooks.items() if hasattr(hook, "only_looks")]:
                del hooks[handle]
        images = torch.zeros(2, *input_size, dtype=like.dtype, device=like.device)
        # Two images, of any number: torch.export takes a number of one for the only one that there can be.
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph of what it cannot trace
                program = torch.export.export(plain, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
                program = program.run_decompositions({})
        except Exception as error:
            name, reason = type(model).__name__, str(error).strip().partition("\n")[0]
            raise ValueError(f"torch.export cannot trace {name} on images {input_size}: {reason}") from error
        while len(_TRACED) >= _MOST:
            del _TRACED[next(iter(_TRACED))]
        graph = _graph(program, kept)
        key = keys[_names_a_dtype(graph)]
        _TRACED[key] = graph
    return _TRACED[key]


def _names_a_dtype(graph: NetworkGraph) -> bool:
    values = (value for node in graph.graph.nodes for value in (*node.args, *node.kwargs.values()))
    return any(isinstance(value, torch.dtype) for value in values)


def _graph(program: torch.export.ExportedProgram, kept: tuple[Any, ...]) -> NetworkGraph:
    state: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            state[spec.arg.name] = str(spec.target)
        elif spec.kind is not InputKind.USER_INPUT:
            constants[spec.arg.name] = program.constants[str(spec.target)].detach().clone()
    program.graph.eliminate_dead_code()
    for node in program.graph.nodes:
        if kind(node) in (aten.view, aten._unsafe_view):  # flows may lie in memory in another order
            node.target = aten.reshape.default
    return NetworkGraph(program.graph, state, constants, kept)


_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def _fingerprint(model: nn.Module) -> tuple[Hashable, tuple[Any, ...]]:
    """All that the graph of a model can depend on, and the objects in it that are only named by their id.

    Quantizers are left out, and the values of weights: both may change from count to count.
    """
    quantized = quantized_layers(model)
    inside = tuple(f"{name}.parametrizations" for name in quantized)
    parts: list[Hashable] = []
    kept: list[Any] = []

    def part(value: Any) -> Hashable:
        if isinstance(value, int | float | str | None):
            return value
        if isinstance(value, list | tuple):
            return (type(value), *map(part, value))
        kept.append(value)
        return id(value)

    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        of_weights: Any = module.parametrizations.weight.original if name in quantized else None
        tensors = {**module._parameters, **module._buffers} | (
            {"weight": of_weights} if name in quantized else {}
        )
        parts += [name, type(module).__bases__[0] if name in quantized else type(module)]
        parts += sorted((n, t.shape) for n, t in tensors.items() if t is not None)
        parts += [(k, part(v)) for k, v in vars(module).items() if k not in _OF_ANY_MODULE]
        hooks = [hook for hooks in _hooks(module) for hook in hooks.values()]
        parts += [part(hook) for hook in hooks if not hasattr(hook, "only_looks")]
    return tuple(parts), tuple(kept)
