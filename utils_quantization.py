"""Attach weight quantizers to a model, find them, switch them on and off, and take them off again."""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

FULL_PRECISION_BITS = 32  # of a weight without a quantizer
PARAMETER_GROUPS = ("weights", "bit", "deadzone")  # of the optimizer; each has its learning rate and decay


class Quantizer(Protocol):
    """What quantizes the weight of one layer: an nn.Module with these two methods.

    >>> class Ternary(nn.Module):
    ...     def forward(self, w: Tensor) -> Tensor:
    ...         w_hat = w.abs().mean() * (w / w.abs().mean()).round().clamp(-1, 1)
    ...         return w + (w_hat - w).detach()  # straight through
    ...
    ...     def get_bitwidth(self) -> int:
    ...         return 2

    The following is optional, and `src.quantizer.DeadZoneLDZCompander` has it all:

    - `parameter_groups`, a mapping from the names of its parameters to `PARAMETER_GROUPS`: the learning rate
      and decay that they are trained with. A parameter that it does not name is trained as the weights are.
    - `get_learned_bitwidth()`, the bit-width before rounding. Without it, `get_bitwidth()` stands for it.
    - `codes(w)`, the integers behind `forward(w)`, as `src.quantizer.Codes`. Without it, packed files hold
      the quantized weights as float32.
    - `max_bits`, `fixed_bit_val` and `learnable_bit`, arguments of its constructor, for --max-bits and
      --fixed-bits. The constructor must work without arguments.
    """

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weight, of the shape and dtype of w, with a gradient to w."""

    def get_bitwidth(self) -> Tensor | float:
        """The whole number of bits of a weight as `forward` uses them, 1 to 32."""


class WeightQuantization(nn.Module):
    """The parametrization that turns a layer's stored weight into the weight that the layer computes with.

    That is the quantized weight, or the stored weight itself while `enabled` is False.
    """

    def __init__(self, quantizer: nn.Module, enabled: bool = True) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.enabled = enabled

    def forward(self, w: Tensor) -> Tensor:
        return self.quantizer(w) if self.enabled else w


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The convolutions and linear layers, quantized or not, by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def weight_name(layer: str) -> str:
    """The name of a layer's weight, by the layer's: "" is that of a network that is itself a layer."""
    return f"{layer}.weight".lstrip(".")


def layer_name(parameter: str) -> str:
    """The name of the layer that a parameter is the weight of; the parameter's own if it is none's."""
    return f".{parameter}".removesuffix(".weight").lstrip(".")


def attach_weight_quantizers(
    model: nn.Module,
    exclude_layers: Sequence[str],
    quantizer: Callable[..., nn.Module],
    quantizer_kwargs: Mapping[str, Any],
    enabled: bool = True,
) -> list[str]:
    """Attach a quantizer of its own to every convolution and linear layer that no pattern excludes.

    `exclude_layers` are regular expressions that are searched for anywhere in a layer's name: "conv1" also
    excludes layer1.0.conv1, and "^conv1$" excludes the stem alone. A layer's quantizer is made by
    `quantizer(**quantizer_kwargs)`, starts switched on unless `enabled` is False, and is found again as
    `layer.parametrizations.weight[0].quantizer`.

    Returns: the names of the layers that were given a quantizer, in the model's order.
    Raises: ValueError for a pattern that is not a regular expression or matches no module, for a layer whose
        weight is parametrized already or is another module's too, for a weight that its quantizer refuses,
        and for a quantizer that is not as `Quantizer` describes. The model is unchanged then.
    """
    layers = layers_of(model)
    excluded = _matching(exclude_layers, [name for name, _ in model.named_modules() if name])
    chosen = {name: m for name, m in layers.items() if name not in excluded}
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"layer {name} is parametrized already; attach quantizers once, to a plain model"
            )
        if sum(p is layer.weight for module in model.modules() for p in module._parameters.values()) > 1:
            raise ValueError(f"the weight of {name} is another's too; expected one for each quantized layer")
    quantizations = {}
    for name, layer in chosen.items():
        quantization = WeightQuantization(quantizer(**quantizer_kwargs), enabled).to(layer.weight.device)
        # Refuse a bad weight or a bad quantizer now, while no layer has been changed yet.
        _check(quantization, layer.weight)
        quantizations[name] = quantization
    for name, layer in chosen.items():
        parametrize.register_parametrization(layer, "weight", quantizations[name])
        layer.parametrizations.train(layer.training)
    return list(chosen)


@torch.no_grad()
def _check(quantization: WeightQuantization, w: Tensor) -> None:
    """Make sure that the quantizer of the weight w is as `Quantizer` describes. Raises: ValueError."""
    quantizer: Any = quantization.quantizer
    name = type(quantizer).__name__
    if not callable(getattr(quantizer, "get_bitwidth", None)):
        raise ValueError(f"{name} has no method get_bitwidth(); expected it to give the bits of a weight")
    before = w.clone()
    try:
        w_hat: object = quantization(w)
    except ValueError:  # it says what is wrong with the weight
        raise
    except Exception as error:  # someone's own quantizer may raise anything
        raise ValueError(
            f"{name}.forward raises {type(error).__name__} for a weight of shape {tuple(w.shape)} ({error}); "
            f"expected it to take the weight of any convolution or linear layer"
        ) from error
    if not w.is_meta and not torch.equal(w.nan_to_num(), before.nan_to_num()):
        raise ValueError(
            f"{name}.forward writes into the weight that it is given; expected it to leave that alone"
        )
    found = (tuple(w_hat.shape), w_hat.dtype) if isinstance(w_hat, Tensor) else type(w_hat).__name__
    if found != (tuple(w.shape), w.dtype):
        raise ValueError(
            f"{name}.forward gives {found} for a weight of shape {tuple(w.shape)} and {w.dtype}; "
            f"expected a tensor of that shape and dtype"
        )
    _bits(quantizer)
    parameter_groups(quantizer)


def _matching(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """The names in which any of the patterns is found. Raises: ValueError, as `attach_weight_quantizers`."""
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
    """Find the quantization of a layer's weight, switched on or off; None if the layer has none."""
    if parametrize.is_parametrized(layer, "weight"):
        for parametrization in layer.parametrizations.weight:  # type: ignore[union-attr]
            if isinstance(parametrization, WeightQuantization):
                return parametrization
    return None


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a quantizer, switched on or off, by name, in the model's order."""
    return {name: m for name, m in model.named_modules() if weight_quantization(m) is not None}


