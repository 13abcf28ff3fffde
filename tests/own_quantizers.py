"""Quantizers such as a researcher might bring: LSQ, others that work, and what is none or a broken one."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from src.quantizer import Codes


class LSQ(nn.Module):
    """Learned step size quantization with one step size a tensor and fixed bits.

    Source: Esser et al. 2020 (arXiv 1902.08153), eqs. (1) to (5).
    """

    def __init__(self, fixed_bit_val: int = 4) -> None:
        super().__init__()
        self.bits = fixed_bit_val
        self.step_size = nn.Parameter(torch.zeros(1))  # 0 until the first weight is seen

    def get_bitwidth(self) -> int:
        return self.bits

    def forward(self, w: Tensor) -> Tensor:
        most = 2 ** (self.bits - 1) - 1
        if not self.step_size:
            self.step_size.data.copy_(2 * w.detach().abs().mean() / most**0.5)
        scale = (w.numel() * most) ** -0.5
        s = self.step_size * scale + (self.step_size * (1 - scale)).detach()
        s = s + (self.step_size - s).detach()  # exactly the step size, whatever the rounding above
        u = (w / s).clamp(-most - 1, most)
        return (u + (u.round() - u).detach()) * s

    @torch.no_grad()
    def codes(self, w: Tensor) -> Codes:
        most = 2 ** (self.bits - 1) - 1
        return Codes((w / self.step_size).clamp(-most - 1, most).round(), self.step_size)


class Ternary(nn.Module):
    """Two bits, no parameters, no codes, and a constructor of no arguments."""

    def get_bitwidth(self) -> int:
        return 2

    def forward(self, w: Tensor) -> Tensor:
        size = w.abs().mean()
        return w + (size * (w / size).round().clamp(-1, 1) - w).detach()


class PerFilter(Ternary):
    """Ternary with a learned factor a filter: a parameter of several numbers, made when it is needed."""

    parameter_groups = {"factor": "deadzone"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(16))

    def forward(self, w: Tensor) -> Tensor:
        return super().forward(w) * self.factor.mean()


class Drawing(nn.Module):
    """In training mode it rounds up or down at random, and takes the moving average of each filter's largest
    weight, which is the filter's scale."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", None)

    def get_bitwidth(self) -> int:
        return 4

    def forward(self, w: Tensor) -> Tensor:
        now = w.detach().abs().flatten(1).amax(1)
        if self.largest is None:
            self.largest = now
        if self.training:
            self.largest = 0.9 * self.largest + 0.1 * now
        s = self.largest.clamp_min(1e-8).view(-1, *[1] * (w.ndim - 1)) / 7
        drawn = random.random() - 0.5 if self.training else 0.0
        q = (w / s + drawn).round().clamp(-7, 7)
        return w + (q * s - w).detach()


class OneBit(nn.Module):
    """Of each weight the sign, and no more."""

    def get_bitwidth(self) -> int:
        return 1

    def forward(self, w: Tensor) -> Tensor:
        return w + (w.sign() * w.abs().mean() - w).detach()


class AllSixteen(Ternary):
    """All levels that four bits have, the lowest with no counterpart above zero."""

    def get_bitwidth(self) -> int:
        return 4

    def forward(self, w: Tensor) -> Tensor:
        s = w.detach().abs().max() / 8
        return w + ((w / s).round().clamp(-8, 7) * s - w).detach()


class Pruning(Ternary):
    """Weights below the median are zero, and get no gradient; the others stay as they are."""

    def get_bitwidth(self) -> int:
        return 32

    def forward(self, w: Tensor) -> Tensor:
        return w * (w.abs() > w.detach().abs().median())


class WithoutGradient(Ternary):
    def forward(self, w: Tensor) -> Tensor:
        return super().forward(w).detach()


class Writing(Ternary):
    def forward(self, w: Tensor) -> Tensor:
        w.data.mul_(0.999)
        return super().forward(w)


class Caching(Ternary):
    held: Tensor | None = None

    def forward(self, w: Tensor) -> Tensor:
        self.held = super().forward(w).detach() if self.held is None else self.held
        return w + (self.held - w).detach()


class Counting(Ternary):
    calls = 0

    def forward(self, w: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(w) * (1 + self.calls % 7)


class InEvaluation(Ternary):
    """Training goes on with the stored weights."""

    def forward(self, w: Tensor) -> Tensor:
        return w if self.training else super().forward(w)


class ManyLevels(Ternary):
    def forward(self, w: Tensor) -> Tensor:
        return w + ((100 * w).round() / 100 - w).detach()


class WithoutBits(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w


class WithoutForward(nn.Module):
    def get_bitwidth(self) -> int:
        return 2


class OtherShape(Ternary):
    def forward(self, w: Tensor) -> Tensor:
        return super().forward(w).flatten()


class NoTensor(Ternary):
    def forward(self, w: Tensor) -> Tensor:
        return None  # type: ignore[return-value]


class HalfABit(Ternary):
    def get_bitwidth(self) -> float:  # type: ignore[override]
        return 2.5


class BitsOfEachFilter(Ternary):
    def get_bitwidth(self) -> Tensor:  # type: ignore[override]
        return torch.full((16,), 4.0)


class LearnedBitsOfEachFilter(Ternary):
    def get_learned_bitwidth(self) -> Tensor:
        return torch.full((16,), 4.0)


class OfFourDimensions(Ternary):
    def forward(self, w: Tensor) -> Tensor:
        return super().forward(w / w.abs().amax((1, 2, 3), keepdim=True))


class Centred(Ternary):
    """Two levels around the mean, neither of which is zero."""

    def forward(self, w: Tensor) -> Tensor:
        centred = w - w.mean()
        w_hat = centred.abs().mean() * torch.where(centred < 0, -1.0, 1.0).to(w.dtype) + 0.1 * w.abs().max()
        return w + (w_hat - w).detach()


class InFloat32(Ternary):
    """As torch's fake quantization, it takes float32 alone, and its bits are a number of numpy's."""

    def get_bitwidth(self) -> np.floating:  # type: ignore[override]
        return np.float32(2)

    def forward(self, w: Tensor) -> Tensor:
        if w.dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return super().forward(w)


class UnknownGroup(PerFilter):
    parameter_groups = {"factor": "biases"}  # noqa: RUF012


class UnknownParameter(PerFilter):
    parameter_groups = {"scale": "weights"}  # noqa: RUF012


class NeedsAnArgument(Ternary):
    def __init__(self, levels: int) -> None:
        super().__init__()


class DividesByZero(Ternary):
    def forward(self, w: Tensor) -> Tensor:
        return w / (1 // 0)


class OtherCodes(Ternary):
    def codes(self, w: Tensor) -> Codes:
        return Codes(w.sign(), torch.ones(1))


class TooLargeCodes(Ternary):
    def codes(self, w: Tensor) -> Codes:
        return Codes(7 * w.sign(), w.abs().mean().reshape(1))


class StepOfEachFilter(Ternary):
    def codes(self, w: Tensor) -> Codes:
        return Codes(w.sign(), torch.ones(len(w), 1, 1, 1))


class CodesAsATensor(Ternary):
    def codes(self, w: Tensor) -> Tensor:
        return w.sign()


class FixedBitsThatDoNotAct(Ternary):
    def __init__(self, fixed_bit_val: int = 2) -> None:
        super().__init__()


no_class = Ternary()
