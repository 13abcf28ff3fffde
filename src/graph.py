"""The graph of a network's operations in evaluation mode, traced once for all the weights that it may have.

It is torch.export's ATen graph, not torch.fx's: own forwards, hooks, activations with a slope, circular
padding and modules used twice all stand in it as what they compute. Operations in place become functions,
and casts between floating types are left out: all is computed in the type of the weights. Parameters are
inputs of the graph, and keep their names.
"""

import contextlib
import copy
import io
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import TreeSpec, tree_leaves

from utils_quantization import layer_name, quantized_layers, weight_name, without_quantizers

aten = torch.ops.aten
Hook = TypeVar("Hook", bound=Callable[..., Any])

LAYERS = {aten.conv1d, aten.conv2d, aten.conv3d, aten.linear}
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
DROPOUTS = {getattr(aten, name + end) for name in _DROPOUTS for end in ("", "_")}
# What gives each element of a tensor as it is, perhaps as another type.
COPIES = {aten.to, aten._to_copy, aten.type_as, aten.detach, aten.alias, aten.contiguous, aten.clone}
# Views that read the same bytes as other numbers.
READ_ANEW = {aten.view_as_real.default, aten.view_as_complex.default}
PADS = {aten.pad, aten.constant_pad_nd}
REDUCTIONS = {aten.mean, aten.sum, aten.amax, aten.amin}
# Other names of the same operations.
SAME = {
    aten.concat: aten.cat,
    aten.concatenate: aten.cat,
    aten.multiply: aten.mul,
    aten.subtract: aten.sub,
    aten.divide: aten.div,
    aten.true_divide: aten.div,
    aten.view_as: aten.reshape_as,
}
# What lends its second operand no more than a shape or a type.
LEND = {aten.expand_as, aten.reshape_as, aten.type_as}
# Elementwise operations that torch does not mark so.
_POINTWISE = {aten.hardswish, aten.log_sigmoid, aten.where, aten.masked_fill, aten.prelu}
# What only moves elements, next to the views, which say so themselves.
_MOVES = """
    cat stack index index_select flip roll repeat slice_scatter select_scatter reflection_pad2d
    replication_pad2d pixel_shuffle pixel_unshuffle channel_shuffle upsample_nearest2d tile triu tril
    repeat_interleave
"""
# Moves of the elements of their second argument too; the numbers in any other argument only say where to.
_INTO = {aten.slice_scatter, aten.select_scatter}
MOVES: set[Any] = {operator.getitem, *PADS, *(getattr(aten, name) for name in _MOVES.split())}


