"""Watches one epoch of a pipeline from outside: batches, forward passes, and the state before and after.

The ledger (experiments/ledger.py) holds what is noted here against what should have been. No number that is
computed changes, and the host never waits for an accelerator while steps are taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments.device import in_float64
from experiments.training import EpochLosses, Pipeline, TrainingStep
from src.graph import only_looks
from utils_quantization import WeightQuantization, quantizers

TESTED_AGAIN = 8  # images whose logits are computed a second time after the test pass


@dataclass(frozen=True)
class State:
    """What an epoch changes, copied; (P,) are all trained parameters in a row, in the model's order."""

    values: Tensor  # (P,)
    steps: list[float]  # AdamW's count of each trained parameter
    statistics: Tensor  # running means and variances in a row
    variances: Tensor
    tracked: list[int]  # batches that each batch norm has counted


class WatchedBatches:
    """The training batches as they are, noted as they are handed out. Nothing here waits for the device."""

    def __init__(self, batches: Any, step: TrainingStep, parameters: dict[str, nn.Parameter]) -> None:
        self.batches, self.step, self.parameters = batches, step, parameters
        self.sizes = batches.sizes
        self.epochs: list[int] = []  # asked for
        self.labels: list[Tensor] = []
        self.images: list[Tensor] = []  # first and last of each batch
        self.rates: list[list[Any]] = []  # of each optimizer group at each step
        self.coefficients: list[Tensor] = []
        self.replayed_others: list[Tensor] = []  # of each replay, whether its graph held another batch
        self.first_gradients: dict[str, Tensor] = {}
        self.first_values: Tensor | None = None  # (P,), behind the first step
        # Values and moments before the last step.
        self.last_began: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.epochs.append(epoch)
        for images, labels in self.batches.epoch(epoch):
            self.labels.append(labels)
            self.images += _ends(images)
            self.rates.append([_copied(g["lr"]) for g in self.step.optimizer.param_groups])
            if len(self.labels) == len(self):
                self.last_began = flat(self.parameters.values()), moments(self.step, self.parameters)
            yield images, labels
            self.coefficients.append(self.step.coefficient.clone())
            if graph := self.step.replayed:
                same = (graph.labels == labels).all() & (graph.images == images).all()
                self.replayed_others.append(~same)
            if self.first_values is None:
                self.first_values = flat(self.parameters.values())
                self.first_gradients = {n: g.clone() for n, g in gradients(self.parameters).items()}


@dataclass(frozen=True)
class Pass:
    """One forward pass of the model, as a hook sees it."""

    logits: Tensor
    images: list[Tensor]  # first and last
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
        self.batches: Any = WatchedBatches(pipeline.train_batches, self.step, self.parameters)
        self.before, self.weights_before = self.state(), self.weights()
        self.moments = moments(self.step, self.parameters)
        self.left = self.step.left
        self.passes: dict[str, list[Pass]] = {"training": [], "renewal": [], "test": []}
        self.phase = "training"
        self.tested: list[Tensor] = []  # the first images of the test pass
        self.last_norm: list[tuple[Tensor, Tensor]] = []  # mean and variance of what it saw in the renewal
        self.ready_norm: list[Tensor] = []  # running mean and variance of that norm before the test pass
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
        if self.norms:
            self.hooks.append(list(self.norms.values())[-1].register_forward_pre_hook(self._note_norm))
        self.after, self.last_gradients = self.state(), gradients(self.parameters)

    def renewed(self) -> None:
        """To be called before the test pass, whether batch norms were renewed or not."""
        self.phase, self.ready = "test", self.state()
        if self.norms:
            last: Any = list(self.norms.values())[-1]
            self.ready_norm = [in_float64(x).clone() for x in (last.running_mean, last.running_var)]

    @torch.no_grad()
    def state(self) -> State:
        device = self.step.device
        norms: list[Any] = list(self.norms.values())
        variances = flat([norm.running_var for norm in norms], device)
        counts = [self.step.optimizer.state.get(p, {}).get("step") for p in self.parameters.values()]
        counted = iter(numbers([count for count in counts if count is not None]))
        return State(
            values=flat(self.parameters.values(), device),
            steps=[0.0 if count is None else next(counted) for count in counts],
            statistics=torch.cat([flat([norm.running_mean for norm in norms], device), variances]),
            variances=variances,
            tracked=[int(count) for count in numbers([norm.num_batches_tracked for norm in norms])],
        )

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The weights that the quantized layers compute with now, by layer name."""
        layers: Any = {name: self.model.get_submodule(name) for name in quantizers(self.model)}
        return {name: layer.parametrizations.weight().detach() for name, layer in layers.items()}

    def leave(self) -> None:
        """Note the state for the next epoch to begin with."""
        self.step.left = _carried(self.state(), moments(self.step, self.parameters))

    def begun(self) -> dict[str, Tensor]:
        """The state that this epoch began with."""
        return _carried(self.before, self.moments)

    @only_looks
    def _note(self, model: nn.Module, inputs: tuple[Any, ...], logits: Any) -> None:
        images = inputs[0]
        if self.phase == "test" and not self.tested:
            self.tested = [images[:TESTED_AGAIN].clone()]
        self.passes[self.phase].append(
            Pass(
                logits.detach(),
                _ends(images) if self.phase == "training" else [],
                {m.training for m in self.modules},
                all(q.enabled for q in self.quantizations),
                torch.is_grad_enabled(),
            )
        )

    @only_looks
    def _note_norm(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.phase == "renewal" and norm.training:  # one that is frozen keeps its statistics
            var, mean = torch.var_mean(inputs[0].float(), [0, *range(2, inputs[0].ndim)])
            self.last_norm.append((mean, var))


def moments(step: TrainingStep, parameters: dict[str, nn.Parameter]) -> tuple[Tensor, Tensor]:
    """AdamW's first and second moments of all trained parameters, (P,) each."""
    states = {p: step.optimizer.state.get(p, {}) for p in parameters.values()}
    first, second = (
        [state[name] if name in state else torch.zeros_like(p) for p, state in states.items()]
        for name in ("exp_avg", "exp_avg_sq")
    )
    return flat(first, step.device), flat(second, step.device)


def gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients that the last step left, by name, not copied."""
    return {n: p.grad.detach() for n, p in parameters.items() if p.grad is not None}


def _carried(state: State, moments: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What one epoch hands to the next, by a word for each part."""
    return {
        "parameters": state.values,
        "batch norm statistics": state.statistics,
        "the optimizer's moments": torch.cat(moments),
    }


def _copied(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _ends(images: Tensor) -> list[Tensor]:
    """The first and the last image of a batch, copied; none of an empty share."""
    return [images[0].detach().clone(), images[-1].detach().clone()] if len(images) else []


def flat(tensors: Any, device: torch.device | str = "cpu") -> Tensor:
    """Copies in a row, (n,)."""
    rows = [t.detach().reshape(-1).float() for t in tensors]
    return torch.cat(rows) if rows else torch.zeros(0, device=device)


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """The numbers that scalars hold, with one wait for the device."""
    return torch.stack([in_float64(s.detach()) for s in scalars]).tolist() if scalars else []
