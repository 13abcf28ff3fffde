"""Preflight checks of network, quantizers, penalty, loss and optimizer, against the slow reference in float64."""

import copy
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experiments import reference
from experiments.expect import (
    BrokenError,
    NotApplicableError,
    Subject,
    expect,
    expect_close,
    some,
    stored_weight,
    used_weights,
)
from experiments.training import TrainingStep
from src.quantizer import MIN_BITS
from utils_quantization import quantized_layers, weight_quantization

LEARNING_STEPS = 12
GRADIENT = 1e-4  # of the largest number: the step takes its loss from logits in float32
EXACT = 1e-8  # of the largest number, for float64 arithmetic in another order


# The model as the run built it.


def layers_are_quantized(subject: Subject) -> str:
    """The layers that the settings name have a quantizer of their own, switched on, and no others have."""
    model, patterns = subject.pipeline.model, subject.pipeline.settings.exclude_layers
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    wanted = [n for n in layers if not any(re.search(pattern, n) for pattern in patterns)]
    found = quantized_layers(model)
    missing, extra = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    expect(
        not missing and not extra,
        f"without a quantizer: {some(missing) or 'none'}; with one too many: {some(extra) or 'none'}",
        "--exclude-layers is not applied as it says",
    )
    off = [n for n, layer in found.items() if not weight_quantization(layer).enabled]  # type: ignore[union-attr]
    expect(not off, f"switched off: {some(off)}", "quantization is toggled off before training")
    quantizers = subject.quantizers(model)
    own = {id(q) for q in quantizers.values()}
    parameters = [id(p) for q in quantizers.values() for p in q.parameters()]
    expect(
        len(own) == len(quantizers) and len(set(parameters)) == len(parameters),
        f"{len(quantizers)} layers share {len(own)} quantizers",
        "one quantizer object is attached to several layers",
    )
    modules = [id(m) for _, m in model.named_modules(remove_duplicate=False)]
    expect(
        len(modules) == len(set(modules)) or not subject.own_network,
        "modules occur twice in the network",
        "layers share their weights",
    )
    return f"{len(found)} of {len(layers)} layers, each with its own"


def start_is_fresh(subject: Subject) -> str:
    """Before the first step: Kaiming-normal weights, neutral batch norms, quantizers as they are made."""
    if subject.resumed:
        raise NotApplicableError("the run was resumed from a checkpoint")
    if not subject.own_network:
        raise NotApplicableError("the network is not one of resnet.py")
    model = subject.pipeline.model
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            quantized = parametrize.is_parametrized(layer, "weight")
            w: Any = layer.parametrizations.weight.original if quantized else layer.weight  # type: ignore[union-attr]
            expected = math.sqrt(2 / w[0].numel())
            off = abs(w.double().std().item() / expected - 1)
            expect(
                off < 5 / math.sqrt(2 * w.numel()),
                f"the weights of {name} have standard deviation "
                f"{w.std().item():.3g}, Kaiming's is {expected:.3g}",
                "another initialization than resnet.py's (fan-in, ReLU gain)",
            )
        elif isinstance(layer, nn.BatchNorm2d):
            neutral = [(layer.weight, 1), (layer.bias, 0), (layer.running_mean, 0), (layer.running_var, 1)]
            expect(
                all(bool((t == number).all()) for t, number in neutral if t is not None),
                f"{name} is not neutral (scale 1, shift 0, mean 0, variance 1)",
                "batch norms were trained, loaded or fed before the first step",
            )
    counts = [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]  # type: ignore[union-attr]
    expect(
        not any(counts),
        f"batch norms have seen up to {max(counts)} batches",
        "something ran through the network in training mode before the first step",
    )
    return f"{sum(p.numel() for p in model.parameters()):,} parameters as resnet.py makes them"


