"""The dead-zone quantizer of CoDeQ: weights near zero become exactly zero, the others one of 2Q levels.

Source: arXiv 2512.12981 and the published implementation (saintslab/CoDeQ); formulas re-derived here.

For a weight tensor w with b bits:

    r     = 0.99 quantile of |w|                      range, no gradient
    b     = round(2 + (max_bits - 2) |tanh(logit_bit)|)
    d     = 2 r (1 - |tanh(logit_dz)|)                width of the dead zone
    Q     = 2^(b-1) - 1                               levels on each side of zero
    s     = (r - d/2) / (Q - 1/2) + 1e-8              step size
    h     = (d - s) / 2                               shift of the levels away from zero
    u     = sign(w) max(|w| - h, 0) / s
    q     = clip(round(u), -Q, Q)                     code
    w_hat = s q + h sign(q)

so that |w| <= d/2 becomes exactly 0. Round, clip and max are straight-through: their gradient is 1.
"""

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

RANGE_QUANTILE = 0.99  # as in the published implementation
STEP_EPS = 1e-8  # as there; it keeps s above 0 for a tensor whose range is 0
MIN_BITS = 2  # 1 bit would leave no level but zero: Q = 0
MAX_BITS = 16  # the limit of this implementation; `max_bits` is 8 by default


class NotFiniteWeightError(ValueError):
    """A weight tensor holds NaN or infinity."""


def range_quantile(w: Tensor, q: float = RANGE_QUANTILE) -> Tensor:
    """The q quantile of |w|, linear between order statistics; NaN if a weight is not finite.

    Shapes: any -> (1,), weight units. Gradient: none.
    """
    magnitude = w.detach().abs()
    magnitude = magnitude.as_strided((magnitude.numel(),), (1,))  # as they lie in memory: any order will do
    position = q * (magnitude.numel() - 1)
    lower = math.floor(position)
    if w.device.type == "cpu":
        # There numpy's selection takes a fraction of the time of `topk`. It does not know bfloat16.
        wide = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))
        wide.numpy().partition(lower)  # NaN counts as largest, as in `topk`
        tail = wide[lower:].to(magnitude.dtype)
        below, largest = tail[:1], tail.amax(0, keepdim=True)
        above = tail[1:].amin(0, keepdim=True) if len(tail) > 1 else below
    else:
        tail = magnitude.topk(magnitude.numel() - lower).values  # descending, down to order statistic `lower`
        below, largest = tail[-1:], tail[:1]
        above = tail[-2:-1] if len(tail) > 1 else below
    # The largest magnitude is added zero times, so that r is NaN if any weight is infinite or NaN.
    return torch.lerp(below, above, position - lower) + 0 * largest


class _RoundStraightThrough(torch.autograd.Function):
    """Forward: round half to even. Gradient: 1."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return x.round()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad


def _coded(w: Tensor, s: Tensor, h: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sign(w), |u| and |q|, each of the shape of w; the symbols are those at the head of this file."""
    u = (w.abs() - h).clamp_(min=0).div_(s)
    return w.sign(), u, u.round().clamp_(max=Q)


class _DeadZoneRound(torch.autograd.Function):
    """Forward: w_hat from (w, s, h, Q). Gradient, derived by hand, with g the incoming gradient:

    dL/dw = g where w != 0, else 0        (w enters through sign(w) |w|)
    dL/ds = sum g (q - u)
    dL/dh = sum g (sign(q) - sign(w))
    dL/dQ = 0                             (Q acts through s; the clip is straight-through)
    """

    @staticmethod
    def forward(ctx, w: Tensor, s: Tensor, h: Tensor, Q: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        # In place wherever that can be: of a large tensor the memory takes longer than the arithmetic.
        sign, u, q = _coded(w, s, h, Q)
        coded = q.sign()  # 1 where w_hat is not zero
        w_hat = (s * q).addcmul_(h, coded).mul_(sign)
        ctx.save_for_backward(sign, q.sub_(u), coded.sub_(1))
        return w_hat.to(w.dtype).reshape(w.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        sign, by_s, by_h = ctx.saved_tensors  # by_s, by_h: derivatives of |w_hat| with respect to s and h
        grad = grad * sign
        grad_s = (grad * by_s).sum().reshape(1)
        grad_h = (grad * by_h).sum().reshape(1)
        return grad.mul_(sign), grad_s, grad_h, None


class Codes(NamedTuple):
    """A quantized tensor as integers, such that w_hat = step_size q + shift sign(q)."""

    q: Tensor  # the shape of w, whole numbers from -2^(b-1) to 2^(b-1) - 1 at b bits, in w's dtype
    step_size: Tensor  # (1,), weight units
    shift: Tensor = torch.zeros(1)  # (1,), weight units


class DeadZoneLDZCompander(nn.Module):
    """Uniform quantizer with a learnable dead zone and a learnable bit-width, for one weight tensor.

    >>> quantizer = DeadZoneLDZCompander(max_bits=8, init_bit_logit=3.0)
    >>> quantizer.get_bitwidth().item()
    8.0

    `max_bits` bounds the learned bit-width; a quantizer that does not learn it uses `fixed_bit_val` bits.
    tanh of the magnitude of `init_bit_logit` sets the first bit-width, from 2 to `max_bits`, and that of
    `init_deadzone_logit` the first dead zone, from all of the range to none of it.

    Shapes: forward, any floating -> the same. `logit_bit` and `logit_dz` are (1,).
    Raises: ValueError for bits outside 2 to 16 and a logit that is not finite in float32. In forward,
        ValueError if w is empty or is not floating point, and NotFiniteWeightError if w, on the CPU, holds a
        number that is not finite. On other devices this check would make the host wait for the device at
        every call, so there w_hat is NaN throughout instead.
    Source: see the head of this file.
    """

    parameter_groups: ClassVar = {"logit_bit": "bit", "logit_dz": "deadzone"}

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
        """The bit-width before rounding, (1,), bits; `fixed_bit_val` if it is not learnable."""
        if not self.learnable_bit:
            return torch.full_like(self.logit_bit, self.fixed_bit_val)
        return MIN_BITS + (self.max_bits - MIN_BITS) * self.logit_bit.tanh().abs()

    def get_bitwidth(self) -> Tensor:
        """The bit-width b that the forward pass uses, (1,), whole bits. Gradient: straight through."""
        return _RoundStraightThrough.apply(self.get_learned_bitwidth())

    def forward(self, w: Tensor) -> Tensor:
        """The quantized weights w_hat, of the shape of w, with gradients to w and to both logits."""
        return _DeadZoneRound.apply(w, *self._grid(w))

    @torch.no_grad()
    def codes(self, w: Tensor) -> Codes:
        """The codes of w, with step size and shift: they give the result of `forward` bit for bit."""
        s, h, Q = self._grid(w)
        sign, _, q = _coded(w, s, h, Q)
        return Codes(q.mul_(sign), s, h)

    def _grid(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step size s, shift h and level count Q for w, each (1,), with gradients to both logits."""
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
