"""The trade-off curve: the debug run over lists of settings, each in a folder of its own, several at once.

    python -m experiments.sweep
    python -m experiments.sweep --sparsity-weight 1e-3 4e-3 --deadzone-decay 0.5 0.8 --seed 0 1 2 --jobs 2
    python -m experiments.sweep --model resnet20 resnet32 --fixed-bits 2 4 --seed 0
    python -m experiments.sweep --epochs 100 --print > commands.txt

Every number of the debug run, its preset and its network can be a list. Every combination is an ordinary
`python -m experiments.debug_run` command; runs in full precision are added, one for each combination of the
lists that matter to it. Other flags go to every run. Finished runs are skipped and interrupted runs are
resumed: the same command again finishes a sweep, or collects the results of printed commands that a cluster
ran. After each run it writes sweep.csv, a row a run, and accuracy_over_bops.png.
Exit status: 0, 1 when a run failed, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP
(the runs in progress write their files first).
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # python experiments/sweep.py, without -m
    sys.path[0] = str(Path(__file__).parents[1])

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` handles signals, Ctrl-C ends the program silently: a traceback out of `import torch` helps
    # nobody.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import csv
import errno
import io
import itertools
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from experiments.checkpoint import MAY_CHANGE
from experiments.data import load_dataset
from experiments.device import usable_cores
from experiments.exit_status import EXIT_FAILED, ExitStatus
from experiments.files import archive_files, lock_folder, read_file, refuse_folders, write_whole
from experiments.history import FAIL, PASS, SKIP, History, commit_of_program, short_commit
from experiments.live import LiveLine, printable, spelled
from experiments.network import network_name
from experiments.settings import Parser, Settings, flag, folder_path, parse_settings, whole_number

NUMBERS = (int, float, int | None)
# The settings that can be lists, in the order of the folders' names.
AXES = (
    "preset",
    "model",
    *(f.name for f in fields(Settings) if f.type in NUMBERS and f.name != "seed"),
    "seed",
)
LISTS: dict[str, tuple[float, ...]] = {  # those that are lists by default
    "sparsity_weight": (3e-4, 6e-4, 1.2e-3, 1.8e-3, 2.7e-3, 5e-3),
    "seed": (0, 1, 2),
}
# What a run without quantizers and penalty does not depend on.
OF_COMPRESSION = (
    *("sparsity_weight", "sparsity_delay", "sparsity_ramp", "max_bits", "fixed_bits", "bit_lr", "bit_decay"),
    *("deadzone_lr", "deadzone_decay"),
)
FULL_PRECISION = "full_precision"  # the point of the runs without quantizers
SPARSITIES = ("unstructured_sparsity", "structured_sparsity", "bits")
RATIOS = (
    "structured_bops_ratio",
    "unstructured_bops_ratio",
    "structured_mac_ratio",
    "unstructured_mac_ratio",
)
CSV, PICTURE, LOG = "sweep.csv", "accuracy_over_bops.png", "log.txt"
MOST_BYTES = 1 << 30  # of a history.json
ATTEMPT = "$ python -m experiments.debug_run "  # how the log of each attempt at a run begins
POLL_SECONDS = 0.2  # between two looks at which processes have ended


@dataclass(frozen=True)
class Member:
    """One run of the sweep."""

    name: str  # of its folder
    point: str  # its name without the seed: runs of one point differ only in their seed
    arguments: tuple[str, ...]  # for experiments.debug_run
    settings: Settings  # parsed from the arguments

    @property
    def folder(self) -> Path:
        return self.settings.output_dir

    def history(self) -> History | None:
        """Read the run's history. Returns: None unless a run with these settings has finished."""
        try:
            history = History.from_json(json.loads(read_file(self.folder / "history.json", MOST_BYTES)))
        except (ValueError, RecursionError):
            return None
        asked = self.settings.to_json()
        free = set(MAY_CHANGE) - {"epochs"}
        same = all(history.settings.get(key) == asked[key] for key in asked.keys() - free)
        # The verdict is written last: a run that was killed while it drew its pictures has none.
        ended = history.verdict and history.epochs and history.final and history.stopped is None
        return history if ended and same and _is_possible(history) else None


