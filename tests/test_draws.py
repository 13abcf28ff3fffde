"""The random generators: seeded, noted and put back together."""

import random

import numpy as np
import pytest
import torch

from experiments.draws import (
    drawn_since,
    kept_draws,
    random_states,
    same_draws,
    seed_draws,
    set_random_states,
)


def draw() -> tuple[float, ...]:
    """One number of each generator, and one that numpy keeps the other half of a pair of."""
    return torch.rand(()).item(), float(np.random.rand()), float(np.random.randn()), random.random()


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
def test_a_seed_is_every_generators(seed):
    seed_draws(seed)
    first = draw()
    draw()
    seed_draws(seed)
    assert draw() == first
    seed_draws(seed - 1 if seed else 1)
    assert not set(draw()) & set(first)


@pytest.mark.parametrize("one", [lambda: torch.rand(1), np.random.rand, random.random])
def test_one_draw_of_any_generator_is_noticed(one):
    states = random_states()
    assert not drawn_since(states)
    one()
    assert drawn_since(states)


def test_states_bring_back_what_came_after_them():
    seed_draws(3)
    draw()
    states = random_states()
    first = draw(), draw()
    set_random_states(states)
    assert (draw(), draw()) == first


def test_what_is_drawn_within_leaves_what_comes_after_alone():
    seed_draws(4)
    first = draw()
    seed_draws(4)
    with pytest.raises(KeyError), kept_draws():
        draw()
        raise KeyError
    assert draw() == first
    with same_draws():
        one = draw()
    with same_draws():
        assert draw() == one


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_devices_own_generator_is_noted_and_put_back(monkeypatch, device):
    at = [torch.tensor([1], dtype=torch.uint8)]
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: device == "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: device == "cuda")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: device == "mps")
    monkeypatch.setattr(f"torch.{device}.get_rng_state", lambda: at[0])
    monkeypatch.setattr(f"torch.{device}.set_rng_state", lambda state: at.append(state))
    with kept_draws():
        pass
    assert len(at) == 2 and at[1] is at[0]
