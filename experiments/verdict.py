"""The verdict: checks of what a person would look for in a run's table and pictures.

The checks read the run's history and the final counts. Only `counts_add_up` looks at the model: it compares
the counts with those of torch's own counter. A check is a SKIP where the run took too few steps to tell.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.history import (
    FAIL,
    PASS,
    SKIP,
    Check,
    CompressedRecord,
    EpochRecord,
    History,
    LayerStart,
    Retest,
    judge,
    some,
)
from experiments.network import SIZE
from experiments.settings import FOLDERS, Settings
from metrics import ACTIVATION_BITS, NetworkCount, count_by_torch, in_layers, of_layers, ratio
from src.encoding import PackingError
from src.graph import trace_network
from utils_quantization import without_quantizers

CLIMBED = 3  # times the accuracy of guessing: the least that counts as well above chance
# A higher accuracy of a ResNet-20 is a mistake: He et al. 2015 (arXiv 1512.03385, table 6) report 91.25 % on
# CIFAR-10, and later training recipes bring it to 92 or 93 %, and to about 70 % on CIFAR-100.
BEST_KNOWN = {"CIFAR-10": 0.96, "CIFAR-100": 0.8}
# Optimizer steps. In fewer steps accuracy and bits may not have moved yet, whatever the settings.
ENOUGH_STEPS = 300
STEPS_TO_KILL = 1000  # optimizer steps with a penalty in which some channel dies at the default settings
COLLAPSED = 0.1  # a layer with a lower signal (see experiments/history.py) is broken; others are near 1
KNOWN_CLASSES = 0.5  # a network of at least this accuracy predicts every class
RARE = 0.5  # times the accuracy of guessing: a class of a lower recall counts as not predicted
SLIM_TOLERANCE = 1e-4  # largest difference of the smaller network's logits, as a share of the largest logit
READ_BACK_TOLERANCE = 1e-5  # the same for the file that it is exported to: one network, twice on one CPU
SLIM_AGREEMENT = 0.999  # share of equal predictions; not 1, since rounding may swap two nearly equal logits
OUTWEIGHS = 10  # a weighted penalty of more than this many times the cross-entropy is too strong
# The counts of a layer that its packed file is held against.
RECOUNTED = ("weights", "zero_weights", "filters", "zero_filters", "structured_macs", "unstructured_macs")
MOSTLY_GONE = 0.6  # share of the filters without which a network may know nothing any more
# The share of a run's dead filters that may die before the penalty acts: weight decay takes the batch norm's
# scale of a filter that is little used, and with it all that holds the filter outside the dead zone.
EARLY_DEATHS = 0.02
NO_GROUPS = "no quantized convolution has channels that can go"
MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF"}  # how a picture begins, by the ending of its name
# What CoDeQ's own quantizer trains.
LOGITS = {"logit_bit": "bit parameters", "logit_dz": "dead-zone parameters"}


def verdict(
    history: History,
    count: NetworkCount,
    model: nn.Module,
    pictures: Sequence[Path],
    compressed: CompressedRecord | PackingError | None = None,
) -> list[Check]:
    """Make all checks of a run with at least one finished epoch, in the order of the report.

    `compressed` is None if the run was stopped, because a stopped run makes no compressed network, and a
    PackingError if the network could not be packed.
    """
    return [
        every_epoch_ran(history),
        final_is_the_last_epochs(history),
        loss_is_finite(history),
        *ledger_holds(history.epochs),
        accuracy_climbs(history),
        accuracy_is_the_files(history),
        every_class_is_predicted(history.retest),
        training_images_are_known(history),
        every_layer_counts(history.epochs[-1]),
        *(parameters_live(history, name) for name in trained_names(history.start)),
        unstructured_grows(history),
        structured_follows_warmup(history),
        penalty_falls(history),
        bits_fall(history),
        counts_add_up(count, model),
        file_is_recounted(history, count),
        *compressed_agrees(compressed),
        pictures_exist(pictures),
    ]


def every_epoch_ran(history: History) -> Check:
    """Whether there is a record of each epoch that the settings ask for, in their order."""
    name, found, due = "every epoch ran", [r.epoch for r in history.epochs], history.settings["epochs"]
    if history.stopped:
        return Check(SKIP, name, f"{len(found)} of {due}: {history.stopped}")
    measured = f"{len(found)} of {due}"
    odd = [f", number {i} is epoch {n}" for i, n in enumerate(found, 1) if n != i]
    measured += "".join(odd[:1])
    cause = "the loop over the epochs ends too soon, goes on too long, or does one twice"
    return judge(len(found) == due and not odd, name, measured, cause)


def final_is_the_last_epochs(history: History) -> Check:
    """Whether the final metrics are counted on the network of the last row."""
    name, final, last = "final metrics are the last epoch's", history.final, history.epochs[-1]
    if final is None:
        return Check(SKIP, name, "none were made")
    shared = ("unstructured_sparsity", "structured_sparsity", "learned_bits", "bits")
    odd = [
        f"{key} {getattr(final, key):.6g}, in the last row {getattr(last, key):.6g}"
        for key in shared
        if not math.isclose(getattr(final, key), getattr(last, key), rel_tol=1e-9, abs_tol=1e-12)
    ]
    cause = "the counts that are printed at the end are of another epoch"
    totals = final.totals
    for kind in ("structured", "unstructured"):
        for unit, name_of in (("bops", "bops_ratio"), ("macs", "mac_ratio")):
            said = getattr(final, f"{kind}_{name_of}")
            due = ratio(totals[f"dense_{unit}"], totals[f"{kind}_{unit}"])
            if not math.isclose(said, due, rel_tol=1e-9):
                odd.append(f"the {kind} {unit} ratio is {said:.6g}, its totals give {due:.6g}")
                cause = "a ratio stands under another's name (final_counts of experiments/history.py)"
    measured = "; ".join(odd) or f"epoch {last.epoch}"
    return judge(not odd, name, measured, cause)


def loss_is_finite(history: History) -> Check:
    """Whether the loss was finite in every epoch."""
    losses = {r.epoch: r.loss for r in history.epochs}
    bad = [epoch for epoch, loss in losses.items() if not math.isfinite(loss)]
    measured = f"{history.epochs[0].loss:.3f} -> {history.epochs[-1].loss:.3f}"
    if bad:
        measured = f"not in epochs {bad}"
    if history.not_finite:
        measured = history.stopped or "the run was stopped"
    cause = "a learning rate or --sparsity-weight that is too high"
    return judge(not bad and not history.not_finite, "loss is finite", measured, cause)


def ledger_holds(records: Sequence[EpochRecord]) -> list[Check]:
    """What experiments/ledger.py found: a check for each equality that failed in an epoch or was always
    skipped, and a single check for all that held."""
    found: dict[str, list[tuple[int, Check]]] = {}
    for record in records:
        for check in record.ledger:
            found.setdefault(check.name, []).append((record.epoch, check))
    failed, skipped, held, partly = [], [], [], ""
    for name, checks in found.items():
        wrong = [(epoch, check.message) for epoch, check in checks if check.status == FAIL]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            failed.append(Check(FAIL, f"ledger, {name}", f"epoch {wrong[0][0]}{more}: {wrong[0][1]}"))
        elif all(check.status == SKIP for _, check in checks):
            skipped.append(Check(SKIP, f"ledger, {name}", checks[-1][1].message))
        else:
            held.append(name)
            looked_at = sum(check.status == PASS for _, check in checks)
            partly += f"; '{name}' in the {looked_at} looked at" if looked_at < len(checks) else ""
    if not found:
        return [Check(SKIP, "ledger", "nothing was noted of these epochs")]
    epochs = f"in each of {len(records)} epochs" if len(records) > 1 else "in the epoch"
    return [
        *failed,
        *([Check(PASS, "ledger", f"{len(held)} equalities hold {epochs}{partly}")] if held else []),
        *skipped,
    ]


def steps_of(history: History, records: Sequence[EpochRecord]) -> int:
    """The number of optimizer steps in these epochs."""
    return len(records) * math.ceil(history.data.train_images / history.settings["batch_size"])


def accuracy_climbs(history: History) -> Check:
    """Whether the accuracy rose well above chance, and not above what any ResNet-20 is known to reach."""
    name, records = "accuracy climbs", history.epochs
    percent = [100 * r.accuracy for r in records]
    first, last, best = percent[0], percent[-1], max(percent)
    chance, known = history.data.chance, BEST_KNOWN.get(history.data.name, 1.0)
    measured = f"{first:.1f} % -> {last:.1f} % (best {best:.1f} %, chance {100 * chance:.0f} %)"
    if last > 100 * known and history.settings["model"] == "resnet20":
        cause = "test images among the training images, or labels that reach the network"
        return judge(False, name, f"{measured}; no ResNet-20 is known above {100 * known:.0f} %", cause)
    climbed = last > first and last >= 100 * CLIMBED * chance
    steps = steps_of(history, records)
    if not climbed and (steps < ENOUGH_STEPS or len(records) < 2):
        return Check(SKIP, name, f"{measured}; {steps} steps are too few to tell")
    known_before = ":" in history.settings["model"] and min(first, last) >= 100 * CLIMBED * chance
    if not climbed and known_before:
        return Check(SKIP, name, f"{measured}; someone's own network may have begun with trained weights")
    cause = penalty_cause(history) if _swamped(history) else "a wrong --weights-lr"
    if (gone := records[-1].structured_sparsity) > MOSTLY_GONE:
        cause = f"a --sparsity-weight that is too strong: {100 * gone:.0f} % of the filters are zero"
    return judge(climbed, name, measured, cause)


def _swamped(history: History) -> float | None:
    """How many times the weighted penalty outweighed the cross-entropy, in the worst epoch.

    None if it was at most `OUTWEIGHS` times as large in every epoch.
    """
    times = max((_outweighs(r) for r in history.epochs), default=0.0)
    return times if times > OUTWEIGHS else None


def _outweighs(record: EpochRecord) -> float:
    """The weighted penalty of an epoch, divided by its cross-entropy."""
    weighted = record.loss - record.cross_entropy
    if record.cross_entropy:
        return weighted / record.cross_entropy
    return math.inf if weighted > 0 else 0.0


def penalty_cause(history: History) -> str:
    """The likely cause of checks that fail because --sparsity-weight is too weak or too strong."""
    times = _swamped(history)
    if times is None:
        return "a --sparsity-weight too weak against the cross-entropy"
    return (
        f"a --sparsity-weight that is too strong: the penalty outweighs the cross-entropy {times:.0f} times, "
        f"so that all channels shrink alike and none dies before the others: lower it"
    )


def accuracy_is_the_files(history: History) -> Check:
    """Compare the last epoch's accuracy with those of a second test, the packed file and the smaller network.

    An image with two equal largest logits is a tie, which two tests may decide differently.
    """
    name, again, made = "accuracy is the packed network's", history.retest, history.compressed
    if again is None:
        return Check(SKIP, name, "the run was stopped, so its last network was not tested again")
    row, n = history.epochs[-1].accuracy, again.images
    measured = f"row {100 * row:.2f} %, tested again {100 * again.right / n:.2f} %"
    wrong = []
    if abs(row * n - again.right) > again.ties + 0.5:
        wrong.append("the row is of another network, or was tested otherwise")
    if made is None:
        return judge(not wrong, name, f"{measured}; nothing was packed", "; ".join(wrong))
    measured += f", packed {100 * made.packed_accuracy:.2f} %, smaller {100 * made.slim_accuracy:.2f} %"
    measured += f" of {n:,} images"
    if made.images != n:
        wrong.append(f"the packed file was tested on {made.images:,} images")
    # The row and the second test are in the run's precision, the packed network is tested in float32.
    exact = history.precision == "float32"
    apart = again.ties + 0.5 if exact else 2 * again.ties + 0.005 * n
    if abs(made.quantized_accuracy * made.images - again.right) > apart:
        wrong.append("the network that was packed is not the one that was tested (another copy or epoch)")
    if made.packed_differs == 0 and made.packed_accuracy != made.quantized_accuracy:
        wrong.append("equal logits were counted as other accuracies")
    if abs(made.slim_accuracy - made.quantized_accuracy) > 1 - made.agreement + 1e-9:
        wrong.append("the smaller network's accuracy does not fit its predictions")
    return judge(not wrong, name, measured, "; ".join(wrong))


def every_class_is_predicted(again: Retest | None) -> Check:
    """Whether the network predicts every class of 20 or more test images, once it is accurate enough."""
    name = "every class is predicted"
    if again is None:
        return Check(SKIP, name, "the run was stopped, so its last network was not tested again")
    accuracy = again.right / again.images
    recalls = {
        c: r / n
        for c, (r, n) in enumerate(zip(again.class_right, again.class_images, strict=True))
        if n >= 20
    }
    if not recalls:
        return Check(SKIP, name, f"{again.images} test images are too few a class")
    worst = min(recalls, key=lambda c: recalls[c])
    measured = (
        f"recall {100 * recalls[worst]:.1f} % (class {worst}, predicted "
        f"{again.class_predictions[worst]:,} times) to {100 * max(recalls.values()):.1f} %"
    )
    if accuracy < KNOWN_CLASSES:
        return Check(
            SKIP, name, f"{measured}; at {100 * accuracy:.1f} % accuracy a class may still be missing"
        )
    cause = f"class {worst} is missing or mislabelled in the training set, or the classifier cannot give it"
    return judge(recalls[worst] >= RARE / len(again.class_images), name, measured, cause)


def training_images_are_known(history: History) -> Check:
    """Compare the accuracy on training images without augmentation with the accuracy on the test images.

    A trained network is somewhat better on its training images. It is suspicious if it is worse there by more
    than four standard deviations of the difference and 2 %, or better by an amount that overfitting does not
    explain.
    """
    name, again = "training against test images", history.retest
    if again is None:
        return Check(SKIP, name, "the run was stopped, so its last network was not tested again")
    train, test = again.train_right / again.train_images, again.right / again.images
    measured = (
        f"{100 * train:.1f} % of {again.train_images:,} untouched training images, test {100 * test:.1f} %"
    )
    p = (again.train_right + again.right) / (again.train_images + again.images)
    noise = 4 * math.sqrt(p * (1 - p) * (1 / again.train_images + 1 / again.images))
    if test - train > noise + 0.02:
        cause = "training labels that are wrong in part, or training images other than the test images' kind"
        return judge(False, name, measured, cause)
    whole = history.data.train_images
    at_chance = whole >= 2_000 and train > KNOWN_CLASSES and test < history.data.chance + noise + 0.02
    # Of many classes a large network knows its training images by heart, and the test's little better for it.
    overfit = 0.25 if history.data.classes <= 10 else 0.5
    far = whole >= 40_000 and train - test > noise + overfit
    cause = "test labels, the test images' order or their normalisation are not the training set's"
    return judge(not (at_chance or far), name, measured, cause)


def every_layer_counts(record: EpochRecord) -> Check:
    """Whether the output of every quantized layer is large enough for the batch norm behind it."""
    name = "every layer still counts"
    signals = {n: r.signal for n, r in record.layers.items() if r.signal is not None}
    if not signals:
        return Check(SKIP, name, "no quantized layer has a batch norm behind it")
    gone = {n: s for n, s in signals.items() if s < COLLAPSED}
    measured = f"signal {min(signals.values()):.3g} to {max(signals.values()):.3g} in {len(signals)} layers"
    if gone:
        measured = f"{len(gone)} of {measured}; gone: {some(gone)}"
    cause = "weights that shrank to nothing: --sparsity-weight or --deadzone-decay is too strong"
    return judge(not gone, name, measured, cause)


def trained_names(start: dict[str, LayerStart]) -> list[str]:
    """The names of all parameters that the quantizers train. The two of CoDeQ's quantizer are always listed,
    and first."""
    return list(dict.fromkeys([*LOGITS, *(name for layer in start.values() for name in layer.parameters)]))


def _words(parameter: str) -> str:
    return LOGITS.get(parameter, f"{parameter} parameters")


def parameters_live(history: History, parameter: str) -> Check:
    """Whether this parameter of every quantizer moved, and had a finite gradient, not 0, in every epoch."""
    words, layers = _words(parameter), history.epochs[-1].layers
    name, noun = f"{words} learn", words.split()[-1]
    silent = [pair for r in history.epochs for pair in _silent(r, parameter, history.may_skip)]
    dead = sorted({f"{layer} ({why})" for layer, why in silent})
    moved = {
        layer: abs(r.parameters[parameter] - history.start[layer].parameters[parameter])
        for layer, r in layers.items()
        if parameter in r.parameters
    }
    if not moved:
        return Check(SKIP, name, "no layer has one that is trained")
    measured = f"{len(moved)} {noun} moved by {min(moved.values()):.3g} to {max(moved.values()):.3g}"
    if dead:
        measured += f"; gradient at fault in {some(dead)}"
    still = [layer for layer, way in moved.items() if way == 0]
    if still:
        measured += f"; not moved: {some(still)}"
    cause = "a layer of zeros, a parameter at 0 or far into tanh's flat part, or a learning rate of 0"
    if parameter not in LOGITS:
        cause = f"a layer of zeros, a forward() that {parameter} does not act in, or a learning rate of 0"
    return judge(not dead and not still, name, measured, cause)


def _silent(record: EpochRecord, parameter: str, may_skip: bool) -> Iterator[tuple[str, str]]:
    """The layers whose quantizer got no usable gradient for this parameter: pairs (layer, what it got).

    A gradient of 0 is right in a layer whose quantized weights are all zero; none is in a layer that the last
    step may have skipped.
    """
    for layer, numbers in record.layers.items():
        if parameter not in numbers.gradients:  # this layer's quantizer does not train the parameter
            continue
        gradient = numbers.gradients[parameter]
        if gradient is None and may_skip:
            continue
        if gradient is None or not math.isfinite(gradient):
            yield layer, f"gradient {gradient}"
        elif gradient == 0 and numbers.zero_weights < numbers.weights:
            yield layer, "gradient 0"


def unstructured_grows(history: History) -> Check:
    """Whether the share of zero weights grew from the first epoch to the last."""
    name, records = "unstructured sparsity grows", history.epochs
    first, last = records[0].unstructured_sparsity, records[-1].unstructured_sparsity
    measured = f"{100 * first:.1f} % -> {100 * last:.1f} %"
    if not records[-1].layers:
        return Check(SKIP, name, "no layer is quantized")
    steps = steps_of(history, records)
    if last <= first and (steps < ENOUGH_STEPS or len(records) < 2):
        return Check(SKIP, name, f"{measured}; {steps} steps are too few to tell")
    if "deadzone" not in history.parameter_groups.values() and last <= first:
        return Check(SKIP, name, f"{measured}; the quantizers train no dead zone")
    return judge(last > first, name, measured, "a --deadzone-decay too weak against the cross-entropy's pull")


def structured_follows_warmup(history: History) -> Check:
    """Whether filters died, and all but a few of them after the penalty began to act."""
    name, records, settings = "structured sparsity follows the warm-up", history.epochs, history.settings
    share = 100 * records[-1].structured_sparsity
    first = next((r.epoch for r in records if r.structured_sparsity > 0), None)
    penalised = [r for r in records if r.coefficient > 0]
    if not records[-1].layers:
        return Check(SKIP, name, "no layer is quantized")
    if settings["sparsity_weight"] == 0:
        return Check(SKIP, name, f"{share:.1f} %; --sparsity-weight is 0")
    if _has_no_groups(history):
        return Check(SKIP, name, f"{share:.1f} %; {NO_GROUPS}")
    since = f", the first in epoch {first}" if first else ""
    if not penalised:
        return Check(SKIP, name, f"{share:.1f} % of filters at the end{since}; the penalty acts in none of "
                     f"these {len(records)} epochs")  # fmt: skip
    begins = penalised[0].epoch
    measured = f"{share:.1f} % of filters at the end{since}, the penalty from epoch {begins}"
    early = 100 * max((r.structured_sparsity for r in records if r.epoch < begins), default=0.0)
    if early:
        measured += f", {early:.1f} % before it"
    if early > EARLY_DEATHS * share:
        if ":" in history.settings["model"] or not _own_quantizers(history):
            return Check(SKIP, name, f"{measured}; a network or quantizer of one's own may do that")
        cause = "filters die before the penalty acts: --deadzone-decay is too strong"
        return judge(False, name, measured, cause)
    steps = steps_of(history, penalised)
    if share == 0 and steps < STEPS_TO_KILL:
        return Check(SKIP, name, f"{measured}; {steps} steps with a penalty are too few to tell")
    return judge(share > 0, name, measured, penalty_cause(history))


def _has_no_groups(history: History) -> bool:
    """Whether there is nothing for the penalty to act on in someone's own network."""
    return ":" in history.settings["model"] and not any(r.penalty for r in history.epochs)


