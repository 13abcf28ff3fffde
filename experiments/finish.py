"""The end of a run: final metrics, pictures, the compressed network, the verdict, and the files of it all."""

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments import report
from experiments.checkpoint import checkpoint_path, load_checkpoint
from experiments.compressed import PACKED, SLIM, make_compressed
from experiments.data import Dataset, TestBatches
from experiments.distributed import use_local_batch_norms
from experiments.evaluator import Compression
from experiments.exit_status import EXIT_FAILED
from experiments.files import OutputError, archive_files, write_json, write_whole
from experiments.history import FAIL, Check, CompressedRecord, History, as_text, final_counts, judge, some
from experiments.live import LiveLine
from experiments.page import report_page
from experiments.rehearsal import rehearse_verifying
from experiments.retest import retest
from experiments.settings import FORMATS, Settings
from experiments.verdict import verdict
from src.encoding import PackingError
from utils_quantization import without_quantizers

ROW = re.compile(r" *\d+ \|")  # how a row of the table begins
MOST_BESIDE = 2048  # bytes that torch.save writes beside the numbers of a tensor


def write_report(
    settings: Settings,
    history: History,
    written: list[str],
    model: nn.Module,
    compression: Compression,
    dataset: Dataset,
    live: LiveLine,
) -> int:
    """The final metrics, the pictures, the compressed network, the verdict, history.json; the exit status.

    `written` are the records as they were when their epochs were over.
    """
    folder, errors = settings.output_dir, list[OutputError]()
    path, table, page = (folder / name for name in ("history.json", report.CSV, report.PAGE))
    if not history.epochs:
        write_json(path, history.to_json())
        live.say("no epoch was finished, so there is nothing to draw")
        return 0
    history.final = final_counts(compression)
    live.say(report.metrics_lines(history.final))
    # The history is small and all else can be made from it, so it is written first. A file that cannot be
    # written ends nothing.
    keep(errors, write_json, path, history.to_json())
    # Each epoch writes its row, but a resumed run may have had none left to train, and lack the last row.
    if history.resumed and history.resumed[-1].after_epoch == len(history.epochs):
        keep(errors, write_whole, table, report.metrics_csv(history).encode())
    compressed = None
    # A stopped run holds the weights of a half-finished epoch: do not test or export those.
    if not history.stopped:
        use_local_batch_norms(model)
        live.progress("testing once more")
        history.retest = retest(model, dataset, settings.precision)
        compressed = compress(settings, history, model, compression, dataset, live, errors)
    if settings.rehearse and history.compressed:
        live.say("\n--- The Packed File, as experiments.verify Sees It ---")
        history.rehearsal.append(rehearse_verifying(history, dataset, folder, live.say))
    from experiments.plots import figures, rendered  # matplotlib takes half a second to import

    live.progress("drawing the pictures")
    drawn = figures(history, report.picture_title(history, settings))
    shown = {name: rendered(figure) for name, figure in drawn.items()}
    kind = settings.figure_format
    contents = {
        _picture(folder, name, kind): shown[name] if kind == "png" else rendered(figure, kind)
        for name, figure in drawn.items()
    }
    # A run that was stopped and is resumed with another --figure-format has left pictures of fewer epochs.
    stale = [_picture(folder, name, other) for name in drawn for other in FORMATS if other != kind]
    keep(errors, _move_aside, folder, stale, live)
    for picture, content in contents.items():
        keep(errors, write_whole, picture, content)

    def write_page(checks: list[Check]) -> None:
        text = report_page(history, settings, checks, shown)
        keep(errors, write_whole, page, text.encode(errors="backslashreplace"))  # a path may be no UTF-8

    history.verdict = [
        *verdict(history, compression.count, model, list(contents), compressed),
        table_is_the_records(history, written, live.said),
        *([] if history.stopped else [checkpoint_is_the_runs(folder, history, model)]),
        *history.rehearsal,
    ]
    write_page(history.verdict)  # once more below, with the line of the check that reads it
    keep(errors, write_json, path, history.to_json())
    checks = [*history.verdict, files_are_the_runs(folder, history, model, contents, shown)]
    write_page(checks)
    colour = live.on_terminal and "NO_COLOR" not in os.environ
    live.say(report.verdict_lines(checks, colour))
    made = [folder / name for name in (PACKED, SLIM)] if history.compressed else []
    live.say(report.file_lines([p for p in (*contents, path, table, page, *made) if p.is_file()]))
    found = [*history.preflight, *checks]
    last = report.run_line(history, settings, checks)
    live.say("\n".join(["", *report.failed_lines(found, colour), last]))
    if errors:
        raise OutputError("; ".join(dict.fromkeys(map(str, errors))))  # some files are written twice
    return EXIT_FAILED if any(check.status == FAIL for check in found) else 0


def keep(errors: list[OutputError], write: Callable[..., object], *arguments: Any) -> None:
    """Write a file; if that cannot be done, add the error to the list."""
    try:
        write(*arguments)
    except OutputError as error:
        errors.append(error)


def _picture(folder: Path, name: str, kind: str) -> Path:
    return (folder / name).with_suffix(f".{kind}")


def _move_aside(folder: Path, pictures: list[Path], live: LiveLine) -> None:
    if aside := archive_files(folder, pictures):
        live.say(f"\nEarlier:   the pictures in another format were moved to {aside}")


