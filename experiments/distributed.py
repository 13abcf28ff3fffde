"""Data-parallel training in the processes that torchrun starts, with torch.distributed on NCCL or Gloo.

Every process holds the whole network and computes on its shard of each batch. Gradients, losses and the
count of correct predictions are summed over all ranks. So are the sums inside each batch norm, which thereby
uses the mean and variance of the whole batch. An optimizer step on N processes then equals the step on one,
to rounding. (Over many optimizer steps rounding differences grow, as they do between any two machines: a
weight at the border between two levels of its quantizer is rounded to the one or to the other.)
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
from torch.nn.modules.batchnorm import _BatchNorm

T = TypeVar("T")


class LostProcessError(Exception):
    """Another process of this run ended or cannot be reached; the message is a sentence for the user."""


@dataclass(frozen=True)
class Processes:
    """The rank of this process, and how many processes the run has."""

    rank: int = 0
    count: int = 1  # of processes
    local_rank: int = 0  # rank among the processes on this machine, and the number of its GPU
    local_count: int = 1  # of processes on this machine

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
TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # its variables
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
MOST = 65535  # the last port, and more than there are processes


def _guarded(collective: Any, *arguments: Any) -> None:
    """Call a function of torch.distributed. Raises: LostProcessError where it raises another error."""
    try:
        collective(*arguments)
    except (RuntimeError, ValueError) as error:
        # torch's message begins with a place in torch's source, in brackets: leave that out.
        why = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])
        raise LostProcessError(f"another process of this run has gone ({why})") from None


def join_processes() -> Processes:
    """Connect this process to the others that torchrun started; without torchrun, return `ALONE`.

    Raises: LostProcessError if the processes do not find each other; ValueError where only some of torchrun's
        variables are there, or one is no number.
    """
    if not dist.is_torchelastic_launched():
        return ALONE
    missing = [name for name in TORCHRUNS if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"TORCHELASTIC_RUN_ID is set, as torchrun does, and {', '.join(missing)} is not; start with "
            f"torchrun, or unset it"
        )
    for name in NUMBERS:
        value = os.environ.get(name, "1")
        least, most = int("SIZE" in name), int(os.environ["WORLD_SIZE"]) - 1 if name == "RANK" else MOST
        if not re.fullmatch(r"[0-9]{1,9}", value) or not least <= int(value) <= most:
            raise ValueError(
                f"{name} is {value!r}; expected a whole number from {least} to {most}, as torchrun sets it; "
                f"start with torchrun, or unset TORCHELASTIC_RUN_ID"
            )
    # The default argument of these functions is the process group that there is when they are imported, and
    # torch's optimizers import them. Imported before, they do not hold it: threads of a group that outlives
    # Python end the process by abort().
    import torch.distributed.nn.functional

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _guarded(dist.init_process_group, backend)
    local_rank, local_count = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank, local_count)


def leave_processes() -> None:
    """Close the connection to the other processes; without torchrun there is none, and nothing happens."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(processes: Processes, parameters: Iterable[nn.Parameter], losses: Tensor) -> Tensor:
    """Sum the gradients over all ranks, in place, and the losses, all in one message.

    Shapes: losses (n,) -> their sums (n,). Parameters without a gradient are skipped.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = processes.sum(torch.cat([losses, *(g.reshape(-1) for g in gradients)]))
    total, *parts = flat.split([len(losses), *(g.numel() for g in gradients)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
    return total


def use_global_batch_norms(model: nn.Module, processes: Processes) -> None:
    """Have every batch norm use the statistics of the whole batch instead of those of this rank's shard."""
    for module in model.modules():
        if type(module).forward is _BatchNorm.forward:  # one with a forward of its own stays what it is
            module.local_class, module.processes = type(module), processes  # type: ignore[assignment]
            module.__class__ = GlobalBatchNorm  # keeps its parameters and its running statistics


def use_local_batch_norms(model: nn.Module) -> None:
    """Undo `use_global_batch_norms`: the network then works in one process alone."""
    for module in model.modules():
        if isinstance(module, GlobalBatchNorm):
            module.__class__ = module.local_class  # type: ignore[assignment]
            del module.local_class, module.processes


class GlobalBatchNorm(_BatchNorm):
    """A batch norm whose training mode uses the statistics of the whole batch, over the shards of all ranks.

    torch's SyncBatchNorm does the same, but on GPUs only. This one also runs on the CPU.
    """

    local_class: type[_BatchNorm]
    processes: Processes

    def _check_input_dim(self, input: Tensor) -> None:
        self.local_class._check_input_dim(self, input)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        weight: Any = self.weight
        bias: Any = self.bias
        if not self.affine:
            weight = x.new_ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
            bias = weight * 0
        y, mean, var, positions = _GlobalBatchNorm.apply(x, weight, bias, self.eps, self.processes)
        if self.running_mean is None:
            return y
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            # As in torch, momentum None asks for the mean over all batches so far.
            cumulative = self.momentum is None
            momentum: Any = 1 / self.num_batches_tracked.item() if cumulative else self.momentum  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * positions / (positions - 1), momentum)  # type: ignore[union-attr]
        return y


def _others(x: Tensor) -> list[int]:
    """All dimensions but that of the channels."""
    return [0, *range(2, x.ndim)]


class _GlobalBatchNorm(torch.autograd.Function):
    """Batch norm of x (B, C, ...), the shard of this rank. All ranks together have N positions a channel.

    With x_hat = (x - mean) / sqrt(var + eps), g the incoming gradient and sums over all N positions:

    dL/dx    = weight / sqrt(var + eps) (g - sum(g) / N - x_hat sum(g x_hat) / N)

    The gradients of bias and weight, sum g and sum g x_hat, are those of this rank's positions alone:
    `sum_gradients` later sums them over all ranks.

    Forward: (y, mean, var, N) with y of the shape of x and the others (C,).
    Source: Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, processes: Processes):  # type: ignore[no-untyped-def]
        positions = x.numel() // x.shape[1]  # of this rank; 0 for an empty shard
        var, mean = (
            torch.var_mean(x.to(weight.dtype), _others(x), correction=0)
            if positions
            else (weight * 0, weight * 0)
        )
        # float64, because the variance of the whole batch is computed as a difference of two large numbers.
        mean, var = mean.double(), var.double()
        sums = torch.stack(
            [mean * positions, (var + mean.square()) * positions, torch.full_like(mean, positions)]
        )
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
        shape = (1, -1, *[1] * (x.ndim - 2))
        inverse = (var + ctx.eps).rsqrt()
        x_hat = (x - mean.view(shape)) * inverse.view(shape)
        grad_bias, grad_weight = g.sum(_others(x), dtype=weight.dtype), (g * x_hat).sum(_others(x))
        per_bias, per_weight = ctx.processes.sum(torch.stack([grad_bias, grad_weight])) / counts
        centred = g - per_bias.view(shape) - x_hat * per_weight.view(shape)
        return (centred * (weight * inverse).view(shape)).to(x.dtype), grad_weight, grad_bias, None, None
