"""Attach weight quantizers to a model, switch them on and off, and find them again."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

FULL_PRECISION_BITS = 32


class WeightQuantization(nn.Module):
    """The parametrization that stands between a layer's stored weight and the weight it computes with."""

    def __init__(self, quantizer: nn.Module, enabled: bool = True) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.enabled = enabled

    def forward(self, w: Tensor) -> Tensor:
        return self.quantizer(w) if self.enabled else w


def attach_weight_quantizers(
    model: nn.Module,
    exclude_layers: Sequence[str],
    quantizer: Callable[..., nn.Module],
    quantizer_kwargs: Mapping[str, Any],
    enabled: bool = True,
) -> list[str]:
    """Give every convolution and linear layer that no pattern excludes a quantizer of its own.

    `exclude_layers` are regular expressions looked for anywhere in a layer's name, so that a plain word
    matches as a substring ("conv1" also hits layer1.0.conv1) and "^conv1$" means the stem alone.
    Layer m's quantizer is then `m.parametrizations.weight[0].quantizer`.

    Returns: the names of the layers quantized, in the model's order.
    Raises: ValueError for a pattern that is no regular expression or matches no module, for a layer that has
        a quantizer already, and for a weight that its quantizer refuses. The model is then left as it was.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    excluded = _matching(exclude_layers, [name for name, _ in model.named_modules() if name])
    chosen = {name: m for name, m in layers.items() if name not in excluded}
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"layer {name} is parametrized already; attach quantizers once, to a plain model"
            )
    quantizations = {}
    for name, layer in chosen.items():
        quantizations[name] = WeightQuantization(quantizer(**quantizer_kwargs), enabled).to(
            layer.weight.device
        )
        with torch.no_grad():
            quantizations[name](
                layer.weight
            )  # a weight that it refuses is found before any layer has changed
    for name, layer in chosen.items():
        parametrize.register_parametrization(layer, "weight", quantizations[name])
        layer.parametrizations.train(layer.training)  # type: ignore[union-attr]
    return list(chosen)


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    if isinstance(patterns, str):
        raise ValueError(f"exclude_layers is the string {patterns!r}; expected a list of patterns")
    matching: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"exclude_layers holds {pattern!r}; expected a pattern, as a string")
        try:
            hits = {name for name in names if re.search(pattern, name)}
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"exclude_layers: {pattern!r} is not a regular expression ({error})") from None
        if not hits:
            raise ValueError(
                f"exclude_layers: {pattern!r} matches no module of the model; "
                f"its modules have names such as {', '.join(names[:4])}"
            )
        matching |= hits
    return matching


def weight_quantization(layer: nn.Module) -> WeightQuantization | None:
    """The quantization of a layer's weight, switched on or off; None where it has none."""
    if parametrize.is_parametrized(layer, "weight"):
        for parametrization in layer.parametrizations.weight:  # type: ignore[union-attr]
            if isinstance(parametrization, WeightQuantization):
                return parametrization
    return None


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a quantizer, by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if weight_quantization(m) is not None}


def quantizers(model: nn.Module) -> dict[str, Any]:
    """The quantizers themselves, by the name of their layer."""
    found = {name: weight_quantization(m) for name, m in model.named_modules()}
    return {name: q.quantizer for name, q in found.items() if q is not None}


def toggle_quantization(model: nn.Module, enabled: bool) -> None:
    """Switch every quantizer of the model on or off; a layer switched off computes in full precision."""
    for layer in quantized_layers(model).values():
        weight_quantization(layer).enabled = enabled  # type: ignore[union-attr]


def weight_bits(layer: nn.Module) -> tuple[int, float]:
    """Bits a weight, as (rounded, learned before rounding); 32 in both where no quantizer is at work."""
    quantization = weight_quantization(layer)
    if quantization is None or not quantization.enabled:
        return FULL_PRECISION_BITS, float(FULL_PRECISION_BITS)
    quantizer = quantization.quantizer
    return int(quantizer.get_bitwidth().item()), quantizer.get_learned_bitwidth().item()  # type: ignore[operator]
