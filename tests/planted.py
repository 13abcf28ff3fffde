"""Networks with planted deaths, and what the tests can know of them without `src/channels.py`."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resnet import ResNet, resnet20

SMALL = (3, 12, 12)  # 12, 6 and 3 pixels wide: the last stage still has one place that no border touches
BLOCKS = 2  # a stage
CONVOLUTIONS = [n for n, m in ResNet(BLOCKS).named_modules() if isinstance(m, nn.Conv2d)]

PLANTED = settings(max_examples=15, deadline=None, derandomize=True)  # the same networks at every run


@dataclass(frozen=True)
class Deaths:
    """How much of a random network dies; the rates are per filter, slice, channel and so on, 0 to 1."""

    seed: int
    filters: float = 0.0  # of any convolution
    slices: float = 0.0  # an input slice of any convolution but the stem, or a column of the classifier
    weights: float = 0.0  # single weights
    scales: float = 0.0  # batch norm scale 0
    silent: float = 0.0  # batch norm mean and bias 0, so that a dead filter emits nothing
    streams: float = 0.0  # residual channels: the stem's filter and the filter of every conv2 of the stage
    whole: tuple[str, ...] = ()  # convolutions without a weight left


RATES = st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.8])
planted_deaths = st.builds(
    Deaths,
    seed=st.integers(0, 2**31),
    filters=RATES,
    slices=RATES,
    weights=RATES,
    scales=RATES,
    silent=RATES,
    streams=RATES,
    whole=st.lists(st.sampled_from(CONVOLUTIONS), max_size=2, unique=True).map(tuple),
)


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d, nn.BatchNorm2d]]:
    """(name, convolution, its batch norm), in order."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            yield name, module, model.get_submodule(norm_of(name))


def norm_of(convolution: str) -> str:
    return convolution.replace("conv", "bn")


@torch.no_grad()
def random_network(deaths: Deaths, blocks: int = BLOCKS) -> ResNet:
    """float64, evaluation mode, batch norms with random statistics and scales of either sign."""
    generator = torch.Generator().manual_seed(deaths.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def chosen(rate: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64) < rate

    model = ResNet(blocks).double().eval()
    model.linear.weight.copy_(normal(*model.linear.weight.shape))
    model.linear.bias.copy_(normal(len(model.linear.bias)))
    model.linear.weight[:, chosen(deaths.slices, model.linear.in_features)] = 0
    for name, conv, bn in convolutions(model):
        filters, slices = conv.weight.shape[:2]
        conv.weight.copy_(normal(*conv.weight.shape) * (2 / (9 * slices)) ** 0.5)
        conv.weight[chosen(deaths.weights, *conv.weight.shape)] = 0
        conv.weight[chosen(deaths.filters, filters)] = 0
        conv.weight[:, chosen(deaths.slices if name != "conv1" else 0, slices)] = 0
        if name in deaths.whole:
            conv.weight.zero_()
        bn.running_mean.copy_(normal(filters))
        bn.running_var.copy_(0.2 + normal(filters) ** 2)
        bn.weight.copy_(normal(filters).sign() * (0.5 + normal(filters).abs()))
        bn.bias.copy_(normal(filters))
        bn.weight[chosen(deaths.scales, filters)] = 0
        silent = chosen(deaths.silent, filters)
        bn.running_mean[silent] = 0
        bn.bias[silent] = 0
    for stage in (model.layer1, model.layer2, model.layer3):
        dead = chosen(deaths.streams, stage[0].conv2.out_channels)
        producers = [block.conv2 for block in stage] + ([model.conv1] if stage is model.layer1 else [])
        for conv in producers:
            conv.weight[dead] = 0
    return model


def images(count: int, size: tuple[int, int, int] = SMALL, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *size, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Run:
    """What the real network computed, by convolution (and "linear")."""

    inputs: dict[str, Tensor]  # (N, I, H, W)
    outputs: dict[str, Tensor]  # (N, O, H, W): behind the batch norm, and the ReLU where one follows at once
    logits: Tensor


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Run:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], out: Tensor, name: str) -> None:
        # Never the tensor itself: the network adds and clamps in place.
        outputs[name] = F.relu(out) if name.endswith("conv1") else out.clone()

    for name, conv, bn in convolutions(model):
        handles.append(conv.register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0]})))
        handles.append(bn.register_forward_hook(lambda m, args, out, n=name: keep(m, args, out, n)))
    handles.append(model.linear.register_forward_pre_hook(lambda _, args: inputs.update({"linear": args[0]})))
    logits = model(x)
    for handle in handles:
        handle.remove()
    return Run(inputs, outputs | {"linear": logits}, logits)


@torch.no_grad()
def run_overwritten(
    model: nn.Module, x: Tensor, channels: dict[str, Tensor], values: dict[str, Tensor]
) -> Tensor:
    """The logits when the flagged channels of each convolution's output carry `values` (N or 1, O, H, W)
    instead; where a ReLU follows at once, it meets the values."""
    handles = []
    for name, _, bn in convolutions(model):
        if name in channels:

            def overwrite(_: nn.Module, __: tuple[Tensor, ...], out: Tensor, n: str = name) -> Tensor:
                return torch.where(channels[n][:, None, None], values[n], out)

            handles.append(bn.register_forward_hook(overwrite))
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits


