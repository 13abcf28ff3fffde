"""The device that a run takes, its number of threads, and an allocator that changes no digit."""

import ctypes
import inspect
import os
import platform
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from programs import DEADLINE, environment

from experiments import device, distributed
from experiments.device import (
    choose_device,
    describe_device,
    emulates_bf16,
    keep_freed_memory,
    prepare_device,
    usable_cores,
)
from experiments.distributed import Processes, join_processes
from experiments.settings import Settings

ACCELERATORS = ["cuda", "mps"]


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes this a machine with only the accelerators named."""

    def has(*kinds: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in kinds)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)

    return has


@pytest.fixture
def process(monkeypatch):
    """Undo what `prepare_device` changes in this process, and record whether it asks for the allocator."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    asked: list[str] = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda keep=True: asked.append("asked"))
    yield asked
    torch.set_num_threads(threads)
    cudnn.deterministic, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# Which device


@pytest.mark.parametrize(
    ("there", "taken"), [((), "cpu"), (("cuda",), "cuda"), (("mps",), "mps"), (("cuda", "mps"), "cuda")]
)
def test_auto_takes_cuda_else_mps_else_the_cpu(machine, there, taken):
    machine(*there)
    assert choose_device("auto") == torch.device(taken)


@pytest.mark.parametrize("name", ["cpu", *ACCELERATORS])
def test_a_device_named_is_taken_where_it_exists(machine, name):
    machine(*ACCELERATORS)
    assert choose_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ACCELERATORS)
def test_a_device_that_this_machine_lacks_is_refused_by_flag_and_name_with_those_it_has(machine, name):
    (other,) = set(ACCELERATORS) - {name}
    machine(other)
    with pytest.raises(ValueError) as error:
        choose_device(name)
    sentence = str(error.value)
    assert f"--device is '{name}'" in sentence
    assert "cpu" in sentence and other in sentence.partition("has")[2]
    assert "\n" not in sentence


def test_a_device_that_is_missing_is_refused_before_anything_of_the_process_is_changed(machine, process):
    machine()
    threads = torch.get_num_threads()
    with pytest.raises(ValueError):
        prepare_device(Settings(device="cuda", threads=threads + 1))
    assert torch.get_num_threads() == threads and process == []


@pytest.mark.parametrize(
    ("settings", "processes", "words"),
    [
        (Settings(device="cpu", batch_size=2), Processes(0, 3), ["--batch-size is 2", "3 processes"]),
        (Settings(device="mps"), Processes(0, 2), ["--device is mps", "--device cpu"]),
        (Settings(device="cuda"), Processes(0, 3, 0, local_count=3), ["--nproc-per-node=2", "--device cpu"]),
        (Settings(device="cuda"), Processes(2, 3, 2, local_count=3), ["--nproc-per-node=2", "--device cpu"]),
    ],
)
def test_more_processes_than_there_is_work_or_hardware_for_are_refused_before_anything_is_changed(
    machine, process, monkeypatch, settings, processes, words
):
    machine(*ACCELERATORS)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    threads = torch.get_num_threads()
    with pytest.raises(ValueError) as error:
        prepare_device(replace(settings, threads=threads + 1), processes)
    assert [word for word in words if word not in str(error.value)] == []
    assert torch.get_num_threads() == threads and process == []


@pytest.mark.parametrize("rank", range(6))
def test_each_process_takes_the_gpu_of_its_place_on_this_machine(machine, process, monkeypatch, rank):
    """Six processes on three machines of two GPUs each."""
    machine("cuda")
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    got = prepare_device(Settings(threads=1), Processes(rank, 6, local_rank=rank % 2, local_count=2))
    assert [got] == taken == [torch.device("cuda", rank % 2)]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux names a CPU's instructions there")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are the names of x86")
def test_bf16_is_emulated_where_the_cpu_has_no_instructions_for_it():
    has = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    able = {"avx512bw", "avx512vl", "avx512dq"} <= has or {"avx_ne_convert", "avx512_bf16"} & has
    assert emulates_bf16(torch.device("cpu")) == (not able)


@pytest.mark.parametrize("able", [True, False])
def test_bf16_is_emulated_on_a_gpu_that_says_so(monkeypatch, able):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: able or including_emulation
    )
    assert emulates_bf16(torch.device("cuda")) == (not able)
    assert not emulates_bf16(torch.device("mps"))


def test_torchrun_says_how_many_processes_this_machine_has(monkeypatch):
    answers = {"is_torchelastic_launched": True, "init_process_group": None}
    for name, answer in (answers | {"get_rank": 3, "get_world_size": 6}).items():
        monkeypatch.setattr(distributed.dist, name, lambda *_, answer=answer: answer)
    for name in distributed.TORCHRUNS:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert join_processes() == Processes(rank=3, count=6, local_rank=1, local_count=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "-1"), ("RANK", "2"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "1.5"),
     ("WORLD_SIZE", "0"), ("LOCAL_RANK", "x"), ("LOCAL_WORLD_SIZE", ""), ("MASTER_PORT", "65536")],
)  # fmt: skip
def test_a_variable_of_torchruns_that_is_no_number_is_named(monkeypatch, name, value):
    good = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip
    for variable, word in (good | {name: value}).items():
        monkeypatch.setenv(variable, word)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_: pytest.fail("it was begun"))
    with pytest.raises(ValueError, match=rf"^{name} is '{value}'; expected a whole number from [01] to \d+"):
        join_processes()


