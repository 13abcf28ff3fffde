"""The live line, the signals that stop a run, and a standard output that takes no more."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from programs import DEADLINE, ROOT

from experiments.live import ClosedOutputError, LiveLine, Stopped, StopSignals, ignore_sigterm

# The live line


@pytest.fixture
def live(monkeypatch) -> LiveLine:
    """The live line of a terminal of 40 columns."""
    monkeypatch.setenv("COLUMNS", "40")
    live = LiveLine()
    live.on_terminal = True
    return live


def test_the_live_line_is_cut_to_the_terminals_width_so_that_it_stays_one_line(live, capsys):
    live.progress("x" * 300)
    assert capsys.readouterr().out == "\r\x1b[K" + "x" * 39


def test_a_whole_line_takes_the_live_lines_place(live, capsys):
    live.progress("working")
    live.say("done")
    live.say("and more")
    assert capsys.readouterr().out == "\r\x1b[Kworking\r\x1b[Kdone\nand more\n"


def test_off_a_terminal_the_live_line_is_never_shown(capsys):
    live = LiveLine()
    live.progress("working")
    live.clear()
    live.say("done")
    assert capsys.readouterr().out == "done\n"


def test_off_a_terminal_a_minute_of_silence_ends_with_a_line(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    live = LiveLine()
    show = live.epoch(0, 2)
    assert show
    for second in range(1, 200):
        now += 1
        show(second, 200, float(second))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "~ about 7 min for 2 epochs"
    assert [line.partition(",")[0] for line in lines[1:]] == [
        f"epoch 1 of 2: step {second}/200" for second in (66, 126, 186)
    ]
    assert lines[1].endswith("6 min left")


def test_a_slow_first_step_is_not_taken_for_what_the_others_take(live, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    show = live.epoch(0, 20)
    for done in range(1, 31):  # the first takes 50 s, each other one 2, and the last ten 4
        now = 150.0 + 2 * (done - 1) + 2 * max(done - 20, 0)
        show(done, 100, now - 100)
    first, *others = capsys.readouterr().out.split("\r\x1b[K")[1:]
    assert first.endswith("0.0 steps/s, 30.4 h left")
    assert [text for text in others if "about" in text] == ["      ~ about 73 min for 20 epochs\n"]
    assert others[-1] == "epoch 1 of 20: step 30/100, 0.4 steps/s, 1.6 h left"


def test_how_long_is_left_is_told_by_the_last_epoch(live, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    for epoch, now in enumerate((0.0, 600.0, 660.0)):  # the first was a slow one
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        show = live.epoch(epoch, 12)
        monkeypatch.setattr(time, "monotonic", lambda now=now: now + 50)
        show(98, 98, 50.0)
    shown = capsys.readouterr().out.split("\r\x1b[K")
    assert [text.rpartition(", ")[2] for text in shown if text.startswith("epoch")] == [
        "10 min left", "1.7 h left", "9 min left"
    ]  # fmt: skip


def test_where_steps_are_only_launched_the_second_epoch_tells_how_long_the_run_takes(
    live, monkeypatch, capsys
):
    live.launches_ahead = True
    for epoch, now in enumerate((0.0, 8.0, 8.7)):  # the first captures a graph
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        show = live.epoch(epoch, 102)
        show(98, 98, 0.1)
    shown = capsys.readouterr().out
    assert shown.count("about") == 1 and "epoch 2 of 102: step 98/98" in shown
    assert "steps/s" not in shown and " left" not in shown
    assert shown.index("epoch 2") < shown.index("~ about 1 min for 100 epochs") < shown.index("epoch 3")


def test_all_processes_but_the_first_are_silent(live, capsys):
    live.silent = True
    live.progress("working")
    live.say("done")
    assert capsys.readouterr().out == ""


def test_steps_are_shown_ten_times_a_second_at_most_and_the_last_one_always(live, monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    live.epoch_seconds = 2.0
    show = live.epoch(6, 10)
    for done in range(1, 101):  # 128 steps a second, and the line may change every 0.1 s: at each 13th step.
        now += 1 / 128
        show(done, 100, done / 128)
    shown = capsys.readouterr().out.split("\r\x1b[K")[1:]
    assert [text.partition(",")[0] for text in shown] == [
        f"epoch 7 of 10: step {done}/100" for done in (*range(1, 101, 13), 100)
    ]
    assert shown[0].startswith("epoch 7 of 10: step 1/100, 128.0 steps/")  # 40 columns


def test_an_epochs_last_phases_are_shown_too_and_silent_ranks_show_nothing(live, capsys):
    show = live.epoch(1, 3)
    show.phase("testing")
    assert capsys.readouterr().out == "\r\x1b[Kepoch 2 of 3: testing"
    live.silent = True
    assert live.epoch(1, 3) is None


def test_letters_that_a_terminal_lacks_are_shown_as_escapes(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    LiveLine().say("/home/Jörg/数")
    assert narrow.buffer.getvalue() == rb"/home/J\xf6rg/\u6570" + b"\n"


# A standard output that takes no more


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("what", ["say", "progress"])
def test_an_output_that_takes_no_more_is_an_error_of_its_own_that_says_why(live, monkeypatch, what, number):
    class Refusing(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Refusing())
    with pytest.raises(ClosedOutputError) as error:
        getattr(live, what)("text")
    assert "standard output" in str(error.value) and os.strerror(number) in str(error.value)


SPEAKING = """
from experiments.live import ClosedOutputError, LiveLine
import sys
live = LiveLine()
try:
    while True:
        live.say("a line" * 1000)
