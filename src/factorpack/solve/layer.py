"""One weight and the ways to store it: candidates of each form, at a price or from a ladder of settings.

Letters: m outputs, n inputs of one group, g groups, d rows along the basis, k rank, N tiles.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from factorpack._shapes import Float, Float32
from factorpack.factors import Codes, FactoredWeight
from factorpack.solve.objective import Metric, distortion
from factorpack.solve.projected_gradient import GradientSettings
from factorpack.solve.projected_gradient import solve as descend
from factorpack.solve.sequential import (
    Feedback,
    Price,
    Problem,
    direct,
    principal_basis,
    vector_quantised,
    with_basis,
)
from factorpack.tiling import Tiling

FINEST = 1 << 15
"""Codes of a weight reach at most about that far: finer steps than its largest entry / FINEST are not tried."""
RATE_SHARE = 0.3
"""Part of λ that enters the rounding of rows that are looked up, so that rare ones get fewer bits. Elsewhere none
does: it favours small values so much that all layers shrink together, which no layer's own distortion shows
(docs/log.md)."""
BASIS_SHARE = 0.25
"""The basis is quantised as for that part of λ: each of its errors meets every tile."""
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
class Layer:
    """A weight `tensor` (its own shape), how it is seen as outputs x inputs (`tiling`, along the outputs), `metric`.

    `loss` is what a stored weight costs the network: half its distortion in the metric.
    """

    name: str
    tensor: Float32[np.ndarray, "..."]
    tiling: Tiling
    metric: Metric
    looked_up: bool

    @cached_property
    def problem(self) -> Problem:
        return Problem(torch.from_numpy(self.tiling.matrix(self.tensor)), self.metric, self._feedback)

    @property
    def _feedback(self) -> Feedback:
        inputs = self.tiling.matrix_shape[1]
        return Feedback(torch.eye(inputs)[None] if self.metric.moments is None else self.metric.moments)

    @cached_property
    def _row_weights(self) -> Float[Tensor, " m"]:
        rows = self.metric.row_weights
        return torch.ones(self.tiling.matrix_shape[0]) if rows is None else rows

    def loss(self, weight: FactoredWeight) -> float:
        """Half the distortion of `weight`."""
        found = torch.from_numpy(self.tiling.matrix(weight.tensor()))
        return 0.5 * float(distortion(self.problem.weight, found, self.metric))

    def step(self, rate: float, residual: float) -> float:
        """The step at λ = `rate`: a step Δ loses ½ r·D·Δ²/12 an entry, a bit more a quarter of it."""
        level = float(self._row_weights.mean()) * residual
        finest = float(np.abs(self.tensor).max()) / FINEST
        return max(math.sqrt(12 * rate / (math.log(2) * max(level, 1e-30))), finest, 1e-30)

    def _price(self, pricer: Pricer, codes: np.ndarray) -> Price:
        bits, rows, columns = (torch.from_numpy(part) for part in pricer(codes))
        if len(columns) == 1:
            columns = columns.expand(codes.shape[1])
        weights = self._row_weights
        rate = RATE_SHARE * math.log(2) / 6 * float(weights.mean()) / weights.clamp_min(1e-30)
        return Price(bits, rows.long(), columns.long(), rate)

    def _priced(self, solve: Callable[[Price | None], FactoredWeight], pricer: Pricer) -> FactoredWeight:
        """Rounds without a price; where rows are looked up, to see which symbols there are, then with theirs."""
        first = solve(None)
        if not self.looked_up:
            return first
        assert isinstance(first.codes, Codes)
        return solve(self._price(pricer, first.codes.integers))

    def solve_direct(self, rate: float, pricer: Pricer) -> FactoredWeight:
        step = self.step(rate, self.problem.feedback.residual)
        return self._priced(lambda price: direct(self.problem, self.tiling, step, price), pricer)

    @cached_property
    def basis_tiling(self) -> Tiling:
        """Tiles along the shorter side, where the basis is small; along the inputs for groups and look-ups."""
        outputs, inputs = self.tiling.matrix_shape
        along_inputs = self.tiling.groups > 1 or self.looked_up or inputs < outputs
        return Tiling(self.tiling.shape, self.tiling.groups, self.tiling.transposed, inputs if along_inputs else 0)

    @cached_property
    def _basis(self) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
        basis, powers = principal_basis(self.problem, self.basis_tiling.depth > 0)
        if self.basis_tiling.depth == 0:
            powers = powers * float(self._row_weights.mean())
        return basis.float(), powers.clamp_min(0)

    def solve_basis(self, form: str, rate: float, pricer: Pricer) -> FactoredWeight:
        """Form `sparse_pca` or `svd` at λ = `rate`: as many directions as pay for their bytes.

        A direction of power p saves p/2 and costs its column of the basis and its line of codes, at two bits an
        entry or so. `svd` keeps fewer than d, and all codes of those.
        """
        basis, powers = self._basis
        depth, count = self.basis_tiling.tiled_shape
        worth = int((0.5 * powers > rate * (2 * count + 8 * depth)).sum()) if form == "svd" else depth
        rank = max(1, min(worth, depth - 1 if form == "svd" else depth))
        share = max(float(powers[:rank].mean()), 1e-30)
        step = math.sqrt(12 * BASIS_SHARE * rate / (math.log(2) * share))
        found = with_basis(self.problem, self.basis_tiling, basis[:, :rank], min(step, 0.5 / math.sqrt(depth)))
        codes_step = self.step(rate, found.feedback.residual)
        if form == "svd":
            return found.solve(form, codes_step)
        return self._priced(lambda price: found.solve(form, codes_step, price), pricer)

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
