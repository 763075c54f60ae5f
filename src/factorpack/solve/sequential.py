"""Sequential rounding: columns quantised in turn, each error fed on to the columns that are still to come.

Letters: m outputs, n inputs of one group, g groups, r rows of a group, d tile, k rank, N tiles.

With H = E[x xᵀ] and U the upper Cholesky factor of its inverse, H⁻¹ = UᵀU, rounding column j by e_j costs
e_j² / U_jj² once the later columns have moved by −(e_j / U_jj)·U_j,: to make up for what they can (optimal brain
quantisation: Hassibi & Stork 1993; Frantar & Alistarh 2022; in this order and blocked: Frantar et al. 2023).
Every form is this one loop over another constraint set: integers for `direct` and for the codes of a given
basis, a codeword for `vq`, whose columns go d at a time. With λ > 0 the choice weighs the price of a symbol in
the entropy coder against the part of the error that later columns cannot undo.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorpack._shapes import Float, Int32, Integer
from factorpack.factors import (
    IDENTITY_GRID,
    STEPS_PER_OCTAVE,
    Basis,
    Codes,
    FactoredWeight,
    Grid,
    OneHotCodes,
    exponents_of,
    parts,
    steps_of,
)
from factorpack.solve.objective import Metric
from factorpack.solve.start import codebook
from factorpack.tiling import Tiling

DAMPING = 0.05
"""Share of the mean input power added to every input's: keeps what a thin sample says of H in bounds."""
BLOCK = 64
TAP_EXPONENT = -5
"""Bases over taps are rounded to multiples of 2^-5: what that loses, the codes make up for."""
BASIS_BITS = 10
"""Bits of a basis grid at most; its step comes from λ."""
CODE_LIMIT = 1 << 20
"""Codes are at most that large."""
ROWS_AT_ONCE = 1536
"""Survivors of all rows of a part: enough to keep calls few, few enough for several workers to have some."""

Map = Callable[[Callable[[Any, Any], Any], Any, Iterable[Any]], Iterable[Any]]
"""A function's results, in order, of what all calls share and of each item; the calls may be made side by side."""


def in_turn(function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]) -> Iterable[Any]:
    """The `Map` that makes one call after another."""
    return map(partial(function, shared), items)


@dataclass(frozen=True, eq=False)
class Price:
    """Bits of integers −R..R in each context of the coder: `bits` (K, 2R+1).

    The context of an entry is min(row class + column class, K − 1), with `row_classes` (k,) and
    `column_classes` (N,) in the layout of the codes. `rate` (outputs,) is λ in squared steps a bit for each
    output of the weight, at the layer's mean residual power.
    """

    bits: Float[Tensor, "K symbols"]
    row_classes: Tensor
    column_classes: Tensor
    rate: Float[Tensor, " outputs"]

    @property
    def transposed(self) -> "Price":
        return Price(self.bits, self.column_classes, self.row_classes, self.rate)

    def of_rows(self, groups: int, rows: slice) -> "Price":
        """For these rows of each of the groups."""
        classes, rate = (of.reshape(groups, -1)[:, rows].reshape(-1) for of in (self.row_classes, self.rate))
        return Price(self.bits, classes, self.column_classes, rate)


def damped(moments: Float[Tensor, "g n n"], share: float = DAMPING) -> Float[Tensor, "g n n"]:
    """`moments` in float64 with a share of their mean input power on the diagonal: they then have an inverse."""
    found = moments.to(torch.float64, copy=True)
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    level = share * diagonal.mean(1)
    # A layer whose inputs were all zero has nothing to say: any positive diagonal does.
    diagonal += level.where(level > 0, 1)[:, None]
    return found


