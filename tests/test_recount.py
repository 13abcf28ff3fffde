"""The packed file counted from its bytes: equal to the counts of the network, and to a network read back."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from planted import Deaths, planted_deaths, random_network

from experiments.recount import body_sizes, recount
from metrics import count_network
from resnet import ResNet
from src.packing import pack_network, unpack_network
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, quantizers

FEW = settings(max_examples=4, deadline=None, derandomize=True)


def quantized(deaths: Deaths, exclude: list[str], bits: float = 0.7) -> ResNet:
    """A network with planted deaths; `bits` sets the logits, each layer's a little otherwise."""
    model = random_network(deaths).float()
    attach_weight_quantizers(model, exclude, DeadZoneLDZCompander, {"max_bits": 12})
    with torch.no_grad():
        for i, quantizer in enumerate(quantizers(model).values()):
            quantizer.logit_bit.fill_(bits * (0.2 + 0.1 * i))
            quantizer.logit_dz.fill_(1.5)
    return model


@FEW
@given(planted_deaths)
def test_every_count_of_the_file_is_that_of_the_network(deaths):
    for exclude in ([], ["^conv1$", "^linear$"], ["."]):
        model = quantized(deaths, exclude)
        layers = recount(pack_network(model, {}))
        count = count_network(model)
        assert list(layers) == [layer.name for layer in count.layers]
        for ours in count.layers:
            theirs = layers[ours.name]
            for field in ("bits", "weights", "zero_weights", "filters", "zero_filters",
                          "structured_macs", "unstructured_macs"):  # fmt: skip
                assert getattr(theirs, field) == getattr(ours, field), (ours.name, field)
            assert theirs.coded == ours.quantized


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_levels_are_the_different_weights_of_the_network_read_back(blocks):
    torch.manual_seed(0)
    model = ResNet(blocks, num_classes=7)
    attach_weight_quantizers(model, ["^conv1$"], DeadZoneLDZCompander, {"init_bit_logit": 0.5})
    content = pack_network(model, {})
    layers = recount(content)
    state = unpack_network(content).state_dict()
    for name, layer in layers.items():
        weight = state[f"{name}.weight"].numpy()
        # What is not coded has a filter's: each filter may have its scale.
        rows = [weight] if layer.coded else weight
        assert layer.levels == max(len(np.unique(row)) for row in rows)
        assert layer.zero_weights == int((weight == 0).sum())
        assert not layer.coded or layer.levels <= 2**layer.bits - 1


def test_a_body_is_as_small_as_its_compressions_make_it(monkeypatch):
    model = quantized(Deaths(seed=1), ["^conv1$"])
    content = pack_network(model, {})
    taken, least = body_sizes(content)
    assert taken == least
    header_bytes = int.from_bytes(content[12:16], "little")
    assert len(content) == 52 + header_bytes + taken
    monkeypatch.setattr("src.encoding.ALL_TRIED", 0)  # zlib alone
    assert least == body_sizes(pack_network(model, {}))[1] < 0.95 * body_sizes(pack_network(model, {}))[0]


def test_a_dead_channel_costs_nothing_in_the_layers_around_it():
    alive = recount(pack_network(quantized(Deaths(seed=1), ["."]), {}))
    model = quantized(Deaths(seed=1), ["."])
    with torch.no_grad():
        model.layer1[0].conv2.weight[:, 5] = 0
    dead = recount(pack_network(model, {}))
    macs = 16 * 9 * 32 * 32  # one of 16 channels, over 32 x 32 positions
    assert alive["layer1.0.conv2"].structured_macs - dead["layer1.0.conv2"].structured_macs == macs
    assert alive["layer1.0.conv1"].structured_macs - dead["layer1.0.conv1"].structured_macs == macs
    assert dataclasses.replace(dead["layer2.0.conv1"]) == alive["layer2.0.conv1"]


@pytest.mark.parametrize("at", [60, -1])
def test_bytes_that_were_changed_are_refused(at):
    content = bytearray(pack_network(ResNet(1), {}))
    content[at] ^= 1
    with pytest.raises(ValueError, match="SHA-256"):
        recount(bytes(content))


def test_a_file_cut_short_is_refused():
    with pytest.raises(ValueError, match="bytes, the file says"):
        recount(pack_network(ResNet(1), {})[:-1])
