"""The schema of history.json: the run as a whole, a record an epoch, a record a layer.

The table, the pictures, the verdict, the checkpoints, the sweep and the benchmark read these records and no
others, so that what is printed, drawn, judged and resumed cannot disagree. Their types are declared here
alone.
"""

import dataclasses
import json
import os
import platform
import subprocess
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments.data import Dataset
from experiments.device import describe_device, emulates_bf16
from experiments.distributed import Processes
from experiments.evaluator import Compression
from experiments.network import NO_USE, HostUse, memory_layout
from experiments.settings import PRECISIONS, Settings
from metrics import TOTALS, LayerCount, NetworkCount
from utils_quantization import has_codes, layers_of, parameter_groups, quantizers, weight_bits

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "matplotlib")


PASS, FAIL, SKIP = "PASS", "FAIL", "SKIP"
LIKELY_CAUSE = ". Likely cause: "  # between what was measured and the cause, in the message of a FAIL


@dataclass(frozen=True)
class Check:
    """What one check found, and a line of the verdict."""

    status: str  # PASS, FAIL or SKIP
    name: str
    message: str  # the measured numbers, and the likely cause of a FAIL

    @property
    def measured(self) -> str:
        return self.message.partition(LIKELY_CAUSE)[0]

    @property
    def cause(self) -> str:
        """The likely cause of a FAIL; "" where none is said."""
        return self.message.partition(LIKELY_CAUSE)[2]

    def __str__(self) -> str:
        return f"{self.status}  {self.name}: {self.message}"


def judge(passed: bool, name: str, measured: str, cause: str) -> Check:
    """Make a check that passed, with what was measured, or one that failed, with its likely cause as well."""
    return Check(PASS, name, measured) if passed else Check(FAIL, name, f"{measured}{LIKELY_CAUSE}{cause}")


def some(names: Iterable[str], between: str = ", ") -> str:
    """The first three of many names, each once, and how many more there are."""
    first = list(dict.fromkeys(names))
    return between.join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


@dataclass(frozen=True)
class LayerStart:
    """A quantized layer before the first epoch."""

    parameters: dict[str, float]  # the quantizer's own trained numbers, by their names in the quantizer
    learned_bits: float  # before rounding


@dataclass(frozen=True)
class LayerRecord:
    """A quantized layer after an epoch; gradients are those of the epoch's last step."""

    parameters: dict[str, float]
    gradients: dict[str, float | None]  # None where no gradient has arrived
    learned_bits: float
    bits: int
    weights: int
    zero_weights: int
    filters: int
    zero_filters: int
    alive_channels: int
    constant_channels: int
    null_channels: int
    signal: float | None = None  # largest share of a filter's variance that its norm's eps leaves, 0 to 1


@dataclass(frozen=True)
class EpochRecord:
    """One epoch: its training, and the network that it left."""

    epoch: int  # from 1
    loss: float  # cross-entropy plus coefficient times penalty, the mean over the epoch's images
    cross_entropy: float
    penalty: float  # of the network at the epoch's end
    coefficient: float  # of the penalty in this epoch; `sparsity_weight` in the settings is its peak
    accuracy: float  # on the test images, 0 to 1
    unstructured_sparsity: float  # share of the quantized weights that are zero
    structured_sparsity: float  # share of the quantized filters whose weights are all zero
    learned_bits: float  # mean over the quantized layers, before rounding
    bits: float  # the same, as used
    layers: dict[str, LayerRecord]
    seconds: float
    ledger: list[Check] = field(default_factory=list)  # what experiments/ledger.py found of this epoch


@dataclass(frozen=True)
class DataRecord:
    """The images of a run."""

    name: str
    source: str  # where they came from, or why they are the stand-in
    synthetic: bool
    classes: int
    train_images: int
    test_images: int

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.classes


@dataclass(frozen=True)
class Resumption:
    """One time that the run was resumed."""

    after_epoch: int
    differences: list[str]  # what was otherwise than before, in words


