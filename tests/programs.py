"""Programs that a test starts: their environment, and how long it waits for them."""

import os
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent

# In seconds. A deadline in a test only ends what hangs: on a machine that is busy with other work, a program
# of half a second can take a minute, and that is no failure.
DEADLINE = 600


def environment() -> dict[str, str]:
    """Return the environment of a program that finds the project and computes in one thread.

    COLUMNS and LINES are left out, so that a program sees the size of its own terminal, not of the tests'.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as `condition()` holds; fail with `what` was waited for if that takes too long."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited {DEADLINE} seconds for {what}"
        time.sleep(0.01)


def environment_at_start(code: str, folder: Path) -> dict[str, str]:
    """Return the environment of Python programs that first execute `code`, which is written to `folder`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return environment() | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
