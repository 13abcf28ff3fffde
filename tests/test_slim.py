"""The smaller network: the same logits, exactly the multiplications that were counted, a normal module."""

import copy
import io
from dataclasses import replace

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import (
    PLANTED,
    SMALL,
    Deaths,
    convolutions,
    images,
    kill,
    lively_network,
    planted_deaths,
    random_network,
    snapshot,
    with_norms,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from metrics import count_network
from resnet import resnet20
from src.quantizer import DeadZoneLDZCompander
from src.slim import Constant, Shift, SlimLayer, slim_network
from utils_quantization import attach_weight_quantizers, quantizers, toggle_quantization

CIFAR = (3, 32, 32)
DEATHS = Deaths(1, filters=0.2, slices=0.1, weights=0.2, scales=0.1, silent=0.3, streams=0.3)
FLOAT32, FLOAT64 = 1e-4, 1e-9  # of the largest logit


def slim(model: nn.Module) -> nn.Module:
    return slim_network(model, SMALL)


@torch.no_grad()
def difference(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    """The largest difference of the logits, as a share of the largest logit; predictions must agree."""
    expected, got = model(x), small(x)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(expected.argmax(1), got.argmax(1))
    return ((got - expected).abs().max() / expected.abs().max()).item()


def multiplications(module: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    """Half of what torch's own counter counts, by layer, and in total at ""."""
    weight = next(module.parameters())
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *size, dtype=weight.dtype))
    counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    layers = {n: c // 2 for n, c in counts.items() if n == "linear" or n.endswith(("conv1", "conv2"))}
    assert counter.get_total_flops() % 2 == 0
    return layers | {"": counter.get_total_flops() // 2}


def counted(model: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    count = count_network(model, size)
    layers = {layer.name: layer.structured_macs for layer in count.layers if layer.structured_macs}
    return layers | {"": count.total("structured_macs")}


def quantized_at_random(model: nn.Module, seed: int = 0) -> nn.Module:
    """Quantizers on every convolution but the stem, each with dead zone and bits of its own."""
    attach_weight_quantizers(model, ["^conv1$", "linear"], DeadZoneLDZCompander, {})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for q in quantizers(model).values():
            q.logit_bit.copy_(2 * torch.rand(1, generator=generator))
            q.logit_dz.copy_(0.3 + 2 * torch.rand(1, generator=generator))
    return model


# The same logits and the counted multiplications, whatever died


@PLANTED
@given(planted_deaths, st.integers(0, 1000))
def test_the_logits_are_the_same_and_torch_counts_what_the_metrics_count(deaths, seed):
    model, x = random_network(deaths), images(3, SMALL, seed)
    small = slim(model)
    assert difference(model, small, x) <= FLOAT64
    assert multiplications(small, SMALL) == counted(model, SMALL)
    model.float()
    assert difference(model, slim(model), x.float()) <= FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [3, 9], ids=["resnet20", "resnet56"])
@settings(PLANTED, max_examples=6)
@given(deaths=planted_deaths)
def test_it_holds_for_real_depths_quantized_on_real_image_sizes(blocks, deaths):
    model = quantized_at_random(random_network(deaths, blocks).float(), deaths.seed)
    x = images(2, CIFAR, deaths.seed)
    small = slim_network(model)
    assert difference(model, small, x.float()) <= FLOAT32
    assert multiplications(small, CIFAR) == counted(model, CIFAR)
    assert difference(model.double(), slim_network(model), x) <= FLOAT64


def test_a_dense_network_keeps_every_weight_and_one_bias_a_filter():
    model = resnet20().eval()
    small = slim_network(model)
    assert difference(model, small, images(4, CIFAR).float()) <= FLOAT32
    assert multiplications(small, CIFAR)[""] == 40_551_040
    # 688 filters; 269,722 parameters of which the batch norms have 2 a filter.
    assert sum(p.numel() for p in small.parameters()) == 269_722 - 688
    assert len(list(small.named_buffers())) == 2  # the paddings of two shortcuts


# Each case, planted


def shape(small: nn.Module, layer: str) -> tuple[int, int]:
    out_channels, in_channels = small.get_submodule(layer).weight.shape[:2]
    return out_channels, in_channels


def layers(small: nn.Module, within: str = "") -> list[str]:
    return [n for n, m in small.named_modules() if isinstance(m, SlimLayer) and n.startswith(within)]


def shifts(small: nn.Module) -> list[Shift]:
    return [m for m in small.modules() if isinstance(m, Shift)]


def assert_slim_is_the_same(model: nn.Module) -> nn.Module:
    small = slim(model)
    assert difference(model, small, images(4)) <= FLOAT64
    assert multiplications(small, SMALL) == counted(model, SMALL)
    assert not isinstance(small, Constant)
    return small


@pytest.mark.parametrize("scale", [1.5, -1.5])
@pytest.mark.parametrize("bias", [0.5, 0.0, -0.5])
def test_a_dead_inner_filter_goes_and_leaves_a_map_only_where_its_bias_is_above_zero(bias, scale):
    model = lively_network()
    kill(model, "layer2.1.conv1", 3, bias)
    with torch.no_grad():
        model.layer2[1].bn1.weight[3] = scale
    small = assert_slim_is_the_same(model)
    assert shape(small, "layer2.1.conv1") == (31, 32)
    assert shape(small, "layer2.1.conv2") == (32, 31)
    bias_of_conv2 = small.get_submodule("layer2.1.conv2").bias
    if bias > 0:  # the corners, the edges and the middle see 4, 6 and 9 of the constant's copies
        (shift,) = shifts(small)
        assert bias_of_conv2 is None and shift.values.shape[0] == 32
        assert shift.values[0].unique().numel() in range(4, 10)
    else:
        assert bias_of_conv2.shape == (32,)


def test_the_map_is_the_constant_times_the_weights_that_lie_inside():
    model = with_norms(lively_network(), bias=0.0)
    kill(model, "layer1.0.conv1", 0, bias=2.0)
    with torch.no_grad():
        model.layer1[0].conv2.weight[5] = 0
        model.layer1[0].conv2.weight[5, 0] = 1.0
        model.layer1[0].conv2.weight[5, 1, 0, 0] = 1.0  # keeps filter 5 alive
    (shift,) = shifts(assert_slim_is_the_same(model))
    by_place = shift(torch.zeros(1, 16, 12, 12, dtype=torch.float64))[0, 5] * (1 + 1e-5) ** 0.5
    expected = torch.full((12, 12), 18.0, dtype=torch.float64)
    expected[[0, -1]] = expected[:, [0, -1]] = 12
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 8
    torch.testing.assert_close(by_place, expected)


def test_a_batch_norm_of_scale_zero_kills_its_filter():
    model = lively_network()
    with torch.no_grad():
        model.layer1[0].bn1.weight[[2, 7]] = 0
    assert shape(assert_slim_is_the_same(model), "layer1.0.conv1") == (14, 16)


def test_a_residual_channel_without_a_producer_goes_from_every_reader():
    model = lively_network()
    for layer, bias in (("conv1", 0.5), ("layer1.0.conv2", -2.0), ("layer1.1.conv2", 1.0)):
        kill(model, layer, 4, bias)
    small = assert_slim_is_the_same(model)
    for layer in ("conv1", "layer1.0.conv2", "layer1.1.conv2"):
        assert small.get_submodule(layer).weight.shape[0] == 15
    for layer in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"):
        assert small.get_submodule(layer).weight.shape[1] == 15


def test_a_residual_channel_is_constant_in_one_block_and_alive_in_the_next():
    model = lively_network()
    kill(model, "conv1", 4, bias=0.5)
    kill(model, "layer1.0.conv2", 4, bias=0.25)
    small = assert_slim_is_the_same(model)
    assert shape(small, "conv1") == (15, 3)
    assert shape(small, "layer1.0.conv2") == (15, 16)
    assert shape(small, "layer1.1.conv1") == (16, 15)
    assert shape(small, "layer1.1.conv2") == (16, 16)  # live again, on top of relu(0.5 + 0.25)
    assert shape(small, "layer2.0.conv1") == (32, 16)


def test_a_branch_with_a_dead_filter_leaves_the_shortcut_to_carry_the_channel():
    model = lively_network()
    kill(model, "layer1.1.conv2", [4, 9], bias=-0.5)
    small = assert_slim_is_the_same(model)
    assert shape(small, "layer1.1.conv2") == (14, 16)
    assert shape(small, "layer2.0.conv1") == (32, 16)


def test_padded_channels_die_with_their_one_producer():
    model = lively_network()
    kill(model, "layer2.0.conv2", [0, 7, 8, 23, 24, 31], bias=0.25)  # 8 to 23 come by the shortcut
    small = assert_slim_is_the_same(model)
    assert shape(small, "layer2.0.conv2") == (26, 32)
    assert shape(small, "layer2.1.conv1") == (32, 28)


@pytest.mark.parametrize("layer", ["conv1", "conv2"])
@pytest.mark.parametrize("bias", [0.0, 0.7, -0.7])
def test_a_block_with_a_dead_branch_is_the_shortcut_and_a_shift_or_nothing_at_all(layer, bias):
    model = with_norms(lively_network(), bias=0.1)
    filters = list(range(16))
    if layer == "conv1":
        kill(model, "layer1.1.conv1", filters, -1.0)
    else:
        kill(model, "layer1.1.conv2", filters, 0.0)
    with torch.no_grad():
        model.layer1[1].bn2.bias.fill_(bias)
    small = assert_slim_is_the_same(model)
    assert layers(small, "layer1") == ["layer1.0.conv1", "layer1.0.conv2"]
    assert len(shifts(small)) == (1 if bias else 0)
    relus = [node for node in small.graph.nodes if node.target == torch.ops.aten.relu.default]
    assert len(relus) == (
        12 if bias else 11
    )  # of 13: the branch's is gone, and the block's has nothing to do


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_a_stage_can_begin_with_a_dead_branch(bias):
    model = lively_network()
    kill(model, "layer2.0.conv2", list(range(32)), bias)
    small = assert_slim_is_the_same(model)
    assert layers(small, "layer2.0") == []
    assert shape(small, "layer2.1.conv1") == (32, 16)


def test_all_branches_can_be_dead():
    model = lively_network()
    for name, conv, _ in convolutions(model):
        if name.endswith("conv2"):
            kill(model, name, list(range(conv.out_channels)), 0.0)
    small = assert_slim_is_the_same(model)
    assert layers(small) == ["conv1", "linear"]
    assert shape(small, "linear") == (10, 16)


def test_what_nothing_reads_goes_although_it_lives():
    model = lively_network()
    with torch.no_grad():
        model.layer2[1].conv2.weight[:, [6, 7, 20]] = 0
    kill(model, "layer2.1.conv1", 20, bias=1.0)
    assert shape(assert_slim_is_the_same(model), "layer2.1.conv1") == (29, 32)


def test_dead_columns_of_the_classifier_take_the_last_channels_with_them():
    model = lively_network()
    with torch.no_grad():
        model.linear.weight[:, [0, 20, 63]] = 0
    kill(model, "layer3.1.conv2", 30, bias=3.0)  # alive by the shortcut
    for layer in ("layer3.0.conv2", "layer3.1.conv2"):
        kill(model, layer, 60, bias=3.0)  # padding: a constant in the classifier's bias
    small = assert_slim_is_the_same(model)
    assert shape(small, "linear") == (10, 60)
    assert shape(small, "layer3.1.conv2") == (59, 64)


def test_a_class_without_weights_has_a_constant_logit():
    model = lively_network()
    with torch.no_grad():
        model.linear.weight[[2, 9]] = 0
    assert shape(assert_slim_is_the_same(model), "linear") == (8, 64)


@pytest.mark.parametrize("where", ["conv1", "linear"])
def test_with_nothing_left_the_logits_are_constant(where):
    model = lively_network()
    with torch.no_grad():
        model.get_submodule(where).weight.zero_()
        if where == "conv1":
            model.conv1.weight.zero_()
    small = slim(model)
    assert isinstance(small, Constant)
    assert difference(model, small, images(5)) <= FLOAT64
    assert multiplications(small, SMALL) == {"": 0}
    small(images(2)).add_(1)  # a caller may write into what it is given
    assert difference(model, small, images(5)) <= FLOAT64


# What it leaves alone


@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_model_changes_and_its_mode_does_not_matter(training):
    model = quantized_at_random(random_network(DEATHS))
    x = images(2)
    with torch.no_grad():
        expected = model(x)
    model.train(training)
    model(x).sum().backward()
    # The pass in train mode changed the batch norms' statistics.
    model.load_state_dict(quantized_at_random(random_network(DEATHS)).state_dict())
    before = snapshot(model)
    small = slim(model)
    assert snapshot(model) == before
    assert not small.training
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-9)
    small.train()
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-9)
    # A deep copy of a parametrized layer shares its class: both must still work.
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=0)


