"""The sweep: the runs that it starts and skips, runs that fail or are killed, its table and its picture."""

import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from programs import DEADLINE, environment, environment_at_start

from experiments import plots, sweep
from experiments.history import Check
from experiments.settings import Settings, parse_settings
from experiments.sweep import AXES, LISTS, Member, main, plan

SMALL = ["--preflight", "off",
         "--data", "synthetic", "--limit-train", "64", "--limit-test", "32", "--batch-size", "32",
         "--epochs", "2", "--threads", "1"]  # fmt: skip
ONE_POINT = [*SMALL, "--sparsity-weight", "0.001", "--seed", "0"]


@pytest.fixture
def working_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def history(settings: dict[str, Any], accuracy: float, ratio: float) -> dict[str, Any]:
    """A finished run's history.json, of two epochs that took 3.5 seconds."""
    run = runs.changed(runs.good_run(2), {1: {"seconds": 1.5}, 2: {"seconds": 2.0, "accuracy": accuracy}})
    run.data = replace(run.data, name="synthetic stand-in")
    run.settings, run.final = settings, runs.final(**dict.fromkeys(sweep.RATIOS, ratio))
    run.verdict = [Check("PASS", "a", "b"), Check("PASS", "c", "d")]
    return json.loads(json.dumps(run.to_json()))


def finish(member: Member, accuracy: float = 0.5, ratio: float = 10.0, **settings: Any) -> None:
    member.folder.mkdir(parents=True, exist_ok=True)
    content = history(member.settings.to_json() | settings, accuracy, ratio)
    (member.folder / "history.json").write_text(json.dumps(content))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


# Which runs it starts.


def test_every_combination_is_a_member_and_each_seed_has_one_in_full_precision(working_folder):
    lists = {"sparsity_weight": ["0.001", "0.002"], "bit_decay": ["0.3"], "deadzone_decay": ["0.5", "0.8"],
             "seed": ["0", "7"]}  # fmt: skip
    members = list(plan(Path("out"), lists, SMALL))
    found = [tuple(getattr(m.settings, name) for name in lists) for m in members[:8]]
    assert found == list(itertools.product((0.001, 0.002), (0.3,), (0.5, 0.8), (0, 7)))
    assert [m.settings.exclude_layers for m in members[8:]] == [(".",), (".",)]
    assert [m.settings.seed for m in members[8:]] == [0, 7]
    assert len({m.folder for m in members}) == len(members)
    assert all(m.settings.epochs == 2 and m.settings.resume for m in members)


def test_one_number_has_one_folder_however_it_is_spelled(working_folder):
    lists = {name: [str(values[0])] for name, values in LISTS.items()}
    names = [
        next(plan(Path(), lists | {"sparsity_weight": [text]}, SMALL)).name for text in ("1e-3", "0.0010")
    ]
    assert names[0] == names[1]


def test_runs_of_one_point_differ_in_the_seed_alone(working_folder):
    lists = {name: [str(value) for value in values] for name, values in LISTS.items()}
    points: dict[str, list[Member]] = {}
    for member in plan(Path("out"), lists, SMALL):
        points.setdefault(member.point, []).append(member)
    assert len(points) == len(LISTS["sparsity_weight"]) + 1
    for members in points.values():
        assert [m.settings.seed for m in members] == [0, 1, 2]
        seedless = [m.settings.to_json() | {"seed": 0, "output_dir": ""} for m in members]
        assert seedless[0] == seedless[1] == seedless[2]


