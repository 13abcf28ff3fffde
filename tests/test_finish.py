"""The end of a run: its files are the run's, whatever else lies beside them, and a fault in them is told."""

import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from folders import PICTURES
from random_images import random_dataset

from experiments import data, debug_run, device, finish, report
from experiments.checkpoint import load_checkpoint
from experiments.files import write_whole
from experiments.history import History, as_text
from experiments.page import report_page

COMMAND = ["--data", "synthetic", "--device", "cpu", "--threads", "1", "--preflight", "off", "--epochs", "2",
           "--model", "own_networks:Small", "--output-dir", "out"]  # fmt: skip
KEPT = "files hold the run"


@pytest.fixture
def run(
    quick_end: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs of a small network on a handful of images, in this process; each returns its status and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(device, "keep_freed_memory", lambda keep=True: True)
    images = random_dataset(16, name="synthetic stand-in")
    monkeypatch.setattr(data, "synthetic_dataset", lambda source: images)
    threads = torch.get_num_threads()

    def start(*arguments: str) -> tuple[int, str]:
        status = debug_run.main([*COMMAND, *arguments])
        said = capsys.readouterr()
        assert said.err == ""
        return status, said.out

    yield start
    torch.set_num_threads(threads)


OUT = Path("out")


def check_of(out: str) -> str:
    """The line of the check that reads the files."""
    (line, *_) = [line for line in out.splitlines() if KEPT in line]
    return line


def stop_in_epoch_two(monkeypatch: pytest.MonkeyPatch) -> None:
    real = debug_run.train_epoch

    def train_epoch(step: Any, batches: Any, epoch: int, *rest: Any) -> Any:
        if epoch == 1:
            raise debug_run.Stopped(debug_run.signal.SIGINT)
        return real(step, batches, epoch, *rest)

    monkeypatch.setattr(debug_run, "train_epoch", train_epoch)


# What else lies in the folder


def test_a_link_that_leads_nowhere_beside_the_files_is_ignored(run):
    OUT.mkdir()
    (OUT / ".#history.json").symlink_to("nobody@host.123:456")  # Emacs locks a file so
    _, out = run()
    assert check_of(out) == f"PASS  {KEPT}: history.json, metrics.csv, report.html, 5 pictures"
    assert (OUT / ".#history.json").is_symlink()


@pytest.mark.parametrize("lost", ["last row", "file"])
def test_a_resumed_run_with_nothing_left_to_train_makes_its_table_good(run, lost):
    run()
    table = OUT / "metrics.csv"
    whole = table.read_text()
    # As after a power cut between the last checkpoint and the table, or of a checkpoint copied alone.
    table.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    if lost == "file":
        for path in OUT.iterdir():
            if not path.name.startswith("checkpoint"):
                path.unlink()
    _, out = run("--resume")
    assert check_of(out).startswith("PASS")
    assert table.read_text() == whole and len(whole.splitlines()) == 3


def test_what_a_finished_run_left_is_moved_aside_and_not_written_over(run):
    run()
    (OUT / "report.html").write_text("with the user's notes")
    _, out = run("--resume")
    assert "Earlier:   the files of the 2 epochs were moved to out/earlier-1" in out.splitlines()
    assert (OUT / "earlier-1" / "report.html").read_text() == "with the user's notes"
    assert check_of(out).startswith("PASS")


def test_a_checkpoint_that_was_passed_over_is_moved_aside_and_not_written_over(run):
    run()
    last = OUT / "checkpoint_0002.pt"
    last.write_bytes(b"of a newer program, perhaps")
    _, out = run("--resume")
    said = "Earlier:   the checkpoints that were passed over were moved to out/earlier-1"
    assert said in out.splitlines()
    assert (OUT / "earlier-1" / last.name).read_bytes() == b"of a newer program, perhaps"
    assert load_checkpoint(last).epochs == 2


def test_a_table_that_no_epoch_has_written_is_told(run, monkeypatch):
    monkeypatch.setattr(debug_run, "write_whole", lambda *_: None)
    status, out = run()
    assert status == 1 and check_of(out).startswith("FAIL") and "metrics.csv" in check_of(out)


# The format of the pictures


def test_pictures_of_a_stopped_run_do_not_stay_among_those_of_the_resumed_one_in_another_format(
    run, monkeypatch
):
    with monkeypatch.context() as patch:
        stop_in_epoch_two(patch)
        assert run()[0] == 130
    old = {name: (OUT / name).read_bytes() for name in PICTURES}
    (OUT / "mine.png").write_text("the user's")
    monkeypatch.setattr("experiments.plots.rendered", lambda figure, kind="png": b"%%PDF%d" % id(figure))
    _, out = run("--resume", "--figure-format", "pdf")
    assert sorted(path.name for path in OUT.glob("*.p*[gf]")) == sorted(
        [*(name.replace("png", "pdf") for name in PICTURES), "mine.png"]
    )
    assert {name: (OUT / "earlier-1" / name).read_bytes() for name in PICTURES} == old
    assert "pictures in another format were moved to out/earlier-1" in out
    assert check_of(out).startswith("PASS")


# Faults in the end itself, each of which the check of the files names


def swapped(pictures: dict[Any, Any]) -> dict[Any, Any]:
    return dict(zip(pictures, reversed(pictures.values()), strict=True))


def test_pictures_written_under_each_others_names_are_told(run, monkeypatch):
    names = iter(reversed(PICTURES))

    def write(path: Path, content: bytes) -> None:
        write_whole(path.with_name(next(names)) if path.suffix == ".png" else path, content)

    monkeypatch.setattr(finish, "write_whole", write)
    status, out = run()
    assert status == 1 and check_of(out).startswith("FAIL")
    assert all(name in " ".join(out.split()) for name in PICTURES if name != PICTURES[2])


@pytest.mark.parametrize(
    "fault",
    [
        lambda history, settings, checks, shown: report_page(history, settings, history.preflight, shown),
        lambda history, settings, checks, shown: report_page(history, settings, checks[1:], shown),
        lambda history, settings, checks, shown: report_page(history, settings, checks, swapped(shown)),
        lambda history, settings, checks, shown: report_page(history, settings, checks, {}),
        lambda *_: "",
    ],
    ids=["preflight's checks", "a check too few", "other pictures", "no pictures", "nothing"],
)
def test_a_page_that_does_not_show_what_was_printed_and_drawn_is_told(run, monkeypatch, fault):
    monkeypatch.setattr(finish, "report_page", fault)
    status, out = run()
    assert status == 1 and check_of(out) == f"FAIL  {KEPT}: report.html differ"


def test_files_that_do_not_hold_the_run_are_named(run):
    run()
    history = History.from_json(json.loads((OUT / "history.json").read_text()))
    pictures = {OUT / name: (OUT / name).read_bytes() for name in PICTURES}
    shown = {path.name: content for path, content in pictures.items()}
    model, compressed = torch.nn.Module(), history.compressed
    assert compressed

    def check(**sizes: int) -> str:
        found = finish.files_are_the_runs(OUT, history, model, pictures, shown)
        return str(found)

    # An empty network has no bytes and no parameters.
    odd = "the bytes in float32, the parameters of the network"
    assert check().startswith(f"FAIL  {KEPT}: {odd} differ. Likely cause: how the compressed network is")
    for name in ("compressed.codeq", "slim.pt2", "metrics.csv", "accuracy_curve.png"):
        (OUT / name).write_bytes((OUT / name).read_bytes()[:-1])
    kept = json.loads((OUT / "history.json").read_text())
    (OUT / "history.json").write_text(json.dumps(kept | {"verdict": [], "device": "another"}))
    assert check().partition(" differ")[0].partition(": ")[2].split(", ") == [
        "device", "verdict", "metrics.csv", "accuracy_curve.png", "compressed.codeq", "slim.pt2",
        "the bytes in float32", "the parameters of the network",
    ]  # fmt: skip
    crossed = {"dense, batch 1": {"least": 2.0, "median": 1.0, "most": 3.0}}
    history.compressed = replace(compressed, dense_macs=2 * compressed.dense_macs, latency_seconds=crossed)
    assert "the MACs of the network, the latency of dense, batch 1" in check()
    for name, said in (("report.html", "No such file"), ("history.json", "Expecting")):
        (OUT / name).write_text("{") if name == "history.json" else (OUT / name).unlink()
        assert check().startswith("FAIL") and said in check()


def test_the_page_has_every_line_of_the_verdict_and_every_picture(run):
    _, out = run()
    page = (OUT / "report.html").read_text()
    checks = json.loads((OUT / "history.json").read_text())["verdict"]
    rows = re.findall(r'<tr><td class="(.*)">\1</td><td>(.*)</td><td>(.*)</td></tr>', page)
    assert rows[:-1] == [(c["status"], escape(c["name"]), escape(c["message"])) for c in checks]
    assert rows[-1] == ("PASS", KEPT, check_of(out).partition(": ")[2])
    for name in PICTURES:
        assert base64.b64encode((OUT / name).read_bytes()).decode() in page


def test_rows_and_records_that_are_not_those_of_their_epochs_are_told():
    history = runs.good_run(3)
    written = [as_text(record) for record in history.epochs]
    rows = [report.table_row(record) for record in history.epochs]
    said = [
        "Preflight: off",
        "Epoch | Loss",
        rows[0],
        "      ! a warning",
        rows[1],
        rows[2],
        "",
        "linear  32",
    ]
    assert finish.table_is_the_records(history, written, said).status == "PASS"
    twice = [said[2], *said[:6]]
    assert finish.table_is_the_records(history, written, twice).status == "FAIL"
    assert finish.table_is_the_records(history, written, [*said[:4], rows[0], rows[2]]).status == "FAIL"
    layer = next(iter(history.epochs[1].layers))
    history.epochs[1].layers[layer] = replace(history.epochs[1].layers[layer], bits=3)
    changed = finish.table_is_the_records(history, written, said)
    assert changed.status == "FAIL" and "epochs 2 were changed" in changed.message
