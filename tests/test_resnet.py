"""resnet.py against He et al. 2015: counts by hand and by torch's own counter, the shortcut by hand."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet
from resnet import BasicBlock, PadShortcut, resnet20

DEPTHS = (20, 32, 44, 56, 110)
TABLE = {  # depth: (parameters, multiply-accumulates of one 32x32 image)
    20: (269_722, 40_551_040),
    32: (464_154, 68_862_592),
    44: (658_586, 97_174_144),
    56: (853_018, 125_485_696),
    110: (1_727_962, 252_887_680),
}


def resnet_of_depth(depth: int) -> resnet.ResNet:
    return getattr(resnet, f"resnet{depth}")()


def convolutions_by_hand(depth: int) -> list[tuple[int, int, int]]:
    """(inputs, filters, positions) of each 3x3 convolution: 6n + 1 of them, the classifier makes 6n + 2."""
    n, left_over = divmod(depth - 2, 6)
    assert left_over == 0
    layers = [(3, 16, 32 * 32)]
    for before, width, side in ((16, 16, 32), (16, 32, 16), (32, 64, 8)):
        layers += [(before, width, side * side)] + [(width, width, side * side)] * (2 * n - 1)
    assert len(layers) == 6 * n + 1
    return layers


@pytest.mark.parametrize("depth", DEPTHS)
def test_parameters_are_those_of_the_hand_formula_and_of_the_table(depth):
    by_hand = sum(9 * inputs * filters + 2 * filters for inputs, filters, _ in convolutions_by_hand(depth))
    by_hand += 64 * 10 + 10
    counted = sum(p.numel() for p in resnet_of_depth(depth).parameters())
    assert counted == by_hand == TABLE[depth][0]


@pytest.mark.parametrize("depth", DEPTHS)
def test_macs_are_those_of_the_hand_formula_of_torchs_counter_and_of_the_table(depth):
    by_hand = sum(9 * inputs * filters * places for inputs, filters, places in convolutions_by_hand(depth))
    by_hand += 64 * 10
    counter = FlopCounterMode(display=False)
    with torch.device("meta"):
        model, image = resnet_of_depth(depth), torch.empty(1, 3, 32, 32)
    with counter:
        model.eval()(image)
    assert counter.get_total_flops() == 2 * by_hand
    assert by_hand == TABLE[depth][1]


def test_the_table_in_the_files_docstring_is_the_one_counted_here():
    rows = re.findall(r"\| resnet(\d+) +\| +(\d+) \| +([\d,]+) \| +([\d,]+) \|", resnet.__doc__)
    printed = {int(d): (int(p.replace(",", "")), int(m.replace(",", ""))) for d, _, p, m in rows}
    assert printed == TABLE
    assert all(name == layers for name, layers, _, _ in rows)


def test_bit_operations_of_resnet20_at_32_by_32_bits_follow_from_its_macs():
    assert TABLE[20][1] * 32 * 32 == 41_524_264_960


@pytest.mark.parametrize("depth", DEPTHS)
def test_modules_have_the_names_that_the_plan_calls(depth):
    blocks = (depth - 2) // 6
    parts = ("conv1", "bn1", "conv2", "bn2", "shortcut")
    expected = {"", "conv1", "bn1", "linear"}
    for stage in ("layer1", "layer2", "layer3"):
        expected.add(stage)
        for i in range(blocks):
            expected |= {f"{stage}.{i}"} | {f"{stage}.{i}.{part}" for part in parts}
    with torch.device("meta"):
        model = resnet_of_depth(depth)
    assert {name for name, _ in model.named_modules()} == expected
    assert [name for name, _ in model.named_children()] == [
        "conv1",
        "bn1",
        "layer1",
        "layer2",
        "layer3",
        "linear",
    ]
    assert [name for name, _ in model.layer2[0].named_children()] == list(parts)


def test_convolutions_have_no_bias_and_only_the_two_stage_entries_stride():
    model = resnet20()
    strides = {n: m.stride for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {n for n, s in strides.items() if s != (1, 1)} == {"layer2.0.conv1", "layer3.0.conv1"}
    assert strides["layer2.0.conv1"] == strides["layer3.0.conv1"] == (2, 2)
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


def test_shortcuts_have_no_parameters_and_pad_only_where_a_stage_begins():
    model = resnet20()
    shortcuts = {n: m for n, m in model.named_modules() if n.endswith("shortcut")}
    assert len(shortcuts) == 9
    assert not any(list(m.parameters()) + list(m.buffers()) for m in shortcuts.values())
    padded = {n for n, m in shortcuts.items() if not isinstance(m, nn.Identity)}
    assert padded == {"layer2.0.shortcut", "layer3.0.shortcut"}


@pytest.mark.parametrize(("before", "width"), [(16, 32), (32, 64)])
def test_channel_i_of_a_padded_shortcut_becomes_channel_i_plus_a_quarter_at_every_second_pixel(before, width):
    x = torch.arange(2.0 * before * 6 * 4).reshape(2, before, 6, 4) + 1  # no zero among them
    expected = np.zeros((2, width, 3, 2))
    for image in range(2):
        for i in range(before):
            for row in range(3):
                for column in range(2):
                    expected[image, i + width // 4, row, column] = x[image, i, 2 * row, 2 * column]
    out = PadShortcut(before, width)(x)
    np.testing.assert_array_equal(out.numpy(), expected)
    assert (out[:, : width // 4] == 0).all() and (out[:, -width // 4 :] == 0).all()


def test_a_block_whose_branch_is_silent_is_its_shortcut_and_a_relu():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)
    for block, shortcut in (
        (BasicBlock(16, 16, 1), lambda x: x),
        (BasicBlock(16, 32, 2), PadShortcut(16, 32)),
    ):
        nn.init.zeros_(block.bn2.weight)  # its bias is 0 already
        torch.testing.assert_close(block(x), shortcut(x).relu(), rtol=0, atol=0)


def test_a_block_computes_relu_of_branch_plus_shortcut():
    torch.manual_seed(0)
    block = BasicBlock(16, 32, 2).eval()
    x = torch.randn(2, 16, 8, 8)
    inner = block.bn1(nn.functional.conv2d(x, block.conv1.weight, stride=2, padding=1)).clamp(min=0)
    branch = block.bn2(nn.functional.conv2d(inner, block.conv2.weight, padding=1))
    padded = torch.cat([torch.zeros(2, 8, 4, 4), x[:, :, ::2, ::2], torch.zeros(2, 8, 4, 4)], 1)
    torch.testing.assert_close(block(x), (branch + padded).clamp(min=0))


@torch.no_grad()
def test_the_network_is_stem_nine_blocks_mean_and_classifier():
    torch.manual_seed(0)
    model = resnet20().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):  # as after some training: a bias and a mean that a ReLU can cut at
            for t in (m.bias, m.running_mean):
                nn.init.normal_(t)
            nn.init.uniform_(m.running_var, 0.5, 2)
    image = torch.randn(2, 3, 32, 32)
    kept = image.clone()
    logits = model(image)

    def norm(x, bn):
        columns = [t[:, None, None] for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)]
        mean, variance, scale, bias = columns
        return (x - mean) / (variance + bn.eps).sqrt() * scale + bias

    x = norm(nn.functional.conv2d(image, model.conv1.weight, padding=1), model.bn1).clamp(min=0)
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            stride, pad = (
                (2, len(block.conv1.weight) // 4) if x.shape[1] != len(block.conv1.weight) else (1, 0)
            )
            inner = nn.functional.conv2d(x, block.conv1.weight, stride=stride, padding=1)
            inner = norm(inner, block.bn1).clamp(min=0)
            branch = norm(nn.functional.conv2d(inner, block.conv2.weight, padding=1), block.bn2)
            branch[:, pad : pad + x.shape[1]] += x[:, :, ::stride, ::stride]
            x = branch.clamp(min=0)
    expected = x.mean((2, 3)) @ model.linear.weight.T + model.linear.bias
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(image, kept)


@pytest.mark.parametrize(("before", "width", "stride"), [(16, 16, 1), (16, 32, 2)])
def test_a_block_leaves_its_input_as_it_was(before, width, stride):
    torch.manual_seed(0)
    x = torch.randn(2, before, 8, 8)
    kept = x.clone()
    BasicBlock(before, width, stride)(x)
    assert torch.equal(x, kept)


def test_weights_are_drawn_from_kaimings_normal_distribution():
    torch.manual_seed(0)
    layers = {n: m for n, m in resnet_of_depth(32).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    everything = []
    for name, layer in layers.items():
        w = layer.weight.detach()
        z = w.flatten() * math.sqrt(w[0].numel() / 2)  # gain sqrt(2) over sqrt(fan-in)
        assert abs(z.std().item() - 1) < 5 / math.sqrt(2 * z.numel()), name  # 5 standard errors
        assert abs(z.mean().item()) < 5 / math.sqrt(z.numel()), name
        everything.append(z)
    z = torch.cat(everything)
    # A normal distribution and no other of that scale: its kurtosis is 3 (a uniform one's is 1.8), its tails
    # are not cut off, and 68.27 % lie within one standard deviation.
    assert abs((z**4).mean().item() - 3) < 0.1
    assert z.abs().max() > 4
    assert abs((z.abs() < 1).float().mean().item() - 0.6827) < 0.005


def test_batch_norms_begin_as_the_identity():
    for m in resnet20().modules():
        if isinstance(m, nn.BatchNorm2d):
            assert (m.weight == 1).all() and (m.bias == 0).all()
            assert (m.running_mean == 0).all() and (m.running_var == 1).all()


@pytest.mark.parametrize("depth", DEPTHS)
@torch.no_grad()
def test_ten_logits_come_out_for_each_image(depth):
    with torch.device("meta"):
        assert resnet_of_depth(depth)(torch.empty(3, 3, 32, 32)).shape == (3, 10)


@torch.no_grad()
def test_stages_give_16_32_and_64_channels_at_32_16_and_8_pixels():
    model, shapes = resnet20(), {}
    for name in ("layer1", "layer2", "layer3"):
        getattr(model, name).register_forward_hook(
            lambda _m, _x, out, name=name: shapes.update({name: tuple(out.shape)})
        )
    model(torch.randn(2, 3, 32, 32))
    assert shapes == {"layer1": (2, 16, 32, 32), "layer2": (2, 32, 16, 16), "layer3": (2, 64, 8, 8)}


@torch.no_grad()
def test_the_classifier_sees_the_mean_of_each_channel():
    model = resnet20().eval()
    seen = {}
    model.layer3.register_forward_hook(lambda _m, _x, out: seen.update(maps=out))
    logits = model(torch.randn(2, 3, 32, 32))
    pooled = torch.stack([torch.stack([c.sum() / 64 for c in image]) for image in seen["maps"]])
    expected = pooled @ model.linear.weight.T + model.linear.bias
    torch.testing.assert_close(logits, expected)


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    model = resnet20()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_same_seed_gives_the_same_network():
    torch.manual_seed(3)
    first = resnet20().state_dict()
    torch.manual_seed(3)
    second = resnet20().state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
