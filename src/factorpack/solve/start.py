"""First factors and steps, from which a solver sets out.

Letters: m outputs, n inputs of one group, g groups, d rows along the basis, k rank, N tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from factorpack._shapes import Float, Integer
from factorpack.errors import MismatchError
from factorpack.factors import STEPS_PER_OCTAVE, parts
from factorpack.solve.objective import Metric
from factorpack.tiling import Tiling

DAMPING = 1e-8  # of the mean diagonal: moments of inputs that are linear in one another have no inverse
CANDIDATES = 24
SPACING = 9  # between candidates, in 1/64 of an octave: together they span a decade
TILES_PER_CODEWORD = 1024
"""K-means of more tiles is that of so many, drawn at random. A table of words has millions, of which each pass costs as
much as all other layers, and faiss goes by 256 (`max_points_per_centroid`)."""
DISTANCES_AT_ONCE = 1 << 18
"""So many stay in a processor's cache."""


@dataclass(frozen=True, eq=False)
class Whitening:
    """Factors that turn the metric of the tiles into the Frobenius norm: D(T) ≈ ‖leftᵀ · T · right‖².

    `left` (d, d) or (d,), `right` (N, N) or (N,), both lower triangular; a vector is a diagonal, None the identity.
    """

    left: Tensor | None = None
    right: Tensor | None = None


def _damping(diagonal: Float[Tensor, " n"]) -> float:
    return DAMPING * float(diagonal.mean()) or 1.0