def optimizer_has_every_parameter(subject: Subject) -> str:
    """Each trained parameter of the model is in exactly one group of the optimizer, and nothing else is."""
    model, groups = subject.pipeline.model, subject.step.optimizer.param_groups
    held = [id(p) for group in groups for p in group["params"]]
    names = {id(p): n for n, p in model.named_parameters()}
    frozen = [
        n for n, p in model.named_parameters() if not p.requires_grad and not _meant_to_be_fixed(subject, n)
    ]
    expect(
        not frozen,
        f"{len(frozen)} parameters have requires_grad False: {some(frozen)}",
        "parameters are frozen",
    )
    missing = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    expect(
        not missing,
        f"{len(missing)} of {len(names)} parameters are in no group of the optimizer: {some(missing)}",
        "the optimizer was given only a part of the model's parameters",
    )
    foreign = [i for i in held if i not in names]
    expect(
        not foreign,
        f"{len(foreign)} parameters of the optimizer are not the model's",
        "the model was rebuilt, copied or re-parametrized after the optimizer was made",
    )
    expect(
        len(held) == len(set(held)),
        "a parameter is in two groups of the optimizer",
        "the optimizer's groups overlap",
    )
    return f"{len(held)} parameters in {len(groups)} groups"


def _meant_to_be_fixed(subject: Subject, name: str) -> bool:
    """Quantizers may have parameters that are not learnable."""
    return (".quantizer." in name and not subject.own_quantizers) or (
        ".quantizer." in name and not _learns(subject, name)
    )


def _learns(subject: Subject, name: str) -> bool:
    quantizer: Any = subject.pipeline.model.get_submodule(name.rpartition(".")[0])
    return quantizer.learnable_bit if name.endswith("logit_bit") else quantizer.learnable_deadzone


# Quantizers.


def quantizers_keep_their_word(subject: Subject) -> str:
    """Properties of any quantizer, on each layer's weights: levels, order, sign, zeros, a gradient to all."""
    model = subject.float64_step().model
    computed = used_weights(model)
    for name, layer in quantized_layers(model).items():
        quantizer = subject.quantizers(model)[name]
        w = stored_weight(layer)
        leaf = w.clone().requires_grad_()
        out = quantizer(leaf)
        expect(
            out.shape == w.shape and bool(out.isfinite().all()),
            f"{name}: shape {tuple(out.shape)}, finite: {bool(out.isfinite().all())}",
            "the quantizer breaks its input",
        )
        bits = float(quantizer.get_bitwidth().detach())
        levels = len(out.unique())
        expect(bits == round(bits) and bits >= 1, f"{name} claims {bits} bits", "bit-widths are not rounded")
        expect(
            levels <= 2**bits,
            f"{name} has {levels} different values where {bits:.0f} bits give at most {2**bits:.0f}",
            "the number of levels does not follow from the bit-width that is counted",
        )
        order = w.flatten().argsort()
        falls = (out.detach().flatten()[order].diff() < -1e-9 * out.abs().max()).any()
        expect(
            not falls,
            f"{name}: a larger weight becomes a smaller one",
            "sign, step size or shift of the quantizer",
        )
        wrong_sign = ((out * w) < 0).sum().item()
        expect(wrong_sign == 0, f"{name}: {wrong_sign} weights change their sign", "the quantizer's sign")
        expect(
            bool((quantizer(torch.zeros_like(w)) == 0).all()),
            f"{name}: zeros do not stay zero",
            "the quantizer's shift or rounding at zero",
        )
        g = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=w.dtype).to(w.device)
        (gradient,) = torch.autograd.grad((out * g).sum(), leaf, retain_graph=True, allow_unused=True)
        reached = 0.0 if gradient is None else (gradient[w != 0] != 0).double().mean().item()
        expect(
            reached > 0.5,
            f"{name}: a gradient reaches {100 * reached:.0f} % of the stored weights",
            "no straight-through gradient: rounding, clipping or the dead zone cuts it off",
        )
        expect(
            bool((computed[name] == quantizer(w)).all()),
            f"{name} computes with other weights than its quantizer gives",
            "quantization is not applied in the layer",
        )
    return f"{len(quantized_layers(model))} quantizers: levels, order, zeros and gradients"