def test_a_cache_of_quantized_weights_gets_no_weight_without_a_gradient():
    model = quantized_at_random(lively_network())
    with parametrize.cached():
        slim(model)
        model(images(1)).sum().backward()
    assert all(q.logit_dz.grad is not None for q in quantizers(model).values())


def test_a_quantizer_that_is_switched_off_is_not_folded_in():
    model = quantized_at_random(lively_network())
    toggle_quantization(model, False)
    small = assert_slim_is_the_same(model)
    toggle_quantization(model, True)
    with torch.no_grad():
        assert not torch.allclose(model(images(2)), small(images(2)))


def test_the_images_are_not_written_into():
    model, x = random_network(DEATHS), images(2)
    slim(model)(x)
    assert torch.equal(x, images(2))


def test_a_network_without_a_graph_is_refused():
    with pytest.raises(ValueError, match=r"torch\.export cannot trace Linear on images \(3, 32, 32\)"):
        slim_network(nn.Linear(3, 4))


# A normal module


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized_at_random(random_network(DEATHS, 3).float())


@pytest.fixture(scope="module")
def small(model) -> nn.Module:
    return slim_network(model)


def test_the_planted_network_has_every_kind_of_part(small):
    parts = [type(m).__name__ for m in small.modules()]
    assert {"SlimLayer", "ChannelSelection", "Shift", "Identity"} <= set(parts)
    assert any(getattr(m, "with_zeros", False) for m in small.modules())
    assert any(getattr(m, "rows", None) is not None for m in small.modules())
    assert not any(parametrize.is_parametrized(m) for m in small.modules())


