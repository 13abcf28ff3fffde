"""Training in several processes is training in one: shares, batch norms, steps, whole runs of torchrun."""

import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from experiments.checkpoint import load_checkpoint
from experiments.data import Dataset, TestBatches, TrainBatches
from experiments.distributed import ALONE, Processes, use_global_batch_norms, use_local_batch_norms
from experiments.settings import Settings
from experiments.sparsity import coupled_group_lasso, keep_dead_slices
from experiments.training import (
    NotFiniteError,
    TrainingStep,
    make_optimizer,
    measure_accuracy,
    renew_batch_norms,
    train_epoch,
)
from resnet import ResNet, resnet20
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers

ROOT = Path(__file__).parent.parent
PATIENCE = 60  # seconds for whatever could hang
NAN = float("nan")


# Processes that stay, connected by Gloo: a start costs seconds, a question to them milliseconds.


class Team:
    """`count` processes; `ask` has each call a function of this module and returns what each found."""

    def __init__(self, count: int, meeting: Path) -> None:
        # Forked from a server that has imported torch once: as many imports would take seconds each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "hypothesis", "pytest"])
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, count, meeting, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        deadline = time.monotonic() + PATIENCE
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                self.kill()
                pytest.fail(f"{function.__name__} hangs in a process of the team")
            answers.append(pickle.loads(pipe.recv_bytes()))
        wrong = [answer for worked, answer in answers if not worked]
        assert not wrong, "\n".join(wrong)
        return [answer for _, answer in answers]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank: int, count: int, meeting: Path, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=count)
    while True:
        function, arguments = pickle.loads(pipe.recv_bytes())
        try:
            answer = True, function(Processes(rank, count, rank), *arguments)
        except Exception:
            answer = False, f"in process {rank}:\n{traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(answer))


@pytest.fixture(scope="module")
def teams(tmp_path_factory) -> Iterator[dict[int, Team]]:
    folder = tmp_path_factory.mktemp("meetings")
    found = {count: Team(count, folder / f"of_{count}") for count in (2, 3)}
    yield found
    for team in found.values():
        team.kill()


def exact(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """The program rounds to float32 what bf16 may have made; a comparison in float64 goes without that."""
    if dtype != torch.double:
        return contextlib.nullcontext()
    return mock.patch.object(Tensor, "float", Tensor.double)


# Shares and sums.


@given(st.integers(0, 50), st.integers(0, 300), st.integers(1, 40))
@settings(deadline=None)
def test_the_shares_are_the_places_in_order_and_none_is_larger_than_another_by_two(first, size, count):
    shares = [Processes(rank, count).shard(first, first + size) for rank in range(count)]
    places = [place for share in shares for place in range(share.start, share.stop)]
    assert places == list(range(first, first + size))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


def sum_and_tell(processes: Processes) -> tuple[Tensor, Any]:
    mine = torch.tensor([1.0, 10.0]) * (processes.rank + 1)
    total = processes.sum(mine)
    assert total is mine
    return total, processes.broadcast({"of": "the first"} if processes.first else None)


@pytest.mark.parametrize("count", [2, 3])
def test_a_sum_and_what_the_first_has_reach_all(teams, count):
    together = sum(range(1, count + 1))
    for total, told in teams[count].ask(sum_and_tell):
        assert total.tolist() == [together, 10 * together]
        assert told == {"of": "the first"}


def test_one_process_alone_asks_nobody():
    tensor = torch.ones(2)
    assert ALONE.sum(tensor) is tensor
    assert tensor.tolist() == [1, 1]
    assert ALONE.broadcast("x") == "x"


# Batch norms, against torch's own on the whole batch.

Batches = list[tuple[Tensor, Tensor, tuple[int, ...]]]  # x, the gradient of y, where the shares are cut


def normalise_shares(processes: Processes, norm: nn.BatchNorm2d, batches: Batches) -> list[dict[str, Tensor]]:
    norm = copy.deepcopy(norm)
    if processes.count > 1:
        use_global_batch_norms(nn.Sequential(norm), processes)
    found = []
    with exact(norm.weight.dtype):
        for x, g, cuts in batches:
            ends = (0, *cuts, len(x)) if processes.count > 1 else (0, len(x))
            share = slice(ends[processes.rank], ends[processes.rank + 1])
            part = x[share].clone().requires_grad_()
            norm.zero_grad()
            y = norm(part)
            y.backward(g[share])
            found.append({
                "y": y.detach(),
                "dx": part.grad,
                "dweight": norm.weight.grad.clone(),
                "dbias": norm.bias.grad.clone(),
                **{name: value.clone() for name, value in norm.state_dict().items()},
            })  # fmt: skip
    return found


def compare_batch_norms(team: Team, norm: nn.BatchNorm2d, batches: Batches, tolerance: float) -> None:
    answers = team.ask(normalise_shares, norm, batches)
    alone = normalise_shares(ALONE, norm, batches)
    for i, expected in enumerate(alone):
        parts = [answer[i] for answer in answers]
        found = (
            {name: torch.cat([part[name] for part in parts]) for name in ("y", "dx")}
            | {name: sum(part[name] for part in parts) for name in ("dweight", "dbias")}
        )  # fmt: skip
        for name in norm.state_dict():
            assert all(torch.equal(part[name], parts[0][name]) for part in parts), name
            found[name] = parts[0][name]
        assert list(parts[0]) == list(expected)  # the keys of the state, too
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name],
                value,
                rtol=tolerance,
                atol=tolerance * (1 + float(value.double().abs().max())),
                msg=lambda text, name=name: f"{name}: {text}",
            )