def quantizers_follow_the_formula(subject: Subject) -> str:
    """Values and gradients of the dead-zone quantizer against its formulas in plain autograd."""
    if not subject.own_quantizers:
        raise NotApplicableError("the quantizer is not this project's, so its formulas are not known")
    model = subject.float64_step().model
    generator = torch.Generator().manual_seed(2)
    worst = 0.0
    for name, quantizer in subject.quantizers(model).items():
        layer = model.get_submodule(name)
        w = stored_weight(layer)
        half = (w.abs() <= _half_dead_zone(quantizer, w) * (1 - 1e-9)) & (quantizer(w) != 0)
        cause = "the dead zone: its width, the range quantile or the shift in src/quantizer.py"
        expect(not half.any(), f"{name}: {int(half.sum())} weights inside the dead zone are not zero", cause)
        bits = _learned_bits(quantizer)
        used = quantizer.get_bitwidth()
        expect(
            bool(used == bits.round()),
            f"{name} uses {float(used.detach())} bits where tanh of its logit gives "
            f"{float(bits):.3f}, rounded {float(bits.round()):.0f}",
            "the bit-width's formula (rounding, maximum, tanh)",
        )
        found = quantizer(w)
        wanted = reference.quantize(w, bits, quantizer.logit_dz)
        zeros = ((found == 0) != (wanted == 0)).sum().item()
        expect(
            zeros == 0, f"{name}: {zeros} weights are zero that should not be, or the other way round", cause
        )
        worst = max(
            worst,
            expect_close(
                found,
                wanted,
                f"{name}'s quantized weights",
                "step size, shift, rounding or number of levels in src/quantizer.py",
                EXACT,
            ),
        )
        worst = max(worst, _compare_gradients(name, quantizer, w, generator))
    return f"values to {worst:.0e}, gradients to stored weights and both logits"


def _half_dead_zone(quantizer: Any, w: Tensor) -> Tensor:
    r = torch.quantile(w.abs().flatten(), 0.99)
    return r * (1 - quantizer.logit_dz.detach().tanh().abs())


def _learned_bits(quantizer: Any) -> Tensor:
    if not quantizer.learnable_bit:
        return torch.full_like(quantizer.logit_bit, quantizer.fixed_bit_val)
    return MIN_BITS + (quantizer.max_bits - MIN_BITS) * quantizer.logit_bit.tanh().abs()


def _compare_gradients(name: str, quantizer: Any, w: Tensor, generator: torch.Generator) -> float:
    g = torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
    gradients, worst = [], 0.0
    for quantize in (
        quantizer,
        lambda x: reference.quantize(x, _learned_bits(quantizer), quantizer.logit_dz),
    ):
        leaf = w.clone().requires_grad_()
        learned = [p for p in (quantizer.logit_bit, quantizer.logit_dz) if p.requires_grad]
        found = torch.autograd.grad((quantize(leaf) * g).sum(), [leaf, *learned], allow_unused=True)
        gradients.append(
            [torch.zeros_like(p) if x is None else x for x, p in zip(found, [leaf, *learned], strict=True)]
        )
    # A stored weight of exactly zero is kept dead: whether a gradient reaches it is a choice.
    gradients = [[found[0] * (w != 0), *found[1:]] for found in gradients]
    names = [
        "the stored weights",
        *(
            n
            for n, p in (("the bit logit", quantizer.logit_bit), ("the dead-zone logit", quantizer.logit_dz))
            if p.requires_grad
        ),
    ]
    for what, ours, theirs in zip(names, *gradients, strict=True):
        cause = f"the quantizer's backward pass: the gradient to {what} (src/quantizer.py)"
        worst = max(worst, expect_close(ours, theirs, f"{name}: the gradient to {what}", cause, 1e-6))
    return worst


# The network.


def network_is_the_reference(subject: Subject) -> str:
    """Logits, running statistics and gradients of the network against a list of plain function calls."""
    if not subject.own_network:
        raise NotApplicableError("the network is not one of resnet.py")
    model: Any = subject.float64_step().model
    images, _ = subject.probe
    worst = 0.0
    for training in (True, False):
        model.train(training)
        weights = used_weights(model)
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        values = {n: v.detach().clone() for n, v in model.state_dict().items()}
        plain = reference.Network(values, leaves, subject.blocks, training)
        wanted, found = plain(images), model(images)
        mode = "training" if training else "evaluation"
        worst = max(
            worst,
            expect_close(
                found,
                wanted,
                f"logits in {mode} mode",
                "the network's forward pass (resnet.py: order of layers, shortcut, ReLU, batch norm), or "
                "layers that do not compute with their quantized weights",
                EXACT,
            ),
        )
        if training:
            for name, value in model.state_dict().items():
                if "running" in name:
                    expect_close(
                        value,
                        plain.values[name],
                        name,
                        "batch norm's running statistics (momentum, mode)",
                        EXACT,
                    )
        else:
            _compare_network_gradients(model, found, wanted, leaves)
    return f"logits to {worst:.0e} in both modes, running statistics, gradients"