def test_its_state_goes_to_a_file_and_back(small):
    other = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(torch.nan)
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = images(2, CIFAR).float()
    assert torch.equal(small(x), other(x))


def test_no_tensor_keeps_more_memory_than_its_numbers_take(small):
    for name, tensor in small.state_dict().items():
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), name


def test_maps_are_stored_without_their_repetitions(model, small):
    in_convolutions = sum(p.numel() for p in small.parameters() if p.ndim == 4)
    everything = sum(t.numel() for t in small.state_dict().values())
    assert everything - in_convolutions < 0.1 * sum(p.numel() for p in model.parameters())


def test_all_of_it_moves_to_another_device_or_dtype(small):
    moved = copy.deepcopy(small).to("meta")  # where nothing can be computed together with the CPU's tensors
    assert {t.device.type for t in moved.state_dict().values()} == {"meta"}
    assert moved(torch.zeros(3, *CIFAR, device="meta")).shape == (3, 10)
    assert copy.deepcopy(small).double()(images(3, CIFAR)).dtype == torch.float64


def test_what_is_a_parameter_of_the_network_is_one_of_the_smaller_too():
    between = [nn.PReLU(6), nn.BatchNorm2d(6), nn.GroupNorm(2, 6)]
    model = nn.Sequential(nn.Conv2d(3, 6, 3), *between, nn.Flatten(), nn.Linear(600, 10))
    small = slim_network(model, SMALL)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in model.parameters())


