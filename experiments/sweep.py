"""The trade-off curve: the debug run over lists of settings, each in a folder of its own, several at once.

    python -m experiments.sweep
    python -m experiments.sweep --sparsity-weight 1e-3 4e-3 --deadzone-decay 0.5 0.8 --seed 0 1 2 --jobs 2
    python -m experiments.sweep --epochs 100 --print > commands.txt

Every combination is an ordinary `python -m experiments.debug_run` command; a run in full precision is added
for each seed. Flags that are not lists go to every run. Finished runs are skipped and interrupted runs are
resumed: the same command again finishes a sweep, or collects the results of printed commands that a cluster
ran. At the end it writes sweep.csv, a row a run, and accuracy_over_bops.png.
Exit status: 0, 1 when a run failed, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM (the runs in
progress write their files first).
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` handles signals, Ctrl-C ends the program silently: a traceback out of `import torch` helps
    # nobody.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import csv
import io
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.checkpoint import MAY_CHANGE
from experiments.data import load_dataset
from experiments.device import usable_cores
from experiments.exit_status import EXIT_FAILED, ExitStatus
from experiments.files import lock_folder, write_whole
from experiments.history import History
from experiments.live import LiveLine
from experiments.settings import Parser, Settings, flag, parse_settings
from experiments.verdict import FAIL

LISTS: dict[str, tuple[float, ...]] = {  # the settings that a sweep varies, with their default values
    "sparsity_weight": (1e-3, 2e-3, 4e-3, 8e-3),
    "bit_decay": (Settings.bit_decay,),
    "deadzone_decay": (Settings.deadzone_decay,),
    "seed": (0, 1, 2),
}
FULL_PRECISION = "full_precision"  # the point of the runs without quantizers
SPARSITIES = ("unstructured_sparsity", "structured_sparsity", "bits")
RATIOS = (
    "structured_bops_ratio",
    "unstructured_bops_ratio",
    "structured_mac_ratio",
    "unstructured_mac_ratio",
)
CSV, PICTURE, LOG = "sweep.csv", "accuracy_over_bops.png", "log.txt"
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
            history = History.from_json(json.loads((self.folder / "history.json").read_text()))
        except (OSError, ValueError):
            return None
        asked = json.loads(json.dumps(self.settings.to_json()))  # JSON makes lists of the settings' tuples
        free = set(MAY_CHANGE) - {"epochs"}
        same = all(history.settings.get(key) == asked[key] for key in asked.keys() - free)
        return history if history.stopped is None and history.final and same else None


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep of this command line. Returns: the exit status."""
    parser = Parser(
        prog="python -m experiments.sweep",
        description="The debug run over lists of settings: accuracy over bit operations. "
        "Other flags go to every run (python -m experiments.debug_run --help lists them).",
        allow_abbrev=False,
    )
    for name, default in LISTS.items():
        shown = " ".join(f"{value:g}" for value in default)
        parser.add_argument(flag(name), nargs="+", metavar="X", help=f"one run for each (default: {shown})")
    parser.add_argument("--output-dir", type=Path, default=Path("sweep_output"), help="a folder a run in it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--print", action="store_true", help="print the commands still to run, and run none")
    chosen, others = parser.parse_known_args(arguments)
    if chosen.jobs < 1:
        parser.error(f"--jobs is {chosen.jobs}; expected a whole number, 1 or more")
    if "--resume" in others:
        parser.error("--resume is given to every run as it is: leave it out")
    lists = {name: getattr(chosen, name) or [f"{v:g}" for v in default] for name, default in LISTS.items()}
    members = list(plan(chosen.output_dir, lists, others))
    if members[0].settings.data == "auto":
        parser.error("--data is 'auto', and a curve must be of one data set; expected cifar10 or synthetic")
    left = [member for member in members if member.history() is None]
    live = LiveLine()
    say = live.say
    with ExitStatus(live, "the same command goes on") as end, contextlib.ExitStack() as held:
        if chosen.print:
            for member in left:
                say(shlex.join(["python", "-m", "experiments.debug_run", *member.arguments]))
            return 0
        held.enter_context(lock_folder(chosen.output_dir, say))
        settings = members[0].settings
        # Download the data set here, once: several runs that start at the same time would each download it.
        if settings.data == "cifar10" and left:
            load_dataset("cifar10", settings.data_dir, None, None, say)
        say(f"{len(members)} runs, {len(members) - len(left)} done already, {chosen.jobs} at a time")
        running: dict[Member, subprocess.Popen[bytes]] = {}
        held.callback(stop_all, running)
        failed = run_all(left, chosen.jobs, running, say)
        gather(members, chosen.output_dir)
        say(f"Files: {chosen.output_dir / CSV}, {chosen.output_dir / PICTURE}")
        if failed:
            say(f"{len(failed)} of {len(members)} runs failed; the same command tries them again")
            end.status = EXIT_FAILED
    return end.status


