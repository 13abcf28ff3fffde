"""The smaller network and the packed file: what is recorded of them, held against both."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from planted import snapshot

from experiments import compressed, training
from experiments.compressed import PACKED, SLIM, exported, make_compressed, read_back
from experiments.data import TestBatches as Batches
from experiments.data import synthetic_dataset
from experiments.files import OutputError
from experiments.history import CompressedRecord
from metrics import count_network
from resnet import ResNet, resnet20
from src.quantizer import DeadZoneLDZCompander
from src.slim import slim_network
from utils_quantization import attach_weight_quantizers, quantized_layers

pytestmark = pytest.mark.slow


def network_with_dead_channels() -> ResNet:
    torch.manual_seed(0)
    model = resnet20()
    attach_weight_quantizers(
        model, ["^conv1$", "^linear$"], DeadZoneLDZCompander, {"init_deadzone_logit": 0.3}
    )
    with torch.no_grad():
        model.layer2[1].conv1.parametrizations.weight.original[:20] = 0
        model.layer3[2].conv2.parametrizations.weight.original.zero_()
        for name, buffer in model.named_buffers():
            if "running_mean" in name:
                buffer.normal_()
    return model.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def batches() -> Batches:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.data.SYNTHETIC_TRAIN", 10)
        patch.setattr("experiments.data.SYNTHETIC_TEST", 150)
        return Batches(synthetic_dataset("for a test"), "cpu", batch_size=140)


@pytest.fixture(autouse=True)
def timed_once(monkeypatch) -> None:
    """What `made` holds was timed as often as a run's networks are: it is made before this."""
    monkeypatch.setattr(compressed, "LATENCY_RUNS", 1)


def made_of(
    model: ResNet, batches: Batches, folder: Path, settings: dict[str, str] | None = None
) -> CompressedRecord:
    errors: list[OutputError] = []
    record = make_compressed(
        model, count_network(model), batches, folder, settings or {}, "synthetic", errors
    )
    assert errors == []
    return record


@pytest.fixture(scope="module")
def made(batches, tmp_path_factory) -> tuple[CompressedRecord, Path, ResNet]:
    folder, model = tmp_path_factory.mktemp("compressed"), network_with_dead_channels()
    settings = {"preset": "debug"}
    return made_of(model, batches, folder, settings), folder, model


def test_both_networks_give_the_quantized_networks_logits(made):
    record, _, _ = made
    assert record.images == 150
    assert 0 < record.largest_difference <= 1e-4 * record.largest_logit
    assert record.agreement == 1 and record.packed_differs == 0
    assert record.quantized_accuracy == record.slim_accuracy == record.packed_accuracy


