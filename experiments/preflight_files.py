"""Preflight checks of counts, compressed network and checkpoint, and that all ranks do one and the same."""

import contextlib
import dataclasses
import math
import os
import random
import re
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments import reference
from experiments.checkpoint import (
    check_settings,
    checkpoint_path,
    checkpoint_paths,
    describe_differences,
    last_checkpoint,
    load_checkpoint,
    resume,
    save_checkpoint,
    take_checkpoint,
)
from experiments.distributed import ALONE, use_local_batch_norms
from experiments.draws import drawn_since, random_states, same_draws
from experiments.expect import (
    BrokenError,
    NotApplicableError,
    Subject,
    expect,
    expect_close,
    moments_in_float64,
    shows,
    used_weights,
)
from experiments.files import OutputError
from experiments.history import PASS, Check, History, Resumption, epoch_record, some
from experiments.recount import body_sizes, recount
from experiments.settings import Settings, flag
from experiments.training import TrainingStep, renew_batch_norms
from metrics import LayerCount, NetworkCount, count_by_torch, count_slim_by_torch, in_layers, of_layers, ratio
from src.channels import ChannelState
from src.encoding import PackingError
from src.packing import pack_network, unpack_network
from src.slim import slim_network
from utils_quantization import quantized_layers, without_quantizers

FULL_BITS = 32
CHECKSUM_AT = 20  # in a packed file: behind 8 bytes of magic and three numbers of 4 bytes
FREE = {"data_dir", "output_dir", "figure_format", "preflight", "rehearse"}  # settings that change no number
FAR_FUTURE = 4e9  # a time in seconds since 1970
IMAGES = 16  # in the steps around a checkpoint


def counts_are_the_networks(subject: Subject) -> str:
    """Counts of a network with planted deaths against a recount, the smaller network and a packed file."""
    model = subject.float64_step().model.eval()
    compression = subject.pipeline.evaluator.evaluate(model)
    images = subject.probe[0].clone()
    weights, quantizers = used_weights(model), subject.quantizers(model)
    entered = set[str]()  # layers that an image enters: what none enters is not counted

    def note(name: str) -> Any:
        return lambda module, inputs: entered.add(name) if inputs[0].requires_grad else None

    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles = [m.register_forward_pre_hook(note(n)) for n, m in layers.items()]
    masked = model.requires_grad_(False)(images.requires_grad_()).detach()
    for handle in handles:
        handle.remove()
    cause = "a defect in metrics.py or src/channels.py"
    names = [layer.name for layer in compression.count.layers]
    missing = [name for name in layers if name in entered and name not in names]
    unused = f"the network makes no use of what they give, or {cause}"
    expect(not missing, f"layers are missing from the counts: {some(missing)}", unused)
    expect(
        not subject.own_network or names == list(layers),
        "the counts are not of the network's layers in their order",
        cause,
    )
    count, by_torch = compression.count, count_by_torch(model)
    macs = in_layers(by_torch, count)
    for layer in count.layers:
        # A weight that is in no layer, as of torch's attention, or that is used outside its own too.
        if layer.name not in weights or layer.name in count.elsewhere:
            continue
        w, name = weights[layer.name], layer.name
        bits = int(quantizers[name].get_bitwidth()) if name in quantizers else FULL_BITS
        at = macs[name] // w.numel()
        dead = int((w != 0).flatten(1).sum(1).eq(0).sum())
        for what, said, counted in (
            ("bits", layer.bits, bits),
            ("weights", layer.weights, w.numel()),
            ("zero weights", layer.zero_weights, int((w == 0).sum())),
            ("zero filters", layer.zero_filters, dead),
            ("dense MACs", layer.dense_macs, w.numel() * at),
            ("unstructured MACs", layer.unstructured_macs, int((w != 0).sum()) * at),
            ("unstructured BOPs", layer.unstructured_bops, int((w != 0).sum()) * at * bits * FULL_BITS),
            ("structured BOPs", layer.structured_bops, layer.structured_macs * bits * FULL_BITS),
            ("dense BOPs", layer.dense_bops, w.numel() * at * FULL_BITS * FULL_BITS),
        ):
            measured = f"{name}: {said:,} {what} counted, {counted:,} in the network"
            expect(said == counted, measured, f"{cause}: how {what} are counted")
    theirs = of_layers(by_torch, count)
    expect(
        count.total("dense_macs") == theirs,
        f"{count.total('dense_macs'):,} MACs, torch counts {theirs:,}",
        cause,
    )
    for name, unit in (("bops", "bops"), ("mac", "macs")):
        for kind in ("structured", "unstructured"):
            dense, left = count.total(f"dense_{unit}"), count.total(f"{kind}_{unit}")
            said = getattr(compression, f"{kind}_{name}_ratio")
            expect(
                math.isclose(said, ratio(dense, left), rel_tol=1e-9),
                f"the {kind} {unit} ratio is {said:.4f}, {dense:,} / {left:,} is {dense / (left or 1):.4f}",
                "a ratio is not dense over compressed (experiments/evaluator.py)",
            )
    _compare_shares(count, weights, quantizers)
    if subject.own_network:
        _compare_inner_channels(model, count, weights)
        _compare_residual_channels(model, count, weights)
    return _compare_compressed(subject, model, count, masked, images)


