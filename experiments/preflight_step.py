"""Preflight checks of the training step: its loss, its gradients, and what the optimizer does with them."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experiments import reference
from experiments.draws import same_draws
from experiments.expect import (
    PROBE_IMAGES,
    BrokenError,
    NotApplicableError,
    Subject,
    expect,
    expect_close,
    used_weights,
)
from experiments.history import some
from experiments.training import TrainingStep, autocast
from utils_quantization import quantized_layers

LEARNING_STEPS = 12
GRADIENT = 1e-7  # of the largest number; a single number may be a sum that nearly cancels
# Of the largest gradient of all: a tensor of smaller ones may be of sums that cancel, as a bias in front of a
# batch norm.
CANCELLED = 1e-6


LOOKED_AT = 1 << 20  # numbers of a tensor that a trace keeps, the first; the tensors of resnet.py are smaller


@dataclass
class Trace:
    """What one or two training steps did, looked at from outside."""

    coefficient: float
    given: Tensor  # images of the step that is taken now
    before: list[dict[str, Tensor]] = field(default_factory=list)  # the state before each step
    after: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)  # at the optimizer's step
    wanted: list[dict[str, Tensor | None]] = field(default_factory=list)  # from an autograd of our own
    logits: list[Tensor] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)  # modules in evaluation mode, at each forward pass
    changed: int = 0  # forward passes on other images than the step was given
    returned: list[Tensor] = field(default_factory=list)
    cross_entropy: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    dead: list[list[reference.Member]] = field(default_factory=list)  # before each step
    cleared: list[str] = field(default_factory=list)  # parameters without a gradient behind a step


def trace_of(subject: Subject, penalised: bool) -> Trace:
    """Two steps of the float64 copy, with the penalty acting or not; taken once."""
    if penalised not in subject.traces:
        subject.traces[penalised] = _trace(subject, penalised)
    return subject.traces[penalised]


def _trace(subject: Subject, penalised: bool) -> Trace:
    step = subject.float64_step()
    images, labels = subject.probe
    trace = Trace((subject.pipeline.settings.sparsity_weight or 1e-3) if penalised else 0.0, images)
    # Steps so long that they throw dead weights out of the dead zone: held at zero, they stay dead.
    for group in step.optimizer.param_groups:
        group["lr"] = group["lr"] * longer(subject)
    _watch(step, trace)
    step.model.train()
    for shift in (0, 1):
        turned = images.roll(shift, 0), labels.roll(shift, 0)
        trace.given = turned[0].clone()
        trace.before.append(_state(step.model))
        with same_draws():
            trace.wanted.append(_own_gradients(step, *turned, trace))
        if subject.own_network:
            weights = used_weights(step.model)
            convolutions = {n: weights[n] for n in quantized_layers(step.model) if weights[n].ndim == 4}
            trace.dead.append(reference.dead_members(convolutions, subject.blocks))
        with same_draws():
            trace.returned.append(step(*turned, trace.coefficient, len(labels)).detach().clone())
        trace.after.append(_state(step.model))
        had = trace.gradients[-1] if trace.gradients else {}
        trace.cleared += [n for n, p in step.model.named_parameters() if p.grad is None and _any(had.get(n))]
    return trace


def longer(subject: Subject) -> float:
    """What the rates of the traced steps are multiplied by."""
    return 10.0 if subject.pipeline.settings.weights_lr <= 1 else 1.0


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: _looked_at(value) for name, value in model.named_parameters()}


def _looked_at(value: Tensor) -> Tensor:
    """A copy of a tensor, or of the beginning of a large one, as a flat tensor."""
    value = value.detach()
    return (value if value.numel() <= LOOKED_AT else value.flatten()[:LOOKED_AT]).clone()


def _watch(step: TrainingStep, trace: Trace) -> None:
    """Note what the step hands to the network, and the gradients that it hands to the optimizer."""
    model = step.model

    def forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        trace.changed += not torch.equal(inputs[0], trace.given)
        trace.modes += [n or "the network" for n, m in model.named_modules() if not m.training]

    def logits(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        trace.logits.append(output.detach().clone())

    def optimize(*_: Any) -> None:
        trace.gradients.append(
            {n: None if p.grad is None else _looked_at(p.grad) for n, p in model.named_parameters()}
        )

    model.register_forward_pre_hook(forward)
    model.register_forward_hook(logits)
    step.optimizer.register_step_pre_hook(optimize)


def _own_gradients(
    step: TrainingStep, images: Tensor, labels: Tensor, trace: Trace
) -> dict[str, Tensor | None]:
    """Gradients of cross-entropy plus coefficient times penalty by an autograd of our own, on a copy."""
    twin = copy.deepcopy(step.model).train()
    twin.zero_grad()
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    with parametrize.cached():  # as in the step
        with autocast(step.device, step.precision):
            logits = twin(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cross_entropy = reference.cross_entropy(logits, labels)
        penalty = step.penalty(twin)
    trace.cross_entropy.append(cross_entropy.item())
    trace.penalty.append(penalty.item())
    trained = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    loss = cross_entropy + trace.coefficient * penalty
    loss.backward()
    return {n: None if p.grad is None else _looked_at(p.grad) for n, p in trained.items()}


def loss_is_what_it_says(subject: Subject) -> str:
    """The step runs in training mode, and returns cross-entropy plus coefficient times penalty."""
    for penalised in (False, True):
        trace = trace_of(subject, penalised)
        modes = trace.modes if subject.own_network else [n for n in trace.modes if n == "the network"]
        expect(
            not modes,
            f"in evaluation mode while training: {some(sorted(set(modes)))}",
            "a training step in evaluation mode, or batch norms that are kept in it",
        )
        expect(
            not trace.changed,
            f"{trace.changed} of {len(trace.returned)} steps run on other images than they are given",
            "images are changed inside the step (mixed, cut out, noise, scaled)",
        )
        labels = subject.probe[1]
        for i, (returned, penalty) in enumerate(zip(trace.returned, trace.penalty, strict=True)):
            expect(
                len(trace.logits) == len(trace.returned),
                f"{len(trace.logits)} forward passes in {len(trace.returned)} steps",
                "the network runs more or less than once a step",
            )
            ours = reference.cross_entropy(trace.logits[i], labels.roll(i, 0)).item()
            loss, cross_entropy = (float(x) for x in returned[:2])
            expect(
                abs(cross_entropy - ours) < 1e-7 * max(1, abs(ours)),
                f"the cross-entropy is said to be {cross_entropy:.6f}, and the logits give {ours:.6f}",
                "the loss is no plain cross-entropy of the logits (a second softmax, label smoothing, a sum, "
                "shifted labels)",
            )
            wanted = ours + trace.coefficient * penalty
            expect(
                abs(loss - wanted) < 1e-7 * max(1, abs(wanted)),
                f"the loss is {loss:.6f}; cross-entropy {ours:.6f} + {trace.coefficient:g} x penalty "
                f"{penalty:.4f} = {wanted:.6f}",
                "the penalty's coefficient is not applied, applied twice, or not reported"
                if trace.coefficient
                else "a further term in the loss, such as weight decay or distillation",
            )
    return f"cross-entropy + coefficient x penalty in {2 * len(trace.returned)} steps"


def gradients_are_the_losss(subject: Subject) -> str:
    """What reaches the optimizer are the gradients of the loss of this step, at every trained parameter."""
    count, worst = 0, 0.0
    for penalised in (False, True):
        trace = trace_of(subject, penalised)
        expect(
            len(trace.gradients) == len(trace.returned),
            f"the optimizer stepped {len(trace.gradients)} times in {len(trace.returned)} training steps",
            "optimizer.step is not called once a step",
        )
        for number, (found, wanted) in enumerate(zip(trace.gradients, trace.wanted, strict=True), 1):
            silent = [n for n, g in wanted.items() if _any(g) and not _any(found[n])]
            expect(
                not silent,
                f"no gradient at {len(silent)} of {len(wanted)} parameters: {some(silent)}",
                "backward is not called, gradients are cleared before the optimizer's step (zero_grad), or a "
                "parameter is detached from the loss",
            )
            expect(
                not trace.cleared,
                f"no gradient is left behind a step at {some(trace.cleared)}",
                "zero_grad behind the optimizer's step: the records of an epoch and the ledger read the last "
                "step's gradients, so clear them before the next",
            )
            dead = [n for n, g in wanted.items() if not _any(g)]
            expect(
                not dead or subject.may_skip or subject.resumed,  # or died in the run before it was stopped
                f"the loss has no gradient at {len(dead)} of {len(wanted)} parameters: {some(dead)}",
                "parts of the network are detached or dead",
            )
            largest = CANCELLED * max(g.abs().max().item() for g in wanted.values() if g is not None)
            for name, gradient in wanted.items():
                ours = found[name]
                if ours is None and not _any(gradient):  # of a layer that was left out
                    continue
                assert gradient is not None and ours is not None
                if number == 1:
                    cause = (
                        "gradients are scaled, clipped, rounded or zeroed between backward and the optimizer"
                        if not penalised
                        else "the penalty's part of the gradient: its coefficient, or its gradient is changed"
                    )
                else:
                    cause = "gradients are not zeroed between steps, or of another batch"
                apart = (ours - gradient).abs() > GRADIENT * max(gradient.abs().max().item(), largest)
                if apart.any() and not ours[apart].any():
                    cause = "a part of the gradient is set to zero (a mask on it) before the optimizer's step"
                worst = max(
                    worst,
                    expect_close(
                        ours, gradient, f"step {number}: the gradient at {name}", cause, GRADIENT, largest
                    ),
                )
            count = len(wanted)
    low = subject.pipeline.settings.precision == "bf16" and subject.step.processes.count == 1
    if low:
        _compare_in_bf16(subject)
    return f"{count} parameters, to {worst:.0e}, over two steps" + " in float64, and one in bf16" * low


def _compare_in_bf16(subject: Subject) -> None:
    """The gradients of a step in the run's own precision, against an autograd of our own in the same."""
    step = subject.copied_step()
    images, labels = (t[:PROBE_IMAGES].contiguous() for t in subject.first_batch)
    trace = Trace(subject.pipeline.settings.sparsity_weight, images.clone())
    _watch(step, trace)
    step.model.train()
    with same_draws():
        wanted = _own_gradients(step, images, labels, trace)
    with same_draws():
        step(images, labels, trace.coefficient, len(labels))
    largest = max((g.abs().max().item() for g in wanted.values() if g is not None), default=0.0)
    for name, gradient in wanted.items():
        ours = trace.gradients[0][name]
        if gradient is not None:
            expect_close(
                torch.zeros_like(gradient) if ours is None else ours,
                gradient,
                f"in bf16, the gradient at {name}",
                "gradients are scaled, clipped, rounded or zeroed in mixed precision alone",
                5e-2,
                1e-2 * largest,
            )


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def expected_rates(subject: Subject) -> dict[str, tuple[float, float]]:
    """The peak learning rate and the decay of each group of the optimizer, by its name, from the settings."""
    settings, batches = subject.pipeline.settings, subject.pipeline.train_batches
    steps = settings.epochs * len(batches)
    slower = settings.pace_steps / steps if 0 < settings.pace_steps < steps else 1.0
    return {
        "weights": (settings.weights_lr, settings.weights_decay * slower**0.5),
        "bit": (settings.bit_lr * slower, settings.bit_decay),
        "deadzone": (settings.deadzone_lr * slower, settings.deadzone_decay),
    }


