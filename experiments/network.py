"""The network that the settings name, tried before anything else is begun."""

import copy
import inspect
import random
import re
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import resnet
from experiments.distributed import use_local_batch_norms
from experiments.draws import drawn_since, kept_draws, random_states
from experiments.settings import Settings, check_model
from experiments.user_code import RAISED, first_line, import_named
from metrics import NetworkCount
from src.encoding import PackingError
from src.graph import only_looks, trace_network
from src.packing import numbers_of
from utils_quantization import layers_of

SIZE = (3, 32, 32)  # of an image
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)  # on the host
MOST_PARAMETERS = 50_000_000  # of a network that is copied for checks: some ten copies in float64 are 4 GB
TRIED = (2, *SIZE)  # images; two, since a batch norm over one number cannot train


def make_network(name: str, classes: int) -> nn.Module:
    """The network that --model names, on the CPU, its weights drawn from torch's random numbers.

    That is one of resnet.py's, or what the callable module:callable returns, which is called with
    num_classes where it takes that, and tried on images, in training and in evaluation mode.

    Raises: ValueError naming the flag and what is wrong with the network.
    """
    check_model(name)
    if ":" not in name:
        return getattr(resnet, name)(classes)
    with kept_draws():  # a module may seed torch when it is imported
        build = import_named("--model", name, "a callable that returns an nn.Module", callable)
    try:
        network = build(num_classes=classes) if _takes(build, "num_classes") else build()
    except RAISED as error:
        raise ValueError(
            f"--model is {name!r}, and calling it raises {type(error).__name__} ({first_line(error)}); "
            f"expected a callable that needs no argument, or num_classes alone"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"--model is {name!r}, which returns {network!r:.60}; expected an nn.Module")
    _refuse_shared_weights(name, network)
    for which, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"--model is {name!r}, whose {which} is of {parameter.dtype}; expected torch.float32 "
                f"(--precision chooses what convolutions compute in)"
            )
    if any(map(is_lazy, network.parameters())):  # they get their shapes from the first images
        _try(name, network.eval(), classes)
        network.train()
    twin, ran = _copied(name, network), set[nn.Module]()
    for module in twin.modules():
        if not isinstance(module, torch.jit.ScriptModule):  # which takes no hook
            module.register_forward_hook(lambda module, *_: ran.add(module))
    silent = _without_gradient(name, twin, _try(name, twin.train(), classes))
    _copied(name, twin)  # as the checks do, in the middle of training
    _refuse_unpackable(name, network, twin)
    _try(name, twin.eval(), classes)
    for which in silent:
        if twin.get_submodule(which.rpartition(".")[0]) not in ran:  # no image passes it
            network.get_parameter(which).requires_grad_(False)
    if not _runs_in_channels_last(twin):
        network.register_forward_pre_hook(contiguous_images)
    return network


