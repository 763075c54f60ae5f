"""The rank by variational Bayes: what was planted is found, and what minimises the free energy step by step agrees."""

import numpy as np
import pytest

from factorpack.solve.vbmf import rank_of

SHAPES = [(40, 60), (60, 40), (50, 50), (16, 144), (200, 20), (64, 576)]


def powers_of(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False) ** 2


def rank(matrix: np.ndarray) -> int:
    return rank_of(powers_of(matrix), matrix.shape)


def planted(shape: tuple[int, int], rank: int, strength: float, seed: int = 0) -> np.ndarray:
    """Noise of variance 1 and, in it, `rank` orthogonal directions of γ = `strength` times noise's largest one."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((side, rank)))[0] for side in shape)
    largest = sum(side**0.5 for side in shape)
    return strength * largest * left @ right.T + rng.standard_normal(shape)


@pytest.mark.parametrize("strength", [1.7, 5, 1e3, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_planted_rank_is_found(shape: tuple[int, int], strength: float) -> None:
    for wanted in (1, 2, 5):
        assert rank(planted(shape, wanted, strength)) == wanted
        assert rank(planted(shape, wanted, strength).T) == wanted


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_alone_has_no_rank(shape: tuple[int, int]) -> None:
    for seed in range(5):
        assert rank(np.random.default_rng(seed).standard_normal(shape)) == 0
    # What is weaker than noise's largest direction cannot be told from it.
    assert rank(planted(shape, 3, 0.3)) == 0


@pytest.mark.parametrize("scale", [1e-150, 1e-9, 3.0, 1e9, 1e150])
def test_the_unit_does_not_matter(scale: float) -> None:
    assert rank_of(powers_of(planted((30, 45), 4, 1.7)) * scale, (30, 45)) == 4


def test_what_is_exactly_of_low_rank_has_that_rank() -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        assert rank(rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))) == 3
    assert rank(np.full((5, 7), 0.3)) == 1


def test_a_square_matrix_has_less_than_half_its_side() -> None:
    rng = np.random.default_rng(0)
    for kept in range(1, 12):
        assert rank(rng.standard_normal((12, kept)) @ rng.standard_normal((kept, 12))) <= 5


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 9), (9, 1), (2, 2), (6, 6), (4, 7)], ids=str)
def test_nothing_stands_out_of_matrices_with_nothing_in_them(shape: tuple[int, int]) -> None:
    assert rank(np.zeros(shape)) == 0
    assert rank(np.eye(*shape)) == 0
    if min(shape) == 1:
        assert rank(np.ones(shape)) == 0


def test_powers_beyond_the_shorter_side_and_below_zero_are_rounding() -> None:
    powers = powers_of(planted((8, 30), 2, 5.0))
    assert rank_of(np.concatenate([powers, [1e-12, 0.0, -1e-12]]), (8, 30)) == rank_of(powers, (8, 30)) == 2
    low = powers.copy()
    low[3:] = [1e-17, 0.0, -1e-17, -1e-16, -1e-15]
    assert rank_of(low, (8, 30)) == 3


def slow_rank(matrix: np.ndarray) -> int:
    """The same from the free energy itself, minimised over a dense grid of posteriors and of noise variances.

    A direction with posterior means a, b and variances v, w of its M and L entries, priors of variance a²/M + v and
    b²/L + w, which are the best, adds to twice the free energy, with A = a² / (M·v) and B = b² / (L·w),

        M·log(1 + A) + L·log(1 + B) + (−2·a·b·γ + a²b²·(1 + 1/A)·(1 + 1/B)) / σ²

    and the best a·b makes the last term −γ²/σ² · A/(1 + A) · B/(1 + B).
    """
    short, long = sorted(matrix.shape)
    powers = powers_of(matrix)
    grid = np.concatenate([[0.0], np.geomspace(1e-2, 1e4, 150)])
    logarithms = long * np.log1p(grid)[:, None] + short * np.log1p(grid)
    shares = np.outer(grid / (1 + grid), grid / (1 + grid))
    best, found = np.inf, -1
    for noise in np.geomspace(powers.sum() * 1e-3, powers.sum(), 200) / (short * long):
        gains = np.array([(logarithms - power / noise * shares).min() for power in powers])
        energy = short * long * np.log(noise) + powers.sum() / noise + gains.sum()
        if energy < best:
            best, found = energy, int((gains < 0).sum())
    return found


@pytest.mark.parametrize("shape", [(5, 7), (6, 6), (9, 4)], ids=str)
def test_a_slow_minimisation_of_the_free_energy_agrees(shape: tuple[int, int]) -> None:
    found = set()
    for seed, (wanted, strength) in enumerate([(1, 1.3), (2, 1.6), (2, 3.0), (3, 2.0)]):
        # Spectra that fall off, as those of weights, and with nothing planted in them.
        matrix = planted(shape, wanted, strength, seed) * np.geomspace(1, 0.2, shape[1])
        assert rank(matrix) == slow_rank(matrix)
        found.add(rank(matrix))
    assert len(found) > 1
