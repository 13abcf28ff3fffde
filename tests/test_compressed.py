"""The proofs: what the run says of the smaller network and of the packed file, held against both."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.data import TestBatches as Batches
from experiments.data import synthetic_dataset
from experiments.proofs import PACKED, SLIM, Proof, counted_macs, proof_lines, prove
from metrics import count_network
from resnet import ResNet, resnet20
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers


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
    whole = synthetic_dataset("for a test")
    few = replace(whole, test_images=whole.test_images[:150], test_labels=whole.test_labels[:150])
    return Batches(few, "cpu", batch_size=140)


@pytest.fixture(scope="module")
def proven(batches, tmp_path_factory) -> tuple[Proof, Path, ResNet]:
    folder, model = tmp_path_factory.mktemp("proof"), network_with_dead_channels()
    return prove(model, count_network(model), batches, folder, {"preset": "debug"}), folder, model


def test_both_networks_give_the_quantized_networks_logits(proven):
    proof, _, _ = proven
    assert proof.images == 150
    assert 0 < proof.largest_difference <= 1e-4 * proof.largest_logit
    assert proof.agreement == 1 and proof.packed_differs == 0
    assert proof.quantized_accuracy == proof.slim_accuracy == proof.packed_accuracy


def test_the_macs_are_those_of_the_metrics_and_fewer_than_the_dense_ones(proven):
    proof, _, model = proven
    assert proof.slim_macs == proof.structured_macs == count_network(model).total("structured_macs")
    assert proof.slim_macs < proof.dense_macs == 40_551_040
    assert proof.slim_parameters < proof.dense_parameters == 269_722


def test_the_bytes_are_those_of_the_files(proven):
    proof, folder, _ = proven
    assert proof.packed_bytes == len((folder / PACKED).read_bytes())
    assert proof.slim_bytes == len((folder / SLIM).read_bytes())
    assert 4 * 269_722 < proof.float32_bytes < 4 * 269_722 + 100_000
    assert sorted(p.name for p in folder.iterdir()) == [PACKED, SLIM]


def test_the_exported_network_takes_any_batch_and_gives_the_same_logits(proven, batches):
    _, folder, model = proven
    program = torch.export.load(folder / SLIM).module()
    images, _ = next(iter(batches))
    with torch.no_grad():
        expected = model.eval()(images)
        torch.testing.assert_close(program(images), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
        torch.testing.assert_close(program(images[:1]), expected[:1], rtol=0, atol=1e-3)


def test_every_latency_is_measured_at_both_batches(proven):
    proof, _, _ = proven
    names = [f"{n}, batch {b}" for b in (1, 128) for n in ("dense", "fake-quantized", "smaller")]
    assert list(proof.latency_seconds) == names
    assert all(0 < t["least"] <= t["median"] <= t["most"] for t in proof.latency_seconds.values())


def test_the_report_holds_the_numbers_and_the_plain_statement(proven):
    proof, _, _ = proven
    text = proof_lines(proof)
    for number in (proof.slim_macs, proof.slim_parameters, proof.packed_bytes, proof.float32_bytes):
        assert f"{number:,}" in text
    assert "no speed-up in this runtime" in text
    json.dumps(proof.to_json(), allow_nan=False)


def test_torchs_counter_is_read_as_multiply_accumulates():
    assert counted_macs(resnet20()) == 40_551_040


def test_a_network_with_nothing_left_is_proven_too(batches, tmp_path):
    model = network_with_dead_channels()
    with torch.no_grad():
        model.linear.weight.zero_()
    proof = prove(model, count_network(model), batches, tmp_path, {})
    assert proof.slim_macs == 0 and proof.packed_differs == 0
    assert "0 of 40,551,040 MACs (infx)" not in proof_lines(proof)