def _compare_network_gradients(model: Any, found: Tensor, wanted: Tensor, leaves: dict[str, Tensor]) -> None:
    g = torch.randn(found.shape, generator=torch.Generator().manual_seed(3), dtype=found.dtype).to(
        found.device
    )
    theirs = torch.autograd.grad((wanted * g).sum(), list(leaves.values()))
    plain = dict(zip(leaves, theirs, strict=True))
    quantized = quantized_layers(model)
    unquantized = [n for n in leaves if n not in quantized]
    ours = torch.autograd.grad((found * g).sum(), [model.get_submodule(n).weight for n in unquantized])
    for name, gradient in zip(unquantized, ours, strict=True):
        expect_close(
            gradient,
            plain[name],
            f"the gradient to {name}'s weights",
            "the network's backward pass: something detaches or scales a gradient",
            EXACT,
        )


def images_are_independent(subject: Subject) -> str:
    """In evaluation mode an image's logits depend on that image, and on no other of its batch."""
    model = subject.float64_step().model.eval()
    images, _ = subject.probe
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    expect(
        logits.shape[0] == len(images) and logits.ndim == 2,
        f"logits of shape {tuple(logits.shape)} for {len(images)} images",
        "the network's output",
    )
    alone = torch.cat([model(image[None]) for image in images[:2]])
    expect_close(
        alone,
        logits[:2].detach(),
        "logits of an image alone, against those in a batch,",
        "a batch norm or dropout that acts in evaluation mode, or images that are mixed",
        1e-6,
    )
    (gradient,) = torch.autograd.grad(logits[0].square().sum(), leaf)
    others = gradient[1:].abs().max().item()
    expect(
        others == 0,
        f"the first image's logits have a gradient of {others:.2g} on other images",
        "images of a batch are mixed (a wrong view, reshape or reduction)",
    )
    expect(bool(gradient[0].any()), "the logits do not depend on the image", "a dead or detached network")
    return f"{len(images)} images, no gradient between them"


# Penalty.


def penalty_is_the_group_lasso(subject: Subject) -> str:
    """The penalty's value and its gradients; for a penalty of someone's own what any must do."""
    step = subject.float64_step()
    model = step.model
    value = step.penalty(model)
    expect(
        value.ndim == 0 and bool(value.isfinite()) and value.item() >= 0,
        f"the penalty is {value}",
        "a penalty that is no finite number of 0 or more",
    )
    weights = used_weights(model)
    quantized = {n: weights[n] for n in quantized_layers(model) if weights[n].ndim == 4}
    if not quantized:
        raise NotApplicableError("no convolution is quantized")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not value.requires_grad:
        raise BrokenError("no gradient leaves the penalty", "the penalty is detached (no_grad, detach, item)")
    found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    gradients = {n: g for n, g in zip(trained, found, strict=True) if g is not None}
    silent = [
        n
        for n in quantized
        if not gradients.get(f"{n}.parametrizations.weight.original", torch.zeros(1)).any()
    ]
    expect(
        not silent,
        f"no gradient from the penalty to the weights of {some(silent)}",
        "layers are missing from the penalty's groups, it is detached, or it reads another model",
    )
    bad = [n for n, g in gradients.items() if not g.isfinite().all()]
    expect(
        not bad,
        f"the penalty's gradient is not finite at {some(bad)}",
        "the norm's gradient at a group of zeros (sqrt at 0)",
    )
    if not (subject.own_penalty and subject.own_network):
        return f"{value.item():.4g}; SKIP of its formula, which is not this project's"
    leaves = {n: w.clone().requires_grad_() for n, w in quantized.items()}
    wanted = reference.penalty(leaves, subject.blocks)
    cause = (
        "the penalty's groups or norms (experiments/sparsity.py, src/channels.py): squared or missing norms, "
        "a wrong dimension, slices that are not coupled"
    )
    expect(
        abs(value.item() - wanted.item()) <= EXACT * abs(wanted.item()),
        f"the penalty is {value.item():.6g}, its formula gives {wanted.item():.6g}",
        cause,
    )
    by_weight = torch.autograd.grad(wanted, list(leaves.values()))
    twin: Any = copy.deepcopy(model)
    through = sum(
        ((twin.get_submodule(n).weight * g).sum() for n, g in zip(leaves, by_weight, strict=True)),
        value.new_zeros(()),
    )
    parameters = dict(twin.named_parameters())
    expected = torch.autograd.grad(through, [parameters[n] for n in gradients], allow_unused=True)
    for (name, ours), theirs in zip(gradients.items(), expected, strict=True):
        if theirs is not None:
            expect_close(ours, theirs, f"the penalty's gradient to {name}", cause, EXACT)
    return f"{value.item():.4g} and its gradients to {len(gradients)} parameters"


