"""Data-parallel training in the processes that torchrun starts, on torch.distributed: NCCL or Gloo.

Every process has the whole network and takes its share of each batch. What would differ from one process
is summed over all of them: gradients, losses, the test set's hits, and the sums inside each batch norm, so
that its mean and variance are those of the whole batch. A step on N processes is then the step on one, to
rounding. (Over many steps roundings grow, as they do between any two machines: a weight on the edge between
two of its quantizer's levels falls to one side or the other.)
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

T = TypeVar("T")


class LostProcessError(Exception):
    """Another process of the run has gone; the message says so."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those on this machine: its GPU

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints and writes files."""
        return self.rank == 0

    def shard(self, first: int, last: int) -> slice:
        """The slice of the indices `first` to `last` - 1 that this process handles.

        The shards of all ranks are disjoint, cover these indices in order, and differ in size by at most 1.
        """
        size = last - first
        return slice(first + size * self.rank // self.count, first + size * (self.rank + 1) // self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place, and return it: the same to the bit on each of them."""
        if self.count > 1:
            _guarded(dist.all_reduce, tensor)
        return tensor

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's value on every rank; what the other ranks pass is ignored."""
        box: list[Any] = [value]
        if self.count > 1:
            _guarded(dist.broadcast_object_list, box)
        return box[0]


ALONE = Processes()


def _guarded(collective: Any, *arguments: Any) -> None:
    try:
        collective(*arguments)
    except (RuntimeError, ValueError) as error:
        # Less the place in torch's source that it begins with.
        why = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])
        raise LostProcessError(f"another process of this run has gone ({why})") from None


def join_processes() -> Processes:
    """The processes that torchrun started, connected to each other; `ALONE` without torchrun.

    Raises: LostProcessError if they do not find each other.
    """
    if not dist.is_torchelastic_launched():
        return ALONE
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _guarded(dist.init_process_group, backend)
    return Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


def leave_processes(processes: Processes) -> None:
    if processes.count > 1 and dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(processes: Processes, parameters: Iterable[nn.Parameter], losses: Tensor) -> Tensor:
    """Sum the gradients over all processes, in one message with the (2,) losses; returns the losses' sum."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = processes.sum(torch.cat([losses, *(g.reshape(-1) for g in gradients)]))
    total, *parts = flat.split([len(losses), *(g.numel() for g in gradients)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
    return total


def use_global_batch_norms(model: nn.Module, processes: Processes) -> None:
    """Have every batch norm take its statistics over the whole batch, not over this process's share."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm  # its parameters and statistics stay where they are
            module.processes = processes  # type: ignore[assignment]


def use_local_batch_norms(model: nn.Module) -> None:
    """The plain network again, for one process."""
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm):
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
            del module.processes


class GlobalBatchNorm(nn.BatchNorm2d):
    """A batch norm over the shares of all processes.

    torch's own SyncBatchNorm is for GPUs alone, and this must be the same on the CPU.
    """

    processes: Processes

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, var, places = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps, self.processes)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            # A momentum of None asks for the plain mean over batches.
            plain = self.momentum is None
            pace: Any = 1 / self.num_batches_tracked.item() if plain else self.momentum  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, pace)  # type: ignore[union-attr]
            self.running_var.lerp_(var * places / (places - 1), pace)  # type: ignore[union-attr]
        return y


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch norm of x (B, C, H, W), this process's share; N places a channel in all processes together.

    With x_hat = (x - mean) / sqrt(var + eps), g the incoming gradient and sums over all N places:

    dL/dx    = weight / sqrt(var + eps) (g - sum(g) / N - x_hat sum(g x_hat) / N)
    dL/dbias = sum g, dL/dweight = sum g x_hat, over this process's places: gradients are summed later.

    Source: Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, processes: Processes):  # type: ignore[no-untyped-def]
        places = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0) if places else (weight * 0, weight * 0)
        mean, var = mean.double(), var.double()
        # In float64 the variance loses nothing as a difference of mean squares.
        sums = torch.stack([mean * places, (var + mean.square()) * places, torch.full_like(mean, places)])
        total, squares, counts = processes.sum(sums)
        mean = total / counts
        var = (squares / counts - mean.square()).clamp_min(0)
        mean, var = mean.to(weight.dtype), var.to(weight.dtype)
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        counts = counts.to(weight.dtype)
        ctx.save_for_backward(x, weight, mean, var, counts)
        ctx.eps, ctx.processes = eps, processes
        ctx.mark_non_differentiable(mean, var, counts)
        return y, mean, var, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
        x, weight, mean, var, counts = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        inverse = (var + ctx.eps).rsqrt()
        x_hat = (x - mean.view(shape)) * inverse.view(shape)
        grad_bias, grad_weight = g.sum((0, 2, 3), dtype=weight.dtype), (g * x_hat).sum((0, 2, 3))
        per_bias, per_weight = ctx.processes.sum(torch.stack([grad_bias, grad_weight])) / counts
        centred = g - per_bias.view(shape) - x_hat * per_weight.view(shape)
        return (centred * (weight * inverse).view(shape)).to(x.dtype), grad_weight, grad_bias, None, None
