"""Preflight checks of model, quantizers, network and penalty, against the slow reference in float64."""

import copy
import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import resnet
from experiments import reference
from experiments.device import in_float64, without
from experiments.draws import kept_draws, same_draws
from experiments.expect import (
    EXACT,
    PROBE_IMAGES,
    BrokenError,
    NotApplicableError,
    Subject,
    expect,
    expect_close,
    stored_weight,
    used_weights,
)
from experiments.history import some
from experiments.network import SIZE, memory_layout
from experiments.settings import MACS, STORED
from experiments.training import autocast
from src.graph import trace_network
from src.groups import channel_groups
from utils_quantization import quantized_layers, weight_quantization

# Of the quantizer as it is published: what its two logits begin at, and the bits that it can learn.
START_LOGIT = 3.0
MIN_BITS, MAX_BITS = 2, 8
NORMAL = 3  # the kurtosis of a normal distribution
REPEATS = 4  # passes that must give the same logits
FLOAT32 = 3e-4  # of the largest logit: float32 stays closer on any device, TF32 does not
ROUNDED = 1e-5  # of the largest gradient, where float32 sums nothing or terms of one sign
ROUNDED_SUMS = 1e-3  # and where terms may cancel
LEFT_IN_BF16 = 0.5  # how far a stage's gradient may be from all of itself; of ResNet-110 0.73 was left
# Of the largest gradient of all, below which a layer's are of terms that cancel: before a batch norm that
# sees a few images rounding leaves up to 2e-5 of the largest.
CANCELLED = 5e-2
MOST_IMAGES = 128  # of a batch whose gradients are computed in float32
OPEN = 6.0  # standard deviations by which a planted ReLU is open or shut
SMALL_WEIGHTS = 1e-3  # a factor that makes weights so small that what is added to their squares shows
# Logits beside the planted ones: 2 bits before and after rounding, 3, and all; dead zones from wide to none.
FAR_LOGITS = tuple((bit, deadzone) for bit in (0.02, -0.15, 3.0) for deadzone in (0.1, -0.3, 3.0))
SMALL = 100_000  # weights of a layer
REACHED = 0.85  # of the stored weights that a gradient must reach: some quantizers clip the largest
DEPTHS = (20, 32, 44, 56, 110)  # of resnet.py's networks: layers with weights, shortcuts have none

# The model as the run built it.


def layers_are_quantized(subject: Subject) -> str:
    """The layers that the settings name have a quantizer of their own, switched on, and no others have."""
    model, settings = subject.pipeline.model, subject.pipeline.settings
    expect(
        subject.own_network or ":" in settings.model,
        f"the network is a {type(model).__name__}, and --model is {settings.model}",
        "--model does not reach the network, or resnet.py makes something else than its ResNet",
    )
    expect(
        not (subject.own_network and subject.own_quantizers and subject.step.host.decides),
        "the forward pass draws random numbers on the host, or looks at a tensor's numbers",
        "a random draw (dropout, stochastic depth) or a branch by numbers in resnet.py or src/quantizer.py",
    )
    patterns = settings.exclude_layers
    if patterns is None:
        dense = subject.pipeline.evaluator.dense.layers
        ends = ("conv1", "linear") if subject.own_network else (dense[0].name, dense[-1].name)
        patterns = tuple(f"^{re.escape(name)}$" for name in ends)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    counted = {layer.name for layer in subject.pipeline.evaluator.dense.layers}
    unused = [name for name in layers if name not in counted]
    expect(
        not (subject.own_network and unused),
        f"no image passes {some(unused)}",
        f"the network's forward pass (resnet.py) leaves {some(unused)} out",
    )
    if not subject.own_network:
        counted -= set(trace_network(model, SIZE).computing_their_weights())
    wanted = [n for n in layers if n in counted and not any(re.search(pattern, n) for pattern in patterns)]
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
        f"{len(quantizers)} layers have {len(own)} quantizers with {len(set(parameters))} parameters between "
        f"them, expected {len(parameters)}",
        "one quantizer object is attached to several layers",
    )
    stored = [id(p) for n, p in model.named_parameters(remove_duplicate=False)]
    expect(
        len(stored) == len(set(stored)) or not subject.own_network,
        f"{len(stored) - len(set(stored))} parameters occur twice in the network",
        "layers share their weights",
    )
    modules = [id(m) for _, m in model.named_modules(remove_duplicate=False)]
    expect(
        len(modules) == len(set(modules)) or not subject.own_network,
        "modules occur twice in the network",
        "layers share their weights",
    )
    for name, quantizer in quantizers.items() if subject.own_quantizers else ():
        expect(
            quantizer.learnable_deadzone,
            f"the dead zone of {name} is not learned (learnable_deadzone is False)",
            "a default or an argument that fixes the dead zone: half of the method is then not trained",
        )
        most, fixed = settings.max_bits or MAX_BITS, settings.fixed_bits
        found_fixed = None if quantizer.learnable_bit else quantizer.fixed_bit_val
        expect(
            (quantizer.max_bits, found_fixed) == (most, fixed),
            f"{name} has at most {quantizer.max_bits} bits (fixed: {found_fixed}), expected {most} "
            f"(fixed: {fixed})",
            "--max-bits or --fixed-bits does not reach the quantizers, or a default is another",
        )
    return f"{len(found)} of {len(layers)} layers, each with its own"


