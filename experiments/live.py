"""The live line that a run prints on a terminal, and the signals that stop a run."""

import contextlib
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_BAD_INPUT = 2
# The signals that stop a run, by the names in its messages.
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class ClosedOutputError(Exception):
    """Standard output cannot be written: its reader has gone, or its disk is full."""


class Stopped(BaseException):
    """A signal asks the run to end; `status` is the exit status by shell convention, 128 + its number.

    It is a BaseException, as KeyboardInterrupt is, so that no `except Exception` swallows it.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(NAMES[number])
        self.name, self.status = NAMES[number], 128 + number


class StopSignals:
    """A context in which Ctrl-C and SIGTERM raise `Stopped`, except inside `held`, which defers them.

    A signal that the parent process made this one ignore (nohup, a shell's background job) stays ignored.
    """

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}  # the signal handlers to restore
        self.holding = False
        self.pending: Stopped | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # only there Python allows handlers
            heard = [number for number in NAMES if signal.getsignal(number) is not signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._stop) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        stop = Stopped(signal.Signals(number))
        if not self.holding:
            raise stop
        self.pending = stop

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Defer signals in this context: one that arrives inside raises `Stopped` when the context ends."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.pending:
            raise self.pending


def refuse(sentence: str) -> int:
    """Print the sentence on standard error, in one line. Returns: the exit status of bad input.

    A line break or another control character, which may come from a flag's value, is printed as an escape.
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
    if sys.stderr is not None:  # Python sets None if standard error was closed before the start (2>&-)
        with contextlib.suppress(OSError):  # standard error may be a full disk: the exit status still says it
            print(f"error: {line}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on: a scheduler may send it again while a stopped run writes its last files."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class LiveLine:
    """Prints lines to standard output and, on a terminal, a live line below them, rewritten in place."""

    def __init__(self) -> None:
        if sys.stdout is None:  # Python sets None if standard output was closed before the start (>&-)
            sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        self.on_terminal = sys.stdout.isatty()
        self.silent = False  # True on every rank but 0
        self.shown = False  # whether the live line is on the screen now
        self.last = 0.0  # when `steps` last showed progress, by time.monotonic()
        # A path may have letters that the terminal's encoding lacks: print escapes instead of failing.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")

    def say(self, text: str) -> None:
        """Print a whole line, above the live line. Raises: ClosedOutputError, as every method that prints."""
        if not self.silent:
            self.clear()
            self._print(text + "\n")

    def progress(self, text: str) -> None:
        """Show `text` as the live line, cut to the terminal's width; off a terminal nothing is printed."""
        if self.on_terminal and not self.silent:
            width = shutil.get_terminal_size().columns - 1
            self._print(f"\r\x1b[K{text[:width]}")
            self.shown = True

    def close(self) -> None:
        """Discard all further output: standard output is broken, and Python would flush it again at exit."""
        self.shown = False
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def clear(self) -> None:
        """Remove the live line from the screen."""
        if self.shown:
            self.shown = False
            self._print("\r\x1b[K")

    @staticmethod
    def _print(text: str) -> None:
        try:
            print(text, end="", flush=True)
        except OSError as error:
            raise ClosedOutputError(f"standard output takes no more ({error.strerror})") from None

    def steps(self, epoch: int) -> Callable[[int, int, float], None] | None:
        """Make the function that shows an epoch's progress (epoch from 0), at most ten times a second.

        It is called after each training step with the steps done, the steps in all and the seconds so far.
        Returns: None off a terminal, so that training computes nothing for it.
        """
        if not self.on_terminal:
            return None

        def show(done: int, total: int, seconds: float) -> None:
            now = time.monotonic()
            if now - self.last > 0.1 or done == total:
                self.last = now
                left = seconds / done * (total - done)
                self.progress(
                    f"epoch {epoch + 1}: step {done}/{total}, {done / seconds:.1f} steps/s, {left:.0f} s left"
                )

        return show