def _compare_shares(count: NetworkCount, weights: dict[str, Tensor], quantizers: dict[str, Any]) -> None:
    """The table's two sparsities and its bits, over the quantized layers alone."""
    if not _convolutions(weights, quantizers):
        return
    zeros = sum(int((weights[name] == 0).sum()) for name in quantizers)
    total = sum(weights[name].numel() for name in quantizers)
    filters = [x.flatten(1).any(1) for x in _convolutions(weights, quantizers)]
    dead = sum(int((~alive).sum()) for alive in filters)
    bits = [float(torch.as_tensor(q.get_bitwidth()).detach()) for q in quantizers.values()]
    for what, said, counted in (
        ("share of zero weights", count.unstructured_sparsity, zeros / total),
        ("share of zero filters", count.structured_sparsity, dead / sum(map(len, filters))),
        ("mean bits in use", count.mean_bits, sum(bits) / len(bits)),
    ):
        expect(
            math.isclose(said, counted, abs_tol=1e-9),
            f"the {what} is {said:.6f}, the weights give {counted:.6f}",
            "a share or a mean of metrics.py: what it counts (zero weights, zero filters, bits), or where",
        )


def _convolutions(weights: dict[str, Tensor], quantizers: dict[str, Any]) -> list[Tensor]:
    return [weights[name] for name in quantizers if weights[name].ndim == 4]


def _compare_inner_channels(model: nn.Module, count: NetworkCount, weights: dict[str, Tensor]) -> None:
    """Between a block's convolutions no channel lives that is not made, is scaled by 0, or is not read.

    Fewer may: what makes it may see dead channels alone, what reads it may be dead too, as in a resumed run.
    That too many are taken for dead shows in the smaller network's logits. Behind the ReLU a channel that no
    image changes leaves its batch norm's shift, and nothing where that is not above 0.
    """
    heard = weights["linear"].any(0).all()
    norm: Any
    norm2: Any
    for layer in count.layers:
        if layer.name.endswith(".conv1"):
            block = layer.name.removesuffix(".conv1")
            norm, norm2 = (model.get_submodule(f"{block}.{which}") for which in ("bn1", "bn2"))
            read = weights[f"{block}.conv2"].transpose(0, 1).flatten(1).any(1)
            made, scaled = weights[layer.name].flatten(1).any(1), norm.weight != 0
            shift = _shift(norm)
            silent = ~(made & scaled)
            # The classifier reads every residual channel, so what conv2 and its norm make of one is read.
            passed = (weights[f"{block}.conv2"] != 0) & (norm2.weight != 0)[:, None, None, None]
            spoken = passed.transpose(0, 1).flatten(1).any(1) & heard
            for what, due, state in (
                ("nothing", silent & (shift <= 0), ChannelState.NULL),
                ("a constant", silent & (shift > 0) & spoken, ChannelState.CONSTANT),
            ):
                _expect_states(layer, due, state, what)
            alive = int((made & scaled & read).sum())
            expect(
                layer.alive_channels <= alive,
                f"{layer.alive_channels} channels of {layer.name} count as alive, at most {alive} are",
                "the account of channels (src/channels.py): a dead filter, a batch norm's scale of 0 or a "
                "channel that nothing reads is overlooked",
            )