def start_is_fresh(subject: Subject) -> str:
    """Before the first step: Kaiming-normal weights, neutral batch norms, quantizers as they are made."""
    if subject.resumed:
        raise NotApplicableError("the run was resumed from a checkpoint")
    model, named = subject.pipeline.model, subject.pipeline.settings.model
    for name, quantizer in subject.quantizers(model).items() if subject.own_quantizers else ():
        logits = quantizer.logit_bit.item(), quantizer.logit_dz.item()
        expect(
            logits == (START_LOGIT, START_LOGIT),
            f"the bit and dead-zone parameters of {name} start at {logits}, expected {START_LOGIT} for both",
            "other start values than the quantizer's own, or parameters that were trained or loaded",
        )
    if not subject.own_network or ":" in named:  # what a callable returns may be trained already
        raise NotApplicableError("the network is not made by resnet.py alone")
    with torch.device("meta"):
        depths = {depth: 6 * len(getattr(resnet, f"resnet{depth}")().layer1) + 2 for depth in DEPTHS}
    expect(
        all(depth == found for depth, found in depths.items()) and 6 * subject.blocks + 2 in DEPTHS,
        f"the network has {6 * subject.blocks + 2} layers, {subject.blocks} blocks a stage; resnet.py's of "
        f"{', '.join(map(str, depths))} layers have {', '.join(map(str, depths.values()))}",
        "a ResNet of other blocks a stage than its name says",
    )
    expect(
        f"resnet{6 * subject.blocks + 2}" == named,
        f"the network has {6 * subject.blocks + 2} layers, the settings say {named}",
        "--model does not reach the network",
    )
    found = sum(p.numel() for n, p in model.named_parameters() if ".quantizer." not in n)
    classes = subject.dataset.classes
    due = reference.parameter_count(subject.blocks, classes)
    expect(
        found == due,
        f"{found:,} parameters where a ResNet-{6 * subject.blocks + 2} for {classes} classes has {due:,}",
        "another architecture than resnet.py's: its widths, blocks, biases or classes, or shared weights",
    )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            w = stored_weight(layer)
            expected = math.sqrt(2 / w[0].numel())
            off = abs(in_float64(w).std().item() / expected - 1)
            expect(
                off < 5 / math.sqrt(2 * w.numel()),
                f"the weights of {name} have standard deviation "
                f"{w.std().item():.3g}, Kaiming's is {expected:.3g}",
                "another initialization than resnet.py's (fan-in, ReLU gain)",
            )
            kurtosis = ((w - w.mean()) / w.std()).pow(4).mean().item()  # 3 of a normal distribution
            deviation = math.sqrt(24 / w.numel())
            expect(
                -5 * deviation < kurtosis - NORMAL < 12 * deviation,  # by chance it is larger more often
                f"the weights of {name} have a kurtosis of {kurtosis:.2f}, normal ones have {NORMAL}",
                "an initialization that is not normal (uniform, truncated, of heavy tails)",
            )
            limit = 1 / math.sqrt(w[0].numel())
            largest = limit if layer.bias is None else layer.bias.abs().max().item()
            expect(
                0 < largest <= limit,
                f"the bias of {name} goes up to {largest:.3g}, torch draws it from {limit:.3g} around 0",
                "another initialization of the classifier's bias than torch's",
            )
        elif isinstance(layer, _BatchNorm):
            neutral = [(layer.weight, 1), (layer.bias, 0), (layer.running_mean, 0), (layer.running_var, 1)]
            expect(
                all(bool((t == number).all()) for t, number in neutral if t is not None),
                f"{name} is not neutral (scale 1, shift 0, mean 0, variance 1)",
                "batch norms were trained, loaded or fed before the first step"
                if any(bool((t != number).any()) for t, number in neutral[2:] if t is not None)
                else "another initialization of the batch norms than resnet.py's, such as a zero scale at "
                "the end of a block",
            )
    with kept_draws():
        torch.manual_seed(subject.pipeline.settings.seed)
        drawn = getattr(resnet, f"resnet{6 * subject.blocks + 2}")(classes)
    layers = {n: m for n, m in drawn.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    other = [
        n
        for n, layer in layers.items()
        if not torch.equal(stored_weight(model.get_submodule(n)).cpu(), layer.weight.detach())
    ]
    expect(
        not other,
        f"the weights of {some(other)} are not those that seed {subject.pipeline.settings.seed} gives",
        "--seed does not reach the initialization, other numbers are drawn before it, or weights are "
        "changed after it",
    )
    counts = [m.num_batches_tracked.item() for m in model.modules() if isinstance(m, _BatchNorm)]  # type: ignore[union-attr]
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
        not frozen or not subject.own_network,  # someone's own may freeze what it wants
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
    hooked = [n for n, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    hooks = (
        subject.step.optimizer._optimizer_step_pre_hooks,
        subject.step.optimizer._optimizer_step_post_hooks,
    )
    hooked += ["the optimizer's step"] if any(hooks) else []
    expect(
        not hooked or not subject.own_network,  # someone's own may mask its gradients
        f"a hook is on {some(hooked)}",
        "gradients or updates are changed by a hook, which copies of the model lose, and so does a resumed "
        "run: change them in TrainingStep._run (experiments/training.py)",
    )
    places = {which: place for place, which in enumerate(names)}
    order = [[places[id(p)] for p in group["params"]] for group in groups]
    expect(
        all(numbers == sorted(numbers) for numbers in order),
        "the parameters in a group of the optimizer are not in the model's order",
        "a set in the place of a list: checkpoints keep moments by their number, and --resume would mix them",
    )
    return f"{len(held)} parameters in {len(groups)} groups"


def _meant_to_be_fixed(subject: Subject, name: str) -> bool:
    """Whether a parameter is of a quantizer that does not learn it; one of someone's own need learn none."""
    if not subject.own_quantizers or ".quantizer." not in name:
        return ".quantizer." in name
    quantizer: Any = subject.pipeline.model.get_submodule(name.rpartition(".")[0])
    return not (quantizer.learnable_bit if name.endswith("logit_bit") else quantizer.learnable_deadzone)


# Quantizers.


def quantizers_keep_their_word(subject: Subject) -> str:
    """Properties of any quantizer, on each layer's weights: levels, order, sign, zeros, a gradient to all."""
    model = subject.float64_step(runs=False).model.eval()
    tested = used_weights(model)
    quantizers = subject.quantizers(model)
    for name, quantizer in quantizers.items():
        layer = model.get_submodule(name)
        w = stored_weight(layer)
        leaf = w.clone().requires_grad_()
        out = quantizer(leaf)
        expect(
            out.shape == w.shape and bool(out.isfinite().all()),
            f"{name}: shape {tuple(out.shape)}, finite: {bool(out.isfinite().all())}",
            "the quantizer breaks its input",
        )
        expect(
            torch.equal(quantizer(w), out),
            f"{name}: the quantizer gives other weights each time, in evaluation mode",
            "a random number or a counter in the quantizer, which evaluation mode does not switch off",
        )
        bits = float(torch.as_tensor(quantizer.get_bitwidth()).detach())
        levels = _levels(out, subject.own_quantizers)
        cause = (
            "bit-widths are not rounded" if bits != round(bits) else "the bit-width's formula, or its sign"
        )
        expect(bits == round(bits) and bits >= 1, f"{name} claims {bits} bits", cause)
        expect(
            levels <= 2**bits,
            f"{name} has {levels} different values where {bits:.0f} bits give at most {2**bits:.0f}",
            "the number of levels does not follow from the bit-width that is counted",
        )
        other = w.flip(0)
        expect(
            torch.equal(w, other) or not out.any() or not torch.equal(quantizer(other), out),
            f"{name}: the quantizer gives the same for other weights",
            "quantized weights are cached from one call to the next",
        )
        order = _rows(w, subject.own_quantizers).argsort(1)
        climbs = _rows(out, subject.own_quantizers).gather(1, order).diff(dim=1)
        falls = (climbs < -1e-9 * out.abs().max()).any()
        expect(
            not falls,
            f"{name}: a larger weight becomes a smaller one",
            "sign, step size or shift of the quantizer",
        )
        # Another may centre the weights first, or have no zero among its levels.
        wrong_sign = ((out * w) < 0).sum().item() if subject.own_quantizers else 0
        expect(wrong_sign == 0, f"{name}: {wrong_sign} weights change their sign", "the quantizer's sign")
        expect(
            not subject.own_quantizers or bool((out[w == 0] == 0).all()),
            f"{name}: zeros do not stay zero",
            "the quantizer's shift or rounding at zero",
        )
        g = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=w.dtype).to(w.device)
        gradient = (
            torch.autograd.grad((out * g).sum(), leaf, allow_unused=True)[0] if out.requires_grad else None
        )
        # Whether a weight that it prunes gets one is someone's own quantizer's choice.
        due = out != 0 if out.any() and not subject.own_quantizers else w != 0
        reached = 0.0 if gradient is None else (gradient[due] != 0).float().mean().item()
        expect(
            reached > REACHED or not w.any(),  # of a layer that has died, none is due
            f"{name}: a gradient reaches {100 * reached:.0f} % of the stored weights",
            "no straight-through gradient: rounding, clipping or the dead zone cuts it off",
        )
        expect(
            torch.equal(tested[name], out),
            f"{name} computes with other weights than its quantizer gives",
            "quantization is not applied in the layer",
        )
        _compare_modes(name, layer, tested[name], 2 * 2**bits, subject.own_quantizers)
    if subject.own_quantizers and subject.pipeline.settings.precision == "bf16":
        _compare_under_autocast(subject)
    return f"{len(quantizers)} quantizers: levels, order, zeros and gradients"


def _compare_modes(name: str, layer: Any, tested: Tensor, most: float, own: bool) -> None:
    """What a layer computes with in training mode, in which another quantizer may draw or take statistics."""
    weight = copy.deepcopy(layer.parametrizations.weight).train()
    with same_draws():
        computed = weight()
    weight = copy.deepcopy(layer.parametrizations.weight).train()
    with same_draws():
        given = weight[0].quantizer(stored_weight(layer))
    expect(
        torch.equal(computed, given),
        f"{name} computes with other weights than its quantizer gives, in training mode",
        "quantization is not applied in the layer",
    )
    off = any(torch.equal(w, stored_weight(layer)) for w in (computed, tested))
    quantized = torch.equal(computed, tested) if own else _levels(computed, own) <= most
    expect(
        quantized,
        f"{name} computes with other weights in evaluation mode than in training mode",
        "quantization is switched off in one of the two modes"
        if off
        else "the quantizer's bits, rounding, range or dead zone depend on the mode",
    )


@torch.no_grad()
def _compare_under_autocast(subject: Subject) -> None:
    """The weights that layers compute with in the run's precision, against those that are counted."""
    for name, layer in quantized_layers(subject.copied_step().model).items():
        weight: Any = layer.parametrizations.weight  # type: ignore[union-attr]
        counted = weight()
        with autocast(subject.step.device, "bf16"):
            computed = weight()
        expect(
            computed.dtype == counted.dtype and torch.equal(computed, counted),
            f"{name} computes with other weights under autocast",
            "weights are rounded to bf16 before or while they are quantized: counts and packed file are of "
            "others",
        )


def _levels(w: Tensor, own: bool) -> int:
    """The number of different values, of a row the most. A straight-through w + (q - w).detach() leaves
    q's last digits to chance, so that such values count as one."""
    rows = _rows(w, own)
    apart = rows.sort(1).values.diff(dim=1) > 1e-9 * rows.abs().amax(1, keepdim=True)
    return int(apart.sum(1).max()) + 1


def _rows(w: Tensor, own: bool) -> Tensor:
    """The weight as one row, or its filters as rows, as another quantizer may have a scale for each."""
    return w.detach().flatten()[None] if own else w.detach().flatten(1)


def quantizers_follow_the_formula(subject: Subject) -> str:
    """Values and gradients of the dead-zone quantizer against its formulas in plain autograd."""
    if not subject.own_quantizers:
        raise NotApplicableError("the quantizer is not this project's, so its formulas are not known")
    model = subject.float64_step(runs=False).model
    generator = torch.Generator().manual_seed(2)
    quantizers = subject.quantizers(model)
    worst, count, shapes = 0.0, len(quantizers), set[torch.Size]()
    for number, (name, quantizer) in enumerate(quantizers.items()):
        further = {n for n, _ in quantizer.named_parameters()} - {"logit_bit", "logit_dz"}
        expect(
            not further,
            f"{name} trains {some(sorted(further))}, which the formula does not know",
            "it learns more than the published one: make it a class of its own, for --quantizer",
        )
        w = stored_weight(model.get_submodule(name))
        worst = max(worst, _compare_formula(subject, name, quantizer, w, generator))
        # Each of the other places is visited in some layer, in which the planted logits do not lie, and all
        # are in the first layer of each shape.
        places = range(number, max(count, len(FAR_LOGITS)), count)
        if w.shape not in shapes and w.numel() <= SMALL:
            places = range(len(FAR_LOGITS))
        shapes.add(w.shape)
        for place in places:
            bit, deadzone = FAR_LOGITS[place % len(FAR_LOGITS)]
            with torch.no_grad():
                quantizer.logit_bit.fill_(bit)
                quantizer.logit_dz.fill_(deadzone)
            worst = max(worst, _compare_formula(subject, name, quantizer, w, generator))
    return f"values to {worst:.0e}, gradients to stored weights and both parameters"


def _compare_formula(
    subject: Subject, name: str, quantizer: Any, w: Tensor, generator: torch.Generator
) -> float:
    """A quantizer's bits, values and gradients at the logits that it has; the largest relative difference."""
    found = quantizer(w)
    edge = reference.quantile_99(w) * (1 - quantizer.logit_dz.detach().tanh().abs())
    half = (w.abs() <= edge * (1 - 1e-9)) & (found != 0)
    cause = "the dead zone: its width, the range quantile or the shift in src/quantizer.py"
    expect(not half.any(), f"{name}: {int(half.sum())} weights inside the dead zone are not zero", cause)
    bits = _learned_bits(quantizer).detach()
    learned, used = quantizer.get_learned_bitwidth().detach(), quantizer.get_bitwidth()
    expect(
        bool((learned - bits).abs() < 1e-6) and bool(used == bits.round()),
        f"{name} has learned {float(learned):.3f} bits and uses {float(used.detach())} where tanh of its "
        f"logit gives {float(bits):.3f}, rounded {float(bits.round()):.0f}",
        "the bit-width's formula (rounding, maximum, tanh)",
    )
    wanted = reference.quantize(w, bits, quantizer.logit_dz)
    zeros = ((found == 0) != (wanted == 0)).sum().item()
    expect(zeros == 0, f"{name}: {zeros} weights are zero that should not be, or the other way round", cause)
    values = expect_close(
        found,
        wanted,
        f"{name}'s quantized weights",
        "step size, shift, rounding or number of levels in src/quantizer.py",
        EXACT,
    )
    gradients = _compare_gradients(name, quantizer, w, generator)
    with autocast(subject.step.device, subject.pipeline.settings.precision):
        _compare_precisions(name, quantizer, w, found.detach(), generator)
    return max(values, gradients)


def _compare_precisions(
    name: str, quantizer: Any, w: Tensor, wanted: Tensor, generator: torch.Generator
) -> None:
    """A quantizer in float32, as it trains, with gradients and without, against its formulas in float64."""
    single, leaf = copy.deepcopy(quantizer).float(), w.float().requires_grad_()
    found = single(leaf)
    with torch.no_grad():
        again = single(leaf)
    cause = "src/quantizer.py goes another way without gradients, as in the test pass"
    expect(torch.equal(found, again), f"{name}'s weights are others without gradients", cause)
    cause = "src/quantizer.py goes another way in float32, or under autocast"
    other = (found.double() - wanted).abs() > 1e-4 * wanted.abs().max()
    off = int(other.sum())
    # One between two levels may be rounded to either.
    expect(off <= 2 + 1e-3 * w.numel(), f"{name}: {off} of {w.numel()} weights are others in float32", cause)
    # What is rounded to another level has another derivative too, so no gradient is sent there.
    g = torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device).float() * ~other
    names = [n for n in ("logit_bit", "logit_dz") if getattr(single, n).requires_grad]
    inputs = [leaf, *(getattr(single, n) for n in names)]
    gradient, *to_logits = torch.autograd.grad(found, inputs, g, materialize_grads=True)
    cause = "the quantizer's backward pass in float32: the gradient to {} (src/quantizer.py)"
    alive, to = w != 0, "the stored weights"  # see `_compare_gradients`
    measured = f"{name}: the gradient to {to} in float32"
    expect_close(gradient * alive, g * alive, measured, cause.format(to), ROUNDED)
    if not names:
        return
    derivatives = _derivatives(quantizer, w, [getattr(quantizer, n) for n in names])
    # The finer the levels, the more of a place between two of them is rounded off.
    tolerance = ROUNDED * (10 + float(quantizer.get_bitwidth().detach().exp2()) / 10)
    for n, ours, derivative in zip(names, to_logits, derivatives, strict=True):
        terms, to = g * derivative, f"the {'bit' if n == 'logit_bit' else 'dead-zone'} logit"
        measured = f"{name}: the gradient to {to} in float32"
        most = terms.abs().sum().item()  # the sum itself may be of terms that cancel
        expect_close(ours, terms.sum().reshape(1), measured, cause.format(to), tolerance, most)


