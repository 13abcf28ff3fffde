"""The ledger of an epoch: what its training and testing did, held against what they should have done.

Every check is an equality, so that none depends on how good the run is. What is expected is written a second
time, here or in experiments/reference.py, and taken from the settings alone. A formula that is this project's
own is left out, with the reason, where someone's own class stands in its place.

Sources: Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2 (AdamW); Yuan & Lin 2006, eq. (2.1).
"""

import hashlib
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experiments import reference
from experiments.checkpoint import load_checkpoint
from experiments.data import TestBatches, TrainBatches
from experiments.device import float64_device, in_float64, returning_freed_memory
from experiments.draws import drawn_since, kept_draws, random_states
from experiments.history import FAIL, PASS, SKIP, Check, EpochRecord, LayerRecord, judge, some
from experiments.settings import MACS, STORED, Settings
from experiments.training import TrainingStep
from experiments.watch import (
    BETA1,
    Drawn,
    EpochWatch,
    Pass,
    State,
    Update,
    computed_weights,
    fingerprint,
    left_in,
    looked_at,
    moments,
    numbers,
    step_counts,
)
from metrics import LayerCount, count_network
from resnet import ResNet
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import layers_of, quantizers

MOMENTUM = 0.1  # of running statistics, between two renewals
BLOCK_CONVOLUTION = r"layer\d\.\d+\.conv\d"  # of a ResNet's blocks: the layers of its channel groups
LOOKED_AT = 1 << 20  # numbers of a tensor that are held against formulas
MANY = 64  # numbers of a gradient, over which rounding of its own is no direction
EXACT = 1e-6  # relative; what float32 keeps of a rate
ROUNDED = 1e-4  # relative; float32 sums in another order stay far within


class Wrong(list[str]):
    """Figures that disagree; a check fails when there is one."""

    def unless(self, holds: bool, figures: str) -> None:
        if not holds:
            self.append(figures)


class Chunk:
    """The first numbers of some parameters in a row, (n,) in float64, to be computed on together.

    A loop over the parameters would launch thousands of kernels, on few numbers each.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        self.sizes, lengths = sizes, torch.tensor(list(sizes.values()), device=device)
        self.owners = torch.arange(len(sizes), device=device).repeat_interleave(lengths)  # (n,)

    def joined(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The first numbers of each parameter's tensor."""
        return in_float64(torch.cat([tensors[name].flatten()[:size] for name, size in self.sizes.items()]))

    def spread(self, values: Sequence[float]) -> Tensor:
        """Each parameter's value at all its numbers; one number where it is the same for all."""
        if len(set(values)) == 1:  # a power of a row takes long
            return torch.tensor(values[0], dtype=torch.float64, device=self.owners.device)
        return torch.tensor(values, dtype=torch.float64, device=self.owners.device)[self.owners]

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """Each parameter's part of the row, as views."""
        return dict(zip(self.sizes, row.split(list(self.sizes.values())), strict=True))

    def largest(self, row: Tensor) -> dict[str, float]:
        """The largest of each parameter's numbers, of which none is negative; infinity where one is NaN."""
        row = row.nan_to_num(nan=torch.inf, posinf=torch.inf)
        found = row.new_zeros(len(self.sizes)).scatter_reduce(0, self.owners, row, "amax")
        return dict(zip(self.sizes, found.tolist(), strict=True))


