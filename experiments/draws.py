"""The random generators that a network or a quantizer may draw from: torch's, numpy's and Python's own.

The order and the augmentation of images do not depend on them, only on the seed and the epoch.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_draws(seed: int) -> None:
    """Seed every generator."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_states() -> dict[str, Any]:
    """The states of all generators; that of a device is None in a process that does not use it."""
    numpys: Any = np.random.get_state()
    name, key, *rest = numpys
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "numpy": (name, key.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set the generators to states that `random_states` returned."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    if torch.backends.mps.is_available() and states["mps"] is not None:
        torch.mps.set_rng_state(states["mps"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def drawn_since(states: dict[str, Any]) -> bool:
    """Whether any generator has moved on from these states."""

    def moved(now: Any, then: Any) -> bool:
        return not torch.equal(now, then) if isinstance(then, torch.Tensor) else now != then

    return any(moved(state, states[name]) for name, state in random_states().items())


@contextlib.contextmanager
def kept_draws() -> Iterator[None]:
    """Let what is done within this context take no draw from those that come after it."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Let a pass draw the random numbers that every other pass within this context draws, as dropout does."""
    with kept_draws():
        seed_draws(0)
        yield
