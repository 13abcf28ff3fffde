"""One epoch of training, one pass over the test set, and the optimizer they need."""

import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from experiments.data import TestBatches, TrainBatches
from experiments.device import in_float64
from experiments.distributed import ALONE, Processes, sum_gradients
from experiments.evaluator import Evaluator
from experiments.network import use_of_the_host
from experiments.schedules import Schedule
from experiments.settings import Settings
from experiments.user_code import first_line
from src.quantizer import NotFiniteWeightError
from utils_quantization import PARAMETER_GROUPS, parameter_groups, quantized_layers, quantizers

LAYERS = (nn.Conv2d, nn.Linear, _BatchNorm)
Penalty = Callable[[nn.Module], Tensor]  # a model's penalty, a scalar
Progress = Callable[[int, int, float], None]  # steps done, steps in all, seconds since the epoch began


class NotFiniteError(Exception):
    """The loss is no longer a number; the message says where that began."""


@dataclass(frozen=True)
class EpochLosses:
    """Means over an epoch's images: the loss trained on, and its cross-entropy part."""

    loss: float
    cross_entropy: float
    steps: list[list[float]] = field(compare=False)  # loss, cross-entropy and penalty of each step


def pace(pace_steps: int, steps: int) -> float:
    """What the quantizers' learning rates are multiplied by in a run of `steps` steps.

    AdamW moves a quantizer's parameter by about its learning rate a step, whatever the gradient's size, and
    decays it by rate times decay. So in a run of more than `pace_steps` steps (0: in none) the rates of
    both parameters shrink in proportion: they travel the same way, only slower. The weights' rate stays, and
    their decay shrinks with the square root: a decay that stays keeps a long run from settling, and one that
    shrinks in proportion lets it learn its training images by heart (docs/results.md has both).
    """
    return pace_steps / steps if 0 < pace_steps < steps else 1.0


def make_optimizer(model: nn.Module, settings: Settings, steps: int = 0) -> torch.optim.AdamW:
    """AdamW in three groups: weights (with biases and batch norms), bit parameters, dead-zone parameters.

    A quantizer says in which group each of its parameters is (see `utils_quantization.Quantizer`).
    `steps` is the number of optimizer steps in the whole run, on which the pace depends.
    """
    slower = pace(settings.pace_steps, steps)
    weights_decay = math.sqrt(slower) * settings.weights_decay
    group_of = {
        id(quantizer.get_parameter(name)): group
        for quantizer in quantizers(model).values()
        for name, group in parameter_groups(quantizer).items()
    }
    params: dict[str, list[nn.Parameter]] = {name: [] for name in PARAMETER_GROUPS}
    for parameter in model.parameters():
        if parameter.requires_grad:
            params[group_of.get(id(parameter), "weights")].append(parameter)
    device = next(model.parameters()).device
    groups: list[dict[str, Any]] = [
        _group("weights", params["weights"], settings.weights_lr, weights_decay, device),
        _group("bit", params["bit"], slower * settings.bit_lr, settings.bit_decay, device),
        _group(
            "deadzone", params["deadzone"], slower * settings.deadzone_lr, settings.deadzone_decay, device
        ),
    ]
    betas = (0.9, settings.beta2)
    return torch.optim.AdamW(groups, betas=betas, fused=True, capturable=device.type == "cuda")


def _group(
    name: str, params: list[nn.Parameter], lr: float, decay: float, device: torch.device
) -> dict[str, Any]:
    """A parameter group. On CUDA its rate is a tensor there, so that a captured step sees the rate change."""
    now = torch.tensor(lr, device=device) if device.type == "cuda" else lr
    return {"name": name, "params": params, "lr": now, "peak_lr": lr, "weight_decay": decay}


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's learning rate becomes `factor` times its setting."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(group["peak_lr"] * factor)
        else:
            group["lr"] = group["peak_lr"] * factor