except ClosedOutputError as error:
    live.close()
    live.say("nobody hears this")
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.parametrize("output", ["a pipe whose reader has gone", "/dev/full"])
def test_after_a_closed_output_the_process_ends_as_it_chooses_and_without_a_traceback(output):
    command = [sys.executable, "-c", SPEAKING]
    if output == "/dev/full":
        if not Path(output).exists():
            pytest.skip("no /dev/full here")
        with Path(output).open("w") as full:
            done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, timeout=DEADLINE)
        status, err = done.returncode, done.stderr
    else:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.readline()
        process.stdout.close()
        err, status = process.stderr.read(), process.wait(DEADLINE)
        process.stderr.close()
    assert status == 2
    assert err.count(b"\n") == 1 and err.startswith(b"standard output takes no more ("), err


# Signals


@pytest.fixture
def handlers():
    """Give both signals the handlers that Python starts with; return a function that reads the handlers."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield lambda: tuple(signal.getsignal(number) for number in before)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "name", "status"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_is_an_exception_with_its_name_and_the_shells_status_and_no_except_exception_stops_it(
    handlers, number, name, status
):
    with pytest.raises(Stopped) as stop, StopSignals():
        try:
            signal.raise_signal(number)
        except Exception:
            pytest.fail("taken for an error")
    assert (stop.value.name, stop.value.status, str(stop.value)) == (name, status, name)


@pytest.mark.parametrize("ends", ["well", "with a signal", "with an error"])
def test_the_earlier_handlers_are_back_afterwards(handlers, ends):
    before = handlers()
    try:
        with StopSignals():
            assert handlers() != before
            if ends == "with a signal":
                signal.raise_signal(signal.SIGTERM)
            if ends == "with an error":
                raise ValueError
    except (Stopped, ValueError):
        pass
    assert handlers() == before


def test_sigterm_can_be_ignored_since_its_sender_may_send_it_again_while_the_files_are_written(handlers):
    before = handlers()
    with StopSignals():
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        ignore_sigterm()
        signal.raise_signal(signal.SIGTERM)
    assert handlers() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_held_together_is_done_wholly_before_a_signal_is_heard(handlers, number):
    done = []
    with StopSignals() as signals, pytest.raises(Stopped) as stop, signals.held():
        signal.raise_signal(number)
        done.append("all of it")
    assert done == ["all of it"] and stop.value.status == 128 + number


def test_a_signal_that_came_before_an_error_in_what_is_held_together_is_heard(handlers):
    with StopSignals() as signals, pytest.raises(Stopped), signals.held():
        signal.raise_signal(signal.SIGTERM)
        raise ClosedOutputError("gone")


def test_an_output_that_breaks_while_files_are_written_ends_nothing_and_is_remembered(monkeypatch):
    class Refusing(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))

    live, closed = LiveLine(), []
    monkeypatch.setattr(live, "close", lambda: closed.append(True))
    monkeypatch.setattr(sys, "stdout", Refusing())
    live.endures = True
    live.say("a line")
    assert closed == [True] and "standard output takes no more" in str(live.broken)


def test_an_error_in_what_is_held_together_goes_up_as_it_is(handlers):
    with StopSignals() as signals, pytest.raises(ValueError), signals.held():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError


def test_ctrl_c_is_heard_again_by_whoever_will_not_wait(handlers):
    heard = 0
    with StopSignals():
        for _ in range(3):
            try:
                signal.raise_signal(signal.SIGINT)
            except Stopped:
                heard += 1
    assert heard == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_parent_had_us_ignore_stays_ignored(handlers, number):
    signal.signal(number, signal.SIG_IGN)
    with StopSignals():
        signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    assert signal.getsignal(number) is signal.SIG_IGN


def test_in_a_thread_where_python_handles_no_signals_none_are_asked_for(handlers):
    before, went = handlers(), []

    def work() -> None:
        with StopSignals():
            went.append(handlers() == before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert went == [True]
