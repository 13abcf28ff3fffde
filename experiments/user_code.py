"""What a setting names as module:attribute: someone's own code, imported before anything else is begun."""

import contextlib
import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.live import Stopped

RAISED = (Exception, SystemExit)  # someone's own code may raise anything, and may end the program


def import_named(flag: str, name: str, expected: str, accepts: Callable[[Any], bool]) -> Any:
    """The attribute of a module that `name` gives as module:attribute.

    Raises: ValueError naming the flag where it cannot be imported, and where `accepts` does not accept it;
        `expected` says in words what would be accepted.
    """
    module, _, attribute = name.partition(":")
    try:
        with _kept_surroundings():
            found = getattr(importlib.import_module(module), attribute, None)
    except Stopped:
        raise
    except BaseException as error:  # importing runs someone's own code; Ctrl-C itself raises `Stopped`
        raise ValueError(
            f"{flag} is {name!r}, and importing {module} raises {type(error).__name__} "
            f"({first_line(error)}); expected a module that can be imported from this folder"
        ) from error
    if not accepts(found):
        what = "no such name" if found is None else "something else of that name"
        raise ValueError(f"{flag} is {name!r}, and {module} has {what}; expected {expected}")
    return found


@contextlib.contextmanager
def _kept_surroundings() -> Iterator[None]:
    """Leave to a module what it defines, and nothing that it changes of torch's defaults and the process."""
    folder, output = Path.cwd(), sys.stdout
    kind, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        os.chdir(folder)
        sys.stdout = output
        torch.set_default_dtype(kind)
        torch.set_grad_enabled(gradients)


def first_line(error: BaseException) -> str:
    """What an error says, in one line of a sentence's length."""
    try:
        said = str(error)
    except Exception:  # an error of someone's own may fail to say anything
        said = ""
    return textwrap.shorten((said.splitlines() or ["no reason given"])[0], 200, placeholder=" ...")
