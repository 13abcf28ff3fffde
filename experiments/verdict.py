"""The verdict: what a person would look for in the table and the pictures, looked for at once.

Every check reads the run's history and the final counts; none looks at the model, but for the counts, which
are held against torch's own counter on the network itself.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from experiments.history import Check, CompressedRecord, EpochRecord, History, LayerStart
from metrics import NetworkCount, count_by_torch
from src.encoding import PackingError
from utils_quantization import toggle_quantization, weight_quantization

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
CHANCE = 0.1
CLIMBED = 3 * CHANCE  # what counts as well above chance
ENOUGH_EPOCHS = 5  # fewer tell nothing about accuracy
SLIM_TOLERANCE = 1e-4  # of the largest logit
SLIM_AGREEMENT = 0.999  # two logits equal to rounding may change places
OUTWEIGHS = 10  # weighted penalty over cross-entropy
LOGITS = {"logit_bit": "bit logits", "logit_dz": "deadzone logits"}  # what CoDeQ's own quantizer trains


def judge(passed: bool, name: str, measured: str, cause: str) -> Check:
    return Check(PASS, name, measured) if passed else Check(FAIL, name, f"{measured}. Likely cause: {cause}")


def verdict(
    history: History,
    count: NetworkCount,
    model: nn.Module,
    pictures: Sequence[Path],
    compressed: CompressedRecord | PackingError | None = None,
) -> list[Check]:
    """Every check of a run with at least one finished epoch, in the order of the report.

    Where the run was stopped, nothing is compressed and `compressed` is None.
    """
    return [
        loss_is_finite(history),
        accuracy_climbs(history.epochs),
        *(parameters_live(history, name) for name in trained_names(history.start)),
        unstructured_grows(history.epochs),
        structured_follows_warmup(history),
        penalty_falls(history),
        bits_fall(history),
        counts_add_up(count, model),
        *compressed_agrees(compressed),
        pictures_exist(pictures),
    ]


def loss_is_finite(history: History) -> Check:
    losses = {r.epoch: r.loss for r in history.epochs}
    bad = [epoch for epoch, loss in losses.items() if not math.isfinite(loss)]
    measured = f"{history.epochs[0].loss:.3f} -> {history.epochs[-1].loss:.3f}"
    if bad:
        measured = f"not in epochs {bad}"
    if history.not_finite:
        measured = history.stopped or "the run was stopped"
    cause = "a learning rate or --sparsity-weight that is too high"
    return judge(not bad and not history.not_finite, "loss is finite", measured, cause)


def accuracy_climbs(records: Sequence[EpochRecord]) -> Check:
    name = "accuracy climbs"
    percent = [100 * r.accuracy for r in records]
    first, last, best = percent[0], percent[-1], max(percent)
    measured = f"{first:.1f} % -> {last:.1f} % (best {best:.1f} %, chance {100 * CHANCE:.0f} %)"
    if len(records) < ENOUGH_EPOCHS:
        return Check(SKIP, name, f"{measured}; fewer than {ENOUGH_EPOCHS} epochs tell nothing")
    climbed = last > first and last >= 100 * CLIMBED
    return judge(climbed, name, measured, "a penalty that swamps the cross-entropy, or a wrong --weights-lr")


def trained_names(start: dict[str, LayerStart]) -> list[str]:
    """The names of all parameters that quantizers train; those of CoDeQ's quantizer come first, always."""
    return list(dict.fromkeys([*LOGITS, *(name for layer in start.values() for name in layer.parameters)]))


def _words(parameter: str) -> str:
    return LOGITS.get(parameter, f"{parameter} parameters")


def parameters_live(history: History, parameter: str) -> Check:
    """This parameter of each quantizer gets a finite gradient that is not zero, in every epoch, and moves."""
    words, layers = _words(parameter), history.epochs[-1].layers
    name, noun = f"{words} learn", words.split()[-1]
    dead = sorted({f"{layer} ({why})" for r in history.epochs for layer, why in _silent(r, parameter)})
    moved = {
        layer: abs(r.parameters[parameter] - history.start[layer].parameters[parameter])
        for layer, r in layers.items()
        if parameter in r.parameters
    }
    if not moved:
        return Check(SKIP, name, "no layer has one that is trained")
    measured = f"{len(moved)} {noun} moved by {min(moved.values()):.3g} to {max(moved.values()):.3g}"
    if dead:
        measured += f"; gradient at fault in {_some(dead)}"
    still = [layer for layer, way in moved.items() if way == 0]
    if still:
        measured += f"; not moved: {_some(still)}"
    cause = "a layer of zeros, a logit at 0 or far into tanh's flat part, or a learning rate of 0"
    if parameter not in LOGITS:
        cause = f"a layer of zeros, a forward() that {parameter} does not act in, or a learning rate of 0"
    return judge(not dead and not still, name, measured, cause)


