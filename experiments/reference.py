"""The training step written a second time, slowly and plainly, to hold the real one against.

Nothing of this project is imported: the network is a list of function calls, the quantizer is plain autograd
over sorted weights, the lasso is a loop over channels, AdamW is its formulas. Nothing is cached, fused or
laid out specially, so that an error in the real step and the same error here are unlikely to meet.

Sources: He et al. 2015 (arXiv 1512.03385), section 4.2; CoDeQ (arXiv 2512.12981); Yuan & Lin 2006, eq. (2.1);
Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2. Weights are (O, I, kh, kw), images (N, 3, 32, 32).
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# CIFAR-10's channel means, and the means of its images' own standard deviations, of pixels in 0 to 1.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SIDE = 32  # pixels of an image

WIDTHS = (16, 32, 64)  # channels of the three stages


def draws(count: int, seed: int, epoch: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """What an epoch (from 0) draws for `count` images: their order, crops and mirror images.

    The crops are of images with so many pixels of zeros around them.

    Shapes: -> (count,), a permutation; (2, count), each crop's offset from top and left in pixels, 0 to
    2 padding, in that order; (count,), 1 where an image is mirrored.
    """
    number = int(hashlib.sha256(f"seed {seed}, epoch {epoch}".encode("ascii")).hexdigest()[:16], 16)
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(count, generator=generator)
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    return order, offsets, torch.randint(0, 2, (count,), generator=generator)


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """The value of `exact` with the gradient of `smooth`."""
    return smooth + (exact - smooth).detach()


def quantile_99(w: Tensor) -> Tensor:
    """The 0.99 quantile of the magnitudes, linear between two of them: any shape -> a scalar."""
    # torch.quantile takes no more than 16 million numbers, and rounds the quantile's place in float32.
    magnitudes = w.detach().abs().flatten().sort().values
    place = 0.99 * (len(magnitudes) - 1)
    below, above = magnitudes[math.floor(place)], magnitudes[math.ceil(place)]
    return below + (place - math.floor(place)) * (above - below)


def quantize(w: Tensor, bits: Tensor, logit_dz: Tensor) -> Tensor:
    """The dead-zone quantizer, from the bit-width before rounding and the dead-zone logit, (1,) each."""
    r = quantile_99(w)
    b = straight_through(bits.round(), bits)
    d = 2 * r * (1 - logit_dz.tanh().abs())
    Q = 2 ** (b - 1) - 1
    s = (r - d / 2) / (Q - 0.5) + 1e-8
    h = (d - s) / 2
    m = straight_through((w.abs() - h).clamp_min(0), w.abs() - h)
    u = w.sign() * m / s
    q = straight_through(u.round(), u)
    q = straight_through(torch.clamp(q.detach(), -Q.detach(), Q.detach()), q)
    return s * q + h * q.sign()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the images of log sum exp of the logits less the label's logit."""
    largest = logits.max(1, keepdim=True).values.detach()
    log_sum = (logits - largest).exp().sum(1).log() + largest[:, 0]
    return (log_sum - logits[torch.arange(len(labels)), labels]).mean()


