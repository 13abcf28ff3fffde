"""The live line that a run prints on a terminal, and the signals that stop a run."""

import contextlib
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

EXIT_BAD_INPUT = 2
SILENCE = 60.0  # seconds without a line, after which a log gets one
ENOUGH_SECONDS = 5.0  # of steps, after which the run's length can be told
ESTIMATED_REST = 1.1  # an epoch over its training steps: test pass, counts, checkpoint
# The signals that stop a run, by the names in its messages.
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGHUP"):  # the terminal was closed; Windows has no such signal
    NAMES[signal.SIGHUP] = "SIGHUP"


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
    """A context in which the signals of `NAMES` raise `Stopped`, except inside `held`, which defers them.

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
        except ClosedOutputError:
            if not self.pending:  # Ctrl-C ends the `tee` behind a program too, and came first
                raise
        finally:
            self.holding = False
        if self.pending:
            raise self.pending


def printable(text: object) -> str:
    r"""A text in one line, in which a line break or another control character is an escape.

    >>> print(printable("a\x1b[2J\nb"))
    a\x1b[2J\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def refuse(sentence: str) -> int:
    """Print the sentence on standard error, in one line. Returns: the exit status of bad input.

    A line break or another control character may come from a flag's value or a file's name.
    """
    if sys.stderr is not None:  # Python sets None if standard error was closed before the start (2>&-)
        with contextlib.suppress(OSError):  # standard error may be a full disk: the exit status still says it
            print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
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
        self.said: list[str] = []  # every line, for the end of the run to look back on
        self.endures = False  # whether a standard output that breaks ends nothing, and is remembered
        self.broken: ClosedOutputError | None = None
        self.shown = False  # whether the live line is on the screen now
        self.last = 0.0  # when an epoch last showed progress, by time.monotonic()
        self.printed = time.monotonic()  # when something was last printed
        self.launches_ahead = False  # whether steps run on an accelerator, later than the host counts them
        self.begun: list[float] = []  # when this process's epochs began, by time.monotonic()
        self.epoch_seconds: float | None = None  # what an epoch takes, once that is known, by the last one
        # A path may have letters that the terminal's encoding lacks: print escapes instead of failing.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")

    def say(self, text: str) -> None:
        """Print a whole line, above the live line. Raises: ClosedOutputError, as every method that prints."""
        self.said += text.split("\n")
        if not self.silent:
            self.clear()
            self._print(text + "\n")

    def progress(self, text: str) -> None:
        """Show `text` as the live line, cut to the terminal's width.

        Off a terminal it is printed as a line, but only where nothing else was for a minute.
        """
        if not self.on_terminal and time.monotonic() - self.printed >= SILENCE:
            self.say(text)
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

    def _print(self, text: str) -> None:
        self.printed = time.monotonic()
        try:
            print(text, end="", flush=True)
        except OSError as error:
            broken = ClosedOutputError(f"standard output takes no more ({error.strerror})")
            if not self.endures:
                raise broken from None
            self.close()
            self.broken = broken

    def epoch(self, epoch: int, epochs: int) -> "EpochProgress | None":
        """What shows the progress of an epoch (from 0) of a run; None where nothing is ever printed."""
        if self.silent:
            return None
        progress = EpochProgress(self, epoch, epochs)
        self.begun.append(time.monotonic())
        if self.launches_ahead and len(self.begun) == 3:  # in the first epoch the step's graph was captured
            progress.tell(self.begun[2] - self.begun[1])
        elif self.epoch_seconds is not None and len(self.begun) > 1:
            self.epoch_seconds = self.begun[-1] - self.begun[-2]
        return progress


class EpochProgress:
    """Shows how far an epoch is, and how long the run will still take, at most ten times a second.

    It is called after each training step with the steps done, the steps in all and the seconds so far. In
    the first epoch of a process it says once how long the whole run takes. On an accelerator these steps have
    only been launched; there that is said, and known, once two epochs are over.
    """

    def __init__(self, live: LiveLine, epoch: int, epochs: int) -> None:
        self.live, self.epoch, self.epochs = live, epoch, epochs
        self.from_step, self.from_seconds = 0, 0.0  # what the time of a step is measured from

    def __call__(self, done: int, total: int, seconds: float) -> None:
        now, live = time.monotonic(), self.live
        measured = seconds - self.from_seconds
        each = measured / (done - self.from_step)
        if done == 1:  # it takes longer than any other: torch sets up, and the ledger looks closely
            self.from_step, self.from_seconds = 1, seconds
        estimate = ESTIMATED_REST * each * total
        told = live.epoch_seconds is not None
        known = (done > 1 and measured >= ENOUGH_SECONDS) or done == total
        if known and not told and not live.launches_ahead:
            self.tell(estimate)
        if now - live.last > 0.1 or done == total:
            live.last = now
            text = f"epoch {self.epoch + 1} of {self.epochs}: step {done}/{total}"
            if not live.launches_ahead:
                whole = (len(live.begun) > 1 and live.epoch_seconds) or estimate
                left = each * (total - done) + (self.epochs - self.epoch - 1) * whole
                text += f", {1 / each:.1f} steps/s, {spelled(left)} left"
            live.progress(text)

    def tell(self, whole: float) -> None:
        """Say how long this epoch and those after it take, `whole` seconds each."""
        self.live.epoch_seconds = whole
        self.live.say(f"      ~ about {spelled((self.epochs - self.epoch) * whole)} for {self._epochs()}")

    def phase(self, what: str) -> None:
        """Show what the epoch does after its steps."""
        self.live.progress(f"epoch {self.epoch + 1} of {self.epochs}: {what}")

    def _epochs(self) -> str:
        left = self.epochs - self.epoch
        return f"{left} epochs" if left != 1 else "1 epoch"


def spelled(seconds: float) -> str:
    """
    >>> spelled(42), spelled(95), spelled(1140), spelled(7200)
    ('42 s', '2 min', '19 min', '2.0 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
