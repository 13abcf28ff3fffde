"""Count the MACs, BOPs and zeros of a network, for each layer and in total.

For a convolution with weights (O, I, kh, kw) and H x W output positions:

    dense MACs         O I kh kw H W
    structured MACs    the same product over the channels that are left (see src/channels.py)
    unstructured MACs  nonzero weights x H W, summed over the uses of a layer
    BOPs               MACs x bits of a weight x 32 bits of an activation

A weight without a quantizer has 32 bits. A linear layer counts as a convolution with one position. In a
convolution of several groups I is the inputs of one, and structured MACs add up over what is left of each.
Batch norms, ReLUs and additions are not counted; torch.utils.flop_counter does not count them either.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from src.channels import ChannelAccount, ChannelState, LayerChannels, read_weights, trace_channels
from src.graph import path
from src.slim import SlimLayer
from utils_quantization import FULL_PRECISION_BITS, quantized_layers, weight_bits

ACTIVATION_BITS = 32  # activations are never quantized


@dataclass(frozen=True)
class LayerCount:
    """The counts of one convolution or linear layer; MACs are for one image."""

    name: str
    quantized: bool
    bits: int  # of a weight, as the forward pass uses them
    learned_bits: float  # of a weight, before rounding
    weights: int
    zero_weights: int
    filters: int  # output channels
    zero_filters: int  # filters whose weights are all zero
    states: tuple[int, ...]  # the ChannelState of each output channel
    dense_macs: int
    structured_macs: int
    unstructured_macs: int
    is_convolution: bool = True

    @property
    def alive_channels(self) -> int:
        return self.states.count(ChannelState.ALIVE)

    @property
    def constant_channels(self) -> int:
        return self.states.count(ChannelState.CONSTANT)

    @property
    def null_channels(self) -> int:
        return self.states.count(ChannelState.NULL)

    @property
    def dense_bops(self) -> int:
        return self.dense_macs * FULL_PRECISION_BITS * ACTIVATION_BITS

    @property
    def structured_bops(self) -> int:
        return self.structured_macs * self.bits * ACTIVATION_BITS

    @property
    def unstructured_bops(self) -> int:
        return self.unstructured_macs * self.bits * ACTIVATION_BITS


TOTALS = tuple(
    f"{kind}_{unit}" for unit in ("macs", "bops") for kind in ("dense", "structured", "unstructured")
)


@dataclass(frozen=True)
class NetworkCount:
    """The counts of all layers of a network, with their totals and means."""

    layers: tuple[LayerCount, ...]
    barriers: tuple[str, ...] = ()  # operations through which no channel is followed, see src/channels.py
    elsewhere: frozenset[str] = frozenset()  # layers of which a use is not by their module

    def total(self, count: str) -> int:
        """The sum of one of `TOTALS`, or of any other integer field, over the layers."""
        return sum(getattr(layer, count) for layer in self.layers)

    @property
    def quantized(self) -> tuple[LayerCount, ...]:
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def unstructured_sparsity(self) -> float:
        """Share of the quantized layers' weights that are exactly zero; 0 where none is quantized."""
        return _share(self.quantized, "zero_weights", "weights")

    @property
    def structured_sparsity(self) -> float:
        """Share of the quantized convolutions' filters that are all zero; 0 where none is quantized."""
        convolutions = tuple(layer for layer in self.quantized if layer.is_convolution)
        return _share(convolutions, "zero_filters", "filters")

    @property
    def mean_learned_bits(self) -> float:
        """Mean over the quantized layers of the bit-width before rounding; 32 where none is quantized."""
        return _mean([layer.learned_bits for layer in self.quantized])

    @property
    def mean_bits(self) -> float:
        """Mean over the quantized layers of the bit-width in use; 32 where none is quantized."""
        return _mean([layer.bits for layer in self.quantized])


def _share(layers: tuple[LayerCount, ...], part: str, whole: str) -> float:
    total = sum(getattr(layer, whole) for layer in layers)
    return sum(getattr(layer, part) for layer in layers) / total if total else 0.0


def _mean(bits: list[float]) -> float:
    return sum(bits) / len(bits) if bits else float(FULL_PRECISION_BITS)


