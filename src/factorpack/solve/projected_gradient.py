"""Projected gradient on both factors at once: Algorithm 1 of Kuzmin et al. 2022.

Letters: m outputs, n inputs of one group, d rows along the basis, k rank, N tiles.

    min D(untile(B · Z)) over B in S_B, Z in S_Z        (D: `objective`; S: `sets`)

    form          S_B                       S_Z
    direct        the identity              grid, at most `count` entries not zero
    sparse_pca    grid                      grid, at most `count` entries not zero
    svd           grid                      grid
    vq            grid                      one-hot columns

Real-valued latents of both factors and the logarithms of their steps follow Adam on D of the quantised product, the
rounding passed straight through (the steps' gradient is that of LSQ, Esser et al. 2020). After every `inner_steps` the
latents of Z are projected: on the sparse grid in the diagonal of D's Hessian, which says better than |Z| what an entry
is worth, or on the one-hot columns in D itself. The rate is bounded by the sets - bits, rank and count - not priced.
Form sparse_pca starts from factors that are sparse already (`pursuit`), or from the SVD as in the paper.

The sets are not convex and the gradient is not that of the rounded function, so nothing makes D fall from one
iteration to the next: each iterate is made feasible, as it would be stored, and the best one is returned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import cos, pi

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from factorpack._shapes import Float, Float32, Float64, Int32, Integer
from factorpack.errors import MismatchError, UnsupportedError
from factorpack.factors import IDENTITY_GRID, Basis, Codes, FactoredWeight, Grid, OneHotCodes, exponents_of, steps_of
from factorpack.solve.objective import Metric, distortion, gradient
from factorpack.solve.pursuit import pursue, sparse_axes
from factorpack.solve.sets import SparseGrid, Uniform
from factorpack.solve.start import kmeans, nearest_codewords, search_steps, singular_factors, whitening
from factorpack.tiling import Tiling

FORMS = ("direct", "sparse_pca", "svd", "vq")
SPARSE_FORMS = ("direct", "sparse_pca")
MOST_BITS = 20
"""Integers up to there are exact in latents of float32, and leave some of their digits for what is between them."""

# Measured, as are the defaults below but the 30 iterations (the paper's), on convolutions of ResNet-20.
SPLIT = 0.0  # B = U, Z = S·Vᵀ; an even split ends about as low
BASIS_PACE = 0.3  # of the learning rate, in units of the basis' root mean square
STEP_PACE = 0.5  # of the learning rate, in the logarithm
LAST_PACE = 0.03  # of the learning rate, at the end of its cosine
BETAS = (0.9, 0.99)
SPARSE_START = 0.8  # of the SVD's distortion, quantised, is what a pursued start must reach: the SVD's falls further
SETTLING = 0.02  # of the way to the middle of its cell that a latent goes in a step at the end; none at the start


@dataclass(frozen=True)
class GradientSettings:
    """What a weight becomes and how long it is worked at.

    `rank` k, not read by form direct; `sparsity` the share of Z's entries that are zero, read by direct and sparse_pca
    alone; `basis_bits`, `code_bits` the widths of the signed grids. `line_steps`: one step a row of B and a column of Z
    as in the paper, else one a matrix. `pursuit` rounds make form sparse_pca's first factors sparse; 0, and `one_shot`,
    leave those of the SVD. `iterations` projections with `inner_steps` of Adam before each, or with
    `one_shot` a single projection after all of them; then `refinements` times `inner_steps` with the zeros kept.
    `learning_rate` is that of Z, in units of its steps.

    Raises MismatchError where a value is out of range.
    """

    rank: int = 1
    sparsity: float = 0.0
    basis_bits: int = 8
    code_bits: int = 4
    line_steps: bool = True
    pursuit: int = 20
    iterations: int = 30
    inner_steps: int = 20
    refinements: int = 10
    learning_rate: float = 0.2
    one_shot: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.sparsity <= 1:
            raise MismatchError(f"rank {self.rank} is below 1 or sparsity {self.sparsity} outside 0..1")
        if not (2 <= self.basis_bits <= MOST_BITS and 2 <= self.code_bits <= MOST_BITS):
            raise MismatchError(f"grids have 2 to {MOST_BITS} bits, not {self.basis_bits} and {self.code_bits}")
        counts = (self.pursuit, self.iterations, self.refinements)
        if min(counts) < 0 or self.inner_steps < 1 or not self.learning_rate > 0:
            raise MismatchError(
                "pursuit, iterations and refinements are not negative, inner_steps and learning_rate are positive"
            )


@dataclass(frozen=True, eq=False)
class Solution:
    """The best weight found, its distortion D, and D of every feasible iterate from the start on."""

    weight: FactoredWeight
    distortion: float
    trace: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class _Problem:
    """What does not change while solving; tensors in float32 where nothing else is said."""

    form: str
    tiling: Tiling
    settings: GradientSettings
    metric: Metric
    exact: Metric  # the same in float64
    weight: Float[Tensor, "m n"]
    tiles: Float[Tensor, "d N"]
    curvature: Float[Tensor, "d N"]  # half the diagonal of D's Hessian in the tiles
    energy: float  # D of a weight of zeros

    @property
    def count(self) -> int:
        """How many entries of Z are kept."""
        depth, count = self.tiles.shape
        rank = depth if self.form == "direct" else self.settings.rank
        return round((1 - self.settings.sparsity) * rank * count)

    def matrix(self, tiles: Float[Tensor, "d N"]) -> Float[Tensor, "m n"]:
        """`Tiling.untile` for tensors, as outputs x inputs; differentiable."""
        if not self.tiling.depth:
            return tiles
        return tiles.mT.reshape(-1)[: self.weight.numel()].reshape(self.weight.shape)

    def curve(self, error: Float64[Tensor, "d N"]) -> Float64[Tensor, "d N"]:
        """A(E), with D = ⟨E, A(E)⟩ of the tiles' error E; nothing where entries only fill the last tile."""
        pull = self.exact.apply(self.matrix(error))
        if not self.tiling.depth:
            return pull
        filled = pad(pull.reshape(-1), (0, error.numel() - pull.numel()))
        return filled.reshape(error.mT.shape).mT


