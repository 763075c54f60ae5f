import itertools

import numpy as np
import pytest

from factorpack.factors import FactoredVector
from factorpack.solve.vectors import loss, quantise


def values(size: int = 400, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def worst(vector: FactoredVector, wanted: np.ndarray) -> float:
    return float(np.abs(vector.tensor().astype(np.float64) - wanted).max(initial=0))


def test_loss_is_half_the_curvature_times_the_squared_error() -> None:
    wanted = values(6).reshape(2, 3)
    curvature = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = quantise(wanted, curvature, 1e-2)
    total = 0.0
    for index in np.ndindex(2, 3):
        total += 0.5 * float(curvature[index]) * (float(wanted[index]) - float(found.tensor()[index])) ** 2
    assert total > 0
    assert loss(found, wanted, curvature) == pytest.approx(total, rel=1e-9)


def test_more_curvature_asks_for_finer_grids() -> None:
    wanted = values()
    errors = [worst(quantise(wanted, np.full_like(wanted, c), 1e-3), wanted) for c in (1.0, 10.0, 100.0, 1e3)]
    assert all(later < 0.6 * earlier for earlier, later in itertools.pairwise(errors))


def test_a_higher_rate_asks_for_coarser_grids() -> None:
    wanted, curvature = values(), np.ones(400, np.float32)
    found = [quantise(wanted, curvature, rate) for rate in (1e-6, 1e-4, 1e-2)]
    spans = [int(np.ptp(vector.integers)) for vector in found]
    assert spans[0] > 5 * spans[1] > 25 * spans[2]
    losses = [loss(vector, wanted, curvature) for vector in found]
    assert losses == sorted(losses)


def test_the_step_is_where_a_bit_costs_what_it_saves() -> None:
    """Steps half and twice as wide cost more, with bits counted as log2 of the levels."""
    wanted, curvature, rate = values(20000), np.full(20000, 3.0, np.float32), 1e-3
    found = quantise(wanted, curvature, rate)
    step = worst(found, wanted) * 2

    def cost(width: float) -> float:
        return 0.5 * 3.0 * width**2 / 12 - rate * np.log2(width)

    assert cost(step) < min(cost(step / 1.3), cost(step * 1.3))


@pytest.mark.parametrize("curvature", [None, 0.0])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("positive", [False, True])
def test_an_unknown_curvature_gets_the_finest_grid(curvature: float | None, scale: float, positive: bool) -> None:
    wanted = (values() * np.float32(scale)).astype(np.float32)
    if positive:
        wanted = np.abs(wanted)
    known = None if curvature is None else np.full_like(wanted, curvature)
    for rate in (0.0, 1e9):
        assert worst(quantise(wanted, known, rate), wanted) <= np.abs(wanted).max() / 2**15


def test_no_rate_is_no_loss_to_speak_of() -> None:
    wanted = values()
    assert worst(quantise(wanted, np.ones_like(wanted), 0.0), wanted) <= np.abs(wanted).max() / 2**15


def test_no_grid_is_coarser_than_three_bits() -> None:
    wanted = values()
    assert worst(quantise(wanted, np.full_like(wanted, 1e-9), 1e3), wanted) <= np.abs(wanted).max() / 4


def test_positive_values_of_many_octaves_get_a_logarithmic_grid() -> None:
    """Running variances: what counts is each one's relative error."""
    wanted = np.exp(4 * values()).astype(np.float32)
    curvature = (1 / wanted.astype(np.float64) ** 2).astype(np.float32)
    found = quantise(wanted, curvature, 1e-4)
    assert found.logarithmic
    assert (found.tensor() > 0).all()
    # As fine as λ asks for: steps of 0.06 octaves, so at most half of them, and no finer than two thirds.
    assert 0.01 < np.abs(np.log(found.tensor() / wanted)).max() < 0.021
    fine = quantise(wanted, curvature, 1e-9)
    assert np.abs(np.log(fine.tensor() / wanted)).max() < 0.006


def test_values_that_are_not_all_positive_get_a_uniform_grid() -> None:
    wanted = np.exp(4 * values()).astype(np.float32)
    for wrong in (0.0, -1.0):
        wanted[7] = wrong
        assert not quantise(wanted, np.ones_like(wanted), 1e-4).logarithmic


def test_entries_lie_around_zero_once_the_offset_is_taken_off() -> None:
    wanted = 100 + values()
    found = quantise(wanted, np.ones_like(wanted), 1e-4)
    assert abs(int(np.median(found.integers))) <= 1
    assert worst(found, wanted) < 0.1


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 3, 1), (2, 2)])
@pytest.mark.parametrize("known", [False, True])
def test_zeros_and_every_shape_come_back(shape: tuple[int, ...], known: bool) -> None:
    curvature = np.ones(shape, np.float32) if known else None
    for rate in (0.0, 1.0):
        found = quantise(np.zeros(shape, np.float32), curvature, rate)
        assert found.shape == shape
        assert found.tensor().shape == shape
        assert not found.tensor().any()


@pytest.mark.parametrize("value", [3.7, -3.7, 1e-12, 2e12])
@pytest.mark.parametrize("curvature", [None, 1e6])
def test_a_scalar_keeps_its_value(value: float, curvature: float | None) -> None:
    wanted = np.array(value, np.float32)
    known = None if curvature is None else np.array(curvature / value**2, np.float32)
    found = quantise(wanted, known, 1e-3)
    assert found.tensor().shape == ()
    assert float(found.tensor()) == pytest.approx(value, rel=0.02)
