"""Preflight checks of both schedules, and of a whole epoch watched from outside: faults hide in the glue."""

import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from experiments import reference
from experiments.draws import kept_draws
from experiments.expect import (
    BrokenError,
    NotApplicableError,
    Subject,
    expect,
    expect_close,
    stored_weight,
)
from experiments.history import FAIL, EpochRecord, some
from experiments.training import TrainingStep
from src.graph import only_looks
from utils_quantization import quantized_layers

FEW_BATCHES, FEW_IMAGES, FEW_TESTED = 3, 32, 128  # of the run's batches, in a trial epoch


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

        @only_looks
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
            lambda epoch: reference.learning_rate(epoch, total, settings.rate_warmup),
            "--rate-warmup and the cosine of the learning rates",
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
    foreign = [
        *(["learning rates (--rate-warmup)"] if not subject.own_rates else []),
        *(["penalty's coefficient (--sparsity-delay, --sparsity-ramp)"] if not subject.own_warmup else []),
    ]
    if foreign:
        raise NotApplicableError(
            f"the schedule of the {some(foreign)} is not this project's, so that these flags may do nothing"
        )
    return f"{min(settings.epochs, 1000)} epochs"


@dataclass
class Seen:
    """What was seen of an epoch from outside."""

    trained: list[Tensor] = field(default_factory=list)  # images of forward passes with gradients
    renewed: list[Tensor] = field(default_factory=list)  # of passes in training mode without gradients
    tested: list[Tensor] = field(default_factory=list)  # of passes in evaluation mode
    test_logits: list[Tensor] = field(default_factory=list)
    steps: int = 0  # of the optimizer
    kinds: set[torch.dtype] = field(default_factory=set)  # of the logits
    passes: list[str] = field(default_factory=list)  # train, renew or test, in their order
    times: list[float] = field(default_factory=list)  # at which they began, in seconds
    faults: list[tuple[str, str]] = field(default_factory=list)  # modes and weights that are wrong, and why


def an_epoch_reports_what_it_did(subject: Subject) -> str:
    """Up to three short epochs of the run's own loop, watched from outside, against their records."""
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
    handles = _watch(step, seen, subject.own_network)
    began = time.perf_counter()
    record, _ = subject.one_epoch(pipeline, epoch)
    took = time.perf_counter() - began
    for handle in handles:
        handle.remove()
    expect(
        "test" not in seen.passes[: seen.passes.index("train") if "train" in seen.passes else 0],
        f"the test pass of epoch {epoch + 1} came before its training",
        "the network is tested before the epoch's training, not after it",
    )
    for check in record.ledger:
        if check.status == FAIL:
            raise BrokenError(f"{check.name}: {check.measured}", check.cause)
    tests = [t for t, kind in zip(seen.times, seen.passes, strict=True) if kind == "test"]
    # Passes behind those of the test are the ledger's own look at the network.
    worked = max(tests[: len(tested)], default=0.0) - min(seen.times, default=0.0)
    expect(
        worked <= record.seconds <= took,
        f"epoch {epoch + 1} took between {worked:.3f} and {took:.3f} s, its record says {record.seconds:.3f}",
        "the seconds of an epoch are those of a part of it, or of something else",
    )
    _compare_passes(subject, few, tested, epoch, record, seen)
    _compare_test_logits(subject, step, tested, seen)