def _range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _problem(
    weight: Float32[np.ndarray, "..."], tiling: Tiling, metric: Metric, form: str, settings: GradientSettings
) -> _Problem:
    exact, metric = metric.to(torch.float64), metric.to(torch.float32)
    matrix = torch.tensor(tiling.matrix(weight))
    energy = float(distortion(matrix, torch.zeros_like(matrix), metric))
    diagonal = torch.ones_like(matrix)
    if metric.moments is not None:
        per_group = matrix.shape[0] // metric.moments.shape[0]
        diagonal = metric.moments.diagonal(dim1=1, dim2=2).repeat_interleave(per_group, dim=0)
    if metric.row_weights is not None:
        diagonal = diagonal * metric.row_weights[:, None]
    curvature = torch.from_numpy(tiling.tile(tiling.unmatrix(diagonal.numpy())))
    return _Problem(form, tiling, settings, metric, exact, matrix, torch.tensor(tiling.tile(weight)), curvature, energy)


def _couplings(problem: _Problem, chosen: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Of the chosen tiles: the outputs and the inputs of their entries (d, T), and what an error of each counts."""
    outputs, inputs = problem.weight.shape
    depth, count = problem.tiles.shape
    flat = torch.arange(depth * count)
    flat = (flat.reshape(count, depth).mT if problem.tiling.depth else flat.reshape(depth, count))[:, chosen]
    rows = (flat // inputs).clamp(max=outputs - 1)
    counts = (flat < outputs * inputs).to(problem.tiles.dtype)
    if problem.metric.row_weights is not None:
        counts = counts * problem.metric.row_weights[rows]
    return rows, flat % inputs, counts


def _stride(problem: _Problem) -> int:
    """Tiles that are this far apart have no output in common."""
    depth, inputs = problem.tiling.depth, problem.weight.shape[1]
    if not depth:
        return problem.tiles.shape[1]
    if not depth % inputs or not inputs % depth:
        return max(inputs // depth, 1)
    return -(-(inputs - 1) // depth) + 1


def reassign(
    problem: _Problem, codewords: Float[Tensor, "d k"], indices: Integer[Tensor, " N"]
) -> Integer[Tensor, " N"]:
    """Index of each tile's best codeword in D, the other tiles given: one sweep that never raises D.

    Moments couple the tiles of one output. Tiles without an output in common are reassigned at once, the others in
    turn: with c a codeword, u the one before, A the moments within the tile and g = -½ ∂D/∂Ŵ on the tile,

        argmin_c (u - c)ᵀA(u - c) + 2 (u - c)ᵀg
    """
    moments = problem.metric.moments
    if moments is None:
        return nearest_codewords(problem.tiles, codewords, problem.curvature)[0]
    indices = indices.clone()
    stride = _stride(problem)
    per_group = problem.weight.shape[0] // moments.shape[0]
    for first in range(min(stride, problem.tiles.shape[1])):
        chosen = slice(first, None, stride)
        rows, columns, counts = _couplings(problem, chosen)
        error = problem.matrix(problem.tiles - codewords[:, indices])
        before = codewords[:, indices[chosen]]
        if stride <= 2:
            pull = problem.metric.apply(error)[rows, columns] * (counts > 0)
        else:
            pull = counts * (moments[rows // per_group, columns] * error[rows]).sum(-1)
        if problem.tiling.depth:
            within = counts * moments[(rows // per_group)[:, None], columns[:, None], columns]
            within = within * (counts[:, None] > 0) * (rows[:, None] == rows)
            costs = torch.einsum("ik,ijt,jk->kt", codewords, within, codewords)
            pull = pull + torch.einsum("ijt,jt->it", within, before)
        else:  # Every entry of a tile is of another output.
            costs = codewords.square().mT @ problem.curvature[:, chosen]
            pull = pull + problem.curvature[:, chosen] * before
        indices[chosen] = (costs - 2 * codewords.mT @ pull).argmin(dim=0)
    return indices


@dataclass(eq=False)
class _Latents:
    """What Adam moves: B = basis · basis_unit, Z = codes · kept · code_unit and the logarithms of their steps.

    Adam moves every entry by about the learning rate, whatever its scale: the units make that a share of B's root mean
    square and of Z's first steps. `basis` is None for the identity; `codes` of form vq are the codewords' indices.
    """

    basis: Float[Tensor, "d k"] | None
    codes: Float[Tensor, "k N"] | Integer[Tensor, " N"]
    basis_steps: Float[Tensor, " lines"]
    code_steps: Float[Tensor, " lines"]
    basis_unit: float = 1.0
    code_unit: float | Float[Tensor, " columns"] = 1.0
    kept: float | Float[Tensor, "k N"] = 1.0


def _log_steps(lines: Float[Tensor, "L C"], bits: int, settings: GradientSettings) -> Float[Tensor, " steps"]:
    return search_steps(lines if settings.line_steps else lines.reshape(1, -1), *_range(bits)).log()


def _latents(problem: _Problem, basis: Tensor | None, codes: Tensor) -> _Latents:
    """Those of first factors, with the steps that fit them."""
    settings = problem.settings
    latents = _Latents(basis, codes, torch.zeros(1), torch.zeros(1))
    if basis is not None:
        latents.basis_steps = _log_steps(basis, settings.basis_bits, settings)
        latents.basis_unit = float(basis.square().mean().sqrt()) or 1.0
        latents.basis = basis / latents.basis_unit
    if problem.form != "vq":
        latents.code_steps = _log_steps(codes.mT.contiguous(), settings.code_bits, settings)
        latents.code_unit = latents.code_steps.exp()
        latents.codes = codes / latents.code_unit
        if not settings.one_shot:
            # Again, now that the steps only have to serve the entries that stay.
            _project(problem, latents)
            stay = (latents.codes * latents.code_unit).mT.contiguous()
            latents.code_steps = _log_steps(stay, settings.code_bits, settings)
    return latents


def _pursued(problem: _Problem, factors: tuple[Float[Tensor, "d k"], Float[Tensor, "k N"]]) -> _Latents:
    """The better start of the factors themselves and of those that a pursuit makes sparse of them."""

    @torch.no_grad()
    def reached(latents: _Latents) -> float:
        _project(problem, latents)
        approximation = problem.matrix(_product(problem, latents))
        return float(distortion(problem.weight, approximation, problem.metric))

    basis, codes = (factor.double() for factor in factors)
    tiles, curvature = problem.tiles.double(), problem.curvature.double()
    axes = sparse_axes(basis, codes)
    pursued = pursue(tiles, axes, problem.count, problem.curve, curvature, problem.settings.pursuit)
    plain, sparse = _latents(problem, *factors), _latents(problem, *(factor.float() for factor in pursued))
    return sparse if reached(sparse) < SPARSE_START * reached(plain) else plain


def _start(problem: _Problem, generator: torch.Generator) -> _Latents:
    settings, tiles = problem.settings, problem.tiles
    if problem.form == "direct":
        return _latents(problem, None, tiles)
    if problem.form == "vq":
        # Entries that cost nothing, of dead inputs or filling the last tile, still need a mean.
        floor = 1e-6 * float(problem.curvature.mean()) or 1.0
        return _latents(problem, *kmeans(tiles, settings.rank, generator, problem.curvature.clamp(min=floor)))
    factors = singular_factors(tiles, settings.rank, whitening(problem.metric, problem.tiling), SPLIT)
    if problem.form == "sparse_pca" and settings.pursuit and not settings.one_shot:
        return _pursued(problem, factors)
    return _latents(problem, *factors)


def _straight_through(x: Tensor, bits: int) -> Tensor:
    """clamp(round(x)) with the gradient of clamp(x); with x = latent / step it makes LSQ's gradient of the step."""
    clamped = torch.clamp(x, *_range(bits))
    return clamped + (torch.round(clamped) - clamped).detach()


def _quantised_basis(problem: _Problem, latents: _Latents) -> Float[Tensor, "d k"]:
    assert latents.basis is not None
    steps = latents.basis_steps.exp()[:, None]
    return steps * _straight_through(latents.basis * (latents.basis_unit / steps), problem.settings.basis_bits)


def _product(problem: _Problem, latents: _Latents) -> Float[Tensor, "d N"]:
    """The quantised product, differentiable in the latents."""
    if problem.form == "vq":
        return _quantised_basis(problem, latents)[:, latents.codes]
    steps = latents.code_steps.exp()
    ratio = latents.code_unit / steps
    codes = steps * _straight_through(latents.codes * latents.kept * ratio, problem.settings.code_bits)
    return codes if latents.basis is None else _quantised_basis(problem, latents) @ codes


@torch.no_grad()
def _project(problem: _Problem, latents: _Latents) -> None:
    """Hard thresholding of Z in the diagonal of D's Hessian; the nearest codewords for form vq."""
    if problem.form == "vq":
        latents.codes = reassign(problem, _quantised_basis(problem, latents), latents.codes)
    elif problem.form in SPARSE_FORMS:
        gains = problem.curvature
        if latents.basis is not None:
            gains = (latents.basis * latents.basis_unit).square().mT @ gains
        grid = Uniform(*_range(problem.settings.code_bits), latents.code_steps.exp())
        latents.codes *= SparseGrid(problem.count, grid, gains).project(latents.codes * latents.code_unit) != 0


@torch.no_grad()
def _at_rest(problem: _Problem, latents: _Latents) -> FactoredWeight:
    """The latents on their grids, with steps that a file can hold. The zeros of Z stay zeros."""
    settings = problem.settings

    def grid_of(log_steps: Tensor, bits: int) -> tuple[Grid, Tensor]:
        exponents = exponents_of(log_steps.to(torch.float64).exp().numpy())
        return Grid(*_range(bits), exponents), torch.from_numpy(steps_of(exponents))

    def integers(values: Tensor, steps: Tensor, bits: int) -> Int32[np.ndarray, "..."]:
        return Uniform(*_range(bits), steps).integers(values.to(torch.float64)).to(torch.int32).numpy()

    if latents.basis is None:
        basis = Basis(None, IDENTITY_GRID)
    else:
        grid, steps = grid_of(latents.basis_steps, settings.basis_bits)
        values = latents.basis * latents.basis_unit
        basis = Basis(integers(values, steps[:, None], settings.basis_bits), grid)
    codes: Codes | OneHotCodes
    if problem.form == "vq":
        codes = OneHotCodes(latents.codes.to(torch.int32).numpy(), settings.rank)
    else:
        grid, steps = grid_of(latents.code_steps, settings.code_bits)
        values = latents.codes * latents.kept * latents.code_unit
        codes = Codes(integers(values, steps, settings.code_bits), grid)
    return FactoredWeight(problem.form, problem.tiling, basis, codes)


@torch.no_grad()
def _settle(problem: _Problem, latents: _Latents, share: float) -> None:
    """Moves the latents by `share` of their way to the middle of their cells.

    Left to the straight-through gradient they gather where two cells meet and flip from side to side, which leaves
    about twice the error of rounding (Nagel et al. 2022, "Overcoming oscillations in quantization-aware training").
    """
    if problem.form != "vq":
        cell = latents.code_steps.exp() / latents.code_unit
        middle = cell * torch.clamp(torch.round(latents.codes / cell), *_range(problem.settings.code_bits))
        latents.codes += share * (middle - latents.codes)
    if latents.basis is not None:
        cell = latents.basis_steps.exp()[:, None] / latents.basis_unit
        middle = cell * torch.clamp(torch.round(latents.basis / cell), *_range(problem.settings.basis_bits))
        latents.basis += share * (middle - latents.basis)


def _optimiser(problem: _Problem, latents: _Latents) -> torch.optim.Adam:
    pace = problem.settings.learning_rate
    groups = [] if problem.form == "vq" else [(latents.codes, pace), (latents.code_steps, pace * STEP_PACE)]
    if latents.basis is not None:
        groups += [(latents.basis, pace * BASIS_PACE), (latents.basis_steps, pace * STEP_PACE)]
    # D is scaled to order one, so eps only keeps entries without a gradient where they are.
    parameters = [{"params": [values.requires_grad_()], "lr": rate} for values, rate in groups]
    return torch.optim.Adam(parameters, betas=BETAS, eps=1e-12, fused=True)


def _iterates(problem: _Problem, latents: _Latents) -> Iterator[None]:
    """Moves the latents on; at each yield they are feasible."""
    settings, weight, metric = problem.settings, problem.weight, problem.metric
    total = (settings.iterations + settings.refinements) * settings.inner_steps
    scale = 1 / (problem.energy or 1.0)
    adam = _optimiser(problem, latents)
    paces = [float(group["lr"]) for group in adam.param_groups]

    def inner(round_: int) -> None:
        for step in range(round_ * settings.inner_steps, (round_ + 1) * settings.inner_steps):
            factor = LAST_PACE + (1 - LAST_PACE) * 0.5 * (1 + cos(pi * step / total))
            for group, pace in zip(adam.param_groups, paces, strict=True):
                group["lr"] = factor * pace
            adam.zero_grad()
            approximation = problem.matrix(_product(problem, latents))
            slope = scale * gradient(weight, approximation.detach(), metric)
            torch.autograd.backward(approximation, slope)
            adam.step()
            _settle(problem, latents, SETTLING * step / total)

    if not (settings.one_shot and settings.iterations):
        _project(problem, latents)
        yield
    for iteration in range(settings.iterations):
        inner(iteration)
        if not settings.one_shot or iteration == settings.iterations - 1:
            _project(problem, latents)
            yield
    if problem.form in SPARSE_FORMS:
        latents.kept = (latents.codes.detach() != 0).to(latents.codes.dtype)
    for refinement in range(settings.refinements):
        inner(settings.iterations + refinement)
        if problem.form == "vq":
            _project(problem, latents)
        yield


def solve(
    weight: Float32[np.ndarray, "..."],
    tiling: Tiling,
    metric: Metric,
    form: str,
    settings: GradientSettings,
    generator: torch.Generator,
) -> Solution:
    """The factors of `weight`, in its own shape, by projected gradient; `generator` is read by form vq alone.

    Raises MismatchError where weight, tiling, metric and rank do not fit one another, UnsupportedError for other forms.
    """
    if form not in FORMS:
        raise UnsupportedError(f"projected gradient solves the forms {', '.join(FORMS)}, not {form!r}")
    problem = _problem(weight, tiling, metric, form, settings)
    exact, target = problem.exact, problem.weight.to(torch.float64)
    best, least, trace = None, float("inf"), []
    latents = _start(problem, generator)
    for _ in _iterates(problem, latents):
        candidate = _at_rest(problem, latents)
        reached = float(distortion(target, torch.from_numpy(tiling.matrix(candidate.tensor())).to(target), exact))
        trace.append(reached)
        if best is None or reached < least:
            best, least = candidate, reached
    assert best is not None
    return Solution(best, least, tuple(trace))
