"""The quantizer against NumPy, autograd with straight-through rounding, and numbers worked out by hand."""

import inspect
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from experiments.reference import straight_through
from src.quantizer import DeadZoneLDZCompander, NotFiniteWeightError, range_quantile

quick = settings(max_examples=30, deadline=None, derandomize=True)
thorough = settings(quick, max_examples=150)

BITS = range(2, 9)
DTYPES = (torch.float32, torch.float64)


class Oracle(NamedTuple):
    """The formulas of the quantizer, in NumPy float64; u is the value that is rounded to the code."""

    w_hat: np.ndarray
    q: np.ndarray
    u: np.ndarray
    r: float
    d: float
    s: float
    h: float
    Q: int


def oracle(w: np.ndarray, bits: int, logit_dz: float) -> Oracle:
    w = np.asarray(w, dtype=np.float64)
    r = float(np.quantile(np.abs(w), 0.99))
    d = 2 * r * (1 - abs(math.tanh(logit_dz)))
    Q = 2 ** (bits - 1) - 1
    s = (r - d / 2) / (Q - 0.5) + 1e-8
    h = (d - s) / 2
    u = np.sign(w) * np.maximum(np.abs(w) - h, 0) / s
    q = np.clip(np.round(u), -Q, Q)
    return Oracle(s * q + h * np.sign(q), q, u, r, d, s, h, Q)


class QuantizedWeights(NamedTuple):
    w_hat: Tensor
    s: Tensor
    h: Tensor


def reference(
    w: Tensor, logit_bit: Tensor, logit_dz: Tensor, max_bits: int, fixed: int | None
) -> QuantizedWeights:
    """The same formulas in torch: autograd goes through every operation except the round, clip and max."""
    r = torch.quantile(w.detach().abs(), 0.99)
    if fixed is None:
        learned = 2 + (max_bits - 2) * torch.tanh(logit_bit).abs()
        b = straight_through(learned.round(), learned)
    else:
        b = torch.tensor([float(fixed)], dtype=w.dtype)
    d = 2 * r * (1 - torch.tanh(logit_dz).abs())
    Q = 2 ** (b - 1) - 1
    s = (r - d / 2) / (Q - 0.5) + 1e-8
    h = (d - s) / 2
    m = straight_through(torch.maximum(w.abs() - h, torch.zeros_like(w)), w.abs() - h)
    u = torch.sign(w) * m / s
    q = straight_through(torch.round(u), u)
    q = straight_through(torch.minimum(torch.maximum(q, -Q), Q), q)
    return QuantizedWeights(s * q + h * torch.sign(q.detach().round()), s, h)