@dataclass(frozen=True)
class Plumbing:
    """Which channels can be reached from the image, and from which a logit can be reached."""

    fed: dict[str, Tensor]  # (O,) bool: some path leads here from the image
    read: dict[str, Tensor]  # (O,) bool: some path leads from here to a logit
    inputs: dict[str, Tensor]  # (I,) bool: a fed input that this very layer passes on to a logit


def lively_network(seed: int = 0) -> ResNet:
    """Return a network in which nothing is dead and every batch norm adds something."""
    return random_network(Deaths(seed))


@torch.no_grad()
def kill(model: ResNet, layer: str, channel: int | list[int], bias: float | None = None) -> None:
    """Make filters all zeros, and the batch norm behind them emit `bias` where that is given."""
    model.get_submodule(layer).weight[channel] = 0
    if bias is not None:
        norm = model.get_submodule(norm_of(layer))
        norm.running_mean[channel] = 0
        norm.bias[channel] = bias


def plumbing(model: ResNet, size: tuple[int, int, int] = SMALL) -> Plumbing:
    """The oracle: the same network as pipes, every weight and scale that is not zero set to 1.

    With batch norms that add nothing, what arrives from a white image is the number of paths, so it is zero
    exactly where no path leads. With batch norms that add 1, no ReLU blocks, nothing cancels, and autograd's
    gradient of the summed logits is the number of paths behind.
    """
    pipes = copy.deepcopy(model).double().eval()
    for _, module in list(pipes.named_modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    with torch.no_grad():
        pipes.linear.weight.copy_(pipes.linear.weight != 0)
        pipes.linear.bias.zero_()
        for _, conv, bn in convolutions(pipes):
            conv.weight.copy_(conv.weight != 0)
            bn.weight.copy_(bn.weight != 0)
            bn.bias.zero_()
            bn.running_mean.zero_()
            bn.running_var.fill_(1)
    white = torch.ones(1, *size, dtype=torch.float64)
    forward = run(pipes, white)
    with torch.no_grad():
        for _, _, bn in convolutions(pipes):
            bn.bias.fill_(1)
    entering, leaving = _gradients(pipes, white)

    def flags(x: Tensor) -> Tensor:
        return (x != 0).flatten(2).any(2)[0] if x.ndim == 4 else (x != 0)[0]

    read = {n: flags(x) for n, x in leaving.items()} | {"linear": torch.ones(10, dtype=torch.bool)}
    inputs = {n: flags(x) & flags(forward.inputs[n]) for n, x in entering.items()}
    return Plumbing({n: flags(x) for n, x in forward.outputs.items()}, read, inputs)


def _gradients(pipes: ResNet, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of the summed logits at what enters each layer, by this layer alone, and at what leaves."""
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}

    def tap_input(_: nn.Module, args: tuple[Tensor], name: str) -> tuple[Tensor]:
        entering[name] = args[0].clone().requires_grad_()
        return (entering[name],)

    for name, module in pipes.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda m, args, n=name: tap_input(m, args, n))

    def tap_output(_: nn.Module, __: tuple[Tensor], out: Tensor, name: str) -> Tensor:
        leaving[name] = out
        return out.clone()  # the network adds and clamps in place

    for name, _, bn in convolutions(pipes):
        bn.register_forward_hook(lambda m, args, out, n=name: tap_output(m, args, out, n))
    everything = pipes(x).sum()
    tensors = list(entering.values()) + list(leaving.values())
    grads = torch.autograd.grad(everything, tensors)
    return dict(zip(entering, grads, strict=False)), dict(zip(leaving, grads[len(entering) :], strict=True))


def with_norms(model: ResNet, bias: float, scale: float = 1.0) -> ResNet:
    """The network with every batch norm at mean 0, variance 1 and this scale and bias."""
    with torch.no_grad():
        for _, _, bn in convolutions(model):
            bn.reset_running_stats()
            bn.weight.fill_(scale)
            bn.bias.fill_(bias)
    return model


def dense_network() -> ResNet:
    """ResNet-20 with nothing dead; every batch norm adds 0.5, so what dies leaves a constant."""
    torch.manual_seed(0)
    return with_norms(resnet20(), bias=0.5)


class GivenBits(nn.Module):
    """A quantizer that leaves the weights as they are."""

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, w: Tensor) -> Tensor:
        return w

    def get_bitwidth(self) -> Tensor:
        return torch.tensor([float(self.bits)])

    def get_learned_bitwidth(self) -> Tensor:
        return torch.tensor([self.bits + 0.25])


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model, and of the generator, that a function which only looks may not change."""
    state = {
        n: (t.device, t.dtype, t.requires_grad, t.shape, t.detach().cpu().numpy().tobytes())
        for n, t in model.state_dict(keep_vars=True).items()
    }
    gradients = {n: p.grad is None for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    kinds = {n: (type(m).__name__, parametrize.is_parametrized(m)) for n, m in model.named_modules()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    return {
        "state": state,
        "gradients": gradients,
        "modes": modes,
        "kinds": kinds,
        "hooks": hooks,
        "generator": torch.get_rng_state().tolist(),
        "autograd": torch.is_grad_enabled(),
    }
