"""The history of a run that goes as expected, made by hand, and the same with some numbers changed."""

import copy
import json
from dataclasses import replace
from typing import Any

from experiments.history import (
    CompressedRecord,
    DataRecord,
    EpochRecord,
    FileLayer,
    FinalCounts,
    History,
    LayerRecord,
    LayerStart,
    Origin,
    Retest,
)
from experiments.settings import Settings
from metrics import TOTALS, LayerCount, NetworkCount, ratio
from src.channels import ChannelState

EPOCHS = 20
LAYERS = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")
LOGITS = {"bit": "logit_bit", "deadzone": "logit_dz"}  # by the kind that the verdict speaks of
WEIGHTS = 2304  # of each layer


def layer_record(epoch: int) -> LayerRecord:
    """Return a quantized layer whose two logits learn and whose channels die one by one from epoch 12 on."""
    dead = max(epoch - 11, 0)
    return LayerRecord(
        parameters={"logit_bit": 3.0 - 0.1 * epoch, "logit_dz": 3.0 - 0.12 * epoch},
        gradients={"logit_bit": 1e-4, "logit_dz": -1e-5},
        learned_bits=8.0 - 0.2 * epoch,
        bits=round(8.0 - 0.2 * epoch),
        weights=WEIGHTS,
        zero_weights=50 * epoch,
        filters=16,
        zero_filters=dead,
        alive_channels=16 - dead,
        constant_channels=dead,
        null_channels=0,
        signal=0.9,
    )


def epoch_record(epoch: int) -> EpochRecord:
    """Return an epoch (from 1) with delay 5 and ramp 5: the penalty acts from epoch 7 on."""
    coefficient = 0.01 * min(max(epoch - 6, 0) / 5, 1)
    penalty = 500.0 - (20 * (epoch - 6) if epoch > 6 else -epoch)
    return EpochRecord(
        epoch=epoch,
        loss=1 + 1 / epoch + coefficient * penalty,
        cross_entropy=1 + 1 / epoch,
        penalty=penalty,
        coefficient=coefficient,
        accuracy=0.30 + 0.02 * epoch,
        unstructured_sparsity=0.03 * epoch,
        structured_sparsity=max(epoch - 11, 0) * 0.01,
        learned_bits=8.0 - 0.2 * epoch,
        bits=float(round(8.0 - 0.2 * epoch)),
        layers={name: layer_record(epoch) for name in LAYERS},
        seconds=30.0 + epoch,
    )


def good_run(epochs: int = EPOCHS, **settings: Any) -> History:
    """Return a run that passes the verdict's lines about its epochs; `settings` are those it was given."""
    return History(
        settings=Settings(**({"epochs": epochs} | settings)).to_json(),
        versions={"python": "3.11.7", "torch": "2.9.0"},
        device="cpu (2 threads)",
        precision="float32",
        threads=2,
        processes=1,
        data=DataRecord("CIFAR-10", "data/cifar-10-batches-py", False, 10, 50_000, 10_000),
        quantized=list(LAYERS),
        full_precision=["conv1", "linear"],
        start={name: LayerStart({"logit_bit": 3.0, "logit_dz": 3.0}, 8.0) for name in LAYERS},
        parameter_groups={"logit_bit": "bit", "logit_dz": "deadzone"},
        without_codes=[],
        origin=Origin("2026-01-02T03:04:05+00:00", ["--seed", "0"], "0123456789abcdef"),
        epochs=[epoch_record(epoch) for epoch in range(1, epochs + 1)],
    )


def changed(history: History, values: dict[int, dict[str, Any]]) -> History:
    """Return the history with other numbers in some epochs (from 1)."""
    return replace(history, epochs=[replace(r, **values.get(r.epoch, {})) for r in history.epochs])


def in_every_epoch(history: History, **numbers: Any) -> History:
    return changed(history, {r.epoch: numbers for r in history.epochs})


def in_layer(
    history: History,
    name: str,
    epochs: list[int],
    parameters: dict[str, float] | None = None,
    gradients: dict[str, float | None] | None = None,
    **numbers: Any,
) -> History:
    """Return the history with other numbers of one layer in some epochs (from 1)."""
    history = copy.deepcopy(history)
    for r in history.epochs:
        if r.epoch in epochs:
            layer = r.layers[name]
            r.layers[name] = replace(
                layer,
                parameters=layer.parameters | (parameters or {}),
                gradients=layer.gradients | (gradients or {}),
                **numbers,
            )
    return history


def without_quantized_layers(history: History) -> History:
    """Return the run of a network that has no quantizer."""
    nothing = {"layers": {}, "learned_bits": 32.0, "bits": 32.0, "penalty": 0.0}
    nothing |= {"unstructured_sparsity": 0.0, "structured_sparsity": 0.0}
    left = [*history.full_precision, *history.quantized]
    return replace(in_every_epoch(history, **nothing), quantized=[], full_precision=left, start={})


