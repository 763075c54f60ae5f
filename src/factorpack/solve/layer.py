"""One weight and the ways to store it: candidates of each form, at a price or from a ladder of settings.

Letters: m outputs, n inputs of one group, g groups, d rows along the basis, k rank, N tiles.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorpack._shapes import Float, Float32, Float64, Int32
from factorpack.factors import ENTRIES_AT_ONCE, STEPS_PER_OCTAVE, Codes, FactoredWeight, kernel_of, parts, steps_of
from factorpack.solve.objective import Metric, distortion
from factorpack.solve.projected_gradient import GradientSettings
from factorpack.solve.projected_gradient import solve as descend
from factorpack.solve.sequential import (
    BasisProblem,
    Feedback,
    Map,
    Price,
    Problem,
    damped,
    direct,
    in_turn,
    principal_basis,
    vector_quantised,
    with_basis,
    with_tap_basis,
)
from factorpack.solve.vbmf import rank_of
from factorpack.tiling import Tiling

FINEST = 1 << 15
"""Codes of a weight reach at most about that far: finer steps than its largest entry / FINEST are not tried."""
RATE_SHARE = 0.3
"""Part of λ that enters the rounding. It makes all layers smaller together, which no layer's own distortion shows;
behind a prefix, where later layers make up for that, 0.3 gains on transformers (docs/log.md)."""
PATHS = 8
"""Survivors of layers behind a prefix: 2 save 0.01 to 0.13 bit a weight at equal distortion, 8 save 0.02 to 0.19."""
DRIFT_DAMPING = 2.0
"""Where a layer makes up for its prefix: share of the mean input power added to every input's, at as many positions
as there are inputs: of n inputs and P positions a share n/P of what is made up for is chance (docs/log.md)."""
DRIFT_DAMPINGS = tuple(2.0**octave for octave in range(-6, 8))
"""What is tried in its place where batches can vouch for one another: the best is 0.3 to 130, by layer."""
STEP_POWER = 0.75
"""Steps of rows that are looked up go with their weight to minus half that power: 1 would be the optimum for a loss
that stays quadratic, but errors of the coarsest rows cost more than that (docs/log.md)."""
STEP_GRAIN = STEPS_PER_OCTAVE // 2
"""Such steps differ by half octaves: finer ones cost more than they save."""
BASIS_SHARE = 0.25
"""The basis is quantised as for that part of λ: each of its errors meets every tile."""
MOST_TAPS, MOST_AXES, LONGEST_AXIS = 1024, 3, 63
"""Larger kernels, or with more axes, are no convolution's, and their basis would not be small. Below 64 taps an axis
an orthogonal matrix that is rounded to steps of 1/32 surely keeps its inverse."""
CODEWORDS = ((2, 8), (2, 16), (2, 32), (2, 64), (3, 32), (3, 64), (3, 128), (3, 256), (4, 64), (4, 128), (4, 256),
             (4, 512), (8, 256), (9, 256))  # fmt: skip
"""Depth and number of the codewords that form `vq` tries."""
SPARSITIES = (0.3, 0.6, 0.8)
"""Shares of zeros that projected gradients try."""
RANKS = (0.5, 1.0)
"""Ranks that projected gradients try, as parts of d; of `svd` less than one."""

Pricer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""Integers (k, N) to the bits of −R..R in each context (K, 2R+1), row classes (k,) and column classes (N,)."""


@dataclass(frozen=True, eq=False)
class Met:
    """What a weight meets behind a compressed prefix: `moments` E[x̂ x̂ᵀ] and `drift` E[(x − x̂) x̂ᵀ] (g, n, n).

    Both are means over `positions`. `halves` are the same of every other batch each; there are none of a single batch.
    """

    moments: Float[Tensor, "g n n"]
    drift: Float[Tensor, "g n n"]
    positions: int
    halves: tuple["Met", ...] = ()