def test_print_gives_the_commands_themselves_and_runs_none(working_folder, capsys):
    assert main([*SMALL, "--sparsity-weight", "1e-3", "2e-3", "--seed", "0", "1", "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "experiments.debug_run"]
        assert parse_settings(words[3:]).epochs == 2
    assert not list(working_folder.iterdir())


def test_print_leaves_out_what_is_done(working_folder, capsys):
    main([*ONE_POINT, "--print"])
    both = capsys.readouterr().out.splitlines()
    finish(next(plan(Path("sweep_output"), one_point(), SMALL)))
    main([*ONE_POINT, "--print"])
    assert capsys.readouterr().out.splitlines() == both[1:]


def one_point() -> dict[str, list[str]]:
    return {"sparsity_weight": ["0.001"], "seed": ["0"]}


@pytest.mark.parametrize(
    "change",
    [{"epochs": 3}, {"bit_lr": 0.5}, {"exclude_layers": ["^conv1$"]}, {"data": "cifar10"}],
    ids=lambda change: next(iter(change)),
)
def test_a_run_with_other_settings_is_not_taken_for_done(working_folder, change):
    member = next(plan(Path("sweep_output"), one_point(), SMALL))
    finish(member)
    assert member.history()
    finish(member, **change)
    assert member.history() is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"stopped": null}', "null", "x" * 100, "[" * 10**5])
def test_a_history_that_is_none_is_not_taken_for_done(working_folder, content):
    member = next(plan(Path("sweep_output"), one_point(), SMALL))
    member.folder.mkdir(parents=True)
    (member.folder / "history.json").write_text(content)
    assert member.history() is None


@pytest.mark.parametrize("change", [{"verdict": []}, {"epochs": []}, {"final": None}, {"stopped": "Ctrl-C"}])
def test_a_run_that_was_killed_on_its_way_is_not_done(working_folder, change):
    """The verdict is what a run writes last: before it come pictures and files, which take seconds."""
    member = next(plan(Path("sweep_output"), one_point(), SMALL))
    finish(member)
    path = member.folder / "history.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert member.history() is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("epochs", 1, "accuracy"), 5.0),
        (("epochs", 1, "accuracy"), "nan"),
        (("epochs", 1, "epoch"), 7),
        (("final", "structured_bops_ratio"), 0.0),
        (("final", "structured_bops_ratio"), "nan"),
        (("verdict", 0, "status"), "WHATEVER"),
    ],
)
def test_a_history_such_as_no_run_writes_is_not_taken_for_done(working_folder, path, value):
    member = next(plan(Path("sweep_output"), one_point(), SMALL))
    finish(member)
    file = member.folder / "history.json"
    content = inner = json.loads(file.read_text())
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(content))
    assert member.history() is None
    finish(member)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"epochs": content["epochs"][:1]}))
    assert member.history() is None


def test_the_table_of_another_sweep_is_moved_aside_and_ones_own_is_not(working_folder, capsys):
    for member in plan(Path("sweep_output"), one_point(), SMALL):
        finish(member)
    folder = working_folder / "sweep_output"
    for name in ("sweep.csv", "accuracy_over_bops.png"):
        (folder / name).write_text("of another sweep")
    for _ in range(2):
        assert main(ONE_POINT) == 0
    out = capsys.readouterr().out
    assert out.count("Earlier:") == 1 and "another sweep were moved to sweep_output/earlier-1" in out
    assert (folder / "earlier-1" / "sweep.csv").read_text() == "of another sweep"
    assert (folder / "earlier-1" / "accuracy_over_bops.png").read_text() == "of another sweep"


def test_a_name_that_is_no_utf8_is_written_as_an_escape(working_folder):
    members = list(plan(Path("out"), one_point(), SMALL))
    finish(members[0])
    path = members[0].folder / "history.json"
    content = json.loads(path.read_text())
    content["data"]["name"] = "\ud800"
    path.write_text(json.dumps(content))
    sweep.gather(members, one_point(), Path("out"))
    assert rows(Path("out"))[0]["data"] == r"\ud800"


