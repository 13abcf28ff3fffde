"""What the preflight's checks share: the run that they look at, and the ways in which a check can end."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from experiments import reference, schedules, sparsity
from experiments.data import Dataset
from experiments.device import float64_device, in_float64
from experiments.distributed import ALONE, use_local_batch_norms
from experiments.history import History
from experiments.network import MOST_PARAMETERS
from experiments.training import Pipeline, TrainingStep
from experiments.user_code import first_line
from resnet import ResNet
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import quantized_layers, quantizers

EXACT = 1e-8  # of the largest number, for float64 arithmetic in another order
TINY = 1e-4  # a factor that moves any weight into the dead zone
PROBE_IMAGES = 8  # enough for the float64 comparisons: each layer still sees hundreds of positions


class BrokenError(Exception):
    """A check does not hold: the figures, and the likely cause."""

    def __init__(self, measured: str, cause: str) -> None:
        super().__init__(measured)
        self.measured, self.cause = measured, cause


class NotApplicableError(Exception):
    """A check says nothing of this run; the text says why."""


def expect(holds: bool | Tensor, measured: str, cause: str) -> None:
    """Raises: BrokenError with the figures and the likely cause where the condition does not hold."""
    if not holds:
        raise BrokenError(measured, cause)


def expect_close(
    found: Tensor, wanted: Tensor, what: str, cause: str, tolerance: float, least: float = 0.0
) -> float:
    """Two tensors are equal to a tolerance; returns their distance over the largest number wanted.

    That is taken to be `least` where it is smaller. The tolerance is relative to it too.
    Raises: BrokenError otherwise, also for another shape and for numbers that are not finite.
    """
    if found.shape != wanted.shape:
        raise BrokenError(f"{what} has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}", cause)
    largest = max(wanted.abs().max().item(), least) if wanted.numel() else 0.0
    distance = (found.to(wanted.dtype) - wanted).abs().max().item() if wanted.numel() else 0.0
    relative = distance / largest if largest else distance
    measured = f"{what} is off by {relative:.2g} of its largest number"
    expect(relative <= tolerance, measured, cause)  # NaN fails
    return relative


def shows(said: str, value: float) -> bool:
    """Whether a printed number is this value, rounded to the digits that it has."""
    digits = len(said.partition(".")[2])
    try:
        return abs(float(said.replace(",", "")) - value) <= 0.5001 * 10.0**-digits
    except ValueError:
        return False


@dataclass
class Subject:
    """The run that is checked, and copies of it that may be changed."""

    pipeline: Pipeline
    dataset: Dataset
    history: History
    one_epoch: Callable[..., Any]  # the run's own
    arguments: list[str]  # of the command line
    resumed: bool
    threads: int = field(default_factory=torch.get_num_threads)  # of the run; the checks may take fewer
    traces: dict[bool, Any] = field(default_factory=dict)  # training steps looked at, see preflight_step.py

    @property
    def step(self) -> TrainingStep:
        return self.pipeline.step

    @property
    def own_network(self) -> bool:
        """Whether the network is one of resnet.py, so that the reference knows it."""
        return type(self.pipeline.model) is ResNet

    @property
    def own_quantizers(self) -> bool:
        return all(type(q) is DeadZoneLDZCompander for q in self.quantizers(self.pipeline.model).values())

    @property
    def may_skip(self) -> bool:
        """Whether the network may leave layers out of a training step."""
        return self.step.host.decides

    @property
    def own_penalty(self) -> bool:
        return self.step.penalty.__module__ == sparsity.__name__

    @property
    def own_rates(self) -> bool:
        return self.pipeline.rate_schedule.__module__ == schedules.__name__

    @property
    def own_warmup(self) -> bool:
        return self.pipeline.sparsity_schedule.__module__ == schedules.__name__

    @property
    def blocks(self) -> int:
        """Blocks a stage of an own network."""
        return len(self.pipeline.model.layer1)  # type: ignore[arg-type]

    quantizers = staticmethod(quantizers)  # of any model, by layer

    @cached_property
    def first_batch(self) -> tuple[Tensor, Tensor]:
        """This rank's shard of the first batch of epoch 0."""
        return next(iter(self.pipeline.train_batches.epoch(0)))

    @cached_property
    def probe(self) -> tuple[Tensor, Tensor]:
        """A few training images in float64, the same in every rank, and their labels."""
        device = self.probe_device
        images, labels = (t[:PROBE_IMAGES].to(device) for t in self.first_batch)
        return images.double().contiguous(), labels

    @property
    def probe_device(self) -> torch.device:
        return float64_device(self.step.device)

    def copied_step(self) -> TrainingStep:
        """The run's step with a model and an optimizer of its own; what it does leaves the run alone.

        It captures no graph: the checks look at it through hooks, which do not fire in a replay.
        """
        step = copy.deepcopy(self.step)
        step.captures = False
        step.optimizer.zero_grad(set_to_none=True)
        return step

    @cached_property
    def runs_in_float64(self) -> bool:
        """Whether the network can; one that casts to float32 on its way cannot."""
        try:
            with torch.no_grad():
                self.float64_step(runs=False).model.eval()(self.probe[0])
        except RuntimeError:
            return self.own_network  # where it is an error, which the checks shall name
        return True

    def must_run_in_float64(self) -> None:
        """Raises: NotApplicableError for a network that does not."""
        if not self.runs_in_float64:
            raise NotApplicableError("the network casts to another type, and cannot run in float64")

    def float64_step(self, runs: bool = True) -> TrainingStep:
        """The run's step on this rank alone, in float64, with planted numbers that let errors show.

        At the start of a run the logits lie in tanh's flat part, batch norms are neutral and nothing is dead,
        so that many an error would make no difference.

        Raises: NotApplicableError for a network that is too large for several copies in float64, for one that
            cannot run in it, if it `runs`, and for someone's own quantizer that does not take it.
        """
        if runs:
            self.must_run_in_float64()
        parameters = sum(p.numel() for p in self.pipeline.model.parameters())
        if parameters > MOST_PARAMETERS:
            raise NotApplicableError(f"{parameters:,} parameters are too many for copies in float64")
        step = self.copied_step()
        use_local_batch_norms(step.model)
        step.processes, step.precision = ALONE, "float32"
        step.model.to(self.probe_device).double()
        moments_in_float64(step.optimizer)
        step.device, step.coefficient = self.probe_device, in_float64(step.coefficient)
        plant(step.model, self.own_quantizers)
        if not self.own_quantizers:
            try:
                used_weights(step.model)
            except RuntimeError as error:
                raise NotApplicableError(
                    f"the quantizer does not take float64 ({first_line(error)})"
                ) from None
        return step