@dataclass(frozen=True)
class FinalCounts:
    """The counts of the last finished epoch's network."""

    structured_bops_ratio: float
    unstructured_bops_ratio: float
    structured_mac_ratio: float
    unstructured_mac_ratio: float
    structured_ceiling: float
    unstructured_ceiling: float
    unstructured_sparsity: float
    structured_sparsity: float
    learned_bits: float
    bits: float
    totals: dict[str, int]
    layers: list[LayerCount]

    @property
    def count(self) -> NetworkCount:
        return NetworkCount(tuple(self.layers))


@dataclass(frozen=True)
class Retest:
    """The final network, tested a second time in the precision of the run, on one process."""

    images: int
    right: int
    ties: int  # images whose two largest logits are as close as rounding
    class_images: list[int]  # test images of each class
    class_predictions: list[int]  # how often each class was predicted
    class_right: list[int]
    train_images: int  # of the training set, without augmentation
    train_right: int


@dataclass(frozen=True)
class FileLayer:
    """A layer as the packed file has it, counted from the file's bytes."""

    coded: bool  # whether its weights are integer codes, and not float32
    bits: int  # of a weight
    levels: int  # different weights; of float32 the most in a filter, as each may have its scale
    weights: int
    zero_weights: int
    filters: int
    zero_filters: int
    structured_macs: int | None  # None where the file does not tell the network's wiring
    unstructured_macs: int | None


@dataclass(frozen=True)
class CompressedRecord:
    """The smaller network and the packed file against the quantized network, over the whole test set."""

    images: int
    dense_parameters: int
    slim_parameters: int
    dense_macs: int
    slim_macs: int  # counted by torch on the smaller network
    structured_macs: int  # what the metrics print
    largest_logit: float
    largest_difference: float  # between the smaller network's logits and the quantized one's
    agreement: float  # share of equal predictions
    quantized_accuracy: float
    slim_accuracy: float
    packed_accuracy: float
    packed_differs: int  # logits of the packed file's network that differ in any bit
    packed_bytes: int
    float32_bytes: int  # the same network's state_dict, saved by torch
    slim_bytes: int
    read_back_parameters: int  # of the network in slim.pt2; 0 if it cannot be read
    read_back_difference: float  # between its logits and the smaller network's; NaN if it cannot be read
    packed_settings: dict[str, Any]  # of the run, as the packed file says
    packed_metrics: dict[str, Any]
    latency_seconds: dict[str, dict[str, float]]  # median, least and most a forward pass
    file: dict[str, FileLayer] = field(default_factory=dict)  # by layer


@dataclass(frozen=True)
class Origin:
    """Where a run comes from."""

    date: str = ""  # of its start, UTC
    command: list[str] = field(default_factory=list)  # the arguments as they were typed
    commit: str | None = None  # of this program, with -dirty where files differ from it; None if it has none


@dataclass
class History:
    """A run, from its settings to its verdict: the content of history.json."""

    settings: dict[str, Any]  # as `Settings.to_json` has them
    versions: dict[str, str]
    device: str
    precision: str
    threads: int
    processes: int
    data: DataRecord
    quantized: list[str]  # layers
    full_precision: list[str]  # layers
    start: dict[str, LayerStart]
    parameter_groups: dict[str, str]  # the optimizer's group of each parameter that quantizers train, by name
    without_codes: list[str]  # quantized layers that are packed as float32: their quantizer gives no integers
    origin: Origin = field(default_factory=Origin)
    barriers: list[str] = field(default_factory=list)  # operations that no channel is followed through
    frozen: list[str] = field(default_factory=list)  # parameters of the network that are not trained
    layout: str = "channels_last"  # of images and weights in memory, or "contiguous"
    needs_host: bool = False  # on CUDA: the forward pass does, so no graph of the step is captured
    may_skip: bool = False  # the network may leave layers out of a training step
    emulates_bf16: bool = False  # the run asked for bf16, and its device has no instructions for it
    preflight: list[Check] = field(default_factory=list)  # empty where it was off
    epochs: list[EpochRecord] = field(default_factory=list)
    resumed: list[Resumption] = field(default_factory=list)
    stopped: str | None = None  # why the run ended before its last epoch
    not_finite: bool = False  # whether it was stopped by numbers that are not finite
    final: FinalCounts | None = None
    retest: Retest | None = None
    compressed: CompressedRecord | None = None
    rehearsal: list[Check] = field(default_factory=list)  # what --rehearse has found
    verdict: list[Check] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> "History":
        """The history that `to_json` or history.json holds. Raises: ValueError naming what is amiss."""
        return _read(History, values, "the history")


