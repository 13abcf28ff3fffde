"""The penalty that makes whole channels vanish: a group lasso over coupled weight slices.

Source: Yuan & Lin 2006, eq. (2.1), without the sqrt(n_g) factor; groups as in src/channels.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from src.channels import FILTERS, ChannelGroups, channel_groups
from utils_quantization import quantized_layers


def group_norms(groups: ChannelGroups, weights: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of each group, all its weight slices taken as one vector.

    Shapes: weights (O, I, kh, kw) by layer name -> (C,), weight units.
    Gradient: 0, not NaN, at a group of zeros.
    """
    slices = [
        torch.linalg.vector_norm(weights[name], dim=(1, 2, 3) if dim == FILTERS else (0, 2, 3))
        for name, dim in groups.members
    ]
    return torch.linalg.vector_norm(torch.stack(slices), dim=0)  # (members, C) -> (C,)


def coupled_group_lasso(model: nn.Module) -> Callable[[nn.Module], Tensor]:
    """The sum of the group norms of the quantized convolutions' weights, as quantized.

    Returns a function of the model that gives a scalar. Call it inside the same `parametrize.cached()` as the
    forward pass: then each quantizer is evaluated once for both.

    Raises: ValueError if the model is not a ResNet of `resnet.py`.
    """
    convolutions = [n for n, m in quantized_layers(model).items() if isinstance(m, nn.Conv2d)]
    groups = channel_groups(model, convolutions)
    return lambda model: _penalty(model, convolutions, groups)


def _penalty(model: nn.Module, layers: Sequence[str], groups: Sequence[ChannelGroups]) -> Tensor:
    if not groups:
        return next(model.parameters()).new_zeros(())
    weights = {name: cast(Tensor, model.get_submodule(name).weight) for name in layers}
    return torch.cat([group_norms(g, weights) for g in groups]).sum()