def _copied(name: str, network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except RAISED as error:
        raise ValueError(
            f"--model is {name!r}, and copying it raises {type(error).__name__} ({first_line(error)}); "
            f"expected a network that copy.deepcopy copies, since the checks work on copies"
        ) from error


def _refuse_unpackable(name: str, network: nn.Module, trained: nn.Module) -> None:
    """Raises: ValueError if the packed file cannot hold the network, or can no more once it was trained."""
    try:
        after = numbers_of(trained)
        for which, before in numbers_of(network).items():
            # One of them may: numbers that the first images set, and those that images of zeros leave.
            if before.isnan().any() and after[which].isnan().any():
                raise PackingError(f"{which} holds NaN")
    except PackingError as error:
        raise ValueError(
            f"--model is {name!r}, which the packed file at the run's end cannot hold ({error}); expected "
            "buffers of numbers that float32 holds exactly, or persistent=False where they are made anew"
        ) from error


def _refuse_shared_weights(name: str, network: nn.Module) -> None:
    first: dict[nn.Parameter, str] = {}
    for layer, module in network.named_modules():
        weight = module._parameters.get("weight") if isinstance(module, nn.Conv2d | nn.Linear) else None
        if weight is not None:  # a weight that is computed, as by weight norm, is no parameter
            other = first.setdefault(weight, layer)
            if other != layer:
                raise ValueError(
                    f"--model is {name!r}, whose layers {other} and {layer} share one weight; expected a "
                    f"weight for each, since each gets a quantizer of its own"
                )


def _without_gradient(name: str, network: nn.Module, logits: Tensor) -> list[str]:
    """The names of the parameters that the logits, given in training mode, do not depend on.

    Raises: ValueError if they depend on none.
    """
    if not logits.requires_grad:
        raise ValueError(f"--model is {name!r}, whose logits have no gradient to any parameter; expected one")
    try:
        logits.sum().backward()
    except RAISED as error:
        raise ValueError(
            f"--model is {name!r}, and its backward pass raises {type(error).__name__} "
            f"({first_line(error)}); expected logits that have a gradient"
        ) from error
    return [which for which, p in network.named_parameters() if p.requires_grad and p.grad is None]


def _runs_in_channels_last(twin: Any) -> bool:
    images = torch.zeros(TRIED).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            twin.to(memory_format=torch.channels_last)(images)
    except RAISED:  # mostly of a view that would have to be a reshape
        return False
    return True


@only_looks
def contiguous_images(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook of networks that cannot run in channels_last: they get their images in the usual layout."""
    return tuple(images.contiguous() for images in inputs)


def memory_layout(network: nn.Module, device: torch.device) -> str:
    """The layout that the network is to run in: "channels_last", which is faster, or "contiguous".

    On MPS channels_last has given wrong batch-norm gradients.
    """
    hooked = contiguous_images in network._forward_pre_hooks.values()
    return "contiguous" if hooked or device.type == "mps" else "channels_last"


class _Copies(TorchFunctionMode):
    """Notices, on the meta device, what an accelerator would have to fetch from the host."""

    seen = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # A single number goes along with an operation, but not where a tensor is made of it.
        makes = function in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        moves = function in (Tensor.to, Tensor.copy_, Tensor.cuda)
        from_host = makes or any(t.is_cpu and (t.ndim or moves) for t in given)
        listed = function in (Tensor.__getitem__, Tensor.__setitem__) and any(
            isinstance(i, list | tuple | range | np.ndarray)
            for i in (args[1] if isinstance(args[1], tuple) else args[1:2])
        )
        # An operation in place may return nothing, so what it was given counts too.
        on_device = any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((made, given)))
        self.seen |= on_device and (from_host or listed)
        return made


class HostUse(NamedTuple):
    """What the forward pass in training mode needs the host for, which no CUDA graph can hold."""

    copies: bool = False  # it fetches tensors from there
    decides: bool = False  # it draws random numbers there, or looks at a tensor's; it may skip layers by them
    remembers: bool = False  # it changes plain values, a counter say, which a graph would hold as they were


NO_USE = HostUse()


def use_of_the_host(model: nn.Module) -> HostUse:
    """Try the forward pass on the meta device, where looking at the numbers in a tensor raises an error.

    Two passes are tried, since the first may fill caches: only what the second changes is remembered.
    """
    meta = torch.device("meta")
    twin = copy.deepcopy(model).to(meta).train()
    use_local_batch_norms(twin)
    with kept_draws():
        before, decides, remembers = random_states(), False, False
        with _Copies() as copies:
            try:
                twin(torch.zeros(TRIED, device=meta))
                values, buffers = _plain_values(twin), list(twin.buffers())
                twin(torch.zeros(TRIED, device=meta))
                # A graph writes and reads the buffers that there were, and not those that took their places.
                rebound = [*map(id, twin.buffers())] != [*map(id, buffers)]
                remembers = rebound or _plain_values(twin) != values
                decides = any(isinstance(v, GENERATORS) for m in twin.modules() for v in tree_leaves(vars(m)))
            except RAISED:
                decides = True
        return HostUse(copies.seen, decides or drawn_since(before), remembers)


def _plain_values(network: nn.Module) -> list[object]:
    """The numbers, strings and None among its modules' attributes, also in tuples, lists and dicts."""
    values = [value for module in network.modules() for value in tree_leaves(vars(module))]
    return [value for value in values if value is None or isinstance(value, Number | str)]


def _takes(build: object, argument: str) -> bool:
    try:
        parameters = inspect.signature(build).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a callable written in C
        return False
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _try(name: str, network: nn.Module, classes: int) -> Tensor:
    """The logits for two images, in the network's mode, in training mode with a gradient.

    Raises: ValueError if the network does not give its logits for images of 3x32x32.
    """
    mode = "training" if network.training else "evaluation"
    with torch.set_grad_enabled(network.training), kept_draws():
        try:
            logits: object = network(torch.zeros(TRIED))
        except RAISED as error:
            raise ValueError(
                f"--model is {name!r}, and in {mode} mode it raises {type(error).__name__} for images "
                f"{TRIED} ({first_line(error)}); expected a network for 3x32x32 images"
            ) from error
    if isinstance(logits, Tensor) and logits.shape == (TRIED[0], classes):
        return logits
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise ValueError(
        f"--model is {name!r}, and in {mode} mode it gives {shape} for {TRIED[0]} images; "
        f"expected {(TRIED[0], classes)}, a logit for each class of the data set"
    )


def refuse_one_image(name: str, model: nn.Module) -> None:
    """Raises: ValueError if the model cannot train on a batch of one image, as an epoch's last may be."""
    twin = copy.deepcopy(model).train()
    image = torch.zeros(1, *SIZE, device=next(twin.parameters()).device)
    try:
        with torch.no_grad(), kept_draws():
            twin(image)
    except RAISED as error:
        raise ValueError(
            f"an epoch's last batch has one image, and --model {name} raises {type(error).__name__} for one "
            f"({first_line(error)}); give another --batch-size or --limit-train"
        ) from error


def excluded_layers(settings: Settings, network: nn.Module, dense: NetworkCount) -> list[str]:
    """The patterns of the layers that get no quantizer: those given, or the first layer's and the last's.

    Layers that no image passes in evaluation mode, and that are therefore not counted, get none either, nor
    do layers that compute with other weights than they store, standardized ones say.

    Raises: ValueError for a network without layers that are counted.
    """
    counted = [layer.name for layer in dense.layers]
    if not counted:
        raise ValueError(
            f"--model is {settings.model!r}, in which no image passes a convolution or linear layer; "
            f"expected one at least, to quantize"
        )
    layers = layers_of(network)
    computed = trace_network(network, SIZE).computing_their_weights()
    names = [name for name in layers if name not in counted or name in computed]
    if settings.exclude_layers is None:
        # A layer that is no module, as a product with a parameter, gets no quantizer anyway.
        names += [name for name in dict.fromkeys((counted[0], counted[-1])) if name in layers]
    return [*(settings.exclude_layers or ()), *(f"^{re.escape(name)}$" for name in names)]


def network_name(name: str) -> str:
    """
    >>> network_name("resnet56"), network_name("torchvision.models:vgg11_bn")
    ('ResNet-56', 'vgg11_bn')
    """
    return name.partition(":")[2] or name.replace("resnet", "ResNet-")