class QuantizerCase(NamedTuple):
    """A weight tensor, the gradient that comes back to it, and a quantizer's settings."""

    seed: int
    n: int
    scale: float
    max_bits: int
    rounding: float  # distance of the learned bits from a whole number
    bit_sign: float
    logit_dz: float

    def weights(self, dtype: torch.dtype) -> Tensor:
        rng = np.random.default_rng(self.seed)
        w = rng.standard_normal(self.n) * self.scale
        w[rng.random(self.n) < 0.1] = 0
        w[: self.n // 20] *= 3  # weights beyond the range, which are clipped
        return torch.from_numpy(w).to(dtype)

    def gradient(self, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.random.default_rng(self.seed + 1).standard_normal(self.n)).to(dtype)

    def logit_bit(self, bits: int) -> float:
        if self.max_bits == 2:
            return self.bit_sign
        learned = np.clip(bits + self.rounding, 2.02, self.max_bits - 0.02)
        return self.bit_sign * math.atanh((learned - 2) / (self.max_bits - 2))


@st.composite
def cases(draw: st.DrawFn, bits: int) -> QuantizerCase:
    sign = st.sampled_from((-1.0, 1.0))
    return QuantizerCase(
        seed=draw(st.integers(0, 2**32 - 1)),
        n=draw(st.one_of(st.integers(1, 4), st.integers(5, 400))),
        scale=draw(st.sampled_from((1e-3, 0.03, 1.0, 20.0))),
        max_bits=draw(st.integers(bits, 8)),
        rounding=draw(st.floats(-0.45, 0.45)),
        bit_sign=draw(sign),
        logit_dz=draw(sign) * draw(st.floats(0.05, 4)),
    )


def make_quantizer(
    case: QuantizerCase, bits: int, learnable_bit: bool, learnable_deadzone: bool = True
) -> DeadZoneLDZCompander:
    return DeadZoneLDZCompander(
        fixed_bit_val=4 if learnable_bit else bits,  # must not matter where the bits are learned
        max_bits=case.max_bits,
        init_bit_logit=case.logit_bit(bits),
        init_deadzone_logit=case.logit_dz,
        learnable_bit=learnable_bit,
        learnable_deadzone=learnable_deadzone,
    )


def rounding_error(expected: Oracle, w: np.ndarray, logit_dz: float, eps: float) -> np.ndarray:
    """A bound on the error of u: s comes from r |tanh(logit_dz)|, a difference that cancels."""
    relative = 1 / abs(math.tanh(logit_dz))
    return (
        16 * eps * ((np.abs(w) + abs(expected.h) + expected.r) / expected.s + relative * np.abs(expected.u))
    )


def away_from_ties(expected: Oracle, error: np.ndarray) -> np.ndarray:
    """Whether no rounding error can carry u over to another integer, for each weight."""
    return np.abs(np.abs(expected.u - np.trunc(expected.u)) - 0.5) > error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_values_are_those_of_the_formulas_in_numpy(bits, learnable, dtype):
    @quick
    @given(cases(bits))
    def check(case):
        quantizer = make_quantizer(case, bits, learnable).to(dtype)
        w = case.weights(dtype)
        dz = quantizer.logit_dz.item()
        expected = oracle(w.numpy(), bits, dz)
        eps = torch.finfo(dtype).eps
        error = rounding_error(expected, w.numpy(), dz, eps)
        sure = away_from_ties(expected, error)
        got = quantizer(w).detach().numpy()
        assert got.dtype == w.numpy().dtype
        atol = 16 * eps * (expected.r + expected.s) / abs(math.tanh(dz))
        np.testing.assert_allclose(got[sure], expected.w_hat[sure], rtol=0, atol=atol)
        # At a tie either neighbour is right.
        assert (np.abs(got - expected.w_hat)[~sure] <= expected.s + abs(expected.h) + atol).all()

    check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_all_gradients_are_those_of_autograd_with_straight_through_rounding(bits, learnable, dtype):
    @quick
    @given(cases(bits))
    def check(case):
        quantizer = make_quantizer(case, bits, learnable).to(dtype)
        w = case.weights(dtype).requires_grad_()
        dz = quantizer.logit_dz.item()
        expected = oracle(w.detach().numpy(), bits, dz)
        eps = torch.finfo(dtype).eps
        error = rounding_error(expected, w.detach().numpy(), dz, eps)
        g = case.gradient(dtype) * torch.from_numpy(away_from_ties(expected, error))
        quantizer(w).backward(g)

        w64 = w.detach().double().requires_grad_()
        logits = [p.detach().double().requires_grad_() for p in (quantizer.logit_bit, quantizer.logit_dz)]
        ref = reference(w64, *logits, case.max_bits, None if learnable else bits)
        ref.w_hat.backward(g.double(), retain_graph=True)
        torch.testing.assert_close(w.grad.double(), w64.grad, rtol=8 * eps, atol=0)

        # How rounding adds up on the way to a logit t:
        # dL/dt = ds/dt sum g (q - u) + dh/dt sum g (sign q - sign w)
        size = np.abs(g.numpy()).astype(np.float64)
        by_s = (size * (error + 64 * eps * np.abs(expected.q - expected.u))).sum()
        by_h = (size * 64 * eps * np.abs(np.sign(expected.q) - np.sign(w64.detach().numpy()))).sum()
        for mine, theirs in zip((quantizer.logit_bit, quantizer.logit_dz), logits, strict=True):
            if not mine.requires_grad:
                assert mine.grad is None and not learnable
                continue
            ds, dh = (
                torch.autograd.grad(x, theirs, retain_graph=True, allow_unused=True)[0]
                for x in (ref.s, ref.h)
            )
            cancelling = 1 / abs(math.tanh(dz)) + 1 / max(1 - math.tanh(theirs.item()) ** 2, eps)
            atol = (abs(ds.item()) * by_s + abs(dh.item()) * by_h) * cancelling + 1e-30
            assert mine.grad.shape == (1,)
            assert abs(mine.grad.item() - theirs.grad.item()) <= atol + 64 * eps * abs(theirs.grad.item())

    check()


def test_a_worked_example_of_three_weights_gives_the_numbers_worked_out_by_hand():
    # |w| in order: 0.3, 0.51, 1.01. The 0.99 quantile lies 0.98 of the way from 0.51 to 1.01:  r = 1
    # tanh(logit_bit) = -1/5, max_bits 8:   learned 2 + 6/5 = 3.2, so b = 3 and Q = 3
    # tanh(logit_dz) = 1/2:                 d = 2 (1 - 1/2) = 1
    # s = (1 - 1/2) / (3 - 1/2) = 0.2       h = (1 - 0.2) / 2 = 0.4
    # w       0.3                 -0.51                 1.01
    # u       max(-0.1, 0) = 0    -0.11/0.2 = -0.55     0.61/0.2 = 3.05
    # q       0                   -1                    3
    # w_hat   0                   -0.2 - 0.4 = -0.6     0.6 + 0.4 = 1.0
    quantizer = DeadZoneLDZCompander(
        max_bits=8, init_bit_logit=-math.atanh(1 / 5), init_deadzone_logit=math.atanh(1 / 2)
    ).double()
    with torch.no_grad():  # the constructor keeps float32
        quantizer.logit_bit.fill_(-math.atanh(1 / 5))
        quantizer.logit_dz.fill_(math.atanh(1 / 2))
    w = torch.tensor([0.3, -0.51, 1.01], dtype=torch.float64, requires_grad=True)
    w_hat = quantizer(w)
    # Each number is off by no more than a few 1e-8, the term in s that keeps it from zero.
    close = {"rtol": 0, "atol": 3e-7}
    torch.testing.assert_close(w_hat, w.new_tensor([0.0, -0.6, 1.0]), **close)
    assert w_hat[0] == 0
    assert quantizer.get_bitwidth().item() == 3
    assert quantizer.get_learned_bitwidth().item() == pytest.approx(3.2)

    # g = (1, 2, 4).  dL/dw = g, in the dead zone too: the max is straight-through.
    # dL/ds, h held  = 2 (-1 + 0.55) + 4 (3 - 3.05) = -1.1      (q - u)
    # dL/dh          = 1 (0 - 1) + 0 + 0 = -1                   (sign q - sign w)
    # dL/ds          = -1.1 - 1 (-1/2) = -0.6                   (h = (d - s)/2)
    # dL/dd          = -0.6 (-1/2)/2.5 - 1 (1/2) = -0.38
    # dL/dlogit_dz   = -0.38 (-2) (1 - 1/4) = 0.57
    # dL/dQ          = -0.6 (-0.5/2.5^2) = 0.048
    # dL/db          = 0.048 (2^2 ln 2)
    # dL/dlogit_bit  = that 6 (1 - 1/25), with the sign of the logit
    w_hat.backward(w.new_tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(w.grad, w.new_tensor([1.0, 2.0, 4.0]), rtol=0, atol=0)
    torch.testing.assert_close(quantizer.logit_dz.grad, w.new_tensor([0.57]), **close)
    by_bit = -0.048 * 4 * math.log(2) * 6 * 24 / 25
    torch.testing.assert_close(quantizer.logit_bit.grad, w.new_tensor([by_bit]), rtol=0, atol=3e-6)


def test_the_gradient_of_the_step_size_at_a_clipped_weight_is_what_the_clip_cuts_off():
    # 100 weights of 1 and a last one of 9: position 99 of 0..100 is still a 1, so r = 1.  2 bits: Q = 1.
    # tanh(logit_dz) = 1/2: d = 1, s = (1/2)/(1/2) = 1, h = 0.  The last: u = 9, q = 1, w_hat = 1, q - u = -8.
    # dL/ds, h held = -8, dL/dh = 0, ds/dd = -1, dd/dlogit = -2 (3/4): dL/dlogit_dz = -8 (-1) (-1.5) = -12
    quantizer = DeadZoneLDZCompander(
        fixed_bit_val=2, init_deadzone_logit=math.atanh(1 / 2), learnable_bit=False
    )
    w = torch.ones(101, dtype=torch.float64)
    w[-1] = 9
    g = torch.zeros_like(w)
    g[-1] = 1
    w.requires_grad_()
    w_hat = quantizer.double()(w)
    assert w_hat[-1].item() == pytest.approx(1, abs=1e-6)
    w_hat.backward(g)
    assert quantizer.logit_dz.grad.item() == pytest.approx(-12, abs=1e-5)
    assert quantizer.logit_bit.grad is None
    assert w.grad[-1] == 1  # the clip is straight-through


def test_the_term_that_keeps_the_step_size_from_zero_is_1e_minus_8():
    # logit_dz = 0: d = 2 r, so r - d/2 = 0 and the step size is that term alone.
    quantizer = DeadZoneLDZCompander(init_deadzone_logit=0.0).double()
    codes = quantizer.codes(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
    assert codes.step_size.item() == 1e-8


@pytest.mark.parametrize("learnable_bit", [True, False])
@pytest.mark.parametrize("learnable_deadzone", [True, False])
def test_only_learnable_logits_receive_gradients(learnable_bit, learnable_deadzone):
    torch.manual_seed(0)
    quantizer = DeadZoneLDZCompander(
        init_bit_logit=0.7,
        init_deadzone_logit=0.7,
        learnable_bit=learnable_bit,
        learnable_deadzone=learnable_deadzone,
    )
    w = torch.randn(50, requires_grad=True)
    quantizer(w).square().sum().backward()
    assert (quantizer.logit_bit.grad is not None) == quantizer.logit_bit.requires_grad == learnable_bit
    assert (quantizer.logit_dz.grad is not None) == quantizer.logit_dz.requires_grad == learnable_deadzone
    for logit in (quantizer.logit_bit, quantizer.logit_dz):
        assert logit.grad is None or (logit.grad.isfinite() & (logit.grad != 0)).all()


@pytest.mark.parametrize("learnable", [True, False])
def test_values_and_gradients_do_not_depend_on_the_sign_of_the_logits_but_for_their_own_sign(learnable):
    torch.manual_seed(0)
    w, g = torch.randn(2, 60)
    results = []
    for sign in (1, -1):
        quantizer = DeadZoneLDZCompander(
            init_bit_logit=sign * 0.6, init_deadzone_logit=sign * 0.8, learnable_bit=learnable
        )
        leaf = w.clone().requires_grad_()
        w_hat = quantizer(leaf)
        w_hat.backward(g)
        bit = quantizer.logit_bit.grad if learnable else torch.zeros(1)
        results.append((w_hat.detach(), leaf.grad, sign * bit, sign * quantizer.logit_dz.grad))
    for plus, minus in zip(*results, strict=True):
        assert torch.equal(plus, minus)


@thorough
@given(
    hnp.arrays(np.float64, st.integers(1, 300), elements=st.floats(-100, 100)),
    st.sampled_from((0.0, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0)),
)
def test_the_range_is_numpys_linear_quantile_of_the_magnitudes(w, q):
    expected = np.quantile(np.abs(w), q, method="linear")
    got = range_quantile(torch.from_numpy(w), q)
    assert got.shape == (1,)
    np.testing.assert_allclose(got.item(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 99, 100, 101, 102, 432, 36_864])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_range_is_the_99_percent_quantile_at_the_sizes_of_real_layers(n, dtype):
    w = torch.from_numpy(np.random.default_rng(n).standard_normal(n)).to(dtype)
    expected = np.quantile(np.abs(w.numpy().astype(np.float64)), 0.99)
    tolerance = 4 * torch.finfo(dtype).eps
    np.testing.assert_allclose(range_quantile(w).item(), expected, rtol=tolerance)


def test_the_range_takes_no_gradient():
    assert not range_quantile(torch.ones(3, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    "kind",
    ["normal", "few values", "all equal", "zeros", "sorted", "largest last", "NaN", "infinite"],
)
def test_the_range_of_a_large_tensor_is_numpys_quantile_too(kind):
    numbers = np.random.default_rng(3)
    w = numbers.normal(size=(256, 128, 3, 3)).astype(np.float32)
    if kind == "few values":
        w = np.round(w)
    elif kind == "all equal":
        w[:] = -0.25
    elif kind == "zeros":
        w[:, 1:] = 0
    elif kind == "sorted":
        w = np.sort(w.ravel()).reshape(w.shape)
    elif kind == "largest last":  # of a number of weights that has no small divisor
        w = np.sort(w.ravel())[-131_101:].reshape(-1, 1, 1, 1)
    elif kind == "NaN":
        w[3, 5] = np.nan
    elif kind == "infinite":
        w[3, 5, 1, 1] = -np.inf
    for layout in (torch.contiguous_format, torch.channels_last):
        got = range_quantile(torch.from_numpy(w).to(memory_format=layout)).item()
        expected = np.quantile(np.abs(w), 0.99) if np.isfinite(w).all() else np.nan
        np.testing.assert_allclose(got, expected, rtol=1e-6)


finite_weights = hnp.arrays(
    np.float32,
    st.integers(1, 80),
    elements=st.one_of(st.just(0.0), st.floats(-10, 10, width=32, allow_subnormal=False)),
)


@thorough
@given(finite_weights, st.sampled_from(BITS), st.floats(-4, 4))
def test_weights_inside_the_dead_zone_become_exactly_zero_and_those_outside_do_not(w, bits, dz):
    quantizer = DeadZoneLDZCompander(fixed_bit_val=bits, init_deadzone_logit=dz, learnable_bit=False)
    expected = oracle(w, bits, quantizer.logit_dz.item())
    magnitude = np.abs(w).astype(np.float64)
    w_hat = quantizer(torch.from_numpy(w)).detach().numpy()
    margin = 16 * np.finfo(np.float32).eps * (expected.r + 1e-8)
    assert (w_hat[magnitude < expected.d / 2 - margin] == 0).all()
    if expected.r > 1e-3:  # far above the 1e-8 in s
        assert (w_hat[magnitude > expected.d / 2 + margin + 1e-8] != 0).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_edge_of_the_dead_zone_itself_is_zero(bits):
    # r = 1 and tanh = 1/2 give d/2 = 1/2 but for the last digit. The weights lie just below and above it.
    quantizer = DeadZoneLDZCompander(fixed_bit_val=bits, learnable_bit=False).double()
    with torch.no_grad():
        quantizer.logit_dz.fill_(math.atanh(0.5))
    edge = torch.tensor([0.5 - 1e-12, 0.5 + 1e-9], dtype=torch.float64)
    w = torch.cat([edge, -edge, torch.ones(200, dtype=torch.float64)])
    w_hat = quantizer(w)[:4]
    assert (w_hat != 0).tolist() == [False, True, False, True]


@thorough
@given(finite_weights, st.sampled_from(BITS), st.floats(-4, 4))
def test_quantized_weights_keep_their_sign_and_order_lie_in_the_range_and_take_2q_plus_1_levels(w, bits, dz):
    quantizer = DeadZoneLDZCompander(fixed_bit_val=bits, init_deadzone_logit=dz, learnable_bit=False)
    expected = oracle(w, bits, quantizer.logit_dz.item())
    w_hat = quantizer(torch.from_numpy(w)).detach().numpy()
    assert ((w_hat == 0) | (np.sign(w_hat) == np.sign(w))).all()
    assert (np.diff(w_hat[np.argsort(w)]) >= 0).all()
    assert np.abs(w_hat).max() <= expected.r * (1 + 1e-5) + 2 * expected.Q * 1e-8
    assert len(np.unique(w_hat)) <= 2 * expected.Q + 1 == 2**bits - 1


@thorough
@given(finite_weights, st.sampled_from(BITS), st.floats(-4, 4))
def test_between_the_dead_zone_and_the_range_the_error_is_at_most_half_a_step_size(w, bits, dz):
    quantizer = DeadZoneLDZCompander(fixed_bit_val=bits, init_deadzone_logit=dz, learnable_bit=False)
    expected = oracle(w, bits, quantizer.logit_dz.item())
    magnitude = np.abs(w)
    between = (magnitude > expected.d / 2 * (1 + 1e-5) + 1e-6) & (magnitude <= expected.r)
    error = np.abs(quantizer(torch.from_numpy(w)).detach().numpy() - w)[between]
    assert (error <= expected.s / 2 + 1e-5 * expected.r + 1e-6).all()


@quick
@given(finite_weights, st.sampled_from(BITS), st.floats(-4, 4))
def test_the_quantizer_is_odd(w, bits, dz):
    quantizer = DeadZoneLDZCompander(fixed_bit_val=bits, init_deadzone_logit=dz, learnable_bit=False)
    assert torch.equal(quantizer(torch.from_numpy(-w)), -quantizer(torch.from_numpy(w)))


@pytest.mark.parametrize("bits", BITS)
def test_a_large_tensor_uses_all_of_its_levels(bits):
    torch.manual_seed(0)
    quantizer = DeadZoneLDZCompander(fixed_bit_val=bits, init_deadzone_logit=1.0, learnable_bit=False)
    assert len(quantizer(torch.randn(20_000)).unique()) == 2**bits - 1


@thorough
@given(finite_weights, st.sampled_from(BITS), st.floats(-4, 4), st.floats(-4, 4), st.booleans())
def test_codes_are_whole_numbers_that_give_the_forward_value_bit_for_bit(w, bits, bit, dz, learnable):
    quantizer = DeadZoneLDZCompander(
        fixed_bit_val=bits, init_bit_logit=bit, init_deadzone_logit=dz, learnable_bit=learnable
    )
    weights = torch.from_numpy(w)
    q, step_size, shift = quantizer.codes(weights)
    assert torch.equal(step_size * q + shift * q.sign(), quantizer(weights))
    assert torch.equal(q, q.round())
    assert q.abs().max() <= 2 ** (quantizer.get_bitwidth().item() - 1) - 1
    assert q.shape == weights.shape and step_size.shape == shift.shape == (1,)
    assert not (q.requires_grad or step_size.requires_grad or shift.requires_grad)


def test_codes_of_known_weights_are_those_worked_out_by_hand():
    # The worked example above, in 3 bits: q = 0, -1, 3; s = 0.2, h = 0.4.
    quantizer = DeadZoneLDZCompander(
        fixed_bit_val=3, init_deadzone_logit=math.atanh(0.5), learnable_bit=False
    )
    q, step_size, shift = quantizer.codes(torch.tensor([0.3, -0.51, 1.01]))
    assert q.tolist() == [0, -1, 3]
    assert step_size.item() == pytest.approx(0.2, abs=1e-6)
    assert shift.item() == pytest.approx(0.4, abs=1e-6)


@pytest.mark.parametrize("learnable", [True, False])
def test_an_all_zero_tensor_stays_zero_with_finite_gradients(learnable):
    quantizer = DeadZoneLDZCompander(init_bit_logit=0.5, init_deadzone_logit=0.5, learnable_bit=learnable)
    w = torch.zeros(4, 3, 3, 3, requires_grad=True)
    w_hat = quantizer(w)
    assert (w_hat == 0).all()
    w_hat.backward(torch.randn(4, 3, 3, 3))
    grads = [w.grad, quantizer.logit_dz.grad] + ([quantizer.logit_bit.grad] if learnable else [])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.7, -3.0])
def test_a_single_weight_is_its_own_range_and_keeps_its_value(bits, value):
    # |w| = r, so q = Q and w_hat = s Q + h = s (Q - 1/2) + d/2 = r.
    quantizer = DeadZoneLDZCompander(fixed_bit_val=bits, init_deadzone_logit=0.5, learnable_bit=False)
    w = torch.tensor([value], requires_grad=True)
    w_hat = quantizer(w)
    assert w_hat.item() == pytest.approx(value, rel=1e-5)
    w_hat.backward(torch.ones(1))
    assert w.grad.item() == 1 and quantizer.logit_dz.grad.isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (10, 64), (8, 4, 3, 3)])