class Ledger:
    """One epoch as it was watched, its record, and what was to be expected of both."""

    def __init__(self, watch: EpochWatch, record: EpochRecord) -> None:
        self.watch, self.record = watch, record
        self.pipeline, self.epoch, self.settings = watch.pipeline, watch.epoch, watch.settings
        self.step, self.model, self.processes = watch.step, watch.model, watch.processes
        self.batches, self.losses, self.passes = watch.batches, watch.losses, watch.passes
        self.parameters, self.norms = watch.parameters, watch.norms
        self.before, self.after, self.ready, self.end = watch.before, watch.after, watch.ready, watch.state()
        self.weights_before, self.weights = watch.weights_before, computed_weights(self.model)
        groups = self.step.optimizer.param_groups
        self.places = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        # Every learning rate that each group of the optimizer was given in the epoch.
        self.rates: dict[int, set[float]] = defaultdict(set)  # by the group's place
        rates = numbers([rate for step in self.batches.rates for rate in step])
        places = [place for step in self.batches.rates for place in range(len(step))]
        for place, rate in zip(places, rates, strict=True):
            self.rates[place].add(rate)
        self.ours, self.may_skip = type(self.model) is ResNet, self.step.host.decides
        self.ours_quantize = all(type(q) is DeadZoneLDZCompander for q in quantizers(self.model).values())
        self.our_batches = type(self.pipeline.train_batches) is TrainBatches
        # Two checks hold rates and coefficient against the settings. The others take those that were used, so
        # that one fault is not said twice, under two names.
        self.coefficient = float(self.step.coefficient)
        self.masked = self.settings.keep_dead and self.coefficient != 0
        self.bf16 = self.settings.precision == "bf16"
        self.thorough = is_thorough(self.epoch, self.settings.epochs)

    def checks(self) -> list[Check]:
        """All that the epoch was held against, each PASS, FAIL or SKIP; every rank must call it."""
        found = [
            self.check_start(),
            self.check_training_mode(),
            self.check_rates(),
            self.check_coefficient(),
            self.check_step_counts(),
            self.check_updates(),
            self.check_movement(),
            self.check_order(),
            self.check_cross_entropy(),
            self.check_penalty(),
            self.check_renewal(),
            self.check_test_pass(),
            self.check_accuracy(),
            self.check_dead_slices(),
            self.check_counts(),
            self.check_weights(),
            self.check_ranks(),
        ]
        found.append(self.check_step([c.name for c in found if c.status == FAIL]))
        self.watch.leave()
        return self._with_other_ranks(found)

    # Rates and the optimizer.

    def check_start(self) -> Check:
        """The epoch begins with what the last one left; a resumed one with what the checkpoint holds."""
        name, wrong, begun = "begins where the last epoch ended", Wrong(), self.watch.begun()
        for part, then in self.watch.left.items():
            now = begun[part]
            if not torch.equal(then, now):
                differ = int((then != now).sum()) if then.shape == now.shape else len(now)
                wrong.append(f"{differ:,} of {len(now):,} numbers of {part} are others than those left")
        cause = "something between two epochs writes into the network or the optimizer, or replaces them"
        # A resumed run says the same as one that was not stopped.
        return _judge(wrong, name, "what this process has seen of both is equal to the bit", cause)

    def check_rates(self) -> Check:
        """Learning rate at every step, weight decay, betas of every parameter against the settings."""
        wrong, groups, expected = Wrong(), self.step.optimizer.param_groups, self._expected()
        for name, (group, rate, decay) in expected.items():
            there = self._group_of(name)
            if there is None:  # another check says so
                continue
            bad = [r for r in self.rates[there] if not _close(r, rate, EXACT)]
            wrong.unless(
                not bad, f"learning rate of {name} is {_number(*bad)}, expected {rate:.6g} ({group})"
            )
            found = groups[there]["weight_decay"]
            wrong.unless(
                _close(found, decay, EXACT),
                f"weight decay of {name} is {found:.6g}, expected {decay:.6g} ({group})",
            )
        for used_betas in {tuple(g.get("betas", ())) for g in groups}:
            due = (BETA1, self.settings.beta2)
            wrong.unless(used_betas == due, f"betas are {used_betas}, expected {due}")
        cause = (
            "a learning-rate schedule, --pace-steps, weight decay or beta that is not the settings', "
            "or rates that are not set in every epoch"
        )
        held = ", ".join(sorted({f"{r:.3g}" for _, r, _ in expected.values()}))
        return _judge(wrong, "learning rates and decays", held, cause)

    def check_coefficient(self) -> Check:
        expected = self._coefficient()
        wrong = Wrong()
        used = {*numbers(self.batches.coefficients), self.coefficient}
        bad = [c for c in used if not _close(c, expected, EXACT)]
        wrong.unless(not bad, f"the steps used {_number(*bad)}, expected {expected:.6g}")
        wrong.unless(
            _close(self.record.coefficient, expected, EXACT),
            f"the record says {self.record.coefficient:.6g}, expected {expected:.6g}",
        )
        cause = "the sparsity schedule (delay, ramp, peak), or a coefficient that is not handed to the step"
        return _judge(wrong, "penalty coefficient", f"{expected:.4g}", cause)

    def check_step_counts(self) -> Check:
        """Every parameter is trained, is in the optimizer once, and took every step."""
        wrong, steps = Wrong(), len(self.pipeline.train_batches)
        held = [id(p) for group in self.step.optimizer.param_groups for p in group["params"]]
        twice = [n for n, p in self.parameters.items() if held.count(id(p)) > 1]
        foreign = len(set(held) - {id(p) for p in self.model.parameters()})
        frozen = [n for n, p in self.model.named_parameters() if not p.requires_grad and self._must_train(n)]
        wrong.unless(not twice, f"in two groups: {some(twice)}")
        wrong.unless(not foreign, f"{foreign} tensors of the optimizer are no parameters of the network")
        wrong.unless(not frozen, f"frozen (requires_grad is False): {some(frozen)}")
        counts = zip(self.parameters, self.before.steps, self.after.steps, strict=True)
        off = [
            f"{n} took {b - a:.0f}"
            for n, a, b in counts
            if b - a != steps and not (self.may_skip and b - a < steps)
        ]
        wrong.unless(not off, f"of {steps} steps, {some(off)}")
        if self.our_batches:
            due = self.epoch * steps
            odd = {a for a in self.before.steps if a != due and not (self.may_skip and a < due)}
            wrong.unless(not odd, f"{_number(*odd)} steps before this epoch, expected {due}")
        cause = (
            "the optimizer misses parameters, parameters that are frozen or get no gradient, batches that "
            "are skipped, or an optimizer state that was not restored"
        )
        if frozen:
            cause = "parameters are frozen (requires_grad is False) that are to be trained"
        return _judge(
            wrong, "optimizer steps", f"{steps} of each of {len(self.parameters)} parameters", cause
        )

    def check_updates(self) -> Check:
        """Three of the epoch's updates of every weight against AdamW's formulas, in float64."""
        name, wrong = "updates are AdamW's", Wrong()
        if not self.batches.updates:
            return Check(SKIP, name, "no training step was seen")
        for update in self.batches.updates:
            self._compare_update(update, wrong)
        self._compare_with_the_second(wrong)
        steps = ", ".join(str(update.number + 1) for update in self.batches.updates)
        cause = (
            "another optimizer, rate, decay or beta than the settings', an update outside the optimizer, "
            "moments that are cleared or replaced, or gradients changed or cleared after it"
        )
        return _judge(wrong, name, f"{len(self.parameters)} parameters in steps {steps}", cause)

    def _compare_update(self, update: Update, wrong: Wrong) -> None:
        taken = zip(self.parameters, self.before.steps, self.after.steps, strict=True)
        step, gradients = f"step {update.number + 1}", update.gradients
        lost = [n for n, a, b in taken if b > a and n not in gradients]
        wrong.unless(not lost or self.may_skip, f"{step} leaves no gradient at {some(lost)}")
        counts = dict(zip(self.parameters, step_counts(update.steps), strict=True))
        rows = [_split(self.parameters, row) for row in (update.before, update.after, *update.moments)]
        dead = self._dead_in(update.number)
        # Over what float32 may round, 1 - beta2 too: 1 and less is no difference.
        beta2, rounding = self.settings.beta2, 3e-5 + 1e-7 / (1 - self.settings.beta2)
        for chunk in self._chunks(gradients):
            w, after, m, v, g = map(chunk.joined, (*rows, gradients))
            rate, decay = map(chunk.spread, zip(*map(self._used, chunk.sizes), strict=True))
            count = chunk.spread([int(counts[n]) + 1 for n in chunk.sizes])
            expected, _, second = reference.AdamW(rate, decay, BETA1, beta2).step(w, g, m, v, count)
            moved = (m.abs() + g.abs()) / ((second / (1 - beta2**count)).sqrt() + 1e-8)
            off = (after - expected).abs() / (rounding * rate * (1 + moved) + 5e-7 * w.abs() + 1e-12)
            off = torch.where(self._may_be_masked(chunk, after, dead), 0, off)
            for n, times in chunk.largest(off).items():
                wrong.unless(times <= 1, f"{step}: {n} is {times:.3g} times the rounding away")

    def _compare_with_the_second(self, wrong: Wrong) -> None:
        """All updates of the epoch, as a second optimizer made them beside the run's own."""
        second = self.batches.second
        if second is None:
            return
        again, after = second.copies, _split(self.parameters, self.after.values)
        for chunk in self._chunks(self.parameters):
            w, found = chunk.joined(again), chunk.joined(after)
            rate = chunk.spread([self._used(n)[0] for n in chunk.sizes])
            # What rounding leaves of each step may add up.
            off = (found - w).abs() / (1e-3 * rate + 2e-7 * len(self.batches) * w.abs() + 1e-12)
            for n, times in chunk.largest(torch.where(self._may_be_masked(chunk, found), 0, off)).items():
                wrong.unless(times <= 1, f"after all steps {n} is {times:.3g} times the rounding away")
        mean, square = moments(self.step.optimizer, self.parameters)
        mean_again, square_again = moments(second.optimizer, again)
        others = (mean - mean_again).abs() > 1e-4 * square_again.sqrt() + 1e-12
        others |= (square - square_again).abs() > 1e-4 * square_again + 1e-24
        count = int(others.sum())
        wrong.unless(not count, f"{count:,} of {len(others):,} moments are others than all gradients give")

    def check_step(self, failed: Sequence[str]) -> Check:
        """One step of a thorough epoch, on a copy of its network: the gradients that it left, and its logits.

        Where all of it is this project's own the reference computes them too, which shares no code with the
        step. They are others too where a check that `failed` has named the cause already.
        """
        name, drawn, wrong = "a step computed anew", self.batches.drawn, Wrong()
        left = {update.number: update.gradients for update in self.batches.updates}
        if drawn is None or not left.get(drawn.number):
            return Check(SKIP, name, "no training step was seen")
        if not self.thorough:
            return Check(SKIP, name, "it takes as long as two steps, so that not every epoch has it")
        if failed:
            return Check(SKIP, name, f"waits for '{failed[0]}'")
        if self.processes.count > 1 or self.may_skip:
            why = "of several ranks each has a part" if self.processes.count > 1 else "layers may be left out"
            return Check(SKIP, name, f"{why}, so that they are not known")
        states, plain = random_states(), dict[str, Tensor]()
        with returning_freed_memory(self.step.device), kept_draws():
            # Before the step, so that its memory is free again when the step needs as much.
            expected = None
            if self._is_known:
                expected, plain = self._plain_step(drawn)
            elif self.ours:
                expected = self._plain_logits(drawn.model, drawn.images)
            logits, copied = self._step_of_the_copy(drawn)
            random = drawn_since(states)
        if random:
            return Check(SKIP, name, "the network draws random numbers, so that they are not known")
        away = 0.0 if expected is None else float((logits - expected).norm() / expected.norm())
        limit = 0.1 if self.bf16 else 0.001  # rounding in bf16 is the larger for each layer
        wrong.unless(away <= limit, f"the network's logits are {away:.2g} (relative) away in training mode")
        if wrong:
            cause = (
                "a layer, a batch norm or an activation that is another in training mode, for so many "
                "images, or in the precision that trains"
            )
            return _judge(wrong, name, "", cause)
        found = left[drawn.number]
        shares = _shares(found, copied)
        for n, share in shares.items():
            holds = share <= (0.1 if self.bf16 else 0.01)
            wrong.unless(holds, f"step {drawn.number + 1}: {n} is {share:.2g} (relative) away")
        if wrong:
            cause = (
                "gradients that are kept from step to step, clipped, scaled or cleared, images that count "
                "otherwise than the mean, a penalty that is left out of some steps, or stale quantized "
                "weights, cached across steps"
            )
            return _judge(wrong, name, "", cause)
        for n, share in (_shares(found, plain) if plain else {}).items():
            # A ReLU at the edge opens or not by rounding, so that gradients agree to few digits.
            wrong.unless(share <= 0.25, f"step {drawn.number + 1}: {n} is {share:.2g} (relative) away")
        for n, share in (_directions(found, plain) if plain else {}).items():
            wrong.unless(abs(share - 1) <= 0.05, f"step {drawn.number + 1}: of {n} {share:.3g} is left")
        cause = (
            "a backward pass that is not its formula's, of the quantizer, the penalty or a layer, in the "
            "precision that trains, for so many images, or after so many steps"
        )
        held = f"step {drawn.number + 1}: gradients to {max(shares.values()):.0e}, logits to {away:.0e}"
        return _judge(wrong, name, held, cause)

    @property
    def _is_known(self) -> bool:
        """Whether the formulas of all that a step computes are known, and float32 leaves digits enough."""
        ours = getattr(self.step.penalty, "__module__", "") == "experiments.sparsity"
        return self.ours and self.ours_quantize and ours and self.settings.precision == "float32"

    def _plain_step(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits and the gradients of a step, by the reference throughout."""
        model: Any = drawn.model
        stored = {n: layer.parametrizations.weight.original for n, layer in _quantized(model).items()}
        weights = {n: layer.weight for n, layer in layers_of(model).items() if n not in stored}
        for n, quantizer in quantizers(model).items():
            weights[n] = reference.quantize(stored[n], _learned_bits(quantizer), quantizer.logit_dz)
        values = dict(model.named_parameters()) | dict(model.named_buffers())
        logits = reference.Network(values, weights, len(model.layer1), keeps=False)(drawn.images)
        loss = reference.cross_entropy(logits, drawn.labels)
        if self.coefficient:
            of = stored if self.settings.penalty_on == STORED else weights
            penalised = {n: of[n] for n in stored if re.fullmatch(BLOCK_CONVOLUTION, n)}
            loss = loss + self.coefficient * self._reference_penalty(penalised)
        return logits.detach(), _gradients(model, loss)

    def _step_of_the_copy(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits and the gradients of a step, by a copy of its network and by the run's penalty."""
        with parametrize.cached():
            with torch.autocast(self.step.device.type, torch.bfloat16, enabled=self.bf16):
                logits = drawn.model(drawn.images)
            loss = nn.functional.cross_entropy(logits.float(), drawn.labels)
            if self.coefficient:
                loss = loss + self.coefficient * self.step.penalty(drawn.model)
        return logits.detach(), _gradients(drawn.model, loss)

    @torch.no_grad()
    def _plain_logits(self, model: Any, images: Tensor) -> Tensor:
        """The logits of the network written a second time, with the same weights, in training mode."""
        weights = {n: layer.weight for n, layer in layers_of(model).items()}
        return reference.Network(model.state_dict(), weights, len(model.layer1), keeps=False)(images)

    def _reference_penalty(self, weights: dict[str, Tensor]) -> Tensor:
        blocks = len(self.model.layer1)  # type: ignore[arg-type]
        return reference.penalty(weights, blocks, self.settings.group_weights == MACS)

    def check_weights(self) -> Check:
        """What the layers compute with, in one step and in the test pass, by the quantizer's formula."""
        name, wrong, count = "weights are the quantizer's", Wrong(), 0
        if not self.ours_quantize:
            return Check(SKIP, name, "the formula of another quantizer is not known")
        models = {"in the test pass": (self.model, self.weights)}
        if drawn := self.batches.drawn:
            models[f"in step {drawn.number + 1}"] = (drawn.model, self._drawn_weights)
        for when, (model, weights) in models.items():
            flags: dict[str, Tensor] = {}
            for layer, quantizer in quantizers(model).items():
                weight: Any = model.get_submodule(layer).parametrizations.weight  # type: ignore[union-attr]
                stored = weight.original.detach()
                if stored.numel() <= LOOKED_AT:
                    exact, deadzone = in_float64(stored), in_float64(quantizer.logit_dz.detach())
                    off = []
                    # A bit-width, or a weight, that lies between two levels may be rounded to either.
                    for bits in {round(_bits(quantizer) + rounding) for rounding in (-1e-5, 1e-5)}:
                        wanted = reference.quantize(exact, torch.full_like(deadzone, bits), deadzone)
                        away = (in_float64(weights[layer]) - wanted).abs()
                        off.append((away > 1e-4 * wanted.abs().max()).sum())
                    flags[layer] = torch.stack(off).min() > 2 + 1e-3 * stored.numel()
            count += len(flags)
            odd = [n for n, flag in zip(flags, numbers(list(flags.values())), strict=True) if flag]
            wrong.unless(not odd, f"{when}, of {some(odd)}, they are others")
        cause = (
            "a quantizer whose formula (range, dead zone, step size, bits) is another for some layers or "
            "bits, in training or in evaluation mode, or from some step on"
        )
        return _judge(wrong, name, f"{count} tensors", cause)

    def check_movement(self) -> Check:
        """Every tensor moved over the epoch, and by no more than AdamW can move it."""
        wrong, steps = Wrong(), len(self.pipeline.train_batches)
        rows = [_split(self.parameters, state.values) for state in (self.before, self.after)]
        # Steps before the epoch and in it, by parameter: one of a layer that was left out took fewer.
        counts = zip(self.parameters, self.before.steps, self.after.steps, strict=True)
        spans = {n: (int(a), int(b) - int(a) if self.may_skip else steps) for n, a, b in counts}
        reaches = {span: adamw_reach(BETA1, self.settings.beta2, *span) for span in set(spans.values())}
        for chunk in self._chunks(self.parameters):
            before, after = map(chunk.joined, rows)
            rate, decay = map(chunk.spread, zip(*map(self._used, chunk.sizes), strict=True))
            took = chunk.spread([spans[n][1] for n in chunk.sizes])
            reach = chunk.spread([reaches[spans[n]] for n in chunk.sizes])
            far = (after - before * (1 - rate * decay) ** took).abs()
            slack = 1.001 * rate * reach + 2e-7 * took * (before.abs() + rate * reach.clamp(max=1e9))
            beyond = torch.where((rate * decay <= 1) & (rate > 0), far / slack, 0).nan_to_num(0)
            beyond = torch.where(self._may_be_masked(chunk, after), 0, beyond)
            moves, sizes = chunk.largest((before != after).double()), chunk.largest(before.abs())
            for n, times in chunk.largest(beyond).items():
                # At the end of a long run a step of the rate's size is so small that rounding swallows it.
                small = self._used(n)[0] < EXACT * max(sizes[n], EXACT)
                may_stay = sizes[n] == 0 or spans[n][1] == 0 or small
                stays = not (moves[n] or may_stay or self._is_dead(n) or self._moves(n))
                wrong.unless(not stays, f"{n} has not moved")
                wrong.unless(times <= 1, f"{n} moved {times:.3g} times as far as AdamW can")
        cause = (
            "no gradient reaches it, a learning rate of 0, or something other than the optimizer writes it"
        )
        return _judge(wrong, "every parameter moves", f"{len(spans)} tensors", cause)

    # Images, loss and penalty.

    def check_order(self) -> Check:
        """Which images were handed out, in which order, against the draw made anew."""
        name, wrong, batches = "images and their order", Wrong(), self.batches
        handed = sum(len(labels) for labels in batches.labels)
        asked = batches.epochs
        wrong.unless(asked == [self.epoch], f"the batches of epoch {asked} were asked for, not {self.epoch}")
        wrong.unless(
            len(batches.labels) == len(self.pipeline.train_batches),
            f"{len(batches.labels)} of {len(self.pipeline.train_batches)} batches were taken",
        )
        if others := int(sum(numbers(batches.replayed_others))):
            found = f"{others} replays of a CUDA graph were of another batch than was handed out"
            return _judge(Wrong([found]), name, "", "the batch is not copied into the captured step")
        cause = (
            "the data order: a draw that does not depend on seed and epoch as it should, batches left "
            "out or repeated, labels moved against images, augmentation, or images that were written to"
        )
        if not torch.equal(now := fingerprint(self.pipeline.train_batches), self.watch.data):
            changed = int((now != self.watch.data).sum())
            wrong.append(f"{changed:,} of the stored training images, or their labels, have been changed")
        if not self.our_batches:
            if wrong:
                return _judge(wrong, name, "", cause)
            return Check(SKIP, name, f"{handed:,} images; the order of {_kind(batches.batches)} is not known")
        expected, shards = self._expected_labels(self._draws[0])
        places = [shard[i] for shard in shards for i in looked_at(len(shard))]
        labels = torch.cat(batches.labels).cpu() if batches.labels else torch.empty(0, dtype=torch.long)
        wrong.unless(len(labels) == len(expected), f"{len(labels):,} images, expected {len(expected):,}")
        if len(labels) == len(expected) and not torch.equal(labels, expected):
            wrong.append(self._other_order(labels, expected))
        seen = [x for p in self.passes["training"] for x in p.images] or batches.images
        if batches.drawn and len(shards) > batches.drawn.number:  # of one batch every image
            seen, places = [*seen, *batches.drawn.images], [*places, *shards[batches.drawn.number]]
        if not wrong and len(seen) == len(places):
            made = self._expected_images(places)
            off = (torch.stack(seen).cpu().float() - made).abs().flatten(1).amax(1)
            wrong.unless(
                bool((off <= 1e-3).all()),
                f"{int((off > 1e-3).sum())} of {len(off)} images looked at are not what their draw gives",
            )
        return _judge(wrong, name, f"{len(labels):,} images, {len(places)} looked at", cause)

    def check_cross_entropy(self) -> Check:
        """The cross-entropy that every step reports, from its logits and the labels that were due."""
        name, wrong = "cross-entropy", Wrong()
        passes, steps = self.passes["training"], self.losses.steps
        if len(passes) != len(steps):
            why = (
                "steps are replayed from a graph" if not self.watch.eager else f"{len(passes)} forward passes"
            )
            return Check(SKIP, name, f"{len(steps)} steps: {why}, so no logits were seen")
        labels = torch.cat(self.batches.labels)
        if self.our_batches:
            expected, _ = self._expected_labels(self._draws[0])
            labels = expected.to(labels.device) if len(expected) == len(labels) else labels
        logits = in_float64(torch.cat([p.logits for p in passes]))
        labels = labels.to(logits.device)
        if len(logits) != len(labels):
            wrong.append(f"{len(logits):,} images went through the network, {len(labels):,} were handed out")
            return _judge(wrong, name, "", "images are left out or used twice in a batch")
        each = logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0]
        sums = torch.stack([part.sum() for part in each.split([len(p.logits) for p in passes])])
        means = (self.processes.sum(sums).cpu() / torch.tensor(self.pipeline.train_batches.sizes)).tolist()
        for i, (mean, (_, said, _)) in enumerate(zip(means, steps, strict=True)):
            wrong.unless(
                _close(said, mean, ROUNDED, 1.0),
                f"step {i + 1} reports {said:.6g}, its logits give {mean:.6g}",
            )
        sizes = self.pipeline.train_batches.sizes
        mean = sum(m * size for m, size in zip(means, sizes, strict=True)) / sum(sizes)
        wrong.unless(
            _close(self.record.cross_entropy, mean, ROUNDED, 1.0),
            f"the record says {self.record.cross_entropy:.6g}, the steps' mean is {mean:.6g}",
        )
        cause = (
            "the loss is not the mean cross-entropy of the network's logits and the images' own labels "
            "(a second softmax, label smoothing, labels moved against images, a sum in place of a mean, "
            "half precision)"
        )
        return _judge(wrong, name, f"{mean:.4f} from the logits", cause)

    def check_penalty(self) -> Check:
        """loss = cross-entropy + coefficient x penalty at every step, and the penalty counted anew."""
        name, wrong, c = "loss and penalty", Wrong(), self.coefficient
        for i, (loss, cross_entropy, penalty) in enumerate(self.losses.steps):
            wrong.unless(
                _close(loss, cross_entropy + c * penalty, 1e-5, 1.0),
                f"step {i + 1}: loss {loss:.6g} is not {cross_entropy:.6g} + {c:.4g} x {penalty:.6g}",
            )
        sizes = self.pipeline.train_batches.sizes
        mean = sum(s[0] * n for s, n in zip(self.losses.steps, sizes, strict=True)) / sum(sizes)
        wrong.unless(
            _close(self.record.loss, mean, 1e-5, 1.0),
            f"the record's loss is {self.record.loss:.6g}, the mean {mean:.6g}",
        )
        cause = (
            "the penalty is not applied, is weighted otherwise, or its groups are not those of the channels"
        )
        if not self.ours or getattr(self.step.penalty, "__module__", "") != "experiments.sparsity":
            if wrong:
                return _judge(wrong, name, "", cause)
            whose = "the formula is not known" if self.ours else "only the groups of resnet.py are known"
            return Check(SKIP, name, f"loss = cross-entropy + coefficient x penalty; of the penalty, {whose}")
        last = self._lasso(self.weights, self.end)
        # In training mode another quantizer may give other weights than in evaluation mode.
        if c and (self.settings.penalty_on == STORED or self.settings.quantizer == Settings.quantizer):
            first = self._lasso(self.weights_before, self.before)
            said = self.losses.steps[0][2]
            wrong.unless(
                _close(said, first, ROUNDED),
                f"the first step's penalty is {said:.6g}, counted anew {first:.6g}",
            )
        wrong.unless(
            _close(self.record.penalty, last, ROUNDED),
            f"the record's penalty is {self.record.penalty:.6g}, counted anew {last:.6g}",
        )
        of_a_step = [s for s in self.losses.steps if _close(self.record.penalty, s[2], EXACT)]
        if of_a_step and len(wrong) == 1:
            cause = (
                "the record has the penalty of a training step, not that of the network at the epoch's end"
            )
        return _judge(wrong, name, f"penalty {last:.4g} counted anew", cause)

    # Modes, statistics and the test pass.

    def check_training_mode(self) -> Check:
        wrong, steps = Wrong(), len(self.pipeline.train_batches)
        counts = zip(self.norms, self.before.tracked, self.after.tracked, strict=True)
        off = [f"{n} {b - a}" for n, a, b in counts if not self._counts(b - a, steps)]
        wrong.unless(not off, f"batch norms that counted other than {steps} batches: {some(off)}")
        passes = self.passes["training"]
        for i, p in enumerate(passes):
            wrong.unless(self._in_mode(p, True), f"step {i + 1} ran with modules in evaluation mode")
            wrong.unless(p.quantized, f"step {i + 1} ran with quantizers switched off")
        cause = "the network is not put into training mode (train() missing or undone), or quantizers are off"
        if all(b - a >= steps for a, b in zip(self.before.tracked, self.after.tracked, strict=True)) and off:
            cause = (
                "more runs through the network in training mode than the epoch has steps: batch norm "
                "statistics renewed before the training, not after it, or a second forward pass"
            )
        return _judge(wrong, "training mode", f"{steps} batches counted", cause)

    def _counts(self, batches: int, passes: int) -> bool:
        """Whether a batch norm may count so many batches; someone's own may run twice a pass, or never."""
        return batches == passes if self.ours else self.may_skip or batches % passes == 0

    def _in_mode(self, seen: Pass, training: bool) -> bool:
        """Whether a pass ran in a mode; someone's own network may keep a part of itself in the other."""
        return seen.training == {training} if self.ours else training in seen.training

    def check_renewal(self) -> Check:
        """The batch norms' statistics: finite, and after a renewal the plain mean over its batches."""
        name, wrong, count = "batch norm statistics", Wrong(), self.settings.batch_norm_batches
        if not self.norms:
            return Check(SKIP, name, "the network has no batch norms")
        due = min(count, len(self.pipeline.train_batches))
        for n, was, now in zip(self.norms, self.after.tracked, self.ready.tracked, strict=True):
            holds = self._counts(now, due) if due and (self.ours or now != was) else now == was
            wrong.unless(holds, f"{n} counts {now} batches, expected {due or was}")
        momenta: list[Any] = [norm.momentum for norm in self.norms.values()]
        same = self.watch.momenta == momenta and not (self.ours and set(momenta) != {MOMENTUM})
        wrong.unless(same, f"momenta are {sorted(set(momenta), key=str)}, and have changed")
        wrong.unless(bool(self.ready.statistics.isfinite().all()), "some are not finite")
        wrong.unless(bool((self.ready.variances >= 0).all()), "some variances are negative")
        passes = self.passes["renewal"]
        wrong.unless(len(passes) == due, f"{len(passes)} forward passes before the test, expected {due}")
        wrong.unless(all(p.quantized for p in passes), "they ran with quantizers switched off")
        seen_images, sizes = [len(p.logits) for p in passes], self.pipeline.train_batches.sizes[:due]
        wrong.unless(
            self.processes.count > 1 or not self.ours or seen_images == sizes,
            f"they were of {sum(seen_images):,} images, expected {sum(sizes):,}",
        )
        if self.our_batches and len(passes) == due:
            self._compare_images(passes, self.batches.images, wrong)  # those that were trained on first
        for n, seen in self.watch.seen_by.items():
            if not due or len(seen) != due or self.processes.count > 1:
                continue
            mean, var = (in_float64(torch.stack(v)).mean(0) for v in zip(*seen, strict=True))
            stored_mean, stored_var = self.watch.ready_norms[n]
            off_mean = (stored_mean - mean).abs() / (var.sqrt() + mean.abs() + 1e-6)
            off_var = (stored_var - var).abs() / (var + mean.square() + 1e-6)
            off = torch.maximum(off_mean, off_var).max().item()
            wrong.unless(off <= 1e-2, f"{n} is {off:.3g} (relative) from the mean over these batches")
        cause = (
            "batch norm statistics are not renewed as --batch-norm-batches asks: another number of batches, "
            "other images than the epoch's first, a moving average in place of the mean, a momentum not put "
            "back, evaluation mode, no quantization"
        )
        return _judge(wrong, name, f"of {due} batches" if due else "running averages", cause)

    def check_test_pass(self) -> Check:
        """Evaluation mode, and nothing of the network changes from the last step to the record."""
        name, wrong, passes = "test pass", Wrong(), self.passes["test"]
        for p in passes:
            wrong.unless(self._in_mode(p, False), "it ran with modules in training mode")
            wrong.unless(p.quantized, "it ran with quantizers switched off")
            wrong.unless(not p.gradients, "it recorded gradients")
        if type(batches := self.pipeline.test_batches) is TestBatches and passes:
            ends = itertools.accumulate((len(p.logits) for p in passes), initial=0)
            places = [a + i for a, b in itertools.pairwise(ends) for i in looked_at(b - a)]
            if max(places, default=-1) < len(batches.labels):
                self._compare_images(passes, [*_normalised(batches.images[places].cpu())], wrong)
        if not torch.equal(self.after.values, self.end.values):
            left, found = (_split(self.parameters, state.values) for state in (self.after, self.end))
            moved = [n for n in left if not torch.equal(left[n], found[n])]
            wrong.append(f"parameters changed after the last step: {some(moved)}")
        wrong.unless(
            torch.equal(self.ready.statistics, self.end.statistics)
            and self.ready.tracked == self.end.tracked,
            "batch norm statistics changed after the renewal",
        )
        if not wrong and self.watch.tested and passes:
            again, then = self._logits_again(), passes[0].logits[: len(self.watch.tested[0])].float()
            size = 1 + float(then.abs().max())
            off = float((again - then).abs().max()) / size
            limit = 5e-2 if self.bf16 else 1e-2
            wrong.unless(off <= limit, f"the weights as counted give logits {off:.3g} (relative) away")
        cause = (
            "the test pass in training mode (eval() missing), with quantizers off, on other images than the "
            "test set's, or with weights other than those counted, or code between training and the row that "
            "writes into the network"
        )
        return _judge(wrong, name, "evaluation mode, nothing changed", cause)

    def check_accuracy(self) -> Check:
        name, wrong, labels = "accuracy", Wrong(), self.pipeline.test_batches.labels
        if not torch.equal(now := fingerprint(self.pipeline.test_batches), self.watch.test_data):
            changed = int((now != self.watch.test_data).sum())
            wrong.append(f"{changed:,} of the stored test images, or their labels, have been changed")
            cause = (
                "something writes into the test set: its labels or images are altered where they are tested"
            )
            return _judge(wrong, name, "", cause)
        logits = [p.logits for p in self.passes["test"]]
        here = torch.zeros(3, dtype=torch.long)
        here[0], here[1] = len(labels), sum(len(x) for x in logits)
        if logits and here[0] == here[1]:
            here[2] = int((torch.cat(logits).float().argmax(1) == labels).sum())
        due, tested, right = self.processes.sum(here.to(labels.device)).tolist()
        wrong.unless(tested == due, f"{tested:,.0f} images were tested, the test set has {due:,.0f}")
        limit = self.settings.limit_test
        wrong.unless(
            limit in (None, int(due)) or type(self.pipeline.test_batches) is not TestBatches,
            f"the test set has {due:,.0f} images, --limit-test is {limit}",
        )
        hits = self.record.accuracy * due
        wrong.unless(
            abs(hits - round(hits)) <= 1e-6 * due,
            f"{self.record.accuracy!r} x {due:,.0f} images is no whole number",
        )
        if tested == due:
            wrong.unless(
                abs(hits - right) < 0.5,
                f"the record says {100 * self.record.accuracy:.2f} %, the logits {100 * right / due:.2f} % "
                f"({right:,.0f} of {due:,.0f} images)",
            )
        cause = (
            "how hits are counted: images left out or counted twice, another label, or another epoch's "
            "accuracy (the last one, the best one)"
        )
        if not tested:
            cause = "another network than the one that trains is tested: a copy, an older one, or none"
        return _judge(wrong, name, f"{hits:,.0f} of {due:,.0f} images", cause)

    # What the epoch left.

    def check_dead_slices(self) -> Check:
        """While the penalty acts and the setting asks for it, what is dead stays dead, stored as zeros."""
        name, keeps = "dead slices stay dead", bool(self.step.keep_dead)
        wrong = Wrong()
        wrong.unless(
            keeps == self.settings.keep_dead,
            f"--keep-dead is {self.settings.keep_dead}, the step's is {keeps}",
        )
        if not self.ours and not wrong:
            return Check(SKIP, name, f"the channels of {_kind(self.model)} are not known")
        cause = "dead slices revive: their mask is not applied, or not after the optimizer's step"
        if not self.masked or not self.ours:
            return _judge(wrong, name, "nothing to keep yet", cause)
        stored = dict(self.model.named_parameters())
        dead = 0
        for (layer, dim), before in self._dead(self.weights_before).items():
            others = (1, 2, 3) if dim == 0 else (0, 2, 3)
            alive = (self.weights[layer] != 0).any(others)
            original = stored.get(f"{layer}.parametrizations.weight.original")
            assert original is not None
            kept = before & ((original == 0).all(others))
            what = "filters" if dim == 0 else "input slices"
            revived, not_zero = int((before & alive).sum()), int((before & ~kept).sum())
            wrong.unless(not revived, f"{revived} dead {what} of {layer} came back")
            wrong.unless(not not_zero, f"{not_zero} dead {what} of {layer} are stored as other than zero")
            dead += int(before.sum())
        return _judge(wrong, name, f"{dead:,} slices", cause)

    def check_counts(self) -> Check:
        """Zeros, filters, bits and means of the record by a plain loop over the weights; the channels of a
        thorough epoch by another count.
        """
        layers = count_network(self.model).layers if self.thorough else ()
        channels = {layer.name: _channels(layer) for layer in layers}
        wrong, zeros, weights, dead, filters, bits, learned = Wrong(), 0, 0, 0, 0, [], []
        gradients = Wrong()  # those of a parameter that is recorded as it is
        for name, quantizer in quantizers(self.model).items():
            w, said = self.weights[name].cpu().numpy(), self.record.layers.get(name)
            if said is None:
                wrong.append(f"{name} has no record")
                continue
            rows = w.reshape(len(w), -1)
            counted = (int(np.sum(w == 0)), w.size, sum(not row.any() for row in rows), len(rows))
            recorded = (said.zero_weights, said.weights, said.zero_filters, said.filters)
            wrong.unless(counted == recorded, f"{name}: zeros, weights, zero filters, filters "
                         f"{recorded}, counted anew {counted}")  # fmt: skip
            if name in channels:
                wrong.unless(_channels(said) == channels[name], f"{name}: alive, constant and null channels "
                             f"{_channels(said)}, counted anew {channels[name]}")  # fmt: skip
            for n, p in quantizer.named_parameters():
                if p.requires_grad and p.numel() == 1:
                    now = (p.item(), None if p.grad is None else p.grad.item())
                    then = (said.parameters.get(n), said.gradients.get(n))
                    figures = f"{name}: {n} and its gradient are recorded as {then}, they are {now}"
                    (gradients if now[0] == then[0] else wrong).unless(now == then, figures)
            used = _bits(quantizer)
            wrong.unless(
                abs(said.bits - used) <= 0.501, f"{name}: {said.bits} bits in use, learned {used:.4f}"
            )
            if type(quantizer) is DeadZoneLDZCompander:
                wrong.unless(
                    _close(said.learned_bits, used, ROUNDED),
                    f"{name}: {said.learned_bits:.4f} learned bits, its logit gives {used:.4f}",
                )
            zeros, weights = zeros + counted[0], weights + counted[1]
            if w.ndim == 4:
                dead, filters = dead + counted[2], filters + counted[3]
            bits.append(float(said.bits))
            learned.append(said.learned_bits)
        if bits:
            pairs = {
                "unstructured sparsity": (self.record.unstructured_sparsity, zeros / weights),
                "structured sparsity": (self.record.structured_sparsity, dead / filters if filters else 0.0),
                "mean bits": (self.record.bits, sum(bits) / len(bits)),
                "mean learned bits": (self.record.learned_bits, sum(learned) / len(learned)),
            }
            for what, (said_mean, mean) in pairs.items():
                wrong.unless(
                    _close(said_mean, mean, EXACT), f"{what} {said_mean:.6g}, counted anew {mean:.6g}"
                )
        wrong.unless(
            self.record.epoch == self.epoch + 1,
            f"the row is of epoch {self.record.epoch}, not {self.epoch + 1}",
        )
        held = f"{zeros:,} zeros, {dead:,} filters"
        cause = "a defect in metrics.py or in the record"
        if gradients and not wrong:
            cause = "the gradients in the record are not those of the last step (experiments/history.py)"
        elif wrong and self._is_of_the_start():
            cause = "the row is counted before the epoch's training, not after it"
        return _judge(Wrong([*wrong, *gradients]), "counts of the row", held, cause)

    def _is_of_the_start(self) -> bool:
        """Whether the record's zeros are those of the weights that the epoch began with."""
        zeros = {name: int((w == 0).sum()) for name, w in self.weights_before.items()}
        return zeros == {name: layer.zero_weights for name, layer in self.record.layers.items()}

    def check_ranks(self) -> Check:
        name = "ranks hold the same weights"
        if self.processes.count == 1:
            return Check(PASS, name, "one process")
        mine = hashlib.sha256(torch.cat([self.end.values, self.end.statistics]).cpu().numpy().tobytes())
        wrong = Wrong()
        wrong.unless(self.processes.broadcast(mine.digest()) == mine.digest(), "weights or statistics differ")
        return _judge(
            wrong, name, "equal to the bit", "gradients or statistics are not summed over the ranks"
        )

    # What is expected.

    def _expected(self) -> dict[str, tuple[str, float, float]]:
        """Group, learning rate and decay of every trained parameter, by name, from the settings."""
        s = self.settings
        factor, pace = self._rate_factor(), self._pace()
        peaks = {
            "weights": (s.weights_lr, pace**0.5 * s.weights_decay),
            "bit": (pace * s.bit_lr, s.bit_decay),
            "deadzone": (pace * s.deadzone_lr, s.deadzone_decay),
        }
        kinds = {id(p): kind for p, kind in self._quantizer_parameters()}
        expected = {}
        for name, p in self.parameters.items():
            kind = kinds.get(id(p), "weights")
            expected[name] = (kind, peaks[kind][0] * factor, peaks[kind][1])
        return expected

    def _used(self, name: str) -> tuple[float, float]:
        """Learning rate and decay that a parameter was trained with; zeros where it was in no group."""
        group = self._group_of(name)
        if group is None or not self.rates[group]:
            return 0.0, 0.0
        decay = self.step.optimizer.param_groups[group]["weight_decay"]
        return max(self.rates[group]), decay

    def _quantizer_parameters(self) -> Iterator[tuple[nn.Parameter, str]]:
        for quantizer in quantizers(self.model).values():
            ours = type(quantizer) is DeadZoneLDZCompander
            groups = {"logit_bit": "bit", "logit_dz": "deadzone"} if ours else {}
            groups = groups or getattr(quantizer, "parameter_groups", {})
            for name, parameter in quantizer.named_parameters():
                yield parameter, groups.get(name, "weights")

    def _rate_factor(self) -> float:
        if getattr(self.pipeline.rate_schedule, "__module__", "") != "experiments.schedules":
            return self.pipeline.rate_schedule(self.epoch, self.settings.epochs)
        return reference.learning_rate(self.epoch, self.settings.epochs, self.settings.rate_warmup)

    def _pace(self) -> float:
        """Longer runs are slower; a part of the batches tells nothing of the whole run's length."""
        if not self.our_batches:
            group = next((g for g in self.step.optimizer.param_groups if g.get("name") == "bit"), {})
            return group.get("peak_lr", 0.0) / self.settings.bit_lr if self.settings.bit_lr else 1.0
        images = len(self.pipeline.train_batches.labels)
        steps = self.settings.epochs * math.ceil(images / self.settings.batch_size)
        meant = self.settings.pace_steps
        return min(1.0, meant / steps) if meant else 1.0

    def _coefficient(self) -> float:
        s, schedule = self.settings, self.pipeline.sparsity_schedule
        if getattr(schedule, "__module__", "") != "experiments.schedules":
            return s.sparsity_weight * schedule(self.epoch, s.epochs)
        return s.sparsity_weight * reference.warmup(self.epoch, s.sparsity_delay, s.sparsity_ramp)

    @cached_property
    def _draws(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order of the images, (N,), offsets of their crops, (2, N), and flips, (N,), of the epoch."""
        return self._draws_of(self.epoch)

    def _draws_of(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        count = len(self.pipeline.train_batches.labels)
        return reference.draws(count, self.settings.seed, epoch, self.settings.crop_padding)

    def _expected_labels(self, order: Tensor) -> tuple[Tensor, list[range]]:
        """The labels due on this rank, and the places in the order of the images of each batch."""
        labels, size = self.pipeline.train_batches.labels.cpu(), self.settings.batch_size
        shards = []
        rank, ranks = self.processes.rank, self.processes.count
        for first in range(0, len(order), size):
            images = min(size, len(order) - first)
            begin, end = first + images * rank // ranks, first + images * (rank + 1) // ranks
            shards.append(range(begin, end))
        places = torch.cat([torch.arange(shard.start, shard.stop) for shard in shards])
        return labels[order[places]], shards

    def _expected_images(self, places: Sequence[int]) -> Tensor:
        """The images at these places of the order, cropped, flipped and normalised: (len, 3, 32, 32)."""
        order, (down, right), flips = (drawn[..., list(places)] for drawn in self._draws)
        batches, padding = self.pipeline.train_batches, self.settings.crop_padding
        stored = batches.pixels.view(-1, batches.padded_side, batches.padded_side, 3)
        inner = slice(batches.crop_padding, batches.crop_padding + reference.SIDE)
        whole = stored[order.to(stored.device)][:, inner, inner].cpu()
        padded, side = nn.functional.pad(whole, (0, 0) + 4 * (padding,)), torch.arange(reference.SIDE)
        rows, columns = down[:, None, None] + side[:, None], right[:, None, None] + side
        images = padded[torch.arange(len(places))[:, None, None], rows, columns]
        return _normalised(torch.where(flips[:, None, None, None] == 1, images.flip(2), images))

    @staticmethod
    def _compare_images(passes: Sequence[Pass], due: Sequence[Tensor], wrong: Wrong) -> None:
        """The images of each pass that are looked at against those that were due, the first ones of `due`."""
        seen = [image for p in passes for image in p.images]
        if seen and len(due) >= len(seen):
            away = torch.stack(seen).cpu().float() - torch.stack([*due[: len(seen)]]).cpu()
            off = int((away.abs().flatten(1).amax(1) > 1e-3).sum())
            wrong.unless(not off, f"{off} of {len(seen)} images looked at are not those that were due")

    def _other_order(self, labels: Tensor, expected: Tensor) -> str:
        for epoch in (0, self.epoch - 1, self.epoch + 1):
            if epoch >= 0 and torch.equal(self._expected_labels(self._draws_of(epoch)[0])[0], labels):
                return f"the images came in the order of epoch {epoch}, not {self.epoch} (from 0)"
        differ = int((labels != expected).sum())
        same = torch.equal(labels.sort().values, expected.sort().values)
        return f"{differ:,} of {len(labels):,} labels differ from the draw's" + (
            ", the same labels in another order" if same else f": {torch.bincount(labels).tolist()} a class"
        )

    # The model.

    @torch.no_grad()
    def _logits_again(self) -> Tensor:
        """The logits of the first test images, from the weights as they are now; in evaluation mode."""
        device = self.step.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            return self.model(self.watch.tested[0]).float()

    def _lasso(self, quantized: dict[str, Tensor], state: State) -> float:
        """The penalty in float64 by the slow reference, of the weights that the settings put it on."""
        weights = quantized
        if self.settings.penalty_on == STORED:
            # Frozen parameters are in no state; they stay as they are.
            held: dict[str, Tensor] = dict(self.model.named_parameters())
            held |= _split(self.parameters, state.values)
            weights = {
                n: held[f"{n}.parametrizations.weight.original"].view_as(w) for n, w in quantized.items()
            }
        chosen = {
            n: w.detach().cpu().double() for n, w in weights.items() if re.fullmatch(BLOCK_CONVOLUTION, n)
        }
        return float(self._reference_penalty(chosen))

    def _chunks(self, names: Iterable[str]) -> Iterator[Chunk]:
        """These trained parameters, some at a time, so that a large network takes no more memory."""
        sizes: dict[str, int] = {}
        for name in names:
            # A million numbers of a tensor tell as much as all; the tensors of resnet.py have fewer.
            size = min(self.parameters[name].numel(), LOOKED_AT)
            if sizes and sum(sizes.values()) + size > LOOKED_AT:
                yield Chunk(sizes, float64_device(self.step.device))
                sizes = {}
            sizes[name] = size
        if sizes:
            yield Chunk(sizes, float64_device(self.step.device))

    @cached_property
    def _drawn_weights(self) -> dict[str, Tensor]:
        """The weights that the quantized layers computed with in the drawn step, by layer name."""
        drawn = self.batches.drawn
        return computed_weights(drawn.model) if drawn else {}

    def _dead_in(self, step: int) -> dict[str, Tensor]:
        """Which weights a step quantized to zero, by the parameter's name; of most steps it is not known."""
        if not self.ours_quantize:  # another one may give other weights in evaluation mode, or at each call
            return {}
        drawn = self.batches.drawn
        weights = self.weights_before if step == 0 else {}
        if drawn and step == drawn.number:
            weights = self._drawn_weights
        return {f"{name}.parametrizations.weight.original": w == 0 for name, w in weights.items()}

    def _may_be_masked(self, chunk: Chunk, values: Tensor, dead: Mapping[str, Tensor] = {}) -> Tensor:
        """Which values of parameters may have been set to zero, (n,): those in slices of zeros.

        `dead` is where the quantized weights were zero already, of the parameters of which that is known.
        """
        zero = (values == 0) & self.masked
        for name, part in chunk.split(zero).items() if self.masked else ():
            shape = self.parameters[name].shape
            if len(shape) == 4 and part.numel() == shape.numel():
                w = part.view(shape)  # of the same memory
                w &= dead.get(name, w)
                filters, inputs = w.all((1, 2, 3), keepdim=True), w.all((0, 2, 3), keepdim=True)
                w.copy_(filters | inputs)
        return zero

    def _group_of(self, name: str) -> int | None:
        """The place of a parameter's group in the optimizer, None where it is in none."""
        return self.places.get(id(self.parameters[name]))

    def _must_train(self, name: str) -> bool:
        """Whether a parameter of this name has to be trained; one may freeze what is one's own."""
        if not self.ours:
            return False
        if "quantizer" not in name:
            return True
        owner, _, parameter = name.rpartition(".")
        quantizer: Any = self.model.get_submodule(owner)
        if type(quantizer) is not DeadZoneLDZCompander:
            return False
        return quantizer.learnable_bit if parameter == "logit_bit" else quantizer.learnable_deadzone

    def _moves(self, name: str) -> bool:
        """Whether a parameter moved in a step that was looked at. A single number may end where it began."""
        pairs = (
            [_split(self.parameters, x)[name] for x in (u.before, u.after)] for u in self.batches.updates
        )
        return any(not torch.equal(before, after) for before, after in pairs)

    def _is_dead(self, name: str) -> bool:
        """Whether a parameter is of a layer without a weight left, to which no gradient comes."""
        layer = name.partition(".parametrizations")[0]
        return layer in self.weights_before and not bool((self.weights_before[layer] != 0).any())

    def _dead(self, weights: dict[str, Tensor]) -> dict[tuple[str, int], Tensor]:
        """The dead filters and input slices of the blocks' convolutions, which channel groups hold."""
        dead = {}
        for layer, w in weights.items():
            if re.fullmatch(BLOCK_CONVOLUTION, layer):
                dead[layer, 0] = ~(w != 0).any((1, 2, 3))
                if layer != "layer1.0.conv1":  # it reads the stem, whose channels are no group's
                    dead[layer, 1] = ~(w != 0).any((0, 2, 3))
        return dead

    def _with_other_ranks(self, found: list[Check]) -> list[Check]:
        failed = torch.tensor([float(c.status == FAIL) for c in found], device=self.step.device)
        elsewhere = self.processes.sum(failed)
        return [
            Check(FAIL, c.name, f"another rank found it wrong; here: {c.message}")
            if there and c.status != FAIL
            else c
            for c, there in zip(found, elsewhere.tolist(), strict=True)
        ]


def checkpoint_is_the_state(path: Path, step: TrainingStep) -> Check:
    """Whether a checkpoint, read back, holds what the epoch left: `--resume` would go on from that."""
    name, cause = "checkpoint", "--resume would go on from another state (experiments/checkpoint.py)"
    try:
        held = left_in(load_checkpoint(path), step)
    except (ValueError, KeyError) as error:
        return judge(False, name, f"{path.name} cannot be read back: {error}", cause)
    other = [part for part, row in held.items() if not torch.equal(row, step.left[part])]
    return judge(not other, name, f"{path.name} holds other {some(other)} than the epoch left", cause)


def is_thorough(epoch: int, epochs: int) -> bool:
    """Whether an epoch (from 0) is one of those in which what takes as long as steps do is looked at too."""
    return epoch < 3 or epoch % 4 == 0 or epoch == epochs - 1


def adamw_reach(beta1: float, beta2: float, before: int, steps: int) -> float:
    """How far AdamW can move a number in `steps` steps after `before` others, in learning rates; no decay.

    With m = (1 - b1) sum b1^(t-i) g_i and v = (1 - b2) sum b2^(t-i) g_i^2, Cauchy and Schwarz give
    |m| <= sqrt(v) (1 - b1) / sqrt(1 - b2) sqrt(sum_k (b1^2 / b2)^k), k from 0 to t - 1.

    >>> adamw_reach(0.9, 0.99, before=0, steps=1)
    1.0
    >>> round(adamw_reach(0.9, 0.99, before=1000, steps=1), 3)  # 0.1 / sqrt(0.01 (1 - 0.81 / 0.99))
    2.345
    """
    if beta2 == 0:
        return math.inf
    r, total = beta1**2 / beta2, 0.0
    for t in range(before + 1, before + steps + 1):
        try:
            series = t if r == 1 else (r**t - 1) / (r - 1)
        except OverflowError:
            return math.inf
        scale = (1 - beta1) / (1 - beta1**t) * math.sqrt((1 - beta2**t) / (1 - beta2))
        total += scale * math.sqrt(series)
    return round(total, 9)


def _bits(quantizer: Any) -> float:
    """The learned bit-width of a quantizer of ours from its logit, in float64; of another, what it uses."""
    if type(quantizer) is not DeadZoneLDZCompander:
        return float(quantizer.get_bitwidth())
    if not quantizer.learnable_bit:
        return float(quantizer.fixed_bit_val)
    return 2 + (quantizer.max_bits - 2) * abs(math.tanh(quantizer.logit_bit.item()))


def _learned_bits(quantizer: Any) -> Tensor:
    """The learned bit-width of a quantizer of ours from its logit, (1,), with a gradient to it."""
    if not quantizer.learnable_bit:
        return torch.full_like(quantizer.logit_bit, quantizer.fixed_bit_val)
    return 2 + (quantizer.max_bits - 2) * quantizer.logit_bit.tanh().abs()


def _quantized(model: nn.Module) -> dict[str, Any]:
    return {name: model.get_submodule(name) for name in quantizers(model)}


def _normalised(pixels: Tensor) -> Tensor:
    """Images as a network gets them: (N, 32, 32, 3), grey levels from 0 to 255 -> (N, 3, 32, 32)."""
    images = (pixels.float() / 255 - torch.tensor(reference.MEAN)) / torch.tensor(reference.STD)
    return images.permute(0, 3, 1, 2)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of a loss at a model's parameters; none is left there."""
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _shares(found: Mapping[str, Tensor], due: Mapping[str, Tensor]) -> dict[str, float]:
    """How far away each gradient is, relative to its own size.

    That of a single number is a sum in which much cancels: relative to what is usual for its name.
    """
    wanted = {n: due[n] if n in due else torch.zeros_like(g) for n, g in found.items()}
    sizes = numbers([g.norm() for g in wanted.values()])
    off = numbers([(g - wanted[n]).norm() for n, g in found.items()])
    # Where a sum of large numbers is nearly nothing, rounding is measured by what the others are.
    least = 1e-3 * max(sizes, default=0.0)
    squares = defaultdict(list)
    for n, size in zip(found, sizes, strict=True):
        if found[n].numel() == 1:
            squares[n.rpartition(".")[2]].append(size**2)
    usual = {kind: math.sqrt(sum(of_all) / len(of_all)) for kind, of_all in squares.items()}
    tiny = 1e-3 * least
    floors = [max(usual[n.rpartition(".")[2]], tiny) if g.numel() == 1 else least for n, g in found.items()]
    sizes = [max(size, floor, 1e-30) for size, floor in zip(sizes, floors, strict=True)]
    return {n: distance / size for n, size, distance in zip(found, sizes, off, strict=True)}


def _directions(found: Mapping[str, Tensor], due: Mapping[str, Tensor]) -> dict[str, float]:
    """How much of each gradient is left in its direction, of tensors that are not nearly nothing."""
    squares = dict(zip(due, numbers([g.square().sum() for g in due.values()]), strict=True))
    least = 1e-6 * max(squares.values(), default=0.0)
    large = [n for n, g in due.items() if n in found and g.numel() >= MANY and squares[n] > least]
    along = numbers([(found[n] * due[n]).sum() for n in large])
    return {n: one / squares[n] for n, one in zip(large, along, strict=True)}


def _judge(wrong: Wrong, name: str, held: str, cause: str) -> Check:
    return judge(not wrong, name, some(wrong, "; ") or held, cause)


def _channels(layer: LayerRecord | LayerCount) -> tuple[int, int, int]:
    return layer.alive_channels, layer.constant_channels, layer.null_channels


def _close(a: float, b: float, relative: float, size: float = 0.0) -> bool:
    """Whether two numbers are equal to rounding, `size` being the least that rounding is measured by."""
    return math.isfinite(a) and abs(a - b) <= relative * max(abs(a), abs(b), size)


def _number(*numbers: float) -> str:
    return " and ".join(f"{n:.6g}" for n in sorted(numbers)[:2])


def _kind(thing: object) -> str:
    return type(thing).__name__


def _split(parameters: dict[str, nn.Parameter], row: Tensor) -> dict[str, Tensor]:
    """A row of all parameters' numbers into those of each, by name."""
    return dict(zip(parameters, row.split([p.numel() for p in parameters.values()]), strict=True))
