"""Where the run computes: the device, the threads, the memory allocator."""

import ctypes
import os
import sys

import torch

from experiments.distributed import ALONE, Processes
from experiments.settings import Settings

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """Raises: ValueError naming --device where this machine has no such device."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in found.items() if there))
    if not found[name]:
        usable = ", ".join(kind for kind, there in found.items() if there)
        raise ValueError(f"--device is {name!r}, which this machine does not have; it has {usable}")
    return torch.device(name)


def prepare_device(settings: Settings, processes: Processes = ALONE) -> torch.device:
    """Set up the process for the run: threads, allocator, and arithmetic that repeats digit for digit.

    Raises: ValueError naming the setting that this machine or this number of processes does not allow.
    """
    device = choose_device(settings.device)
    if processes.count > settings.batch_size:
        raise ValueError(
            f"--batch-size is {settings.batch_size}, which {processes.count} processes cannot share; "
            f"give {processes.count} or more"
        )
    if processes.count > 1 and device.type == "mps":
        raise ValueError("--device is mps, which several processes cannot train on; give --device cpu")
    if processes.count > 1 and device.type == "cuda":
        if processes.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started more processes here than there are GPUs ({torch.cuda.device_count()}); "
                f"give --nproc-per-node={torch.cuda.device_count()}, or --device cpu"
            )
        device = torch.device("cuda", processes.local_rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(settings.threads or usable_cores())
    if device.type == "cpu":
        keep_freed_memory()
    if settings.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"--precision is 'tf32', which needs CUDA; this run is on {device.type}")
    # Of the algorithms that repeat digit for digit, the fastest one.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


def usable_cores() -> int:
    """Cores that this process may use, and no more than torch would take (OMP_NUM_THREADS is kept)."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks for the next step instead of giving them back; True where it took hold.

    A stage-1 activation at batch 512 is exactly 32 MiB, the ceiling of glibc's mmap threshold, so by default
    each is mapped, faulted in page by page and unmapped again at every step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # a C library without it (musl)
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))


def describe_device(device: torch.device) -> str:
    """For the run's first lines, e.g. "cpu, 2 threads" or "cuda, NVIDIA H100"."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads"