def _root(moments: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Lower triangular L with L Lᵀ = H, H made definite by a small multiple of the identity."""
    damping, failed = _damping(moments.diagonal()), 1
    identity = torch.eye(moments.shape[0], dtype=moments.dtype)
    while failed:
        # Moments that were summed in float32 can be indefinite by more than the first damping.
        root, info = torch.linalg.cholesky_ex(moments + damping * identity)
        damping, failed = 10 * damping, int(info)
    lower: Tensor = root
    return lower


def whitening(metric: Metric, tiling: Tiling) -> Whitening:
    """The whitening of `metric` for tiles along the outputs or of a length that divides n; none for other tiles.

    It is exact for tiles along the outputs with one group, and for tiles that are whole rows (d = n, one group).
    Otherwise one matrix stands for several: the mean of the groups' moments, or of their diagonal blocks (d, d).
    """
    inputs = tiling.matrix_shape[1]
    metric = metric.to(torch.float64)
    rows = metric.row_weights
    if rows is not None:
        rows = (rows + _damping(rows)).sqrt()
    if not tiling.depth:
        return Whitening(rows, None if metric.moments is None else _root(metric.moments.mean(0)))
    if inputs % tiling.depth:
        return Whitening()
    pieces = inputs // tiling.depth
    right = None if rows is None else rows.repeat_interleave(pieces)
    if metric.moments is None:
        return Whitening(None, right)
    blocks = metric.moments.reshape(-1, pieces, tiling.depth, pieces, tiling.depth)
    return Whitening(_root(blocks.diagonal(dim1=1, dim2=3).mean((0, 3))), right)


def singular_factors(
    tiles: Float[Tensor, "d N"], rank: int, whiten: Whitening, split: float = 0.5
) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k N"]]:
    """B, Z of rank k whose product is nearest to the tiles in the whitened norm.

    leftᵀ T right = U S Vᵀ;  B = left⁻ᵀ U S^split,  Z = S^(1-split) Vᵀ right⁻¹, cut to k. Computed in float64.

    Raises MismatchError where k exceeds d or N.
    """
    if not 1 <= rank <= min(tiles.shape):
        raise MismatchError(f"rank {rank} is not between 1 and the smaller side of tiles {tuple(tiles.shape)}")
    left, right = _double(whiten.left), _double(whiten.right)
    target = tiles.to(torch.float64)
    if left is not None:
        target = left.mT @ target if left.ndim == 2 else left[:, None] * target
    if right is not None:
        target = target @ right if right.ndim == 2 else target * right
    first, values, second = torch.linalg.svd(target, full_matrices=False)
    basis = first[:, :rank] * values[:rank] ** split
    codes = values[:rank, None] ** (1 - split) * second[:rank]
    if left is not None:
        basis = torch.linalg.solve_triangular(left.mT, basis, upper=True) if left.ndim == 2 else basis / left[:, None]
    if right is not None:
        codes = (
            torch.linalg.solve_triangular(right, codes, upper=False, left=False) if right.ndim == 2 else codes / right
        )
    return basis.to(tiles.dtype), codes.to(tiles.dtype)


def _double(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.to(torch.float64)


def nearest_codewords(
    tiles: Float[Tensor, "d N"], codewords: Float[Tensor, "d k"], weights: Float[Tensor, "d N"] | None = None
) -> tuple[Integer[Tensor, " N"], Float[Tensor, " N"]]:
    """Index of the nearest codeword of each tile, and the squared distance; the first of equally near ones.

    argmin_c Σ_i weights_it · (tiles_it - codewords_ic)²
    """
    rank, count = codewords.shape[1], tiles.shape[1]
    weights = torch.ones_like(tiles) if weights is None else weights
    indices = torch.empty(count, dtype=torch.int64)
    # Σ w·(c² - 2·t·c): what all codewords share is left out. One product, and numpy's argmin along a row, which takes a
    # third of the time of torch's minimum with its index.
    factors = torch.cat([codewords**2, -2 * codewords])
    for part in parts(count, rank, DISTANCES_AT_ONCE):
        costs = torch.cat([weights[:, part], weights[:, part] * tiles[:, part]]).mT @ factors
        indices[part] = torch.from_numpy(costs.numpy().argmin(1))
    return indices, (weights * (tiles - codewords[:, indices]) ** 2).sum(0)


def _spread_codewords(
    tiles: Float[Tensor, "d N"], rank: int, weights: Float[Tensor, "d N"], generator: torch.Generator
) -> Float[Tensor, "d k"]:
    """k tiles, each drawn in proportion to its squared distance from those before (Arthur & Vassilvitskii 2007)."""
    count = tiles.shape[1]
    draws = torch.rand(rank, generator=generator, dtype=torch.float64)
    chosen = [min(int(draws[0] * count), count - 1)]
    nearest = torch.full((count,), torch.inf, dtype=torch.float64)
    for draw in draws[1:]:
        distance = (weights * (tiles - tiles[:, chosen[-1:]]) ** 2).sum(0).to(torch.float64)
        nearest = torch.minimum(nearest, distance)
        mass = nearest.cumsum(0)
        chosen.append(min(int(torch.searchsorted(mass, draw * mass[-1], right=True)), count - 1))
    return tiles[:, chosen].clone()


def lloyd(
    tiles: Float[Tensor, "d N"],
    codewords: Float[Tensor, "d k"],
    weights: Float[Tensor, "d N"] | None = None,
    iterations: int = 50,
) -> tuple[Float[Tensor, "d k"], Integer[Tensor, " N"]]:
    """Codewords and the index of each tile's, by alternating nearest codeword and (weighted) mean.

    A codeword without tiles moves to the tile that fares worst, the next one to the next worst. Ends early where
    no tile changes its codeword.
    """
    weights = torch.ones_like(tiles) if weights is None else weights
    indices, distances = nearest_codewords(tiles, codewords, weights)
    for _ in range(iterations):
        mass = torch.zeros_like(codewords).index_add_(1, indices, weights)
        total = torch.zeros_like(codewords).index_add_(1, indices, weights * tiles)
        codewords = torch.where(mass > 0, total / mass.where(mass > 0, 1), codewords)
        empty = torch.nonzero(torch.bincount(indices, minlength=codewords.shape[1]) == 0).flatten()
        if empty.numel():
            worst = torch.argsort(distances, descending=True, stable=True)[: empty.numel()]
            codewords[:, empty] = tiles[:, worst]
        before = indices
        indices, distances = nearest_codewords(tiles, codewords, weights)
        if torch.equal(before, indices):
            break
    return codewords, indices


def codebook(
    tiles: Float[Tensor, "d N"],
    rank: int,
    generator: torch.Generator,
    weights: Float[Tensor, "d N"] | None = None,
    iterations: int = 50,
) -> tuple[Float[Tensor, "d k"], Integer[Tensor, " N"] | None]:
    """k codewords by k-means++, then `lloyd`, and the index of each tile's. `weights` say what an entry's error counts.

    Codewords of many tiles are those of a sample (`TILES_PER_CODEWORD`): then there are no indices. Raises
    MismatchError where there are fewer tiles than codewords.
    """
    count = tiles.shape[1]
    if not 1 <= rank <= count:
        raise MismatchError(f"{rank} codewords cannot be chosen among {count} tiles")
    weights = torch.ones_like(tiles) if weights is None else weights
    if count > TILES_PER_CODEWORD * rank:
        chosen = torch.randperm(count, generator=generator)[: TILES_PER_CODEWORD * rank]
        return codebook(tiles[:, chosen], rank, generator, weights[:, chosen], iterations)[0], None
    return lloyd(tiles, _spread_codewords(tiles, rank, weights, generator), weights, iterations)


def kmeans(
    tiles: Float[Tensor, "d N"],
    rank: int,
    generator: torch.Generator,
    weights: Float[Tensor, "d N"] | None = None,
    iterations: int = 50,
) -> tuple[Float[Tensor, "d k"], Integer[Tensor, " N"]]:
    """A `codebook`, and the index of every tile's codeword."""
    codewords, indices = codebook(tiles, rank, generator, weights, iterations)
    return codewords, nearest_codewords(tiles, codewords, weights)[0] if indices is None else indices


def search_steps(lines: Float[Tensor, "L C"], low: int, high: int) -> Float[Tensor, " L"]:
    """For each line the step whose grid low..high is nearest to its values in the squared error.

    Candidates are powers 2^(e/64), as a file holds them, from the first that clips nothing down to a tenth of it. A
    line of zeros gets the mean range of the others, 1 where all are zero.
    """
    ends = torch.maximum(
        lines.amax(1) / high if high > 0 else torch.zeros_like(lines[:, 0]),
        lines.amin(1) / low if low < 0 else torch.zeros_like(lines[:, 0]),
    ).clamp(min=0)
    used = ends > 0
    ends = torch.where(used, ends, ends[used].mean() if bool(used.any()) else torch.ones_like(ends))
    exponents = torch.ceil(torch.log2(ends) * STEPS_PER_OCTAVE)
    best, least = ends, torch.full_like(ends, torch.inf)
    for index in range(CANDIDATES):
        steps = torch.exp2((exponents - SPACING * index) / STEPS_PER_OCTAVE)
        error = lines - torch.clamp(torch.round(lines / steps[:, None]), low, high) * steps[:, None]
        cost = (error**2).sum(1)
        best, least = torch.where(cost < least, steps, best), torch.minimum(cost, least)
    return best