def _compare_residual_channels(model: nn.Module, count: NetworkCount, weights: dict[str, Tensor]) -> None:
    """In front of a sum with a channel that images change, a dead channel leaves a constant of either sign.

    In the first stage these are the stem's channels, which shortcuts hand on as they are.
    """
    stem: Any = model.get_submodule("bn1")
    varies = weights["conv1"].flatten(1).any(1) & (stem.weight != 0) & weights["linear"].any(0).all()
    for layer in count.layers:
        if layer.name.startswith("layer1.") and layer.name.endswith(".conv2"):
            norm: Any = model.get_submodule(layer.name.replace("conv", "bn"))
            made = weights[layer.name].flatten(1).any(1) & (norm.weight != 0)
            due = ~made & varies & (_shift(norm) != 0)
            _expect_states(layer, due, ChannelState.CONSTANT, "a constant")


def _expect_states(layer: LayerCount, due: Tensor, state: ChannelState, what: str) -> None:
    odd = [i for i, s in enumerate(layer.states) if due[i] and s != state]
    measured = f"channels {odd[:3]} of {layer.name} leave {what}, and do not count so"
    expect(not odd, measured, "what a dead channel leaves (the states of src/channels.py)")


def _shift(norm: Any) -> Tensor:
    """What a batch norm makes of a channel of zeros in evaluation mode."""
    return norm.bias - norm.weight * norm.running_mean / (norm.running_var + norm.eps).sqrt()


def _compare_compressed(
    subject: Subject, model: nn.Module, count: NetworkCount, masked: Tensor, images: Tensor
) -> str:
    slim = slim_network(model)
    with torch.no_grad():
        smaller = slim(images)
    expect_close(
        smaller,
        masked,
        "logits of the smaller network",
        "the smaller network is not the quantized one "
        "(src/slim.py, or the account of channels in src/channels.py)",
        1e-7,
    )
    macs = count_slim_by_torch(slim, count)
    expect(
        macs == count.total("structured_macs"),
        f"{count.total('structured_macs'):,} structured MACs are counted, the smaller network has {macs:,}",
        "the account of dead channels (src/channels.py, metrics.py)",
    )
    single = model.float()
    content = pack_network(single, {}, name=type(model).__name__)
    if subject.own_network:
        _compare_with_recount(content, subject.pipeline.evaluator.evaluate(single).count)
        taken, least = body_sizes(content)
        expect(
            taken <= 1.02 * least,  # a compression of the same name may be set otherwise
            f"the packed file takes {taken:,} bytes, and {least:,} are enough for the same",
            "a compression that is left out, or that is not the smallest (src/encoding.py)",
        )
        if subject.own_quantizers:
            _compare_ceiling(subject, single)
    packed = unpack_network(content, lambda: without_quantizers(single, stored=True)).to(subject.probe_device)
    altered = bytearray(content)
    altered[CHECKSUM_AT] ^= 1  # all else is right
    try:
        unpack_network(bytes(altered), lambda: without_quantizers(single, stored=True))
    except PackingError:
        pass
    else:
        raise BrokenError("a packed file with one bit changed is read", "its checksum is not compared")
    with torch.no_grad():
        differ = int((packed(images.float()) != single(images.float())).sum())
    expect(
        differ == 0,
        f"{differ} logits of the packed file differ from the quantized network's",
        "the packed file (src/packing.py, src/encoding.py, or the quantizer's codes)",
    )
    return f"{len(count.layers)} layers; smaller network and packed file give the same logits"


def _compare_with_recount(content: bytes, count: NetworkCount) -> None:
    """The counts of each layer against those that a second reader takes from the packed file's bytes."""
    file = recount(content)
    for layer in count.layers:
        for field in ("zero_weights", "zero_filters", "structured_macs", "unstructured_macs"):
            said, counted = getattr(layer, field), getattr(file[layer.name], field)
            expect(
                said == counted,
                f"{layer.name}: {said:,} {field.replace('_', ' ')} counted, {counted:,} in the packed file",
                "the account of channels (src/channels.py) or the counts of a layer (metrics.py)",
            )


