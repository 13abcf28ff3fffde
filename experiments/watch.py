"""Watches one epoch of a pipeline from outside: batches, forward passes, and the state before and after.

The ledger (experiments/ledger.py) holds what is noted here against what should have been. No number that is
computed changes, and the host never waits for an accelerator while steps are taken.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments.checkpoint import Checkpoint
from experiments.data import TestBatches, TrainBatches
from experiments.device import in_float64
from experiments.network import MOST_PARAMETERS, contiguous_images
from experiments.training import EpochLosses, Pipeline, TrainingStep
from src.graph import only_looks, take_off_hooks
from utils_quantization import WeightQuantization, quantizers

DATA = "the stored training images and labels"
TEST_DATA = "the stored test images and labels"
BETA1 = 0.9  # AdamW's
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, as torch names them
TESTED_AGAIN = 8  # images whose logits are computed a second time after the test pass


@dataclass(frozen=True)
class State:
    """What an epoch changes, copied; (P,) are all trained parameters in a row, in the model's order."""

    values: Tensor  # (P,)
    steps: list[float]  # AdamW's count of each trained parameter
    statistics: Tensor  # running means and variances in a row
    variances: Tensor
    tracked: list[int]  # batches that each batch norm has counted


@dataclass(frozen=True)
class Update:
    """One training step: what it began with, and what it left. (P,) are all trained parameters in a row."""

    number: int  # from 0
    steps: list[Any]  # AdamW's count of each trained parameter before it; None before the first
    before: Tensor  # (P,)
    moments: tuple[Tensor, Tensor]  # AdamW's, (P,) each, before it
    after: Tensor  # (P,)
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Drawn:
    """One step of the epoch, another in each, that is looked at as a whole: its batch, and its network."""

    number: int  # from 0
    images: Tensor
    labels: Tensor
    model: nn.Module  # a copy, as it was before the step