def optimizer_has_the_settings(subject: Subject) -> str:
    """Rates, decays and betas of each group, and which parameters are in which."""
    optimizer, settings = subject.step.optimizer, subject.pipeline.settings
    expect(
        isinstance(optimizer, torch.optim.AdamW),
        f"the optimizer is {type(optimizer).__name__}",
        "another optimizer than AdamW",
    )
    rates = expected_rates(subject)
    names = {id(p): n for n, p in subject.pipeline.model.named_parameters()}
    for group in optimizer.param_groups:
        kind = _kind_of_group(subject, group)
        rate, decay = rates[kind]
        found = group.get("peak_lr", float(group["lr"]))
        expect(
            math.isclose(found, rate, rel_tol=1e-6),
            f"the group {kind!r} has a peak learning rate of {found:g}, the settings say {rate:g}",
            f"--{kind}-lr (or --pace-steps) does not reach its group",
        )
        expect(
            math.isclose(group["weight_decay"], decay, rel_tol=1e-9),
            f"the group {kind!r} has a decay of {group['weight_decay']:g}, the settings say {decay:g}",
            f"--{kind}-decay (or --pace-steps) does not reach its group",
        )
        expect(
            tuple(group["betas"]) == (0.9, settings.beta2),
            f"betas are {group['betas']}, expected (0.9, {settings.beta2:g})",
            "--beta2 does not reach AdamW",
        )
        odd = [
            n for p in group["params"] if (n := names.get(id(p))) and _kind(subject, n) not in (kind, None)
        ]
        expect(
            not odd,
            f"the group {kind!r} holds {some(odd)}",
            "parameters are in another group's hands: "
            "rates and decays of weights, bit and dead-zone parameters are mixed up",
        )
    return ", ".join(f"{g.get('name')} {float(g['lr']):g}" for g in optimizer.param_groups)