def penalty_falls(history: History) -> Check:
    """Whether the penalty is lower at the end than in the last epoch in which it did not act."""
    name, records = "penalty falls once it acts", history.epochs
    if not records[-1].layers:
        return Check(SKIP, name, "no layer is quantized")
    before, acting = [r for r in records if r.coefficient == 0], [r for r in records if r.coefficient > 0]
    if history.settings["sparsity_weight"] == 0 or not before or not acting:
        return Check(SKIP, name, f"{records[-1].penalty:.1f}; no epoch before the warm-up, or none in it")
    if _has_no_groups(history):
        return Check(SKIP, name, NO_GROUPS)
    start, end = before[-1].penalty, records[-1].penalty
    measured = f"{start:.1f} before the warm-up -> {end:.1f}"
    steps = steps_of(history, acting)
    if math.isfinite(end) and end >= start and steps < ENOUGH_STEPS:
        return Check(SKIP, name, f"{measured}; {steps} steps with a penalty are too few to tell")
    died = records[-1].structured_sparsity - before[-1].structured_sparsity
    if math.isfinite(end) and end >= start and died > 0:
        # Under a weak penalty the norms of a long run's weights grow, and channels die all the same.
        why = f"the weights grow all the same, and {100 * died:.1f} % of the filters have died since"
        return Check(SKIP, name, f"{measured}; {why}")
    return judge(end < start, name, measured, penalty_cause(history))