class TrainingStep:
    """One step: forward pass, loss, backward pass, optimizer. On CUDA it is replayed from a captured graph.

    A ResNet-20's step is thousands of small kernels, which take the host longer to launch than the device to
    run; a graph launches them all at once. Nothing here makes the host wait for an accelerator.

    With several ranks each takes the step on its shard of the batch, and no graph is captured.
    """

    EAGER_STEPS = 3  # before a graph is captured: cuDNN and the optimizer set up their state in them

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        penalty: Penalty,
        precision: str = "float32",
        keep_dead: Callable[[nn.Module], list[tuple[Tensor, Tensor]]] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.optimizer, self.penalty, self.precision = model, optimizer, penalty, precision
        self.keep_dead, self.processes = keep_dead, processes
        self.device = next(model.parameters()).device
        self.coefficient = torch.zeros((), device=self.device)  # of the penalty
        may_capture = self.device.type == "cuda" and processes.count == 1
        self.host = use_of_the_host(model)
        self.captures = may_capture and not any(self.host)  # graphs, once it has warmed up
        self.not_captured = ""  # why no graph could be captured, where one was tried
        self.graphs: dict[tuple[bool, int], _Graph] = {}
        self.seen: dict[tuple[bool, int], int] = {}
        self.replayed: _Graph | None = None  # in the last step; None where it was taken without one
        self.left: dict[str, Tensor] = {}  # what the last epoch left, for the ledger to compare

    def __call__(
        self, images: Tensor, labels: Tensor, coefficient: float, batch_size: int | None = None
    ) -> Tensor:
        """Take the step; returns (3,): the loss trained on, its cross-entropy, and the penalty, unweighted.

        All are those of the whole batch, from before the optimizer moves. The penalty is 0 where the
        coefficient is, since it is not computed then.
        `coefficient` is the penalty's in this step. `batch_size` is the number of images in the whole batch,
        where `images` are this rank's shard of it.
        Raises: on the CPU FloatingPointError where the loss is not finite, before the optimizer moves.
        """
        # With a coefficient of 0 the penalty adds no gradient, so it is not computed.
        penalised = coefficient != 0
        self.coefficient.fill_(coefficient)
        self.replayed = None
        if not self.captures:
            return self._run(images, labels, penalised, batch_size)
        key = (penalised, len(labels))
        self.seen[key] = self.seen.get(key, 0) + 1
        if key not in self.graphs and self.seen[key] <= self.EAGER_STEPS:
            return self._run(images, labels, penalised)
        if key not in self.graphs:
            stream = torch.cuda.current_stream()
            try:
                self.graphs[key] = self._capture(images, labels, penalised)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # it needs the host in a way that `use_of_the_host` could not see
                torch.cuda.set_stream(stream)
                self.captures, self.not_captured = False, first_line(error)
                self.graphs.clear()
                return self._run(images, labels, penalised)
        self.replayed = self.graphs[key]
        return self.replayed.replay(images, labels)

    def _run(self, images: Tensor, labels: Tensor, penalised: bool, batch_size: int | None = None) -> Tensor:
        # A CUDA graph writes gradients to fixed addresses: once one exists, zero them in place.
        self.optimizer.zero_grad(set_to_none=not self.graphs)
        with parametrize.cached():  # so that each quantizer runs once, for the forward pass and the penalty
            if self.captures and torch.cuda.is_current_stream_capturing():
                self._quantize_side_by_side()
            with autocast(self.device, self.precision):
                logits = self.model(images)
            # At least float32; in a network of float64 nothing is rounded to less.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            cross_entropy = self._cross_entropy(logits, labels, batch_size)
            penalty = self.penalty(self.model) if penalised else torch.zeros_like(cross_entropy)
            loss = (
                cross_entropy + self.coefficient * penalty / self.processes.count
                if penalised
                else cross_entropy
            )
            kept = self.keep_dead(self.model) if self.keep_dead and penalised else []
        loss.backward()
        losses = torch.stack((loss, cross_entropy, penalty / self.processes.count)).detach()
        if self.processes.count > 1:
            losses = sum_gradients(self.processes, self.model.parameters(), losses)
        if self.device.type == "cpu" and not math.isfinite(losses[0].item()):
            raise FloatingPointError(f"the loss is {losses[0].item()}")
        self.optimizer.step()
        with torch.no_grad():
            for weight, mask in kept:
                weight.mul_(mask)
        return losses

    def _quantize_side_by_side(self) -> None:
        """Fill the open `parametrize.cached()` with every quantized weight, in the graph that is captured.

        A quantizer is some sixty kernels on few numbers, each of which leaves most of a GPU idle. On streams
        of their own the quantizers run beside each other, and autograd runs the backward pass of each on its
        stream.
        """
        weights: list[tuple[Any, torch.cuda.Stream]] = []
        here = torch.cuda.current_stream()
        for layer in quantized_layers(self.model).values():
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                weights.append((layer.weight, stream))
        for weight, stream in weights:
            here.wait_stream(stream)
            weight.record_stream(here)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, batch_size: int | None) -> Tensor:
        """The mean over the batch; with several ranks, this rank's part of that mean."""
        if self.processes.count == 1:
            return F.cross_entropy(logits, labels)
        assert batch_size is not None
        return F.cross_entropy(logits, labels, reduction="sum") / batch_size

    def _capture(self, images: Tensor, labels: Tensor, penalised: bool) -> "_Graph":
        self.optimizer.zero_grad(set_to_none=True)
        images, labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings():
            # A penalty on the stored weights gives them a gradient from another stream than their quantizers
            # do, which autograd waits for as it should.
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
            with torch.cuda.graph(graph):
                losses = self._run(images, labels, penalised)
        gradients = [(p, p.grad) for p in self.model.parameters()]
        return _Graph(graph, images, labels, losses, gradients)


@dataclass(frozen=True)
class Pipeline:
    """All that an epoch is made of: what trains, on what, at which rates, and what tests and counts."""

    settings: Settings
    step: TrainingStep  # holds model, optimizer and penalty
    train_batches: TrainBatches
    test_batches: TestBatches
    evaluator: Evaluator
    rate_schedule: Schedule  # factor of every group's learning rate
    sparsity_schedule: Schedule  # factor of the penalty's coefficient

    @property
    def model(self) -> nn.Module:
        return self.step.model