class Feedback:
    """How errors travel between columns, for moments (g, n, n), which are damped; columns in `order`.

    Columns with the strongest inputs go first, while all the others can still make up for them. With tiles of
    `depth` columns, tiles keep together. `paths` is the number of survivors that `rounded` follows, `each` how it calls
    for its parts. In place of moments that are the identity their n stands: then no error travels, and no matrix is
    made.
    """

    def __init__(
        self, moments: Float[Tensor, "g n n"] | int, depth: int = 1, paths: int = 1, each: Map = in_turn
    ) -> None:
        self.paths = paths
        self.each = each
        if isinstance(moments, int):
            self.order = torch.arange(moments)
            self.diagonal = torch.full((1, moments), (1 + DAMPING) ** -0.5)
            self.coupled = False
            return
        power = moments.diagonal(dim1=-2, dim2=-1)
        tiles = torch.argsort(power.mean(0).reshape(-1, depth).sum(1), descending=True, stable=True)
        self.order = (tiles[:, None] * depth + torch.arange(depth)).reshape(-1)
        # Not one of them by name: each may take more than the weight, and goes when the next is there.
        self.factor = torch.linalg.cholesky(
            torch.cholesky_inverse(torch.linalg.cholesky(damped(moments)[:, self.order[:, None], self.order])),
            upper=True,
        ).float()
        self.diagonal = self.factor.diagonal(dim1=-2, dim2=-1)
        self.coupled = bool(self.factor.triu(1).any())

    @cached_property
    def factor(self) -> Float[Tensor, "g n n"]:
        """U."""
        return torch.diag_embed(self.diagonal)

    @cached_property
    def residual(self) -> float:
        """Mean of 1/U_jj²: the input power that later columns cannot make up for."""
        return float(self.diagonal.double().pow(-2).mean())

    def alike(self, moments: Float[Tensor, "g n n"]) -> "Feedback":
        """For other moments, with as many paths."""
        return Feedback(moments, paths=self.paths, each=self.each)

    def __getstate__(self) -> dict[str, Any]:
        """What goes to a worker, which has none of its own."""
        return self.__dict__ | {"each": in_turn}


def _choose(x: Tensor, price: Price, contexts: Tensor, rate: Tensor) -> Tensor:
    """The cheapest of rounding, one towards zero, and zero: argmin (x − q)² + rate·bits(q), any shape."""
    reach = price.bits.shape[1] // 2
    places = contexts * price.bits.shape[1] + reach
    bits = price.bits.reshape(-1)
    best = torch.round(x)
    cost = (x - best).square() + rate * bits[places + best.clamp(-reach, reach).long()]
    for candidate in (best - torch.sign(best), torch.zeros_like(best)):
        found = (x - candidate).square() + rate * bits[places + candidate.clamp(-reach, reach).long()]
        best = torch.where(found < cost, candidate, best)
        cost = torch.minimum(found, cost)
    return best


def round_columns(
    target: Float[Tensor, "g r n"], feedback: Feedback, price: Price | None = None
) -> Float[Tensor, "g r n"]:
    """Integers near `target` (in units of the step), column by column.

    With a price, `rate·bits` is weighed against e²/U_jj² relative to the layer's mean.
    """
    if price is None and not feedback.coupled:
        return torch.round(target).clamp_(-CODE_LIMIT, CODE_LIMIT)
    # Columns lie in memory as rows: each step then reads and writes whole lines.
    x = target[..., feedback.order].mT.contiguous()
    groups, inputs, rows = x.shape
    diagonal = feedback.diagonal
    codes = torch.empty_like(x)
    if price is not None:
        row_classes = price.row_classes.reshape(groups, rows)
        column_classes = price.column_classes[feedback.order].tolist()
        rates = price.rate.reshape(groups, rows)
        relative = diagonal.square() * feedback.residual
        last = price.bits.shape[0] - 1
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        errors = torch.empty(groups, stop - start, rows)
        for j in range(start, stop):
            column = x[:, j]
            if price is None:
                chosen = torch.round(column)
            else:
                contexts = (row_classes + column_classes[j]).clamp_max(last)
                chosen = _choose(column, price, contexts, rates * relative[:, j, None])
            chosen = chosen.clamp(-CODE_LIMIT, CODE_LIMIT)
            codes[:, j], errors[:, j - start] = chosen, (column - chosen) / diagonal[:, j, None]
            if j + 1 < stop and feedback.coupled:
                x[:, j + 1 : stop] -= feedback.factor[:, j, j + 1 : stop, None] * errors[:, None, j - start]
        if stop < inputs and feedback.coupled:
            x[:, stop:] -= feedback.factor[:, start:stop, stop:].mT @ errors
    return codes.mT[..., torch.argsort(feedback.order)]