def bits_fall(history: History) -> Check:
    """Whether the mean bit-width before rounding fell by 0.05 bits or more."""
    name, records, settings = "bits fall", history.epochs, history.settings
    if not history.start:
        return Check(SKIP, name, "no layer is quantized")
    start = sum(layer.learned_bits for layer in history.start.values()) / len(history.start)
    end = records[-1].learned_bits
    measured = f"mean learned bits {start:.2f} -> {end:.2f}"
    if "bit" not in history.parameter_groups.values() and end == start:
        return Check(SKIP, name, f"{measured}; the quantizers train no bit-width")
    steps = steps_of(history, records)
    if start - 0.05 < end and steps < ENOUGH_STEPS:
        return Check(SKIP, name, f"{measured}; {steps} steps are too few to tell")
    cause = (
        f"--bit-lr {settings['bit_lr']:g} or --bit-decay {settings['bit_decay']:g} is too small for the "
        f"parameters to leave tanh's flat part in {steps:,} steps"
    )
    return judge(end <= start - 0.05, name, measured, cause)


def counts_add_up(count: NetworkCount, model: nn.Module) -> Check:
    """Check each layer's counts against each other, against its weights and against torch's own counter."""
    by_torch, sizes = _counted_by_torch(model)
    macs = in_layers(by_torch, count)
    # A layer that a function makes, with a weight that is computed, is no module and has no size of its own.
    made = set(trace_network(model, SIZE).computing_their_weights())
    sizes = {layer.name: layer.weights for layer in count.layers if layer.name in made} | sizes
    wrong = [
        layer.name
        for layer in count.layers
        if macs[layer.name] != layer.dense_macs
        or len(layer.states) != layer.filters
        or layer.unstructured_macs * layer.weights != (layer.weights - layer.zero_weights) * layer.dense_macs
        or layer.structured_macs > layer.dense_macs
        or layer.weights != sizes.get(layer.name)
        or layer.zero_filters * layer.weights > layer.zero_weights * layer.filters
        or (layer.is_convolution and layer.alive_channels > layer.filters - layer.zero_filters)
    ]
    total, theirs = count.total("dense_macs"), of_layers(by_torch, count)
    measured = f"{total:,} MACs in {len(count.layers)} layers, torch counts {2 * theirs:,} = 2 x {theirs:,}"
    if wrong:
        measured += f"; these layers disagree: {some(wrong)}"
    cause = "a defect in metrics.py, or the network makes no use of what one of its layers gives"
    return judge(not wrong and theirs == total, "counts add up", measured, cause)


