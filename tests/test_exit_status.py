"""What a command ends with: for each kind of error its sentence and its exit status."""

import errno
import io
import os
import signal
import sys

import pytest
import torch

from experiments.cifar import DataError
from experiments.distributed import LostProcessError
from experiments.exit_status import EXIT_FAILED, EXIT_OK, ExitStatus
from experiments.files import OutputError
from experiments.live import EXIT_BAD_INPUT, ClosedOutputError, LiveLine, Stopped

ADVICE = "the same command goes on"
NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture
def live() -> LiveLine:
    return LiveLine()


def ended_by(error: BaseException, live: LiveLine, good: bool = False, status: int = EXIT_OK) -> int:
    """The exit status of a command that has set `status` when the error comes; `good` are its inputs then."""
    with ExitStatus(live, ADVICE) as end:
        if good:
            end.inputs_are_good()
        end.status = status
        raise error
    return end.status


def test_a_command_that_ends_well_has_status_0_and_says_nothing(live, capsys):
    with ExitStatus(live, ADVICE) as end:
        pass
    assert end.status == EXIT_OK == 0
    assert capsys.readouterr() == ("", "")


def test_a_command_that_ends_has_the_status_that_it_set(live):
    with ExitStatus(live, ADVICE) as end:
        end.status = EXIT_FAILED
    assert end.status == EXIT_FAILED == 1


@pytest.mark.parametrize(
    ("number", "name", "status"), [(2, "Ctrl-C", 130), (15, "SIGTERM", 143), (1, "SIGHUP", 129)]
)
@pytest.mark.parametrize("good", [False, True])
def test_a_signal_is_said_with_how_to_go_on_and_gives_the_shells_status(
    live, capsys, number, name, status, good
):
    with ExitStatus(live, ADVICE) as end:
        if good:
            end.inputs_are_good()
        signal.raise_signal(number)
    assert end.status == status
    assert capsys.readouterr() == (f"stopped by {name}; {ADVICE}\n", "")


@pytest.mark.parametrize("good", [False, True])
def test_a_full_device_is_the_users_to_mend(live, capsys, good):
    assert (
        ended_by(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), live, good) == 2
    )
    said = capsys.readouterr().err
    assert "CUDA out of memory" in said and "--batch-size" in said and said.count("\n") == 1


@pytest.mark.parametrize("good", [False, True])
def test_a_lost_rank_is_said_with_how_to_go_on_and_gives_1(live, capsys, good):
    assert ended_by(LostProcessError("rank 2 is gone"), live, good) == 1
    assert capsys.readouterr() == (f"rank 2 is gone; {ADVICE}\n", "")


@pytest.mark.parametrize("good", [False, True])
@pytest.mark.parametrize("kind", [DataError, OutputError])
def test_data_and_output_that_cannot_be_used_are_one_line_on_stderr_and_give_2_at_any_time(
    live, capsys, kind, good
):
    assert ended_by(kind("a is b; name c"), live, good) == EXIT_BAD_INPUT == 2
    assert capsys.readouterr() == ("", "error: a is b; name c\n")


def test_a_value_error_is_the_users_mistake_until_the_inputs_are_good(live, capsys):
    assert ended_by(ValueError("--epochs is 0; expected 1 or more"), live) == 2
    assert capsys.readouterr() == ("", "error: --epochs is 0; expected 1 or more\n")


def test_a_value_error_after_that_is_a_defect_with_its_traceback(live, capsys):
    with pytest.raises(ValueError, match="a defect"):
        ended_by(ValueError("a defect"), live, good=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("good", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyError("a"), AssertionError(), SystemExit(2)])
def test_any_other_error_goes_up_as_it_is(live, capsys, error, good):
    with pytest.raises(type(error)) as raised:
        ended_by(error, live, good)
    assert raised.value is error
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [OutputError("full"), LostProcessError("gone"), Stopped(signal.SIGINT)])
def test_an_error_outdoes_the_status_that_was_set_before_it(live, error):
    assert ended_by(error, live, status=EXIT_FAILED) == ended_by(error, live)
    assert ended_by(error, live) != EXIT_OK


