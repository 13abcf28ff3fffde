"""Schedules of the coefficient and the rates: their points, bounds and monotony, and what they refuse."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experiments.schedules import cosine_anneal, linear_warmup, warmed_up

quick = settings(max_examples=200, deadline=None, derandomize=True)
epochs = st.floats(0, 300)
lengths = st.one_of(st.integers(0, 100), st.floats(0, 100))
totals = st.integers(1, 300)


def test_linear_warmup_has_the_points_of_the_plan():
    f = linear_warmup(5, 5)
    points = [f(epoch, 20) for epoch in range(20)]
    expected = [0, 0, 0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert points == pytest.approx(expected)


@quick
@given(lengths, st.floats(0.01, 100), totals)
def test_linear_warmup_is_0_up_to_the_delay_one_half_midway_and_1_at_the_end_of_the_ramp(delay, ramp, total):
    f = linear_warmup(delay, ramp)
    assert f(0, total) == 0
    assert f(delay, total) == 0
    assert f(delay + ramp / 2, total) == pytest.approx(0.5, abs=1e-6)
    assert f(delay + ramp, total) == pytest.approx(1, abs=1e-6)
    assert f(delay + ramp + 1, total) == 1


@quick
@given(lengths, lengths, epochs, epochs, totals)
def test_linear_warmup_never_falls_and_stays_between_0_and_1(delay, ramp, first, second, total):
    f = linear_warmup(delay, ramp)
    before, after = sorted((first, second))
    assert 0 <= f(before, total) <= f(after, total) <= 1


@quick
@given(lengths, lengths, epochs, totals, totals)
def test_linear_warmup_does_not_depend_on_the_number_of_epochs(delay, ramp, epoch, total, other):
    f = linear_warmup(delay, ramp)
    assert f(epoch, total) == f(epoch, other)


@quick
@given(lengths, epochs)
def test_a_ramp_of_0_is_a_step_at_the_delay(delay, epoch):
    assert linear_warmup(delay, 0)(epoch, 20) == (1 if epoch >= delay else 0)
    assert linear_warmup(delay, 0)(delay, 20) == 1


def test_a_warmup_without_delay_starts_at_0():
    assert [linear_warmup(0, 4)(epoch, 20) for epoch in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_cosine_anneal_has_the_points_of_half_a_cosine():
    # From epoch 10 to 22, a twelfth of pi each: cos 0, 60, 90, 120 and 180 degrees.
    f = cosine_anneal(10)
    points = [f(epoch, 22) for epoch in (0, 9, 10, 14, 16, 18, 22, 30)]
    assert points == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0, 0])


@quick
@given(lengths, epochs, epochs, totals)
def test_cosine_anneal_never_rises_and_stays_between_0_and_1(delay, first, second, total):
    f = cosine_anneal(delay)
    before, after = sorted((first, second))
    assert 1 >= f(before, total) >= f(after, total) - 1e-12
    assert f(after, total) >= 0


@quick
@given(lengths, epochs, totals)
def test_cosine_anneal_is_1_up_to_the_delay_and_0_from_the_end_on(delay, epoch, total):
    f = cosine_anneal(delay)
    assert f(min(epoch, delay), total) == 1
    if total > delay:
        assert f(total, total) == f(total + epoch, total) == 0


@quick
@given(lengths, totals, st.floats(0, 1))
def test_cosine_anneal_is_point_symmetric_about_its_middle(delay, total, share):
    assume(total > delay + 0.01)
    f, half = cosine_anneal(delay), (total - delay) / 2
    middle = delay + half
    assert f(middle - share * half, total) + f(middle + share * half, total) == pytest.approx(1, abs=1e-6)


def test_a_warmup_of_the_rates_climbs_in_equal_steps_and_starts_above_0():
    f = warmed_up(3, lambda epoch, total: 0.8)
    assert [f(epoch, 20) for epoch in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


@quick
@given(lengths, epochs, totals)
def test_a_warmup_changes_nothing_after_it_and_never_raises_a_rate(warmup, epoch, total):
    f, plain = warmed_up(warmup, cosine_anneal(0)), cosine_anneal(0)
    assert f(warmup + epoch, total) == plain(warmup + epoch, total)
    assert f(epoch, total) <= plain(epoch, total)
    assert warmed_up(0, plain)(epoch, total) == plain(epoch, total)


@pytest.mark.parametrize("schedule", [linear_warmup(5, 5), cosine_anneal(5), warmed_up(5, cosine_anneal(0))])
def test_a_schedule_gives_plain_floats_for_whole_epochs(schedule):
    assert all(type(schedule(epoch, 20)) is float for epoch in range(22))


@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, -math.inf])
def test_a_delay_or_ramp_that_is_negative_or_not_finite_is_refused_by_name_and_value(value):
    with pytest.raises(ValueError, match=f"delay is {value}"):
        linear_warmup(value, 5)
    with pytest.raises(ValueError, match=f"ramp is {value}"):
        linear_warmup(5, value)
    with pytest.raises(ValueError, match=f"delay is {value}"):
        cosine_anneal(value)
    with pytest.raises(ValueError, match=f"warmup is {value}"):
        warmed_up(value, cosine_anneal(0))
