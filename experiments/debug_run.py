"""Train a quantized network for a few epochs and show that the whole CoDeQ pipeline works.

    python -m experiments.debug_run
    python -m experiments.debug_run --preset plan --output-dir debug_output_plan
    python -m experiments.debug_run --resume
    torchrun --nproc-per-node=2 -m experiments.debug_run
    python -m experiments.debug_run --help

20 epochs of CIFAR-10 take 18 minutes on 2 CPU cores with AVX-512, 47 without it, and about 42 s on an
H100, start and end aside. They end near 83 % test accuracy with 93 % zero weights, 38 % zero filters, 2.2
bits and 34 times fewer bit operations (the mean of seeds 0, 1 and 2).

Prints a table row an epoch, the compression ratios, a verdict and the run in one line; writes five pictures,
history.json, report.html, the compressed network, and after every epoch metrics.csv and a checkpoint for
--resume.
Exit status: 0; 1 when a check of the preflight or of the verdict fails, the loss stops being finite or
another rank is lost; 2 for bad input, or where a file or standard output cannot be written; 130 after
Ctrl-C, 143 after SIGTERM, 129 after SIGHUP (the finished epochs' files are written first). torchrun itself
ends with 1 in all these cases but 0.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # python experiments/debug_run.py, without -m
    sys.path[0] = str(Path(__file__).parents[1])

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` takes over, Ctrl-C just ends the program: a traceback out of `import torch` helps nobody.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import copy
import itertools
import time
from dataclasses import replace

import torch

from experiments import report
from experiments.checkpoint import (
    Checkpoint,
    checkpoint_path,
    checkpoint_paths,
    find_checkpoint,
    resume,
    save_checkpoint,
    take_checkpoint,
)
from experiments.compressed import PACKED, SLIM
from experiments.data import Dataset, TestBatches, TrainBatches, class_count, load_dataset
from experiments.device import keep_freed_memory, prepare_device
from experiments.distributed import (
    LostProcessError,
    Processes,
    join_processes,
    leave_processes,
    use_global_batch_norms,
)
from experiments.draws import seed_draws
from experiments.evaluator import Compression, Evaluator
from experiments.exit_status import EXIT_FAILED, ExitStatus
from experiments.expect import Subject
from experiments.files import OutputError, archive_files, lock_folder, refuse_folders, write_whole
from experiments.finish import write_report
from experiments.history import FAIL, Check, EpochRecord, History, as_text, epoch_record, new_history
from experiments.ledger import Ledger, checkpoint_is_the_state, is_thorough
from experiments.live import (
    ClosedOutputError,
    EpochProgress,
    LiveLine,
    Stopped,
    ignore_sigterm,
    refuse,
)
from experiments.network import (
    MOST_PARAMETERS,
    excluded_layers,
    make_network,
    memory_layout,
    refuse_one_image,
)
from experiments.preflight import preflight
from experiments.quantizer_class import find_quantizer
from experiments.rehearsal import rehearse_resuming
from experiments.schedules import cosine_anneal, linear_warmup, warmed_up
from experiments.settings import Settings, parse_settings
from experiments.sparsity import coupled_group_lasso, keep_dead_slices
from experiments.training import (
    NotFiniteError,
    Pipeline,
    TrainingStep,
    make_optimizer,
    measure_accuracy,
    renew_batch_norms,
    set_learning_rates,
    train_epoch,
)
from experiments.verdict import new_warnings
from experiments.watch import EpochWatch, left_in
from utils_quantization import attach_weight_quantizers

PICTURES = [name.replace(".png", end) for name in report.PICTURES for end in (".png", ".pdf")]
RESULTS = (*PICTURES, "history.json", report.CSV, report.PAGE, PACKED, SLIM)  # and checkpoints
HOW_TO_GO_ON = "--resume goes on from the last checkpoint"


def main(arguments: list[str] | None = None) -> int:
    live = LiveLine()
    with ExitStatus(live, "nothing was trained") as end, contextlib.ExitStack() as held:
        processes = join_processes()
        held.callback(leave_processes)
        live.silent = not processes.first
        # Only rank 0's command line counts, and it alone parses it, so that a bad flag is reported once.
        arguments = processes.broadcast(sys.argv[1:] if arguments is None else arguments)
        settings = processes.broadcast(parse_settings(arguments) if processes.first else None)
        if processes.first:
            held.enter_context(lock_folder(settings.output_dir, live.say))
            refuse_folders(files_to_write(settings))
        checkpoint = find_checkpoint(settings, processes, live.say) if settings.resume else None
        device = prepare_device(settings, processes)
        live.launches_ahead = device.type != "cpu"
        make_quantizer = find_quantizer(settings)

        seed_draws(settings.seed)
        model = make_network(settings.model, class_count(settings.data)).to(device)
        if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
            keep_freed_memory(False)  # its copies are so large that what is kept soon fills the machine
        try:
            evaluator = Evaluator(model)
        except ValueError as error:
            raise ValueError(
                f"--model is {settings.model!r}, and {error}; expected another network"
            ) from error
        excluded = excluded_layers(settings, model, evaluator.dense)
        attach_weight_quantizers(model, excluded, make_quantizer, {})
        if memory_layout(model, device) == "channels_last":
            model.to(memory_format=torch.channels_last)
        if processes.count > 1:
            use_global_batch_norms(model, processes)
        model.eval()  # as each epoch leaves it: a quantizer of one's own may take statistics in training mode

        dataset = processes.broadcast(load(settings, live) if processes.first else None)
        train_batches = TrainBatches(
            dataset, settings.batch_size, settings.seed, device, processes, settings.crop_padding
        )
        test_batches = TestBatches(dataset, device, processes=processes)
        if 1 in train_batches.sizes:
            refuse_one_image(settings.model, model)

        penalty = coupled_group_lasso(model, settings.penalty_on, settings.group_weights)
        keep_dead = keep_dead_slices(model) if settings.keep_dead else None
        optimizer = make_optimizer(model, settings, settings.epochs * len(train_batches))
        step = TrainingStep(model, optimizer, penalty, settings.precision, keep_dead, processes)
        pipeline = Pipeline(
            settings,
            step,
            train_batches,
            test_batches,
            evaluator,
            rate_schedule=warmed_up(settings.rate_warmup, cosine_anneal(0)),
            sparsity_schedule=linear_warmup(settings.sparsity_delay, settings.sparsity_ramp),
        )

        # The copy is made before anything is trained: it learns of the run by the checkpoint alone.
        spare = replace(pipeline, step=copy.deepcopy(step)) if settings.rehearse else None
        history = new_history(
            settings, dataset, device, processes, model, evaluator.dense, arguments, step.host
        )
        left: dict[str, torch.Tensor] = {}
        if checkpoint:
            # Copied first: the optimizer may take the tensors themselves, and write into them.
            as_saved = replace(checkpoint, optimizer=copy.deepcopy(checkpoint.optimizer))
            resume(checkpoint, history, model, optimizer)
            left = left_in(as_saved, step)
            end.advice = HOW_TO_GO_ON
        end.inputs_are_good()
        live.say(report.first_lines(history, settings, evaluator.dense))
        subject = Subject(pipeline, dataset, history, one_epoch, arguments, resumed=bool(checkpoint))
        if not passes_preflight(subject, settings, live):
            end.status = EXIT_FAILED
            return end.status
        del subject  # which holds copies of all parameters
        if settings.preflight == "only":
            return end.status

        if not checkpoint:
            begin(settings, processes, live)
        elif processes.first:
            set_aside(checkpoint, settings, live)
        step.left = left
        compression = evaluator.evaluate(model)
        live.say(report.table_header(history.data))
        written = [as_text(record) for record in history.epochs]
        warned: set[str] = set()
        for done in range(1, len(history.epochs) + 1):
            show_epoch(live, history, done, warned)

        try:
            for epoch in range(len(history.epochs), settings.epochs):
                record, compression = one_epoch(pipeline, epoch, live.epoch(epoch, settings.epochs))
                if spare and epoch == settings.epochs // 2:
                    check, record, compression = rehearse_resuming(
                        pipeline, spare, record, one_epoch, live.say
                    )
                    history.rehearsal, pipeline = [check], spare  # the run goes on as the resumed one
                # Defer signals: an epoch must reach history, checkpoint and table together or not at all.
                with end.signals.held():
                    if pipeline.step.not_captured and not history.needs_host:
                        history.needs_host = True
                        live.say(
                            f"      ! no graph of a step could be captured ({pipeline.step.not_captured})"
                        )
                    history.epochs.append(record)
                    if processes.first:
                        save(history, pipeline, live)
                        end.advice = HOW_TO_GO_ON
                    written.append(as_text(record))
                    show_epoch(live, history, epoch + 1, warned)
        except (Stopped, NotFiniteError, LostProcessError, ClosedOutputError) as reason:
            end.status = stop(history, reason, live)
        if processes.first:
            live.endures = True  # the files are worth more than the lines
            status = write_report(settings, history, written, pipeline.model, compression, dataset, live)
            if live.broken:
                status = refuse(f"{live.broken}; the files are in {settings.output_dir}")
            end.status = end.status or status
    return end.status


def one_epoch(
    pipeline: Pipeline, epoch: int, progress: EpochProgress | None = None
) -> tuple[EpochRecord, Compression]:
    """Train, test and count once; the epoch's record and its network's counts. Epochs count from 0."""
    began, settings, step, model = time.perf_counter(), pipeline.settings, pipeline.step, pipeline.model
    with EpochWatch(pipeline, epoch) as watch:
        set_learning_rates(step.optimizer, pipeline.rate_schedule(epoch, settings.epochs))
        coefficient = settings.sparsity_weight * pipeline.sparsity_schedule(epoch, settings.epochs)
        losses = train_epoch(step, watch.batches, epoch, coefficient, progress)
        watch.trained(losses)
        if settings.batch_norm_batches:
            renew_batch_norms(
                model, pipeline.train_batches, epoch, settings.batch_norm_batches, settings.precision
            )
        watch.renewed()
        if progress:
            progress.phase("testing and counting")
        accuracy = measure_accuracy(model, pipeline.test_batches, settings.precision, step.processes)
        with torch.no_grad():
            penalty = step.penalty(model).item()
        compression = pipeline.evaluator.evaluate(model)
        record = epoch_record(
            epoch + 1,
            model,
            compression,
            loss=losses.loss,
            cross_entropy=losses.cross_entropy,
            penalty=penalty,
            coefficient=coefficient,
            accuracy=accuracy,
            seconds=time.perf_counter() - began,
        )
    return replace(record, ledger=Ledger(watch, record).checks()), compression


def load(settings: Settings, live: LiveLine) -> Dataset:
    return load_dataset(
        settings.data, settings.data_dir, settings.limit_train, settings.limit_test, live.say, live.progress
    )


def passes_preflight(subject: Subject, settings: Settings, live: LiveLine) -> bool:
    """Check the pipeline, and say what was found; False where the run is to stop for it."""
    if settings.preflight == "off":
        live.say("Preflight: off, nothing was checked before the first epoch")
        return True

    def tell(check: Check) -> None:
        if check.status == FAIL or settings.preflight == "only":
            live.say("\n".join(report.check_lines(check)))

    began = time.perf_counter()
    checks = subject.history.preflight = preflight(subject, live.progress, tell)
    live.say(report.preflight_line(checks, time.perf_counter() - began))
    passes = settings.preflight == "warn" or all(check.status != FAIL for check in checks)
    if not passes and settings.preflight == "stop":
        live.say("           the run ends here; --preflight warn goes on all the same")
    return passes


def files_to_write(settings: Settings) -> list[Path]:
    """The files that the run may write; of the checkpoints those that are there already."""
    folder = settings.output_dir
    last = checkpoint_path(folder, settings.epochs).name
    there = [p for p in checkpoint_paths(folder) if (len(p.name), p.name) <= (len(last), last)]
    return [*there, *(folder / name for name in RESULTS)]


def begin(settings: Settings, processes: Processes, live: LiveLine) -> None:
    """Move an earlier run's files out of a new run's way, and say so."""
    folder = settings.output_dir
    if settings.resume:
        live.say(f"Resumed:   no, there is no checkpoint in {folder}: this is a new run")
    if processes.first:
        # Checkpoints first: if moving is cut short, --resume must not take up what was left of them.
        files = [*checkpoint_paths(folder), *(folder / name for name in RESULTS)]
        aside = archive_files(folder, files)
        if aside:
            live.say(f"Earlier:   the files of an earlier run in {folder} were moved to {aside}")


def set_aside(checkpoint: Checkpoint, settings: Settings, live: LiveLine) -> None:
    """Move out of a resumed run's way what it would write over and may be of worth, and say so."""
    folder, last = settings.output_dir, checkpoint_path(settings.output_dir, checkpoint.epochs)
    # Those of later epochs could not be used here. A newer program, or an undamaged disk, may read them.
    passed = itertools.takewhile(lambda path: path != last, checkpoint_paths(folder))
    if aside := archive_files(folder, passed):
        live.say(f"Earlier:   the checkpoints that were passed over were moved to {aside}")
    if checkpoint.epochs == checkpoint.history.settings["epochs"]:
        # It had ended: what it left is whole, and stays, also if what is added is stopped on its way.
        # The rows of metrics.csv stay among those that are added.
        longer = settings.epochs > checkpoint.epochs
        ended = [folder / name for name in RESULTS if not (longer and name == report.CSV)]
        if aside := archive_files(folder, ended):
            live.say(f"Earlier:   the files of the {checkpoint.epochs} epochs were moved to {aside}")


