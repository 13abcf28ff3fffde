"""The dead-zone quantizer of CoDeQ: weights near zero become exactly zero, the others one of 2Q levels.

Source: arXiv 2512.12981 and the published implementation (saintslab/CoDeQ); formulas re-derived here.

For a weight tensor w with b bits:

    r     = 0.99 quantile of |w|                      range, no gradient
    b     = round(2 + (max_bits - 2) |tanh(logit_bit)|)
    d     = 2 r (1 - |tanh(logit_dz)|)                width of the dead zone
    Q     = 2^(b-1) - 1                               levels on each side of zero
    s     = (r - d/2) / (Q - 1/2) + 1e-8              step
    h     = (d - s) / 2                               shift
    q     = clip(round(sign(w) max(|w| - h, 0) / s), -Q, Q)
    w_hat = s q + h sign(q)

so that |w| <= d/2 becomes exactly 0. Round, clip and max are straight-through: their gradient is 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

RANGE_QUANTILE = 0.99
MIN_BITS = 2
MAX_BITS = 16
STEP_EPS = 1e-8


class NotFiniteWeightError(ValueError):
    """A weight tensor holds NaN or infinity."""


def range_quantile(w: Tensor, q: float = RANGE_QUANTILE) -> Tensor:
    """The q quantile of |w|, linear between order statistics; NaN where a weight is not finite.

    Shapes: any -> (1,), weight units. Gradient: none.
    `topk` of the upper tail gives the two order statistics several times faster than `torch.quantile`.
    """
    magnitude = w.detach().abs().flatten()
    position = q * (magnitude.numel() - 1)
    lower = math.floor(position)
    tail = magnitude.topk(magnitude.numel() - lower).values  # descending, ends at order statistic `lower`
    below, above = tail[-1:], tail[-2:-1] if tail.numel() > 1 else tail[-1:]
    # 0 * the largest: one infinite or NaN weight far out in the tail must poison r, not pass unseen.
    return torch.lerp(below, above, position - lower) + 0 * tail[:1]


class _RoundStraightThrough(torch.autograd.Function):
    """Forward: round half to even. Gradient: 1."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.round()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad


class _DeadZoneRound(torch.autograd.Function):
    """Forward: w_hat from (w, s, h, Q). Gradient, by hand, with m = max(|w| - h, 0), g the incoming one:

    dL/dw = g where w != 0, else 0        (w enters through sign(w) |w|)
    dL/ds = sum g (q - sign(w) m / s)
    dL/dh = sum g (sign(q) - sign(w))
    dL/dQ = 0                             (Q acts through s; the clip is straight-through)
    """

    @staticmethod
    def forward(ctx, w: Tensor, s: Tensor, h: Tensor, Q: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        sign = w.sign()
        u = sign * (w.abs() - h).clamp_min(0) / s
        q = u.round().clamp(-Q, Q)
        sign_q = q.sign()
        ctx.save_for_backward(sign, q - u, sign_q - sign)
        return (s * q + h * sign_q).to(w.dtype).reshape(w.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        sign, by_step, by_shift = ctx.saved_tensors
        grad_step = (grad * by_step).sum().reshape(1)
        grad_shift = (grad * by_shift).sum().reshape(1)
        return grad * sign.abs(), grad_step, grad_shift, None


class Codes(NamedTuple):
    """A quantized tensor as integers: w_hat = step_size q + shift sign(q)."""

    q: Tensor  # the shape of w, whole numbers in [-Q, Q], in w's dtype
    step_size: Tensor  # (1,), weight units
    shift: Tensor  # (1,), weight units


class DeadZoneLDZCompander(nn.Module):
    """Uniform quantizer with a learnable dead zone and a learnable bit-width, for one weight tensor.

    >>> quantizer = DeadZoneLDZCompander(max_bits=8, init_bit_logit=3.0)
    >>> quantizer.get_bitwidth().item()
    8.0

    Shapes: forward, any floating -> the same. `logit_bit` and `logit_dz` are (1,).
    Errors: ValueError if w is empty or is not floating point; NotFiniteWeightError, which is one, if on the
        CPU it holds a number that is not finite. On other devices that check would make the host wait at
        every step, so w_hat is NaN throughout instead.
    Source: see the head of this file.
    """

    def __init__(
        self,
        fixed_bit_val: int = 4,
        max_bits: int = 8,
        init_bit_logit: float = 3.0,
        init_deadzone_logit: float = 3.0,
        learnable_bit: bool = True,
        learnable_deadzone: bool = True,
    ) -> None:
        super().__init__()
        for name, bits in (("fixed_bit_val", fixed_bit_val), ("max_bits", max_bits)):
            if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
                raise ValueError(
                    f"{name} is {bits!r}; expected a whole number of bits, {MIN_BITS} to {MAX_BITS}"
                )
        for name, logit in (("init_bit_logit", init_bit_logit), ("init_deadzone_logit", init_deadzone_logit)):
            if not abs(logit) <= torch.finfo(torch.float32).max:
                raise ValueError(f"{name} is {logit}; expected a number that is finite in float32")
        self.fixed_bit_val = fixed_bit_val
        self.max_bits = max_bits
        self.learnable_bit = learnable_bit
        self.learnable_deadzone = learnable_deadzone
        self.logit_bit = nn.Parameter(torch.full((1,), float(init_bit_logit)), requires_grad=learnable_bit)
        self.logit_dz = nn.Parameter(
            torch.full((1,), float(init_deadzone_logit)), requires_grad=learnable_deadzone
        )

    def get_learned_bitwidth(self) -> Tensor:
        """The bit-width before rounding, (1,), bits; `fixed_bit_val` where it is not learnable."""
        if not self.learnable_bit:
            return torch.full_like(self.logit_bit, self.fixed_bit_val)
        return MIN_BITS + (self.max_bits - MIN_BITS) * self.logit_bit.tanh().abs()

    def get_bitwidth(self) -> Tensor:
        """The bit-width b that the forward pass uses, (1,), whole bits. Gradient: straight through."""
        return _RoundStraightThrough.apply(self.get_learned_bitwidth())

    def forward(self, w: Tensor) -> Tensor:
        return _DeadZoneRound.apply(w, *self._grid(w))

    @torch.no_grad()
    def codes(self, w: Tensor) -> Codes:
        """The integers behind `forward`: q, s and h, with s q + h sign(q) equal to it bit for bit."""
        s, h, Q = self._grid(w)
        u = w.sign() * (w.abs() - h).clamp_min(0) / s
        return Codes(u.round().clamp(-Q, Q), s, h)

    def _grid(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step s, shift h and level count Q for this tensor, each (1,), with gradients to both logits."""
        if not w.is_floating_point():
            raise ValueError(f"cannot quantize a tensor of {w.dtype}; expected a floating-point type")
        if w.numel() == 0:
            raise ValueError(f"cannot quantize an empty tensor of shape {tuple(w.shape)}")
        r = range_quantile(w)
        if w.device.type == "cpu" and not r.isfinite():
            raise NotFiniteWeightError(
                f"cannot quantize a tensor of shape {tuple(w.shape)} that holds NaN or infinity"
            )
        d = 2 * r * (1 - self.logit_dz.tanh().abs())
        Q = 2 ** (self.get_bitwidth() - 1) - 1
        s = (r - d / 2) / (Q - 0.5) + STEP_EPS
        return s, (d - s) / 2, Q

    def extra_repr(self) -> str:
        bits = f"max_bits={self.max_bits}" if self.learnable_bit else f"bits={self.fixed_bit_val}"
        return f"{bits}, learnable_deadzone={self.learnable_deadzone}"