@dataclass(frozen=True)
class _Graph:
    """A captured step and the tensors that it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor
    losses: Tensor
    gradients: list[tuple[nn.Parameter, Tensor | None]]

    def replay(self, images: Tensor, labels: Tensor) -> Tensor:
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        for parameter, gradient in self.gradients:  # each graph has its own, and another may have run last
            parameter.grad = gradient
        return self.losses


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bf16 for convolutions and classifier under precision "bf16"; quantizers and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def train_epoch(
    step: TrainingStep,
    batches: TrainBatches,
    epoch: int,
    coefficient: float,
    progress: Progress | None = None,
) -> EpochLosses:
    """Train on each batch of one epoch (from 0); the gradients of its last step stay in place.

    Raises: NotFiniteError with the step (from 1) and the first layer concerned. On the CPU every loss is
        read before the optimizer moves, so the weights are those before that step; on other devices reading
        it would make the host wait, and the weights have moved on.
    """
    step.model.train()
    losses = torch.zeros(len(batches), 3, device=step.device)
    started = time.perf_counter()
    for i, (images, labels) in enumerate(batches.epoch(epoch)):
        try:
            losses[i] = step(images, labels, coefficient, batches.sizes[i])
        except (FloatingPointError, NotFiniteWeightError) as error:
            raise NotFiniteError(_not_finite(step, images, i)) from error
        if progress:
            progress(i + 1, len(batches), time.perf_counter() - started)
    sums = in_float64(losses).cpu()
    if not sums.isfinite().all():
        raise NotFiniteError(_not_finite(step, images, int((~sums.isfinite()).any(1).nonzero()[0])))
    if not torch.stack([p.isfinite().all() for p in step.model.parameters()]).all():
        raise NotFiniteError(_not_finite(step, images, len(batches) - 1))
    sizes = torch.tensor(batches.sizes, dtype=torch.double)[:, None]
    loss, cross_entropy, _ = ((sums * sizes).sum(0) / sizes.sum()).tolist()
    return EpochLosses(loss, cross_entropy, sums.tolist())


@torch.no_grad()
def _not_finite(step: TrainingStep, images: Tensor, index: int) -> str:
    """Where the numbers stop being finite: a stored parameter, the images, or a layer's output."""
    where = next((f"parameter {n}" for n, p in step.model.named_parameters() if not p.isfinite().all()), None)
    if where is None and not images.isfinite().all():
        where = "the images themselves"
    if where is None:
        where = _first_layer_not_finite(step, images) or "the loss, every layer's output being finite"
    return f"the loss is not finite at step {index + 1}; the first numbers that are not finite: {where}"


def _first_layer_not_finite(step: TrainingStep, images: Tensor) -> str | None:
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: None if output.isfinite().all() else found.append(name)

    leaves = [(n, m) for n, m in step.model.named_modules() if isinstance(m, LAYERS)]
    hooks = [module.register_forward_hook(look(f"the output of {name}")) for name, module in leaves]
    # Other ranks may not get here, and a global batch norm in train mode would wait for them forever.
    if step.processes.count > 1:
        step.model.eval()
    try:
        with autocast(step.device, step.precision):
            step.model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


@torch.no_grad()
def renew_batch_norms(
    model: nn.Module, batches: TrainBatches, epoch: int, count: int, precision: str = "float32"
) -> None:
    """Replace every batch norm's running statistics by the plain mean over `count` training batches.

    While thresholds flip weights in and out of the dead zone from step to step, the running averages describe
    the networks of some steps ago, and not the one that is tested. The weights do not change.
    """
    model.train()
    # A network may keep some of its batch norms in evaluation mode: their statistics are not to be renewed.
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    momenta = [norm.momentum for norm in norms]
    device = next(model.parameters()).device
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # asks batch norm for the plain mean over the batches it sees
        with parametrize.cached(), autocast(device, precision):
            for images, _ in itertools.islice(batches.epoch(epoch), min(count, len(batches))):
                model(images)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.inference_mode()
def predict(network: nn.Module, batches: TestBatches, precision: str = "float32") -> tuple[Tensor, Tensor]:
    """The network's logits for the test images, and the images' labels, in the mode that it is in.

    Shapes: -> (M, classes), (M,), M the images of this rank's shard.
    """
    with parametrize.cached(), autocast(batches.labels.device, precision):
        logits = [network(images) for images, _ in batches]
    return torch.cat(logits), batches.labels


def measure_accuracy(
    model: nn.Module, batches: TestBatches, precision: str = "float32", processes: Processes = ALONE
) -> float:
    """Share of all test images whose largest logit is their label's; each rank tests its own shard.

    The model is left in evaluation mode.
    """
    logits, labels = predict(model.eval(), batches, precision)
    hits = processes.sum(torch.stack([(logits.argmax(1) == labels).sum(), labels.new_tensor(len(labels))]))
    right, tested = hits.tolist()
    return right / tested
