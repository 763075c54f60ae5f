"""Where latents usually are: running means of what they stand for."""

import numpy as np
import pytest
import torch
from linears import linear

from factorpack.factors import Codes, FactoredWeight
from factorpack.nn.averages import LEAST_SPAN, SPAN, Averages
from factorpack.nn.trainable import TrainableModel

CODES, LEVELS, OCTAVES = "0.codes", "1.levels", "0.octaves"


def network() -> TrainableModel:
    """A linear layer of zeros."""
    return linear(np.zeros((4, 8), np.int32))


def latents(model: TrainableModel) -> dict[str, torch.Tensor]:
    return {name: latent.detach().clone() for name, latent in model.latents.named_parameters()}


def go(model: TrainableModel, to: float, octaves: float = 0.0) -> None:
    with torch.no_grad():
        for name, latent in model.latents.named_parameters():
            latent.fill_(octaves if name == OCTAVES else to)


def codes_of(model: TrainableModel) -> np.ndarray:
    stored = model.factored()["weight"]
    assert isinstance(stored, FactoredWeight)
    assert isinstance(stored.codes, Codes)
    return stored.codes.integers


@pytest.mark.parametrize(("usual", "other", "expected"), [(0.52, 0.1, 1), (0.48, 1.4, 0)])
def test_a_code_is_where_it_was_most_of_the_time(usual: float, other: float, expected: int) -> None:
    model = network()
    averages = Averages(model)
    codes = dict(model.latents.named_parameters())[CODES]
    for step in range(1, 1201):
        with torch.no_grad():
            codes.fill_(other if step % 10 in (0, 3, 6) else usual)
        averages.take(model.resting(), step, 1)
    # The mean of the latents themselves is in the other cell.
    assert round(0.7 * usual + 0.3 * other) != expected
    with averages.in_place():
        assert (codes_of(model) == expected).all()


def test_before_anything_is_taken_in_it_is_the_file() -> None:
    model = network()
    before = latents(model)
    with Averages(model).in_place():
        for name, latent in latents(model).items():
            assert torch.equal(latent, before[name]), name


@pytest.mark.parametrize(("step", "span"), [(5, LEAST_SPAN), (1000, 100.0), (50_000, SPAN)])
def test_a_mean_goes_over_more_steps_the_longer_it_lasts(step: int, span: float) -> None:
    model = network()
    averages = Averages(model)
    go(model, 4.0, octaves=1.0)
    for _ in range(3):
        averages.take(model.resting(), step, 5)
    for name, expected in ((CODES, 4.0), (LEVELS, 4.0), (OCTAVES, 1.0)):
        mean = averages.state()[name]
        torch.testing.assert_close(mean, torch.full_like(mean, expected * (1 - (1 - 5 / span) ** 3)))


def test_after_it_the_network_is_where_it_was() -> None:
    model = network()
    averages = Averages(model)
    go(model, 1.3)
    found = latents(model)

    def stopped() -> None:
        with averages.in_place():
            assert not codes_of(model).any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    for name, latent in latents(model).items():
        assert torch.equal(latent, found[name]), name


def test_means_are_kept_and_taken_up() -> None:
    model = network()
    averages = Averages(model)
    go(model, 2.0)
    averages.keep()
    go(model, 3.0)
    other = Averages(model)
    other.take_up(averages.state())
    other.become()
    assert (codes_of(model) == 2).all()
    other.take(model.resting(), 1, 5)
    assert torch.equal(averages.state()[CODES], torch.full((4, 8), 2.0))