def layer_count(
    name: str, states: list[ChannelState], bits: int = 4, quantized: bool = True, **counts: int
) -> LayerCount:
    """Return the counts of a layer of 9 weights a filter whose output channels have these states."""
    weights = 9 * len(states)
    values = {"zero_weights": 0, "zero_filters": 0, "dense_macs": weights, "structured_macs": weights}
    return LayerCount(
        name=name, quantized=quantized, bits=bits, learned_bits=float(bits), weights=weights,
        is_convolution=name != "linear", filters=len(states), states=tuple(int(s) for s in states),
        **({"unstructured_macs": weights} | values | counts))  # fmt: skip


ALIVE, CONSTANT, NULL = ChannelState.ALIVE, ChannelState.CONSTANT, ChannelState.NULL
COUNT = NetworkCount(
    (
        layer_count("conv1", [ALIVE, ALIVE], bits=32, quantized=False),
        layer_count("layer1.0.conv1", [ALIVE, NULL, CONSTANT, NULL], bits=5),
        layer_count("layer1.0.conv2", [NULL, NULL, NULL], bits=2),
        layer_count("linear", [ALIVE] * 10, bits=32, quantized=False),
    )
)


def final(count: NetworkCount = COUNT, **changes: Any) -> FinalCounts:
    """Return the counts of a finished run."""
    ratios = {
        f"{kind}_{name}_ratio": ratio(count.total(f"dense_{unit}"), count.total(f"{kind}_{unit}"))
        for kind in ("structured", "unstructured")
        for name, unit in (("bops", "bops"), ("mac", "macs"))
    }
    values: dict[str, Any] = ratios | {
        "structured_ceiling": 91.625,
        "unstructured_ceiling": 91.5,
        "unstructured_sparsity": 0.6,
        "structured_sparsity": 0.09,
        "learned_bits": 4.0,
        "bits": 4.0,
        "totals": {key: count.total(key) for key in TOTALS},
        "layers": list(count.layers),
    }
    return FinalCounts(**(values | changes))


def claims(accuracy: float = 0.8125, count: NetworkCount = COUNT) -> dict[str, Any]:
    """Return what a packed file says of itself."""
    said = {"data": "CIFAR-10", "test_images": 10_000, "accuracy": accuracy, "structured_macs": 20_275_520}
    return said | {"zero_weights": count.total("zero_weights")}


def compressed(**changes: Any) -> CompressedRecord:
    """Return what is measured of a smaller network and a packed file that are as they should be."""
    values: dict[str, Any] = {
        "images": 10_000,
        "dense_parameters": 269_722,
        "slim_parameters": 101_234,
        "dense_macs": 40_551_040,
        "slim_macs": 20_275_520,
        "structured_macs": 20_275_520,
        "largest_logit": 12.5,
        "largest_difference": 1e-5,
        "agreement": 1.0,
        "quantized_accuracy": 0.8125,
        "slim_accuracy": 0.8125,
        "packed_accuracy": 0.8125,
        "packed_differs": 0,
        "packed_bytes": 54_321,
        "float32_bytes": 1_086_420,
        "slim_bytes": 500_000,
        "read_back_parameters": 101_234,
        "read_back_difference": 0.0,
        "latency_seconds": {
            f"{network}, batch {batch}": {"median": 0.004 * batch, "least": 0.003 * batch, "most": 0.5}
            for batch in (1, 128)
            for network in ("dense", "fake-quantized", "smaller")
        },
        "packed_settings": {},
        "packed_metrics": claims(),
        "file": recounted(COUNT),
    }
    return CompressedRecord(**(values | changes))


def recounted(count: NetworkCount) -> dict[str, FileLayer]:
    """Return what a packed file holds if these counts are right."""
    return {
        layer.name: FileLayer(
            coded=layer.quantized,
            bits=layer.bits,
            levels=3,
            weights=layer.weights,
            zero_weights=layer.zero_weights,
            filters=layer.filters,
            zero_filters=layer.zero_filters,
            structured_macs=layer.structured_macs,
            unstructured_macs=layer.unstructured_macs,
        )
        for layer in count.layers
    }


def retest(accuracy: float = 0.7, **changes: Any) -> Retest:
    """Return a second test of the final network with the same accuracy in every class of the test set."""
    right = round(1000 * accuracy)
    values: dict[str, Any] = {
        "images": 10_000,
        "right": 10 * right,
        "ties": 0,
        "class_images": [1000] * 10,
        "class_predictions": [1000] * 10,
        "class_right": [right] * 10,
        "train_images": 10_000,
        "train_right": 10 * right + 300,
    }
    return Retest(**(values | changes))


def finished(history: History, count: NetworkCount = COUNT) -> History:
    """Return the run after its end, when its network of these counts was tested again and packed."""
    last = history.epochs[-1]
    accuracy, sparsities = (
        last.accuracy,
        ("unstructured_sparsity", "structured_sparsity", "learned_bits", "bits"),
    )
    accuracies = dict.fromkeys(("quantized_accuracy", "slim_accuracy", "packed_accuracy"), accuracy)
    return replace(
        history,
        final=final(count, **{key: getattr(last, key) for key in sparsities}),
        retest=retest(accuracy),
        compressed=compressed(
            file=recounted(count),
            packed_settings=json.loads(json.dumps(history.settings)),
            packed_metrics=claims(accuracy, count),
            **accuracies,
        ),
    )
