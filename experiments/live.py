"""What the run says while it goes on, and what stops it from outside: the live line, the signals."""

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
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class ClosedOutputError(Exception):
    """Standard output takes no more: its reader has gone, or its disk is full."""


class Stopped(BaseException):
    """A signal asks the run to end."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(NAMES[number])
        self.name, self.status = NAMES[number], 128 + number


class StopSignals:
    """Within it, Ctrl-C and SIGTERM raise `Stopped`, but not while they are held.

    A signal that the parent had us ignore (nohup, a shell's background job) stays ignored.
    """

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.holding = False
        self.pending: Stopped | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python handles signals there alone
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
        """What is done within is done wholly; a signal that came meanwhile raises `Stopped` at its end."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
        if self.pending:
            raise self.pending


def refuse(sentence: str) -> int:
    """Say on standard error, in one line, what cannot be done; returns the exit status of bad input."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
    if sys.stderr is not None:  # None where it was closed before the start: 2>&-
        with contextlib.suppress(OSError):  # a full disk: the status must do
            print(f"error: {line}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


def ignore_sigterm() -> None:
    """For the little that is left to do once the run is told to stop: schedulers may say so twice."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class LiveLine:
    """Whole lines to standard output; on a terminal, one more below them that is rewritten in place."""

    def __init__(self) -> None:
        if sys.stdout is None:  # closed before the start: >&-
            sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        self.on_terminal = sys.stdout.isatty()
        self.silent = False  # in all processes of a run but the first
        self.shown = False
        self.last = 0.0
        # A path's letters may be none of the terminal's: show them as escapes rather than stop.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")

    def say(self, text: str) -> None:
        if not self.silent:
            self.clear()
            self._print(text + "\n")

    def progress(self, text: str) -> None:
        if self.on_terminal and not self.silent:
            width = shutil.get_terminal_size().columns - 1
            self._print(f"\r\x1b[K{text[:width]}")
            self.shown = True

    def close(self) -> None:
        """Nobody reads standard output any more: let what is said go nowhere."""
        self.shown = False
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def clear(self) -> None:
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
        """The progress of one epoch's training steps, at most ten times a second; None off a terminal."""
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
