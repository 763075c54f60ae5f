"""Sparse factors before anything is quantised: a dictionary and the codes that a few of its atoms make.

Letters: d rows along the basis, k rank, N tiles.

    min D(B · Z)  over  B free,  ‖Z‖₀ <= count          D(E) = ⟨E, A(E)⟩ of the error, A linear and positive

This is dictionary learning in the metric of the inputs, with one count of entries for all codes together. The axes of
an SVD are where to start for few directions, not for few entries, and a set of zeros that was chosen on them hardly
changes afterwards. Hence the codes are turned to sparse axes first, those that make Σ y⁴ largest among the rotations
of whitened codes (Zhai et al. 2020, "Complete dictionary learning via ℓ⁴-norm maximization"). Each round then takes
steps of Z down the gradient, projected on the sparse set (iterative hard thresholding with the step that is exact on
the entries kept, Blumensath & Davies 2010), fits Z on those entries and B on all by conjugate gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from factorpack._shapes import Float64
from factorpack.solve.sets import Sparse

TURNS = 100
"""Of the rotation at most; it ends early where it stands still."""
STILL = 1e-6
THRESHOLDS = 5
"""Thresholded steps a round."""
FITS = 8
"""Conjugate gradients a round, for Z and for B each."""
LONGEST = 2.0
"""No step is longer than that many of the diagonal's own: on few entries the exact one may be, and would diverge."""

Curve = Callable[[Float64[Tensor, "d N"]], Float64[Tensor, "d N"]]
"""A(E)."""


def sparse_axes(
    basis: Float64[Tensor, "d k"], codes: Float64[Tensor, "k N"]
) -> tuple[Float64[Tensor, "d k"], Float64[Tensor, "k N"]]:
    """The same product in axes that make the codes sparse: Q·(Z Zᵀ)^-½·Z with Σ y⁴ at a maximum over rotations Q.

    Each turn takes Q to the polar factor of (Q Y)³ Yᵀ, which never lowers the sum.
    """
    values, axes = torch.linalg.eigh(codes @ codes.mT)
    spread = values.clamp_min(1e-12 * float(values[-1]) or 1.0).sqrt()
    white = (axes / spread).mT @ codes
    rotation = torch.eye(len(codes), dtype=codes.dtype)
    for _ in range(TURNS):
        left, _, right = torch.linalg.svd((rotation @ white) ** 3 @ white.mT)
        before, rotation = rotation, left @ right
        if float((rotation - before).abs().max()) < STILL:
            break
    return basis @ (axes * spread) @ rotation.mT, rotation @ white


def _fitted(
    start: Float64[Tensor, "..."], pull: Float64[Tensor, "..."], normal: Callable[[Tensor], Tensor]
) -> Float64[Tensor, "..."]:
    """`start` moved by conjugate gradients towards where `normal`, linear and positive, has taken up the `pull`."""
    found, rest, direction = start.clone(), pull, pull.clone()
    power = float(rest.square().sum())
    for _ in range(FITS):
        image = normal(direction)
        bent = float((direction * image).sum())
        if not bent > 0:
            break
        found += power / bent * direction
        rest = rest - power / bent * image
        before, power = power, float(rest.square().sum())
        direction = rest + power / before * direction
    return found


def _codes_fitted(
    tiles: Float64[Tensor, "d N"], basis: Float64[Tensor, "d k"], codes: Float64[Tensor, "k N"], curve: Curve
) -> Float64[Tensor, "k N"]:
    """Z fitted where it is not zero."""
    kept = (codes != 0).to(codes.dtype)
    pull = basis.mT @ curve(tiles - basis @ codes) * kept
    return _fitted(codes, pull, lambda moved: basis.mT @ curve(basis @ moved) * kept)


def _basis_fitted(
    tiles: Float64[Tensor, "d N"], basis: Float64[Tensor, "d k"], codes: Float64[Tensor, "k N"], curve: Curve
) -> Float64[Tensor, "d k"]:
    pull = curve(tiles - basis @ codes) @ codes.mT
    return _fitted(basis, pull, lambda moved: curve(moved @ codes) @ codes.mT)


def pursue(
    tiles: Float64[Tensor, "d N"],
    factors: tuple[Float64[Tensor, "d k"], Float64[Tensor, "k N"]],
    count: int,
    curve: Curve,
    curvature: Float64[Tensor, "d N"],
    rounds: int,
) -> tuple[Float64[Tensor, "d k"], Float64[Tensor, "k N"]]:
    """B, with columns of length one, and Z with at most `count` entries that are not zero, the best of `rounds` rounds.

    `factors` are where to start, `curve` is A and `curvature` its diagonal.
    """
    basis, codes = factors
    best, least = (basis, Sparse(count).project(codes)), torch.inf
    for _ in range(rounds):
        codes = _thresholded(tiles, basis, codes, count, curve, curvature)
        codes = _codes_fitted(tiles, basis, codes, curve)
        basis = _basis_fitted(tiles, basis, codes, curve)
        lengths = basis.norm(dim=0)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        basis, codes = basis / lengths, codes * lengths[:, None]
        error = tiles - basis @ codes
        reached = float((error * curve(error)).sum())
        if reached < least:
            best, least = (basis, codes), reached
    return best


def _thresholded(
    tiles: Float64[Tensor, "d N"],
    basis: Float64[Tensor, "d k"],
    codes: Float64[Tensor, "k N"],
    count: int,
    curve: Curve,
    curvature: Float64[Tensor, "d N"],
) -> Float64[Tensor, "k N"]:
    """Steps of Z in units of the Hessian's diagonal, each projected in that diagonal."""
    diagonal = basis.square().mT @ curvature
    diagonal = diagonal.clamp_min(1e-9 * float(diagonal.mean()) or 1.0)
    sparse = Sparse(count, diagonal)
    for _ in range(THRESHOLDS):
        slope = basis.mT @ curve(tiles - basis @ codes)
        step = slope / diagonal
        along = step * (codes != 0)
        bent = basis @ along
        power = float((bent * curve(bent)).sum())
        length = float((along * slope).sum()) / power if power > 0 else 1.0
        codes = sparse.project(codes + min(length, LONGEST) * step)
    return codes