def _drift_losses(
    layer: tuple[Float64[Tensor, "..."], Float64[Tensor, "g o n"], float], halves: tuple[Met, Met]
) -> Float64[np.ndarray, " dampings"]:
    """‖x·W − x̂·(W + M)‖² on the second half, less what M does not change, for M of the first half at each damping.

    With rows d of drift, a of its aim, and axes of the first half's moments, M is d·s for s = 1/(values + damping), and
    Σ r·(d·s)·H·(d·s)ᵀ = s·(H ∘ Σ r·dᵀd)·sᵀ: one product for all dampings.
    """
    (weights, blocks, share), (fitted, other) = layer, halves
    values, axes = torch.linalg.eigh(fitted.moments.double())
    values = values.clamp_min(0)
    level = values.mean(1, keepdim=True).clamp_min(1e-30)
    drift = blocks @ fitted.drift.double() @ axes
    moments, aim = axes.mT @ other.moments.double() @ axes, blocks @ other.drift.double() @ axes
    weighted = weights * drift
    pairs, once = moments * (weighted.mT @ drift), (weighted * aim).sum(1)
    losses = np.zeros(len(DRIFT_DAMPINGS))
    for at, damping in enumerate(DRIFT_DAMPINGS):
        scales = 1 / (values + 2 * damping * share * level)
        losses[at] = float((scales * ((pairs @ scales[..., None])[..., 0] - 2 * once)).sum())
    return losses


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight `tensor` (its own shape), how it is seen as outputs x inputs (`tiling`, along the outputs), `metric`.

    `loss` is what a stored weight costs the network: half its distortion in the metric. Rounding follows `paths`
    survivors a row. Where it is `followed` by layers that will make up for its errors, its symbols have a price.
    Parts of the work are called for by `each`.
    """

    name: str
    tensor: Float32[np.ndarray, "..."]
    tiling: Tiling
    metric: Metric
    looked_up: bool
    paths: int = 1
    followed: bool = False
    each: Map = in_turn

    def __getstate__(self) -> dict[str, Any]:
        """What goes to a worker: of what was computed of it the feedback, which takes long, and not what takes more."""
        computed = {"_feedback": self._feedback} if "_feedback" in self.__dict__ else {}
        return {part.name: getattr(self, part.name) for part in fields(self)} | {"each": in_turn} | computed

    @cached_property
    def problem(self) -> Problem:
        return Problem(torch.from_numpy(self.tiling.matrix(self.tensor)), self.metric, self._feedback)

    @cached_property
    def _feedback(self) -> Feedback:
        return self._made_feedback()

    def _made_feedback(self) -> Feedback:
        inputs = self.tiling.matrix_shape[1]
        return Feedback(inputs if self.metric.moments is None else self.metric.moments, 1, self.paths, self.each)

    def prepare(self) -> None:
        """Makes what every solution takes, which workers would else make again for each; in threads for many."""
        # Before Python 3.12 a cached_property holds one lock for all layers.
        if "_feedback" not in self.__dict__:
            self.__dict__["_feedback"] = self._made_feedback()

    @cached_property
    def row_exponents(self) -> Int32[np.ndarray, " m"] | None:
        """Of the outputs' steps beside the layer's own one; None where that one is for all."""
        rows = self.metric.row_weights
        if rows is None or not self.looked_up:
            return None
        weights = rows.double().clamp_min(1e-30)
        octaves = -0.5 * STEP_POWER * torch.log2(weights / weights.mean())
        grains = torch.round(octaves * (STEPS_PER_OCTAVE / STEP_GRAIN)).to(torch.int32).numpy()
        return grains * np.int32(STEP_GRAIN) if grains.any() else None

    @cached_property
    def _row_steps(self) -> Float[Tensor, " m"] | None:
        return None if self.row_exponents is None else torch.from_numpy(steps_of(self.row_exponents)).float()

    @property
    def scaled(self) -> Problem:
        """The problem with each output in units of its own step: Ŵ solves `problem` where Ŵ / steps solves this one.

        Made whenever it is asked for: it may be as large as the weight, and of no use once codes are there.
        """
        steps = self._row_steps
        if steps is None:
            return self.problem
        metric = Metric(self.metric.moments, self._row_weights)
        return Problem(self.problem.weight / steps[:, None], metric, self.problem.feedback)

    @cached_property
    def _row_weights(self) -> Float[Tensor, " m"]:
        """Of `scaled`."""
        rows, steps = self.metric.row_weights, self._row_steps
        if rows is not None and steps is not None:
            rows = rows * steps.square()
        return torch.ones(self.tiling.matrix_shape[0]) if rows is None else rows

    def behind(self, met: Met, followed: bool = True, each: Map = in_turn) -> "Layer":
        """The layer on inputs x̂ of a compressed prefix, `followed` by others that will make up for its errors.

        Its weight is the one that makes up best for what the prefix changed: W + W·drift·moments⁻¹.
        """
        matrix = torch.from_numpy(self.tiling.matrix(self.tensor))
        blocks = matrix.double().reshape(len(met.moments), -1, matrix.shape[1])
        damping = self._drift_damping(met, blocks, each)
        moved = blocks + torch.linalg.solve(damped(met.moments, damping), met.drift.double().mT @ blocks.mT).mT
        tensor = self.tiling.unmatrix(moved.reshape(matrix.shape).float().numpy())
        metric = Metric(met.moments, self.metric.row_weights)
        return Layer(self.name, tensor, self.tiling, metric, False, PATHS, followed, each)

    def _drift_damping(self, met: Met, blocks: Float64[Tensor, "g o n"], each: Map) -> float:
        """The share for `damped`: with it what is made up for by one half of the batches does best on the other."""
        # Of a single sample so many positions tell: of a half, half as much.
        share = met.moments.shape[-1] / met.positions
        if not met.halves:
            return DRIFT_DAMPING * share
        weights = torch.ones(1, 1, 1) if self.metric.row_weights is None else self.metric.row_weights
        weights = weights.double().reshape(len(blocks) if weights.numel() > 1 else 1, -1, 1)
        pairs = (met.halves, met.halves[::-1])
        losses = sum(each(_drift_losses, (weights, blocks, share), pairs), np.zeros(len(DRIFT_DAMPINGS)))
        return DRIFT_DAMPINGS[int(losses.argmin())] * share

    def loss(self, weight: FactoredWeight) -> float:
        """Half the distortion of `weight`."""
        found = torch.from_numpy(self.tiling.matrix(weight.tensor()))
        moments, rows, total = self.metric.moments, self.metric.row_weights, 0.0
        if moments is not None and len(moments) > 1:
            return 0.5 * float(distortion(self.problem.weight, found, self.metric))
        # By parts, small ones where a weight is large: the error and all that is made of it take as much each.
        most = ENTRIES_AT_ONCE // 4 if found.numel() > ENTRIES_AT_ONCE else None
        for part in parts(len(found), found.shape[1], most):
            metric = Metric(moments, None if rows is None else rows[part])
            total += float(distortion(self.problem.weight[part], found[part], metric))
        return 0.5 * total

    def step_of(self, residual: float) -> Callable[[float], float]:
        """The step of `scaled` by λ: a step Δ loses ½ r·D·Δ²/12 an entry, a bit more a quarter of it."""
        level = float(self._row_weights.mean()) * residual
        finest = float(max(self.tensor.max(), -self.tensor.min())) / FINEST
        return lambda rate: max(math.sqrt(12 * rate / (math.log(2) * max(level, 1e-30))), finest, 1e-30)

    def step(self, rate: float, residual: float) -> float:
        """As `step_of`, at λ = `rate`."""
        return self.step_of(residual)(rate)

    def _price(self, pricer: Pricer, codes: np.ndarray) -> Price:
        bits, rows, columns = (torch.from_numpy(part) for part in pricer(codes))
        if len(columns) == 1:
            columns = columns.expand(codes.shape[1])
        weights = self._row_weights
        rate = RATE_SHARE * math.log(2) / 6 * float(weights.mean()) / weights.clamp_min(1e-30)
        return Price(bits, rows.long(), columns.long(), rate)

    def _priced(self, solve: Callable[[Price | None], FactoredWeight], pricer: Pricer, wanted: bool) -> FactoredWeight:
        """Rounds without a price; where one is `wanted`, to see which symbols there are, then with theirs."""
        first = solve(None)
        if not wanted:
            return first
        assert isinstance(first.codes, Codes)
        price = self._price(pricer, first.codes.integers)
        # As large as the weight, and of no more use.
        del first
        return solve(price)

    def solve_direct(self, rate: float, pricer: Pricer) -> FactoredWeight:
        step, problem = self.step(rate, self.problem.feedback.residual), self.scaled
        return self._priced(
            lambda price: direct(problem, self.tiling, step, price),
            pricer,
            self.looked_up or (self.followed and self.problem.feedback.coupled),
        ).with_steps(self.row_exponents)

    @cached_property
    def basis_tiling(self) -> Tiling:
        """Tiles along the shorter side, where the basis is small; along the inputs for groups and look-ups."""
        outputs, inputs = self.tiling.matrix_shape
        along_inputs = self.tiling.groups > 1 or self.looked_up or inputs < outputs
        return Tiling(self.tiling.shape, self.tiling.groups, self.tiling.transposed, inputs if along_inputs else 0)

    @cached_property
    def _basis(self) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
        basis, powers = principal_basis(self.scaled, self.basis_tiling.depth > 0)
        if self.basis_tiling.depth == 0:
            powers = powers * float(self._row_weights.mean())
        return basis.float(), powers.clamp_min(0)

    @cached_property
    def _vbmf_rank(self) -> int:
        return rank_of(self._basis[1].numpy(), self.basis_tiling.tiled_shape)

    def _svd_rank(self, rate: float, rank_by: str) -> int:
        depth, count = self.basis_tiling.tiled_shape
        if rank_by == "vbmf":
            rank = self._vbmf_rank
        else:
            rank = int((0.5 * self._basis[1] > rate * (2 * count + 8 * depth)).sum())
        return max(1, min(rank, depth - 1))

    def solve_basis(self, form: str, rate: float, pricer: Pricer, rank_by: str = "rate") -> FactoredWeight:
        """Form `sparse_pca` with all d directions, or `svd` with fewer, and all codes of those, at λ = `rate`.

        By "rate" `svd` has as many directions as pay for their bytes: one of power p saves p/2 and costs its column of
        the basis and its line of codes, at two bits an entry or so. By "vbmf" it has those that stand out of the noise
        in the weight as its inputs see it, at every λ alike.
        """
        basis, powers = self._basis
        depth = self.basis_tiling.tiled_shape[0]
        rank = self._svd_rank(rate, rank_by) if form == "svd" else depth
        share = max(float(powers[:rank].mean()), 1e-30)
        step = math.sqrt(12 * BASIS_SHARE * rate / (math.log(2) * share))
        found = with_basis(self.scaled, self.basis_tiling, basis[:, :rank], min(step, 0.5 / math.sqrt(depth)))
        codes_step = self.step(rate, found.feedback.residual)
        if form == "svd":
            return found.solve(form, codes_step).with_steps(self.row_exponents)
        return self._priced(lambda price: found.solve(form, codes_step, price), pricer, self.looked_up).with_steps(
            self.row_exponents
        )

    @property
    def has_taps(self) -> bool:
        """Whether form `separable` can be had: outputs x inputs x a kernel of several taps."""
        kernel = kernel_of(self.tiling.shape)
        small = 0 < len(kernel) <= MOST_AXES and math.prod(kernel) <= MOST_TAPS and max(kernel) <= LONGEST_AXIS
        return small and not self.tiling.transposed and not self.looked_up

    @cached_property
    def _tap_basis(self) -> BasisProblem:
        assert self.has_taps
        return with_tap_basis(self.problem, self.tiling)

    def solve_separable(self, rate: float) -> FactoredWeight:
        """Form `separable` at λ = `rate`, for a layer that has taps; the basis is the same at every λ."""
        found = self._tap_basis
        return found.solve("separable", self.step(rate, found.feedback.residual))

    def _tilings(self) -> Iterator[tuple[Tiling, int]]:
        """Tiles within an output, and numbers of codewords that the weight has tiles for."""
        outputs, inputs = self.tiling.matrix_shape
        for depth, codewords in CODEWORDS:
            if inputs % depth == 0 and outputs * inputs >= 8 * depth * codewords:
                yield Tiling(self.tiling.shape, self.tiling.groups, self.tiling.transposed, depth), codewords

    def codebooks(self, generator: torch.Generator) -> Iterator[FactoredWeight]:
        """Form `vq` by sequential rounding, over a ladder of depths and numbers of codewords."""
        for tiling, codewords in self._tilings():
            yield vector_quantised(self.problem, tiling, codewords, generator)

    def _gradient_settings(self, form: str) -> Iterator[tuple[Tiling, GradientSettings]]:
        """The ladder of projected gradients: ranks, shares of zeros, bits of the codes."""
        if form == "vq":
            yield from ((tiling, GradientSettings(rank=codewords)) for tiling, codewords in self._tilings())
            return
        tiling = self.tiling if form == "direct" else self.basis_tiling
        depth = tiling.tiled_shape[0]
        ranks = {max(1, min(int(part * depth), depth - (form == "svd"))) for part in RANKS}
        for rank in (depth,) if form == "direct" else sorted(ranks):
            for sparsity in (0.0,) if form == "svd" else SPARSITIES:
                for bits in (3, 4):
                    yield tiling, GradientSettings(rank=rank, sparsity=sparsity, code_bits=bits)

    def descents(self, form: str, generator: torch.Generator) -> Iterator[FactoredWeight]:
        """Form `form` by projected gradients over a ladder of settings, with the paper's steps a row and a column."""
        for tiling, settings in self._gradient_settings(form):
            yield descend(self.tensor, tiling, self.metric, form, settings, generator).weight
