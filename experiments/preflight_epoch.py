"""Preflight checks of an epoch as a whole, of what is counted, and of the files: faults hide in the glue."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments import reference, report
from experiments.expect import (
    BrokenError,
    Subject,
    expect,
    expect_close,
    some,
    used_weights,
)
from experiments.history import DataRecord, EpochRecord
from experiments.preflight_step import expected_rates
from experiments.training import TrainingStep
from experiments.verdict import FAIL
from utils_quantization import quantized_layers

FEW_BATCHES, FEW_IMAGES, FEW_TESTED = 3, 32, 128  # of the run's batches, in a trial epoch
FULL_BITS = 32


class FewBatches:
    """The first few training batches of any epoch, each cut to a few images where one rank trains."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.alone = batches.processes.count == 1
        sizes = batches.sizes[:FEW_BATCHES]
        self.sizes = [min(size, FEW_IMAGES) for size in sizes] if self.alone else list(sizes)
        if self.alone and len(self.sizes) > 1:
            self.sizes[-1] = -(-self.sizes[-1] // 2)  # a smaller last batch, as in most epochs

    def __getattr__(self, name: str) -> Any:
        if name == "batches":  # of a copy in the making, which has nothing yet
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __len__(self) -> int:
        return len(self.sizes)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for (images, labels), size in zip(self.batches.epoch(epoch), self.sizes, strict=False):
            yield (images[:size], labels[:size]) if self.alone else (images, labels)


class FewTested:
    """The first few test images in two batches."""

    def __init__(self, batches: Any) -> None:
        images, labels = next(iter(batches))
        self.images, self.right = images[:FEW_TESTED], labels[:FEW_TESTED]
        self.labels = self.right.clone()

    def agree_with(self, model: nn.Module) -> Any:
        """Let every label become what the model predicts for its image in its next test pass; the hook."""
        done = 0

        def note(module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
            nonlocal done
            if not module.training:
                part = self.labels[done : done + len(logits)]
                part.copy_(logits[: len(part)].float().argmax(1))
                done += len(part)

        return model.register_forward_hook(note)

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        half = -(-len(self.labels) // 2)
        yield from zip(self.images.split(half), self.labels.split(half), strict=True)


def schedules_are_the_settings(subject: Subject) -> str:
    """Both schedules at every epoch of the run against their closed forms and the settings."""
    settings, pipeline = subject.pipeline.settings, subject.pipeline
    # Beyond a short run's end too, where a warm-up that never ends would show.
    total = max(settings.epochs, int(min(2 * (settings.sparsity_delay + settings.sparsity_ramp), 1000)) + 2)
    epochs = range(min(total, 1000))
    for what, schedule, own, formula, cause in (
        (
            "learning rates",
            pipeline.rate_schedule,
            subject.own_rates,
            lambda epoch: reference.cosine(epoch, total),
            "the cosine of the learning rates",
        ),
        (
            "the penalty's coefficient",
            pipeline.sparsity_schedule,
            subject.own_warmup,
            lambda epoch: reference.warmup(epoch, settings.sparsity_delay, settings.sparsity_ramp),
            "--sparsity-delay and --sparsity-ramp: the warm-up of the penalty",
        ),
    ):
        for epoch in epochs:
            factor = schedule(epoch, total)
            expect(
                math.isfinite(factor) and factor >= 0,
                f"{what} have a factor of {factor} in epoch {epoch + 1}",
                f"the schedule of {what}",
            )
            if own:
                wanted = formula(epoch)
                expect(
                    math.isclose(factor, wanted, abs_tol=1e-9),
                    f"{what} in epoch {epoch + 1} stand at {factor:.4f} of their peak, expected {wanted:.4f}",
                    cause,
                )
    skipped = [w for w, own in (("rates", subject.own_rates), ("penalty", subject.own_warmup)) if not own]
    return f"{min(settings.epochs, 1000)} epochs" + (
        f"; SKIP of the formula of {some(skipped)}: not this project's" * bool(skipped)
    )


@dataclass
class Seen:
    """What was seen of an epoch from outside."""

    trained: list[Tensor] = field(default_factory=list)  # images of forward passes with gradients
    logits: list[Tensor] = field(default_factory=list)  # of these passes
    tested: list[Tensor] = field(default_factory=list)  # images of passes in evaluation mode
    test_logits: list[Tensor] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)  # modes that are wrong, and the cause
    rates: list[dict[str, float]] = field(default_factory=list)  # by group, at each step
    penalties: list[float] = field(default_factory=list)  # before each step
    statistics: list[dict[str, Tensor]] = field(default_factory=list)  # at the first test pass
    kinds: set[torch.dtype] = field(default_factory=set)  # of the logits
    passes: list[str] = field(default_factory=list)  # train, renew or test, in their order
    renewed: list[Tensor] = field(default_factory=list)  # images of passes in training mode without gradients


def an_epoch_reports_what_it_did(subject: Subject) -> str:
    """Two short epochs of the run's own loop, watched from outside, against what their records say."""
    settings = subject.pipeline.settings
    last = settings.epochs - 1
    # The first epoch, the last, and one in the middle of the warm-up, one after the other as in a run.
    epochs = sorted({0, min(last, int(settings.sparsity_delay) + 1), last})
    step = subject.copied_step()
    tested = FewTested(subject.pipeline.test_batches)
    for epoch in epochs:
        # In the first epoch every answer is right: what keeps the best accuracy so far, and not the epoch's
        # own, then shows in the later ones.
        tested.labels.copy_(tested.right)
        hook = tested.agree_with(step.model) if len(epochs) > 1 and epoch == 0 else None
        _try_epoch(subject, step, tested, epoch)
        if hook:
            hook.remove()
    return f"{len(epochs)} epochs of {FEW_BATCHES} batches: losses, rates, modes, statistics, counts"


def _try_epoch(subject: Subject, step: TrainingStep, tested: FewTested, epoch: int) -> None:
    few = FewBatches(subject.pipeline.train_batches)
    few_of_each: Any = {"train_batches": few, "test_batches": tested}
    pipeline = dataclasses.replace(subject.pipeline, step=step, **few_of_each)
    seen = Seen()
    handles = _watch(step, seen)
    record, _ = subject.one_epoch(pipeline, epoch)
    for handle in handles:
        handle.remove()
    expect(
        "test" not in seen.passes[: seen.passes.index("train") if "train" in seen.passes else 0],
        f"the test pass of epoch {epoch + 1} came before its training",
        "the network is tested before the epoch's training, not after it",
    )
    for check in record.ledger:
        if check.status == FAIL:
            measured, _, cause = check.message.partition(". Likely cause: ")
            raise BrokenError(f"{check.name}: {measured}", cause)
    _compare_training(subject, step, few, epoch, record, seen)
    _compare_test(subject, step, few, tested, epoch, record, seen)
    _compare_counts(step.model, record)
    _compare_row(record)


def _watch(step: TrainingStep, seen: Seen) -> list[Any]:
    model = step.model

    def forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        modes = {m.training for m in module.modules()}
        if modes == {True, False}:
            odd = [n for n, m in module.named_modules() if m.training != module.training]
            seen.faults.append(
                (
                    f"{len(odd)} modules are in another mode than the network: {some(odd)}",
                    "a part of the network is kept in training or evaluation mode",
                )
            )
        if not module.training and not seen.statistics:
            seen.statistics.append(_statistics(module))
        where = (
            seen.tested if not module.training else seen.trained if torch.is_grad_enabled() else seen.renewed
        )
        where.append(inputs[0].detach().clone())
        seen.passes.append("train" if torch.is_grad_enabled() else "renew" if module.training else "test")

    def logits(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.kinds.add(output.dtype)
        if not module.training:
            seen.test_logits.append(output.detach().clone())
        elif torch.is_grad_enabled():
            seen.logits.append(output.detach().clone())
            stale = [n for n, layer in quantized_layers(module).items() if _is_stale(layer)]
            if stale:
                measured = f"step {len(seen.logits)}: weights are not what quantizers give now: {some(stale)}"
                seen.faults.append((measured, "quantized weights are cached across optimizer steps"))

    def optimize(optimizer: Any, *_: Any) -> None:
        seen.rates.append({g.get("name", "weights"): float(g["lr"]) for g in optimizer.param_groups})
        with torch.no_grad():
            seen.penalties.append(float(step.penalty(model)))

    return [
        model.register_forward_pre_hook(forward),
        model.register_forward_hook(logits),
        step.optimizer.register_step_pre_hook(optimize),
    ]


def _is_stale(layer: Any) -> bool:
    """Whether a layer computes with other weights than those that are stored give now."""
    with torch.no_grad():
        fresh = layer.parametrizations.weight()
    return not torch.equal(layer.weight.detach(), fresh)


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {n: v.detach().clone() for n, v in model.state_dict().items() if "running" in n}


def _compare_training(
    subject: Subject, step: TrainingStep, few: FewBatches, epoch: int, record: EpochRecord, seen: Seen
) -> None:
    settings, pipeline = subject.pipeline.settings, subject.pipeline
    expect(not seen.faults, *(seen.faults[0] if seen.faults else ("", "")))
    batches = list(few.epoch(epoch))
    expect(
        len(seen.trained) > 0,
        "no forward pass with gradients in training mode was seen",
        "the network trains in evaluation mode, or not at all",
    )
    expect(
        len(seen.trained) == len(batches) == len(seen.rates),
        f"{len(seen.trained)} passes and {len(seen.rates)} optimizer steps for {len(batches)} batches",
        "batches are skipped or trained on twice, or the optimizer does not step with each",
    )
    for number, (images, (wanted, _)) in enumerate(zip(seen.trained, batches, strict=True), 1):
        expect(
            images.shape == wanted.shape and bool((images == wanted).all()),
            f"step {number} of epoch {epoch + 1} trains on other images than its batch holds",
            "training on the images of another epoch or of the test set",
        )
    factor = pipeline.rate_schedule(epoch, settings.epochs)
    peaks = expected_rates(subject)
    for rates in seen.rates:
        for name, rate in rates.items():
            wanted_rate = peaks[name][0] * factor
            expect(
                math.isclose(rate, wanted_rate, rel_tol=1e-5, abs_tol=1e-12),
                f"epoch {epoch + 1} trains {name} at a rate of {rate:.4g}, expected {wanted_rate:.4g}",
                "learning rates do not follow their schedule",
            )
    coefficient = settings.sparsity_weight * pipeline.sparsity_schedule(epoch, settings.epochs)
    expect(
        math.isclose(record.coefficient, coefficient, rel_tol=1e-6, abs_tol=1e-12),
        f"epoch {epoch + 1} has a coefficient of {record.coefficient:g}, expected {coefficient:g}",
        "the penalty's coefficient does not follow --sparsity-weight and its warm-up",
    )
    expect(
        record.epoch == epoch + 1, f"epoch {epoch + 1} is reported as {record.epoch}", "epochs are miscounted"
    )
    if step.processes.count > 1:
        return
    sizes = torch.tensor([len(labels) for _, labels in batches], dtype=torch.double)
    ours = [
        reference.cross_entropy(logits.double(), labels).item()
        for logits, (_, labels) in zip(seen.logits, batches, strict=True)
    ]
    mean = float((torch.tensor(ours) * sizes).sum() / sizes.sum())
    expect(
        math.isclose(record.cross_entropy, mean, rel_tol=1e-3, abs_tol=1e-4),
        f"the epoch's cross-entropy is said to be {record.cross_entropy:.5f}, its logits give {mean:.5f}",
        "losses are averaged wrongly over the epoch, or are of other labels",
    )
    penalties = float((torch.tensor(seen.penalties, dtype=torch.double) * sizes).sum() / sizes.sum())
    wanted_loss = record.cross_entropy + coefficient * penalties
    expect(
        math.isclose(record.loss, wanted_loss, rel_tol=1e-3, abs_tol=1e-4),
        f"the epoch's loss is said to be {record.loss:.5f}; cross-entropy + {coefficient:g} x penalty = "
        f"{wanted_loss:.5f}",
        "the penalty is not in the loss with its coefficient",
    )


def _compare_test(
    subject: Subject,
    step: TrainingStep,
    few: FewBatches,
    tested: FewTested,
    epoch: int,
    record: EpochRecord,
    seen: Seen,
) -> None:
    settings, model = subject.pipeline.settings, step.model
    expect(
        len(seen.tested) > 0,
        "no forward pass in evaluation mode was seen",
        "the network is tested in training mode, or not at all",
    )
    # Passes behind those of the test are the ledger's own look at the network.
    images = torch.cat(seen.tested)[: len(tested.images)]
    expect(
        images.shape == tested.images.shape and bool((images == tested.images).all()),
        f"{len(images)} images were tested, and the test batches hold {len(tested.images)}",
        "accuracy is measured on other images than the test set's, or not on all of them",
    )
    now = _statistics(model)
    moved = [n for n, v in now.items() if not torch.equal(v, seen.statistics[0][n])]
    expect(not moved, f"the test pass changed {some(moved)}", "the test pass feeds the batch norms")
    _compare_renewal(subject, step, few, epoch, seen)
    with (
        torch.inference_mode(),
        torch.autocast(step.device.type, torch.bfloat16, enabled=settings.precision == "bf16"),
    ):
        again = torch.cat([model.eval()(part) for part, _ in tested])
    logits = torch.cat(seen.test_logits)[: len(tested.images)]
    low = settings.precision == "bf16"
    expect(
        seen.kinds == {logits.dtype} == {torch.bfloat16 if low else torch.float32},
        f"logits are {some([str(k) for k in seen.kinds])}, with --precision {settings.precision}",
        "--precision does not reach the training or the test pass",
    )
    expect_close(
        logits.float(),
        again.float(),
        "logits of the test pass, against those of the same weights now,",
        "the test pass uses stale or other weights (a cache held across steps, quantization off)",
        2e-2 if low else 1e-4,
    )
    hits = torch.stack([(logits.argmax(1) == tested.labels).sum(), tested.labels.new_tensor(len(logits))])
    right, count = step.processes.sum(hits).tolist()
    expect(
        math.isclose(record.accuracy, right / count, abs_tol=1e-9),
        f"the accuracy is said to be {100 * record.accuracy:.3f} %, the logits give {right} of {count} "
        f"({100 * right / count:.3f} %)",
        "accuracy is computed wrongly (its labels, its divisor, top-k)",
    )


def _compare_renewal(subject: Subject, step: TrainingStep, few: FewBatches, epoch: int, seen: Seen) -> None:
    """Batch-norm statistics taken afresh are the plain mean over the epoch's first batches."""
    count = min(subject.pipeline.settings.batch_norm_batches, len(few))
    expect(
        len(seen.renewed) == count,
        f"{len(seen.renewed)} batches fed the batch norms before the test, expected {count}",
        "--batch-norm-batches: statistics are not taken afresh before the test",
    )
    norms = {n: m for n, m in step.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for module in norms.values():
        expect(
            module.momentum == 0.1,
            f"a batch norm's momentum is {module.momentum} after the epoch",
            "the renewal of statistics leaves batch norms changed",
        )
    if not count or step.processes.count > 1:
        return
    batches = [images for images, _ in few.epoch(epoch)][:count]
    expect(
        all(bool((a == b).all()) for a, b in zip(seen.renewed, batches, strict=True)),
        "batch norms were fed other images than the epoch's first batches",
        "statistics are taken over test images or another epoch's",
    )
    twin = subject.copied_step().model
    twin.load_state_dict(step.model.state_dict())
    means: dict[str, list[Tensor]] = {n: [] for n in norms}
    variances: dict[str, list[Tensor]] = {n: [] for n in norms}

    def note(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            means[name].append(inputs[0].double().mean((0, 2, 3)))
            variances[name].append(inputs[0].double().var((0, 2, 3)))

        return look

    for name, module in twin.named_modules():
        if name in norms:
            module.register_forward_pre_hook(note(name))
    precision = subject.pipeline.settings.precision
    with torch.no_grad(), torch.autocast(step.device.type, torch.bfloat16, enabled=precision == "bf16"):
        for images in batches:
            twin.train()(images)
    for name, norm in norms.items():
        for what, found, parts in (
            ("mean", norm.running_mean, means),
            ("variance", norm.running_var, variances),
        ):
            assert found is not None
            expect_close(
                found.double(),
                torch.stack(parts[name]).mean(0),
                f"{name}'s running {what}",
                "statistics taken afresh are not the plain mean over the batches",
                5e-2 if precision == "bf16" else 1e-3,
            )


def _compare_row(record: EpochRecord) -> None:
    """The table's row has each number below its name."""
    data = DataRecord("CIFAR-10", "", False, 1, 1)
    (header,) = [line for line in report.table_header(data).splitlines() if line.startswith("Epoch")]
    names = [cell.strip() for cell in header.split("|")]
    cells = [float(cell) for cell in report.table_row(record).split("|")]
    due = {"Epoch": record.epoch, "Loss": record.loss, "Acc": 100 * record.accuracy}
    due |= {"Unstr": 100 * record.unstructured_sparsity, "Struct": 100 * record.structured_sparsity}
    due |= {"Bits": record.learned_bits, "Time": record.seconds}
    odd = [n for n, cell in zip(names, cells, strict=True) if n in due and abs(cell - due[n]) > 0.051]
    expect(not odd, f"the table's row shows other numbers than the record's for {some(odd)}",
           "the columns of the table are mixed up (experiments/report.py)")  # fmt: skip


@torch.no_grad()
def _compare_counts(model: nn.Module, record: EpochRecord) -> None:
    """The record's sparsities and bits against the weights that the network computes with."""
    weights, quantized = used_weights(model), quantized_layers(model)
    if not quantized:
        return
    zeros = sum(int((weights[n] == 0).sum()) for n in quantized)
    total = sum(weights[n].numel() for n in quantized)
    convolutions = [weights[n] for n in quantized if weights[n].ndim == 4]
    dead = sum(int((w != 0).flatten(1).sum(1).eq(0).sum()) for w in convolutions)
    filters = sum(len(w) for w in convolutions) or 1
    bits = [float(q.get_bitwidth()) for q in Subject.quantizers(model).values()]
    for what, said, counted in (
        ("share of zero weights", record.unstructured_sparsity, zeros / total),
        ("share of zero filters", record.structured_sparsity, dead / filters),
        ("mean bits", record.bits, sum(bits) / len(bits)),
    ):
        expect(
            math.isclose(said, counted, rel_tol=1e-6, abs_tol=1e-9),
            f"the record's {what} is {said:.5f}, the weights give {counted:.5f}",
            "counts are not those of the quantized weights (metrics.py)",
        )