@dataclass(frozen=True)
class NetworkGraph:
    """A traced network: its graph, and where the graph's inputs come from."""

    graph: fx.Graph
    state: dict[str, str]  # the name of each parameter or buffer, by the name of its node
    constants: dict[str, Tensor]  # tensors that are no parameter or buffer, by the name of their node
    names: frozenset[str]  # of the network's modules, parameters and buffers
    answers: TreeSpec  # what the network gives: a tensor, or what holds several
    kept: tuple[Any, ...]  # what the fingerprint names by its id, held so that nothing else gets that id

    def layer(self, node: Any) -> str:
        """The name of the layer that a convolution or linear operation is: that of its weight's owner.

        A weight may be computed, from one that is stored or from others.
        """
        sources = [node.args[1]]
        if sources[0].name in self.state:
            return layer_name(self.state[sources[0].name])
        for source in sources:  # which grows
            sources += [n for n in source.all_input_nodes if n not in sources]
        shape = node.args[1].meta["val"].shape
        stored = [
            self.state[n.name] for n in sources if n.name in self.state and n.meta["val"].shape == shape
        ]
        owners = [layer_name(name) for name in stored if layer_name(name) != name]
        if len(owners) == 1:
            return owners[0]
        # The module's name, where it computes with one such weight alone.
        weights = {n.args[1] for n in self.graph.nodes if kind(n) in LAYERS and path(n) == path(node)}
        if len(weights) == 1 and path(node) and f"{path(node)}.weight" not in self.names:
            return path(node)
        name = f"{path(node)}.{node.name}".lstrip(".")
        while name in self.names:
            name += "_"
        return name

    def weighs_as_stored(self, node: Any) -> bool:
        """Whether a layer's weights stand where it stores them: each is made of its own, as by a mask."""
        layer, shape = self.layer(node), _shape(node.args[1])

        def stored(source: fx.Node) -> bool:
            if source.name in self.state:
                return self.state[source.name].rpartition(".")[0] == layer
            alike = (n for n in source.all_input_nodes if getattr(n.meta.get("val"), "shape", None) == shape)
            return is_pointwise(source) and any(map(stored, alike))

        return stored(node.args[1])

    def computing_their_weights(self) -> list[str]:
        """The names of layers that compute with other weights than they store."""
        layers = (node for node in self.graph.nodes if kind(node) in LAYERS)
        return [self.layer(node) for node in layers if node.args[1].name not in self.state]

    def values(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The graph's inputs but the image, by the name of their node; `weights` are by layer name."""
        state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        state |= dict(model.named_buffers(remove_duplicate=False))
        state |= {weight_name(name): weight for name, weight in weights.items()}
        like = next(model.parameters(), torch.empty(0))
        constants = {n: t.to(like.dtype) if t.is_floating_point() else t for n, t in self.constants.items()}
        return constants | {node: state[name].detach() for node, name in self.state.items()}

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """What the graph gives for images, with the weights that a model stores."""
        values = self.values(model, {})
        inputs = (values.get(node.name, images) for node in self.graph.nodes if node.op == "placeholder")
        return fx.Interpreter(nn.Module(), graph=self.graph).run(*inputs)


def kind(node: Any) -> Any:
    """The operation of a node, whichever of its overloads."""
    return getattr(node.target, "overloadpacket", node.target)


def path(node: Any) -> str:
    """The name of the module that a node was traced in."""
    return next(reversed(node.meta.get("nn_module_stack", {"": ("", "")}).values()))[0]


def is_pointwise(node: Any) -> bool:
    known = kind(node) in COPIES or kind(node) in _POINTWISE
    known = known or torch.Tag.pointwise in getattr(node.target, "tags", ())
    return known and not isinstance(node.meta.get("val"), tuple | list)


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """The nodes with whose numbers a node computes: others lend it their shape or their type."""
    name = getattr(kind(node), "__name__", "")
    if name.endswith("_like") or name.startswith("new_"):
        return []
    if name == "fill":
        return node.all_input_nodes[1:]
    return node.all_input_nodes[:1] if kind(node) in LEND else node.all_input_nodes


def is_number_of_images(node: Any, image: fx.Node) -> bool:
    if kind(node) is not aten.sym_size:
        return False
    source, dim = node.args
    return bool(str(_shape(source)[dim]) == str(_shape(image)[0]))


def images_along(node: fx.Node, image: fx.Node) -> int | None:
    """The dimension of a node's value, or of each of its values, along which the images lie, if any."""
    number = str(_shape(image)[0])
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    sizes = [list(map(str, v.shape)) if isinstance(v, Tensor) else [] for v in values]
    along = {of.index(number) if number in of else None for of in sizes}
    return along.pop() if len(along) == 1 else None


def reduced_dims(node: Any) -> list[int]:
    """The dimensions that a reduction takes together, counted from the first."""
    ndim = node.args[0].meta["val"].ndim
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return [d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))]


def is_move(node: Any) -> bool:
    """Whether an operation only moves elements: each of its outputs is an element of an input, or padding."""
    views = _returns_views(node.target) and kind(node) not in COPIES and node.target not in READ_ANEW
    return kind(node) in MOVES or views


def is_norm(node: Any) -> bool:
    """Whether a node is a batch norm that takes its statistics from training."""
    return kind(node) is aten.batch_norm and not node.args[5]


def _returns_views(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(r.alias_info for r in schema.returns)


def move(node: Any, given: Callable[[fx.Node], Any], value: Callable[[fx.Node], Any]) -> Any:
    """Do what a node that moves elements does; several results in a tuple.

    It pads with 0, whatever it pads with in the network.

    Arguments: `given` is what to move, for each input of which elements are moved; `value` the value of any
        other input, an index say.
    """
    moved: set[fx.Node] = set()
    fx.node.map_arg(node.args[: 1 + (kind(node) in _INTO)], moved.add)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given(n) if n in moved else value(n))
    if kind(node) is aten.as_strided:  # which goes by the places in memory
        args = (args[0].contiguous(), *args[1:])
    if kind(node) in PADS and len(args) + len(kwargs) > 2:
        args, kwargs = (args[:3] if kind(node) is aten.pad else args[:2]), {}
    made = node.target(*args, **kwargs)
    return tuple(made) if isinstance(made, list) else made