def quantizers(model: nn.Module) -> dict[str, Any]:
    """The quantizers of the model, switched on or off, by the name of their layer, in the model's order."""
    found = {name: weight_quantization(m) for name, m in model.named_modules()}
    return {name: q.quantizer for name, q in found.items() if q is not None}


def parameter_groups(quantizer: nn.Module) -> dict[str, str]:
    """The optimizer's group of each parameter that the quantizer trains, by the parameter's name.

    Raises: ValueError if its own `parameter_groups` name what is not there.
    """
    own: Mapping[str, str] = getattr(quantizer, "parameter_groups", {})
    names = [name for name, _ in quantizer.named_parameters()]
    for name, group in own.items():
        if name not in names or group not in PARAMETER_GROUPS:
            raise ValueError(
                f"{type(quantizer).__name__}.parameter_groups has {name!r}: {group!r}; expected a name among "
                f"its parameters ({', '.join(names) or 'none'}), and a group of {', '.join(PARAMETER_GROUPS)}"
            )
    return {n: own.get(n, "weights") for n, p in quantizer.named_parameters() if p.requires_grad}


def has_codes(quantizer: nn.Module) -> bool:
    """Whether the quantizer gives its weight as integers too; see `Quantizer`."""
    return callable(getattr(quantizer, "codes", None))


def toggle_quantization(model: nn.Module, enabled: bool) -> None:
    """Switch all quantizers of the model on, or off: its layers then compute in full precision."""
    for layer in quantized_layers(model).values():
        weight_quantization(layer).enabled = enabled  # type: ignore[union-attr]


@torch.no_grad()
def without_quantizers(model: nn.Module, stored: bool = False) -> nn.Module:
    """Copy the model into one that stores the weights which its layers compute with, and has no quantizer.

    Where a quantizer is switched on these are the quantized weights, so that the outputs are the same; with
    `stored` they are the weights as stored, and no quantizer is evaluated.
    """
    layers: list[Any] = list(quantized_layers(model).values())
    # The copy takes its layers from here. All are here before the first is filled: one may hold others.
    copies: dict[int, Any] = {id(layer): nn.Module.__new__(type(layer).__bases__[0]) for layer in layers}
    for layer in layers:
        _fill(copies[id(layer)], layer, stored, copies)
    return copy.deepcopy(model, copies)


def _fill(plain: Any, layer: Any, stored: bool, copies: dict[int, Any]) -> None:
    """Make an empty layer, of the class that a quantized one had before, its copy with one of its weights.

    `remove_parametrizations` on a deep copy would break the original: both share the parametrized class, and
    the removal deletes `weight` from that class.
    """
    plain.__dict__ = copy.deepcopy(layer.__dict__, copies)
    del plain.parametrizations
    # `layer.weight` would put a tensor without a gradient into an open `parametrize.cached()`.
    weight = layer.parametrizations.weight.original if stored else layer.parametrizations.weight()
    plain.weight = nn.Parameter(weight.clone())


def weight_bits(layer: nn.Module) -> tuple[int, float]:
    """Bits of a weight of the layer, as (in use, learned before rounding); 32 and 32 without a quantizer.

    A quantizer that is switched off counts as none.
    """
    quantization = weight_quantization(layer)
    if quantization is None or not quantization.enabled:
        return FULL_PRECISION_BITS, float(FULL_PRECISION_BITS)
    return _bits(quantization.quantizer)


def _bits(quantizer: Any) -> tuple[int, float]:
    """As `weight_bits`. Raises: ValueError if the bits in use are no whole number from 1 to 32."""
    bits = _number(quantizer.get_bitwidth())
    if bits not in range(1, FULL_PRECISION_BITS + 1):
        raise ValueError(
            f"{type(quantizer).__name__}.get_bitwidth() gives {bits}; expected one whole number, 1 to 32"
        )
    has_learned = callable(getattr(quantizer, "get_learned_bitwidth", None))
    learned = _number(quantizer.get_learned_bitwidth()) if has_learned else float(bits)
    if not math.isfinite(learned):
        raise ValueError(
            f"{type(quantizer).__name__}.get_learned_bitwidth() gives {quantizer.get_learned_bitwidth()}; "
            f"expected one finite number"
        )
    return int(bits), learned


def _number(bits: Tensor | float) -> float:
    """The one number that a method gives, NaN for what is none or several."""
    if isinstance(bits, Tensor):
        return bits.item() if bits.numel() == 1 else math.nan
    return float(bits) if isinstance(bits, Real) else math.nan
