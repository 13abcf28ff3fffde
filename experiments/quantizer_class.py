"""The class that quantizes the weights, as the settings name it, tried before anything else is begun."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from experiments.settings import Settings, flag
from experiments.user_code import RAISED, first_line, import_named
from src.packing import read_codes
from src.quantizer import MIN_BITS, DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, weight_bits

ARGUMENTS = {"max_bits": "max_bits", "fixed_bits": "fixed_bit_val"}  # setting, and the constructor's argument


def find_quantizer(settings: Settings) -> Callable[[], nn.Module]:
    """What makes a quantizer of the class --quantizer, with what --max-bits and --fixed-bits ask of it.

    The class may be anybody's, so one is made and tried on a small layer. `utils_quantization.Quantizer` says
    what it must have.

    Raises: ValueError naming the flag and what is wrong with the class.
    """
    found = import_named(
        "--quantizer",
        settings.quantizer,
        "a class of nn.Module",
        lambda found: inspect.isclass(found) and issubclass(found, nn.Module),
    )
    make = functools.partial(found, **_arguments(found, settings))
    model = nn.Sequential(nn.Conv2d(16, 16, 3))
    try:
        attach_weight_quantizers(model, [], make, {})
        read_codes(model)
    except RAISED as error:
        what = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        asked = "".join(
            f", {flag(name)} {value}" for name in ARGUMENTS if (value := getattr(settings, name)) is not None
        )
        raise ValueError(f"--quantizer {settings.quantizer}{asked}: {what}{first_line(error)}") from error
    if found is DeadZoneLDZCompander and settings.max_bits == MIN_BITS:
        raise ValueError(
            f"--max-bits is {MIN_BITS}, the fewest, so that none are learned; give --fixed-bits {MIN_BITS}"
        )
    bits, _ = weight_bits(model[0])
    if settings.fixed_bits not in (None, bits):
        raise ValueError(
            f"--fixed-bits is {settings.fixed_bits}, and {settings.quantizer} made with it has {bits} bits; "
            f"expected a class whose fixed_bit_val acts"
        )
    return make


def _arguments(found: Callable[..., nn.Module], settings: Settings) -> dict[str, Any]:
    """The constructor's arguments: only those that were asked for, so that a class need not know of them."""
    # A class without a constructor of its own has torch's, which lets any argument in and then refuses it.
    takes = {} if found.__init__ is nn.Module.__init__ else inspect.signature(found).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    arguments: dict[str, Any] = {}
    for setting, argument in ARGUMENTS.items():
        value = getattr(settings, setting)
        if value is not None and not takes_any and argument not in takes:
            raise ValueError(
                f"{flag(setting)} is {value}, and the constructor of {settings.quantizer} takes no "
                f"{argument}; leave {flag(setting)} out, or name a class that takes it"
            )
        if value is not None:
            arguments[argument] = value
    if settings.fixed_bits is not None and "learnable_bit" in takes:
        arguments["learnable_bit"] = False
    return arguments
