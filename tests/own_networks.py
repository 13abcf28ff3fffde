"""Networks as someone's own module would hold them, and what looks like one and is none."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet import ResNet


class Small(nn.Module):
    """Two ways that are added and one that is put beside them, for images of any size."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.left(x) + self.right(x))
        x = torch.cat([x, F.leaky_relu(self.deep(x))], 1)
        return self.head(x.mean((2, 3)))


def without_arguments() -> nn.Module:
    return Small()


class OfAnyArguments(Small):
    def __init__(self, **kwargs: int) -> None:
        super().__init__(**kwargs)


def five_classes() -> nn.Module:
    return Small(5)


def needs_more(width: int) -> nn.Module:
    raise AssertionError("called")


def no_network() -> str:
    return "a network"


def raises() -> nn.Module:
    raise KeyError("weights.pth")


class OfLargeImages(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 64), nn.Flatten(), nn.Linear(4, 10))


class TwoAnswersInTraining(Small):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class WithDropout(Small):
    """Random in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.5), self.head)  # type: ignore[assignment]


class WithMuchDropout(Small):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.95), self.head)  # type: ignore[assignment]


class LooksAtNumbers(Small):
    """Its way depends on the image, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean().item() > 0 else -x)


class WithTable(Small):
    """The logits depend on whole numbers that are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(10))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order]


class Pointwise(nn.Module):
    """Weights with dimensions of 1, whose strides are free."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)
        self.depthwise, self.point = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.point(self.depthwise(self.stem(x))).mean((2, 3)))


class WithSort(Small):
    """No channel is followed through a sort."""

    def __init__(self) -> None:
        super().__init__()
        del self.deep

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x))).sort(1).values
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


# What people write, each of which once raised an alarm or an error.


class Tutorial(nn.Module):
    """No batch norm, and a view that a channels_last tensor has not."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 12, 5)
        self.fc1, self.fc2 = nn.Linear(12 * 5 * 5, 24), nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).view(-1, 12 * 5 * 5)
        return self.fc2(F.relu(self.fc1(x)))


class Perceptron(nn.Module):
    """Nothing to convolve."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3072, 16),
            nn.ReLU(),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, padding=1)


class Kitchen(nn.Module):
    """Biases in front of batch norms, dropout as a function, a buffer that counts, weights that are computed,
    a transposed convolution, layers that are never called, or out of their order, or as functions."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.unused = nn.Conv2d(8, 8, 1)
        self.late = nn.Conv2d(8, 8, 3, padding=1)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.ways = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(2)])
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.standardized = Standardized(8, 8, 3)
        self.group_norm = nn.GroupNorm(2, 8)
        self.up, self.down = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, num_classes)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x = F.relu_(self.norm(self.stem(x)))
        x = sum(way(x) for way in self.ways) + F.conv2d(x, self.late.weight, self.late.bias, padding=1)
        x = F.dropout2d(self.depthwise(x), 0.1, self.training)
        x = self.down(self.up(F.silu(self.group_norm(self.standardized(x)))))
        return self.head(x.reshape(len(x), 8, -1).mean(2) * self.frozen)


class Casting(Small):
    """It cannot run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.left(x) + self.right(x)).float()
        return self.head(torch.cat([x, F.leaky_relu(self.deep(x))], 1).mean((2, 3))).float()