def test_a_process_that_cannot_be_started_is_not_blamed_on_the_folder(working_folder, monkeypatch, capsys):
    def lacking(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(sweep.subprocess, "Popen", lacking)
    members = list(plan(Path("out"), one_point(), SMALL))
    assert sweep.run_all(members, 1, {}, print, lambda: None) == members
    assert "FAILED, no process could be started (Resource temporarily" in capsys.readouterr().out


def test_a_sweep_that_is_started_by_its_path_finds_its_runs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    member = next(plan(Path("out"), one_point(), ["--quantizer", "no_such:Q"]))
    monkeypatch.setenv("PYTHONPATH", "of_the_users")
    process = sweep.start(member, 1)
    assert process.wait(DEADLINE) == 2
    assert "no_such raises ModuleNotFoundError" in (member.folder / "log.txt").read_text()


def test_a_value_that_is_given_twice_is_one_run(working_folder, capsys):
    main([*SMALL, "--sparsity-weight", "1e-3", "0.001", "--seed", "0", "0", "--print"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_run_that_was_stopped_is_not_done(working_folder):
    member = next(plan(Path("sweep_output"), one_point(), SMALL))
    member.folder.mkdir(parents=True)
    stopped = history(member.settings.to_json(), 0.5, 10) | {"stopped": "stopped by SIGTERM in epoch 2"}
    (member.folder / "history.json").write_text(json.dumps(stopped))
    assert member.history() is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--jobs", "0"], ["--jobs", "0", "1 or more"]),
        (["--jobs", "x"], ["--jobs", "x"]),
        (["--jobs", "1.5"], ["--jobs", "'1.5' is not a whole number"]),
        (["--preflight", "only"], ["--preflight is 'only'", "expected stop, warn or off"]),
        (["--preflight=only", "--print"], ["--preflight is 'only'"]),
        (["--sparsity-weight", "-1"], ["--sparsity-weight", "-1"]),
        (["--sparsity-weight"], ["--sparsity-weight"]),
        (["--seed", "0", "x"], ["--seed", "x"]),
        (["--epochs", "0"], ["--epochs", "0"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--data", "auto"], ["--data", "auto", "cifar10"]),
        (["--resume"], ["--resume"]),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence_with_status_2_and_starts_nothing(working_folder, arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words)
    assert not list(working_folder.iterdir())


@pytest.mark.parametrize("name", ["sweep.csv", "accuracy_over_bops.png"])
def test_a_folder_in_the_place_of_table_or_picture_is_refused_before_a_member_is_started(
    working_folder, monkeypatch, name, capsys
):
    monkeypatch.setattr(sweep, "start", lambda *_: pytest.fail("a member was started"))
    (working_folder / "sweep_output" / name).mkdir(parents=True)
    assert main(ONE_POINT) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: sweep_output/{name} is no file") and said.count("\n") == 1


def test_the_log_takes_a_folder_whose_name_is_no_utf8(working_folder):
    folder = Path(os.fsdecode(b"sweep_\xff"))
    member = next(plan(folder, one_point(), ["--quantizer", "no_such:Q"]))
    assert sweep.start(member, 1).wait(DEADLINE) == 2
    assert b"--output-dir 'sweep_\xff/" in (member.folder / "log.txt").read_bytes()


# How it runs them. Small programs replace `start`, so that a member can end in any way at once.


@pytest.fixture
def endings(monkeypatch) -> dict[str, str]:
    """Python code for each member by its name; a member without code finishes well."""
    codes: dict[str, str] = {}

    def start(member: Member, jobs: int) -> subprocess.Popen[bytes]:
        finish_code = (
            f"import json; open('history.json', 'w').write("
            f"json.dumps({history(member.settings.to_json(), 0.8, 12.0)!r}))"
        )
        member.folder.mkdir(parents=True, exist_ok=True)
        code = codes.get(member.name, finish_code)
        with (member.folder / "log.txt").open("ab") as log:
            return subprocess.Popen([sys.executable, "-c", code], cwd=member.folder, stdout=log, stderr=log)

    monkeypatch.setattr(sweep, "start", start)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.02)
    return codes


@pytest.mark.slow
def test_a_member_that_fails_is_reported_with_its_last_words_and_the_others_go_on(
    working_folder, endings, capsys
):
    lost = "sparsity_weight=0.001,seed=0"
    endings[lost] = "import sys; print('error: no luck'); sys.exit(2)"
    assert main(ONE_POINT) == 1
    out = capsys.readouterr().out
    assert f"{lost}: FAILED with status 2; " in out
    assert "error: no luck" in out
    assert [(row["name"], row["status"]) for row in rows(working_folder / "sweep_output")] == [
        (lost, "missing"),
        ("full_precision,seed=0", "done"),
    ]
    endings.clear()
    assert main(ONE_POINT) == 0
    assert "2 runs, 1 done already" in capsys.readouterr().out
    assert [row["status"] for row in rows(working_folder / "sweep_output")] == ["done", "done"]


def test_runs_that_other_code_has_finished_are_named_by_its_commit(
    working_folder, endings, capsys, monkeypatch
):
    members, said = list(plan(Path("sweep_output"), one_point(), SMALL)), []
    for commits in (["a" * 40, "a" * 40], ["a" * 40, "b" * 40 + "-dirty"], ["c" * 40, None]):
        for member, commit in zip(members, commits, strict=True):
            content = history(member.settings.to_json(), 0.5, 10)
            content["origin"] = {"date": "", "command": [], "commit": commit}
            member.folder.mkdir(parents=True, exist_ok=True)
            (member.folder / "history.json").write_text(json.dumps(content))
        monkeypatch.setattr(sweep, "commit_of_program", lambda: "a" * 40)
        assert main(ONE_POINT) == 0
        said.append(capsys.readouterr().out)
    assert ["2 runs, 2 done already" in out for out in said] == [True] * 3
    assert "other code" not in said[0]
    assert "other code (bbbbbbb+) than this (aaaaaaa);" in said[1]
    assert "other code (ccccccc, no commit) than this (aaaaaaa);" in said[2]


def test_what_a_member_left_counts_and_not_its_status(working_folder, endings, capsys):
    """Status 1 with a whole history means a failed verdict; status 0 without one means a failed run."""
    first, second = members = list(plan(Path("sweep_output"), one_point(), SMALL))
    left = json.dumps(history(first.settings.to_json(), 0.8, 12.0))
    endings[first.name] = f"open('history.json', 'w').write({left!r}); raise SystemExit(1)"
    endings[second.name] = "pass"
    assert sweep.run_all(members, 1, {}, print, lambda: None) == [second]
    assert f"{first.name}: 80.00 %" in capsys.readouterr().out


def test_a_member_whose_folder_cannot_be_made_is_reported_and_the_others_go_on(
    working_folder, monkeypatch, capsys
):
    (working_folder / "sweep_output").mkdir()
    for member in plan(Path("sweep_output"), one_point(), SMALL):
        member.folder.write_text("a file in the way")
    assert main(ONE_POINT) == 1
    assert capsys.readouterr().out.count("FAILED, its folder cannot be written (File exists)") == 2
    assert [row["status"] for row in rows(working_folder / "sweep_output")] == ["missing", "missing"]


def test_no_more_than_jobs_run_at_a_time(working_folder, endings, monkeypatch):
    most = 0
    running: dict[Member, Any] = {}

    def watch(seconds: float) -> None:
        nonlocal most
        most = max(most, len(running))
        sleep(seconds)

    sleep = time.sleep
    monkeypatch.setattr(sweep.time, "sleep", watch)
    members = list(plan(Path("out"), one_point() | {"seed": ["0", "1", "2"]}, SMALL))
    assert sweep.run_all(members, 2, running, print, lambda: None) == []
    assert most == 2
    assert not running


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [[], ["--print"]], ids=["running", "printing"])
def test_when_standard_output_takes_no_more_it_ends_in_one_sentence(tmp_path, arguments):
    command = [sys.executable, "-m", "experiments.sweep", *ONE_POINT, *arguments]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            command, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True,
            timeout=DEADLINE,
        )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("error: standard output takes no more") and run.stderr.count("\n") == 1


# The table and the picture.


def test_the_table_has_a_row_a_run_with_what_its_history_says(working_folder):
    members = list(plan(Path("out"), one_point(), SMALL))
    finish(members[0], accuracy=0.75, ratio=16.5)
    sweep.gather(members, one_point(), Path("out"))
    done, missing = rows(Path("out"))
    assert (done["status"], done["sparsity_weight"], done["seed"]) == ("done", "0.001", "0")
    assert (float(done["accuracy"]), float(done["structured_bops_ratio"])) == (0.75, 16.5)
    assert (float(done["seconds"]), done["data"], done["epochs"]) == (3.5, "synthetic stand-in", "2")
    assert (missing["name"], missing["status"], missing["accuracy"]) == (
        "full_precision,seed=0",
        "missing",
        "",
    )
    assert missing["sparsity_weight"] == ""


def test_the_picture_shows_means_and_ranges_over_the_seeds_and_full_precision():
    def run(accuracy: float, structured: float, unstructured: float) -> dict[str, float]:
        return {"accuracy": accuracy, "structured_bops_ratio": structured,
                "unstructured_bops_ratio": unstructured}  # fmt: skip

    series = {"": {0.004: [run(0.70, 40, 80)], 0.001: [run(0.80, 10, 20), run(0.84, 14, 30)]}}
    figure = plots.trade_off_figure(series, {"full": [run(0.86, 1, 1), run(0.88, 1, 1)]}, "a title")
    for axes, wanted in zip(figure.axes, ([(12, 82), (40, 70)], [(25, 82), (80, 70)]), strict=True):
        line, full = (container.lines for container in axes.containers)
        # One line, in the order of the weights, each with its weight beside it.
        assert line[0].get_xydata() == pytest.approx(np.array(wanted)) and line[0].get_linestyle() == "-"
        assert [text.get_text() for text in axes.texts] == ["0.001", "0.004"]
        assert full[0].get_xydata().tolist() == [[1, pytest.approx(87)]]
        low, high = axes.get_xlim()
        assert low < 1 < 80 < high
    across, upright = (bars.get_segments() for bars in figure.axes[0].containers[0].lines[2])
    assert [list(segment[:, 0]) for segment in across] == [[10, 14], [40, 40]]
    assert upright[0][:, 1] == pytest.approx([80, 84])
    assert "a title" in figure.get_suptitle() and "2 seeds" in figure.get_suptitle()


def test_every_number_preset_and_network_is_an_axis_and_full_precision_follows_those_that_matter(
    working_folder,
):
    chosen = {"model": ["resnet20", "resnet32"], "fixed_bits": ["2", "4"], "epochs": ["3"],
              "sparsity_weight": ["0.001"], "seed": ["0"]}  # fmt: skip
    members = list(plan(Path("out"), chosen, ["--data", "synthetic"]))
    names = [m.name for m in members]
    assert names[0] == "model=resnet20,fixed_bits=2,sparsity_weight=0.001,seed=0" and len(names) == 6
    assert names[4:] == ["full_precision,model=resnet20,seed=0", "full_precision,model=resnet32,seed=0"]
    assert {m.settings.epochs for m in members} == {3}
    assert [m.settings.fixed_bits for m in members] == [2, 4, 2, 4, None, None]
    numbers = {f.name for f in fields(Settings) if f.type in (int, float, int | None)}
    assert {*AXES} == numbers | {"preset", "model"}


def test_the_title_says_what_all_runs_have_in_common_and_no_more():
    common = Settings(epochs=7, weights_lr=1e-3, sparsity_weight=1e-3)
    lists = {"sparsity_weight": ["0.001", "0.002"], "weights_lr": ["0.001"], "seed": ["0"]}
    first, second = sweep._title(common, lists, "CIFAR-10").splitlines()
    assert first == "Accuracy over BOPs: ResNet-20 on CIFAR-10, 7 epochs"
    assert second == "preset debug, with --weights-lr 0.001"
    several = lists | {"model": ["resnet20", "resnet32"], "epochs": ["7", "8"], "preset": ["debug", "plan"]}
    assert sweep._title(common, several, "CIFAR-10") == "Accuracy over BOPs: CIFAR-10"


def test_an_earlier_attempt_is_not_blamed_for_the_last(working_folder):
    member = next(plan(Path("sweep_output"), one_point(), SMALL))
    member.folder.mkdir(parents=True)
    attempts = ["error: no luck", "Traceback\nKeyError: 1"]
    (member.folder / "log.txt").write_text("".join(f"{sweep.ATTEMPT}--seed 0\n{said}\n" for said in attempts))
    assert sweep.why_failed(member, 1).endswith("log.txt says: KeyError: 1")


def test_a_run_whose_checks_fail_is_marked(working_folder):
    lists = {"sparsity_weight": ["0.001"], "seed": ["0"]}
    failing, passing = plan(Path("sweep_output"), lists, SMALL)
    for member in (failing, passing):
        finish(member)
    path = failing.folder / "history.json"
    kept = json.loads(path.read_text())
    kept["verdict"][1]["status"] = "FAIL"
    path.write_text(json.dumps(kept))
    sweep.gather([failing, passing], lists, Path("sweep_output"))
    assert [row["status"] for row in rows(Path("sweep_output"))] == ["done, 1 FAIL", "done"]
    assert sweep.describe(failing.history()).endswith("; 1 checks FAIL")


def test_table_and_picture_are_there_after_every_member_with_the_time_left(
    working_folder, endings, capsys, monkeypatch
):
    seen, gather = [], sweep.gather
    monkeypatch.setattr(sweep, "gather", lambda *args: (gather(*args), seen.append(rows(args[2]))))
    assert main([*SMALL, "--sparsity-weight", "1e-3", "2e-3", "--seed", "0"]) == 0
    assert [[row["status"] for row in table].count("done") for table in seen] == [1, 2, 3, 3]
    lines = [line for line in capsys.readouterr().out.splitlines() if "80.00 %" in line]
    assert ["left" in line for line in lines] == [True, True, False]


def test_a_sweep_of_which_nothing_is_done_still_gives_table_and_picture(working_folder):
    members = list(plan(Path("out"), one_point(), SMALL))
    Path("out").mkdir()
    sweep.gather(members, one_point(), Path("out"))
    assert (working_folder / "out" / "accuracy_over_bops.png").read_bytes().startswith(b"\x89PNG")


# A sweep of real runs, in which one is killed and the sweep stopped, and then the same command again.

# The members wait before they do anything, so that none ends before the test gets to it.
MEMBERS_WAIT = """
import signal, sys
if "experiments.debug_run" in sys.orig_argv:
    signal.pause()
"""
MEMBERS_ARE_QUICK = """
import sys

if "experiments.debug_run" in sys.orig_argv:
    from experiments import compressed, data, plots

    plots.rendered = lambda *_: b"a picture"
    data.SYNTHETIC_TRAIN, data.SYNTHETIC_TEST = 64, 32
    compressed.exported = lambda network, claims: b"an exported network"
    compressed.read_back = lambda content, network, *_: (sum(p.numel() for p in network.parameters()), 0.0)
    compressed.measure_latency = lambda networks, images: {}
"""


def children(pid: int) -> Iterator[int]:
    """Yield the id of each process whose parent has the id `pid`."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            yield int(path.parent.name)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the test finds the members in /proc")
@pytest.mark.slow
def test_a_killed_member_and_a_stopped_sweep_are_made_good_by_the_same_command(tmp_path):
    command = [sys.executable, "-m", "experiments.sweep", *ONE_POINT]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment_at_start(MEMBERS_WAIT, tmp_path / "start"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    started = "sparsity_weight=0.001,seed=0: started\n"
    try:
        assert started in iter(process.stdout.readline, "")
        (member,) = children(process.pid)
        os.kill(member, signal.SIGKILL)
        assert "FAILED with status -9" in process.stdout.readline()
        assert process.stdout.readline() == "full_precision,seed=0: started\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert (process.returncode, err) == (143, "")
    assert "stopped by SIGTERM; the same command goes on" in out
    assert not list(children(process.pid))
    again = subprocess.run(
        command, cwd=tmp_path, env=environment_at_start(MEMBERS_ARE_QUICK, tmp_path / "again"),
        capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert (again.returncode, again.stderr) == (0, "")
    # A line of their verdicts fails for what stands in for pictures and exported networks.
    statuses = [row["status"].partition(",")[0] for row in rows(tmp_path / "sweep_output")]
    assert statuses == ["done", "done"]
    for row in rows(tmp_path / "sweep_output"):
        kept = json.loads((tmp_path / "sweep_output" / row["name"] / "history.json").read_text())
        assert float(row["accuracy"]) == kept["epochs"][-1]["accuracy"]
        assert float(row["unstructured_bops_ratio"]) == kept["final"]["unstructured_bops_ratio"]