def batch_norm(
    channels: int, dtype: torch.dtype, generator: torch.Generator, **arguments: Any
) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **arguments).to(dtype)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.copy_(torch.rand(channels, generator=generator, dtype=torch.double) + 0.5)
    return norm


@given(data=st.data(), count=st.sampled_from([2, 3]), dtype=st.sampled_from([torch.double, torch.float]))
@settings(max_examples=40, deadline=None)
def test_a_batch_norm_over_shares_of_any_size_is_torchs_own_over_the_whole_batch(teams, data, count, dtype):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    channels = data.draw(st.integers(1, 4))
    momentum = data.draw(
        st.sampled_from([0.1, 0.7, None])
    )  # None: the plain mean, as `renew_batch_norms` asks
    norm = batch_norm(
        channels, dtype, generator, momentum=momentum, eps=data.draw(st.sampled_from([1e-5, 0.1]))
    )
    norm.train(data.draw(st.integers(0, 4)) > 0)
    batches = []
    for _ in range(data.draw(st.integers(1, 3))):
        rows, side = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 3))
        x, g = torch.randn(2, rows, channels, side, side, generator=generator, dtype=torch.double).to(dtype)
        cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=count - 1, max_size=count - 1)))
        batches.append((x, g, tuple(cuts)))
    compare_batch_norms(teams[count], norm, batches, 1e-10 if dtype == torch.double else 2e-5)


def test_a_large_mean_costs_the_variance_no_digits(teams):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 40, 3, 4, 4, generator=generator)
    norm = batch_norm(3, torch.float, generator)
    (expected,) = normalise_shares(
        ALONE, copy.deepcopy(norm).double(), [((x + 3000).double(), g.double(), ())]
    )
    found = teams[2].ask(normalise_shares, norm, [(x + 3000, g, (13,))])
    for (part,) in found:
        # float32 holds squares near 9e6 to 0.5 only, and the variance is near 1.
        torch.testing.assert_close(part["running_var"].double(), expected["running_var"], rtol=1e-5, atol=0)
    y = torch.cat([part["y"] for (part,) in found])
    torch.testing.assert_close(y.double(), expected["y"], rtol=0, atol=2e-3)


def test_a_batch_norm_takes_bf16_images_as_torchs_own_does(teams):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 9, 3, 4, 4, generator=generator).to(torch.bfloat16)
    norm = batch_norm(3, torch.float, generator)
    ours = teams[2].ask(normalise_shares, norm, [(x, g, (4,))])
    (theirs,) = normalise_shares(ALONE, norm, [(x, g, ())])
    for name in ("y", "dx"):
        found = torch.cat([part[name] for (part,) in ours])
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, theirs[name], rtol=2e-2, atol=2e-2)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[0][0][name], theirs[name], rtol=1e-5, atol=1e-6)


