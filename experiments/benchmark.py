"""How fast the run is: loops are compared by measuring them in turn, so that a busy machine slows all.

    python -m experiments.benchmark
    python -m experiments.benchmark --rounds 5 --data-dir ./data

Prints a table with medians and ranges, and one JSON object as its last line. The baseline, the "plan" loop,
is the training loop as one would first write it: per-sample PIL transforms in a loader with two workers, the
lasso as a loop over channels, a plainly written quantizer evaluated at every access, the default memory
layout and allocator, the loss read at each step.
"""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # python experiments/benchmark.py, without -m
    sys.path[0] = str(Path(__file__).parents[1])
    # The programs that it starts are to be found from any folder too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until `main` handles signals, Ctrl-C ends the program silently: a traceback out of `import torch` helps
    # nobody.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.checkpoint import save_checkpoint, take_checkpoint
from experiments.data import MEAN, STD, Dataset, TestBatches, TrainBatches, load_dataset
from experiments.device import choose_device, describe_device, emulates_bf16, prepare_device
from experiments.distributed import ALONE
from experiments.evaluator import Evaluator
from experiments.exit_status import ExitStatus
from experiments.history import epoch_record, new_history
from experiments.live import LiveLine
from experiments.settings import DEVICES, Parser, Settings, folder_path, whole_number
from experiments.sparsity import coupled_group_lasso, keep_dead_slices
from experiments.training import TrainingStep, make_optimizer, measure_accuracy
from resnet import BasicBlock, ResNet, resnet20, resnet110
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers

STEPS_AN_EPOCH = 98  # training steps over 50,000 images in batches of 512
LOOPS = ("plan", "float32", "bf16")
FAILED = "the run that was to be measured failed, as its own error says; mend that first"
WEIGHT = 1e-3  # the lasso's weight in the loss; any value but 0 costs the same time

FEWEST_WITH_DATA = 8  # steps a measurement of a loop that loads its data

Step = Callable[[Tensor, Tensor], Any]
Say = Callable[[str], None]