@torch.no_grad()
def _compare_ceiling(subject: Subject, model: nn.Module) -> None:
    """The ratios that no compression can pass, against a recount of the network without quantized weights."""
    empty = deepcopy(model)
    for layer in quantized_layers(empty).values():
        stored: Any = layer.parametrizations.weight.original  # type: ignore[union-attr]
        stored.zero_()
    layers = recount(pack_network(empty, {})).values()
    compression = subject.pipeline.evaluator.evaluate(model)
    for kind in ("structured", "unstructured"):
        left = sum(getattr(layer, f"{kind}_macs") for layer in layers)
        due, said = ratio(compression.dense_macs, left), getattr(compression, f"{kind}_ceiling")
        expect(
            math.isclose(said, due, rel_tol=1e-9),
            f"the {kind} ceiling is {said:.2f}x, and with all quantized weights zero it is {due:.2f}x",
            "the ceiling (metrics.py, experiments/evaluator.py), or what is read (src/channels.py)",
        )


def checkpoints_restore_everything(subject: Subject) -> str:
    """Save after a step, restore into another copy, take the next step in both: the same numbers."""
    if subject.step.processes.count > 1:
        raise NotApplicableError("with several ranks, rank 0 writes the checkpoint of all")
    images, labels = (t[:IMAGES] for t in subject.first_batch)
    coefficient = subject.pipeline.settings.sparsity_weight
    first, second = subject.copied_step(), subject.copied_step()
    first.model.train()
    cause = "the checkpoint leaves something out, or restores something else (experiments/checkpoint.py)"
    numbers = dict.fromkeys(("loss", "cross_entropy", "penalty", "coefficient", "accuracy", "seconds"), 0.0)
    compression = subject.pipeline.evaluator.evaluate(first.model)
    record = epoch_record(1, first.model, compression, **numbers)
    with _temporary_folder() as folder:
        # One object for both, as in a run, which was resumed before.
        history = dataclasses.replace(
            subject.history, epochs=[], resumed=[Resumption(1, ["a"])], rehearsal=[Check(PASS, "b", "c")]
        )
        for epochs in (1, 2):  # the second checkpoint must hold what there is by then
            first(images, labels, coefficient, len(labels))
            history.epochs = [dataclasses.replace(record, epoch=epoch + 1) for epoch in range(epochs)]
            save_checkpoint(folder, take_checkpoint(history, first.model, first.optimizer))
        drawn = _drawn()
        found = load_checkpoint(checkpoint_path(folder, 2))
        begun = dataclasses.replace(subject.history, epochs=[], resumed=[], rehearsal=[])
        resume(found, begun, second.model, second.optimizer)
        expect(_drawn() == drawn, "after restoring, other random numbers are drawn",
               "the random state is not restored")  # fmt: skip
        _falls_back(folder, history, first)
    _refuses_other_settings(found.history.settings, subject.pipeline.settings)
    expect(found.history == history, "the history is another one after restoring", cause)
    goes_on = "a resumed run does not go on where its checkpoint stands (experiments/checkpoint.py)"
    expect(
        begun.epochs == history.epochs and begun.start == history.start,
        f"a resumed run begins with {len(begun.epochs)} of {len(history.epochs)} records",
        goes_on,
    )
    resumed = [*history.resumed, Resumption(len(history.epochs), [])]
    expect(
        begun.resumed == resumed and begun.rehearsal == history.rehearsal,
        f"what a resumed run notes is {some(map(str, begun.resumed))}, and {some(map(str, resumed))} is so",
        goes_on,
    )
    _compare_differences(history)
    _expect_same(first, second, "after restoring", cause)
    second.model.train()
    for step in (first, second):
        with same_draws():
            step(images, labels, coefficient, len(labels))
    try:
        _expect_same(first, second, "a step after restoring", cause)
    except BrokenError as broken:
        if (subject.own_network and subject.own_quantizers) or subject.step.device.type == "cpu":
            raise
        # Some operations of an accelerator, attention's backward pass say, sum in another order each time.
        raise NotApplicableError(
            f"what is restored is equal; {broken.measured}, which {subject.step.device.type} may do by itself"
        ) from None
    return "weights, moments and statistics, and the step after them"


def _drawn() -> list[float]:
    """The next draw of each generator."""
    return [torch.rand(()).item(), np.random.rand(), random.random()]