def _kind_of_group(subject: Subject, group: dict[str, Any]) -> str:
    """The settings' group whose rates a group of the optimizer has to have: by its name or by its content."""
    name = group.get("name", "weights")
    if name in expected_rates(subject):
        return name
    names = {id(p): n for n, p in subject.pipeline.model.named_parameters()}
    kinds = [_kind(subject, names[id(p)]) for p in group["params"] if id(p) in names]
    return next((kind for kind in kinds if kind), "weights")


def _kind(subject: Subject, name: str) -> str | None:
    """The group that a parameter belongs to; None where that is a foreign quantizer's choice."""
    if ".quantizer." not in name:
        return "weights"
    if not subject.own_quantizers:
        return None
    return "bit" if name.endswith("logit_bit") else "deadzone"


def updates_are_adamws(subject: Subject) -> str:
    """What two steps did to every parameter against AdamW's formulas; dead slices are kept at zero."""
    settings, rates = subject.pipeline.settings, expected_rates(subject)
    kinds = {
        id(p): _kind_of_group(subject, group)
        for group in subject.step.optimizer.param_groups
        for p in group["params"]
    }
    of = {n: kinds[id(p)] for n, p in subject.pipeline.model.named_parameters() if id(p) in kinds}
    state = {n: subject.step.optimizer.state.get(p, {}) for n, p in subject.pipeline.model.named_parameters()}
    kept = 0
    for penalised in (False, True):
        trace = trace_of(subject, penalised)
        for name, kind in of.items():
            rate, decay = rates[kind][0] * longer(subject), rates[kind][1]
            adamw = reference.AdamW(rate, decay, 0.9, settings.beta2)
            zero = torch.zeros_like(trace.before[0][name])
            moments = (_looked_at(state[name].get(key, zero)) for key in ("exp_avg", "exp_avg_sq"))
            first, second = (moment.to(zero) for moment in moments)
            done = int(state[name].get("step", 0))
            for i in (0, 1):
                before, gradient = trace.before[i][name], trace.gradients[i][name]
                if gradient is None and subject.may_skip:
                    continue
                if gradient is None:
                    raise BrokenError(f"{name} has no gradient", "a parameter is detached from the loss")
                wanted, first, second = adamw.step(before, gradient, first, second, done + i + 1)
                mask = torch.ones_like(wanted)
                if penalised and settings.keep_dead and subject.own_network and name.endswith(".original"):
                    layer = name.partition(".parametrizations")[0]
                    for of_layer, side, number in trace.dead[i]:
                        if of_layer == layer:
                            reference.slice_of(mask, side, number).zero_()
                            kept += 1
                after = trace.after[i][name]
                alive = (after[mask == 0] != 0).sum().item()
                expect(
                    alive == 0,
                    f"{alive} stored weights of dead filters and input slices of {name} moved from zero",
                    "--keep-dead: dead slices are not held at zero after the optimizer's step",
                )
                if not penalised or not settings.keep_dead or subject.own_network:
                    distance = (after - wanted * mask).abs().max().item()
                    stray = ((after == 0) & (wanted * mask != 0)).sum().item()
                    expect(
                        stray == 0,
                        f"{stray} weights of {name} were set to zero that are not dead",
                        "--keep-dead: the mask of dead slices is wrong",
                    )
                    expect(
                        distance <= 1e-5 * rate + 1e-12,
                        f"step {i + 1}: {name} is {distance:.3g} away from "
                        f"AdamW's update (rate {rate:g}, decay {decay:g})",
                        "the optimizer's arithmetic: not AdamW, another rate, decay, beta or epsilon, or "
                        "weights changed beside it",
                    )
    return f"{len(of)} parameters over two steps" + (f", {kept} dead slices held at zero" if kept else "")