def _watch(step: TrainingStep, seen: Seen, own: bool) -> list[Any]:
    model = step.model

    @only_looks
    def forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        odd = [n for n, m in module.named_modules() if m.training != module.training]
        if odd and own:
            measured = f"{len(odd)} modules are in another mode than the network: {some(odd)}"
            seen.faults.append((measured, "a part of the network is kept in training or evaluation mode"))
        kind = "train" if torch.is_grad_enabled() else "renew" if module.training else "test"
        images = {"train": seen.trained, "renew": seen.renewed, "test": seen.tested}[kind]
        images.append(inputs[0].detach().clone())
        seen.passes.append(kind)
        seen.times.append(time.perf_counter())

    @only_looks
    def logits(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.kinds.add(output.dtype)
        if not module.training:
            seen.test_logits.append(output.detach().clone())
        elif torch.is_grad_enabled():
            stale = [n for n, layer in quantized_layers(module).items() if _is_stale(layer)]
            if stale:
                measured = f"step {seen.steps + 1}: weights are not what quantizers give now: {some(stale)}"
                seen.faults.append((measured, "quantized weights are cached across optimizer steps"))

    def optimize(*_: Any) -> None:
        seen.steps += 1

    return [
        model.register_forward_pre_hook(forward),
        model.register_forward_hook(logits),
        step.optimizer.register_step_pre_hook(optimize),
    ]


def _is_stale(layer: Any) -> bool:
    """Whether a layer computes with other weights than those that are stored give now.

    A quantizer that gives others each time, since it draws or takes statistics, tells nothing.
    """
    used, stored = layer.weight.detach(), stored_weight(layer)
    quantization = copy.deepcopy(layer.parametrizations.weight[0])
    with torch.no_grad(), kept_draws():
        fresh = quantization(stored)
        # Statistics that have settled move by rounding alone.
        off = bool((used - fresh).abs().max() > 1e-5 * used.abs().max())
        return off and torch.equal(quantization(stored), fresh)


def _compare_passes(
    subject: Subject, few: FewBatches, tested: FewTested, epoch: int, record: EpochRecord, seen: Seen
) -> None:
    """Which images went through the network, in which mode. What is computed of them the ledger checks."""
    if seen.faults:
        raise BrokenError(*seen.faults[0])
    batches = [images for images, _ in few.epoch(epoch)]
    expect(
        len(seen.trained) == len(batches) == seen.steps,
        f"{len(seen.trained)} passes with gradients, {seen.steps} optimizer steps, {len(batches)} batches",
        "batches are skipped or trained on twice, or the optimizer does not step with each",
    )
    expect(
        all(torch.equal(a, b) for a, b in zip(seen.trained, batches, strict=True)),
        f"a step of epoch {epoch + 1} trains on other images than its batch holds",
        "training on the images of another epoch or of the test set, or on images changed in the step",
    )
    count = min(subject.pipeline.settings.batch_norm_batches, len(batches))
    expect(
        len(seen.renewed) == count
        and all(torch.equal(a, b) for a, b in zip(seen.renewed, batches[:count], strict=True)),
        f"{len(seen.renewed)} batches fed the batch norms before the test, not the epoch's first {count}",
        "statistics are taken over test images or another epoch's, or not as --batch-norm-batches asks",
    )
    # Passes behind those of the test are the ledger's own look at the network.
    images = torch.cat(seen.tested)[: len(tested.images)] if seen.tested else tested.images[:0]
    expect(
        torch.equal(images, tested.images),
        f"{len(images)} images were tested in evaluation mode, not the test batches' {len(tested.images)}",
        "accuracy is measured in training mode, on other images than the test set's, or not on all of them",
    )
    expect(
        record.epoch == epoch + 1, f"epoch {epoch + 1} is reported as {record.epoch}", "epochs are miscounted"
    )


def _compare_test_logits(subject: Subject, step: TrainingStep, tested: FewTested, seen: Seen) -> None:
    """The test pass computes in the precision of the settings, with the weights that the epoch left."""
    precision = subject.pipeline.settings.precision
    low = precision == "bf16"
    logits = torch.cat(seen.test_logits)[: len(tested.images)]
    with torch.inference_mode(), torch.autocast(step.device.type, torch.bfloat16, enabled=low):
        again = torch.cat([step.model.eval()(part) for part, _ in tested])
    due = (torch.bfloat16 if low else torch.float32) if subject.own_network else again.dtype
    expect(
        seen.kinds == {logits.dtype} == {due},
        f"logits are {some([str(k) for k in seen.kinds])}, with --precision {precision}",
        "--precision does not reach the training or the test pass",
    )
    expect_close(
        logits.float(),
        again.float(),
        "logits of the test pass, against those of the same weights now,",
        "the test pass uses stale or other weights (a cache held across steps, quantization off)",
        2e-2 if low else 1e-4,
    )