def round_paths(
    target: Float[Tensor, "g r n"], feedback: Feedback, paths: int, price: Price | None = None
) -> Float[Tensor, "g r n"]:
    """Integers near `target`, as `round_columns`, with `paths` survivors a row instead of one.

    Each survivor tries the two integers nearest to its own target and keeps what it has fed back; the `paths` cheapest
    by Σ e²/U_jj², and `rate·bits` where there is a price, go on (the M-algorithm: Anderson & Mohan 1984). At the end of
    a block a row settles on its best.
    """
    if paths == 1 or not feedback.coupled:
        return round_columns(target, feedback, price)
    x = target[..., feedback.order].mT.contiguous()
    groups, inputs, rows = x.shape
    factor = feedback.factor
    inverse = feedback.diagonal.reciprocal()
    codes = torch.empty_like(x)
    if price is not None:
        reach, last = price.bits.shape[1] // 2, price.bits.shape[0] - 1
        row_classes = price.row_classes.reshape(groups, 1, rows)
        column_classes = price.column_classes[feedback.order].tolist()
        # In the metric's unit: what an error of one step costs at the mean residual power.
        rates, bits = price.rate.reshape(groups, 1, rows) * feedback.residual, price.bits.reshape(-1)
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        width = stop - start
        own = x[:, start:stop, None].expand(groups, width, paths, rows).contiguous()
        metric = torch.full((groups, paths, rows), torch.inf)
        metric[:, 0] = 0
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for j in range(width):
            column = own[:, j]
            near = torch.round(column)
            tried = torch.cat((near, near + torch.where(column < near, -1.0, 1.0)), 1).clamp_(-CODE_LIMIT, CODE_LIMIT)
            error = (column.repeat(1, 2, 1) - tried) * inverse[:, start + j, None, None]
            cost = metric.repeat(1, 2, 1) + error.square()
            if price is not None:
                contexts = (row_classes + column_classes[start + j]).clamp_max(last)
                places = contexts * price.bits.shape[1] + reach + tried.clamp(-reach, reach).long()
                cost += rates * bits[places]
            metric, kept = cost.topk(paths, dim=1, largest=False)
            parent = kept % paths
            tried, error = tried.gather(1, kept), error.gather(1, kept)
            steps.append((tried, error, parent))
            if j + 1 < width:
                rest = own[:, j + 1 :].gather(2, parent[:, None].expand(-1, width - j - 1, -1, -1))
                own[:, j + 1 :] = rest - factor[:, start + j, start + j + 1 : stop, None, None] * error[:, None]
        errors = torch.empty(groups, width, rows)
        at = metric.argmin(1, keepdim=True)
        for j in reversed(range(width)):
            tried, error, parent = steps[j]
            codes[:, start + j], errors[:, j] = tried.gather(1, at)[:, 0], error.gather(1, at)[:, 0]
            at = parent.gather(1, at)
        if stop < inputs:
            x[:, stop:] -= factor[:, start:stop, stop:].mT @ errors
    return codes.mT[..., torch.argsort(feedback.order)]


