"""Schedules of coefficients and rates: f(epoch, total_epochs) -> a factor in [0, 1]. Epochs count from 0."""

import math
from collections.abc import Callable

Schedule = Callable[[float, float], float]


def _check(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}; expected a number of epochs, 0 or more")


def linear_warmup(delay: float, ramp: float) -> Schedule:
    """0 before `delay` (epochs), then linearly up to 1 over `ramp` epochs, then 1.

    >>> [linear_warmup(5, 5)(epoch, 20) for epoch in (0, 5, 6, 10, 19)]
    [0.0, 0.0, 0.2, 1.0, 1.0]

    A ramp of 0 is a step: 1 from `delay` on. Raises: ValueError if either is negative or not finite.
    """
    _check("delay", delay)
    _check("ramp", ramp)

    def factor(epoch: float, total_epochs: float) -> float:
        if epoch < delay:
            return 0.0
        return min((epoch - delay) / ramp, 1.0) if ramp else 1.0

    return factor


def warmed_up(warmup: float, schedule: Schedule) -> Schedule:
    """A schedule whose first epochs, those before `warmup`, get a share of it that grows in equal steps.

    >>> [round(warmed_up(3, cosine_anneal(0))(epoch, 1000), 2) for epoch in (0, 1, 2, 3, 4)]
    [0.25, 0.5, 0.75, 1.0, 1.0]

    Raises: ValueError if `warmup` (epochs) is negative or not finite.
    """
    _check("warmup", warmup)

    def factor(epoch: float, total_epochs: float) -> float:
        return min((epoch + 1) / (warmup + 1), 1.0) * schedule(epoch, total_epochs)

    return factor


def cosine_anneal(delay: float) -> Schedule:
    """1 up to `delay` (epochs), then half a cosine down to 0 at `total_epochs`.

    >>> [round(cosine_anneal(10)(epoch, 20), 3) for epoch in (0, 10, 15, 20)]
    [1.0, 1.0, 0.5, 0.0]

    Raises: ValueError if `delay` is negative or not finite.
    """
    _check("delay", delay)

    def factor(epoch: float, total_epochs: float) -> float:
        if epoch <= delay:
            return 1.0
        if epoch >= total_epochs:
            return 0.0
        return 0.5 * (1 + math.cos(math.pi * (epoch - delay) / (total_epochs - delay)))

    return factor