def main() -> int:
    parser = Parser(description="Measure the speed of the training step and of an epoch.", allow_abbrev=False)
    parser.add_argument(
        "--rounds", type=whole_number, default=5, help="times each pair is measured (default: 5)"
    )
    parser.add_argument("--steps", type=whole_number, default=6, help="steps a measurement (default: 6)")
    parser.add_argument("--data-dir", type=folder_path, default=Path("data"), help="CIFAR-10, if it is there")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="as for experiments.debug_run")
    parser.add_argument(
        "--only", choices=LOOPS, help="run one loop alone and print its median seconds a step"
    )
    arguments = parser.parse_args()
    for name in ("rounds", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; expected a whole number, 1 or more")
    live = LiveLine()
    with ExitStatus(live, "the same command starts over") as end:
        measure(arguments, live.say)
    return end.status


def measure(arguments: argparse.Namespace, say: Say) -> None:
    """Measure what the command line asks for, and `say` it."""
    if arguments.only:
        say(str(seconds_a_step(arguments.only, arguments.data_dir, arguments.device, arguments.steps, say)))
        return
    # Measure whole commands before this process loads any data: the peak memory that Linux reports of a
    # child is never less than what its parent took when it forked.
    results = peak_memory(arguments.data_dir, arguments.device, say)
    results |= first_step(arguments.data_dir, arguments.device, say)
    settings = Settings(device=arguments.device, data_dir=arguments.data_dir)
    device = prepare_device(settings)
    dataset = load_dataset("auto", arguments.data_dir, None, None, say)
    say(
        f"torch {torch.__version__}, {describe_device(device)}, {dataset.name}, batch {settings.batch_size}, "
        f"{arguments.rounds} rounds of {arguments.steps} steps, {_steps_with_data(arguments)} where data are "
        f"loaded, in turn\n"
    )
    if emulates_bf16(device):
        say("bf16 is left out, since this device has no instructions for it; --only bf16 measures it\n")
    bench = Bench(dataset, settings, device, arguments.rounds, arguments.steps, say)
    results |= {"torch": torch.__version__, "device": describe_device(device), "data": dataset.name}
    results |= against_the_plan(arguments, device, say) | bench.overheads() | bench.outside_the_steps()
    say(json.dumps(results))


def _precisions(device: torch.device) -> tuple[str, ...]:
    """Those that are measured: bf16 without instructions for it would take longer than all the rest."""
    return ("float32",) if emulates_bf16(device) else ("float32", "bf16")


def _steps_with_data(arguments: argparse.Namespace) -> int:
    return max(arguments.steps, FEWEST_WITH_DATA)


class Bench:
    """The measurements that share a data set and a device."""

    def __init__(
        self, dataset: Dataset, settings: Settings, device: torch.device, rounds: int, steps: int, say: Say
    ) -> None:
        self.dataset, self.settings, self.device = dataset, settings, device
        self.rounds, self.steps, self.say = rounds, steps, say

    def overheads(self) -> dict[str, Any]:
        """Time a training step with quantizers and lasso against one without.

        ResNet-20 at the full batch size in each precision; ResNet-20 and ResNet-110 at a quarter of it.
        """
        found: dict[str, Any] = {}
        for precision in _precisions(self.device):
            batch = self._batch(self.settings.batch_size)
            found |= self._overhead(f"ResNet-20 {precision}", resnet20, batch, precision)
        batch = self._batch(self.settings.batch_size // 4)
        found |= self._overhead(f"ResNet-20 batch {len(batch[1])}", resnet20, batch, "float32")
        return found | self._overhead(f"ResNet-110 batch {len(batch[1])}", resnet110, batch, "float32")

    def _overhead(
        self, what: str, build: Callable[[], ResNet], batch: tuple[Tensor, Tensor], precision: str
    ) -> dict[str, Any]:
        loops = {
            kind: _repeat(our_step(build(), self.settings, self.device, precision, quantize), batch)
            for kind, quantize in (("plain", False), ("quantized", True))
        }
        return self._compare(f"step, {what}", loops, "plain")

    def _batch(self, size: int) -> tuple[Tensor, Tensor]:
        return next(iter(TrainBatches(self.dataset, size, 0, self.device).epoch(0)))

    def _compare(self, what: str, loops: dict[str, Iterator[None]], base: str) -> dict[str, Any]:
        """Time the loops in turn, a few steps each in every round, and relate them to the loop `base`."""
        # The first steps take longer: cuDNN tries its algorithms, and graphs are captured.
        for loop in loops.values():
            self._timed(loop)
        turns = {name: functools.partial(self._timed, loop) for name, loop in loops.items()}
        return compare(what, turns, base, self.rounds, self.say, faster=False)

    def _timed(self, loop: Iterator[None]) -> float:
        return timed(loop, self.steps, self.device)

    def outside_the_steps(self) -> dict[str, Any]:
        """Time an epoch's metrics, record and checkpoint as a share of its training steps and test pass."""
        model = quantized_model(resnet20(), self.device)
        evaluator = Evaluator(model)
        history = new_history(self.settings, self.dataset, self.device, ALONE, model, evaluator.dense)
        penalty = coupled_group_lasso(model, self.settings.penalty_on, self.settings.group_weights)
        optimizer = make_optimizer(model, self.settings, STEPS_AN_EPOCH)
        step = TrainingStep(model, optimizer, penalty)
        batch = self._batch(self.settings.batch_size)
        test = TestBatches(self.dataset, self.device)
        loop = _repeat(lambda images, labels: step(images, labels, WEIGHT), batch)
        self._timed(loop)

        def rest() -> None:
            numbers = dict.fromkeys(("loss", "cross_entropy", "coefficient", "accuracy", "seconds"), 0.0)
            compression = evaluator.evaluate(model)
            record = epoch_record(1, model, compression, penalty=penalty(model).item(), **numbers)
            history.epochs = [record] * 20
            save_checkpoint(Path(output), take_checkpoint(history, model, optimizer))

        times: dict[str, list[float]] = {"training steps": [], "test pass": [], "the rest": []}
        with tempfile.TemporaryDirectory() as output:
            for _ in range(self.rounds):
                model.train()
                times["training steps"].append(STEPS_AN_EPOCH * self._timed(loop))
                times["test pass"].append(_seconds(lambda: measure_accuracy(model, test)))
                times["the rest"].append(_seconds(rest))
        share = [m / (a + t) for a, t, m in zip(*times.values(), strict=True)]
        for name, values in times.items():
            self.say(f"{'epoch: ' + name:<44} {spread(values, ' s')}")
        self.say(f"{'epoch: outside steps and test pass':<44} {100 * statistics.median(share):.2f} %")
        return {f"epoch: {k}": summary(v) for k, v in times.items()} | {
            "epoch: share outside": summary(share)
        }


def timed(loop: Iterator[None], steps: int, device: torch.device) -> float:
    """Run so many steps of the loop. Returns: the median of their seconds."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        next(loop)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare(
    what: str, turns: Mapping[str, Callable[[], float]], base: str, rounds: int, say: Say, faster: bool
) -> dict[str, Any]:
    """Call each of the measurements `turns` once in every round; each returns seconds a step.

    A ratio to `base` is taken within each round, so that a load on the machine for a whole round cancels out.
    It says how many times faster than `base` a measurement is if `faster`, otherwise how many times slower.

    Returns: the `summary` of each measurement, by "what: name".
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            seconds[name].append(turn())
    found: dict[str, Any] = {}
    for name, times in seconds.items():
        ratios = [b / t if faster else t / b for b, t in zip(seconds[base], times, strict=True)]
        found[f"{what}: {name}"] = summary(times, ratios)
        say(f"{what + ': ' + name:<44} {spread(times, ' s')}   {spread(ratios, 'x')}")
    return found


def against_the_plan(arguments: argparse.Namespace, device: torch.device, say: Say) -> dict[str, Any]:
    """Compare the plan's loop with the debug run's, including the time that a batch takes to load.

    Each measurement is a process of its own: the debug run's allocator settings hold for a whole process.
    """

    def turn(kind: str) -> Callable[[], float]:
        command = [sys.executable, "-m", "experiments.benchmark", "--only", kind]
        command += ["--data-dir", str(arguments.data_dir), "--device", arguments.device]
        command += ["--steps", str(_steps_with_data(arguments))]

        def seconds() -> float:
            run = subprocess.run(command, stdout=subprocess.PIPE)
            if run.returncode:
                raise ValueError(FAILED)
            return float(run.stdout.splitlines()[-1])

        return seconds

    turns = {kind: turn(kind) for kind in ("plan", *_precisions(device))}
    return compare("step, data included", turns, "plan", arguments.rounds, say, faster=True)


def seconds_a_step(kind: str, data_dir: Path, device_name: str, steps: int, say: Say) -> float:
    """Measure one of `LOOPS`, after a few steps that set it up. Returns: the median seconds a step."""
    settings = Settings(device=device_name)
    device = choose_device(device_name) if kind == "plan" else prepare_device(settings)
    dataset = load_dataset("auto", data_dir, None, None, say)
    loop = (
        plan_loop(dataset, settings, device) if kind == "plan" else our_loop(dataset, settings, device, kind)
    )
    timed(loop, 5, device)
    return timed(loop, steps, device)


def summary(values: list[float], ratios: list[float] | None = None) -> dict[str, Any]:
    """Median and range of the values for the JSON line; those of the ratios under "ratio"."""
    found: dict[str, Any] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found | ({"ratio": summary(ratios)} if ratios else {})


def spread(values: list[float], unit: str) -> str:
    """Median and range of the values for the table."""
    return f"{statistics.median(values):8.3f}{unit} ({min(values):.3f} to {max(values):.3f})"


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _repeat(step: Step, batch: tuple[Tensor, Tensor]) -> Iterator[None]:
    while True:
        step(*batch)
        yield


def quantized_model(model: ResNet, device: torch.device) -> ResNet:
    """Quantize the model as the debug run does: all convolutions but the stem, in channels_last."""
    attach_weight_quantizers(model, ["^conv1$", "^linear$"], DeadZoneLDZCompander, {})
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def our_step(
    model: ResNet,
    settings: Settings,
    device: torch.device,
    precision: str,
    quantize: bool,
) -> Step:
    """Make the debug run's training step; without `quantize`, the network has no quantizers and no lasso."""
    if quantize:
        quantized_model(model, device)
    else:
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    weight = WEIGHT if quantize else 0.0
    penalty = coupled_group_lasso(model, settings.penalty_on, settings.group_weights)
    keep_dead = keep_dead_slices(model) if quantize and settings.keep_dead else None
    step = TrainingStep(model, make_optimizer(model, settings, STEPS_AN_EPOCH), penalty, precision, keep_dead)
    return lambda images, labels: step(images, labels, weight)


def our_loop(dataset: Dataset, settings: Settings, device: torch.device, precision: str) -> Iterator[None]:
    """The debug run's training loop: each `next` takes one step on a full batch."""
    step = our_step(resnet20(), settings, device, precision, quantize=True)
    batches = TrainBatches(
        dataset, settings.batch_size, settings.seed, device, crop_padding=settings.crop_padding
    )
    for epoch in range(10**6):
        for images, labels in batches.epoch(epoch):
            if len(labels) == settings.batch_size:
                step(images, labels)
                yield


# The plan's loop, the baseline.


class PilImages(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The training set as torchvision's CIFAR10 class gives it: one PIL image at a time, transformed."""

    def __init__(self, dataset: Dataset) -> None:
        from torchvision import transforms

        self.images = dataset.train_images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, 32, 32, 3)
        self.labels = dataset.train_labels.tolist()
        self.transform = transforms.Compose([
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class PlainQuantizer(DeadZoneLDZCompander):
    """The quantizer's arithmetic as one would first write it: `torch.quantile`, and autograd for every step.

    The single letters are those of src/quantizer.py.
    """

    def forward(self, w: Tensor) -> Tensor:
        r = torch.quantile(w.detach().abs(), 0.99)
        Q = 2 ** (self.get_bitwidth() - 1) - 1
        d = 2 * r * (1 - self.logit_dz.tanh().abs())
        s = (r - d / 2) / (Q - 0.5) + 1e-8
        h = (d - s) / 2
        m = w.abs() - h
        m = m + (m.clamp_min(0) - m).detach()
        u = w.sign() * m / s
        q = u + (torch.maximum(torch.minimum(u.round(), Q), -Q) - u).detach()
        return s * q + h * q.sign()


def plain_block(block: BasicBlock, x: Tensor) -> Tensor:
    """A residual block's forward pass without in-place operations."""
    out = F.relu(block.bn1(block.conv1(x)))
    return F.relu(block.bn2(block.conv2(out)) + block.shortcut(x))


def plan_loop(dataset: Dataset, settings: Settings, device: torch.device) -> Iterator[None]:
    """The plan's training loop: each `next` takes one step."""
    model = resnet20()
    for block in [m for m in model.modules() if isinstance(m, BasicBlock)]:
        block.forward = functools.partial(plain_block, block)  # type: ignore[method-assign]
    attach_weight_quantizers(model, ["^conv1$", "^linear$"], PlainQuantizer, {})
    model.to(device).train()
    groups = make_optimizer(model, settings, STEPS_AN_EPOCH).param_groups
    options = [
        {k: float(g[k]) if k == "lr" else g[k] for k in ("params", "lr", "weight_decay")} for g in groups
    ]
    optimizer = torch.optim.AdamW(options)
    loader = torch.utils.data.DataLoader(
        PilImages(dataset), settings.batch_size, shuffle=True, num_workers=2, drop_last=True
    )
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels) + WEIGHT * looped_lasso(model)
            loss.backward()
            optimizer.step()
            loss.item()
            yield


def looped_lasso(model: ResNet) -> Tensor:
    """The coupled group lasso of experiments/sparsity.py, computed channel by channel."""
    channels: list[Sequence[Tensor]] = []  # the weight slices of each channel
    stages: list[Any] = [list(stage) for stage in (model.layer1, model.layer2, model.layer3)]
    for index, blocks in enumerate(stages):
        for block in blocks:
            channels += zip(block.conv1.weight, block.conv2.weight.transpose(0, 1), strict=True)
        filters = [block.conv2.weight for block in blocks]
        readers = [block.conv1.weight for block in blocks[1:]]
        if index + 1 < len(stages):
            readers.append(stages[index + 1][0].conv1.weight)
        channels += zip(*filters, *(w.transpose(0, 1) for w in readers), strict=True)
    return torch.stack([torch.cat([s.flatten() for s in slices]).norm() for slices in channels]).sum()


# Measurements of the whole `debug_run` command.


def first_step(data_dir: Path, device: str, say: Say) -> dict[str, Any]:
    """Time the command from its start to the end of its first training step.

    The command runs on a pseudo-terminal: only on a terminal it prints a line after a training step.
    """
    seconds = [_until_first_step(data_dir, device) for _ in range(3)]
    say(f"{'command to the end of its first step':<44} {spread(seconds, ' s')}")
    return {"command to first step": summary(seconds)}


def _until_first_step(data_dir: Path, device: str) -> float:
    import pty

    ours, theirs = pty.openpty()
    with tempfile.TemporaryDirectory() as output:
        start = time.perf_counter()
        process = _debug_run(data_dir, device, output, stdout=theirs)
        os.close(theirs)
        seen = b""
        try:
            while b"step 1/" not in seen:
                try:
                    read = os.read(ours, 4096)
                except OSError:  # of a pseudo-terminal that nobody writes to any more
                    read = b""
                if not read:
                    raise ValueError(FAILED)
                seen = seen[-100:] + read
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
            os.close(ours)


def peak_memory(data_dir: Path, device: str, say: Say) -> dict[str, Any]:
    """Measure the peak resident memory, in bytes, of an epoch over 4,096 images at batch size 512."""
    with tempfile.TemporaryDirectory() as output:
        process = _debug_run(data_dir, device, output, "--epochs", "1", "--limit-train", "4096")
        _, _, usage = os.wait4(process.pid, 0)
        if not (Path(output) / "history.json").exists():
            raise ValueError(FAILED)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # macOS reports bytes, Linux KiB
    say(f"{'peak memory, batch 512':<44} {peak / 1e9:8.3f} GB")
    return {"peak memory bytes": peak}


def _debug_run(
    data_dir: Path, device: str, output: str, *more: str, stdout: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "experiments.debug_run", "--data-dir", str(data_dir), "--device", device]
    return subprocess.Popen([*command, "--output-dir", output, *more], stdout=stdout)


if __name__ == "__main__":
    sys.exit(main())