def count_network(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> NetworkCount:
    """Count a network, with its quantizers switched on or off as they are; it is not changed.

    Raises: ValueError if torch.export cannot trace the model.
    """
    weights = read_weights(model)
    bits = {name: weight_bits(model.get_submodule(name)) for name in weights}
    return _count(model, bits, trace_channels(model, input_size, weights))


@torch.no_grad()
def count_ceiling(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> NetworkCount:
    """Count the network as if all weights of its quantized layers were zero: compression cannot do better.

    No quantizer is evaluated, so that the weights may be NaN or infinite. Bits are 32 in every layer.
    """
    weights = read_weights(model, stored=True)
    weights |= {name: torch.zeros_like(weights[name]) for name in quantized_layers(model)}
    return _count(model, {}, trace_channels(model, input_size, weights))


def _count(model: nn.Module, bits: Mapping[str, tuple[int, float]], account: ChannelAccount) -> NetworkCount:
    """Count by the `weight_bits` of each layer, by the layer's name."""
    quantized = quantized_layers(model)
    full = FULL_PRECISION_BITS, float(FULL_PRECISION_BITS)
    layers = [
        _count_layer(name, name in quantized, bits.get(name, full), channels)
        for name, channels in account.layers.items()
    ]
    elsewhere = frozenset(use.name for use, _ in account.uses.values() if path(use.node) != use.name)
    return NetworkCount(tuple(layers), account.barriers, elsewhere)


def _count_layer(name: str, quantized: bool, bits: tuple[int, float], channels: LayerChannels) -> LayerCount:
    nonzero = (channels.weight != 0).flatten(1)
    zeros = nonzero.numel() - int(nonzero.sum())
    return LayerCount(
        name=name,
        quantized=quantized,
        bits=bits[0],
        learned_bits=bits[1],
        weights=nonzero.numel(),
        zero_weights=zeros,
        filters=len(nonzero),
        zero_filters=len(nonzero) - int(nonzero.any(1).sum()),
        states=tuple(channels.states.tolist()),
        dense_macs=nonzero.numel() * channels.positions,
        structured_macs=channels.structured_macs,
        unstructured_macs=channels.unstructured_macs,
        is_convolution=channels.weight.ndim > 2,
    )


def ratio(dense: int, compressed: int) -> float:
    """The compression ratio of two counts; infinite if nothing is left of the compressed network."""
    return dense / compressed if compressed else math.inf


def format_ratio(value: float) -> str:
    """Format a compression ratio with two decimals, or say in words that nothing is left of the network."""
    return "infinite (nothing is left)" if math.isinf(value) else f"{value:.2f}x"


@torch.no_grad()
def count_by_torch(network: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> dict[str, int]:
    """Count multiply-accumulates for one image with torch's counter, as a check on the counts of this file.

    torch.utils.flop_counter counts 2 operations for each multiply-accumulate. It runs the network once: a
    batch norm in training mode would update its running statistics.

    Returns: the counts by module name; "" is the whole network.
    """
    like = next(network.parameters(), torch.empty(0))
    image = torch.rand(1, *input_size, generator=torch.Generator().manual_seed(0), device="cpu")
    with parametrize.cached():  # what makes a weight, an orthogonal one say, is not part of a forward pass
        for module in filter(parametrize.is_parametrized, network.modules()):
            for name in module.parametrizations:  # type: ignore[union-attr]
                getattr(module, name)
        with FlopCounterMode(display=False) as counter:
            network(image.to(like))
    # The counter's keys are "Global", the name of the network's class, and "Class.module.name" for a module.
    by_module = {key.partition(".")[2]: sum(f.values()) // 2 for key, f in counter.get_flop_counts().items()}
    return by_module | {"": counter.get_total_flops() // 2}


def in_layers(by_torch: Mapping[str, int], count: NetworkCount) -> dict[str, int]:
    """What torch counts in each layer of a network, from `count_by_torch`, by name.

    A layer that is used otherwise than by its module too, and one whose module does more, with a barrier or
    another layer in it, has this file's own count.
    """
    barriers = [barrier.rpartition(" in ")[2] for barrier in count.barriers]
    inner = [*barriers, *(layer.name for layer in count.layers)]

    def is_not_the_module(name: str) -> bool:
        within = f"{name}.".lstrip(".")  # all is in a network that is itself a layer
        does_more = name in barriers or any(other.startswith(within) for other in inner if other != name)
        return does_more or name in count.elsewhere

    ours = {layer.name: layer.dense_macs for layer in count.layers}
    return ours | {name: by_torch[name] for name in ours if name in by_torch and not is_not_the_module(name)}


def of_layers(by_torch: Mapping[str, int], count: NetworkCount) -> int:
    """What torch counts in a network's layers, from `count_by_torch`: all of it, where there is no barrier.

    In a barrier torch counts what this file leaves out: products of activations, as in attention, and
    transposed convolutions.
    """
    return sum(in_layers(by_torch, count).values()) if count.barriers else by_torch[""]


def count_slim_by_torch(slim: nn.Module, count: NetworkCount) -> int:
    """What torch counts in the layers of the smaller network of a network with this count, for one image."""
    by_torch = count_by_torch(slim)
    if not count.barriers:
        return by_torch[""]
    return sum(by_torch[name] for name, m in slim.named_modules() if isinstance(m, SlimLayer))