def plan(folder: Path, lists: dict[str, list[str]], others: Sequence[str]) -> Iterator[Member]:
    """Make a member for each combination, then one in full precision for each seed.

    A bad flag ends the program with status 2.
    """
    # Forbid the fallback to the synthetic stand-in: a curve must use one data set. A --data that the user
    # gives comes later on the command line, and the last one counts.
    common = ["--data", "cifar10", *others]
    for values in itertools.product(*lists.values()):
        flags = [text for name, value in zip(lists, values, strict=True) for text in (flag(name), value)]
        settings = parse_settings([*common, *flags])
        point = ",".join(f"{name}={getattr(settings, name)}" for name in lists if name != "seed")
        yield _member(folder, point, settings.seed, [*common, *flags])
    for seed in lists["seed"]:
        # The default beta2 is chosen for training with the penalty, which a full-precision run does not have:
        # take torch's default.
        arguments = ["--beta2", "0.999", *common, flag("seed"), seed, "--exclude-layers", "."]
        yield _member(folder, FULL_PRECISION, parse_settings(arguments).seed, arguments)


def _member(folder: Path, point: str, seed: int, arguments: list[str]) -> Member:
    name = f"{point},seed={seed}"
    arguments = [*arguments, "--output-dir", str(folder / name), "--resume"]
    return Member(name, point, tuple(arguments), parse_settings(arguments))


def run_all(
    members: Sequence[Member],
    jobs: int,
    running: dict[Member, subprocess.Popen[bytes]],
    say: Callable[[str], None],
) -> list[Member]:
    """Run the members, `jobs` at a time. Returns: those that failed.

    `running` holds the runs in progress at any moment, so that the caller can stop them after a signal.
    """
    waiting, failed = list(reversed(members)), []
    while waiting or running:
        while waiting and len(running) < jobs:
            member = waiting.pop()
            try:
                running[member] = start(member, jobs)
                say(f"{member.name}: started")
            except OSError as error:
                failed.append(member)
                say(f"{member.name}: FAILED, its folder cannot be written ({error.strerror})")
        time.sleep(POLL_SECONDS)
        for member in [m for m, process in running.items() if process.poll() is not None]:
            status = running.pop(member).returncode
            history = member.history()
            if history is None:
                failed.append(member)
            say(f"{member.name}: {describe(history) if history else why_failed(member, status)}")
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
    with (member.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.debug_run", *member.arguments],
            stdout=log,
            stderr=log,
            env=os.environ | cores,
            start_new_session=True,
        )


def describe(history: History) -> str:
    """Describe a finished run in a few words for the sweep's own output."""
    row = results(history)
    fails = sum(check.status == FAIL for check in history.verdict)
    return (
        f"{100 * row['accuracy']:.2f} %, BOPs {row['structured_bops_ratio']:.1f}x structured, "
        f"{row['unstructured_bops_ratio']:.1f}x unstructured" + (f"; verdict: {fails} FAIL" if fails else "")
    )


def why_failed(member: Member, status: int) -> str:
    """Describe a failed run by its exit status and the last line of its log, its error message."""
    log = member.folder / LOG
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return f"FAILED with status {status}; the last line of {log}: {lines[-1] if lines else 'none'}"


def results(history: History) -> dict[str, float]:
    """The numbers of a finished run that the table and the picture show, by their names in history.json."""
    assert history.final
    accuracy = {"accuracy": history.epochs[-1].accuracy}
    return accuracy | {key: getattr(history.final, key) for key in (*SPARSITIES, *RATIOS)}


def gather(members: Sequence[Member], folder: Path) -> None:
    """Write the table of all runs, and the picture of those that have finished."""
    from experiments import plots

    columns = ("name", "status", *LISTS, "epochs", "data", "accuracy", *SPARSITIES, *RATIOS, "seconds")
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="")
    table.writeheader()
    points: dict[str, list[dict[str, float]]] = {}
    data = set()
    for member in members:
        history, settings = member.history(), member.settings.to_json()
        row: dict[str, Any] = {"name": member.name, "epochs": settings["epochs"]}
        # A full-precision run has no penalty and no logits: of the lists, only its seed means anything.
        row |= {n: settings[n] for n in LISTS if n == "seed" or member.point != FULL_PRECISION}
        if history:
            found = results(history)
            seconds = sum(epoch.seconds for epoch in history.epochs)
            row |= found | {"status": "done", "data": history.data.name, "seconds": seconds}
            points.setdefault(member.point, []).append(found)
            data.add(history.data.name)
        table.writerow({"status": "missing"} | row)
    write_whole(folder / CSV, text.getvalue().encode())
    full = points.pop(FULL_PRECISION, [])
    common = members[0].settings
    what = f"ResNet-20 on {', '.join(sorted(data)) or 'nothing yet'}, {common.epochs} epochs"
    title = f"Accuracy over BOPs: {what}\npreset {common.described(but=LISTS)}"
    plots.save_figure(plots.trade_off_figure(points, full, title), folder / PICTURE)


if __name__ == "__main__":
    sys.exit(main())
