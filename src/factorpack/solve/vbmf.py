"""The rank of a matrix in noise by empirical variational Bayesian matrix factorisation, in closed form.

Letters: L the shorter and M the longer side, α = L / M, γ singular values, σ² the variance of the noise.

The matrix is taken for B·Z and independent Gaussian noise. The columns of B and the lines of Z have Gaussian priors,
whose variances, like σ², are those of the least free energy, over posteriors in which B and Z are independent. These
fall apart into one problem a singular direction. With

    x = γ² / (M·σ²)    and    τ, the larger root of    x = (1 + τ)·(1 + α / τ),

keeping a direction changes the free energy by M/2 · (log(1 + τ) + α·log(1 + τ / α) − τ), which is below zero where x is
above one threshold, whatever the matrix. σ² alone is then left to search for: it makes

    Σ x + L·log σ² + Σ min(0, log(1 + τ) + α·log(1 + τ / α) − τ)

least (Nakajima, Sugiyama, Babacan & Tomioka 2013, JMLR 14; in this form Nakajima, Tomioka, Sugiyama & Babacan 2015,
JMLR 16).
"""

import math
from collections.abc import Sequence

import numpy as np

from factorpack._shapes import Float64

POINTS = (512, 32, 32)
"""Noise variances that are tried, evenly in their log: at first over the whole range, then around the best one."""


def _threshold(alpha: float) -> float:
    """The τ above which a direction is kept: the zero of log(1 + τ) + α·log(1 + τ / α) − τ that is not at 0.

    log(1 + τ) − τ/2 has its own zero at 2.51; the other half is the same of τ / α. Theirs is between these.
    """
    low, high = 2.5 * alpha, 2.6
    for _ in range(60):
        middle = math.sqrt(low * high)
        costs = math.log1p(middle) + alpha * math.log1p(middle / alpha) - middle > 0
        low, high = (middle, high) if costs else (low, middle)
    return high


def _energy(noise: float, powers: Float64[np.ndarray, " L"], alpha: float, least: float) -> float:
    """2/M of the free energy at σ² = `noise`, less what does not depend on it; `powers` are γ² / M.

    Directions with x above `least` are kept.
    """
    x = powers / noise
    dropped, kept = x[x <= least], x[x > least] - (1 + alpha)
    tau = 0.5 * (kept + np.sqrt(kept * kept - 4 * alpha))
    # x − τ without the difference of two large numbers.
    rest = 1 + alpha + alpha / tau
    change = np.log1p(tau) + alpha * np.log1p(tau / alpha)
    return float(dropped.sum() + rest.sum() + change.sum()) + len(powers) * math.log(noise)


def _noise(powers: Float64[np.ndarray, " L"], alpha: float, least: float) -> float:
    """The σ² of the least free energy; `powers`, γ² / M, are the largest first.

    The energy is stationary where the x of dropped directions sum up to L − k − α·Σ(1 + 1/τ) over the k kept ones. A
    positive sum needs k < L / (1 + α), so that no σ² is the best at which more than that would be kept, or which is
    below the mean of what that many leave.
    """
    most = math.ceil(len(powers) / (1 + alpha)) - 1
    # Of a matrix of exactly low rank the energy has no minimum: no noise is the best. What rounding leaves is none.
    rounding = len(powers) * np.finfo(np.float64).eps * powers[0]
    low, high = max(powers[most] / least, powers[most:].mean(), rounding), powers.mean()
    best = high
    for points in POINTS:
        # The energy has several minima: each singular value that is kept or dropped makes a bend.
        tried: Sequence[float] = np.geomspace(low, high, points).tolist()
        at = int(np.argmin([_energy(noise, powers, alpha, least) for noise in tried]))
        low, best, high = tried[max(at - 1, 0)], tried[at], tried[min(at + 1, points - 1)]
    return float(best)


def rank_of(powers: Float64[np.ndarray, " k"], shape: tuple[int, int]) -> int:
    """How many singular directions of a matrix are signal rather than noise of unknown variance.

    `powers` are the squared singular values, the largest first, of a matrix of `shape`, in any unit; those beyond the
    shorter side are zero and are left out. 0 where nothing stands out or there is nothing; always below
    L / (1 + L/M), half the side of a square matrix. Source: see the head of this module.
    """
    short, long = sorted(shape)
    powers = powers[:short]
    assert len(powers) == short, f"{len(powers)} squared singular values of a matrix {shape}"
    if not short or not powers[0] > 0:
        return 0
    powers = np.maximum(powers / powers[0], 0) / long
    alpha = short / long
    tau = _threshold(alpha)
    least = (1 + tau) * (1 + alpha / tau)
    return int((powers > least * _noise(powers, alpha, least)).sum())