class SecondOptimizer:
    """AdamW on copies of the parameters: every step of an epoch once more, with the gradients that it left.

    Rates and decays are those of the run's own groups. What the copies hold when the epoch is over the
    parameters hold too, unless something else wrote into them in any of the steps, or into the moments.
    """

    def __init__(self, step: TrainingStep, parameters: dict[str, nn.Parameter], beta2: float) -> None:
        self.parameters, self.own_groups = parameters, step.optimizer.param_groups
        self.copies = {n: nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
        copy_of = {id(p): self.copies[n] for n, p in parameters.items()}
        groups = [
            # One that is held twice is taken once.
            {"params": [copy_of.pop(id(p)) for p in group["params"] if id(p) in copy_of]}
            for group in self.own_groups
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(BETA1, beta2), fused=True, capturable=step.device.type == "cuda"
        )
        for name, p in parameters.items():
            state = step.optimizer.state.get(p, {})
            if state.keys() == {"step", *MOMENTS}:
                self.optimizer.state[self.copies[name]] = {k: v.clone() for k, v in state.items()}

    def step(self) -> None:
        """To be called when the run's own step is over."""
        for group, own in zip(self.optimizer.param_groups, self.own_groups, strict=False):
            group["lr"], group["weight_decay"] = own["lr"], own["weight_decay"]
        for name, copied in self.copies.items():
            copied.grad = self.parameters[name].grad
        self.optimizer.step()
        self.optimizer.zero_grad()  # the gradients are the run's own


class WatchedBatches:
    """The training batches as they are, noted as they are handed out. Nothing here waits for the device.

    Looked at are the first update, the last, and that of the `drawn` step, and each update is made a second
    time; of a very large network, of which each look takes copies, the last is looked at, and no more.
    """

    def __init__(
        self,
        batches: Any,
        step: TrainingStep,
        parameters: dict[str, nn.Parameter],
        drawn: int,
        beta2: float,
        copied_model: Callable[[], nn.Module],
    ) -> None:
        self.batches, self.step, self.parameters = batches, step, parameters
        few = sum(p.numel() for p in parameters.values()) <= MOST_PARAMETERS
        self.second = SecondOptimizer(step, parameters, beta2) if few and parameters else None
        self.number, self.copied_model = drawn if few else None, copied_model
        self.looked_at = {0, drawn, len(batches) - 1} if few else {len(batches) - 1}
        self.sizes = batches.sizes
        self.epochs: list[int] = []  # asked for
        self.labels: list[Tensor] = []
        self.images: list[Tensor] = []  # those of each batch at `looked_at`
        self.rates: list[list[Any]] = []  # of each optimizer group at each step
        self.coefficients: list[Tensor] = []
        self.replayed_others: list[Tensor] = []  # of each replay, whether its graph held another batch
        self.updates: list[Update] = []
        self.begun: tuple[int, list[Any], Tensor, tuple[Tensor, Tensor]] | None = None  # an update, not ended
        self.drawn: Drawn | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.epochs.append(epoch)
        for number, (images, labels) in enumerate(self.batches.epoch(epoch)):
            self.labels.append(labels)
            self.images += _copies(images)
            self.rates.append([_copied(g["lr"]) for g in self.step.optimizer.param_groups])
            if number in self.looked_at:
                steps, values = optimizer_steps(self.step, self.parameters), self.parameters.values()
                self.begun = (number, steps, flat(values), moments(self.step.optimizer, self.parameters))
            if number == self.number:
                self.drawn = Drawn(number, images.clone(), labels.clone(), self.copied_model())
            yield images, labels
            self.coefficients.append(self.step.coefficient.clone())
            if graph := self.step.replayed:
                same = (graph.labels == labels).all() & (graph.images == images).all()
                self.replayed_others.append(~same)
            if number < len(self) - 1:  # of the last step the watch says when it is over
                self.end_step()

    def end_step(self) -> None:
        """Note what a step has left, if it is looked at, and take it a second time."""
        if self.second:
            self.second.step()
        if self.begun:
            left = {n: p.grad.detach().clone() for n, p in self.parameters.items() if p.grad is not None}
            self.updates.append(Update(*self.begun, flat(self.parameters.values()), left))
            self.begun = None


@dataclass(frozen=True)
class Pass:
    """One forward pass of the model, as a hook sees it."""

    logits: Tensor
    images: list[Tensor]  # those at `looked_at`
    training: set[bool]  # modes of the modules
    quantized: bool  # whether every quantizer was switched on
    gradients: bool  # whether gradients were recorded


class EpochWatch:
    """Watches one epoch (from 0) of a pipeline, inside `with`.

        with EpochWatch(pipeline, epoch) as watch:
            losses = train_epoch(step, watch.batches, ...)
            watch.trained(losses)
            renew_batch_norms(...)
            watch.renewed()
            measure_accuracy(...)
        Ledger(watch, record).checks()

    On CUDA a training step may be the replay of a graph, in which no hook fires: there the training is known
    by the state that it leaves and by the batches handed out.
    """

    def __init__(self, pipeline: Pipeline, epoch: int) -> None:
        self.pipeline, self.epoch, self.settings = pipeline, epoch, pipeline.settings
        self.step, self.model = pipeline.step, pipeline.model
        self.processes = self.step.processes
        self.parameters: dict[str, nn.Parameter] = {
            n: p for n, p in self.model.named_parameters() if p.requires_grad
        }
        # Those without running statistics count no batches and have nothing to renew.
        self.norms = {
            n: m
            for n, m in self.model.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None
        }
        self.momenta = [norm.momentum for norm in self.norms.values()]
        self.modules = [m for n, m in self.model.named_modules() if "parametrizations" not in n]
        self.quantizations = [m for m in self.model.modules() if isinstance(m, WeightQuantization)]
        batches = pipeline.train_batches
        drawn, beta2 = self._looked_at_step(len(batches)), self.settings.beta2
        self.batches: Any = WatchedBatches(
            batches, self.step, self.parameters, drawn, beta2, self.copied_model
        )
        self.before, self.weights_before = self.state(), computed_weights(self.model)
        self.moments = moments(self.step.optimizer, self.parameters)
        self.left = self.step.left
        self.data = self.left[DATA] if DATA in self.left else fingerprint(batches)
        there = TEST_DATA in self.left
        self.test_data = self.left[TEST_DATA] if there else fingerprint(pipeline.test_batches)
        self.passes: dict[str, list[Pass]] = {"training": [], "renewal": [], "test": []}
        self.phase = "training"
        self.tested: list[Tensor] = []  # the first images of the test pass
        # Of one batch norm, another in each epoch, and of the last: mean and variance of what it saw in each
        # pass of the renewal, and its running ones before the test pass.
        names = list(self.norms)
        chosen = {names[self._draw("norm", len(names))], names[-1]} if names else set[str]()
        self.seen_by: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in sorted(chosen)}
        self.ready_norms: dict[str, list[Tensor]] = {}
        self.hooks: list[Any] = []

    def __enter__(self) -> "EpochWatch":
        self.eager = not self.step.captures
        if self.eager:
            self.hooks.append(self.model.register_forward_hook(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def trained(self, losses: EpochLosses) -> None:
        """To be called when the epoch's steps are over."""
        self.losses, self.phase = losses, "renewal"
        if not self.eager:
            self.hooks.append(self.model.register_forward_hook(self._note))
        for name in self.seen_by:
            self.hooks.append(self.norms[name].register_forward_pre_hook(self._note_norm(name)))
        self.after = self.state()
        self.batches.end_step()

    def renewed(self) -> None:
        """To be called before the test pass, whether batch norms were renewed or not."""
        self.phase, self.ready = "test", self.state()
        norms: Any = {name: self.norms[name] for name in self.seen_by}
        self.ready_norms = {
            name: [in_float64(x).clone() for x in (norm.running_mean, norm.running_var)]
            for name, norm in norms.items()
        }

    def _looked_at_step(self, steps: int) -> int:
        """The step that is looked at as a whole.

        In most epochs it is drawn; but the first has the gradients of the epoch before behind it, and the
        last may be of fewer images.
        """
        if self.epoch == 1:
            return 0
        if self.epoch in (2, self.settings.epochs - 1) or self.epoch % 8 == 0 < self.epoch:
            return steps - 1
        return self._draw("step", steps)

    def _draw(self, what: str, count: int) -> int:
        """A number below `count`, another in each epoch and the same in every run of the seed."""
        words = f"{what} that is looked at: seed {self.settings.seed}, epoch {self.epoch}"
        return int(hashlib.sha256(words.encode("ascii")).hexdigest()[:16], 16) % count

    def copied_model(self) -> nn.Module:
        """The model as it is now, without the hooks of those that watch it."""
        copied = copy.deepcopy(self.model, {id(self): self})  # which a hook belongs to
        take_off_hooks(copied, but=contiguous_images)
        return copied

    @torch.no_grad()
    def state(self) -> State:
        device = self.step.device
        norms: list[Any] = list(self.norms.values())
        variances = flat([norm.running_var for norm in norms], device)
        return State(
            values=flat(self.parameters.values(), device),
            steps=step_counts(optimizer_steps(self.step, self.parameters)),
            statistics=torch.cat([flat([norm.running_mean for norm in norms], device), variances]),
            variances=variances,
            tracked=[int(count) for count in numbers([norm.num_batches_tracked for norm in norms])],
        )

    def leave(self) -> None:
        """Note the state for the next epoch to begin with."""
        self.step.left = self._carried(self.state(), moments(self.step.optimizer, self.parameters))

    def begun(self) -> dict[str, Tensor]:
        """The state that this epoch began with."""
        return self._carried(self.before, self.moments)

    def _carried(self, state: State, moments: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """What one epoch hands to the next, by a word for each part."""
        return {
            "parameters": state.values,
            "batch norm statistics": state.statistics,
            "the optimizer's moments": torch.cat(moments),
            DATA: self.data,
            TEST_DATA: self.test_data,
        }

    @only_looks
    def _note(self, model: nn.Module, inputs: tuple[Any, ...], logits: Any) -> None:
        images = inputs[0]
        if self.phase == "test" and not self.tested:
            self.tested = [images[:TESTED_AGAIN].clone()]
        self.passes[self.phase].append(
            Pass(
                logits.detach(),
                _copies(images),
                {m.training for m in self.modules},
                all(q.enabled for q in self.quantizations),
                torch.is_grad_enabled(),
            )
        )

    def _note_norm(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        @only_looks
        def note(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self.phase == "renewal" and norm.training:  # one that is frozen keeps its statistics
                var, mean = torch.var_mean(inputs[0].float(), [0, *range(2, inputs[0].ndim)])
                self.seen_by[name].append((mean, var))

        return note


@torch.no_grad()
def computed_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the quantized layers compute with now, by layer name."""
    layers: Any = {name: model.get_submodule(name) for name in quantizers(model)}
    return {name: layer.parametrizations.weight().detach() for name, layer in layers.items()}


def left_in(checkpoint: Checkpoint, step: TrainingStep) -> dict[str, Tensor]:
    """What a checkpoint hands to the epoch behind it, as `EpochWatch.leave` notes it; copied."""
    saved, model = checkpoint.model, step.model
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    order = [p for group in step.optimizer.param_groups for p in group["params"]]
    states = {id(p): checkpoint.optimizer.get(i, {}) for i, p in enumerate(order)}
    rows = {
        "parameters": [saved[n] for n in parameters],
        "batch norm statistics": [
            saved[f"{n}.{what}"] for what in ("running_mean", "running_var") for n in norms
        ],
        "the optimizer's moments": [
            states.get(id(p), {}).get(what, torch.zeros_like(p))
            for what in MOMENTS
            for p in parameters.values()
        ],
    }
    return {part: flat([t.to(step.device) for t in tensors], step.device) for part, tensors in rows.items()}


def moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """AdamW's first and second moments of these parameters, (P,) each."""
    states = {p: optimizer.state.get(p, {}) for p in parameters.values()}
    first, second = (
        [state[name] if name in state else torch.zeros_like(p) for p, state in states.items()]
        for name in MOMENTS
    )
    return flat(first), flat(second)


def optimizer_steps(step: TrainingStep, parameters: dict[str, nn.Parameter]) -> list[Any]:
    """AdamW's count of each trained parameter, a tensor, copied; None before the first step."""
    return [_copied(step.optimizer.state.get(p, {}).get("step")) for p in parameters.values()]


def step_counts(steps: Sequence[Tensor | None]) -> list[float]:
    """The numbers that `optimizer_steps` holds, 0 for None."""
    counted = iter(numbers([count for count in steps if count is not None]))
    return [0.0 if count is None else next(counted) for count in steps]


def fingerprint(batches: Any) -> Tensor:
    """A number for each stored image, (N,), that its pixels, their places and its label change.

    Of batches that are someone's own it is empty.
    """
    if type(batches) not in (TrainBatches, TestBatches):
        return torch.zeros(0)
    pixels = batches.pixels if type(batches) is TrainBatches else batches.images
    rows = pixels.reshape(len(batches.labels), -1)
    # Eight bytes are read as one number, or four where an image's are no multiple of eight.
    words = rows.view(torch.int32 if rows.shape[1] % 8 else torch.int64)
    places = torch.arange(1, 2 * words.shape[1], 2, device=words.device)  # odd: no bit of a word gets lost
    return torch.cat([(part * places).sum(1) for part in words.split(4096)]) + batches.labels


def _copied(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate


def looked_at(images: int) -> tuple[int, ...]:
    """Which of so many images of a batch are looked at; none of an empty share."""
    return (0, images // 2, images - 1) if images else ()


def _copies(images: Tensor) -> list[Tensor]:
    return [images[place].detach().clone() for place in looked_at(len(images))]


def flat(tensors: Any, device: torch.device | str = "cpu") -> Tensor:
    """Copies in a row, (n,)."""
    rows = [t.detach().reshape(-1).float() for t in tensors]
    return torch.cat(rows) if rows else torch.zeros(0, device=device)


def numbers(scalars: Sequence[Tensor | float]) -> list[float]:
    """The numbers that scalars hold, of tensors of one type with one wait for the device."""
    tensors = [s.detach() for s in scalars if isinstance(s, Tensor)]
    if not tensors or len(tensors) < len(scalars):
        return [float(s) for s in scalars]
    return in_float64(torch.stack(tensors)).tolist()