def show_epoch(live: LiveLine, history: History, epoch: int, warned: set[str]) -> None:
    """An epoch's row of the table (epochs count from 1 here), and below it the warnings that are new."""
    live.say(report.table_row(history.epochs[epoch - 1]))
    for sentence in new_warnings(history, epoch, warned):
        live.say(f"      ! {sentence}")


def save(history: History, pipeline: Pipeline, live: LiveLine) -> None:
    """Leave a checkpoint and metrics.csv. If one cannot be written that is said, and the run goes on."""
    folder, epoch = pipeline.settings.output_dir, len(history.epochs)
    try:
        save_checkpoint(folder, take_checkpoint(history, pipeline.model, pipeline.step.optimizer))
        if is_thorough(epoch - 1, pipeline.settings.epochs):
            check = checkpoint_is_the_state(checkpoint_path(folder, epoch), pipeline.step)
            history.epochs[-1].ledger.extend([check] if check.status == FAIL else [])
    except OutputError as error:
        live.say(f"      ! no checkpoint of epoch {epoch}: {error}")
    try:
        write_whole(folder / report.CSV, report.metrics_csv(history).encode())
    except OutputError as error:
        live.say(f"      ! no row of epoch {epoch} in {report.CSV}: {error}")


def stop(history: History, reason: BaseException, live: LiveLine) -> int:
    """Note in the history why the run ends early, and say so; the exit status."""
    if not isinstance(reason, NotFiniteError):
        ignore_sigterm()  # schedulers send it twice, and torchrun once it sees that a rank is lost
    epoch = len(history.epochs) + 1
    history.not_finite = isinstance(reason, NotFiniteError)
    history.stopped, status = f"stopped in epoch {epoch}: {reason}", EXIT_FAILED
    if isinstance(reason, Stopped):
        history.stopped, status = f"stopped by {reason.name} in epoch {epoch}", reason.status
    sentence = history.stopped + (f"; {HOW_TO_GO_ON}" if history.epochs else "")
    if isinstance(reason, ClosedOutputError) and len(history.epochs) == history.settings["epochs"]:
        history.stopped, sentence = None, str(reason)  # it broke at the last row, and the run is whole
    if history.not_finite:
        sentence = f"{history.stopped}; give a lower --weights-lr or --sparsity-weight"
    if isinstance(reason, ClosedOutputError):
        live.close()
        return refuse(sentence)
    try:
        live.say(sentence)
    except ClosedOutputError:  # Ctrl-C ends the `tee` behind a run too, and SIGHUP comes when a terminal goes
        live.close()
        refuse(sentence)
    return status


if __name__ == "__main__":
    sys.exit(main())
