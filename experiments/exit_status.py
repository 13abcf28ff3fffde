"""What a command ends with: errors, signals and lost ranks as one sentence and an exit status."""

from types import TracebackType

from experiments.cifar import DataError
from experiments.device import is_out_of_memory
from experiments.distributed import LostProcessError
from experiments.files import OutputError
from experiments.live import EXIT_BAD_INPUT, ClosedOutputError, LiveLine, Stopped, StopSignals, refuse
from experiments.user_code import first_line

EXIT_OK, EXIT_FAILED = 0, 1


class ExitStatus:
    """Within it, what goes wrong ends the command in one sentence; `status` is then what to exit with.

        with ExitStatus(live, "--resume goes on from the last checkpoint") as end:
            ...
            end.status = EXIT_FAILED
        return end.status

    A `ValueError` is the user's mistake until `inputs_are_good` is called, and a defect with a traceback from
    there on. A `DataError` and an `OutputError` are always the user's to mend.

    Arguments: `advice` says how the work can be taken up again after it was cut short.
    """

    def __init__(self, live: LiveLine, advice: str) -> None:
        self.live, self.advice = live, advice
        self.status = EXIT_OK
        self.signals = StopSignals()
        self.mistakes: tuple[type[Exception], ...] = (ValueError, DataError, OutputError)

    def inputs_are_good(self) -> None:
        self.mistakes = (DataError, OutputError)

    def __enter__(self) -> "ExitStatus":
        self.signals.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            return self._say(error)
        except ClosedOutputError as closed:  # standard output broke while the sentence was said
            status = self.status
            self._say(closed)
            self.status = status or self.status  # what ended the command came first
            return True
        finally:
            self.signals.__exit__()

    def _say(self, error: BaseException | None) -> bool:
        """Say what happened and set the status; False for an error that is not to be caught."""
        if isinstance(error, Stopped):
            self.status = error.status
            self.live.say(f"stopped by {error.name}; {self.advice}")
        elif isinstance(error, LostProcessError):
            self.status = EXIT_FAILED
            self.live.say(f"{error}; {self.advice}")
        elif isinstance(error, ClosedOutputError):
            self.live.close()
            self._refuse(f"{error}, so this program stopped; {self.advice}")
        elif error is not None and is_out_of_memory(error):
            self.live.clear()
            self._refuse(
                f"there is not enough memory ({first_line(error)}); a smaller --batch-size or --model needs "
                f"less"
            )
        elif isinstance(error, self.mistakes):
            self.live.clear()
            self._refuse(str(error))
        else:
            return error is None
        return True

    def _refuse(self, sentence: str) -> None:
        # Every rank meets the same mistake: rank 0 alone reports it.
        self.status = EXIT_BAD_INPUT if self.live.silent else refuse(sentence)
