"""The search over λ: candidates of every layer, until the file has the size that was asked for."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from factorpack.allocate import Point, allocate
from factorpack.coding import plan_integers
from factorpack.coding.records import encode_weight, predicted_bits, predicted_vector_bits
from factorpack.container import Contents, to_bytes
from factorpack.errors import BudgetError, UnsupportedError
from factorpack.factors import FactoredVector, FactoredWeight
from factorpack.nn.state import State
from factorpack.plan import FORMS, LayerPlan, ModelPlan
from factorpack.solve.layer import Layer
from factorpack.solve.vectors import quantise

PRICED_RADIUS = 31
"""Integers beyond pay what the outermost of these does."""
TOLERANCE = 0.003
"""A file that is less than this part below its budget is close enough."""
VECTOR_SHARE = 1 / 64
"""Part of λ that small tensors are rounded with: their errors add up over all positions alike, which the curvature
of single entries does not show (docs/log.md)."""
SEARCHES = 14
FILLINGS = 8
FILLING_RATIO = 1.15
LARGEST_RATE = 1e36
"""At that λ all weights are rounded away; past it, and below its inverse, nothing changes."""
SOLVERS = ("sequential", "projected-gradient")

Progress = Callable[[str, int, int], None]
"""Told of a stage's name, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Options:
    """How a model is compressed: a form (or "auto"), a solver, a seed, patterns of names to be kept exactly.

    Raises UnsupportedError for a form or solver that does not exist, or a solver without a form.
    """

    form: str = "auto"
    solver: str = "sequential"
    seed: int = 0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in ("auto", *FORMS):
            raise UnsupportedError(f"{self.form!r} is no form: choose auto, {', '.join(FORMS)}")
        if self.solver not in SOLVERS:
            raise UnsupportedError(f"{self.solver!r} is no solver: choose {' or '.join(SOLVERS)}")
        if self.solver == "projected-gradient" and self.form == "auto":
            raise UnsupportedError(f"projected gradients need a form: choose --form {', '.join(FORMS)}")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A way to store a layer: its loss, its size as the coder's tables predict it, and the λ it came from."""

    weight: FactoredWeight
    loss: float
    size_bytes: float
    rate: float


@dataclass(frozen=True, eq=False)
class Packed:
    """A compressed state: the bytes of its file, and what was decided."""

    data: bytes
    plan: ModelPlan


