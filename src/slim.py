"""The smaller network: a plain module without quantizers, from which all removable channels are removed.

It gives the logits of the (fake-quantized) network in evaluation mode, to the rounding of its dtype, and does
exactly the multiplications that `metrics.py` counts as structured MACs. src/channels.py decides which
channels are removed:

    alive      is kept, in a smaller convolution with the batch norm folded in
    constant   is removed and added to the shift of each layer that reads it: a number a channel or, beside
               zero padding, where a filter meets fewer copies of the constant, a map
    null       is removed

Weights are (O, I, kh, kw), activations (N, C, H, W). Layers keep the names that they have in `resnet.py`.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet import BasicBlock
from src.channels import trace_channels
from utils_quantization import without_quantizers


@torch.no_grad()
def slim_network(model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """Make the smaller network of a ResNet of `resnet.py`, quantized or not, in its dtype and on its device.

    The model counts as in evaluation mode, whatever mode it is in, and is not changed. Constants and batch
    norms are folded in float64. If a shift is a map, the network takes images of `input_size` only.

    Raises: ValueError if the model is not a ResNet of `resnet.py`.
    """
    like = next(model.parameters(), torch.empty(0))  # a model without parameters is refused below
    builder = _Builder(without_quantizers(model), input_size, like.dtype)
    return builder.network().to(like.device).eval()


class ChannelSelection(nn.Module):
    """Selects channels by their numbers, in the given order; number `channels` selects a channel of zeros.

    >>> ChannelSelection(torch.tensor([2, 0, 3]), channels=3)(torch.tensor([[5.0, 6.0, 7.0]]))
    tensor([[7., 5., 0.]])

    Shapes: (N, C, ...) -> (N, len(index), ...).
    """

    index: Tensor

    def __init__(self, index: Tensor, channels: int) -> None:
        super().__init__()
        self.register_buffer("index", index)
        self.with_zeros = bool((index == channels).any())

    def forward(self, x: Tensor) -> Tensor:
        if self.with_zeros:
            x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        return x.index_select(1, self.index)


class Shift(nn.Module):
    """Adds a number to each channel, or a map (O, H, W), which is stored without repeated rows and columns.

    A map mostly differs from a single number only in the outermost pixels, beside zero padding: 3 x 3 stored
    numbers a channel are typical.

    Shapes: (N, O, H, W) -> the same.
    """

    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        values, rows = shift.unique(dim=1, return_inverse=True)
        values, columns = values.unique(dim=2, return_inverse=True)
        is_map = values[0].numel() > 1
        self.values = nn.Parameter(values.contiguous())  # (O, h, w)
        self.register_buffer("rows", rows if is_map else None)
        self.register_buffer("columns", columns if is_map else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.rows is None or self.columns is None:
            return x + self.values
        return x + self.values.index_select(1, self.rows).index_select(2, self.columns)


class SlimConvolution(nn.Module):
    """A convolution with its batch norm folded in: places(convolve(reads(x))) plus the shift.

    `reads` selects the input channels that have weights, `places` puts the outputs at their channels of the
    residual stream. A shift of one number a channel becomes the convolution's bias if `places` does nothing.
    """

    def __init__(
        self, conv: nn.Conv2d, weight: Tensor, shift: Tensor, reads: nn.Module, places: nn.Module
    ) -> None:
        super().__init__()
        self.stride, self.padding = conv.stride, conv.padding
        self.reads, self.places = reads, places
        self.weight = nn.Parameter(weight)
        as_module = Shift(shift)
        is_bias = as_module.rows is None and isinstance(places, nn.Identity)
        self.bias = nn.Parameter(as_module.values.flatten()) if is_bias else None
        self.shift = nn.Identity() if is_bias else as_module

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(self.reads(x), self.weight, self.bias, self.stride, self.padding)
        return self.shift(self.places(out))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]} channels, stride={self.stride}"


class SlimBlock(nn.Module):
    """A residual block whose branch still has channels that depend on the image."""

    def __init__(self, conv1: SlimConvolution, conv2: SlimConvolution, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv1
        self.conv2 = conv2
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.conv1(x), inplace=True))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class DeadBlock(nn.Module):
    """A residual block whose branch is constant: the shortcut plus a shift."""

    def __init__(self, shortcut: nn.Module, shift: Shift) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shift(self.shortcut(x)), inplace=True)


class SlimClassifier(nn.Module):
    """The classifier. A class whose weights are all zero has a constant logit. (N, C) -> (N, classes)."""

    def __init__(self, weight: Tensor, bias: Tensor, places: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)  # (classes,)
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.places, nn.Identity):
            return F.linear(x, self.weight, self.bias)
        return self.places(F.linear(x, self.weight)) + self.bias


class SlimResNet(nn.Module):
    """Stem, three stages of the blocks that change their input, average pool, classifier."""

    def __init__(self, conv1: SlimConvolution, stages: list[nn.Sequential], linear: SlimClassifier) -> None:
        super().__init__()
        self.conv1 = conv1
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.conv1(x), inplace=True)
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))  # (N, C, H, W) -> (N, classes)


class ConstantLogits(nn.Module):
    """A network with nothing left: the same logits for every image. (N, 3, H, W) -> (N, classes)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.repeat(x.shape[0], 1)