def test_a_sentence_of_several_lines_is_still_one_line(live, capsys):
    ended_by(ValueError("a\nb\x1b[2J"), live)
    assert capsys.readouterr().err == "error: a\\nb\\x1b[2J\n"


def test_a_mistake_is_said_below_the_live_line_that_is_cleared_first(live, capsys):
    live.on_terminal = True
    with ExitStatus(live, ADVICE):
        live.progress("working")
        raise DataError("a is b")
    assert capsys.readouterr() == ("\r\x1b[Kworking\r\x1b[K", "error: a is b\n")


# A standard output that takes no more


class Refusing(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def break_output(live: LiveLine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let standard output take nothing; the list holds a word for each time that it is closed for good."""
    closed: list[str] = []
    monkeypatch.setattr(live, "close", lambda: closed.append("closed"))
    monkeypatch.setattr(sys, "stdout", Refusing())
    return closed


@pytest.mark.parametrize("good", [False, True])
def test_an_output_that_takes_no_more_is_said_on_stderr_with_how_to_go_on_and_gives_2(
    live, monkeypatch, capsys, good
):
    closed = break_output(live, monkeypatch)
    with ExitStatus(live, ADVICE) as end:
        if good:
            end.inputs_are_good()
        live.say("a row")
    assert end.status == 2 and closed == ["closed"]
    why = f"standard output takes no more ({os.strerror(errno.ENOSPC)})"
    assert capsys.readouterr().err == f"error: {why}, so this program stopped; {ADVICE}\n"


@pytest.mark.parametrize(
    ("error", "status"), [(LostProcessError("rank 2 is gone"), 1), (Stopped(signal.SIGTERM), 143)]
)
def test_an_output_that_breaks_while_the_sentence_is_said_is_no_traceback_and_changes_no_status(
    live, monkeypatch, capsys, error, status
):
    """Ctrl-C ends the `tee` behind a program too."""
    closed = break_output(live, monkeypatch)
    assert ended_by(error, live, good=True) == status
    assert closed == ["closed"] and "standard output takes no more" in capsys.readouterr().err


# Ranks


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("--epochs is 0"), 2),
        (DataError("no data"), 2),
        (OutputError("a full disk"), 2),
        (ClosedOutputError("gone"), 2),
        (LostProcessError("rank 2 is gone"), 1),
        (Stopped(signal.SIGTERM), 143),
    ],
)
def test_every_rank_but_the_first_says_nothing_and_ends_with_the_same_status(
    live, monkeypatch, capsys, error, status
):
    monkeypatch.setattr(live, "close", lambda: None)
    assert ended_by(error, live) == status
    capsys.readouterr()
    live.silent = True
    assert ended_by(error, live) == status
    assert capsys.readouterr() == ("", "")


# Signals afterwards


@pytest.mark.parametrize(
    "error", [None, ValueError("a"), Stopped(signal.SIGINT), RuntimeError("a defect"), SystemExit(2)]
)
def test_the_handlers_of_before_are_back_however_the_command_ends(live, error):
    before = [signal.getsignal(number) for number in NUMBERS]
    try:
        with ExitStatus(live, ADVICE):
            assert [signal.getsignal(number) for number in NUMBERS] != before
            if error:
                raise error
    except (RuntimeError, SystemExit):
        pass
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_what_a_command_holds_is_let_go_before_the_sentence_is_said(live, capsys):
    """`with ExitStatus(...) as end, ...:` closes what comes after it first, while signals still raise."""

    class Held:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            print("let go")

    with ExitStatus(live, ADVICE), Held():
        raise Stopped(signal.SIGINT)
    assert capsys.readouterr().out == f"let go\nstopped by Ctrl-C; {ADVICE}\n"