def _falls_back(folder: Path, history: History, step: TrainingStep) -> None:
    """Of three checkpoints the last two are kept; where the last is damaged, the one before it is taken."""
    cause = "which checkpoints are kept, their order, or their checksum (experiments/checkpoint.py)"
    kept = dataclasses.replace(
        history, epochs=[*history.epochs, dataclasses.replace(history.epochs[-1], epoch=3)]
    )
    save_checkpoint(folder, take_checkpoint(kept, step.model, step.optimizer))
    due = [checkpoint_path(folder, epochs) for epochs in (3, 2)]
    if due[1].exists():  # a copy may have been written later than what it is older than
        os.utime(due[1], (FAR_FUTURE, FAR_FUTURE))
    paths = checkpoint_paths(folder)
    measured = f"of three checkpoints {some([path.name for path in paths])} are left in this order"
    expect(paths == due, measured, cause)
    content = bytearray(due[0].read_bytes())
    content[len(content) // 2] ^= 1
    due[0].write_bytes(content)
    found = last_checkpoint(folder, lambda line: None)
    epochs = found.epochs if found else 0
    expect(epochs == 2, f"beside a damaged checkpoint of epoch 3 that of epoch {epochs} is taken", cause)


def _compare_differences(history: History) -> None:
    """What a resumed run says of another torch, device and commit, and of more epochs than before."""
    cause = (
        "what a resumed run says is otherwise than before (describe_differences, experiments/checkpoint.py)"
    )
    before, now, warmup = 4, 10, 3.0  # epochs
    steps = math.ceil(history.data.train_images / history.settings["batch_size"])
    # Rates that are never lowered, those of both runs, and those of the longer run alone.
    for pace_steps, slower in ((0, None), (3 * steps, (3 / now) / (3 / before)), (5 * steps, 5 / now)):
        first, second = (
            dataclasses.replace(
                history,
                settings=history.settings
                | {"epochs": epochs, "rate_warmup": warmup, "pace_steps": pace_steps},
                versions=history.versions | {"torch": f"{epochs}.0"},
                device=f"number {epochs}",
                origin=dataclasses.replace(history.origin, commit=f"c{epochs}"),
            )
            for epochs in (before, now)
        )
        *others, longer = describe_differences(first, second)
        said = [line.partition(":")[0] for line in others]
        due = [f"{n} before, {m} now" for n, m in (("torch 4.0", "10.0"), ("device number 4", "number 10"),
                                                   ("commit c4", "c10"))]  # fmt: skip
        expect(said == due, f"{some(said)} is said where {some(due)} is so", cause)
        rates = [reference.learning_rate(len(history.epochs), epochs, warmup) for epochs in (now, before)]
        numbers = [before, now, *rates, *([slower, math.sqrt(slower)] if slower else []), now]
        shown = re.findall(r"\d+(?:\.\d+)?", longer)
        expect(
            len(shown) == len(numbers) and all(map(shows, shown, numbers)),
            f"{longer!r} is said where the numbers are {', '.join(f'{x:.4g}' for x in numbers)}",
            cause,
        )


def _refuses_other_settings(saved: dict[str, Any], settings: Settings) -> None:
    """A run does not go on with other settings than it began with, but for those that change no number."""
    taken = []
    for name in saved.keys() - FREE:
        for other in ("another", _nearest(saved[name])):
            with contextlib.suppress(ValueError):
                check_settings(saved | {name: other}, settings)
                taken.append(name)
    expect(
        not taken,
        f"--resume goes on with another {some(sorted(map(flag, taken)))}",
        "a setting that the numbers depend on may change (MAY_CHANGE of experiments/checkpoint.py)",
    )


def _nearest(value: Any) -> Any:
    """The value of the same type that is nearest to a setting, as JSON has it, and another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1 if isinstance(value, int) else math.nextafter(value, math.inf)
    return 1 if value is None else value + type(value)("+")


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for files that the run itself does not need: without room for them, nothing is checked."""
    try:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
    except (OSError, OutputError) as error:
        raise NotApplicableError(f"{error} (TMPDIR names a folder for temporary files)") from None


def _expect_same(a: TrainingStep, b: TrainingStep, when: str, cause: str) -> None:
    theirs = b.model.state_dict()
    off = [n for n, v in a.model.state_dict().items() if not torch.equal(v, theirs[n])]
    expect(not off, f"{when}, {len(off)} tensors differ: {some(off)}", cause)
    moments = [
        [v for state in step.optimizer.state_dict()["state"].values() for v in state.values()]
        for step in (a, b)
    ]
    expect(
        len(moments[0]) == len(moments[1]) and all(torch.equal(x, y) for x, y in zip(*moments, strict=True)),
        f"{when}, the optimizer's moments or step counts differ",
        cause,
    )


def ranks_agree(subject: Subject) -> str:
    """A step of all ranks leaves the same numbers in each, those of one rank with the whole batch."""
    processes = subject.step.processes
    if processes.count == 1:
        raise NotApplicableError("one rank")
    subject.must_run_in_float64()
    step, alone = subject.copied_step(), subject.copied_step()
    images, labels = subject.first_batch
    size = subject.pipeline.train_batches.sizes[0]
    coefficient = subject.pipeline.settings.sparsity_weight
    gradients: list[Tensor] = []
    for copy in (step, alone):
        copy.model.double().train()
        moments_in_float64(copy.optimizer)
        copy.coefficient, copy.precision = copy.coefficient.double(), "float32"
        copy.optimizer.register_step_pre_hook(lambda optimizer, *_: gradients.append(_gradients(optimizer)))
    states = random_states()
    together = step(images.double(), labels, coefficient, size)
    numbers = torch.cat([p.detach().flatten() for p in step.model.parameters()])
    total = processes.sum(numbers.clone()) / processes.count
    cause = "gradients are not summed over the ranks, or ranks began with other weights"
    expect_close(numbers, total, "this rank's parameters, against the mean of all ranks',", cause, 1e-12)
    if drawn_since(states):
        raise NotApplicableError("the ranks stay equal, but each draws its own numbers, as for dropout")
    held = int(processes.sum(labels.new_tensor([len(labels)])))
    cause = "shards that leave images out, or overlap (experiments/distributed.py)"
    expect(held == size, f"the shards of a batch of {size} images hold {held}", cause)
    whole_images, whole_labels = _gathered(subject, images.double(), labels, size)
    _compare_renewals(subject, images, whole_images)
    use_local_batch_norms(alone.model)
    alone.processes = ALONE
    single = alone(whole_images, whole_labels, coefficient, size)
    cause = "shards, loss or batch norms are not those of the whole batch"
    expect_close(
        together.double(), single.double(), "the loss of all ranks, against one rank's,", cause, 1e-5
    )
    cause = "gradients are scaled by the number of ranks, or batch norms see only their shard"
    expect_close(gradients[0], gradients[1], "the gradients of all ranks, against one's,", cause, 1e-4)
    return f"{processes.count} ranks"


class Batches(list[Any]):
    """Batches that are the same in each epoch."""

    def epoch(self, epoch: int) -> Any:
        return iter(self)


def _compare_renewals(subject: Subject, images: Tensor, whole_images: Tensor) -> None:
    """The plain mean of batch norms' statistics over two batches, of all ranks' shards and of the whole."""
    renewed: list[Tensor] = []
    for local, given in ((False, images.double()), (True, whole_images)):
        model = subject.copied_step().model.double().train()
        if local:
            use_local_batch_norms(model)
        batches: Any = Batches([(given, None), (given / 2, None)])
        renew_batch_norms(model, batches, 0, len(batches))
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        statistics = [b for norm in norms for b in norm.buffers() if b.is_floating_point()]
        renewed.append(torch.cat(statistics or [given[:0].flatten()]))
    expect_close(
        renewed[0],
        renewed[1],
        "statistics that all ranks renew together, against those of the whole batches,",
        "batch norms are renewed by the usual momentum, or from their shard (experiments/distributed.py)",
        1e-6,
    )


def _gradients(optimizer: torch.optim.Optimizer) -> Tensor:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    )


def _gathered(subject: Subject, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The whole batch in every rank, each rank's shard in its place."""
    processes = subject.step.processes
    shard = processes.shard(0, size)
    whole = images.new_zeros(size, *images.shape[1:])
    numbers = labels.new_zeros(size)
    whole[shard], numbers[shard] = images, labels
    return processes.sum(whole), processes.sum(numbers)
