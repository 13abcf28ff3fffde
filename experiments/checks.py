"""The verdict: what a person would look for in the table and the pictures, looked for at once.

Every check reads the run's records (as in history.json) and the final counts; none looks at the model, but
for torch's own counter, which needs one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.proofs import Proof
from experiments.settings import Settings
from metrics import NetworkCount
from src.encoding import PackingError
from utils_quantization import toggle_quantization, weight_quantization

PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
CHANCE = 0.1
CLIMBED = 3 * CHANCE  # what counts as well above chance
ENOUGH_EPOCHS = 5  # fewer tell nothing about accuracy
SLIM_TOLERANCE = 1e-4  # of the largest logit
SLIM_AGREEMENT = 0.999  # two logits equal to rounding may change places
OUTWEIGHS = 10  # weighted penalty over cross-entropy

Record = dict[str, Any]


@dataclass(frozen=True)
class Check:
    status: str
    name: str
    message: str  # the measured numbers, and the likely cause of a FAIL

    def __str__(self) -> str:
        return f"{self.status}  {self.name}: {self.message}"


def judge(passed: bool, name: str, measured: str, cause: str) -> Check:
    return Check(PASS, name, measured) if passed else Check(FAIL, name, f"{measured}. Likely cause: {cause}")


def verdict(
    records: Sequence[Record],
    settings: Settings,
    count: NetworkCount,
    model: nn.Module,
    pictures: Sequence[Path],
    not_finite: str | None = None,
    proof: Proof | PackingError | None = None,
) -> list[Check]:
    """Every check of a finished run, in the order of the report.

    Where the run was stopped, there is no proof, and `not_finite` says if numbers were the reason.
    """
    return [
        loss_is_finite(records, not_finite),
        accuracy_climbs(records),
        *(logits_live(records, kind) for kind in ("bit", "deadzone")),
        unstructured_grows(records),
        structured_follows_warmup(records, settings),
        penalty_falls(records, settings),
        bits_fall(records),
        counts_add_up(count, model),
        *proofs_hold(proof),
        pictures_exist(pictures),
    ]


def loss_is_finite(records: Sequence[Record], not_finite: str | None = None) -> Check:
    """`not_finite` says where the run stopped because of it."""
    bad = [r["epoch"] for r in records if not math.isfinite(r["loss"])]
    measured = f"not in epochs {bad}" if bad else f"{records[0]['loss']:.3f} -> {records[-1]['loss']:.3f}"
    measured = not_finite or measured
    passed = not bad and not not_finite
    return judge(passed, "loss is finite", measured, "a learning rate or --sparsity-weight that is too high")


def accuracy_climbs(records: Sequence[Record]) -> Check:
    name = "accuracy climbs"
    first, last, best = (100 * a for a in (records[0]["accuracy"], records[-1]["accuracy"], _best(records)))
    measured = f"{first:.1f} % -> {last:.1f} % (best {best:.1f} %, chance {100 * CHANCE:.0f} %)"
    if len(records) < ENOUGH_EPOCHS:
        return Check(SKIP, name, f"{measured}; fewer than {ENOUGH_EPOCHS} epochs tell nothing")
    climbed = last > first and last >= 100 * CLIMBED
    return judge(climbed, name, measured, "a penalty that swamps the cross-entropy, or a wrong --weights-lr")


def _best(records: Sequence[Record]) -> float:
    return max(r["accuracy"] for r in records)


def logits_live(records: Sequence[Record], kind: str) -> Check:
    """Every quantizer's logit gets a finite gradient that is not zero, in every epoch, and moves."""
    name = f"{kind} logits learn"
    layers = records[-1]["layers"]
    dead = sorted({f"{layer} ({why})" for r in records for layer, why in _silent_logits(r, kind)})
    still = [n for n, layer in layers.items() if layer[f"{kind}_logit"] == layer[f"{kind}_logit_start"]]
    moved = [abs(layer[f"{kind}_logit"] - layer[f"{kind}_logit_start"]) for layer in layers.values()]
    if not moved:
        return Check(SKIP, name, "no layer is quantized")
    measured = f"{len(moved)} logits moved by {min(moved):.3g} to {max(moved):.3g}"
    if dead:
        measured += f"; gradient at fault in {_some(dead)}"
    if still:
        measured += f"; not moved: {_some(still)}"
    cause = "a layer of zeros, a logit at 0 or far into tanh's flat part, or a learning rate of 0"
    return judge(not dead and not still, name, measured, cause)