class _Builder:
    """Builds the smaller network on the CPU: computes in float64, stores the results in `dtype`."""

    def __init__(self, plain: nn.Module, input_size: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.plain = plain.cpu().double()
        self.dtype = dtype
        account = trace_channels(self.plain, input_size)
        self.layers, self.streams = account.layers, account.streams

    def network(self) -> nn.Module:
        stem, classifier = self.layers["conv1"], self.layers["linear"]
        if not classifier.inputs.any():
            return ConstantLogits(classifier.shift.to(self.dtype))
        image = torch.ones_like(stem.inputs)
        conv1 = self.convolution("conv1", image, self.streams["conv1"].alive, stem.shift)
        stages = {name: OrderedDict[str, nn.Module]() for name in ("layer1", "layer2", "layer3")}
        for before, name in pairwise(self.streams):
            stage, number = name.split(".")
            block = self.block(name, before)
            if block is not None:
                stages[stage][number] = block
        return SlimResNet(conv1, [nn.Sequential(s) for s in stages.values()], self.classifier())

    def block(self, name: str, before: str) -> nn.Module | None:
        """Make the smaller version of a block. Returns: None if the block does not change the stream.

        `before` names the block, or the stem, whose output enters this block.
        """
        block = self.plain.get_submodule(name)
        assert isinstance(block, BasicBlock)
        given, stream = self.streams[before], self.streams[name]
        assert stream.source is not None
        inner, branch = self.layers[f"{name}.conv1"], self.layers[f"{name}.conv2"]
        shortcut = _select(stream.source[stream.alive], given.alive)
        if block.conv1.stride[0] > 1:  # a pool over one pixel takes every second pixel, as `PadShortcut` does
            shortcut = nn.Sequential(nn.AvgPool2d(1, block.conv1.stride[0]), shortcut)
        # Add the constants that enter by the shortcut: the branch may make such a channel alive again.
        shift = branch.shift + block.shortcut(given.constant[None])[0]
        if branch.outputs.any():
            conv1 = self.convolution(f"{name}.conv1", given.alive, inner.outputs, inner.shift)
            conv2 = self.convolution(f"{name}.conv2", inner.outputs, stream.alive, shift)
            return SlimBlock(conv1, conv2, shortcut)
        shift = shift[stream.alive]
        if isinstance(shortcut, nn.Identity) and not shift.any():
            return None  # only a ReLU would be left, and the stream is a ReLU's output already
        return DeadBlock(shortcut, Shift(shift.to(self.dtype)))

    def convolution(self, name: str, given: Tensor, wanted: Tensor, shift: Tensor) -> SlimConvolution:
        """Make the smaller version of a convolution and its batch norm.

        It takes a tensor that holds only the channels `given`, (I,) bool, and returns one that holds only the
        channels `wanted`, (O,) bool. `shift`: (O, H, W).
        """
        conv, bn = self.plain.get_submodule(name), self.plain.get_submodule(name.replace("conv", "bn"))
        assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        assert bn.running_var is not None
        layer = self.layers[name]
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        weight = (conv.weight * scale[:, None, None, None])[layer.outputs][:, layer.inputs]
        reads, places = _select(_numbers(layer.inputs), given), _select(_numbers(wanted), layer.outputs)
        return SlimConvolution(conv, weight.to(self.dtype), shift[wanted].to(self.dtype), reads, places)

    def classifier(self) -> SlimClassifier:
        linear, layer = self.plain.get_submodule("linear"), self.layers["linear"]
        assert isinstance(linear, nn.Linear)
        weight = linear.weight[layer.outputs][:, layer.inputs]
        places = _select(torch.arange(len(layer.outputs)), layer.outputs)
        return SlimClassifier(weight.to(self.dtype), layer.shift.to(self.dtype), places)


def _numbers(flags: Tensor) -> Tensor:
    return flags.nonzero().flatten()


def _select(numbers: Tensor, held: Tensor) -> nn.Module:
    """Make a module that selects channels by their numbers in the whole network.

    It takes a tensor that holds only the channels `held`, (C,) bool. A channel that is not held, or has the
    number -1, is zero in its output.
    """
    count = int(held.sum())
    places = torch.where(held, held.cumsum(0) - 1, count)  # (C,)
    index = torch.where(numbers >= 0, places[numbers], count)
    return nn.Identity() if torch.equal(index, torch.arange(count)) else ChannelSelection(index, count)