# The step: loss, gradients, optimizer, dead slices.


@dataclass
class Trace:
    """What one or two training steps did, looked at from outside."""

    coefficient: float
    before: list[dict[str, Tensor]] = field(default_factory=list)  # the state before each step
    after: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)  # at the optimizer's step
    wanted: list[dict[str, Tensor | None]] = field(default_factory=list)  # from an autograd of our own
    logits: list[Tensor] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)  # modules in evaluation mode, at each forward pass
    returned: list[Tensor] = field(default_factory=list)
    cross_entropy: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    dead: list[list[reference.Member]] = field(default_factory=list)  # before each step


def trace_of(subject: Subject, penalised: bool) -> Trace:
    """Two steps of the float64 copy, with the penalty acting or not; taken once."""
    if penalised not in subject.traces:
        subject.traces[penalised] = _trace(subject, penalised)
    return subject.traces[penalised]


def _trace(subject: Subject, penalised: bool) -> Trace:
    step = subject.float64_step()
    images, labels = subject.probe
    trace = Trace((subject.pipeline.settings.sparsity_weight or 1e-3) if penalised else 0.0)
    _watch(step, trace)
    step.model.train()
    for shift in (0, 1):
        turned = images.roll(shift, 0), labels.roll(shift, 0)
        trace.before.append(_state(step.model))
        trace.wanted.append(_own_gradients(step, *turned, trace))
        if subject.own_network:
            weights = used_weights(step.model)
            convolutions = {n: weights[n] for n in quantized_layers(step.model) if weights[n].ndim == 4}
            trace.dead.append(reference.dead_members(convolutions, subject.blocks))
        trace.returned.append(step(*turned, trace.coefficient, len(labels)).detach().clone())
        trace.after.append(_state(step.model))
    return trace


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _watch(step: TrainingStep, trace: Trace) -> None:
    """Note what the step hands to the network, and the gradients that it hands to the optimizer."""
    model = step.model

    def forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        trace.modes += [n or "the network" for n, m in model.named_modules() if not m.training]

    def logits(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        trace.logits.append(output.detach().clone())

    def optimize(*_: Any) -> None:
        trace.gradients.append(
            {n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()}
        )

    model.register_forward_pre_hook(forward)
    model.register_forward_hook(logits)
    step.optimizer.register_step_pre_hook(optimize)


def _own_gradients(
    step: TrainingStep, images: Tensor, labels: Tensor, trace: Trace
) -> dict[str, Tensor | None]:
    """Gradients of cross-entropy plus coefficient times penalty by an autograd of our own, on a copy."""
    twin = copy.deepcopy(step.model).train()
    twin._forward_hooks.clear()
    twin._forward_pre_hooks.clear()
    cross_entropy = reference.cross_entropy(twin(images), labels)
    penalty = step.penalty(twin)
    trace.cross_entropy.append(cross_entropy.item())
    trace.penalty.append(penalty.item())
    trained = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    loss = cross_entropy + trace.coefficient * penalty
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return dict(zip(trained, found, strict=True))


def loss_is_what_it_says(subject: Subject) -> str:
    """The step runs in training mode, and returns cross-entropy plus coefficient times penalty."""
    for penalised in (False, True):
        trace = trace_of(subject, penalised)
        expect(
            not trace.modes,
            f"in evaluation mode while training: {some(sorted(set(trace.modes)))}",
            "a training step in evaluation mode, or batch norms that are kept in it",
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
                abs(cross_entropy - ours) < 1e-5 * max(1, abs(ours)),
                f"the cross-entropy is said to be {cross_entropy:.6f}, and the logits give {ours:.6f}",
                "the loss is no plain cross-entropy of the logits (a second softmax, label smoothing, a sum, "
                "shifted labels)",
            )
            wanted = ours + trace.coefficient * penalty
            expect(
                abs(loss - wanted) < 1e-5 * max(1, abs(wanted)),
                f"the loss is {loss:.6f}; cross-entropy {ours:.6f} + {trace.coefficient:g} x penalty "
                f"{penalty:.4f} = {wanted:.6f}",
                "the penalty's coefficient is not applied, applied twice, or not reported",
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
                "backward is not called, or a parameter is detached from the loss",
            )
            dead = [n for n, g in wanted.items() if not _any(g)]
            expect(
                not dead,
                f"the loss has no gradient at {len(dead)} of {len(wanted)} parameters: {some(dead)}",
                "parts of the network are detached or dead",
            )
            for name, gradient in wanted.items():
                ours = found[name]
                assert gradient is not None and ours is not None
                if number == 1:
                    cause = (
                        "gradients are scaled, clipped, rounded or zeroed between backward and the optimizer"
                        if not penalised
                        else "the penalty's part of the gradient: its coefficient, or its gradient is changed"
                    )
                else:
                    cause = "gradients are not zeroed between steps, or of another batch"
                worst = max(
                    worst,
                    expect_close(ours, gradient, f"step {number}: the gradient at {name}", cause, GRADIENT),
                )
            count = len(wanted)
    return f"{count} parameters, to {worst:.0e}, over two steps"


def _any(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def expected_rates(subject: Subject) -> dict[str, tuple[float, float]]:
    """The peak learning rate and the decay of each group of the optimizer, by its name, from the settings."""
    settings, batches = subject.pipeline.settings, subject.pipeline.train_batches
    steps = settings.epochs * len(batches)
    slower = settings.logit_steps / steps if 0 < settings.logit_steps < steps else 1.0
    return {
        "weights": (settings.weights_lr, settings.weights_decay),
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
        kind = group.get("name", "weights")
        rate, decay = rates[kind]
        found = group.get("peak_lr", float(group["lr"]))
        expect(
            math.isclose(found, rate, rel_tol=1e-6),
            f"the group {kind!r} has a peak learning rate of {found:g}, the settings say {rate:g}",
            f"--{kind}-lr (or --logit-steps) does not reach its group",
        )
        expect(
            math.isclose(group["weight_decay"], decay, rel_tol=1e-9),
            f"the group {kind!r} has a decay of {group['weight_decay']:g}, the settings say {decay:g}",
            f"--{kind}-decay does not reach its group",
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
            "rates and decays of weights, bit and dead-zone logits are mixed up",
        )
    return ", ".join(f"{g.get('name')} {float(g['lr']):g}" for g in optimizer.param_groups)


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
        id(p): group.get("name", "weights")
        for group in subject.step.optimizer.param_groups
        for p in group["params"]
    }
    of = {n: kinds[id(p)] for n, p in subject.pipeline.model.named_parameters() if id(p) in kinds}
    state = {n: subject.step.optimizer.state.get(p, {}) for n, p in subject.pipeline.model.named_parameters()}
    kept = 0
    for penalised in (False, True):
        trace = trace_of(subject, penalised)
        for name, kind in of.items():
            rate, decay = rates[kind]
            adamw = reference.AdamW(rate, decay, 0.9, settings.beta2)
            zero = torch.zeros_like(trace.before[0][name])
            first, second = (state[name].get(key, zero).to(zero) for key in ("exp_avg", "exp_avg_sq"))
            done = int(state[name].get("step", 0))
            for i in (0, 1):
                before, gradient = trace.before[i][name], trace.gradients[i][name]
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
        rate = rates[group.get("name", "weights")][0]
        group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
    step.model.train()
    losses = [float(step(images, labels, 0.0, len(labels))[1]) for _ in range(LEARNING_STEPS)]
    measured = f"cross-entropy on 16 images {losses[0]:.2f} -> {losses[-1]:.2f} in {LEARNING_STEPS} steps"
    if subject.pipeline.settings.weights_lr < 1e-4:
        raise NotApplicableError(f"{measured}; --weights-lr is too small to tell")
    expect(
        min(losses[-3:]) < 0.75 * losses[0],
        measured,
        "the network does not learn: --weights-lr far off, a "
        "gradient that does not arrive, or labels changed in the step",
    )
    return measured