def test_it_can_be_trained_on(small):
    small(images(2, CIFAR).float()).square().sum().backward()
    gradients = [p.grad for p in small.parameters()]
    small.zero_grad()
    assert all(g is not None and g.isfinite().all() for g in gradients)


NETWORKS = {
    "some deaths and a dead branch": replace(DEATHS, whole=("layer2.0.conv1",)),
    "a dead stem": Deaths(1, whole=("conv1",)),
}


@pytest.mark.parametrize("deaths", NETWORKS.values(), ids=NETWORKS)
def test_torch_export_takes_any_number_of_images_and_survives_a_file(deaths, tmp_path):
    small, x = slim(random_network(deaths).float()), images(5).float()
    batch = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(small, (x[:2],), dynamic_shapes=(batch,)), tmp_path / "slim.pt2")
    exported = torch.export.load(tmp_path / "slim.pt2").module()
    for count in (1, 3, 5):
        torch.testing.assert_close(exported(x[:count]), small(x[:count]))


@pytest.mark.parametrize("deaths", NETWORKS.values(), ids=NETWORKS)
def test_onnx_runtime_gives_the_same_logits(deaths, tmp_path):
    model, x = random_network(deaths).float(), images(5).float()
    small = slim(model)
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        small,
        (x[:2],),
        tmp_path / "slim.onnx",
        input_names=["images"],
        dynamic_shapes=(batch,),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(tmp_path / "slim.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        (logits,) = session.run(None, {"images": x[:count].numpy()})
        with torch.no_grad():
            expected = model(x[:count])
        largest = expected.abs().max()
        assert (torch.from_numpy(logits) - expected).abs().max() <= FLOAT32 * largest


@pytest.mark.parametrize("dead", [4, 8])
def test_large_constants_that_cancel_are_computed_in_float64(dead):
    """In float32 the network itself loses three digits of its logits."""
    torch.manual_seed(0)
    first, second, norm = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    model = nn.Sequential(first, second, norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10)).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        first.weight[:dead], first.bias[:dead] = 0, 1e4 * torch.rand(dead)
        exact = copy.deepcopy(model).double()
        black = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
        norm.running_mean.copy_(exact[:2](black).mean((0, 2, 3)) - 0.1)
        logits = copy.deepcopy(model).double()(images.double())
        assert (model(images) - logits).abs().max() > 1e-5 * logits.abs().max()
        assert (slim_network(model)(images) - logits).abs().max() < 1e-6 * logits.abs().max()