@dataclass
class Network:
    """A ResNet of `blocks` blocks a stage, as its state and the weights that its layers compute with.

    `values` are the tensors of the state_dict. In training mode the running statistics in it are updated.
    Where it `keeps` them, `inputs` and `outputs` are what each layer was last given and gave, by its name, in
    the layers' order.
    """

    values: dict[str, Tensor]
    weights: Mapping[str, Tensor]  # by layer name
    blocks: int
    training: bool = True
    keeps: bool = True
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def convolve(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        return self._kept(name, x, F.conv2d(x, self.weights[name], stride=stride, padding=1))

    def normalise(self, name: str, x: Tensor) -> Tensor:
        running_mean, running_var = self.values[f"{name}.running_mean"], self.values[f"{name}.running_var"]
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            positions = x.numel() // x.shape[1]
            with torch.no_grad():
                self.values[f"{name}.running_mean"] = 0.9 * running_mean + 0.1 * mean
                unbiased = var * positions / (positions - 1)
                self.values[f"{name}.running_var"] = 0.9 * running_var + 0.1 * unbiased
        else:
            mean, var = running_mean, running_var
        y = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        scale, shift = (self.values[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        return self._kept(name, x, y * scale + shift)

    def __call__(self, images: Tensor) -> Tensor:
        """Shapes: (N, 3, H, W) -> (N, classes)."""
        x = F.relu(self.normalise("bn1", self.convolve("conv1", images.contiguous())))
        for stage, width in enumerate(WIDTHS, 1):
            for i in range(self.blocks):
                block = f"layer{stage}.{i}"
                stride = 2 if stage > 1 and i == 0 else 1
                y = F.relu(self.normalise(f"{block}.bn1", self.convolve(f"{block}.conv1", x, stride)))
                y = self.normalise(f"{block}.bn2", self.convolve(f"{block}.conv2", y))
                if stride == 2:  # option A
                    x = x[:, :, ::2, ::2]
                    nothing = x.new_zeros(len(x), width // 4, *x.shape[2:])
                    x = torch.cat([nothing, x, nothing], 1)
                x = F.relu(y + x)
        x = x.mean((2, 3))
        return self._kept("linear", x, x @ self.weights["linear"].T + self.values["linear.bias"])

    def _kept(self, layer: str, given: Tensor, made: Tensor) -> Tensor:
        if self.keeps:
            self.inputs[layer], self.outputs[layer] = given, made
        return made


def parameter_count(blocks: int, classes: int) -> int:
    """Parameters of the plain ResNet: convolutions without biases, batch norms, the classifier."""
    total, before = 3 * WIDTHS[0] * 9 + 2 * WIDTHS[0], WIDTHS[0]
    for width in WIDTHS:
        for _ in range(blocks):
            total += 9 * before * width + 9 * width * width + 4 * width
            before = width
    return total + before * classes + classes


Member = tuple[str, str, int]  # layer, "filter" or "input", number


def channel_groups(blocks: int) -> list[list[Member]]:
    """For each channel the weight slices that must all vanish for it to go."""
    groups = []
    for stage, width in enumerate(WIDTHS, 1):
        for block in range(blocks):  # inner channels
            for i in range(width):
                groups.append([(f"layer{stage}.{block}.conv1", "filter", i),
                               (f"layer{stage}.{block}.conv2", "input", i)])  # fmt: skip
        for c in range(width):  # residual channels
            group = [(f"layer{stage}.{block}.conv2", "filter", c) for block in range(blocks)]
            group += [(f"layer{stage}.{block}.conv1", "input", c) for block in range(1, blocks)]
            if stage < len(WIDTHS):
                group.append((f"layer{stage + 1}.0.conv1", "input", c))
            groups.append(group)
    return groups


def slice_of(weight: Tensor, side: str, i: int) -> Tensor:
    return weight[i] if side == "filter" else weight[:, i]


def slice_macs(weight: Tensor, layer: str, side: str) -> int:
    """Multiply-accumulates of one filter, or of all filters on one input channel, for an image of 32 x 32."""
    stage = int(layer[len("layer")])
    pixels = (SIDE // 2 ** (stage - 1)) ** 2  # of what the layer gives: stages 2 and 3 halve the image
    filters, inputs, height, width = weight.shape
    return (inputs if side == "filter" else filters) * height * width * pixels


def penalty(weights: Mapping[str, Tensor], blocks: int, by_macs: bool = False) -> Tensor:
    """The group lasso over the layers in `weights`: the norm of all that must vanish together, summed.

    With `by_macs` each norm counts as its group's multiply-accumulates over the mean of all groups.
    """
    squares: dict[tuple[str, str], Tensor] = {}
    for layer, w in weights.items():
        squares[layer, "filter"] = w.square().sum((1, 2, 3))  # (O, I, kh, kw) -> (O,)
        squares[layer, "input"] = w.square().sum((0, 2, 3))  # (O, I, kh, kw) -> (I,)
    total = next(iter(weights.values())).new_zeros(()) if weights else torch.zeros(())
    groups = [[m for m in group if m[0] in weights] for group in channel_groups(blocks)]
    groups = [group for group in groups if group]
    macs = [sum(slice_macs(weights[layer], layer, side) for layer, side, _ in group) for group in groups]
    for group, cost in zip(groups, macs, strict=True):
        square = torch.stack([squares[layer, side][i] for layer, side, i in group]).sum()
        if square > 0:  # the square root has no gradient at 0, and the norm's is to be 0 there
            total = total + square.sqrt() * (cost * len(macs) / sum(macs) if by_macs else 1)
    return total


def dead_members(weights: Mapping[str, Tensor], blocks: int) -> list[Member]:
    """The slices of groups whose quantized weights are all zero."""
    members = [member for group in channel_groups(blocks) for member in group if member[0] in weights]
    return [m for m in members if not slice_of(weights[m[0]], m[1], m[2]).any()]


@dataclass(frozen=True)
class AdamW:
    """AdamW of a parameter, or of several in a row, by its formulas."""

    rate: float | Tensor  # of all numbers, or of each
    decay: float | Tensor
    beta1: float
    beta2: float

    def step(
        self, p: Tensor, gradient: Tensor, first: Tensor, second: Tensor, count: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The parameter and both moments after step number `count` (from 1)."""
        first = self.beta1 * first + (1 - self.beta1) * gradient
        second = self.beta2 * second + (1 - self.beta2) * gradient.square()
        unbiased = first / (1 - self.beta1**count)
        scale = (second / (1 - self.beta2**count)).sqrt() + 1e-8
        return p - self.rate * self.decay * p - self.rate * unbiased / scale, first, second


def learning_rate(epoch: float, epochs: float, warmup: float) -> float:
    """The share of their peak at which learning rates stand in an epoch, counted from 0."""
    climbed = 1.0 if epoch >= warmup else (1 + epoch) / (1 + warmup)
    return climbed * (1 + math.cos(math.pi * epoch / epochs)) / 2


def warmup(epoch: float, delay: float, ramp: float) -> float:
    """The share of its peak at which the penalty's coefficient stands in an epoch, counted from 0."""
    if epoch < delay:
        return 0.0
    return 1.0 if ramp == 0 or epoch >= delay + ramp else (epoch - delay) / ramp