def new_history(
    settings: Settings,
    dataset: Dataset,
    device: torch.device,
    processes: Processes,
    model: nn.Module,
    dense: NetworkCount,
    command: Sequence[str] = (),
    host: HostUse = NO_USE,
) -> History:
    """The history of a run before its first epoch, with the counts of its dense network."""
    where = describe_device(device) + (f", {processes.count} processes" if processes.count > 1 else "")
    found = quantizers(model)
    return History(
        settings=settings.to_json(),
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        device=where,
        precision=PRECISIONS[settings.precision],
        threads=torch.get_num_threads(),
        processes=processes.count,
        data=DataRecord(dataset.name, dataset.source, dataset.synthetic, dataset.classes,
                        len(dataset.train_labels), len(dataset.test_labels)),
        quantized=list(found),
        full_precision=[name for name in layers_of(model) if name not in found],
        start={
            name: LayerStart(_parameters(quantizer), weight_bits(model.get_submodule(name))[1])
            for name, quantizer in found.items()
        },
        parameter_groups={n: g for q in found.values() for n, g in parameter_groups(q).items()},
        without_codes=[name for name, quantizer in found.items() if not has_codes(quantizer)],
        origin=Origin(datetime.now(UTC).isoformat(timespec="seconds"), list(command), commit_of_program()),
        barriers=list(dense.barriers),
        frozen=[n for n, p in model.named_parameters() if not p.requires_grad and ".quantizer." not in n],
        layout=memory_layout(model, device),
        needs_host=device.type == "cuda" and processes.count == 1 and any(host),
        may_skip=host.decides,
        emulates_bf16=settings.precision == "bf16" and emulates_bf16(device),
    )  # fmt: skip


def commit_of_program() -> str | None:
    """The commit of this program, as git says it."""
    if not (ROOT / ".git").exists():  # git would take a repository around it
        return None
    # Git hooks set GIT_DIR and others, by which git would answer for the hook's repository.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        said = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--match="],
            capture_output=True, text=True, timeout=10, check=True, env=plain,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # no git here, or none that can read it
        return None
    return said.stdout.strip()


def short_commit(commit: str | None) -> str:
    """A commit in a word, for a line that is printed.

    >>> short_commit("295c063965c3d12d20dd32194d96b45fd2973565-dirty")
    '295c063+'
    """
    return "no commit" if commit is None else commit[:7] + ("+" if commit.endswith("-dirty") else "")


def epoch_record(
    epoch: int,
    model: nn.Module,
    compression: Compression,
    *,
    loss: float,
    cross_entropy: float,
    penalty: float,
    coefficient: float,
    accuracy: float,
    seconds: float,
) -> EpochRecord:
    """The record of an epoch (from 1) that left this model with these counts."""
    return EpochRecord(
        epoch=epoch,
        loss=loss,
        cross_entropy=cross_entropy,
        penalty=penalty,
        coefficient=coefficient,
        accuracy=accuracy,
        **_sparsities(compression.count),
        layers=layer_records(model, compression.count),
        seconds=seconds,
        ledger=[],  # filled in when the epoch is over
    )