def _is_possible(history: History) -> bool:
    """Whether a history has a record of each epoch, and numbers and words such as a run writes."""
    checks = (*history.preflight, *history.verdict)
    return (
        [record.epoch for record in history.epochs] == [*range(1, history.settings["epochs"] + 1)]
        and all(0 <= record.accuracy <= 1 for record in history.epochs)
        and all(getattr(history.final, name) > 0 for name in RATIOS)
        and all(check.status in (PASS, FAIL, SKIP) for check in checks)
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep of this command line. Returns: the exit status."""
    parser = Parser(
        prog="python -m experiments.sweep",
        description="The debug run over lists of settings: accuracy over bit operations. "
        "Other flags go to every run (python -m experiments.debug_run --help lists them).",
        allow_abbrev=False,
    )
    for name in AXES:
        shown = " ".join(f"{value:g}" for value in LISTS.get(name, ())) or "the debug run's"
        parser.add_argument(flag(name), nargs="+", metavar="X", help=f"one run for each (default: {shown})")
    parser.add_argument(
        "--output-dir", type=folder_path, default=Path("sweep_output"), help="a folder a run in it"
    )
    parser.add_argument("--jobs", type=whole_number, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--print", action="store_true", help="print the commands still to run, and run none")
    chosen, others = parser.parse_known_args(arguments)
    if chosen.jobs < 1:
        parser.error(f"--jobs is {chosen.jobs}; expected a whole number, 1 or more")
    if "--resume" in others:
        parser.error("--resume is given to every run as it is: leave it out")
    given = {name: getattr(chosen, name) or [f"{v:g}" for v in LISTS.get(name, ())] for name in AXES}
    lists = {name: values for name, values in given.items() if values}
    # A value that is given twice, perhaps spelled otherwise, is one run.
    members = list({member.folder: member for member in plan(chosen.output_dir, lists, others)}.values())
    if members[0].settings.data == "auto":
        parser.error(
            "--data is 'auto', and a curve must be of one data set; expected cifar10, cifar100 or synthetic"
        )
    if members[0].settings.preflight == "only":
        parser.error("--preflight is 'only', with which no run trains; expected stop, warn or off")
    found = {member: member.history() for member in members}
    left, done = [m for m, h in found.items() if h is None], [h for h in found.values() if h]
    live = LiveLine()
    say = live.say
    with ExitStatus(live, "the same command goes on") as end, contextlib.ExitStack() as held:
        if chosen.print:
            for member in left:
                say(shlex.join(["python", "-m", "experiments.debug_run", *member.arguments]))
            return 0
        held.enter_context(lock_folder(chosen.output_dir, say))
        refuse_folders(chosen.output_dir / name for name in (CSV, PICTURE))
        results = [chosen.output_dir / name for name in (CSV, PICTURE)]
        if not _is_table_of(members, results[0]) and (aside := archive_files(chosen.output_dir, results)):
            say(f"Earlier:   the table and the picture of another sweep were moved to {aside}")
        settings = members[0].settings
        # Download the data set here, once: several runs that start at the same time would each download it.
        if settings.data != "synthetic" and left:
            load_dataset(settings.data, settings.data_dir, None, None, say)
        say(f"{len(members)} runs, {len(done)} done already, {chosen.jobs} at a time")
        here = commit_of_program()
        if commits := sorted({short_commit(h.origin.commit) for h in done if h.origin.commit != here}):
            say(
                f"Of those done some are of other code ({', '.join(commits)}) than this "
                f"({short_commit(here)}); remove their folders to have them run again"
            )
        running: dict[Member, subprocess.Popen[bytes]] = {}
        held.callback(stop_all, running)
        failed = run_all(left, chosen.jobs, running, say, lambda: gather(members, lists, chosen.output_dir))
        gather(members, lists, chosen.output_dir)
        say(f"Files: {chosen.output_dir / CSV}, {chosen.output_dir / PICTURE}")
        if failed:
            say(f"{len(failed)} of {len(members)} runs failed; the same command tries them again")
            end.status = EXIT_FAILED
    return end.status


def _is_table_of(members: Sequence[Member], path: Path) -> bool:
    """Whether the table at this path has a row for each of these runs and no other."""
    try:
        lines = read_file(path, MOST_BYTES).decode(errors="replace").splitlines()
        return [row.get("name") for row in csv.DictReader(lines)] == [member.name for member in members]
    except (ValueError, csv.Error):
        return False


def plan(folder: Path, lists: dict[str, list[str]], others: Sequence[str]) -> Iterator[Member]:
    """Make a member for each combination, then those in full precision.

    A bad flag ends the program with status 2.
    """
    named = [n for n, values in lists.items() if n != "seed" and (len(values) > 1 or n == "sparsity_weight")]
    # Forbid the fallback to the synthetic stand-in: a curve must use one data set. A --data that the user
    # gives comes later on the command line, and the last one counts.
    common = ["--data", "cifar10", *others]
    for values in itertools.product(*lists.values()):
        flags = [text for name, value in zip(lists, values, strict=True) for text in (flag(name), value)]
        settings = parse_settings([*common, *flags])
        point = ",".join(f"{name}={getattr(settings, name)}" for name in named)
        yield _member(folder, point, settings.seed, [*common, *flags])
    plain = {name: values for name, values in lists.items() if name not in OF_COMPRESSION}
    for values in itertools.product(*plain.values()):
        flags = [text for name, value in zip(plain, values, strict=True) for text in (flag(name), value)]
        # The default beta2 is chosen for training with the penalty, which a full-precision run does not have:
        # take torch's default.
        arguments = ["--beta2", "0.999", *common, *flags, "--exclude-layers", "."]
        settings = parse_settings(arguments)
        of = [f"{name}={getattr(settings, name)}" for name in named if name in plain]
        yield _member(folder, ",".join([FULL_PRECISION, *of]), settings.seed, arguments)


def _member(folder: Path, point: str, seed: int, arguments: list[str]) -> Member:
    name = f"{point},seed={seed}"
    arguments = [*arguments, "--output-dir", str(folder / name), "--resume"]
    return Member(name, point, tuple(arguments), parse_settings(arguments))


def run_all(
    members: Sequence[Member],
    jobs: int,
    running: dict[Member, subprocess.Popen[bytes]],
    say: Callable[[str], None],
    collect: Callable[[], None],
) -> list[Member]:
    """Run the members, `jobs` at a time, and `collect` after each. Returns: those that failed.

    `running` holds the runs in progress at any moment, so that the caller can stop them after a signal.
    """
    began = time.monotonic()
    waiting, failed, ended = list(reversed(members)), list[Member](), 0
    while waiting or running:
        while waiting and len(running) < jobs:
            member = waiting.pop()
            try:
                running[member] = start(member, jobs)
                say(f"{member.name}: started")
            except OSError as error:
                failed.append(member)
                lacking = error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
                what = "no process could be started" if lacking else "its folder cannot be written"
                say(f"{member.name}: FAILED, {what} ({error.strerror})")
        time.sleep(POLL_SECONDS)
        for member in [m for m, process in running.items() if process.poll() is not None]:
            status = running.pop(member).returncode
            history = member.history()
            if history is None:
                failed.append(member)
            ended += 1
            left = (time.monotonic() - began) / ended * (len(members) - ended)
            time_left = f"; about {spelled(left)} left" if left and history else ""
            say(f"{member.name}: {describe(history) if history else why_failed(member, status)}{time_left}")
            collect()
    return failed


def stop_all(running: dict[Member, subprocess.Popen[bytes]]) -> None:
    """Stop the runs in progress with SIGTERM, on which they write their files, and wait for their end."""
    for process in running.values():
        process.terminate()
    for process in running.values():
        process.wait()


def start(member: Member, jobs: int) -> subprocess.Popen[bytes]:
    """Start a run as a process of its own, whose output is appended to log.txt in the run's folder.

    The process is in a session of its own, which Ctrl-C does not reach: `stop_all` stops it with SIGTERM. Of
    several jobs, each gets an equal share of the cores.

    Raises: OSError if the folder or the log cannot be written.
    """
    member.folder.mkdir(parents=True, exist_ok=True)
    cores = {"OMP_NUM_THREADS": str(max(1, usable_cores() // jobs))} if jobs > 1 else {}
    # Where the sweep itself was started by its path, from another folder, its runs are found in this one.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    with (member.folder / LOG).open("ab") as log:
        log.write(os.fsencode(f"{ATTEMPT}{shlex.join(member.arguments)}\n"))
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.debug_run", *member.arguments],
            stdout=log,
            stderr=log,
            env=os.environ | cores | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,
        )


def describe(history: History) -> str:
    """Describe a finished run in a few words for the sweep's own output."""
    row = results(history)
    fails = _fails(history)
    return (
        f"{100 * row['accuracy']:.2f} %, BOPs {row['structured_bops_ratio']:.1f}x structured, "
        f"{row['unstructured_bops_ratio']:.1f}x unstructured" + (f"; {fails} checks FAIL" if fails else "")
    )


def _fails(history: History) -> int:
    """How many checks of the preflight and of the verdict failed."""
    return sum(check.status == FAIL for check in (*history.preflight, *history.verdict))


def why_failed(member: Member, status: int) -> str:
    """Describe a failed run by its exit status and the line of its log that says why, else the last one."""
    log = member.folder / LOG
    attempts = log.read_text(errors="replace").strip() if log.exists() else ""
    lines = attempts.rpartition(ATTEMPT)[2].splitlines()
    said = [line for line in lines if line.startswith(("error: ", "FAIL  ", "stopped "))] or lines
    return f"FAILED with status {status}; {log} says: {said[-1] if said else 'nothing'}"


def results(history: History) -> dict[str, float]:
    """The numbers of a finished run that the table and the picture show, by their names in history.json."""
    assert history.final
    accuracy = {"accuracy": history.epochs[-1].accuracy}
    return accuracy | {key: getattr(history.final, key) for key in (*SPARSITIES, *RATIOS)}


def gather(members: Sequence[Member], lists: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Write the table of all runs, and the picture of those that have finished."""
    from experiments import plots

    columns = ("name", "status", *dict.fromkeys([*lists, "epochs"]), "data", "accuracy", *SPARSITIES, *RATIOS,
               "seconds")  # fmt: skip
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="")
    table.writeheader()
    # By the settings that are not the penalty's weight, and by that weight.
    series: dict[str, dict[float, list[dict[str, float]]]] = {}
    full: dict[str, list[dict[str, float]]] = {}
    data = set()
    for member in members:
        history, settings = member.history(), member.settings.to_json()
        row: dict[str, Any] = {"name": member.name, "epochs": settings["epochs"]}
        is_full = member.point.startswith(FULL_PRECISION)
        row |= {n: settings[n] for n in lists if not (is_full and n in OF_COMPRESSION)}
        if history:
            found = results(history)
            seconds = sum(epoch.seconds for epoch in history.epochs)
            status = f"done, {fails} FAIL" if (fails := _fails(history)) else "done"
            name = printable(history.data.name)  # a text that a font draws and UTF-8 spells
            row |= found | {"status": status, "data": name, "seconds": seconds}
            row["epochs"] = len(history.epochs)
            others = ", ".join(p for p in member.point.split(",") if not p.startswith("sparsity_weight="))
            if is_full:
                full.setdefault(others.replace("_", " ").replace(f"{FULL_PRECISION},", ""), []).append(found)
            else:
                series.setdefault(others, {}).setdefault(settings["sparsity_weight"], []).append(found)
            data.add(name)
        table.writerow({"status": "missing"} | row)
    write_whole(folder / CSV, text.getvalue().encode())
    title = _title(members[0].settings, lists, ", ".join(sorted(data)) or "nothing yet")
    write_whole(folder / PICTURE, plots.rendered(plots.trade_off_figure(series, full, title)))


def _title(common: Settings, lists: Mapping[str, Sequence[str]], data: str) -> str:
    """What all runs have in common; the legend says of each series what it has for itself."""
    differ = [name for name, values in lists.items() if len(values) > 1]
    title = "Accuracy over BOPs: "
    title += data if "model" in differ else f"{network_name(common.model)} on {data}"
    title += "" if "epochs" in differ else f", {common.epochs} epochs"
    return title if "preset" in differ else f"{title}\npreset {common.described(but=('model', *differ))}"


if __name__ == "__main__":
    sys.exit(main())