def _silent_logits(record: Record, kind: str) -> Iterator[tuple[str, str]]:
    for layer, numbers in record["layers"].items():
        gradient = numbers[f"{kind}_gradient"]
        if gradient is None or not math.isfinite(gradient):
            yield layer, f"gradient {gradient}"
        elif gradient == 0 and numbers["zero_weights"] < numbers["weights"]:
            yield layer, "gradient 0"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unstructured_grows(records: Sequence[Record]) -> Check:
    name, key = "unstructured sparsity grows", "unstructured_sparsity"
    measured = f"{100 * records[0][key]:.1f} % -> {100 * records[-1][key]:.1f} %"
    if not records[-1]["layers"]:
        return Check(SKIP, name, "no layer is quantized")
    if len(records) < 2:
        return Check(SKIP, name, f"{measured}; one epoch shows no growth")
    grown = records[-1][key] > records[0][key]
    return judge(grown, name, measured, "a --deadzone-decay too weak against the cross-entropy's pull")


def structured_follows_warmup(records: Sequence[Record], settings: Settings) -> Check:
    name = "structured sparsity follows the warm-up"
    share = 100 * records[-1]["structured_sparsity"]
    first = next((r["epoch"] for r in records if r["structured_sparsity"] > 0), None)
    begins = next((r["epoch"] for r in records if r["sparsity_weight"] > 0), None)
    since = f", the first in epoch {first}" if first else ""
    measured = f"{share:.1f} % of filters at the end{since}, the penalty from epoch {begins}"
    if not records[-1]["layers"]:
        return Check(SKIP, name, "no layer is quantized")
    if settings.sparsity_weight == 0:
        return Check(SKIP, name, f"{share:.1f} %; --sparsity-weight is 0")
    if first is not None and (begins is None or first < begins):
        return judge(
            False, name, measured, "filters die before the penalty acts: --deadzone-decay is too strong"
        )
    if first is None and len(records) < settings.sparsity_delay + settings.sparsity_ramp:
        return Check(SKIP, name, f"{share:.1f} %; the run ends before the warm-up does")
    return judge(
        first is not None and share > 0, name, measured, "a --sparsity-weight too weak to kill a channel"
    )


def penalty_falls(records: Sequence[Record], settings: Settings) -> Check:
    name = "penalty falls once it acts"
    if not records[-1]["layers"]:
        return Check(SKIP, name, "no layer is quantized")
    before = [r for r in records if r["sparsity_weight"] == 0]
    if settings.sparsity_weight == 0 or len(before) in (0, len(records)):
        return Check(SKIP, name, f"{records[-1]['penalty']:.1f}; no epoch before the warm-up, or none in it")
    start, end = before[-1]["penalty"], records[-1]["penalty"]
    measured = f"{start:.1f} before the warm-up -> {end:.1f}"
    return judge(end < start, name, measured, "a --sparsity-weight too weak against the cross-entropy")


def bits_fall(records: Sequence[Record]) -> Check:
    name = "bits fall"
    layers = records[-1]["layers"].values()
    if not layers:
        return Check(SKIP, name, "no layer is quantized")
    start = sum(layer["learned_bits_start"] for layer in layers) / len(layers)
    end = records[-1]["learned_bits"]
    measured = f"mean learned bits {start:.2f} -> {end:.2f}"
    if len(records) < ENOUGH_EPOCHS:
        return Check(SKIP, name, f"{measured}; fewer than {ENOUGH_EPOCHS} epochs are too short a way")
    cause = "--bit-lr or --bit-decay too small for the logits to leave tanh's flat part in so few steps"
    return judge(end <= start - 0.05, name, measured, cause)


