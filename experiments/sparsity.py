"""The penalty that makes whole channels vanish: a group lasso over coupled weight slices.

Source: Yuan & Lin 2006, eq. (2.1), with a group's MACs or 1 in place of sqrt(n_g); groups as in
src/groups.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.settings import EQUAL, MACS, QUANTIZED, STORED
from src.channels import read_weights, trace_channels
from src.groups import FILTERS, ChannelGroups, channel_groups
from utils_quantization import quantized_layers


def group_norms(
    groups: ChannelGroups, squares: Mapping[str, Tensor], places: Sequence[Tensor | None]
) -> Tensor:
    """L2 norm of each group, all its weight slices taken as one vector.

    Shapes: squares (O, I) by layer name, the sums of the squared weights of each kernel, places as those of
    the groups, (C,) each -> (C,), weight units.
    Gradient: 0, not NaN, at a group of zeros.
    """
    slices = [squares[name].sum(1 if dim == FILTERS else 0) for name, dim in groups.members]
    slices = [s if p is None else s[p.to(s.device)] for s, p in zip(slices, places, strict=True)]
    total = torch.stack(slices).sum(0)  # (members, C) -> (C,)
    return (total + (total == 0)).sqrt() * (total != 0)


def group_macs(
    model: nn.Module, groups: Sequence[ChannelGroups], input_size: tuple[int, int, int] = (3, 32, 32)
) -> list[int]:
    """The multiply-accumulates of each group's weight slices in the dense network, for one image."""
    weights = read_weights(model)
    layers = trace_channels(model, input_size, weights).layers
    return [
        sum(weights[n].numel() // weights[n].shape[dim] * layers[n].positions for n, dim in g.members)
        for g in groups
        for _ in range(g.channels)
    ]


def coupled_group_lasso(
    model: nn.Module,
    on: str = QUANTIZED,
    group_weights: str = EQUAL,
    input_size: tuple[int, int, int] = (3, 32, 32),
) -> Callable[[nn.Module], Tensor]:
    """The sum of the group norms of the quantized convolutions' weights.

    With `group_weights` "macs" each norm is multiplied by its group's MACs over the mean of all groups, so
    that a channel is pressed by what it costs.

    `on` says of which: as they are quantized, or as they are stored. The norm of quantized weights has no
    gradient at those that are zero, so it lets go of every weight that the dead zone has caught; on stored
    weights it goes on pressing, and it leaves the quantizers' own parameters alone.

    Returns a function of the model that gives a scalar. Call it inside the same `parametrize.cached()` as the
    forward pass: then each quantizer is evaluated once for both.

    Raises: ValueError if torch.export cannot trace the model.
    """
    convolutions = _quantized_convolutions(model)
    groups = channel_groups(model, convolutions, input_size)
    by_macs = group_weights == MACS
    macs = group_macs(model, groups, input_size) if by_macs else [1] * sum(g.channels for g in groups)
    mean = sum(macs) / max(len(macs), 1) or 1
    # Whole numbers, so that the weights are exact in whatever precision the model computes.
    device = next(model.parameters()).device
    counts = torch.tensor(macs, device=device)
    # Made once: at each step they would come from the host, which a captured CUDA graph cannot do.
    places = [[p if p is None else torch.tensor(p, device=device) for p in g.places] for g in groups]
    return lambda model: _penalty(model, convolutions, groups, places, on, counts) / mean


def keep_dead_slices(
    model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)
) -> Callable[[nn.Module], list[tuple[Tensor, Tensor]]]:
    """What keeps a dead slice dead: a function of the model that gives pairs (stored weight, its mask).

    A mask is 0 on the filters and the input slices whose quantized weights are all zero, and 1 elsewhere; it
    broadcasts over the stored weight, to be multiplied with it after the optimizer's step. Without it the
    batch norm behind a filter of zeros, whose variance is zero, magnifies the gradient that the
    straight-through step hands to the stored weights, and throws them out of the dead zone again.

    Raises: ValueError if torch.export cannot trace the model.
    """
    groups = channel_groups(model, _quantized_convolutions(model), input_size)
    dims: dict[str, set[int]] = {}
    for name, dim in (member for g in groups for member in g.members):
        dims.setdefault(name, set()).add(dim)

    @torch.no_grad()
    def masks(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for name, slices in dims.items():
            layer: Any = model.get_submodule(name)
            # One pass over the weights for both dimensions: (O, I, 1, 1), 0 where a kernel is all zero.
            kernels = layer.weight.abs().sum((2, 3), keepdim=True)
            mask = torch.ones_like(kernels)
            for dim in slices:
                mask = mask * kernels.any(1 - dim, keepdim=True)
            pairs.append((layer.parametrizations.weight.original, mask))
        return pairs

    return masks


def _quantized_convolutions(model: nn.Module) -> list[str]:
    return [n for n, m in quantized_layers(model).items() if isinstance(m, nn.Conv2d)]


def _penalty(
    model: nn.Module,
    layers: Sequence[str],
    groups: Sequence[ChannelGroups],
    places: Sequence[Sequence[Tensor | None]],
    on: str,
    counts: Tensor,
) -> Tensor:
    if not groups:
        return next(model.parameters()).new_zeros(())
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
    weights: dict[str, Tensor] = {
        name: layer.parametrizations.weight.original if on == STORED else layer.weight
        for name, layer in modules.items()
    }
    squares = {name: w.square().sum((2, 3)) for name, w in weights.items()}  # one pass for both dimensions
    norms = torch.cat([group_norms(g, squares, p) for g, p in zip(groups, places, strict=True)])
    return (norms * counts.to(norms.device)).sum()
