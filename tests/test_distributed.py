"""Training in several processes equals training in one: shards, batch norms, steps."""

import contextlib
import copy
import itertools
import multiprocessing
import multiprocessing.connection
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import DEADLINE, environment
from torch import Tensor, nn

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

NAN = float("nan")
COUNTS = [2, pytest.param(3, marks=pytest.mark.slow)]  # of processes


# A process of the tests costs seconds to start and milliseconds to ask, so each serves all tests.


class Team:
    """`count` processes that Gloo connects; in each of them `ask` calls a function of this module."""

    def __init__(self, count: int, meetings: Path) -> None:
        self.count, self.meetings, self.starts = count, meetings, itertools.count()
        self.pipes: list[Any] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        # The processes are forks of a server that imports torch once: an import in each would take seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "hypothesis", "pytest"])
        meeting = self.meetings / f"{self.count}-{next(self.starts)}"
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.count, meeting, theirs), daemon=True)
            process.start()
            theirs.close()  # With no other copy of this end, the pipe closes when the process dies.
            self.pipes.append(ours)
            self.processes.append(process)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(processes, *arguments)` in each process and return the results by rank.

        After an error in one process the others may wait for it in a collective, so all are killed; the next
        call starts new ones.
        """
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        results: dict[int, Any] = {}
        while len(results) < self.count:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, DEADLINE)
            if not ready:
                self.kill()
                pytest.fail(f"{function.__name__} hangs in {len(waiting)} of {self.count} processes")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    worked, results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    worked, results[rank] = False, f"process {rank} died in {function.__name__}"
                if not worked:
                    self.kill()
                    pytest.fail(results[rank])
        return [results[rank] for rank in range(self.count)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


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
    """A team of each size, started by the first test that asks it something."""
    meetings = tmp_path_factory.mktemp("meetings")
    found = Teams(meetings)
    yield found
    for team in found.values():
        team.kill()


class Teams(dict[int, Team]):
    """A team of each size that a test asks for, made when the first one does."""

    def __init__(self, meetings: Path) -> None:
        self.meetings = meetings

    def __missing__(self, count: int) -> Team:
        self[count] = Team(count, self.meetings)
        return self[count]


def exact(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Have the sums that the program takes in float32 whatever its input taken in float64 for float64."""
    if dtype != torch.double:
        return contextlib.nullcontext()
    return mock.patch.object(Tensor, "float", Tensor.double)


# Shards and sums.


@given(st.integers(0, 50), st.integers(0, 300), st.integers(1, 40))
@settings(deadline=None)
def test_the_shards_cover_the_indices_in_order_and_differ_in_size_by_one_at_most(first, size, count):
    shards = [Processes(rank, count).shard(first, first + size) for rank in range(count)]
    indices = [index for shard in shards for index in range(shard.start, shard.stop)]
    assert indices == list(range(first, first + size))
    sizes = [shard.stop - shard.start for shard in shards]
    assert max(sizes) - min(sizes) <= 1


def sum_and_broadcast(processes: Processes) -> tuple[Tensor, Any]:
    mine = torch.tensor([1.0, 10.0]) * (processes.rank + 1)
    total = processes.sum(mine)
    assert total is mine
    return total, processes.broadcast({"of": "rank 0"} if processes.first else None)


@pytest.mark.parametrize("count", COUNTS)
def test_a_sum_and_a_broadcast_reach_every_rank(teams, count):
    together = sum(range(1, count + 1))
    for total, received in teams[count].ask(sum_and_broadcast):
        assert total.tolist() == [together, 10 * together]
        assert received == {"of": "rank 0"}


def test_one_process_alone_sums_and_broadcasts_to_itself():
    tensor = torch.ones(2)
    assert ALONE.sum(tensor) is tensor
    assert tensor.tolist() == [1, 1]
    assert ALONE.broadcast("x") == "x"


# A process alone, connected as torchrun would connect it.
LEAVES = """
import os
import torch
import torch.distributed as dist
from experiments.distributed import join_processes, leave_processes
join_processes()
weight = torch.ones(1, requires_grad=True)
weight.sum().backward()
torch.optim.AdamW([weight]).step()
leave_processes()
print({open(f"/proc/self/task/{thread}/comm").read().strip() for thread in os.listdir("/proc/self/task")})
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads in /proc")
def test_no_thread_of_torchs_outlives_the_connection():
    """Such a thread may end a rank by abort() when Python has ended, and torchrun then ends the others."""
    alone = {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    alone |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    found = subprocess.run(
        [sys.executable, "-c", LEAVES],
        env=environment() | alone,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert "gloo" not in found.stdout and found.returncode == 0 and "python" in found.stdout, found


# Batch norms over shards, against torch's batch norm on the whole batch.

Batches = list[tuple[Tensor, Tensor, tuple[int, ...]]]  # x, the gradient of y, the shards' inner boundaries


def normalise_shards(processes: Processes, norm: Any, batches: Batches) -> list[dict[str, Tensor]]:
    norm = copy.deepcopy(norm)
    if processes.count > 1:
        use_global_batch_norms(nn.Sequential(norm), processes)
    found = []
    with exact(batches[0][0].dtype):
        for x, g, cuts in batches:
            ends = (0, *cuts, len(x)) if processes.count > 1 else (0, len(x))
            shard = slice(ends[processes.rank], ends[processes.rank + 1])
            part = x[shard].clone().requires_grad_()
            norm.zero_grad()
            y = norm(part)
            y.backward(g[shard])
            found.append({
                "y": y.detach(),
                "dx": part.grad,
                **{f"d{name}": parameter.grad.clone() for name, parameter in norm.named_parameters()},
                **{name: value.clone() for name, value in norm.state_dict().items()},
            })  # fmt: skip
    return found


def compare_batch_norms(team: Team, norm: nn.Module, batches: Batches, tolerance: float) -> None:
    answers = team.ask(normalise_shards, norm, batches)
    alone = normalise_shards(ALONE, norm, batches)
    for i, expected in enumerate(alone):
        parts = [answer[i] for answer in answers]
        found = (
            {name: torch.cat([part[name] for part in parts]) for name in ("y", "dx")}
            | {f"d{n}": sum(part[f"d{n}"] for part in parts) for n, _ in norm.named_parameters()}
        )  # fmt: skip
        for name in norm.state_dict():
            assert all(torch.equal(part[name], parts[0][name]) for part in parts), name
            found[name] = parts[0][name]
        assert list(parts[0]) == list(expected)  # This compares the state_dict's keys, too.
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


@given(data=st.data(), count=st.just(2), dtype=st.sampled_from([torch.double, torch.float]))
@settings(max_examples=40, deadline=None)
def test_a_batch_norm_over_shards_of_any_size_is_torchs_own_over_the_whole_batch(teams, data, count, dtype):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    channels = data.draw(st.integers(1, 4))
    # With a momentum of None, as `renew_batch_norms` sets it, running statistics are plain means.
    momentum = data.draw(st.sampled_from([0.1, 0.7, None]))
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


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize(
    ("kind", "size"), [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (5,)), (nn.BatchNorm3d, (2, 3, 2))]
)
def test_a_batch_norm_of_any_dimensions_is_torchs_own(teams, count, kind, size, affine, tracks):
    generator = torch.Generator().manual_seed(0)
    norm = kind(3, affine=affine, track_running_stats=tracks).double()
    x, g = torch.randn(2, 7, 3, *size, generator=generator, dtype=torch.double)
    compare_batch_norms(teams[count], norm, [(x, g, (3, 4)[: count - 1])], 1e-10)


class OfItsOwn(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_batch_norm_with_a_forward_of_its_own_keeps_it():
    model = nn.Sequential(OfItsOwn(2))
    use_global_batch_norms(model, Processes(0, 2))
    assert type(model[0]) is OfItsOwn


@pytest.mark.parametrize("shape", [(4, 2), (4, 2, 3)])
def test_what_a_batch_norm_does_not_take_is_refused_over_shards_too(shape):
    model = nn.Sequential(nn.BatchNorm2d(2))
    use_global_batch_norms(model, Processes(0, 2))
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.zeros(shape))


def test_a_large_mean_costs_the_variance_no_digits(teams):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 40, 3, 4, 4, generator=generator)
    norm = batch_norm(3, torch.float, generator)
    (expected,) = normalise_shards(
        ALONE, copy.deepcopy(norm).double(), [((x + 3000).double(), g.double(), ())]
    )
    found = teams[2].ask(normalise_shards, norm, [(x + 3000, g, (13,))])
    for (part,) in found:
        # In float32, squares near 9e6 are exact to 0.5 only, and the variance is near 1.
        torch.testing.assert_close(part["running_var"].double(), expected["running_var"], rtol=1e-5, atol=0)
    y = torch.cat([part["y"] for (part,) in found])
    torch.testing.assert_close(y.double(), expected["y"], rtol=0, atol=2e-3)


def test_a_batch_norm_takes_bf16_images_as_torchs_own_does(teams):
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 9, 3, 4, 4, generator=generator).to(torch.bfloat16)
    norm = batch_norm(3, torch.float, generator)
    ours = teams[2].ask(normalise_shards, norm, [(x, g, (4,))])
    (theirs,) = normalise_shards(ALONE, norm, [(x, g, ())])
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
    kinds = {type(module).__name__ for module in model.modules()}
    assert "GlobalBatchNorm" in kinds and "BatchNorm2d" not in kinds

    use_local_batch_norms(model)
    assert [type(module) for module in model.modules()] == plain
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Training steps of a whole ResNet-20.

TRAIN_IMAGES, BATCH = 15, 7  # Batches of 7, 7 and 1: the last one leaves some processes without an image.
PENALTIES = [0.0, 4e-3]  # One epoch is trained without the penalty and one with it.


def random_images(train: int, test: int = 1) -> Dataset:
    generator = torch.Generator().manual_seed(train)
    images = torch.randint(256, (train + test, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (train + test,), generator=generator)
    return Dataset("random", "here", True, 10, images[:train], labels[:train], images[train:], labels[train:])


def quantized_resnet20(processes: Processes, dtype: torch.dtype = torch.float) -> nn.Module:
    """A quantized ResNet-20 in which three quarters of the weights and some whole filters are zero."""
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
    zeros: tuple[int, int]  # How many weights and filters are zero after the step.
    after: dict[str, Tensor]


@torch.no_grad()
def count_zeros(model: nn.Module) -> tuple[int, int]:
    """Count the weights of all convolutions that are exactly zero, and the filters that are all zeros."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    filters = sum(int((w == 0).all((1, 2, 3)).sum()) for w in weights)
    return sum(int((w == 0).sum()) for w in weights), filters


def take_steps(
    processes: Processes, dtype: torch.dtype, states: list[dict[str, Tensor]] | None = None
) -> list[Step]:
    """Take the steps of both epochs, the i-th of them from `states[i]` where these are given."""
    model = quantized_resnet20(processes, dtype)
    model.train()
    step = training_step(model, processes)
    found = []
    for i, (images, labels, size, penalty) in enumerate(walk(batches_of(processes))):
        if states:
            model.load_state_dict(states[i])
        with exact(dtype):
            losses = step(images.to(dtype), labels, penalty, size).tolist()
        after = {name: value.clone() for name, value in model.state_dict().items()}
        found.append(Step(losses, count_zeros(model), after))
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


@pytest.mark.parametrize("count", COUNTS)
def test_in_float64_the_steps_are_those_of_one_process_and_the_same_to_the_bit_in_all(
    teams, alone_in_float64, count
):
    expected = alone_in_float64
    assert expected[0].zeros[1] > 0  # Without zero filters, equal counts of them would show nothing.
    assert len({step.zeros for step in expected}) > 3
    answers = teams[count].ask(take_steps, torch.double)
    for ours, theirs in zip(answers[0], expected, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)
        assert ours.zeros == theirs.zeros
    for name, value in expected[-1].after.items():
        torch.testing.assert_close(answers[0][-1].after[name], value, rtol=1e-7, atol=1e-8)
    assert_same_bits_in_all(answers)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_in_float32_each_step_from_the_same_state_has_the_loss_of_one_process(teams, alone_in_float32, count):
    states = [quantized_resnet20(ALONE).state_dict(), *(step.after for step in alone_in_float32[:-1])]
    answers = teams[count].ask(take_steps, torch.float, states)
    for ours, theirs in zip(answers[0], alone_in_float32, strict=True):
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert_same_bits_in_all(answers)


@pytest.mark.slow
def test_in_float32_the_processes_stay_the_same_to_the_bit_from_step_to_step(teams):
    assert_same_bits_in_all(teams[2].ask(take_steps, torch.float))


def renew(processes: Processes) -> dict[str, Tensor]:
    model = quantized_resnet20(processes)
    renew_batch_norms(model, batches_of(processes), 0, 2)
    return dict(model.named_buffers())


def test_renewed_batch_norms_are_those_of_one_process(teams):
    expected = renew(ALONE)
    for found in teams[2].ask(renew):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def accuracies(processes: Processes, sizes: list[int]) -> list[float]:
    model = quantized_resnet20(processes)
    return [
        measure_accuracy(model, TestBatches(random_images(1, n), "cpu", 20, processes), processes=processes)
        for n in sizes
    ]


@pytest.mark.parametrize("count", COUNTS)
def test_the_accuracy_over_shards_is_exactly_that_of_one_process(teams, count):
    sizes = [127, 60, 1]  # One image leaves some processes without any.
    expected = accuracies(ALONE, sizes)
    assert 0 < expected[0] < 1
    assert teams[count].ask(accuracies, sizes) == [expected] * count


def train_into_nan(processes: Processes, where: int) -> str:
    """Train an epoch in which rank `where` meets a NaN in its shard of the second batch."""
    model = quantized_resnet20(processes)
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
    assert next(calls) == 3  # No third batch was prepared.
    return str(error.value)


@pytest.mark.parametrize("where", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_nan_in_one_process_ends_the_epoch_in_all(teams, where):
    said = teams[2].ask(train_into_nan, where)
    assert all(sentence.startswith("the loss is not finite at step 2;") for sentence in said)
    assert said[where].endswith("the images themselves")


def train_a_broken_weight(processes: Processes) -> str:
    model = quantized_resnet20(processes)
    with torch.no_grad():
        model.get_parameter("layer2.0.conv1.parametrizations.weight.original")[0, 0, 0, 0] = NAN
    with pytest.raises(NotFiniteError) as error:
        train_epoch(training_step(model, processes), batches_of(processes), 0, 0.0)
    return str(error.value)


def test_a_nan_in_a_weight_ends_the_epoch_in_all_and_is_named(teams):
    for sentence in teams[2].ask(train_a_broken_weight):
        assert sentence.endswith("parameter layer2.0.conv1.parametrizations.weight.original")