def test_a_network_keeps_its_keys_and_values_with_global_batch_norms_and_is_the_plain_one_again():
    model = ResNet(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    plain = [type(module) for module in model.modules()]

    use_global_batch_norms(model, Processes(1, 2))
    assert list(model.state_dict()) == list(before)
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert kinds == {"GlobalBatchNorm"}

    use_local_batch_norms(model)
    assert [type(module) for module in model.modules()] == plain
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Training steps of the whole ResNet-20.

TRAIN_IMAGES, BATCH = 15, 7  # batches of 7, 7 and 1: the last leaves processes without an image
PENALTIES = [0.0, 4e-3]  # an epoch without and one with the penalty


def random_images(train: int, test: int = 1) -> Dataset:
    generator = torch.Generator().manual_seed(train)
    images = torch.randint(256, (train + test, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (train + test,), generator=generator)
    return Dataset("random", "here", True, images[:train], labels[:train], images[train:], labels[train:])


def network(processes: Processes, dtype: torch.dtype = torch.float) -> nn.Module:
    """A quantized ResNet-20, three quarters of its weights zero and some of its filters."""
    torch.manual_seed(0)
    model = resnet20()
    coarse = {"init_bit_logit": 0.9, "init_deadzone_logit": 0.5}
    attach_weight_quantizers(model, ["^conv1$", "^linear$"], DeadZoneLDZCompander, coarse)
    with torch.no_grad():
        model.get_parameter("layer1.0.conv1.parametrizations.weight.original")[5] *= 1e-3
        model.get_parameter("layer3.0.conv2.parametrizations.weight.original")[:, 7] *= 1e-3
    model.to(dtype)
    if processes.count > 1:
        use_global_batch_norms(model, processes)
    return model


def training_step(model: nn.Module, processes: Processes) -> TrainingStep:
    optimizer = make_optimizer(model, Settings())
    penalty, keep_dead = coupled_group_lasso(model), keep_dead_slices(model)
    return TrainingStep(model, optimizer, penalty, keep_dead=keep_dead, processes=processes)


def batches_of(processes: Processes) -> TrainBatches:
    return TrainBatches(random_images(TRAIN_IMAGES), BATCH, 0, "cpu", processes)


def walk(batches: TrainBatches) -> Iterator[tuple[Tensor, Tensor, int, float]]:
    for epoch, penalty in enumerate(PENALTIES):
        for (images, labels), size in zip(batches.epoch(epoch), batches.sizes, strict=True):
            yield images, labels, size, penalty


@dataclass
class Step:
    losses: list[float]
    zeros: tuple[int, int]  # weights and filters, after the step
    after: dict[str, Tensor]


@torch.no_grad()
def zeros(model: nn.Module) -> tuple[int, int]:
    """Weights that are exactly zero, and filters of nothing else, in all convolutions."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    filters = sum(int((w == 0).all((1, 2, 3)).sum()) for w in weights)
    return sum(int((w == 0).sum()) for w in weights), filters


def take_steps(
    processes: Processes, dtype: torch.dtype, states: list[dict[str, Tensor]] | None = None
) -> list[Step]:
    """The steps of both epochs, the i-th from `states[i]`; one after the other where these are not given."""
    model = network(processes, dtype)
    model.train()
    step = training_step(model, processes)
    found = []
    for i, (images, labels, size, penalty) in enumerate(walk(batches_of(processes))):
        if states:
            model.load_state_dict(states[i])
        with exact(dtype):
            losses = step(images.to(dtype), labels, penalty, size).tolist()
        after = {name: value.clone() for name, value in model.state_dict().items()}
        found.append(Step(losses, zeros(model), after))
    return found


@pytest.fixture(scope="module")
def alone_in_float64() -> list[Step]:
    return take_steps(ALONE, torch.double)


@pytest.fixture(scope="module")
def alone_in_float32() -> list[Step]:
    return take_steps(ALONE, torch.float)


def assert_same_bits_in_all(answers: list[list[Step]]) -> None:
    first, *others = answers
    for i, step in enumerate(first):
        for name, value in step.after.items():
            assert all(torch.equal(other[i].after[name], value) for other in others), (i, name)


@pytest.mark.parametrize("count", [2, 3])
def test_in_float64_the_steps_are_those_of_one_process_and_the_same_to_the_bit_in_all(
    teams, alone_in_float64, count
):
    expected = alone_in_float64
    assert expected[0].zeros[1] > 0  # else equal counts of filters say little
    assert len({step.zeros for step in expected}) > 3
    answers = teams[count].ask(take_steps, torch.double)
    for ours, theirs in zip(answers[0], expected, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
        assert ours.zeros == theirs.zeros
    for name, value in expected[-1].after.items():
        torch.testing.assert_close(answers[0][-1].after[name], value, rtol=1e-7, atol=1e-8)
    assert_same_bits_in_all(answers)


@pytest.mark.parametrize("count", [2, 3])
def test_in_float32_each_step_from_the_same_state_has_the_loss_of_one_process(teams, alone_in_float32, count):
    states = [network(ALONE).state_dict(), *(step.after for step in alone_in_float32[:-1])]
    answers = teams[count].ask(take_steps, torch.float, states)
    for ours, theirs in zip(answers[0], alone_in_float32, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert_same_bits_in_all(answers)


def test_in_float32_the_processes_stay_the_same_to_the_bit_from_step_to_step(teams):
    assert_same_bits_in_all(teams[2].ask(take_steps, torch.float))


def renew(processes: Processes) -> dict[str, Tensor]:
    model = network(processes)
    renew_batch_norms(model, batches_of(processes), 0, 2)
    return dict(model.named_buffers())


def test_renewed_batch_norms_are_those_of_one_process(teams):
    expected = renew(ALONE)
    for found in teams[2].ask(renew):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def accuracies(processes: Processes, sizes: list[int]) -> list[float]:
    model = network(processes)
    return [
        measure_accuracy(model, TestBatches(random_images(1, n), "cpu", 20, processes), processes=processes)
        for n in sizes
    ]


@pytest.mark.parametrize("count", [2, 3])
def test_the_accuracy_over_shares_is_exactly_that_of_one_process(teams, count):
    sizes = [127, 60, 1]  # the last leaves processes without an image
    expected = accuracies(ALONE, sizes)
    assert 0 < expected[0] < 1
    assert teams[count].ask(accuracies, sizes) == [expected] * count


def train_into_nan(processes: Processes, where: int) -> str:
    """An epoch in which process `where` meets a NaN in its share of the second batch."""
    model = network(processes)
    batches = batches_of(processes)
    normalise, calls = batches.normalise, itertools.count(1)

    def spoiled(pixels: Tensor) -> Tensor:
        images = normalise(pixels)
        if next(calls) == 2 and processes.rank == where:
            images[0, 0, 0, 0] = NAN
        return images

    batches.normalise = spoiled
    with pytest.raises(NotFiniteError) as error:
        train_epoch(training_step(model, processes), batches, 0, 0.0)
    assert next(calls) == 3  # it stopped there
    return str(error.value)


@pytest.mark.parametrize("where", [0, 1])
def test_a_nan_in_one_process_ends_the_epoch_in_all(teams, where):
    said = teams[2].ask(train_into_nan, where)
    assert all(sentence.startswith("the loss is not finite at step 2;") for sentence in said)
    assert said[where].endswith("the images themselves")


def train_a_broken_weight(processes: Processes) -> str:
    model = network(processes)
    with torch.no_grad():
        model.get_parameter("layer2.0.conv1.parametrizations.weight.original")[0, 0, 0, 0] = NAN
    with pytest.raises(NotFiniteError) as error:
        train_epoch(training_step(model, processes), batches_of(processes), 0, 0.0)
    return str(error.value)


def test_a_nan_in_a_weight_ends_the_epoch_in_all_and_is_named(teams):
    for sentence in teams[2].ask(train_a_broken_weight):
        assert sentence.endswith("parameter layer2.0.conv1.parametrizations.weight.original")


# Whole runs, as torchrun starts them: each in a folder of its own, two at a time.

SMALL = ["--data", "synthetic", "--limit-train", "129", "--limit-test", "31", "--batch-size", "65",
         "--threads", "1", "--sparsity-delay", "0", "--sparsity-ramp", "1"]  # fmt: skip
ROW = re.compile(r"^ +(\d+) \|" + r" *[\d.]+ \|" * 5 + r" *[\d.]+$", re.MULTILINE)
PICTURES = [
    "accuracy_curve.png",
    "channel_liveness.png",
    "channels_over_time.png",
    "per_layer_channels.png",
    "sparsity_curves.png",
]
STOPPED_FILES = [*PICTURES, "history.json"]
FILES = [*STOPPED_FILES, "checkpoint_0001.pt", "checkpoint_0002.pt", "compressed.codeq", "slim.pt2"]


class Run:
    """One start of the script, by `count` processes, in `folder`; what it said and left there."""

    def __init__(self, folder: Path, count: int, *arguments: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.said = (
            folder,
            {name: folder / f"{name}-{time.time_ns()}" for name in ("out", "err")},
        )
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={count}"] if count > 1 else []
        # The mark is in the environment of every process of the run, also of those whose parent has gone.
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TEST_RUN": str(folder)}
        with self.said["out"].open("wb") as out, self.said["err"].open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "experiments.debug_run", *arguments],
                cwd=folder, env=environment, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def wait_for_row(self, epoch: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while epoch not in self.rows:
            assert self.process.poll() is None, f"it ended early:\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"no row {epoch}:\n{self.out}\n{self.err}"
            time.sleep(0.02)

    def worker(self, rank: int) -> int:
        (pid,) = (pid for pid, env in marked(self.folder) if f"RANK={rank}".encode() in env)
        return pid

    def end(self) -> "Run":
        self.status = self.process.wait(PATIENCE)
        return self

    @property
    def out(self) -> str:
        return self.said["out"].read_text()

    @property
    def err(self) -> str:
        return self.said["err"].read_text()

    @property
    def rows(self) -> list[int]:
        return [int(epoch) for epoch in ROW.findall(self.out)]

    @property
    def files(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "debug_output").iterdir())

    @property
    def history(self) -> dict[str, Any]:
        return json.loads((self.folder / "debug_output" / "history.json").read_text())

    def epoch(self, number: int) -> dict[str, float]:
        return load_checkpoint(self.folder / "debug_output" / f"checkpoint_{number:04d}.pt").records[-1]


def marked(folder: Path) -> list[tuple[int, list[bytes]]]:
    """The processes that a run in `folder` has, and their environments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            environment = path.read_bytes().split(b"\0")
            if f"TEST_RUN={folder}".encode() in environment:
                found.append((int(path.parent.name), environment))
    return found


TWO_EPOCHS, FORTY_EPOCHS = [*SMALL, "--epochs", "2"], [*SMALL, "--epochs", "40"]


def train_one_epoch_alone(base: Path) -> Run:
    run = Run(base / "alone", 1, *FORTY_EPOCHS)
    run.wait_for_row(1)
    run.process.kill()
    return run.end()


def run_two(base: Path) -> Run:
    return Run(base / "two", 2, *TWO_EPOCHS).end()


def kill_one_and_resume_by_one(base: Path) -> tuple[Run, list[str], Run]:
    """A worker is killed in the second epoch; one process does the rest. In between, what files there are."""
    killed = Run(base / "killed", 2, *TWO_EPOCHS)
    killed.wait_for_row(1)
    os.kill(killed.worker(1), signal.SIGKILL)
    files = killed.end().files
    return killed, files, Run(base / "killed", 1, *TWO_EPOCHS, "--resume").end()


def resume_by_two_and_terminate(base: Path, alone: Future[Run]) -> Run:
    """Two processes go on where one was after its first epoch, and are told to stop in the third."""
    begun = alone.result().folder / "debug_output" / "checkpoint_0001.pt"
    folder = base / "resumed"
    (folder / "debug_output").mkdir(parents=True)
    shutil.copy(begun, folder / "debug_output")
    run = Run(folder, 2, *FORTY_EPOCHS, "--resume")
    run.wait_for_row(2)
    os.kill(run.process.pid, signal.SIGTERM)
    return run.end()


def refuse(base: Path, name: str) -> Run:
    return Run(base / name, 2, *REFUSED[name][0]).end()


REFUSED = {
    "setting": (
        ["--epochs", "0"],
        "error: --epochs is 0; expected a whole number, 1 or more; --help lists the settings",
    ),
    "batch": (
        [*SMALL, "--batch-size", "1"],
        "error: --batch-size is 1, which 2 processes cannot share; give 2 or more",
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, Future[Any]]]:
    base = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2) as pool:
        alone = pool.submit(train_one_epoch_alone, base)
        yield {
            "alone": alone,
            "two": pool.submit(run_two, base),
            "resumed": pool.submit(resume_by_two_and_terminate, base, alone),
            "killed": pool.submit(kill_one_and_resume_by_one, base),
            **{name: pool.submit(refuse, base, name) for name in REFUSED},
        }
        pool.shutdown(wait=False, cancel_futures=True)
        for folder in base.iterdir():
            for pid, _ in marked(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def assert_none_left(run: Run) -> None:
    deadline = time.monotonic() + 10
    while (left := marked(run.folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def test_two_processes_print_one_table_and_write_one_set_of_files(runs):
    run = runs["two"].result()
    assert run.rows == [1, 2]
    for once in ("Versions: ", "Epoch |", "--- Final Compression Metrics ---", "--- Verdict ---", "Files: "):
        assert run.out.count(once) == 1
    assert "error" not in run.out
    assert run.files == sorted(FILES)
    assert run.status in (0, 1)  # so few steps may fail the verdict
    assert_none_left(run)


def test_the_head_and_the_history_say_how_many_processes_ran(runs):
    run = runs["two"].result()
    assert re.search(r"^Device: .*, 2 processes, ", run.out, re.MULTILINE)
    assert run.history["processes"] == 2
    assert run.history["device"] == "cpu, 1 threads, 2 processes"
    assert "processes" not in runs["alone"].result().out


def test_the_proofs_of_two_processes_hold_on_the_whole_test_set(runs):
    out = runs["two"].result().out
    assert "on 31 test images" in out
    for check in ("smaller network gives the same logits", "packed file gives the same logits"):
        assert f"PASS  {check}" in out


def test_the_first_epoch_of_two_processes_is_near_that_of_one(runs):
    two, alone = runs["two"].result().history["epochs"][0], runs["alone"].result().epoch(1)
    assert two["loss"] == pytest.approx(alone["loss"], rel=0.02)
    assert two["penalty"] == pytest.approx(alone["penalty"], rel=0.02)
    assert two["unstructured_sparsity"] == pytest.approx(alone["unstructured_sparsity"], abs=0.002)


def test_a_killed_worker_ends_the_run_with_a_word(runs):
    killed, *_ = runs["killed"].result()
    assert killed.status != 0
    assert killed.rows == [1]
    assert "gone" in killed.out or "SIGTERM" in killed.out
    assert "SIGKILL" in killed.err
    assert_none_left(killed)


def test_a_killed_worker_costs_none_of_the_finished_epochs_files(runs):
    _, files, _ = runs["killed"].result()
    assert files == sorted([*STOPPED_FILES, "checkpoint_0001.pt"])


def test_one_process_finishes_what_two_began(runs):
    *_, resumed = runs["killed"].result()
    assert resumed.rows == [1, 2]
    (went_on,) = resumed.history["resumed"]
    assert went_on["after_epoch"] == 1
    assert went_on["said"] == [
        "device cpu, 1 threads, 2 processes before, cpu, 1 threads now: the last digits may differ"
    ]
    assert resumed.history["stopped"] is None
    assert resumed.files == sorted(FILES)
    # The first epoch is the same to the bit as in the run of two from end to end, the second only near.
    two = runs["two"].result()
    assert resumed.epoch(1)["loss"] == two.epoch(1)["loss"]
    assert resumed.epoch(2)["penalty"] == pytest.approx(two.epoch(2)["penalty"], rel=0.02)


def test_two_processes_go_on_with_what_one_began(runs):
    resumed, alone = runs["resumed"].result(), runs["alone"].result()
    assert resumed.rows[:2] == [1, 2]
    same = ("loss", "accuracy", "penalty", "unstructured_sparsity", "seconds")
    assert [resumed.history["epochs"][0][key] for key in same] == [alone.epoch(1)[key] for key in same]
    assert "device cpu, 1 threads before, cpu, 1 threads, 2 processes now" in resumed.out
    second, like = resumed.history["epochs"][1], runs["two"].result().epoch(2)
    assert second["penalty"] == pytest.approx(like["penalty"], rel=0.05)


def test_sigterm_to_the_launcher_still_writes_the_finished_epochs_files(runs):
    run = runs["resumed"].result()
    done = run.rows[-1]
    assert run.status != 0
    assert run.out.count("stopped by SIGTERM") == 1
    assert run.history["stopped"] == f"stopped by SIGTERM in epoch {done + 1}"
    assert [record["epoch"] for record in run.history["epochs"]] == list(range(1, done + 1))
    assert set(run.files) == {*STOPPED_FILES, f"checkpoint_{done - 1:04d}.pt", f"checkpoint_{done:04d}.pt"}
    assert_none_left(run)


@pytest.mark.parametrize("name", ["setting", "batch"])
def test_bad_input_is_refused_in_one_sentence_and_once(runs, name):
    run = runs[name].result()
    assert run.status != 0
    assert run.out == ""
    assert [line for line in run.err.splitlines() if line.startswith("error: ")] == [REFUSED[name][1]]
    assert "/experiments/" not in run.err  # no trace of the program's own
    assert_none_left(run)