def only_looks(hook: Hook) -> Hook:
    """Mark a hook of a module as one that changes no tensor: the graph is traced without it."""
    hook.only_looks = True  # type: ignore[attr-defined]
    return hook


def take_off_hooks(model: nn.Module, but: Hook | None = None) -> None:
    """Take the hooks that only look off a model, all but one."""
    for hooks in (hooks for module in model.modules() for hooks in _hooks(module)):
        for handle in [h for h, hook in hooks.items() if hasattr(hook, "only_looks") and hook is not but]:
            del hooks[handle]


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [module._forward_hooks, module._forward_pre_hooks]


_TRACED: dict[Hashable, NetworkGraph] = {}
_MOST = 64  # graphs that are remembered
_MANY = 7919  # images; a large prime, which no other number in a network is


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
        take_off_hooks(plain)
        name = type(model).__name__
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph of what it cannot trace
                program = _exported(plain, like, input_size)
                if any(node.target is aten.view.dtype for node in program.graph.nodes):
                    raise ValueError("it reads the bytes of numbers as another type, by view(dtype)")
                if not _make_functional(program.graph):
                    program = program.run_decompositions({})
                if any(node.op == "get_attr" for node in program.graph.nodes):
                    raise ValueError("it branches or loops by torch.cond, while_loop or the like")
                if _image(program).meta["val"].shape[0] == _MANY:
                    _free_number_of_images(program.graph, _image(program))
                numbers = [node.meta["val"].dtype for node in program.graph.nodes if _is_of_numbers(node)]
                graph = _graph(program, plain, kept)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"torch.export cannot trace {name} on images {input_size}: {reason}") from error
        _compare(name, graph, plain, input_size, max(torch.finfo(number).eps for number in numbers))
        while len(_TRACED) >= _MOST:
            del _TRACED[next(iter(_TRACED))]
        named = (value for n in graph.graph.nodes for value in (*n.args, *n.kwargs.values()))
        key = keys[any(isinstance(value, torch.dtype) for value in named)]
        _TRACED[key] = graph
    return _TRACED[key]


def _exported(
    plain: nn.Module, like: Tensor, input_size: tuple[int, int, int]
) -> torch.export.ExportedProgram:
    """Trace a network on any number of images, or on `_MANY` where it asks for a plain number of them."""
    # Two images, of any number: torch.export takes a number of one for the only one that there can be.
    images, any_number = like.new_zeros(2, *input_size), torch.export.ShapesCollection()
    any_number[images] = {0: torch.export.Dim.AUTO}
    program = torch.export.export(plain, (images,), dynamic_shapes=any_number)
    number = _image(program).meta["val"].shape[0]
    if isinstance(number, int) or number.node.maybe_as_int() is not None:  # it took len(images), or the like
        for of_each in (3, 4, _MANY):
            known, program = program, torch.export.export(plain, (like.new_empty(of_each, *input_size),))
            if of_each == 4 and len(program.graph.nodes) != len(known.graph.nodes):
                raise ValueError("it works on one image of a batch after the other, by a loop")
    return program