def test_the_device_is_described_with_its_threads():
    threads = torch.get_num_threads()
    assert describe_device(torch.device("cpu")) == f"cpu, {threads} threads"


# Threads


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_threads_asked_for_are_used(process, threads):
    prepare_device(Settings(device="cpu", threads=threads))
    assert torch.get_num_threads() == threads


def test_without_the_flag_the_threads_are_the_cores_that_this_process_may_use_and_no_more(
    process, monkeypatch
):
    torch.set_num_threads(64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert usable_cores() == 3
    prepare_device(Settings(device="cpu"))
    assert torch.get_num_threads() == 3


def test_fewer_threads_that_the_environment_asks_for_are_kept(process, monkeypatch):
    torch.set_num_threads(2)  # OMP_NUM_THREADS=2 has this effect.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert usable_cores() == 2


@pytest.mark.parametrize(("cores", "expected"), [(4, 4), (None, 1)])
def test_where_affinity_is_unknown_the_cores_of_the_machine_count(process, monkeypatch, cores, expected):
    torch.set_num_threads(64)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert usable_cores() == expected


def test_the_run_asks_for_arithmetic_that_repeats(process):
    torch.backends.cudnn.deterministic = False
    torch.backends.cudnn.allow_tf32 = True
    prepare_device(Settings(device="cpu", threads=1))
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_the_allocator_is_set_up_on_the_cpu(process):
    prepare_device(Settings(device="cpu", threads=1))
    assert process == ["asked"]


# The allocator

WITH_AND_WITHOUT = """
import hashlib, torch
from experiments.data import Dataset, TrainBatches
from experiments.device import keep_freed_memory
from experiments.settings import Settings
from experiments.sparsity import coupled_group_lasso
from experiments.training import TrainingStep, make_optimizer, train_epoch
from resnet import resnet20
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers

torch.set_num_threads(1)

def digits():
    torch.manual_seed(0)
    images, labels = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (32,))
    model = resnet20()
    attach_weight_quantizers(model, ["^conv1$", "^linear$"], DeadZoneLDZCompander, {})
    model.to(memory_format=torch.channels_last)
    step = TrainingStep(model, make_optimizer(model, Settings()), coupled_group_lasso(model))
    batches = TrainBatches(Dataset("", "", True, 10, images, labels, images, labels), 16, 0, "cpu")
    losses = [train_epoch(step, batches, epoch, 0.01) for epoch in (0, 1)]
    values = b"".join(v.contiguous().numpy().tobytes() for v in model.state_dict().values())
    grads = b"".join(p.grad.contiguous().numpy().tobytes() for p in model.parameters())
    return losses, hashlib.sha256(values + grads).hexdigest()

without = digits()
print(keep_freed_memory(), digits() == without, keep_freed_memory(), digits() == without)
"""


@pytest.mark.slow
def test_keeping_freed_memory_changes_no_bit_of_losses_weights_and_gradients():
    done = subprocess.run(
        [sys.executable, "-c", WITH_AND_WITHOUT],
        env=environment(), capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    took_hold, same, again, still_same = done.stdout.split()
    glibc = platform.libc_ver()[0] == "glibc"
    assert took_hold == again == str(glibc)
    assert same == still_same == "True"


def test_on_other_systems_the_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("the C library was touched"))
    assert keep_freed_memory() is False


@pytest.mark.parametrize("error", [OSError("no such library"), None])
def test_a_c_library_without_mallopt_is_no_error(monkeypatch, error):
    class Bare:
        """A C library with no function at all."""

    def load(_: object) -> Bare:
        if error:
            raise error
        return Bare()

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert keep_freed_memory() is False


def test_freed_memory_is_neither_mapped_apart_nor_ever_given_back(monkeypatch):
    asked: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            asked.append((parameter, value))
            return 1

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    assert keep_freed_memory() is True
    assert sorted(asked) == [(-4, 0), (-1, -1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never)
    asked.clear()
    assert keep_freed_memory(False) is True
    assert sorted(asked) == [(-4, 65_536), (-1, 131_072)]  # as glibc starts


@pytest.mark.parametrize(
    ("kind", "takes_hold", "calls"),
    [("cpu", True, [False, True]), ("cpu", False, [False]), ("meta", True, [])],
)
def test_freed_memory_is_returned_for_a_while_where_it_is_kept(monkeypatch, kind, takes_hold, calls):
    asked = []
    monkeypatch.setattr(device, "keep_freed_memory", lambda keep=True: asked.append(keep) or takes_hold)
    with pytest.raises(KeyError), device.returning_freed_memory(torch.device(kind)):
        assert asked == calls[:1]
        raise KeyError
    assert asked == calls


def test_an_allocator_that_refuses_is_not_said_to_have_taken_hold(monkeypatch):
    class Refusing:
        @staticmethod
        def mallopt(*_: int) -> int:
            return 0

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Refusing())
    assert keep_freed_memory() is False


# Warnings


@pytest.mark.usefixtures("process")
def test_torchs_warning_of_an_optimizer_that_a_graph_will_hold_is_not_shown():
    source = inspect.getsource(torch.optim.Optimizer)
    (words,) = re.findall(r'"(This instance was constructed with capturable=True [^"]*)"', source)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        warnings.warn(words, stacklevel=1)
        prepare_device(Settings(device="cpu"))
        warnings.warn(words, stacklevel=1)
    assert [str(warning.message) for warning in shown] == [words]