def row_parts(matrix: Float[Tensor, "... r n"]) -> Iterator[slice]:
    """Rows of a matrix, some of them at a time."""
    lines = matrix.shape[-2]
    return parts(lines, matrix.numel() // max(lines, 1))


def rounded(
    target: Float[Tensor, "g r n"], step: float, feedback: Feedback, price: Price | None = None
) -> Int32[Tensor, "g r n"]:
    """Integers (int32) whose multiples of `step` are near `target`, the best of as many paths as `feedback` says."""
    found = torch.empty(target.shape, dtype=torch.int32)
    most = ROWS_AT_ONCE // feedback.paths
    # An error stays in its row. Parts are the same for any number of workers.
    places = [
        slice(start, min(start + most, part.stop, target.shape[1]))
        for part in row_parts(target)
        for start in range(part.start, min(part.stop, target.shape[1]), most)
    ]
    items = ((target[:, at] / step, None if price is None else price.of_rows(len(target), at)) for at in places)
    for at, codes in zip(places, feedback.each(_round_part, feedback, items), strict=True):
        found[:, at] = codes
    return found


def _round_part(feedback: Feedback, part: tuple[Float[Tensor, "g r n"], Price | None]) -> Int32[Tensor, "g r n"]:
    target, price = part
    return round_paths(target, feedback, feedback.paths, price).int()


def round_tiles(
    target: Float[Tensor, "g r n"], feedback: Feedback, codewords: Float[Tensor, "k d"]
) -> Integer[Tensor, "g r tiles"]:
    """Indices of the codewords for tiles of d columns, tile by tile with feedback."""
    x = target[..., feedback.order].clone()
    groups, rows, inputs = x.shape
    depth = codewords.shape[1]
    factor = feedback.factor
    tiles = inputs // depth
    indices = torch.empty(groups, rows, tiles, dtype=torch.long)
    for tile in range(tiles):
        start, stop = tile * depth, (tile + 1) * depth
        block = factor[:, start:stop, start:stop]
        # e·U⁻¹ has the norm that counts, so the nearest codeword is looked up there.
        seen = torch.linalg.solve_triangular(block, x[:, :, start:stop], upper=True, left=False)
        words = torch.linalg.solve_triangular(block, codewords.expand(groups, -1, -1), upper=True, left=False)
        chosen = torch.cdist(seen, words).argmin(2)
        errors = seen - torch.gather(words, 1, chosen[..., None].expand(-1, -1, depth))
        indices[:, :, tile] = chosen
        x[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return indices[..., torch.argsort(feedback.order[::depth])]


def _integers(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.to(torch.int32).numpy())


def snapped(step: float) -> tuple[float, np.ndarray]:
    """The step nearest to `step` that a file can hold, and its exponent (1,)."""
    exponents = exponents_of(np.array([step], np.float64))
    return float(steps_of(exponents)[0]), exponents


@dataclass(frozen=True, eq=False)
class Problem:
    """A weight to be rounded: `weight` (m, n) as outputs x inputs, `metric`, and its `feedback` along the inputs."""

    weight: Float[Tensor, "m n"]
    metric: Metric
    feedback: Feedback

    @property
    def moments(self) -> Float[Tensor, "g n n"]:
        if self.metric.moments is not None:
            return self.metric.moments
        return torch.eye(self.weight.shape[1])[None]

    @property
    def blocks(self) -> Float[Tensor, "g r n"]:
        groups = 1 if self.metric.moments is None else len(self.metric.moments)
        return self.weight.reshape(groups, -1, self.weight.shape[1])


def direct(problem: Problem, tiling: Tiling, step: float, price: Price | None = None) -> FactoredWeight:
    """Form `direct`: integers times one step."""
    step, exponents = snapped(step)
    codes = _integers(rounded(problem.blocks, step, problem.feedback, price).reshape(tiling.matrix_shape))
    return FactoredWeight("direct", tiling, Basis(None, IDENTITY_GRID), Codes(codes, Grid.holding(codes, exponents)))


def principal_basis(problem: Problem, along_inputs: bool) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Orthonormal columns that span, k at a time, the best subspace for the metric; and the distortion each saves.

    Along the outputs the eigenvectors of W H Wᵀ (with W L = U S Vᵀ, H = L Lᵀ, the best product of rank k is
    U_k U_kᵀ W). Along the inputs, where H = L Lᵀ acts within a tile, the span of L⁻ᵀ times the eigenvectors of
    Lᵀ Wᵀ diag(r) W L, made orthonormal.
    """
    identity = problem.metric.moments is None
    outputs, inputs = problem.weight.shape
    if not along_inputs:
        gram = torch.zeros(outputs, outputs, dtype=torch.float64)
        if identity:
            for part in row_parts(problem.weight.T):
                columns = problem.weight[:, part].double()
                gram += columns @ columns.T
        else:
            weight = problem.weight.double()
            gram += weight @ problem.moments[0].double() @ weight.T
        powers, basis = torch.linalg.eigh(gram)
        return basis.flip(1), powers.flip(0)
    rows = problem.metric.row_weights
    # The moments of the identity, damped, are a number.
    root = None if identity else torch.linalg.cholesky(damped(problem.moments.mean(0, keepdim=True))[0])
    level = math.sqrt(1 + DAMPING)
    gram = torch.zeros(inputs, inputs, dtype=torch.float64)
    for part in row_parts(problem.weight):
        scaled = problem.weight[part].double()
        scaled = scaled if rows is None else scaled * rows[part].double()[:, None].sqrt()
        seen = scaled * level if root is None else scaled @ root
        gram += seen.T @ seen
    powers, basis = torch.linalg.eigh(gram)
    spans = basis.flip(1) / level if root is None else torch.linalg.solve_triangular(root.T, basis.flip(1), upper=True)
    return torch.linalg.qr(spans)[0], powers.flip(0)


@dataclass(frozen=True, eq=False)
class BasisProblem:
    """The codes of a given, quantised basis as a problem of sequential rounding of its own.

    Along the outputs the codes' rows are independent and meet the layer's inputs; along the inputs they are the
    columns, and meet the moments BᵀHB. Where tiles are parts of an output, `target` has them side by side.
    """

    tiling: Tiling
    basis: Basis
    target: Float[Tensor, "g r n"]
    feedback: Feedback

    def solve(self, form: str, step: float, price: Price | None = None) -> FactoredWeight:
        """Rounds the codes to multiples of `step`; a price is in the layout of the codes (k, N)."""
        step, exponents = snapped(step)
        along_inputs = self.tiling.depth > 0
        if price is not None and along_inputs:
            price = price.transposed
        found = rounded(self.target, step, self.feedback, price)
        assert self.basis.integers is not None
        rank = self.basis.integers.shape[1]
        codes = _integers(found.reshape(-1, rank).T if along_inputs else found.reshape(rank, -1))
        return FactoredWeight(form, self.tiling, self.basis, Codes(codes, Grid.holding(codes, exponents)))


def with_basis(problem: Problem, tiling: Tiling, basis: Float[Tensor, "d k"], step: float) -> BasisProblem:
    """Quantises `basis` to multiples of `step` and sets up the codes that fit it best."""
    step, exponents = snapped(max(step, float(basis.abs().max()) / ((1 << BASIS_BITS - 1) - 1)))
    integers = torch.round(basis / step)
    quantised = (integers * step).double()
    whole = _integers(integers)
    factor = Basis(whole, Grid.holding(whole, exponents))
    if not tiling.depth:
        target = torch.empty(quantised.shape[1], problem.weight.shape[1])
        for part in row_parts(problem.weight.T):
            target[:, part] = torch.linalg.lstsq(quantised, problem.weight[:, part].double()).solution.float()
        return BasisProblem(tiling, factor, target[None], problem.feedback)
    left = (
        (1 + DAMPING) * quantised.T[None] if problem.metric.moments is None else quantised.T @ damped(problem.moments)
    )
    inner = left @ quantised
    factors = torch.linalg.lu_factor(inner)
    blocks = problem.blocks
    target = torch.empty(*blocks.shape[:2], quantised.shape[1])
    for part in row_parts(blocks):
        target[:, part] = torch.linalg.lu_solve(*factors, left @ blocks[:, part].double().mT).mT.float()
    return BasisProblem(tiling, factor, target, problem.feedback.alike(inner.float()))


def tap_factors(tensor: Float[Tensor, "..."], rows: Float[Tensor, " m"] | None) -> tuple[np.ndarray, ...]:
    """For each kernel axis of several taps the directions its lines have most power in, in steps of 2^TAP_EXPONENT.

    Columns are the eigenvectors of the lines' second moments, outputs weighed by `rows`, strongest first.
    """
    weight = tensor.double()
    if rows is not None:
        weight = weight * rows.double().sqrt().reshape(-1, *[1] * (weight.ndim - 1))
    factors = []
    for axis in range(2, weight.ndim):
        lines = weight.movedim(axis, -1).reshape(-1, weight.shape[axis])
        if lines.shape[1] > 1:
            vectors = torch.linalg.eigh(lines.T @ lines)[1].flip(1)
            whole = _integers(torch.round(vectors * 2.0**-TAP_EXPONENT))
            # Eigenvectors have no sign of their own: the largest entry, of equal ones the first, is positive.
            largest = np.take_along_axis(whole, np.abs(whole).argmax(0)[None], 0)
            factors.append(np.asarray(whole * np.sign(largest), np.int32))
    return tuple(factors)


def with_tap_basis(problem: Problem, tiling: Tiling) -> BasisProblem:
    """Form `separable`: a basis over the taps of a kernel, and the codes that are just the weight on it.

    The basis B, a Kronecker product, need not be quite orthogonal: the codes are B⁻¹ times the tiles. With one B for
    every input channel their moments are (I ⊗ B)ᵀ H (I ⊗ B).
    """
    tensor = torch.from_numpy(tiling.unmatrix(problem.weight.numpy()))
    factors = tap_factors(tensor, problem.metric.row_weights)
    basis = Basis.separable(factors, TAP_EXPONENT * STEPS_PER_OCTAVE * len(factors))
    assert basis.integers is not None
    taps = len(basis.integers)
    matrix = torch.from_numpy(basis.integers).double() * 2.0 ** (TAP_EXPONENT * len(factors))
    tiles = problem.weight.double().reshape(-1, taps)
    target = torch.linalg.solve(matrix, tiles.T).T.reshape(problem.blocks.shape)
    moments = problem.moments.double()
    for _ in range(2):
        moments = (moments.reshape(len(moments), -1, taps) @ matrix).reshape(moments.shape).mT
    whole = Tiling(tiling.shape, tiling.groups, tiling.transposed, taps)
    return BasisProblem(whole, basis, target.float(), problem.feedback.alike(moments.float()))


def vector_quantised(problem: Problem, tiling: Tiling, codewords: int, generator: torch.Generator) -> FactoredWeight:
    """Form `vq`: tiles of `tiling.depth` inputs, each one of `codewords`, found by k-means and assigned in turn.

    The depth divides the inputs, so that a tile lies within an output.
    """
    depth = tiling.depth
    tiles = problem.weight.reshape(-1, depth).T
    rows = problem.metric.row_weights
    weights = None if rows is None else rows.repeat_interleave(problem.weight.shape[1] // depth).expand(depth, -1)
    centres, _ = codebook(tiles, codewords, generator, weights)
    step, exponents = snapped(max(float(centres.abs().max()) / 127, 1e-30))
    integers = torch.round(centres / step)
    found = round_tiles(problem.blocks, Feedback(problem.moments, depth), integers.T * step)
    whole = _integers(integers)
    codes = OneHotCodes(_integers(found.reshape(-1)), codewords)
    return FactoredWeight("vq", tiling, Basis(whole, Grid.holding(whole, exponents)), codes)
