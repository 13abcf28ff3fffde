"""The machine that a run computes on: choose the device, set the threads and the memory allocator."""

import contextlib
import ctypes
import os
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from experiments.distributed import ALONE, Processes
from experiments.settings import Settings

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt, from glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """The device of this name; for "auto" the first of cuda, mps and cpu that this machine has.

    Raises: ValueError naming --device if this machine has no such device.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in found.items() if there))
    if not found[name]:
        usable = ", ".join(kind for kind, there in found.items() if there)
        raise ValueError(f"--device is {name!r}, which this machine does not have; it has {usable}")
    return torch.device(name)


def float64_device(device: torch.device) -> torch.device:
    """Where tensors of this device are computed with in float64: there, or for MPS on the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its own device has none."""
    return tensor.to(float64_device(tensor.device)).double()


def prepare_device(settings: Settings, processes: Processes = ALONE) -> torch.device:
    """Set the threads, the allocator and deterministic arithmetic of this process. Returns: its device.

    Of several processes on GPUs, each takes the GPU of its local rank.

    Raises: ValueError naming the setting that this machine, or this number of processes, does not allow.
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
        # Every rank of this machine finds that, not only those without a GPU: rank 0 alone prints.
        if processes.local_count > torch.cuda.device_count():
            raise ValueError(
                f"torchrun started more processes here than there are GPUs ({torch.cuda.device_count()}); "
                f"give --nproc-per-node={torch.cuda.device_count()}, or --device cpu"
            )
        device = torch.device("cuda", processes.local_rank)
        torch.cuda.set_device(device)
    torch.set_num_threads(settings.threads or usable_cores())
    if device.type == "cpu":
        keep_freed_memory()
    # An optimizer that a graph will hold takes steps without one too: before the capture, and in the checks.
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    if settings.precision == "tf32" and device.type != "cuda":
        raise ValueError(f"--precision is 'tf32', which needs CUDA; this run is on {device.type}")
    # cuDNN times its deterministic algorithms and takes the fastest: the same for a whole process, but in
    # another process it may be another one.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


@contextlib.contextmanager
def without(setting: str) -> Iterator[None]:
    """Switch a setting of cuDNN off for a while.

    Without "allow_tf32" convolutions compute in float32 also where --precision tf32 has them round their
    inputs, and without "enabled" CUDA computes by torch's own kernels.
    """
    before = getattr(torch.backends.cudnn, setting)
    setattr(torch.backends.cudnn, setting, False)
    try:
        yield
    finally:
        setattr(torch.backends.cudnn, setting, before)


def usable_cores() -> int:
    """Count the cores that this process may use; OMP_NUM_THREADS and torch's own default limit them."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no such function
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def keep_freed_memory(keep: bool = True) -> bool:
    """Have glibc keep freed memory for the next training step instead of returning it to the system, or not.

    An activation of the first stage at batch size 512 has exactly 32 MiB, the ceiling of glibc's mmap
    threshold: by default each one is mapped, faulted in page by page and unmapped in every training step.

    Returns: whether glibc accepted the setting; False on other systems.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, another C library of Linux, has no mallopt
        return False
    most, threshold = (0, -1) if keep else (65_536, 131_072)  # or glibc's own values
    return bool(mallopt(M_MMAP_MAX, most)) and bool(mallopt(M_TRIM_THRESHOLD, threshold))


@contextlib.contextmanager
def returning_freed_memory(device: torch.device) -> Iterator[None]:
    """For a while, return freed memory to the system where a run on this device keeps it for the next step.

    What is seldom needed would else lie among the blocks of the steps, and the heap would grow with each use.
    """
    kept = device.type == "cpu" and keep_freed_memory(False)
    try:
        yield
    finally:
        if kept:
            keep_freed_memory()


def emulates_bf16(device: torch.device) -> bool:
    """Whether the device has no instructions for bf16, so that it is many times slower there than float32.

    That is so on most CPUs without AVX-512, and on NVIDIA's GPUs before Ampere. Of MPS nothing is known.
    """
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is lacking. On the CPU torch raises no error of its own for it."""
    on_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def describe_device(device: torch.device) -> str:
    """Describe the device for a run's first lines, such as "cpu, 2 threads" or "cuda, NVIDIA H100"."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads"