@torch.no_grad()
def _counted_by_torch(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """Each module's MACs for one image by torch's counter, and each layer's number of weights, by name."""
    # A copy without quantizers: they have no FLOPs, and raise an error for weights that are not finite, which
    # a run that diverged has.
    plain = without_quantizers(model, stored=True).eval()
    # A weight that is in no layer, as those of torch's attention are, is counted under its own name.
    sizes = {name: tensor.numel() for name, tensor in plain.named_parameters()}
    weights = {name: getattr(module, "weight", None) for name, module in plain.named_modules()}
    sizes |= {name: w.numel() for name, w in weights.items() if isinstance(w, torch.Tensor)}
    return count_by_torch(plain), sizes


def file_is_recounted(history: History, count: NetworkCount) -> Check:
    """Compare the counts that experiments/recount.py took from the packed file with the printed counts."""
    name, made = "packed file holds what was counted", history.compressed
    if made is None or not made.file:
        return Check(SKIP, name, "nothing was packed")
    layers, wrong = {layer.name: layer for layer in count.layers}, []
    wired = all(theirs.structured_macs is not None for theirs in made.file.values())
    coded = {name for name, layer in layers.items() if layer.quantized}
    other = layers.keys() ^ made.file.keys() if wired else coded - made.file.keys()
    if other:
        wrong.append("other layers: " + some(sorted(other)))
    for layer, ours in layers.items():
        theirs = made.file.get(layer)
        if theirs is None:
            continue
        if theirs.coded and theirs.bits != ours.bits:
            wrong.append(f"{layer} has {theirs.bits} bits in the file, {ours.bits} printed")
        most = 2**ours.bits - _own_quantizers(history)
        if ours.quantized and theirs.levels > most:
            wrong.append(
                f"{layer} has {theirs.levels} different weights, {ours.bits} bits give {most} at most"
            )
        for field in RECOUNTED:
            if getattr(theirs, field) not in (None, getattr(ours, field)):
                wrong.append(
                    f"{layer}: {field.replace('_', ' ')} {getattr(theirs, field):,} in the file, "
                    f"{getattr(ours, field):,} printed"
                )
    both = [(theirs, layers[n]) for n, theirs in made.file.items() if n in layers]
    bops = {
        kind: sum(getattr(theirs, f"{kind}_macs") * ours.bits * ACTIVATION_BITS for theirs, ours in both)
        for kind in ("unstructured", "structured")
        if wired
    }
    printed = history.final.totals if history.final else {}
    for kind, total in bops.items():
        if printed and printed[f"{kind}_bops"] != total:
            wrong.append(f"{kind} BOPs {total:,} from the file, {printed[f'{kind}_bops']:,} printed")
    said, claims = made.packed_settings, made.packed_metrics
    header = {
        k: f"the file's settings have {k} {said.get(k)!r}, the run's {v!r}"
        for k, v in json.loads(json.dumps(history.settings)).items()
        if k not in FOLDERS and said.get(k) != v
    }
    due: dict[str, Any] = {
        "data": history.data.name,
        "test_images": made.images,
        "accuracy": made.quantized_accuracy,
        "structured_macs": made.structured_macs,
        "zero_weights": count.total("zero_weights"),
    }
    due |= {"mean_bits": float(count.mean_bits)} if "mean_bits" in claims else {}
    due |= {
        kind: getattr(history.final, kind)
        for kind in ("structured_bops_ratio", "unstructured_bops_ratio")
        if history.final and kind in claims
    }
    header |= {
        name: f"the file claims {claims.get(name)!r} for {name}, it is {value!r}"
        for name, value in due.items()
        if claims.get(name) != value
    }
    floats = [
        n for n, theirs in made.file.items() if n in layers and layers[n].quantized and not theirs.coded
    ]
    measured = f"{sum(f.zero_weights for f in made.file.values()):,} zeros"
    measured += (
        "".join(f", {total:,} {kind} BOPs" for kind, total in bops.items()) + " counted from its bytes"
    )
    if floats:
        measured += f"; packed as float32 though quantized: {some(floats)}"
    cause = "a defect in metrics.py, src/channels.py or src/packing.py, or the wrong network was packed"
    if header and not wrong:
        cause = f"the file's header has settings or claims that are not the run's: {some(list(header))}"
    wrong += header.values()
    if wrong:
        measured = some(wrong, "; ")
    return judge(not wrong, name, measured, cause)


def _own_quantizers(history: History) -> bool:
    """Whether the quantizers are CoDeQ's own. These have 2^b - 1 levels, as many below zero as above; another
    quantizer of b bits may use all 2^b."""
    return history.settings["quantizer"] == Settings.quantizer


def compressed_agrees(compressed: CompressedRecord | PackingError | None) -> list[Check]:
    """Compare the smaller network and the packed file with the quantized network and the printed counts."""
    names = ("smaller network gives the same logits", "smaller network has the MACs printed",
             "exported file holds the smaller network", "packed file gives the same logits")  # fmt: skip
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
    parted = compressed.read_back_difference / (compressed.largest_logit or 1)
    exported = (
        f"{compressed.read_back_parameters:,} parameters in the file, {compressed.slim_parameters:,} in the "
        f"network, largest difference {parted:.1e} of the largest logit"
    )
    whole = parted <= READ_BACK_TOLERANCE  # NaN, of a file that cannot be read, is not
    whole = whole and compressed.read_back_parameters == compressed.slim_parameters
    bits = f"{compressed.packed_differs} logits differ, {compressed.packed_bytes:,} bytes"
    same_macs = compressed.slim_macs == compressed.structured_macs
    return [
        judge(same, names[0], measured, "a defect in src/slim.py"),
        judge(same_macs, names[1], macs, "a defect in src/channels.py"),
        judge(
            whole,
            names[2],
            exported,
            "slim.pt2 was exported from another network than the one that was checked, cannot be read, or "
            "lacks its checksum or what is claimed of it (experiments/compressed.py)",
        ),
        judge(compressed.packed_differs == 0, names[3], bits, "a defect in src/packing.py"),
    ]


def pictures_exist(pictures: Sequence[Path]) -> Check:
    """Whether every picture is a file of the kind that its name says, and no two are the same."""
    name, missing = "pictures exist", [p.name for p in pictures if not p.is_file() or p.stat().st_size == 0]
    if missing:
        cause = "the output folder was changed during the run"
        return judge(False, name, f"missing: {', '.join(missing)}", cause)
    contents = {p.name: p.read_bytes() for p in pictures}
    if len(set(contents.values())) < len(pictures):
        return judge(
            False, name, "two files hold the same picture", "a picture is written under another's name"
        )
    other = [n for n, content in contents.items() if not content.startswith(MAGIC[Path(n).suffix])]
    if other:
        cause = "--figure-format reaches the file's name and not its content (experiments/finish.py)"
        return judge(False, name, f"of another kind than their names say: {', '.join(other)}", cause)
    return Check(PASS, name, f"{len(pictures)} files")


def early_warnings(history: History, epochs: int) -> Iterator[tuple[str, str]]:
    """Warnings that the first epochs justify, before the verdict: pairs (subject, sentence).

    The subject identifies a warning from epoch to epoch, while the numbers in its sentence change.
    """
    start, records = history.start, history.epochs[:epochs]
    now = records[-1]
    for parameter in trained_names(start):
        words = _words(parameter)
        silent = [f"{layer}: {why}" for layer, why in _silent(now, parameter, history.may_skip)]
        if silent:
            yield f"{parameter} gradient", f"{words} without a gradient: {some(silent)}"
        still = [
            layer
            for layer, r in now.layers.items()
            if parameter in r.parameters and r.parameters[parameter] == start[layer].parameters[parameter]
        ]
        if still:
            yield f"{parameter} still", f"{words} that have not moved: {some(still)}"
    for check in now.ledger:
        if check.status == FAIL:
            yield f"ledger {check.name}", f"{check.name}: {check.message}"
    gone = [n for n, r in now.layers.items() if r.signal is not None and r.signal < COLLAPSED]
    if gone:
        yield (
            f"collapse of {len(gone)}",
            f"nothing is left of the output of {some(gone)}: its variance is far below its norm's eps. "
            "Likely cause: --sparsity-weight or --deadzone-decay is too strong",
        )
    if len(records) > 1 and all(r.accuracy <= 1.2 * history.data.chance for r in records[-2:]):
        yield "chance", f"accuracy at chance for two epochs running ({100 * now.accuracy:.1f} %)"
    if (times := _outweighs(now)) > OUTWEIGHS:
        yield "penalty", f"the penalty outweighs the cross-entropy {times:.0f} times: lower --sparsity-weight"


def new_warnings(history: History, epoch: int, given: set[str]) -> list[str]:
    """The warnings of an epoch (from 1) that were not given yet; their subjects are added to `given`."""
    new = {about: line for about, line in early_warnings(history, epoch) if about not in given}
    given.update(new)
    return list(new.values())
