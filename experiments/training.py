"""One epoch of training, one pass over the test set, and the optimizer they need."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experiments.data import TestBatches, TrainBatches
from experiments.settings import Settings
from utils_quantization import quantizers

Progress = Callable[[int, int, float], None]  # steps done, steps in all, seconds since the epoch began


class NotFiniteError(Exception):
    """The loss is no longer a number; the message says where that began."""


@dataclass(frozen=True)
class EpochLosses:
    """Means over an epoch's images: the loss trained on, and its cross-entropy part."""

    loss: float
    cross_entropy: float


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW in three groups: weights (with biases and batch norms), bit logits, dead-zone logits."""
    bit = [q.logit_bit for q in quantizers(model).values() if q.logit_bit.requires_grad]
    deadzone = [q.logit_dz for q in quantizers(model).values() if q.logit_dz.requires_grad]
    logits = {id(p) for p in bit + deadzone}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in logits]
    groups: list[dict[str, Any]] = [
        {
            "name": "weights",
            "params": weights,
            "lr": settings.weights_lr,
            "weight_decay": settings.weights_decay,
        },
        {"name": "bit", "params": bit, "lr": settings.bit_lr, "weight_decay": settings.bit_decay},
        {
            "name": "deadzone",
            "params": deadzone,
            "lr": settings.deadzone_lr,
            "weight_decay": settings.deadzone_decay,
        },
    ]
    trained = sum(p.requires_grad for p in model.parameters())
    assert sum(len(g["params"]) for g in groups) == trained, "the groups do not partition the parameters"
    for group in groups:
        group["peak_lr"] = group["lr"]
    return torch.optim.AdamW(groups, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's learning rate becomes `factor` times its setting."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: TrainBatches,
    epoch: int,
    penalty: Callable[[nn.Module], Tensor],
    sparsity_weight: float,
    progress: Progress | None = None,
) -> EpochLosses:
    """One pass over the training set; the gradients of its last step stay in place.

    Nothing in the loop makes the host wait for an accelerator: sums stay there until the epoch's end.
    Raises: NotFiniteError with the step (from 1) and the first layer concerned. On the CPU, where each loss
        is looked at, the weights are then those before that step; on other devices they are not.
    """
    model.train()
    device = batches.device
    losses: list[tuple[Tensor, Tensor, int]] = []
    started = time.perf_counter()
    for step, (images, labels) in enumerate(batches.epoch(epoch)):
        optimizer.zero_grad()
        try:
            with parametrize.cached():
                cross_entropy = F.cross_entropy(model(images), labels)
                # At weight 0 the penalty's gradient is 0: it is not worth its time.
                loss = cross_entropy + sparsity_weight * penalty(model) if sparsity_weight else cross_entropy
            loss.backward()
        except ValueError as error:  # a quantizer refused its weight
            raise NotFiniteError(_not_finite(model, images, step)) from error
        if device.type == "cpu" and not math.isfinite(loss.item()):
            raise NotFiniteError(_not_finite(model, images, step))
        optimizer.step()
        losses.append((loss.detach(), cross_entropy.detach(), len(labels)))
        if progress:
            progress(step + 1, len(batches), time.perf_counter() - started)
    sums = torch.stack([torch.stack((a, b)) for a, b, _ in losses]).double().cpu()  # (steps, 2)
    if not sums.isfinite().all():
        first = int((~sums.isfinite()).any(1).nonzero()[0])
        raise NotFiniteError(_not_finite(model, images, first))
    sizes = torch.tensor([n for _, _, n in losses], dtype=torch.double)
    loss_mean, cross_entropy_mean = ((sums * sizes[:, None]).sum(0) / sizes.sum()).tolist()
    return EpochLosses(loss_mean, cross_entropy_mean)


@torch.no_grad()
def _not_finite(model: nn.Module, images: Tensor, step: int) -> str:
    """Where the numbers stop being finite: a stored parameter, the images, or a layer's output."""
    where = next((f"parameter {n}" for n, p in model.named_parameters() if not p.isfinite().all()), None)
    if where is None and not images.isfinite().all():
        where = "the images themselves"
    if where is None:
        where = _first_layer_not_finite(model, images) or "the loss, every layer's output being finite"
    return f"the loss is not finite at step {step + 1}; the first numbers that are not finite: {where}"


def _first_layer_not_finite(model: nn.Module, images: Tensor) -> str | None:
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, inputs, output: None if output.isfinite().all() else found.append(name)

    leaves = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    ]
    hooks = [module.register_forward_hook(look(f"the output of {name}")) for name, module in leaves]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


@torch.inference_mode()
def measure_accuracy(model: nn.Module, batches: TestBatches) -> float:
    """Share of the test images whose largest logit is their label's."""
    model.eval()
    correct = torch.zeros((), dtype=torch.long, device=next(model.parameters()).device)
    total = 0
    with parametrize.cached():
        for images, labels in batches:
            correct += (model(images).argmax(1) == labels).sum()
            total += len(labels)
    return correct.item() / total
