"""The sets that factors lie in, each with its projection.

`project(x)` is a point of the set that is nearest to x in the Frobenius norm (where the set has `weights` ω, in
‖e‖²_ω = Σ ω_ij e_ij²), always the same one where several are; `contains(x)` tells whether x is in the set. Membership
is exact, a projected matrix is in its set and projects to itself, but for rank and orthonormality, which hold to a
tolerance.

No set but the grids' cells is convex, so the theory of convex projections says nothing about alternating between them.

Letters: d rows, k rank, N columns.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from factorpack._shapes import Float, Integer
from factorpack.errors import MismatchError


class ConstraintSet(Protocol):
    """A closed set of matrices."""

    def project(self, x: Float[Tensor, "d N"]) -> Float[Tensor, "d N"]:
        """A nearest point of the set."""

    def contains(self, x: Float[Tensor, "d N"]) -> bool:
        """Whether x is in the set."""


def _largest(scores: Float[Tensor, "d N"], count: int) -> Float[Tensor, "d N"]:
    """Ones at the `count` largest scores of the whole matrix, zeros elsewhere; of equal ones the first by index."""
    order = torch.argsort(scores.flatten(), descending=True, stable=True)[:count]
    return torch.zeros_like(scores).flatten().index_fill_(0, order, 1.0).reshape(scores.shape)


@dataclass(frozen=True, eq=False)
class Uniform:
    """Multiples of a step, {s·q : q integer, low <= q <= high}.

    `steps` are positive and of shape (), (d, 1) or (1, N): one for the matrix, a row or a column.

        project(x) = argmin_y ‖x - y‖² = s · clamp(round(x / s), low, high)

    (Kuzmin et al. 2022, eq. 5-6, with the signed range -2^(b-1)..2^(b-1)-1 where b bits are asked for.)
    """

    low: int
    high: int
    steps: Float[Tensor, "..."]

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise MismatchError(f"a grid of {self.low}..{self.high} is empty")

    def integers(self, x: Float[Tensor, "d N"]) -> Float[Tensor, "d N"]:
        """q of the projection, integers in the floating type of x."""
        return torch.clamp(torch.round(x / self.steps), self.low, self.high)

    def project(self, x: Float[Tensor, "d N"]) -> Float[Tensor, "d N"]:
        return self.steps * self.integers(x)

    def contains(self, x: Float[Tensor, "d N"]) -> bool:
        return torch.equal(self.project(x), x)


@dataclass(frozen=True, eq=False)
class Sparse:
    """At most `count` entries of the whole matrix are not zero.

        project(x) = argmin_y { ‖x - y‖²_ω : ‖y‖₀ <= count }: the entries of largest ω x², the others zero

    One constraint for the matrix, none for a row or column (Kuzmin et al. 2022, eq. 8, where ω is 1: the largest |x|).
    """

    count: int
    weights: Float[Tensor, "d N"] | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise MismatchError(f"{self.count} entries cannot be kept")

    def project(self, x: Float[Tensor, "d N"]) -> Float[Tensor, "d N"]:
        # Without weights |x| orders as x² does and cannot underflow.
        return x * _largest(x.abs() if self.weights is None else self.weights * x**2, self.count)

    def contains(self, x: Float[Tensor, "d N"]) -> bool:
        return int(torch.count_nonzero(x)) <= self.count


@dataclass(frozen=True, eq=False)
class SparseGrid:
    """At most `count` entries are not zero and all lie on `grid`, which holds the zero.

        project(x) = argmin_y { ‖x - y‖²_ω : ‖y‖₀ <= count, y in grid }: with y the nearest point of the grid, the
                     entries of largest gain ω · (x² - (x - y)²) = ω · y · (2x - y), the others zero

    The error falls by the gain of each entry that is kept and no other entry sees it: the largest gains are optimal.
    The largest |x| are not: an entry that the grid's end clips, or one of a column with a coarse step, may gain less.
    """

    count: int
    grid: Uniform
    weights: Float[Tensor, "d N"] | None = None

    def __post_init__(self) -> None:
        if self.count < 0:
            raise MismatchError(f"{self.count} entries cannot be kept")
        if not self.grid.low <= 0 <= self.grid.high:
            raise MismatchError(f"a sparse matrix needs a grid with zero, not {self.grid.low}..{self.grid.high}")

    def project(self, x: Float[Tensor, "d N"]) -> Float[Tensor, "d N"]:
        nearest = self.grid.project(x)
        gain = nearest * (2 * x - nearest)
        return nearest * _largest(gain if self.weights is None else self.weights * gain, self.count)

    def contains(self, x: Float[Tensor, "d N"]) -> bool:
        return Sparse(self.count).contains(x) and self.grid.contains(x)


@dataclass(frozen=True)
class OneHot:
    """Each column holds a single one, the rest zeros.

    project(x) = argmin_y ‖x - y‖²: the one stands at the largest entry of its column, the first of equal ones
    """

    def indices(self, x: Float[Tensor, "k N"]) -> Integer[Tensor, " N"]:
        """The row of the one in each column of the projection."""
        return torch.argmax(x, dim=0)

    def project(self, x: Float[Tensor, "k N"]) -> Float[Tensor, "k N"]:
        return torch.zeros_like(x).scatter_(0, self.indices(x)[None, :], 1.0)

    def contains(self, x: Float[Tensor, "k N"]) -> bool:
        return bool(((x == 0) | (x == 1)).all() and (torch.count_nonzero(x, dim=0) == 1).all())


@dataclass(frozen=True)
class RankAtMost:
    """Matrices of rank at most `rank`: the products of factors (d, rank) and (rank, N).

    project(x) = argmin_y { ‖x - y‖² : rank(y) <= rank }: the first `rank` terms of the SVD (Eckart & Young 1936)

    `contains` takes singular values below `tolerance` of the largest for zero.
    """

    rank: int
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise MismatchError(f"there is no rank {self.rank}")

    def project(self, x: Float[Tensor, "d N"]) -> Float[Tensor, "d N"]:
        left, values, right = torch.linalg.svd(x, full_matrices=False)
        nearest: Tensor = (left[:, : self.rank] * values[: self.rank]) @ right[: self.rank]
        return nearest

    def contains(self, x: Float[Tensor, "d N"]) -> bool:
        values = torch.linalg.svdvals(x)
        return bool((values[self.rank :] <= self.tolerance * values[:1]).all())


@dataclass(frozen=True)
class Orthonormal:
    """Columns of length one, at right angles: xᵀx = I; d >= k.

    project(x) = argmin_y { ‖x - y‖² : yᵀy = I } = U Vᵀ with x = U S Vᵀ, the polar factor (Schönemann 1966)

    `contains` allows each entry of xᵀx to be off by `tolerance`.
    """

    tolerance: float = 1e-5

    def project(self, x: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        if x.shape[0] < x.shape[1]:
            raise MismatchError(f"{x.shape[1]} columns of length {x.shape[0]} cannot be orthonormal")
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        polar: Tensor = left @ right
        return polar

    def contains(self, x: Float[Tensor, "d k"]) -> bool:
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return bool(((x.mT @ x - identity).abs() <= self.tolerance).all())