def counts_add_up(count: NetworkCount, model: nn.Module) -> Check:
    """The layers against each other, the stored weights and torch's own counter, layer by layer."""
    flops, sizes = _counted_by_torch(model)
    wrong = [
        layer.name
        for layer in count.layers
        if flops.get(layer.name) != 2 * layer.dense_macs
        or len(layer.states) != layer.filters
        or layer.unstructured_macs * layer.weights != (layer.weights - layer.zero_weights) * layer.dense_macs
        or layer.structured_macs > layer.dense_macs
        or layer.weights != sizes[layer.name]
        or layer.zero_filters * layer.weights > layer.zero_weights * layer.filters
        or (layer.is_convolution and layer.alive_channels > layer.filters - layer.zero_filters)
    ]
    total, theirs = count.total("dense_macs"), sum(flops.values())
    measured = f"{total:,} MACs in {len(count.layers)} layers, torch counts {theirs:,} = 2 x {theirs // 2:,}"
    if wrong:
        measured += f"; these layers disagree: {_some(wrong)}"
    return judge(not wrong and theirs == 2 * total, "counts add up", measured, "a defect in metrics.py")


@torch.no_grad()
def _counted_by_torch(model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """A layer's floating-point operations for one image, by torch.utils.flop_counter, and its weights."""
    device = next(model.parameters()).device
    was_training = model.training
    # Quantizers cost no FLOPs, and refuse weights that are not finite.
    switched_on = [q for m in model.modules() if (q := weight_quantization(m)) is not None and q.enabled]
    toggle_quantization(model, enabled=False)
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, 32, 32, device=device))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    for quantization in switched_on:
        quantization.enabled = True
    model.train(was_training)
    modules = counter.get_flop_counts()
    by_name = {key.partition(".")[2]: sum(flops.values()) for key, flops in modules.items()}
    return {name: by_name.get(name, 0) for name in layers}, sizes


def proofs_hold(proof: Proof | PackingError | None) -> list[Check]:
    """The smaller network and the packed file against the quantized network and the printed counts."""
    names = ("smaller network gives the same logits", "smaller network has the MACs printed",
             "packed file gives the same logits")  # fmt: skip
    if proof is None:
        return [Check(SKIP, name, "the run was stopped, so none was made") for name in names]
    if isinstance(proof, PackingError):
        return [judge(False, name, f"none was made: {proof}", "numbers that overflowed") for name in names]
    relative = proof.largest_difference / (proof.largest_logit or 1)
    measured = (
        f"largest difference {relative:.1e} of the largest logit on {proof.images:,} images, "
        f"{100 * proof.agreement:.2f} % equal predictions"
    )
    same = relative <= SLIM_TOLERANCE and proof.agreement >= SLIM_AGREEMENT
    macs = f"torch counts {proof.slim_macs:,}, printed {proof.structured_macs:,}"
    bits = f"{proof.packed_differs} logits differ, {proof.packed_bytes:,} bytes"
    return [
        judge(same, names[0], measured, "a defect in src/slim.py"),
        judge(proof.slim_macs == proof.structured_macs, names[1], macs, "a defect in src/channels.py"),
        judge(proof.packed_differs == 0, names[2], bits, "a defect in src/packing.py"),
    ]


def pictures_exist(pictures: Sequence[Path]) -> Check:
    missing = [p.name for p in pictures if not p.is_file() or p.stat().st_size == 0]
    measured = f"missing: {', '.join(missing)}" if missing else f"{len(pictures)} files"
    return judge(not missing, "pictures exist", measured, "the output folder was changed during the run")


def early_warnings(records: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """What can be known already, from the records so far: pairs (what it is about, the sentence)."""
    now = records[-1]
    for kind in ("bit", "deadzone"):
        silent = [f"{layer}: {why}" for layer, why in _silent_logits(now, kind)]
        if silent:
            yield f"{kind} gradient", f"{kind} logits without a gradient: {_some(silent)}"
        still = [
            n for n, layer in now["layers"].items() if layer[f"{kind}_logit"] == layer[f"{kind}_logit_start"]
        ]
        if still:
            yield f"{kind} still", f"{kind} logits that have not moved: {_some(still)}"
    for name, layer in now["layers"].items():
        if layer["zero_weights"] == layer["weights"]:
            yield f"dead {name}", f"every weight of {name} is zero: its branch is gone"
    if len(records) > 1 and all(r["accuracy"] <= 1.2 * CHANCE for r in records[-2:]):
        yield "chance", f"accuracy at chance for two epochs running ({100 * now['accuracy']:.1f} %)"
    weighted = now["loss"] - now["cross_entropy"]
    if weighted > OUTWEIGHS * now["cross_entropy"]:
        times = weighted / now["cross_entropy"] if now["cross_entropy"] else math.inf
        yield "penalty", f"the penalty outweighs the cross-entropy {times:.0f} times: lower --sparsity-weight"