def _silent(record: EpochRecord, parameter: str) -> Iterator[tuple[str, str]]:
    """Layers whose quantizer gets no usable gradient for this parameter, and what it gets."""
    for layer, numbers in record.layers.items():
        if parameter not in numbers.gradients:  # it is not trained
            continue
        gradient = numbers.gradients[parameter]
        if gradient is None or not math.isfinite(gradient):
            yield layer, f"gradient {gradient}"
        elif gradient == 0 and numbers.zero_weights < numbers.weights:
            yield layer, "gradient 0"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unstructured_grows(records: Sequence[EpochRecord]) -> Check:
    name = "unstructured sparsity grows"
    first, last = records[0].unstructured_sparsity, records[-1].unstructured_sparsity
    measured = f"{100 * first:.1f} % -> {100 * last:.1f} %"
    if not records[-1].layers:
        return Check(SKIP, name, "no layer is quantized")
    if len(records) < 2:
        return Check(SKIP, name, f"{measured}; one epoch shows no growth")
    return judge(last > first, name, measured, "a --deadzone-decay too weak against the cross-entropy's pull")


def structured_follows_warmup(history: History) -> Check:
    name, records, settings = "structured sparsity follows the warm-up", history.epochs, history.settings
    share = 100 * records[-1].structured_sparsity
    first = next((r.epoch for r in records if r.structured_sparsity > 0), None)
    begins = next((r.epoch for r in records if r.coefficient > 0), None)
    since = f", the first in epoch {first}" if first else ""
    measured = f"{share:.1f} % of filters at the end{since}, the penalty from epoch {begins}"
    if not records[-1].layers:
        return Check(SKIP, name, "no layer is quantized")
    if settings["sparsity_weight"] == 0:
        return Check(SKIP, name, f"{share:.1f} %; --sparsity-weight is 0")
    if first is not None and (begins is None or first < begins):
        return judge(
            False, name, measured, "filters die before the penalty acts: --deadzone-decay is too strong"
        )
    if first is None and len(records) < settings["sparsity_delay"] + settings["sparsity_ramp"]:
        return Check(SKIP, name, f"{share:.1f} %; the run ends before the warm-up does")
    return judge(
        first is not None and share > 0, name, measured, "a --sparsity-weight too weak to kill a channel"
    )


def penalty_falls(history: History) -> Check:
    name, records = "penalty falls once it acts", history.epochs
    if not records[-1].layers:
        return Check(SKIP, name, "no layer is quantized")
    before = [r for r in records if r.coefficient == 0]
    if history.settings["sparsity_weight"] == 0 or len(before) in (0, len(records)):
        return Check(SKIP, name, f"{records[-1].penalty:.1f}; no epoch before the warm-up, or none in it")
    start, end = before[-1].penalty, records[-1].penalty
    measured = f"{start:.1f} before the warm-up -> {end:.1f}"
    return judge(end < start, name, measured, "a --sparsity-weight too weak against the cross-entropy")


def bits_fall(history: History) -> Check:
    name, records = "bits fall", history.epochs
    if not history.start:
        return Check(SKIP, name, "no layer is quantized")
    start = sum(layer.learned_bits for layer in history.start.values()) / len(history.start)
    end = records[-1].learned_bits
    measured = f"mean learned bits {start:.2f} -> {end:.2f}"
    if "bit" not in history.parameter_groups.values() and end == start:
        return Check(SKIP, name, f"{measured}; the quantizers train no bit-width")
    if len(records) < ENOUGH_EPOCHS:
        return Check(SKIP, name, f"{measured}; fewer than {ENOUGH_EPOCHS} epochs are too short a way")
    cause = "--bit-lr or --bit-decay too small for the logits to leave tanh's flat part in so few steps"
    return judge(end <= start - 0.05, name, measured, cause)


def counts_add_up(count: NetworkCount, model: nn.Module) -> Check:
    """The layers against each other, the stored weights and torch's own counter, layer by layer."""
    macs, sizes = _counted_by_torch(model)
    wrong = [
        layer.name
        for layer in count.layers
        if macs.get(layer.name) != layer.dense_macs
        or len(layer.states) != layer.filters
        or layer.unstructured_macs * layer.weights != (layer.weights - layer.zero_weights) * layer.dense_macs
        or layer.structured_macs > layer.dense_macs
        or layer.weights != sizes[layer.name]
        or layer.zero_filters * layer.weights > layer.zero_weights * layer.filters
        or (layer.is_convolution and layer.alive_channels > layer.filters - layer.zero_filters)
    ]
    total, theirs = count.total("dense_macs"), macs[""]
    measured = f"{total:,} MACs in {len(count.layers)} layers, torch counts {2 * theirs:,} = 2 x {theirs:,}"
    if wrong:
        measured += f"; these layers disagree: {_some(wrong)}"
    return judge(not wrong and theirs == total, "counts add up", measured, "a defect in metrics.py")


