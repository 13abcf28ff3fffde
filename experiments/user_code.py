"""What a setting names as module:attribute: someone's own code, imported before anything else is begun."""

import importlib
import textwrap
from collections.abc import Callable
from typing import Any

RAISED = (Exception, SystemExit)  # someone's own code may raise anything, and may end the program


def import_named(flag: str, name: str, expected: str, accepts: Callable[[Any], bool]) -> Any:
    """The attribute of a module that `name` gives as module:attribute.

    Raises: ValueError naming the flag where it cannot be imported, and where `accepts` does not accept it;
        `expected` says in words what would be accepted.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except RAISED as error:  # importing runs someone's own code
        raise ValueError(
            f"{flag} is {name!r}, and importing {module} raises {type(error).__name__} "
            f"({first_line(error)}); expected a module that can be imported from this folder"
        ) from error
    if not accepts(found):
        what = "no such name" if found is None else "something else of that name"
        raise ValueError(f"{flag} is {name!r}, and {module} has {what}; expected {expected}")
    return found


def first_line(error: BaseException) -> str:
    """What an error says, in one line of a sentence's length."""
    return textwrap.shorten((str(error).splitlines() or ["no reason given"])[0], 200, placeholder=" ...")