def test_shape_and_dtype_come_back_as_they_went_in(shape, dtype):
    torch.manual_seed(0)
    w = torch.randn(shape).to(dtype).requires_grad_()
    w_hat = DeadZoneLDZCompander()(w)
    assert (w_hat.shape, w_hat.dtype) == (w.shape, w.dtype)
    w_hat.sum().backward()
    assert (w.grad.shape, w.grad.dtype) == (w.shape, w.dtype)


def test_memory_layout_does_not_matter():
    torch.manual_seed(0)
    quantizer = DeadZoneLDZCompander(init_deadzone_logit=0.5)
    w = torch.randn(8, 4, 3, 3)
    expected = quantizer(w)
    assert torch.equal(quantizer(w.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(quantizer(w.transpose(0, 3)), expected.transpose(0, 3))


def test_an_empty_tensor_is_refused_by_name():
    with pytest.raises(ValueError, match=r"empty tensor of shape \(0, 3\)"):
        DeadZoneLDZCompander()(torch.empty(0, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_a_tensor_that_is_not_floating_point_is_refused_by_name(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        DeadZoneLDZCompander()(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("call", ["forward", "codes"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [1, 2, 101, 1000])
def test_a_single_number_that_is_not_finite_is_refused_wherever_it_stands(n, bad, call):
    quantizer = DeadZoneLDZCompander()
    for place in {0, n // 2, n - 1}:
        w = torch.linspace(-1, 1, n)
        w[place] = bad
        with pytest.raises(NotFiniteWeightError, match=rf"shape \({n},\).*NaN or infinity"):
            getattr(quantizer, call)(w)


def test_nan_beside_infinity_is_refused_too():
    with pytest.raises(NotFiniteWeightError, match="NaN or infinity"):
        DeadZoneLDZCompander()(torch.tensor([math.nan, math.inf, -math.inf, 0.0]))


def test_no_other_fault_of_a_tensor_is_taken_for_a_number_that_is_not_finite():
    assert issubclass(NotFiniteWeightError, ValueError)
    for bad in (torch.empty(0), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(ValueError) as error:
            DeadZoneLDZCompander()(bad)
        assert not isinstance(error.value, NotFiniteWeightError)


@pytest.mark.parametrize("name", ["fixed_bit_val", "max_bits"])
@pytest.mark.parametrize("value", [1, 0, -4, 17, 3.5, math.nan, math.inf])
def test_an_impossible_number_of_bits_is_refused_by_its_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}.*2 to 16"):
        DeadZoneLDZCompander(**{name: value})


@pytest.mark.parametrize("name", ["init_bit_logit", "init_deadzone_logit"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_refused_by_its_name_and_value(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}"):
        DeadZoneLDZCompander(**{name: value})


def test_arguments_and_defaults_are_those_of_the_plan():
    parameters = inspect.signature(DeadZoneLDZCompander).parameters
    assert {n: p.default for n, p in parameters.items()} == {
        "fixed_bit_val": 4,
        "max_bits": 8,
        "init_bit_logit": 3.0,
        "init_deadzone_logit": 3.0,
        "learnable_bit": True,
        "learnable_deadzone": True,
    }


def test_the_state_is_the_two_logits_alone():
    state = DeadZoneLDZCompander(init_bit_logit=-1.5, init_deadzone_logit=2.5).state_dict()
    assert {n: t.tolist() for n, t in state.items()} == {"logit_bit": [-1.5], "logit_dz": [2.5]}
    assert all(isinstance(p, nn.Parameter) for p in DeadZoneLDZCompander().parameters())


@thorough
@given(st.floats(-6, 6), st.integers(2, 8))
def test_the_learned_bits_follow_the_formula_and_get_bitwidth_rounds_them(logit, max_bits):
    quantizer = DeadZoneLDZCompander(max_bits=max_bits, init_bit_logit=logit)
    learned, rounded = quantizer.get_learned_bitwidth(), quantizer.get_bitwidth()
    assert learned.shape == rounded.shape == (1,)
    expected = 2 + (max_bits - 2) * abs(math.tanh(logit))
    assert learned.item() == pytest.approx(expected, abs=1e-5)
    assert 2 <= rounded.item() <= max_bits
    assert rounded.item() == np.round(learned.item())


@pytest.mark.parametrize("bits", BITS)
def test_a_fixed_bit_width_is_reported_as_it_is_whatever_the_logit(bits):
    quantizer = DeadZoneLDZCompander(fixed_bit_val=bits, init_bit_logit=0.3, learnable_bit=False)
    assert quantizer.get_bitwidth().tolist() == [bits]
    assert quantizer.get_learned_bitwidth().tolist() == [bits]


def test_bits_are_not_capped_at_the_fixed_value_when_learnable():
    assert DeadZoneLDZCompander(fixed_bit_val=2, max_bits=8, init_bit_logit=6.0).get_bitwidth().item() == 8


def test_the_bit_width_passes_its_gradient_straight_through_the_rounding():
    # d/dt (2 + 6 |tanh t|) = 6 (1 - tanh^2) sign t; at tanh = -1/2: -4.5
    quantizer = DeadZoneLDZCompander(init_bit_logit=-math.atanh(0.5))
    quantizer.get_bitwidth().backward()
    assert quantizer.logit_bit.grad.item() == pytest.approx(-4.5, rel=1e-5)


def test_a_change_of_the_logits_is_seen_by_the_next_call():
    torch.manual_seed(0)
    quantizer = DeadZoneLDZCompander(init_bit_logit=3.0, init_deadzone_logit=3.0)
    w = torch.randn(500)
    before = quantizer(w)
    with torch.no_grad():
        quantizer.logit_bit.fill_(0.01)
        quantizer.logit_dz.fill_(0.5)
    after = quantizer(w)
    assert len(before.unique()) > 3 >= len(after.unique())
    assert (after == 0).sum() > (before == 0).sum()


def test_bfloat16_autocast_changes_neither_the_value_nor_the_gradients():
    torch.manual_seed(0)
    w, g = torch.randn(2, 8, 4, 3, 3)
    results = []
    for enabled in (False, True):
        quantizer = DeadZoneLDZCompander(init_bit_logit=0.8, init_deadzone_logit=0.7)
        leaf = w.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            w_hat = quantizer(leaf)
            codes = quantizer.codes(leaf)
        w_hat.backward(g)
        results.append((w_hat.detach(), leaf.grad, quantizer.logit_bit.grad, quantizer.logit_dz.grad, *codes))
    for plain, autocast in zip(*results, strict=True):
        assert plain.dtype == autocast.dtype == torch.float32
        assert torch.equal(plain, autocast)


def test_two_calls_give_the_same_bits_draw_nothing_and_leave_the_weights_alone():
    torch.manual_seed(0)
    quantizer = DeadZoneLDZCompander(init_bit_logit=0.8, init_deadzone_logit=0.7)
    w = torch.randn(1000)
    kept, state = w.clone(), torch.get_rng_state()
    assert torch.equal(quantizer(w), quantizer(w))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(w, kept)
    assert torch.equal(quantizer.eval()(w), quantizer.train()(w))