@torch.no_grad()
def _counted_by_torch(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Each module's MACs for one image by torch's counter, and each layer's number of weights."""
    was_training = model.training
    # Quantizers cost no FLOPs, and refuse weights that are not finite.
    switched_on = [q for m in model.modules() if (q := weight_quantization(m)) is not None and q.enabled]
    toggle_quantization(model, enabled=False)
    macs = count_by_torch(model.eval(), device=next(model.parameters()).device)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    for quantization in switched_on:
        quantization.enabled = True
    model.train(was_training)
    return macs, sizes


def compressed_agrees(compressed: CompressedRecord | PackingError | None) -> list[Check]:
    """The smaller network and the packed file against the quantized network and the printed counts."""
    names = ("smaller network gives the same logits", "smaller network has the MACs printed",
             "packed file gives the same logits")  # fmt: skip
    if compressed is None:
        return [Check(SKIP, name, "the run was stopped, so none was made") for name in names]
    if isinstance(compressed, PackingError):
        why = f"none was made: {compressed}"
        return [judge(False, name, why, "numbers that overflowed") for name in names]
    relative = compressed.largest_difference / (compressed.largest_logit or 1)
    measured = (
        f"largest difference {relative:.1e} of the largest logit on {compressed.images:,} images, "
        f"{100 * compressed.agreement:.2f} % equal predictions"
    )
    same = relative <= SLIM_TOLERANCE and compressed.agreement >= SLIM_AGREEMENT
    macs = f"torch counts {compressed.slim_macs:,}, printed {compressed.structured_macs:,}"
    bits = f"{compressed.packed_differs} logits differ, {compressed.packed_bytes:,} bytes"
    same_macs = compressed.slim_macs == compressed.structured_macs
    return [
        judge(same, names[0], measured, "a defect in src/slim.py"),
        judge(same_macs, names[1], macs, "a defect in src/channels.py"),
        judge(compressed.packed_differs == 0, names[2], bits, "a defect in src/packing.py"),
    ]


def pictures_exist(pictures: Sequence[Path]) -> Check:
    missing = [p.name for p in pictures if not p.is_file() or p.stat().st_size == 0]
    measured = f"missing: {', '.join(missing)}" if missing else f"{len(pictures)} files"
    return judge(not missing, "pictures exist", measured, "the output folder was changed during the run")


def early_warnings(start: dict[str, LayerStart], records: Sequence[EpochRecord]) -> Iterator[tuple[str, str]]:
    """What can be known already, from the records so far: pairs (what it is about, the sentence)."""
    now = records[-1]
    for parameter in trained_names(start):
        words = _words(parameter)
        silent = [f"{layer}: {why}" for layer, why in _silent(now, parameter)]
        if silent:
            yield f"{parameter} gradient", f"{words} without a gradient: {_some(silent)}"
        still = [
            layer
            for layer, r in now.layers.items()
            if parameter in r.parameters and r.parameters[parameter] == start[layer].parameters[parameter]
        ]
        if still:
            yield f"{parameter} still", f"{words} that have not moved: {_some(still)}"
    for name, layer in now.layers.items():
        if layer.zero_weights == layer.weights:
            yield f"dead {name}", f"every weight of {name} is zero: its branch is gone"
    if len(records) > 1 and all(r.accuracy <= 1.2 * CHANCE for r in records[-2:]):
        yield "chance", f"accuracy at chance for two epochs running ({100 * now.accuracy:.1f} %)"
    weighted = now.loss - now.cross_entropy
    if weighted > OUTWEIGHS * now.cross_entropy:
        times = weighted / now.cross_entropy if now.cross_entropy else math.inf
        yield "penalty", f"the penalty outweighs the cross-entropy {times:.0f} times: lower --sparsity-weight"


def new_warnings(start: dict[str, LayerStart], records: Sequence[EpochRecord]) -> list[str]:
    """The warnings that the last record brought: each is given once in a run."""
    before = {about for end in range(1, len(records)) for about, _ in early_warnings(start, records[:end])}
    return [sentence for about, sentence in early_warnings(start, records) if about not in before]