def test_a_network_that_cannot_be_exported_is_left_to_the_verdict(batches, tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "exported", lambda *_: 1 // 0)
    record = made_of(network_with_dead_channels(), batches, tmp_path, {})
    assert (record.slim_bytes, record.read_back_parameters) == (0, 0) and record.packed_bytes > 0
    assert not (tmp_path / SLIM).exists()


def test_the_accuracy_is_that_of_the_quantized_network_over_all_images(made, batches):
    record, _, model = made
    with torch.no_grad():
        hits = torch.cat([model.eval()(images).argmax(1) == labels for images, labels in batches])
    assert record.quantized_accuracy == hits.double().mean().item()


def test_the_macs_are_those_of_the_metrics_and_fewer_than_the_dense_ones(made):
    record, _, model = made
    assert record.slim_macs == record.structured_macs == count_network(model).total("structured_macs")
    assert record.slim_macs < record.dense_macs == 40_551_040
    assert record.slim_parameters < record.dense_parameters == 269_722


def test_the_bytes_are_those_of_the_files(made):
    record, folder, _ = made
    assert record.packed_bytes == len((folder / PACKED).read_bytes())
    assert record.slim_bytes == len((folder / SLIM).read_bytes())
    assert 4 * 269_722 < record.float32_bytes < 4 * 269_722 + 100_000
    assert sorted(p.name for p in folder.iterdir()) == [PACKED, SLIM]


def test_the_exported_network_takes_any_batch_and_gives_the_same_logits(made, batches):
    _, folder, model = made
    program = torch.export.load(folder / SLIM).module()
    images, _ = next(iter(batches))
    with torch.no_grad():
        expected = model.eval()(images)
        torch.testing.assert_close(program(images), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        torch.testing.assert_close(program(images[:1]), expected[:1], rtol=0, atol=1e-3)


def test_the_exported_file_holds_the_smaller_network(made):
    record, _, _ = made
    assert record.read_back_parameters == record.slim_parameters
    assert record.read_back_difference <= 1e-6 * record.largest_logit


def test_an_exported_file_of_another_network_or_of_none_is_told_apart(batches):
    images, _ = next(iter(batches))
    slim, other = slim_network(network_with_dead_channels()), resnet20().eval()
    parameters, difference = read_back(exported(other), slim, images)
    assert parameters == 269_722 and difference > 0.01
    whole, claims = exported(slim, {"accuracy": 0.5}), {"accuracy": 0.5}
    assert read_back(whole, slim, images, claims)[0] > 0
    unmarked = whole[:-66] + bytes(2)  # without the comment of 64 digits, whose length stands before it
    for content, said in ((whole[:-100], claims), (unmarked, claims), (whole, {"accuracy": 0.6})):
        parameters, difference = read_back(content, slim, images, said)
        assert parameters == 0 and math.isnan(difference)


@pytest.mark.filterwarnings("error")
def test_what_torch_warns_of_how_it_reads_an_exported_file_is_not_shown(batches, monkeypatch):
    load = torch.export.load

    def loud(*arguments, **more):
        warnings.warn("The given buffer is not writable, and PyTorch does not support", stacklevel=1)
        return load(*arguments, **more)

    monkeypatch.setattr(torch.export, "load", loud)
    slim, (images, _) = slim_network(network_with_dead_channels()), next(iter(batches))
    assert read_back(exported(slim), slim, images)[0] > 0


def test_it_is_measured_in_float32_also_where_tf32_is_allowed(batches, tmp_path, monkeypatch, quick_end):
    allowed = []

    def predict(network, batches):
        allowed.append(torch.backends.cudnn.allow_tf32)
        return training.predict(network, batches)

    monkeypatch.setattr("experiments.compressed.predict", predict)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    made_of(network_with_dead_channels(), batches, tmp_path)
    assert allowed == [False] * 3 and torch.backends.cudnn.allow_tf32


def test_every_latency_is_measured_at_both_batches(made):
    record, _, _ = made
    names = [f"{n}, batch {b}" for b in (1, 128) for n in ("dense", "fake-quantized", "smaller")]
    assert list(record.latency_seconds) == names
    assert all(0 < t["least"] <= t["median"] <= t["most"] for t in record.latency_seconds.values())


def test_each_latency_is_of_the_network_that_its_name_says(batches, tmp_path, monkeypatch, quick_end):
    timed = {}
    monkeypatch.setattr("experiments.compressed.measure_latency", lambda of, images: timed.update(of) or {})
    model = network_with_dead_channels()
    record = made_of(model, batches, tmp_path)
    assert timed["fake-quantized"] is model and not quantized_layers(timed["dense"])
    numbers = {n: sum(p.numel() for p in network.parameters()) for n, network in timed.items()}
    assert numbers["dense"] == 269_722 and numbers["smaller"] == record.slim_parameters < 269_722


def test_a_network_with_nothing_left_is_measured_too(batches, tmp_path):
    model = network_with_dead_channels()
    with torch.no_grad():
        model.linear.weight.zero_()
    record = made_of(model, batches, tmp_path)
    assert record.slim_macs == 0 and record.packed_differs == 0
    assert record.slim_bytes and not math.isnan(record.read_back_difference)


def test_nothing_of_the_model_changes_but_its_mode(batches, tmp_path):
    model = network_with_dead_channels()
    before = snapshot(model.eval())
    made_of(model.train(), batches, tmp_path)
    assert snapshot(model) | {"generator": None} == before | {"generator": None}