def _compare(
    name: str, graph: NetworkGraph, plain: nn.Module, input_size: tuple[int, int, int], eps: float
) -> None:
    """Hold a graph against the network that it was traced of, on batches of five images, two and one.

    In float64, or in the network's type where either cannot run in that; `eps` is of the coarsest type in it.
    A network that gives others for the same images again, as one that draws, cannot be compared.

    Raises: ValueError if they give other logits, or if those of an image depend on the rest of its batch.
    """
    like = next(plain.parameters(), torch.empty(0))
    eps = eps if like.is_cpu else max(eps, torch.finfo(torch.half).eps)  # TF32 is as coarse
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(5, *input_size, generator=draws)
    images += torch.randn(5, input_size[0], 1, 1, generator=draws)  # or they would hardly differ once pooled
    parts = (slice(0, 5), slice(1, 3), slice(2, 3))  # of the five: the batches
    for dtype in (torch.float64, like.dtype):
        network = copy.deepcopy(plain)
        network = (network if like.is_cuda else network.cpu()).to(dtype)  # MPS has no float64
        for parameter in network.parameters():
            if parameter.is_floating_point() and not parameter.any():  # nothing would be seen behind it
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
        batches = [images[part].to(dtype) for part in parts]
        batches = [batch.to(like.device) if like.is_cuda else batch for batch in batches]
        with torch.random.fork_rng([like.device] if like.is_cuda else []):
            *own, again = (_answers(network, x) for x in (*batches, batches[1]))
            traced = [_answers(partial(graph.run, network), x) for x in batches]
        if own[0] and all(traced):
            break
    if not own[0] or _differ(again, own[1], eps):
        return
    for part, answers, of_graph in zip(parts, own, traced, strict=True):
        rows = [a[part] if a.shape[:1] == (5,) else few for few, a in zip(answers, own[0], strict=False)]
        if answers and _differ(answers, rows, eps):
            raise ValueError(
                f"the logits that {name} gives for an image depend on the other images of its batch, or on "
                f"their number, in evaluation mode too: nothing can be counted of an image alone"
            )
        if answers and _differ(of_graph, answers, eps):
            fault = f"gives other logits than {name} itself" if of_graph else "cannot be run"
            raise ValueError(
                f"{name} cannot be counted: torch.export's graph of it {fault} "
                f"for {part.stop - part.start} images; it may compute with len(images), where "
                f"images.shape[0] is the same and can be traced"
            )


def _answers(network: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
    """What a network gives for images; nothing if it raises."""
    try:
        given = tree_leaves(network(images.clone()))
    except Exception:  # as some networks do for one image
        return []
    return [answer.cpu().double() for answer in given if isinstance(answer, Tensor)]


def _differ(ones: list[Tensor], others: list[Tensor], eps: float) -> bool:
    if [a.numel() for a in ones] != [a.numel() for a in others]:
        return True
    return not all(
        torch.allclose(a.flatten(), b.flatten(), 0, eps**0.5 * float(b.nan_to_num(0, 0, 0).norm()), True)
        for a, b in zip(ones, others, strict=True)
    )


def _image(program: torch.export.ExportedProgram) -> fx.Node:
    (image,) = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    return image


def _free_number_of_images(graph: fx.Graph, image: fx.Node) -> None:
    """Put the number of images where `_MANY` stands, which nothing else in a network is."""
    with graph.inserting_after(image):
        number = graph.call_function(aten.sym_size.int, (image, 0))

    def freed(value: Any) -> Any:
        return number if type(value) is int and value == _MANY else value

    for node in graph.nodes:
        if node is not number:
            node.args, node.kwargs = (fx.node.map_aggregate(a, freed) for a in (node.args, node.kwargs))


def _make_functional(graph: fx.Graph) -> bool:
    """Put functions in the place of the operations that write into a tensor; take out dropouts that pass all.

    torch's `run_decompositions` does that too, and takes a hundred milliseconds to seconds for it.
    Returns: False, with the graph in between, where a tensor written to may share its memory with another.
    """
    now: dict[fx.Node, fx.Node] = {}  # what holds the value that was in a node before

    def latest(node: fx.Node) -> fx.Node:
        while node in now:
            node = now[node]
        return node

    for node in graph.nodes:
        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), latest)
        if node.op != "call_function":
            continue
        if kind(node) in DROPOUTS and not node.args[2]:
            now[node] = node.args[0]
        elif not isinstance(node.target, torch._ops.OpOverload):
            return False
        elif kind(node) in (aten.batch_norm, aten.instance_norm) and node.args[5]:
            # It would write into running statistics, and does not say so; it does not read them.
            node.args = (*node.args[:3], None, None, *node.args[5:])
        elif node.target._schema.is_mutable:
            written, function = node.args[0], _function(node.target)
            near = (written, *(user for user in written.users if user is not node and user not in now))
            if function is None or any(_may_share(other) for other in near) or not _gives_as(function, node):
                return False
            node.target, now[written] = function, node
    for node in reversed(now):
        if kind(node) in DROPOUTS:  # which are random to `eliminate_dead_code`, and stay
            graph.erase_node(node)
    return True