def _derivatives(quantizer: Any, w: Tensor, learned: Sequence[Tensor]) -> list[Tensor]:
    """The derivative of each quantized weight with respect to each of these logits, by the formula."""
    # A gradient is linear in what arrives, and the factor of what arrives at a weight is its derivative.
    arrives = torch.zeros_like(w, requires_grad=True)
    quantized = reference.quantize(w, _learned_bits(quantizer), quantizer.logit_dz)
    gradients = torch.autograd.grad(quantized, learned, arrives, create_graph=True)
    return [torch.autograd.grad(g.sum(), arrives, retain_graph=True)[0] for g in gradients]


def _learned_bits(quantizer: Any) -> Tensor:
    if not quantizer.learnable_bit:
        return torch.full_like(quantizer.logit_bit, quantizer.fixed_bit_val)
    return MIN_BITS + (quantizer.max_bits - MIN_BITS) * quantizer.logit_bit.tanh().abs()


def _compare_gradients(name: str, quantizer: Any, w: Tensor, generator: torch.Generator) -> float:
    g = torch.randn(w.shape, generator=generator, dtype=w.dtype).to(w.device)
    logits = {"the bit logit": quantizer.logit_bit, "the dead-zone logit": quantizer.logit_dz}
    learned = {what: p for what, p in logits.items() if p.requires_grad}
    gradients, worst = [], 0.0
    for call in (quantizer, lambda x: reference.quantize(x, _learned_bits(quantizer), quantizer.logit_dz)):
        leaf = w.clone().requires_grad_()
        inputs = [leaf, *learned.values()]
        found = torch.autograd.grad((call(leaf) * g).sum(), inputs, materialize_grads=True)
        # A stored weight of exactly zero is kept dead: whether a gradient reaches it is a choice.
        gradients.append([found[0] * (w != 0), *found[1:]])
    for what, ours, theirs in zip(("the stored weights", *learned), *gradients, strict=True):
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
    with parametrize.cached():  # another quantizer may draw in training mode
        first = model.train()(images)
        repeats = all(torch.equal(model(images), first) for _ in range(REPEATS))
    expect(
        repeats,
        f"the same images give other logits in one of {REPEATS} more passes in training mode",
        "something random in the forward pass (dropout, stochastic depth, noise)",
    )
    model = subject.float64_step().model
    for training in (True, False):
        model.train(training)
        values = {n: v.detach().clone() for n, v in model.state_dict().items()}
        inputs, outputs = _watch_layers(model)
        with parametrize.cached():
            found = model(images)
            layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
            leaves = {n: layer.weight.detach().clone().requires_grad_() for n, layer in layers.items()}
        plain = reference.Network(values, leaves, subject.blocks, training)
        wanted = plain(images)
        mode = "training" if training else "evaluation"
        for name in plain.outputs:
            for found_there, wanted_there, what, cause in (
                (inputs, plain.inputs, "input", _before(name)),
                (outputs, plain.outputs, "output", _within(name)),
            ):
                skipped = f"{name} is left out of the forward pass, always or at random (stochastic depth)"
                expect(name in found_there, f"{name} is not run", skipped)
                expect_close(
                    found_there[name],
                    wanted_there[name],
                    f"the {what} of {name} in {mode} mode",
                    cause,
                    EXACT,
                )
        cause = "what follows the classifier"
        worst = max(worst, expect_close(found, wanted, f"logits in {mode} mode", cause, EXACT))
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
        _compare_network_gradients(subject, model, (found, wanted), leaves, mode)
    if subject.pipeline.settings.precision == "float32":
        _compare_in_float32(subject)
    with without("allow_tf32"):
        count = _compare_gradients_in_float32(subject)
    low = subject.pipeline.settings.precision == "bf16"
    if low:
        _compare_gradients_in_bf16(subject)
    return (
        f"logits to {worst:.0e} in both modes, running statistics, gradients, those of {count} images in "
        f"float32" + " and bf16" * low
    )