def it_can_learn(subject: Subject) -> str:
    """A few steps on 16 images at the run's rates bring their cross-entropy down."""
    step = subject.copied_step()
    images, labels = (t[:16] for t in subject.first_batch)
    if len(labels) < 2 or step.processes.count > 1:
        raise NotApplicableError("needs 2 images or more in one rank")
    rates = expected_rates(subject)
    for group in step.optimizer.param_groups:
        rate = rates[_kind_of_group(subject, group)][0]
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
    step.model.train()
    losses = []
    for _ in range(LEARNING_STEPS):
        with same_draws():  # the noise of dropout would hide what a few steps gain
            losses.append(float(step(images, labels, 0.0, len(labels))[1]))
    measured = f"cross-entropy on 16 images {losses[0]:.2f} -> {losses[-1]:.2f} in {LEARNING_STEPS} steps"
    if subject.pipeline.settings.weights_lr < 1e-4:
        raise NotApplicableError(f"{measured}; --weights-lr is too small to tell")
    left = 0.75 if subject.own_network else 0.9  # of another network it is not known how fast it learns
    expect(
        min(losses[-3:]) < left * losses[0],
        measured,
        "the network does not learn: --weights-lr far off, a "
        "gradient that does not arrive, or labels changed in the step",
    )
    return measured