def layer_records(model: nn.Module, count: NetworkCount) -> dict[str, LayerRecord]:
    """A record of each quantized layer, by name."""
    counts = {layer.name: layer for layer in count.layers}
    own = ("parameters", "gradients", "signal")
    taken, signals = [f.name for f in dataclasses.fields(LayerRecord) if f.name not in own], _signals(model)
    return {
        name: LayerRecord(
            parameters=_parameters(quantizer),
            gradients={n: _gradient(p) for n, p in quantizer.named_parameters() if p.requires_grad},
            **{key: getattr(counts[name], key) for key in taken},
            signal=signals.get(name),
        )
        for name, quantizer in quantizers(model).items()
    }


def _signals(model: nn.Module) -> dict[str, float]:
    """What is left of each convolution's output behind the batch norm that follows it, by layer name.

    A batch norm divides by sqrt(variance + eps). Of a layer whose weights have shrunk to nothing that leaves
    nothing: the share variance / (variance + eps) tells, here the largest of the layer's filters.
    """
    found, convolution = {}, None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            convolution = name
        elif isinstance(module, _BatchNorm) and convolution and module.running_var is not None:
            found[convolution] = (module.running_var / (module.running_var + module.eps)).max().item()
            convolution = None
    return found


def as_text(record: EpochRecord) -> str:
    """All of a record, to see whether it stays as it is."""
    return json.dumps(record, default=vars)


def final_counts(compression: Compression) -> FinalCounts:
    """The counts of a finished run: the ratios, the totals, a record a layer."""
    ratios = [f.name for f in dataclasses.fields(FinalCounts) if f.name.endswith(("_ratio", "_ceiling"))]
    return FinalCounts(
        **{key: getattr(compression, key) for key in ratios},
        **_sparsities(compression.count),
        totals={key: compression.count.total(key) for key in TOTALS},
        layers=list(compression.count.layers),
    )


def _sparsities(count: NetworkCount) -> dict[str, float]:
    return {
        "unstructured_sparsity": count.unstructured_sparsity,
        "structured_sparsity": count.structured_sparsity,
        "learned_bits": count.mean_learned_bits,
        "bits": count.mean_bits,
    }


def _parameters(quantizer: nn.Module) -> dict[str, float]:
    """A quantizer's trained parameters; of one with several numbers, their mean."""
    trained = {name: p for name, p in quantizer.named_parameters() if p.requires_grad}
    return {name: p.detach().mean().item() for name, p in trained.items()}


def _gradient(parameter: nn.Parameter) -> float | None:
    """The gradient of a parameter; of one with several numbers, its norm."""
    if parameter.grad is None:
        return None
    return parameter.grad.item() if parameter.numel() == 1 else parameter.grad.norm().item()


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON, or of a checkpoint, as what a field is declared to hold.

    Raises: ValueError naming the place where something else stands. Files may have been damaged or made by
    another program, so nothing of them is taken on trust.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:
        return None if value is None else _read(inner[0], value, where)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        declared = typing.get_type_hints(kind)
        if value.keys() != declared.keys():
            odd = sorted(map(str, value.keys() ^ declared.keys()))
            raise ValueError(f"{where} has too many or too few fields ({', '.join(odd[:3])})")
        return kind(**{name: _read(t, value[name], f"{where}, {name}") for name, t in declared.items()})  # type: ignore[operator]
    if origin is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _read(inner[1], item, f"{where}, {key}") for key, item in value.items()}
    if origin in (list, tuple) and isinstance(value, list | tuple):
        return origin(_read(inner[0], item, f"{where}, item {i}") for i, item in enumerate(value, 1))
    if kind is float and value in ("nan", "inf", "-inf"):  # how strict JSON is given them
        return float(value)
    if kind is float and type(value) in (float, int) and not (type(value) is int and abs(value) > 2**53):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    name = getattr(kind, "__name__", str(kind))
    raise ValueError(f"{where} is {str(value)[:40]!r}; expected {name}")
