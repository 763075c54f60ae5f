"""Codes that go to and fro are frozen where they usually are, those that go one way are not."""

import math

import numpy as np
import pytest
import torch
from linears import linear

from factorpack.nn.freezing import BEGIN, LEAST, MEMORY, MOST, SHORTEST, Freezing, limit_at
from factorpack.nn.trainable import TrainableModel, TrainableWeight

NAME = "0.codes"
TURNING = 3
"""Which of the codes goes to and fro."""


def network() -> tuple[TrainableModel, TrainableWeight, torch.Tensor]:
    """A linear layer of eight codes, all 2."""
    model = linear(np.full((1, 8), 2, np.int32))
    latent = model.trained()["weight"]
    assert isinstance(latent, TrainableWeight)
    assert latent.codes is not None
    return model, latent, latent.codes


def turned(model: TrainableModel, codes: torch.Tensor, freezing: Freezing) -> None:
    """A hundred steps in which one code turns every tenth one and another changes once."""
    with torch.no_grad():
        for step in range(0, 100, 5):
            codes[0, TURNING] = 2.4 + 0.2 * (step // 5 % 2)
            if step == 50:
                codes[0, 0] = 3.0
            freezing.take(model.resting(), 5)


def test_codes_that_turn_often_are_frozen_where_they_usually_are() -> None:
    model, _, codes = network()
    freezing = Freezing(model)
    turned(model, codes, freezing)
    freezing.freeze(0.05, {NAME: torch.full((1, 8), 2.3)})
    assert freezing.part() == 1 / 8
    assert codes[0, TURNING].item() == 2.0
    assert codes[0, 0].item() == 3.0


def test_frozen_codes_have_no_gradient() -> None:
    model, _, codes = network()
    freezing = Freezing(model)
    turned(model, codes, freezing)
    freezing.freeze(0.05, model.resting())
    model(torch.ones(1, 8)).sum().backward()
    assert codes.grad is not None
    before = codes.grad.clone()
    freezing.still()
    assert codes.grad[0, TURNING] == 0 != before[0, TURNING]
    others = [index for index in range(8) if index != TURNING]
    assert torch.equal(codes.grad[0, others], before[0, others])


def test_at_the_end_one_change_is_enough_and_none_is_not() -> None:
    model, _, codes = network()
    freezing = Freezing(model)
    with torch.no_grad():
        codes[0, 0] = 3.0
    freezing.take(model.resting(), 5)
    freezing.freeze(limit_at(1.0, SHORTEST), {NAME: torch.full((1, 8), 2.0)})
    assert freezing.part() == 1 / 8
    assert codes[0, 0].item() == 2.0


def test_a_change_of_the_step_is_no_change_of_cells() -> None:
    model, latent, codes = network()
    freezing = Freezing(model)
    with torch.no_grad():
        latent.octaves.fill_(1 / 64)
        codes[0, 0] = 3.2
    freezing.take(model.resting(), 5)
    freezing.freeze(0.0, model.resting())
    assert freezing.part() == 1 / 8


def test_codes_that_are_moved_have_not_turned() -> None:
    model, _, codes = network()
    freezing = Freezing(model)
    with torch.no_grad():
        codes.fill_(1.0)
    freezing.begin(model.resting())
    freezing.take(model.resting(), 5)
    freezing.freeze(0.0, model.resting())
    assert freezing.part() == 0


def test_a_state_is_taken_up() -> None:
    model, _, codes = network()
    freezing = Freezing(model)
    turned(model, codes, freezing)
    freezing.freeze(0.05, model.resting())
    other = Freezing(network()[0])
    other.take_up(freezing.state())
    assert other.part() == freezing.part() > 0
    other.take(model.resting(), 5)
    other.freeze(0.005, model.resting())
    assert other.part() == 2 / 8


@pytest.mark.parametrize(("done", "limit"), [(0, math.inf), (BEGIN, MOST), (1, LEAST), (1.1, LEAST)])
def test_the_limit_falls_in_the_second_half(done: float, limit: float) -> None:
    assert limit_at(done, SHORTEST) == pytest.approx(limit)
    assert LEAST < MEMORY, "one change is enough at the end"
    assert limit_at(done, SHORTEST - 1) == math.inf