def moments_in_float64(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer go on with parameters in float64: a resumed run has moments, and they are float32."""
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = in_float64(state[name])
        state["step"] = state["step"].to(float64_device(state["step"].device))


@torch.no_grad()
def plant(model: nn.Module, own_quantizers: bool) -> None:
    """Random batch norms and logits, and some dead slices, in place.

    Dead slices are stored as small numbers inside the dead zone, so that they are zero by the quantizer
    alone: whether they are then kept dead shows in what is stored. Channel 1 of each block is dead as a whole
    group.
    """
    generator = torch.Generator().manual_seed(20_251)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(like.shape, generator=generator)).to(like)

    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.affine:
            module.weight.copy_(uniform(module.weight, 0.5, 1.5))
            module.weight[4:5] = 0  # a channel that its batch norm makes constant
            module.bias.copy_(uniform(module.bias, -0.3, 0.3))
            module.bias[4:5] *= TINY  # a small number that counts all the same
            module.running_mean.copy_(uniform(module.running_mean, -0.5, 0.5))
            module.running_var.copy_(uniform(module.running_mean, 0.5, 2.0))  # type: ignore[union-attr]
    for name, layer in quantized_layers(model).items():
        stored: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
        if stored.ndim == 4:
            if len(stored) > 5:  # a filter that sums to zero and is not zero, as do its kernels, if not 1x1
                rows = stored[5].flatten(1) if stored[0, 0].numel() > 1 else stored[5].reshape(1, -1)
                pair, rows = rows.abs().amax(1), TINY * rows
                rows[:, 0], rows[:, 1:2] = pair, -pair[:, None]
                stored[5] = rows.view_as(stored[5])
            stored[1:2] *= TINY
            if name.endswith("conv2"):
                stored[:, 1:3] *= TINY
            elif stored.shape[1] > 8:
                stored[:, 8] *= TINY  # what enters a block, and the shortcut alone reads
            if len(stored) > 7:  # a filter without a positive weight
                stored[7] = -stored[7].abs()
            groups: Any = layer.groups
            if 2 * groups < len(stored):  # every other group keeps its last two filters alone
                stored.view(groups, -1, *stored.shape[1:])[1::2, :-2] *= TINY
    if own_quantizers:
        sign = 1
        for name, quantizer in Subject.quantizers(model).items():
            # Of both signs: only the magnitude of a logit counts.
            sign = -sign
            quantizer.logit_bit.copy_(sign * uniform(quantizer.logit_bit, 0.3, 1.2))
            quantizer.logit_dz.copy_(-sign * uniform(quantizer.logit_dz, 0.6, 1.5))
            stored = model.get_submodule(name).parametrizations.weight.original  # type: ignore[union-attr]
            if stored.ndim == 4 and len(stored) > 6:  # a filter with one weight left, the smallest there is
                stored[6] *= TINY
                edge = reference.quantile_99(stored) * (1 - quantizer.logit_dz.tanh().abs())
                stored[6, 0, 0, 0] = 1.02 * edge
    for name, parameter in model.named_parameters():
        # What begins at zero, as a residual's scale may, lets no gradient through.
        if ".parametrizations." not in name and parameter.requires_grad and not parameter.any():
            parameter.copy_(uniform(parameter, 0.1, 0.3))


@torch.no_grad()
def used_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that convolutions and linear layers compute with in evaluation mode, by name.

    In training mode someone's own quantizer may take statistics each time that it is called.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    used: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if not parametrize.is_parametrized(layer, "weight"):
            used[name] = layer.weight.detach()
            continue
        weight: Any = layer.parametrizations.weight  # type: ignore[union-attr]
        training = weight.training
        used[name] = weight.eval()().detach()
        weight.train(training)
    return used


def stored_weight(layer: Any) -> Tensor:
    """The weight that a layer stores and trains, quantized or not."""
    if parametrize.is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original.detach()
    return layer.weight.detach()