def pricer(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits, row and column classes of the coder for integers (k, N); see `solve.layer.Pricer`."""
    prices = plan_integers(codes).price(PRICED_RADIUS)
    return prices.bits, prices.rows, prices.columns


@dataclass(eq=False)
class _Search:
    """Candidates of every layer, as they are found at one λ after another."""

    state: State
    options: Options
    progress: Progress
    found: dict[str, list[Candidate]] = field(default_factory=dict)
    records: dict[int, bytes] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    """Layers that no λ changes any more."""

    def __post_init__(self) -> None:
        self.found = {name: [] for name in self.state.layers}

    def _keep(self, layer: Layer, weight: FactoredWeight, rate: float) -> Candidate:
        candidate = Candidate(weight, layer.loss(weight), predicted_bits(weight) / 8, rate)
        self.found[layer.name].append(candidate)
        return candidate

    def ladder(self) -> None:
        """The candidates that no λ leads to: codebooks, and every form by projected gradients."""
        form, layers = self.options.form, self.state.layers
        for done, layer in enumerate(layers.values()):
            self.progress(f"{form}, {self.options.solver}", done, len(layers))
            generator = torch.Generator().manual_seed(self.options.seed)
            if self.options.solver == "projected-gradient":
                weights = layer.descents(form, generator)
            else:
                weights = layer.codebooks(generator)
            for weight in weights:
                self._keep(layer, weight, 0.0)
                self.settled.add(layer.name)
        self.progress(f"{form}, {self.options.solver}", len(layers), len(layers))

    @property
    def laddered(self) -> bool:
        return self.options.solver == "projected-gradient" or self.options.form == "vq"

    def at(self, rate: float) -> float:
        """Solves every layer at λ = `rate`; the bytes of the cheapest candidates at that λ."""
        total = 0.0
        layers = self.state.layers
        for done, layer in enumerate(layers.values()):
            self.progress("rounding", done, len(layers))
            if layer.name not in self.settled:
                for solve in self._solvers(layer):
                    self._keep(layer, solve(rate), rate)
            total += min(self.found[layer.name], key=lambda c: c.loss + 8 * rate * c.size_bytes).size_bytes
        self.progress("rounding", len(layers), len(layers))
        return total + predicted_vector_bits(list(self.vectors(rate).values())) / 8

    def _solvers(self, layer: Layer) -> list[Callable[[float], FactoredWeight]]:
        """How this layer is solved at a λ: the form asked for; `direct` where that form cannot be had."""
        form = self.options.form
        direct = partial(layer.solve_direct, pricer=pricer)
        basis = partial(layer.solve_basis, pricer=pricer)
        if form in ("sparse_pca", "svd") and not (form == "svd" and min(layer.tiling.matrix_shape) < 2):
            return [partial(basis, form)]
        # A basis pays for itself only where it is small beside the codes.
        depth, count = layer.basis_tiling.tiled_shape
        if form == "auto" and count >= 8 * depth:
            return [direct, partial(basis, "sparse_pca")]
        return [direct]

    def vectors(self, rate: float) -> dict[str, FactoredVector]:
        return {
            name: quantise(small.values, small.curvature, VECTOR_SHARE * rate)
            for name, small in self.state.small.items()
        }

    def overhead(self, rate: float) -> float:
        """Bytes of a file beside what `at` counts: index, names, checksums, header, exact tensors."""
        last = {name: found[-1] for name, found in self.found.items()}
        small = self.vectors(rate)
        contents = self._contents(last, small)
        records = [bytes(math.ceil(last[name].size_bytes)) for name in contents.tensors if name in last]
        counted = sum(map(len, records)) + predicted_vector_bits(list(small.values())) / 8
        return len(to_bytes(contents, records)) - counted

    def file(self, rate: float, budget: int) -> tuple[bytes, dict[str, Candidate]]:
        """The best file within `budget` of the candidates found so far, small tensors at λ = `rate`.

        Predicted sizes lead; where the bytes then written exceed the budget, the budget of the weights shrinks by
        what was too much. Raises BudgetError where even the smallest candidates do not fit.
        """
        small = self.vectors(rate)
        names = list(self.state.layers)
        curves = [[Point(math.ceil(c.size_bytes), c.loss) for c in self.found[name]] for name in names]
        room = budget - len(self._written({}, small))
        while True:
            picked = allocate(curves, room)
            chosen = {name: self.found[name][i] for name, i in zip(names, picked, strict=True)}
            data = self._written(chosen, small)
            if len(data) <= budget:
                return data, chosen
            room -= len(data) - budget

    def _contents(self, chosen: Mapping[str, Candidate], small: Mapping[str, FactoredVector]) -> Contents:
        state = self.state
        weights = {name: candidate.weight for name, candidate in chosen.items()}
        stored: dict[str, Any] = weights | dict(small) | dict(state.exact)
        aliases = {alias: name for alias, name in state.aliases.items() if name in stored}
        return Contents({name: stored[name] for name in state.dtypes if name in stored}, state.dtypes, aliases)

    def _written(self, chosen: Mapping[str, Candidate], small: Mapping[str, FactoredVector]) -> bytes:
        contents = self._contents(chosen, small)
        records = [self._record(chosen[name].weight) for name in contents.tensors if name in chosen]
        return to_bytes(contents, records)

    def _record(self, weight: FactoredWeight) -> bytes:
        if id(weight) not in self.records:
            self.records[id(weight)] = encode_weight(weight)
        return self.records[id(weight)]


def _first_rate(state: State, size_bytes: int) -> float:
    """A λ at which Gaussian weights would take `size_bytes`, to start the search from."""
    spreads = [(layer.tensor.size, max(float(layer.tensor.std()), 1e-12), layer) for layer in state.layers.values()]

    def size(rate: float) -> float:
        bits = 0.0
        for count, spread, layer in spreads:
            ratio = spread / layer.step(rate, layer.problem.feedback.residual)
            bits += count * 0.5 * math.log2(1 + 2 * math.pi * math.e * ratio * ratio)
        return bits / 8

    low, high = -120.0, 120.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if size(2**middle) < size_bytes else (middle, high)
    return 2**high


def pack(state: State, size_bytes: int, options: Options, progress: Progress) -> Packed:
    """The best file of at most `size_bytes` for a state.

    λ is searched by the secant of log size over log λ until the file is at most 0.3 % below its budget; all
    candidates met on the way then compete. Raises BudgetError, with the smallest size, where it cannot be met.
    """
    search = _Search(state, options, progress)
    if search.laddered:
        search.ladder()
    goal = max(size_bytes * (1 - TOLERANCE / 2), 1.0)
    rate = _first_rate(state, size_bytes)
    overhead = -1.0
    above: tuple[float, float] | None = None
    below: tuple[float, float] | None = None
    for _ in range(SEARCHES):
        counted = search.at(rate)
        overhead = search.overhead(rate) if overhead < 0 else overhead
        size = counted + overhead
        if size > goal:
            above = (rate, size)
        else:
            below = (rate, size)
        if abs(size - goal) <= size_bytes * TOLERANCE / 2:
            break
        following = _next_rate(rate, size, goal, above, below)
        if following is None:
            break
        rate = following
    best = below or above
    assert best is not None
    try:
        rate, (data, chosen) = _fitting(search, best[0], size_bytes)
        # Where a layer changes its form the size jumps: finer candidates of the others fill the gap.
        for _ in range(FILLINGS):
            if len(data) >= size_bytes * (1 - 2 * TOLERANCE) or above is None:
                break
            above = (above[0] / FILLING_RATIO, above[1])
            search.at(above[0])
            data, chosen = search.file(rate, size_bytes)
    except BudgetError:
        rate, (data, chosen) = LARGEST_RATE, _smallest(search)
        if len(data) > size_bytes:
            raise BudgetError(
                f"{size_bytes:,} bytes cannot be met: the smallest file of this model takes {len(data):,} bytes, "
                f"with every weight at its coarsest; ask for more"
            ) from None
    return Packed(data, _plan(chosen, rate, options.seed, len(data)))


def _next_rate(
    rate: float, size: float, goal: float, above: tuple[float, float] | None, below: tuple[float, float] | None
) -> float | None:
    """Where log size would meet log goal; None where λ has nowhere left to go."""
    if above is None or below is None:
        # Half a bit a weight and more is worth a factor of two in λ.
        following = rate * min(max((size / goal) ** 3, 1 / 64), 64.0)
        following = following * 1.1 if size > goal else following / 1.1
        return following if 1 / LARGEST_RATE < following < LARGEST_RATE else None
    (low, larger), (high, smaller) = above, below
    if high / low < 1.01:
        return None
    share = math.log(larger / goal) / math.log(larger / smaller)
    return float(low * (high / low) ** min(max(share, 0.05), 0.95))


def _fitting(search: _Search, rate: float, size_bytes: int) -> tuple[float, tuple[bytes, dict[str, Candidate]]]:
    """The file at λ = `rate`, or at the next larger one, in growing strides, at which it fits."""
    stride = 1.01
    while True:
        try:
            return rate, search.file(rate, size_bytes)
        except BudgetError:
            if rate >= LARGEST_RATE:
                raise
        rate = min(rate * stride, LARGEST_RATE)
        stride *= stride
        search.at(rate)


def _smallest(search: _Search) -> tuple[bytes, dict[str, Candidate]]:
    """The smallest file. Of candidates that every search meets alone, so that all name the same size."""
    search.at(LARGEST_RATE)
    chosen = {}
    for name, found in search.found.items():
        met = [candidate for candidate in found if candidate.rate in (0.0, LARGEST_RATE)]
        chosen[name] = min(met, key=lambda c: c.size_bytes)
    return search._written(chosen, search.vectors(LARGEST_RATE)), chosen


def _plan(chosen: Mapping[str, Candidate], rate: float, seed: int, size_bytes: int) -> ModelPlan:
    layers = {}
    for name, candidate in chosen.items():
        weight = candidate.weight
        grid = getattr(weight.codes, "grid", weight.basis.grid)
        layers[name] = LayerPlan(
            weight.form, float(grid.steps[0]), weight.codes.shape[0], weight.tiling.depth, candidate.rate,
            round(candidate.size_bytes), candidate.loss,
        )  # fmt: skip
    return ModelPlan(layers, rate, seed, size_bytes)