class Attending(nn.Module):
    """Attention by hand over patches and a token of its own, one for each image."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 8, stride=8), nn.Parameter(torch.zeros(1, 1, 16))
        self.norm, self.three, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        query, key, value = self.three(self.norm(x)).chunk(3, -1)
        x = x + self.out((query @ key.transpose(1, 2) / 4).softmax(-1) @ value)
        return self.head(x[:, 0])


class Transforming(nn.Module):
    """torch's own encoder layer, in which the images lie along the second dimension."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class OddNorms(nn.Module):
    """A batch norm that runs twice, one that never runs, and one that stays in evaluation mode."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3)
        self.twice, self.kept, self.never = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def train(self, mode: bool = True) -> "OddNorms":
        super().train(mode)
        self.kept.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.kept(self.twice(self.stem(x))))
        return self.head(F.relu(self.twice(self.conv(x))).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 1)
        self.steps, self.head = nn.LSTM(64, 16, batch_first=True), nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(self.conv(self.stem(x)).flatten(2))[0][:, -1])


class Sharing(Small):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.again.weight = self.left.weight


class Cut(Small):
    """No gradient reaches the stem."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x))).detach()
        return self.head(torch.cat([self.left(x) + self.right(x), self.deep(x)], 1).mean((2, 3)))


class LeavingOut(Small):
    """Training leaves a layer out most of the time; two other layers have a weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = map(torch.nn.utils.parametrizations.weight_norm, (self.left, self.right))
        self.more = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        if not self.training or torch.rand(()) < 0.01:
            x = x + self.more(x)
        x = F.relu(self.left(x) + self.right(x))
        return self.head(torch.cat([x, F.leaky_relu(self.deep(x))], 1).mean((2, 3)))


class Skipping(nn.Module):
    """Training skips a layer by a draw of Python, one by a draw of numpy and one by a draw of torch."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, num_classes)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        draws = [random.random(), np.random.rand(), float(torch.rand(()))] if self.training else [0.0] * 3
        for draw, conv, norm in zip(draws, self.convs, self.norms, strict=True):
            if draw < 0.5:
                x = x + F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class Recomputing(nn.Module):
    """Activations that are computed twice, an orthogonal weight, a norm without weights, a layer that takes
    the number of its inputs from the first images, and a convolution along one dimension."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8)
        self.conv = nn.utils.parametrizations.orthogonal(nn.Conv2d(8, 8, 3, padding=1))
        self.lazy, self.along = nn.LazyConv2d(8, 1), nn.Conv1d(8, 8, 3)
        self.features, self.head = nn.BatchNorm1d(8, affine=False), nn.Linear(8, num_classes)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.lazy(F.relu(self.conv(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, F.relu(self.stem(x)), use_reentrant=True)
        return self.head(self.features(self.along(x.flatten(2)).mean(2)))


class Fourier(nn.Module):
    """Complex numbers, layers that no image enters, and weights that are computed outside a layer; any number
    of arguments."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
        self.filter = nn.Parameter(torch.randn(8, 8, 5, 2) / 4 + 1)
        self.shift = nn.Parameter(torch.randn(8, 1, 1, 2))
        self.filter.data[0] = 0  # of channel 0 the shift is left
        self.code, self.prompt, self.made = nn.Parameter(torch.randn(4)), nn.Linear(4, 8), nn.Linear(4, 64)

    def forward(self, *images: Tensor) -> Tensor:
        x = F.relu(self.stem(images[0]))
        waves = torch.fft.rfft2(x) * torch.view_as_complex(self.filter) + torch.view_as_complex(self.shift)
        x = torch.fft.irfft2(waves) + torch.view_as_real(waves)[..., 0].mean(3, keepdim=True)
        x = F.relu(F.conv2d(x, torch.tanh(self.conv.weight), self.conv.bias, padding=1))
        x = F.conv2d(x + self.prompt(self.code)[:, None, None], self.made(self.code).view(8, 8, 1, 1))
        return self.head(F.relu(x).mean((2, 3)))


class Prompted(Small):
    """A layer that no image enters."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.prompt = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x))) + self.prompt(self.code).mean(0)[:, None, None]
        return self.head(torch.cat([self.left(x) + self.right(x), self.deep(x)], 1).mean((2, 3)))


class WithoutStatistics(Small):
    """The norm takes the statistics of its batch in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


