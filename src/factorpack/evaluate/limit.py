"""The distance to the Gaussian limit: the bits that the rate-distortion function of a Gaussian asks for a loss.

Letters: m outputs, n inputs of one group, g groups.

The rows of a weight are modelled as independent zero-mean Gaussian vectors, their coefficients in the eigenbasis
of the second moments H = V·diag(h)·Vᵀ as independent too. The metric of row o is r_o·H, so that coefficient i of
that row has the variance s_oi = r_o · h_i · q_i in the metric, where q_i is the mean of (Vᵀw_o)_i² over the rows
of the group. Reverse water-filling then gives the fewest bits for a distortion D, all components together:

    Σ max(0, ½·log₂(s / θ))  with the level θ at which  Σ min(s, θ) = D

(Cover & Thomas, Elements of Information Theory, 2nd edition, section 10.3.3). D is twice a layer's loss.

A reference for comparing forms, no bound for given weights: trained weights are not Gaussian; correlations between
the coefficients of a row and between rows go unused, so that a form with a basis along the outputs may go below it;
V, q and r are known to it for nothing. All rows of a group share q: where rows with large weights count little, the
sum of all s is not the power of the weight itself. Where eigenvalues of H repeat, V and with it q are one choice of
many; with no moments H is the identity, V too, and q are the mean powers of the columns.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from factorpack._shapes import Float64, Integer
from factorpack.errors import MismatchError
from factorpack.solve.layer import Layer


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """Variances r_o · p_i of one group: `rows` r (rows,) and `powers` p (k,) ascending, all above zero.

    They are kept as factors: sums over the components at one side of a level need no product (rows, k).
    """

    rows: Float64[np.ndarray, " rows"]
    powers: Float64[np.ndarray, " k"]

    @cached_property
    def _sums(self) -> Float64[np.ndarray, " bounds"]:
        """Sums of the first 0..k powers."""
        return np.concatenate([[0.0], np.cumsum(self.powers)])

    @property
    def total(self) -> float:
        return float(self.rows.sum() * self._sums[-1])

    def _cuts(self, level: float) -> Integer[np.ndarray, " rows"]:
        """How many components of each row are not above `level`."""
        return np.searchsorted(self.powers, level / self.rows, side="right")

    def split(self, level: float) -> tuple[float, int]:
        """The variance of the components that are not above `level`, and the number of those that are."""
        cuts = self._cuts(level)
        return float(self.rows @ self._sums[cuts]), int((len(self.powers) - cuts).sum())

    def bits(self, level: float) -> float:
        """Σ ½·log₂(s / level) over the components above `level`."""
        cuts = self._cuts(level)
        tails = np.concatenate([np.cumsum(np.log2(self.powers)[::-1])[::-1], [0.0]])
        above = len(self.powers) - cuts
        return 0.5 * float(tails[cuts].sum() + above @ (np.log2(self.rows) - math.log2(level)))


def _spectra(layer: Layer) -> list[_Spectrum]:
    """One a group.

    Raises MismatchError where the metric is not for the layer's matrix.
    """
    moments, row_weights = layer.metric.moments, layer.metric.row_weights
    outputs, inputs = layer.tiling.matrix_shape
    groups = layer.tiling.groups if moments is None else moments.shape[0]
    if outputs % groups or (moments is not None and moments.shape[1] != inputs):
        raise MismatchError(f"{layer.name!r}: moments of {groups} groups are not for a matrix {(outputs, inputs)}")
    if row_weights is not None and row_weights.numel() != outputs:
        raise MismatchError(f"{layer.name!r}: {row_weights.numel()} row weights for {outputs} outputs")
    weight = layer.problem.weight.double().reshape(groups, -1, inputs)
    if moments is None:
        powers = weight.square().mean(1)
    else:
        values, basis = torch.linalg.eigh(moments.double())
        # Moments of few samples have eigenvalues of zero, which rounding puts at either side of it.
        powers = values.clamp_min(0) * (weight @ basis).square().mean(1)
    rows = (torch.ones(outputs) if row_weights is None else row_weights).double().reshape(groups, -1).numpy()
    # What has no variance costs neither bits nor distortion.
    return [_Spectrum(r[r > 0], np.sort(p[p > 0])) for r, p in zip(rows, powers.numpy(), strict=True)]


def _level(spectra: Sequence[_Spectrum], distortion: float) -> float:
    """θ with Σ min(s, θ) = `distortion`, which is above zero and below the sum of all s.

    Newton's method from zero: the sum is concave and piecewise linear in θ, so that the steps never pass the
    solution and reach it after a few of them.
    """
    level = 0.0
    while True:
        splits = [spectrum.split(level) for spectrum in spectra]
        below, above = math.fsum(power for power, _ in splits), sum(count for _, count in splits)
        following = (distortion - below) / above if above else level
        if following <= level:
            return level
        level = following


def _bits(spectra: Sequence[_Spectrum], losses: Iterable[float]) -> float:
    distortion = 2 * math.fsum(losses)
    if distortion >= math.fsum(spectrum.total for spectrum in spectra):
        return 0.0
    if not distortion > 0:
        return math.inf
    level = _level(spectra, distortion)
    return math.fsum(spectrum.bits(level) for spectrum in spectra)


def gaussian_bits(layer: Layer, loss: float) -> float:
    """The bits of `layer`, all its entries together, at `loss` as `Layer.loss` counts it.

    0 where the loss is that of dropping the layer or more, infinite where it is 0.
    Raises MismatchError where the layer's metric is not for its matrix.
    """
    return _bits(_spectra(layer), [loss])


def gaussian_bits_of(layers: Mapping[str, Layer], losses: Mapping[str, float]) -> float:
    """The bits of all `layers` at the sum of their `losses`, spread over them as costs fewest: at one common level.

    Never more than the sum of `gaussian_bits` over the layers; what is between the two is what the allocation
    gives away. Raises MismatchError where layers and losses do not have the same names.
    """
    if layers.keys() != losses.keys():
        raise MismatchError(f"layers without a loss or the reverse: {sorted(layers.keys() ^ losses.keys())}")
    return _bits([spectrum for layer in layers.values() for spectrum in _spectra(layer)], losses.values())