def files_are_the_runs(
    folder: Path,
    history: History,
    model: nn.Module,
    pictures: Mapping[Path, bytes],
    shown: Mapping[str, bytes],
) -> Check:
    """Whether the files hold what was printed and drawn, and sizes and counts are the files' and network's.

    `pictures` are what was drawn, by the paths of their files, `shown` the pictures of the page, by their
    names. The line that this check gives is not looked for in the page.
    """
    name = "files hold the run"
    cause = "one could not be written, is not written at the end, or is another than was measured"
    try:
        kept = History.from_json(json.loads((folder / "history.json").read_text())).to_json()
        rows, page = (folder / report.CSV).read_text(), (folder / report.PAGE).read_bytes()
        other = [path.name for path, content in pictures.items() if path.read_bytes() != content]
    except (OSError, ValueError) as error:
        return judge(False, name, str(error), cause)
    wrong = [k for k, v in history.to_json().items() if json.dumps(kept[k]) != json.dumps(v)]
    wrong += [report.CSV] if rows != report.metrics_csv(history) else []
    wrong += other + ([] if _page_shows(page, history.verdict, shown) else [report.PAGE])
    if made := history.compressed:
        sizes = {PACKED: made.packed_bytes, SLIM: made.slim_bytes}
        wrong += [file for file, size in sizes.items() if _size(folder / file) != size]
        if not wrong:
            cause = "how the compressed network is measured (experiments/compressed.py): bytes, MACs, seconds"
        plain = without_quantizers(model)
        tensors = plain.state_dict().values()
        bytes_of = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        if not 0 <= made.float32_bytes - sum(bytes_of.values()) <= MOST_BESIDE * (len(tensors) + 1):
            wrong += ["the bytes in float32"]
        if made.dense_parameters != sum(p.numel() for p in plain.parameters()):
            wrong += ["the parameters of the network"]
        if history.final and made.dense_macs != history.final.totals["dense_macs"]:
            wrong += ["the MACs of the network"]
        wrong += [
            f"the latency of {what}"
            for what, seconds in made.latency_seconds.items()
            if not 0 < seconds["least"] <= seconds["median"] <= seconds["most"]
        ]
    files = f"history.json, {report.CSV}, {report.PAGE}, {len(pictures)} pictures"
    return judge(not wrong, name, f"{', '.join(wrong)} differ" if wrong else files, cause)


def _page_shows(page: bytes, checks: list[Check], shown: Mapping[str, bytes]) -> bool:
    """Whether the page has these checks under its verdict, and each picture under its own name."""
    verdict = page.partition(b"<h2>Verdict</h2>")[2].partition(b"<h2>")[0]
    rows = ((check.status, escape(check.name), escape(check.message)) for check in checks)
    found = re.findall(rb'alt="([^"]*)" src="data:image/png;base64,([^"]*)"', page)
    pictures = {name.decode(): base64.b64decode(content) for name, content in found}
    return pictures == shown and all(
        f">{'</td><td>'.join(row)}</td>".encode(errors="backslashreplace") in verdict for row in rows
    )


def _size(path: Path) -> int:
    """The bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def table_is_the_records(history: History, written: list[str], said: list[str]) -> Check:
    """Whether the rows that were printed are the records', in their order, and these are as they were."""
    name = "table holds the records"
    rows = [line for line in said if ROW.match(line)]
    due = [report.table_row(record) for record in history.epochs]
    if rows != due:
        measured = f"{len(rows)} rows were printed, {sum(row not in due for row in rows)} are of no record"
        return judge(False, name, measured, "a row is of another epoch, or its record was changed later")
    changed = [str(r.epoch) for r, then in zip(history.epochs, written, strict=True) if as_text(r) != then]
    measured = f"records of epochs {some(changed)} were changed later" if changed else f"{len(rows)} rows"
    return judge(not changed, name, measured, "something writes into the records of earlier epochs")


def checkpoint_is_the_runs(folder: Path, history: History, model: nn.Module) -> Check:
    """Whether the last checkpoint holds the records of all epochs and the weights of the last."""
    name, path = "last checkpoint is of the last epoch", checkpoint_path(folder, len(history.epochs))
    cause = "it could not be written, is written before the epoch is over, or holds other (older) weights"
    try:
        checkpoint = load_checkpoint(path)
    except (ValueError, OutputError) as error:
        return judge(False, name, f"{path.name} {error}", cause)
    state, saved = model.state_dict(), checkpoint.model
    # A buffer of someone's own network may have changed in the tests since.
    same = dict(model.named_parameters()) | {n: t for n, t in state.items() if _of_batch_norm(model, n)}
    wrong = [n for n, t in same.items() if n not in saved or not torch.equal(saved[n], t.detach().cpu())]
    wrong += ["records"] if checkpoint.history.epochs != history.epochs else []
    measured = f"{len(state)} tensors" if not wrong else f"{len(wrong)} parts differ, {wrong[0]} first"
    return judge(not wrong and saved.keys() == state.keys(), name, measured, cause)


def _of_batch_norm(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), _BatchNorm)


def compress(
    settings: Settings,
    history: History,
    model: nn.Module,
    compression: Compression,
    dataset: Dataset,
    live: LiveLine,
    errors: list[OutputError],
) -> CompressedRecord | PackingError:
    """The smaller network and the packed file, and what they give; the error if there can be none."""
    live.progress("making the smaller network and the packed file")
    whole_test_set = TestBatches(dataset, next(model.parameters()).device)
    try:
        history.compressed = make_compressed(
            model,
            compression.count,
            whole_test_set,
            settings.output_dir,
            history.settings,
            history.data.name,
            errors,
        )
    except PackingError as error:
        live.say(f"\nNo smaller network and no packed file: {error}")
        return error
    live.say(report.compressed_lines(history.compressed))
    return history.compressed