class WithBuffers(Small):
    """Buffers of other types, which float32 holds exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64))
        self.register_buffer("shift", torch.tensor([1, 0, -3], dtype=torch.float16))
        self.register_buffer("unset", torch.tensor([math.nan]))

    def forward(self, x: Tensor) -> Tensor:
        self.unset.copy_(x.detach().mean())
        return super().forward(x * self.scale.float()[:, None, None] + self.shift.float()[:, None, None])


class Averaging(Small):
    """An average in float64 that training makes one of which float32 is no more than near."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9)
        return super().forward(x)


class Unset(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("empty", torch.full((2,), math.nan))


class Spectrum(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter", torch.ones(2, dtype=torch.complex64))


class WithMore(Small):
    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class OldSpectral(Small):
    """torch's former hook leaves a weight in the layer that cannot be copied in the middle of training."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.utils.spectral_norm(self.left)


class Bits(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (x.contiguous().view(torch.int32) > 0))


class Double(Small):
    def __init__(self) -> None:
        super().__init__()
        self.deep.double()


class WritingIntoAWeight(Small):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.weight.clamp_(min=0)
        return super().forward(x)


class Detached(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Ending(Small):
    """As a script without a guard ends the program that imports it."""

    def __init__(self) -> None:
        super().__init__()
        raise SystemExit(0)


class WithoutBackward(Small):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x).sigmoid()
        x += 1
        return x


class InOneLayout(Small):
    def forward(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        return super().forward(x)


class OfSeveralImages(Small):
    """Its last batch norm is over one number a channel and image."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.last_norm = nn.BatchNorm1d(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_norm(super().forward(x))


class BegunAtZero(Small):
    """A residual whose scale begins at zero, a batch norm that stays frozen, prototypes for a last layer."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.scale, self.frozen = nn.Parameter(torch.zeros(1)), nn.BatchNorm2d(8)
        self.inner, self.prototypes = nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(torch.randn(num_classes, 8))

    def train(self, mode: bool = True) -> "BegunAtZero":
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.scale * self.frozen(self.inner(x))
        return F.linear(x.mean((2, 3)), self.prototypes)


class LowRank(nn.Linear):
    """What it computes beside its own product counts in its module too."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x @ self.down.T @ self.up.T


class Cropping(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 1:-1, 1:-1]


class Adapted(Small):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(num_classes)
        self.crop, self.low_rank = Cropping(8, 8, 3), LowRank(8, 8)
        self.left_factor, self.right_factor = nn.Parameter(torch.randn(8, 3)), nn.Parameter(torch.randn(3, 8))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.crop(F.relu(self.norm(self.stem(x))))).mean((2, 3))
        x = F.linear(self.low_rank(x), self.left_factor @ self.right_factor)
        return self.head(F.relu(x))


class Uncopied(Small):
    def __deepcopy__(self, memo: object) -> "Uncopied":
        raise TypeError("there is only one")


class Varied(nn.Module):
    """Depthwise, grouped and 1x1 convolutions, one that is used twice, one of a single filter, and gates."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.point, self.norm1 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=4, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.twice, self.norm3 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.shares, self.gate = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 1, 1)
        self.last, self.norm4 = nn.Conv2d(32, 64, 1, stride=2, bias=False), nn.BatchNorm2d(64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.norm0(self.stem(x)))))
        x = F.relu(self.norm2(self.grouped(F.relu(self.norm1(self.point(x))))))
        x = F.relu(self.twice(F.relu(self.norm3(self.twice(x)))))
        x = x * 32 * torch.softmax(self.shares(x.mean((2, 3), keepdim=True)), 1) * torch.sigmoid(self.gate(x))
        return self.head(F.relu(self.norm4(self.last(x))).mean((2, 3)))


class WithoutLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 10))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weight


def trained(num_classes: int) -> nn.Module:
    """A ResNet of resnet.py of a depth that has no name there, whose weights are not as they are drawn."""
    network = ResNet(1, num_classes)
    for parameter in network.parameters():
        parameter.data.mul_(1.2)
    return network


not_callable = 3