def _as_it_trains(subject: Subject) -> Any:
    """The model with planted numbers, in float32 and the run's layout, where the run trains."""
    model = subject.float64_step().model.float().to(subject.step.device)  # MPS has no float64
    if memory_layout(model, subject.step.device) == "channels_last":
        model.to(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def _compare_in_float32(subject: Subject) -> None:
    """The network in its own precision and layout, evaluation mode, against the reference in float64."""
    model, device = _as_it_trains(subject).eval(), subject.step.device
    images, _ = subject.probe
    values = {n: in_float64(v) for n, v in model.state_dict().items()}
    weights = {n: in_float64(w) for n, w in used_weights(model).items()}
    wanted = reference.Network(values, weights, subject.blocks, False)(images)
    cause = "convolutions in a lower precision than --precision says (TF32, bf16), or another memory layout"
    found = model(images.float().to(device)).to(images.device).double()
    expect_close(found, wanted, "logits in float32", cause, FLOAT32)


def _compare_gradients_in_float32(subject: Subject) -> int:
    """Logits and gradients to the weights, of a batch of the run's size. Returns: how many images."""
    model = _as_it_trains(subject)
    _open_or_shut(model)
    found, due, count = _gradients_as_it_trains(subject, model, "float32")
    largest = max(gradient.abs().max().item() for gradient in due.values())
    cause = (
        "the network's backward pass, in float32 or in a large batch: something detaches or scales a gradient"
    )
    for name, gradient in due.items():
        what = f"the gradient to the weights of {name} in float32, in a batch of {count} images,"
        expect_close(found[name], gradient, what, cause, ROUNDED_SUMS, CANCELLED * largest)
    return count


def _compare_gradients_in_bf16(subject: Subject) -> None:
    """The same in bf16, in which ReLUs open and close by rounding: each stage's direction is what is left."""
    found, due, count = _gradients_as_it_trains(subject, _as_it_trains(subject), "bf16")
    cause = "the network's backward pass in bf16 alone: something detaches or scales a gradient"
    for stage in dict.fromkeys(name.partition(".")[0] for name in due):
        names = [name for name in due if name.partition(".")[0] == stage]
        ours, wanted = (torch.cat([row[name].flatten() for name in names]) for row in (found, due))
        share = float(ours @ wanted / wanted.square().sum())
        what = f"of the gradient to the weights of {stage} {share:.2g} is left in bf16, {count} images"
        expect(abs(share - 1) <= LEFT_IN_BF16, what, cause)


def _gradients_as_it_trains(
    subject: Subject, model: nn.Module, precision: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Gradients to the weights of the layers by the model in training mode, and by the reference; float64.

    Both are of a batch as large as the run's, but of each image a corner, so that all have as many pixels as
    the few of the probe. The number of images comes with them.

    Raises: BrokenError if in float32 the logits differ. In bf16 they are too coarse to tell.
    """
    model.train()
    images = subject.first_batch[0][:MOST_IMAGES]
    side = next(s for s in (32, 16, 8) if len(images) * s * s <= PROBE_IMAGES * 32 * 32 or s == 8)
    images = images[..., :side, :side]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    with parametrize.cached(), autocast(subject.step.device, precision):
        logits = model(images)
        weights = {n: layer.weight for n, layer in layers.items()}
    g = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad(logits, list(weights.values()), g.to(logits), materialize_grads=True)
    values = {n: in_float64(v) for n, v in model.state_dict().items()}
    leaves = {n: in_float64(w).detach().requires_grad_() for n, w in weights.items()}
    wanted = reference.Network(values, leaves, subject.blocks)(in_float64(images))
    if precision == "float32":
        what = f"the logits in training mode, in float32, of {len(images)} images"
        cause = "the network's forward pass in float32 or in a large batch: an activation is scaled or cut"
        expect_close(in_float64(logits).detach(), wanted.detach(), what, cause, FLOAT32)
    due = torch.autograd.grad(wanted, list(leaves.values()), g.to(wanted))
    found = dict(zip(weights, map(in_float64, ours), strict=True))
    return found, dict(zip(weights, due, strict=True)), len(images)


@torch.no_grad()
def _open_or_shut(model: nn.Module) -> None:
    """Let every ReLU pass all positions of a channel or none, in place.

    Near zero rounding would decide whether one passes, and a gradient be another one for no fault.
    """
    for number, (name, norm) in enumerate(model.named_modules()):
        if isinstance(norm, _BatchNorm):
            norm.bias.copy_(OPEN * norm.weight)
            if name.endswith(".bn1"):  # of a block, whose shortcut stays open
                norm.bias[number % 3 :: 3] *= -1


def _watch_layers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each convolution, batch norm and classifier is given and gives in the next pass, by name."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | _BatchNorm | nn.Linear):
            # Copies, because a ReLU may write into what it is given.
            module.register_forward_pre_hook(
                lambda _, given, name=name: inputs.update({name: given[0].detach().clone()})
            )
            module.register_forward_hook(
                lambda _, given, made, name=name: outputs.update({name: made.detach().clone()})
            )
    return inputs, outputs


def _before(name: str) -> str:
    """What is broken where the input of a layer is the first that is wrong."""
    if name == "conv1":
        return "images are changed in the network before its first convolution"
    if name == "linear":
        return "what stands before the classifier: the last block's shortcut, sum or ReLU, or the pooling"
    if name.endswith("conv2"):
        return f"what stands before {name}: a missing, moved or other ReLU"
    if "bn" in name:
        return f"something between a convolution and {name}, its batch norm"
    return f"what stands before {name}: the ReLU, or the shortcut (its stride, padding, channels) and the sum"


def _within(name: str) -> str:
    """What is broken where a layer is given the right input, and its output is wrong."""
    if "bn" in name:
        return f"the batch norm {name}: its eps, its scale and shift, the statistics that it takes, its mode"
    if name == "linear":
        return "the classifier: its weights, its bias, or its precision"
    return (
        f"the convolution {name}: its stride, padding or groups, or weights that are not the quantized ones"
    )


def _compare_network_gradients(
    subject: Subject, model: Any, logits: tuple[Tensor, Tensor], leaves: dict[str, Tensor], mode: str
) -> None:
    """The gradients to what each layer stores; through quantizers of someone's own they are not known.

    Arguments: `logits` of the network and of the reference, `leaves` the weights that the reference used.
    """
    found, wanted = logits
    draws = torch.Generator().manual_seed(3)
    g = torch.randn(found.shape, generator=draws, dtype=found.dtype).to(found.device)
    due: dict[str, Tensor] = {}
    quantizers = subject.quantizers(model)
    for name, gradient in zip(
        leaves, torch.autograd.grad((wanted * g).sum(), list(leaves.values())), strict=True
    ):
        if name not in quantizers:
            due[f"{name}.weight"] = gradient
        elif subject.own_quantizers:
            due |= _through_quantizer(f"{name}.parametrizations.weight", model, gradient)
    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad((found * g).sum(), [parameters[n] for n in due], materialize_grads=True)
    for (name, expected), gradient in zip(due.items(), ours, strict=True):
        cause = "the network's backward pass: something detaches or scales a gradient"
        if "parametrizations" in name:
            cause += ", in resnet.py or on its way through the quantized weight (utils_quantization.py)"
            gradient = gradient * (parameters[name] != 0)  # see `_compare_gradients`
        expect_close(gradient, expected, f"the gradient to {name} in {mode} mode", cause, 1e-6)


def _through_quantizer(inside: str, model: Any, gradient: Tensor) -> dict[str, Tensor]:
    """From the gradient to a quantized weight those to the stored weight and to what its quantizer learns."""
    quantizer = copy.deepcopy(model.get_submodule(f"{inside}.0.quantizer"))
    stored = model.get_parameter(f"{inside}.original").detach().clone().requires_grad_()
    w_hat = reference.quantize(stored, _learned_bits(quantizer), quantizer.logit_dz)
    inputs = {f"{inside}.original": stored}
    inputs |= {f"{inside}.0.quantizer.{n}": p for n, p in quantizer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(w_hat, list(inputs.values()), gradient, materialize_grads=True)
    gradients = dict(zip(inputs, found, strict=True))
    gradients[f"{inside}.original"] *= stored != 0  # see `_compare_gradients`
    return gradients


def images_are_independent(subject: Subject) -> str:
    """In evaluation mode an image's logits depend on that image, and on no other of its batch."""
    model = subject.float64_step().model.eval()
    images, _ = subject.probe
    leaf = images.clone().requires_grad_()
    with without("enabled"):  # cuDNN's recurrent layers have no gradient in evaluation mode
        logits = model(leaf)
    expect(
        logits.shape == (len(images), subject.dataset.classes),
        f"logits of shape {tuple(logits.shape)} for {len(images)} images",
        f"the network's output: {subject.dataset.classes} classes are due",
    )
    alone = torch.cat([model(image[None]) for image in images[:2]])
    expect_close(
        alone,
        logits[:2].detach(),
        "logits of an image alone, against those in a batch,",
        "a batch norm or dropout that acts in evaluation mode, or images that are mixed",
        1e-6,
    )
    with without("enabled"):
        logits[0].square().sum().backward()
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    expect(
        not gradient[1:].any(),
        f"the first image's logits have a gradient of up to {gradient.abs().max():.2g} on other images",
        "images of a batch are mixed (a wrong view, reshape or reduction)",
    )
    expect(
        bool(gradient[0].any()),
        "no gradient reaches the image",
        "a part of the network is detached or dead: no gradient comes to what stands before it",
    )
    return f"{len(images)} images, no gradient between them"


# Penalty.


def penalty_is_the_group_lasso(subject: Subject) -> str:
    """The penalty's value and its gradients; for a penalty of someone's own what any must do."""
    step = subject.float64_step(runs=False)
    model = step.model
    value = step.penalty(model)
    expect(
        value.ndim == 0 and bool(value.isfinite()) and value.item() >= 0,
        f"the penalty is {value}",
        "a penalty that is no finite number of 0 or more",
    )
    weights = used_weights(model)
    quantized = {n: weights[n] for n in quantized_layers(model) if weights[n].ndim == 4}
    if subject.own_network:  # whose first convolution makes channels of no group
        quantized.pop("conv1", None)
    else:
        members = {name for group in channel_groups(model, quantized) for name, _ in group.members}
        quantized = {name: w for name, w in quantized.items() if name in members}
    if not quantized:
        raise NotApplicableError("no convolution of a group is quantized")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not value.requires_grad:
        raise BrokenError("no gradient leaves the penalty", "the penalty is detached (no_grad, detach, item)")
    found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    gradients = {n: g for n, g in zip(trained, found, strict=True) if g is not None}
    silent = [
        n
        for n, w in quantized.items()  # of a layer that has died, no gradient is due
        if w.any() and not gradients.get(f"{n}.parametrizations.weight.original", torch.zeros(1)).any()
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
    if not subject.own_penalty:
        raise NotApplicableError(
            f"the penalty, {value.item():.4g}, is finite and has gradients; it is not this project's, so its "
            f"formula is not known"
        )
    if not subject.own_network:
        return f"{value.item():.4g}, with gradients; only the groups of resnet.py's networks are known"
    settings = subject.pipeline.settings
    on_stored, by_macs = settings.penalty_on == STORED, settings.group_weights == MACS
    penalised = {n: stored_weight(model.get_submodule(n)) for n in quantized} if on_stored else quantized
    leaves = {n: w.clone().requires_grad_() for n, w in penalised.items()}
    wanted = reference.penalty(leaves, subject.blocks, by_macs)
    cause = (
        "the penalty's groups or norms (experiments/sparsity.py, src/groups.py): squared or missing norms, "
        "a wrong dimension, slices that are not coupled, groups weighted otherwise, layers too many, "
        "stored weights in place of quantized ones or the reverse, sums in half precision"
    )
    expect(
        abs(value.item() - wanted.item()) <= EXACT * abs(wanted.item()),
        f"the penalty is {value.item():.6g}, its formula gives {wanted.item():.6g}",
        cause,
    )
    past = (
        "the penalty's gradient, its value being right: a part of it is detached, scaled, or goes past the "
        "quantizers (experiments/sparsity.py, src/groups.py)"
    )
    by_weight = torch.autograd.grad(wanted, list(leaves.values()))
    twin: Any = copy.deepcopy(model)
    layers = [twin.get_submodule(n) for n in leaves]
    used = [layer.parametrizations.weight.original if on_stored else layer.weight for layer in layers]
    inputs = [p for p in twin.parameters() if p.requires_grad]
    expected = torch.autograd.grad(used, inputs, by_weight, materialize_grads=True)
    for name, due in zip(trained, expected, strict=True):
        ours = gradients.get(name, torch.zeros_like(due))
        expect_close(ours, due, f"the penalty's gradient to {name}", past, EXACT)
    _compare_penalty_in_float32(subject, list(leaves))
    return f"{value.item():.4g} and its gradients to {len(gradients)} parameters, also in float32"


def _compare_penalty_in_float32(subject: Subject, names: Sequence[str]) -> None:
    """The penalty in float32, of weights so small that what is added to their squares shows."""
    step, settings = subject.float64_step(runs=False), subject.pipeline.settings
    model = step.model.float().to(subject.step.device)  # MPS has no float64
    layers: dict[str, Any] = {n: model.get_submodule(n) for n in names}
    with torch.no_grad():
        for layer in layers.values():
            layer.parametrizations.weight.original.mul_(SMALL_WEIGHTS)
    on_stored = settings.penalty_on == STORED
    with parametrize.cached():
        value = step.penalty(model)
        weights = {
            n: x.parametrizations.weight.original if on_stored else x.weight for n, x in layers.items()
        }
        found = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
    leaves = {n: in_float64(w).detach().requires_grad_() for n, w in weights.items()}
    wanted = reference.penalty(leaves, subject.blocks, settings.group_weights == MACS)
    due: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if wanted.requires_grad:  # someone's own quantizer may round all weights so small to zero
        due = torch.autograd.grad(wanted, list(leaves.values()))
    cause = (
        "the penalty in float32 (experiments/sparsity.py): a part of it is detached or left out, or "
        "something is added to a norm"
    )
    expect_close(in_float64(value), wanted.detach(), "the penalty in float32", cause, ROUNDED)
    for name, ours, gradient in zip(names, found, due, strict=True):
        what = f"the penalty's gradient to the weights of {name} in float32"
        expect_close(in_float64(ours), gradient, what, cause, ROUNDED)