def _function(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """What returns the tensor that an operation writes into its first argument alone: relu for relu_."""
    first, *others = (a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments)
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    return None if not first or any(others) else getattr(packet, target._overloadname, None)


def _gives_as(function: torch._ops.OpOverload, node: fx.Node) -> bool:
    """Whether a function takes what a node is given and returns its type: x.gt_(0) keeps the type of x."""
    try:
        found = function(*fx.node.map_arg(node.args, lambda n: n.meta["val"]), **node.kwargs)
    except RuntimeError:  # its arguments are of other types, as those of pow are
        return False
    return bool(found.dtype == node.meta["val"].dtype)


def _may_share(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its inputs; some operations do not say that it does."""
    if node.op != "call_function" or kind(node) in LAYERS | {aten.batch_norm}:
        return False
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    target: Any = node.target
    return (
        not isinstance(target, torch._ops.OpOverload)
        or _returns_views(target)
        or target.has_kernel_for_dispatch_key(key)
    )


def _graph(program: torch.export.ExportedProgram, plain: nn.Module, kept: tuple[Any, ...]) -> NetworkGraph:
    # A module that is registered twice has the name that it has first.
    tensors = [*plain.named_parameters(remove_duplicate=False), *plain.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in tensors}
    state: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            state[spec.arg.name] = names[str(spec.target)]
        elif spec.kind is not InputKind.USER_INPUT:
            constants[spec.arg.name] = program.constants[str(spec.target)].detach().clone()
    graph = program.graph
    *nodes, output = graph.nodes
    for node in nodes:
        if kind(node) is aten.as_strided:
            if not node.args[0].meta["val"].is_contiguous():
                raise ValueError("it reads memory by as_strided, of a tensor that is not contiguous")
            with graph.inserting_before(node):  # the tensor may lie otherwise in memory when the graph runs
                copied = graph.call_function(
                    aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format}
                )
            copied.meta, node.args = node.args[0].meta, (copied, *node.args[1:])
    kinds = [spec.kind for spec in program.graph_signature.output_specs]
    given = zip(output.args[0], kinds, strict=True)
    output.args = (tuple(node for node, what in given if what is OutputKind.USER_OUTPUT),)
    of_weights = next(plain.parameters(), torch.empty(0)).dtype

    def typed(value: Any) -> Any:
        return of_weights if isinstance(value, torch.dtype) and value.is_floating_point else value

    for node in nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), typed)
        if kind(node) in SAME:
            node.target = getattr(SAME[kind(node)], node.target._overloadname)
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # flows may lie in memory in another order
        elif kind(node) in COPIES and _is_of_numbers(node) and _is_of_numbers(node.args[0]):
            node.replace_all_uses_with(node.args[0])
        elif kind(node) is aten.copy and all(map(_is_of_numbers, (node, new := node.args[1]))):
            if _shape(node) == _shape(new):
                node.replace_all_uses_with(new)  # what is written over has no part in the result
        elif node.target is aten.squeeze.default:
            ones = [i for i, n in enumerate(_shape(node.args[0])) if isinstance(n, int) and n == 1]
            node.target, node.args = aten.squeeze.dims, (node.args[0], ones)  # not of the images
        elif kind(node) is aten.cat:  # an empty vector goes with any shape, and adds nothing
            full = [n for n in node.args[0] if _shape(n) != (0,)]
            node.args = (full or node.args[0], *(dim % len(_shape(node)) for dim in node.args[1:]))
        elif kind(node) is aten.masked_fill and _is_of_numbers(node):
            x, mask, filled = node.args
            number = aten.where.self if isinstance(filled, fx.Node) else aten.where.ScalarSelf
            node.target, node.args = number, (mask, filled, x)
        elif isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
            graph.erase_node(node)
        elif extremum := _as_extremum(node):
            with graph.inserting_before(node):
                found = graph.call_function(*extremum)
            for value in list(node.users):
                found.meta = value.meta
                value.replace_all_uses_with(found)
        elif kind(node) is aten._native_batch_norm_legit_no_training:
            with graph.inserting_before(node):
                args = (*node.args[:5], False, *node.args[5:], False)
                norm = graph.call_function(aten.batch_norm.default, args)
            (result,) = node.users
            norm.meta = result.meta
            result.replace_all_uses_with(norm)
    graph.eliminate_dead_code()
    modules = (name for name, _ in plain.named_modules(remove_duplicate=False))
    answers = program.call_spec.out_spec
    assert answers is not None
    return NetworkGraph(graph, state, constants, frozenset([*modules, *names]), answers, kept)


def _as_extremum(node: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """The amax or amin that gives a node's values, if it finds their places too and nothing uses these."""
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return None
    if node.target in (aten.max.dim, aten.min.dim):
        x, dim, *keepdim = node.args
        return (aten.amax if kind(node) is aten.max else aten.amin).default, (x, [dim], *keepdim)
    if kind(node) is aten.adaptive_max_pool2d and list(node.args[1]) == [1, 1]:
        return aten.amax.default, (node.args[0], [-2, -1], True)
    return None


def _shape(node: fx.Node) -> torch.Size:
    return node.meta["val"].shape


def _is_of_numbers(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


_OF_ANY_MODULE = frozenset(vars(nn.Module()))
# Objects of which the fingerprint looks at no attributes.
_OF_CODE = (type, FunctionType, MethodType, ModuleType, nn.Module, torch._ops.OpOverload)


def _fingerprint(model: nn.Module) -> tuple[Hashable, tuple[Any, ...]]:
    """All that the graph of a model can depend on, and the objects in it that are only named by their id.

    Quantizers are left out, and the values of weights: both may change from count to count.
    """
    quantized: dict[str, Any] = quantized_layers(model)
    inside = {m for layer in quantized.values() for m in layer.parametrizations.modules()}
    parts: list[Hashable] = []
    kept: list[Any] = []
    order: dict[int, int] = {}  # the number of each module and tensor, by its id: what is there twice, is one
    classes: dict[type, Hashable] = {}

    def part(value: Any, holders: tuple[int, ...] = ()) -> Hashable:
        if isinstance(value, int | float | str | None):
            return value
        if isinstance(value, _OF_CODE) or id(value) in holders:
            kept.append(value)
            return id(value)
        within = (*holders, id(value))
        if isinstance(value, tuple | Sequence):  # a tuple is one: that is found sooner
            return (type(value), *(part(v, within) for v in value))
        if isinstance(value, dict | Mapping):
            return (type(value), *(part(v, within) for v in value.items()))
        if isinstance(value, Set):
            return frozenset(part(v, within) for v in value)
        kept.append(value)
        if isinstance(value, Tensor) and id(value) in order:  # a weight in a list, as of recurrent layers
            return order[id(value)]
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
            # A write through .data or .numpy() raises no version.
            raw = value.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
            return (id(value), value.shape, value.stride(), hash(raw.numpy().tobytes()))
        if hasattr(value, "tobytes"):  # an array of numpy's
            return (id(value), value.tobytes())
        if isinstance(value, Tensor):
            return id(value)
        slots = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
        held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        return (id(value), part({**held, **getattr(value, "__dict__", {})}, within))

    def of_class(own: type) -> Hashable:
        """What stands in a module's class: attributes, and the code of functions, with the flags it names."""
        if own not in classes:
            bases = (vars(base) for base in own.__mro__ if base not in nn.Module.__mro__)
            named = ((n, v) for base in bases for n, v in base.items() if n != "__annotations__")
            held = [(name, value, part(value)) for name, value in named]
            codes = [(v.__code__, v.__globals__) for _, v, _ in held if hasattr(v, "__code__")]
            flags = (g.get(name) for code, g in codes for name in code.co_names)
            plain = (flag for flag in flags if isinstance(flag, int | float | str))
            classes[own] = (own, *((n, p) for n, _, p in held), *(code for code, _ in codes), *plain)
        return classes[own]

    for name, module in model.named_modules(remove_duplicate=False):
        if module in inside:
            continue
        known = id(module) in order
        parts += [name, order.setdefault(id(module), len(order))]
        if known:
            continue
        layer: Any = module
        own_class: Any = type(layer)
        tensors = {**layer._parameters, **layer._buffers}
        if name in quantized:
            tensors["weight"], own_class = layer.parametrizations.weight.original, own_class.__bases__[0]
        named = sorted((n, t) for n, t in tensors.items() if t is not None)
        parts += [of_class(own_class), *((n, t.shape, order.setdefault(id(t), len(order))) for n, t in named)]
        parts += [(k, part(v)) for k, v in vars(module).items() if k not in _OF_ANY_MODULE]
        hooks = [hook for hooks in _hooks(module) for hook in hooks.values()]
        parts += [part(hook) for hook in hooks if not hasattr(hook, "only_looks")]
    return tuple(parts), tuple(kept)
