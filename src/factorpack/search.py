"""The search over λ: candidates of every layer, until the file has the size that was asked for."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from factorpack.allocate import Point, allocate
from factorpack.coding import plan_integers
from factorpack.coding.records import encode_weight, predicted_bits, predicted_vector_bits
from factorpack.container import Contents, to_bytes
from factorpack.errors import BudgetError, MismatchError, UnsupportedError
from factorpack.factors import IDENTITY_GRID, Basis, Codes, FactoredVector, FactoredWeight
from factorpack.nn.state import State
from factorpack.plan import FORMS, RANK_RULES, LayerPlan, ModelPlan
from factorpack.solve.layer import Layer, Met
from factorpack.solve.projected_gradient import FORMS as DESCENT_FORMS
from factorpack.solve.sequential import Map, in_turn
from factorpack.solve.vectors import quantise
from factorpack.tiling import Tiling
from factorpack.workers import ALONE, Workers, check_jobs

PRICED_RADIUS = 31
"""Integers beyond pay what the outermost of these does."""
TOLERANCE = 0.003
"""A file that is less than this part below its budget is close enough."""
VECTOR_SHARE = 1 / 64
"""Part of λ that small tensors are rounded with: their errors add up over all positions alike, which the curvature
of single entries does not show (docs/log.md)."""
SEARCHES = 14
LARGE_BRACKET = 1.15
"""Where layers take long to solve, sizes this ratio apart are close enough, and candidates of both are mixed."""
WALKS = 4
WALK_TOLERANCE = 0.03
CLOSINGS = 4
COARSEST_BITS, FINEST_BITS = 0.5, 6
"""Bits a weight that an analysis reaches to."""
ELASTICITY = 1 / 3
"""−∂ log bytes / ∂ log λ, about: from 1 to 2.5 bits a weight measured as 0.3 to 0.4 (docs/log.md)."""
FLAT = 0.01
"""Where it is less than that, λ has hardly a hold on the size."""
STRIDE = 1.1
"""What a search for λ goes beyond what the size says."""
LEARNING = 0.05
"""A walk learns from the layers behind it how large those before it will be; that part of all is taken as expected."""
STEERING = 2.5
"""By so much at most does a walk leave its λ to meet its bytes: in a deep network the layers shrink with all those
before them, and at 1.3 the last ones could not fill what was left, so that every layer was solved again."""
NEARBY = 1.3
"""A candidate whose λ is nearer than that is taken instead of solving anew."""
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

    `keep_batch_norms` stores all four numbers a channel, for training to go on; two say the same in eval mode. `rank`
    says what decides the rank of form `svd`: "rate", the λ that leads to it, or "vbmf" (`solve.vbmf`), at any λ alike.

    `jobs` is how many cores are used, by processes and by threads; `cluster` the address of a Dask scheduler, as
    "tcp://HOST:PORT", whose workers then take the place of the processes. The bytes depend on neither.

    Raises UnsupportedError for a form, solver or rule of ranks that does not exist, or one of these without its forms,
    and for what is no number of jobs or no address.
    """

    form: str = "auto"
    solver: str = "sequential"
    seed: int = 0
    exclude: tuple[str, ...] = ()
    keep_batch_norms: bool = False
    rank: str = "rate"
    jobs: int = 1
    cluster: str = ""

    def __post_init__(self) -> None:
        if self.form not in ("auto", *FORMS):
            raise UnsupportedError(f"{self.form!r} is no form: choose auto, {', '.join(FORMS)}")
        if self.solver not in SOLVERS:
            raise UnsupportedError(f"{self.solver!r} is no solver: choose {' or '.join(SOLVERS)}")
        if self.solver == "projected-gradient" and self.form not in DESCENT_FORMS:
            raise UnsupportedError(f"projected gradients need a form: choose --form {', '.join(DESCENT_FORMS)}")
        if self.rank not in RANK_RULES:
            raise UnsupportedError(f"{self.rank!r} is no rule for ranks: choose {' or '.join(RANK_RULES)}")
        if self.rank != "rate" and (self.form, self.solver) != ("svd", "sequential"):
            raise UnsupportedError(
                f"ranks by {self.rank} are for form svd by sequential rounding: choose --form svd, or --rank rate"
            )
        check_jobs(self.jobs, self.cluster)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A way to store a layer: its loss, its size as the coder's tables predict it, and the λ it came from.

    `make` gives the weight: held, or made again where it is seldom needed.
    """

    form: str
    loss: float
    size_bytes: float
    rate: float
    make: Callable[[], FactoredWeight]

    @property
    def cost(self) -> Callable[[float], float]:
        """Loss + λ·bits, of λ."""
        return lambda rate: self.loss + 8 * rate * self.size_bytes


@dataclass(frozen=True, eq=False)
class Rung:
    """What a state would be at one λ: the cheapest candidate of each layer, and the bytes of that file."""

    rate: float
    size_bytes: float
    layers: Mapping[str, Candidate]


@dataclass(frozen=True, eq=False)
class Packed:
    """A compressed state: the bytes of its file, and what was decided."""

    data: bytes
    plan: ModelPlan


def _same(weight: FactoredWeight) -> FactoredWeight:
    return weight


def _candidate(layer: Layer, weight: FactoredWeight, rate: float) -> Candidate:
    return Candidate(weight.form, layer.loss(weight), predicted_bits(weight) / 8, rate, partial(_same, weight))


_Outlined = tuple[str, float, float, FactoredWeight | None]
"""Form, loss and predicted bytes of a candidate, and its weight where that is to be held."""


def _outlined(layer: Layer, weight: FactoredWeight, held: bool) -> _Outlined:
    return weight.form, layer.loss(weight), predicted_bits(weight) / 8, weight if held else None


def _solved(asked: tuple[float, str, bool], item: tuple[Layer, str]) -> _Outlined:
    """A layer in a form at λ = `rate`; see `plan.RANK_RULES` for `rank_by`."""
    (rate, rank_by, held), (layer, form) = asked, item
    return _outlined(layer, _Search._reachable(layer, rank_by)[form](rate), held)


def _ladder(options: Options, layer: Layer) -> Iterator[FactoredWeight]:
    """The weights of a layer that no λ leads to."""
    generator = torch.Generator().manual_seed(options.seed)
    if options.solver == "projected-gradient":
        return layer.descents(options.form, generator)
    return layer.codebooks(generator)


def _climbed(asked: tuple[Options, bool], layer: Layer) -> list[_Outlined]:
    options, held = asked
    return [_outlined(layer, weight, held) for weight in _ladder(options, layer)]


@dataclass(frozen=True)
class _Record:
    """The bytes of a weight, and what a plan tells of it."""

    data: bytes
    step: float
    rank: int
    depth: int


def _record(_: None, weight: FactoredWeight) -> _Record:
    grid = getattr(weight.codes, "grid", weight.basis.grid)
    return _Record(encode_weight(weight), float(grid.steps[0]), weight.codes.shape[0], weight.tiling.depth)


def _cheapest(candidates: Sequence[Candidate], rate: float) -> Candidate:
    """The least loss + λ·bits."""
    return min(candidates, key=lambda candidate: candidate.cost(rate))


def _size_at(candidates: Sequence[Candidate], rate: float) -> float:
    """The bytes of the cheapest at λ = `rate`, between two λ by the log of both."""
    rates = sorted({candidate.rate for candidate in candidates})
    sizes = [_cheapest([c for c in candidates if c.rate == r], r).size_bytes for r in rates]
    return float(np.exp(np.interp(math.log(rate), np.log(rates), np.log(np.maximum(sizes, 1.0)))))


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
    workers: Workers = ALONE
    found: dict[str, list[Candidate]] = field(default_factory=dict)
    records: WeakKeyDictionary[Candidate, _Record] = field(default_factory=WeakKeyDictionary)
    settled: set[str] = field(default_factory=set)
    """Layers that no λ changes any more."""
    learned: dict[str, float] = field(default_factory=dict)
    """By how much the last walk's layers were larger than what their candidates led to expect."""

    def __post_init__(self) -> None:
        self.found = {name: [] for name in self.state.layers}

    @property
    def _held(self) -> bool:
        """Whether candidates hold their weights: where these will most likely be needed, and there is memory for them.

        A walk solves its layers again, and of stored ones no more than one is to be held.
        """
        return not self.met and not self.state.stored

    def _told(self, name: str, found: _Outlined, rate: float) -> Candidate:
        form, loss, size_bytes, weight = found
        if weight is not None:
            return Candidate(form, loss, size_bytes, rate, partial(_same, weight))
        again = partial(resolved, self.state.layers, name, form, rate, self.options.rank, self.workers.map)
        return Candidate(form, loss, size_bytes, rate, again)

    def _solve(self, names: Iterable[str], rate: float, stage: str | None = None) -> None:
        """Adds the candidates of these layers at λ = `rate`, the largest layers first: they take longest."""
        shapes = self.state.shapes
        order = sorted(names, key=lambda name: -math.prod(shapes[name]))
        told: deque[tuple[str, bool]] = deque()
        items = chain.from_iterable(self._asked(name, told) for name in order)
        asked = (rate, self.options.rank, self._held)
        settled = len(shapes) - len(order)
        for found in self.workers.map(_solved, asked, items):
            name, last = told.popleft()
            self.found[name].append(self._told(name, found, rate))
            if last and stage is not None:
                settled += 1
                self.progress(stage, settled, len(shapes))

    def _asked(self, name: str, told: deque[tuple[str, bool]]) -> Iterator[tuple[Layer, str]]:
        """A layer with each form that it is solved in; `told` gets its name for each, and which one is the last."""
        layer = self.state.layers[name]
        forms = list(self._solvers(layer))
        for form in forms:
            told.append((name, form == forms[-1]))
            yield layer, form

    def ladder(self) -> None:
        """The candidates that no λ leads to: codebooks, and every form by projected gradients."""
        layers = self.state.layers
        stage = f"{self.options.form}, {self.options.solver}"
        self.progress(stage, 0, len(layers))
        climbed = self.workers.map(_climbed, (self.options, not self.state.stored), map(layers.__getitem__, layers))
        for done, (name, found) in enumerate(zip(layers, climbed, strict=True), 1):
            for place, (form, loss, size_bytes, weight) in enumerate(found):
                make = partial(self._rung, name, place) if weight is None else partial(_same, weight)
                self.found[name].append(Candidate(form, loss, size_bytes, 0.0, make))
                self.settled.add(name)
            self.progress(stage, done, len(layers))

    def _rung(self, name: str, place: int) -> FactoredWeight:
        """The weight at that place of a layer's ladder; what comes before it is drawn from the same generator."""
        return next(islice(_ladder(self.options, self.state.layers[name]), place, None))

    @property
    def laddered(self) -> bool:
        return self.options.solver == "projected-gradient" or self.options.form == "vq"

    def at(self, rate: float) -> float:
        """Solves every layer at λ = `rate`; the bytes of the cheapest candidates at that λ."""
        names = list(self.state.layers)
        wanted = [name for name in names if name not in self.settled]
        for done in range(len(names) - len(wanted) + 1):
            self.progress("rounding", done, len(names))
        self._solve(wanted, rate, "rounding")
        total = sum(_cheapest(self.found[name], rate).size_bytes for name in names)
        return total + predicted_vector_bits(list(self.vectors(rate).values())) / 8

    @cached_property
    def met(self) -> frozenset[str]:
        """Layers that are solved behind a compressed prefix."""
        if self.state.prefix is None or self.laddered:
            return frozenset()
        return self.state.prefix.names.intersection(self.state.layers)

    def walk(self, rate: float, room: float) -> dict[str, Candidate]:
        """Solves the layers behind the prefix, from λ = `rate` on, so that all together take about `room` bytes.

        What earlier layers take more or less than expected is spread over the later ones. The layers make up for
        each other's very errors, so they only fit together.
        """
        chosen: dict[str, Candidate] = {}
        alone = [name for name in self.state.layers if name not in self.met]
        far = [name for name in alone if not any(1 / NEARBY < c.rate / rate < NEARBY for c in self.found[name])]
        self._solve(far, rate)
        for name in alone:
            weight = _cheapest(self.found[name], rate).make()
            chosen[name] = replace(_cheapest(self.found[name], rate), make=partial(_same, weight))
        # The form that wins without the prefix wins with it: the weight hardly changes.
        forms = {name: _cheapest(self.found[name], rate).form for name in self.met}
        expected = {name: self.learned.get(name, 1.0) * _size_at(self.found[name], rate) for name in self.met}

        def planned(name: str) -> float:
            return expected[name] * math.pow(rate / chosen[name].rate, ELASTICITY)

        def steered() -> float:
            behind = [other for other in expected if other in chosen]
            trust = LEARNING * sum(expected.values())
            surprise = (trust + sum(chosen[other].size_bytes for other in behind)) / (trust + sum(map(planned, behind)))
            left = room - sum(candidate.size_bytes for candidate in chosen.values())
            due = surprise * sum(size for other, size in expected.items() if other not in chosen)
            ratio = math.pow(due / max(left, 1e-9), 1 / ELASTICITY)
            return rate * min(max(ratio, 1 / STEERING), STEERING)

        def solved(name: str, layer: Layer) -> Candidate:
            solve = self._reachable(layer, self.options.rank)[forms[name]]
            found = self._at(solve, layer, steered())
            if len(chosen) == len(self.state.layers) - 1:
                # Nothing comes after it: the last layer is asked again until it fills what is left.
                left = room - sum(candidate.size_bytes for candidate in chosen.values())
                for _ in range(CLOSINGS):
                    if left <= 0 or abs(found.size_bytes - left) <= room * TOLERANCE / 2:
                        break
                    ratio = math.pow(found.size_bytes / left, 1 / ELASTICITY)
                    found = self._at(solve, layer, found.rate * min(max(ratio, 1 / STEERING), STEERING))
            return found

        found = self._behind(rate, chosen, solved)
        # With those that the compressed network never came to: routes may depend on values.
        chosen.update(found)
        for name in expected:
            self.learned[name] = self.learned.get(name, 1.0) * found[name].size_bytes / max(planned(name), 1e-9)
        return found

    def follow(self, plan: ModelPlan) -> dict[str, Candidate]:
        """Every layer in the form and at the λ of a plan."""

        def solved(name: str, layer: Layer) -> Candidate:
            decided = plan.layers[name]
            weight = self._reachable(layer, plan.rank_by)[decided.form](decided.rate)
            found = _candidate(layer, weight, decided.rate)
            if not self.state.stored:
                return found
            again = partial(
                resolved, self.state.layers, name, decided.form, decided.rate, plan.rank_by, self.workers.map
            )
            return replace(found, make=again)

        alone = [name for name in self.state.layers if not plan.behind_prefix or name not in self.met]
        return self._behind(plan.rate, {name: solved(name, self._spread(name)) for name in alone}, solved)

    def _spread(self, name: str) -> Layer:
        """A layer whose parts go to the workers."""
        return replace(self.state.layers[name], each=self.workers.map)

    @staticmethod
    def _at(solve: Callable[[float], FactoredWeight], layer: Layer, rate: float) -> Candidate:
        return _candidate(layer, solve(rate), rate)

    def _behind(
        self, rate: float, chosen: dict[str, Candidate], solved: Callable[[str, Layer], Candidate]
    ) -> dict[str, Candidate]:
        """Adds to `chosen` all other layers in the network's order, each on the inputs that those before it leave.

        `solved` makes a layer's candidate when its turn comes; small tensors are at λ = `rate`.
        """
        prefix, layers = self.state.prefix, self.state.layers
        if prefix is not None and not self.met <= chosen.keys():
            placed = {name: vector.tensor() for name, vector in self.vectors(rate).items()}
            placed |= {name: candidate.make().tensor() for name, candidate in chosen.items()}
            alone = len(chosen)

            def solve(name: str, met: Met) -> np.ndarray:
                self.progress("rounding behind the prefix", len(chosen) - alone, len(self.met))
                chosen[name] = solved(name, layers[name].behind(met, len(chosen) < len(layers) - 1, self.workers.map))
                return chosen[name].make().tensor()

            prefix.walk(self.met, placed, solve)
            self.progress("rounding behind the prefix", len(self.met), len(self.met))
        return {name: chosen.get(name) or solved(name, self._spread(name)) for name in layers}

    @staticmethod
    def _reachable(layer: Layer, rank_by: str) -> dict[str, Callable[[float], FactoredWeight]]:
        """How this layer is solved at a λ, by form; see `plan.RANK_RULES` for `rank_by`."""
        basis = partial(layer.solve_basis, pricer=pricer)
        solvers: dict[str, Callable[[float], FactoredWeight]] = {"direct": partial(layer.solve_direct, pricer=pricer)}
        if layer.has_taps:
            solvers["separable"] = layer.solve_separable
        solvers["sparse_pca"] = partial(basis, "sparse_pca")
        if min(layer.tiling.matrix_shape) > 1:
            solvers["svd"] = partial(basis, "svd", rank_by=rank_by)
        return solvers

    def _solvers(self, layer: Layer) -> dict[str, Callable[[float], FactoredWeight]]:
        """Of these the form asked for, `direct` where it cannot be had, or those that can win."""
        form, solvers = self.options.form, self._reachable(layer, self.options.rank)
        if form != "auto":
            return {form: solvers[form]} if form in solvers else {"direct": solvers["direct"]}
        # A basis pays for itself only where it is small beside the codes.
        depth, count = layer.basis_tiling.tiled_shape
        wanted = ("direct", "separable", "sparse_pca") if count >= 8 * depth else ("direct", "separable")
        return {name: solvers[name] for name in wanted if name in solvers}

    def vectors(self, rate: float) -> dict[str, FactoredVector]:
        return {
            name: quantise(small.values, small.curvature, VECTOR_SHARE * rate)
            for name, small in self.state.small.items()
        }

    def overhead(self, rate: float) -> float:
        """Bytes of a file beside what `at` counts: index, names, checksums, header, exact tensors."""
        small = self.vectors(rate)
        sizes = {name: math.ceil(found[-1].size_bytes) for name, found in self.found.items()}
        stored: dict[str, Any] = {name: _outline(shape) for name, shape in self.state.shapes.items()}
        contents = self._contents(stored, small)
        records = [bytes(sizes[name]) for name in contents.tensors if name in sizes]
        counted = sum(sizes.values()) + predicted_vector_bits(list(small.values())) / 8
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

    def _contents(self, weights: Mapping[str, FactoredWeight], small: Mapping[str, FactoredVector]) -> Contents:
        state = self.state
        stored: dict[str, Any] = dict(weights) | dict(small) | dict(state.exact)
        aliases = {alias: name for alias, name in state.aliases.items() if name in stored}
        return Contents({name: stored[name] for name in state.dtypes if name in stored}, state.dtypes, aliases)

    def _written(self, chosen: Mapping[str, Candidate], small: Mapping[str, FactoredVector]) -> bytes:
        missing = [candidate for candidate in chosen.values() if candidate not in self.records]
        made = self.workers.map(_record, None, (candidate.make() for candidate in missing))
        self.records.update(zip(missing, made, strict=True))
        shapes = self.state.shapes
        contents = self._contents({name: _outline(shapes[name]) for name in chosen}, small)
        return to_bytes(contents, [self.records[chosen[name]].data for name in contents.tensors if name in chosen])

    def packed(
        self, data: bytes, chosen: Mapping[str, Candidate], rate: float, seed: int, behind_prefix: bool, rank_by: str
    ) -> Packed:
        """The bytes of a file that was written of `chosen`, with what was decided for them."""
        layers = {}
        for name, candidate in chosen.items():
            record = self.records[candidate]
            layers[name] = LayerPlan(
                candidate.form, record.step, record.rank, record.depth, candidate.rate, round(candidate.size_bytes),
                candidate.loss,
            )  # fmt: skip
        return Packed(data, ModelPlan(layers, rate, seed, len(data), behind_prefix, rank_by))


def _outline(shape: tuple[int, ...]) -> FactoredWeight:
    """A weight of that shape that takes no memory."""
    tiling = Tiling(shape)
    codes = Codes(np.broadcast_to(np.zeros(1, np.int32), tiling.matrix_shape), IDENTITY_GRID)
    return FactoredWeight("direct", tiling, Basis(None, IDENTITY_GRID), codes)


def _first_rate(state: State, size_bytes: int) -> float:
    """A λ at which Gaussian weights would take `size_bytes`, to start the search from."""

    def told(layer: Layer) -> tuple[int, float, Callable[[float], float]]:
        spread = max(float(layer.tensor.std()), 1e-12)
        return layer.tensor.size, spread, layer.step_of(layer.problem.feedback.residual)

    spreads = [told(state.layers[name]) for name in state.layers]

    def size(rate: float) -> float:
        bits = 0.0
        for count, spread, step_of in spreads:
            ratio = spread / step_of(rate)
            bits += count * 0.5 * math.log2(1 + 2 * math.pi * math.e * ratio * ratio)
        return bits / 8

    low, high = -120.0, 120.0
    # Past the finest steps no λ makes a file larger: a search that began there would not find back.
    within = min(size_bytes, 0.99 * size(2**low))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if size(2**middle) < within else (middle, high)
    return 2**high


def rates_of(state: State) -> list[float]:
    """The λ of an analysis, the largest first: from half a bit a weight to six, each √2 times smaller."""
    entries = sum(math.prod(shape) for shape in state.shapes.values())
    coarsest, finest = (_first_rate(state, int(entries * bits / 8)) for bits in (COARSEST_BITS, FINEST_BITS))
    return [coarsest / 2 ** (step / 2) for step in range(1 + math.ceil(2 * math.log2(coarsest / finest)))]


def rung(state: State, rate: float, options: Options, progress: Progress, workers: Workers = ALONE) -> Rung:
    """Every layer at λ = `rate`, by itself."""
    search = _Search(state, options, progress, workers)
    size = search.at(rate) + search.overhead(rate)
    return Rung(rate, size, {name: _cheapest(found, rate) for name, found in search.found.items()})


def pack(
    state: State, size_bytes: int, options: Options, progress: Progress, rungs: Sequence[Rung] = (),
    workers: Workers = ALONE,
) -> Packed:  # fmt: skip
    """The best file of at most `size_bytes` for a state.

    λ is searched by the secant of log size over log λ, or looked up between `rungs` of an analysis. Layers are then
    solved behind the compressed prefix; where there is none, all candidates met compete.
    Raises BudgetError, with the smallest size, where the size cannot be met.
    """
    search = _Search(state, options, progress, workers)
    if search.laddered:
        search.ladder()
    goal = max(size_bytes * (1 - TOLERANCE / 2), 1.0)
    for step in rungs:
        for name, candidate in step.layers.items():
            search.found[name].append(candidate)
    bracket = _between(rungs, goal) or _bracket(search, _first_rate(state, size_bytes), goal)
    if search.met and (found := _walked(search, bracket, size_bytes)) is not None:
        data, chosen, rate = found
        return search.packed(data, chosen, rate, options.seed, True, options.rank)
    best = bracket.below or bracket.above
    assert best is not None
    try:
        rate, (data, chosen) = _fitting(search, best[0], size_bytes)
        # Where a layer changes its form the size jumps: finer candidates of the others fill the gap.
        finer = bracket.above[0] if bracket.above else rate
        for _ in range(FILLINGS):
            if len(data) >= size_bytes * (1 - 2 * TOLERANCE) or finer < 1 / LARGEST_RATE:
                break
            finer /= FILLING_RATIO
            search.at(finer)
            data, chosen = search.file(rate, size_bytes)
    except BudgetError:
        rate, (data, chosen) = LARGEST_RATE, _smallest(search)
        if len(data) > size_bytes:
            raise BudgetError(
                f"{size_bytes:,} bytes cannot be met: the smallest file of this model takes {len(data):,} bytes, "
                f"with every weight at its coarsest; ask for more"
            ) from None
    return search.packed(data, chosen, rate, options.seed, False, options.rank)


@dataclass(frozen=True)
class _Bracket:
    """The tries (λ, size) nearest to a size from above and from below, and the nearest of all."""

    above: tuple[float, float] | None
    below: tuple[float, float] | None
    nearest: tuple[float, float]


def _between(rungs: Sequence[Rung], goal: float) -> _Bracket | None:
    """The λ at which the sizes of rungs meet `goal`; None where they do not reach around it."""
    larger = [(step.rate, step.size_bytes) for step in rungs if step.size_bytes > goal]
    smaller = [(step.rate, step.size_bytes) for step in rungs if step.size_bytes <= goal]
    if not larger or not smaller:
        return None
    above, below = max(larger), min(smaller)
    share = math.log(above[1] / goal) / math.log(above[1] / below[1])
    return _Bracket(above, below, (above[0] * (below[0] / above[0]) ** share, goal))


def _bracket(search: _Search, rate: float, goal: float) -> _Bracket:
    """Looks for the λ where a file would have `goal` bytes, by the secant of log size over log λ.

    Where walks follow, which steer themselves, a λ that is nearly right will do.
    """
    tolerance = WALK_TOLERANCE if search.met else TOLERANCE / 2
    above: tuple[float, float] | None = None
    below: tuple[float, float] | None = None
    nearest: tuple[float, float] | None = None
    overhead: float | None = None
    last: tuple[float, float] | None = None
    stride = STRIDE
    for _ in range(SEARCHES):
        counted = search.at(rate)
        overhead = search.overhead(rate) if overhead is None else overhead
        size = counted + overhead
        # Where a file hardly grows or shrinks with λ its size does not tell how far to go.
        if last is not None and abs(math.log(size / last[1])) < FLAT * abs(math.log(rate / last[0])):
            stride *= stride
        last = (rate, size)
        if size > goal:
            above = (rate, size)
        else:
            below = (rate, size)
        if nearest is None or abs(size - goal) < abs(nearest[1] - goal):
            nearest = (rate, size)
        following = _next_rate(rate, size, goal, above, below, stride)
        if abs(size - goal) <= goal * tolerance or following is None:
            break
        slow = search.state.large_moments
        if slow and above is not None and below is not None and above[1] < LARGE_BRACKET * below[1]:
            break
        rate = following
    assert nearest is not None
    return _Bracket(above, below, nearest)


def _walked(search: _Search, bracket: _Bracket, size_bytes: int) -> tuple[bytes, dict[str, Candidate], float] | None:
    """The largest file within `size_bytes` of at most `WALKS` walks, its layers and the λ of its small tensors.

    None where none of them fits.
    """
    rate, unforeseen = bracket.nearest[0], 0.0
    goal = size_bytes * (1 - TOLERANCE / 2)
    best: tuple[bytes, dict[str, Candidate], float] | None = None
    for _ in range(WALKS):
        small = search.vectors(rate)
        room = goal - search.overhead(rate) - predicted_vector_bits(list(small.values())) / 8
        chosen = search.walk(rate, room - unforeseen)
        data = search._written(chosen, small)
        if len(data) <= size_bytes and (best is None or len(data) > len(best[0])):
            best = data, chosen, rate
        if size_bytes * (1 - 1.5 * TOLERANCE) <= len(data) <= size_bytes:
            break
        # Records take other bytes than predicted, by little.
        unforeseen = room - goal + len(data) - sum(candidate.size_bytes for candidate in chosen.values())
        rate = float(np.median([chosen[name].rate for name in search.met]))
    return best


def _next_rate(
    rate: float,
    size: float,
    goal: float,
    above: tuple[float, float] | None,
    below: tuple[float, float] | None,
    stride: float,
) -> float | None:
    """Where log size would meet log goal; None where λ has nowhere left to go."""
    if above is None or below is None:
        # Half a bit a weight and more is worth a factor of two in λ.
        following = rate * min(max((size / goal) ** 3, 1 / 64), 64.0)
        following = following * stride if size > goal else following / stride
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


def resolved(
    layers: Mapping[str, Layer], name: str, form: str, rate: float, rank_by: str, each: Map = in_turn
) -> FactoredWeight:
    """The weight of a layer in a form that λ leads to, solved at λ = `rate`, its parts called for by `each`.

    See `plan.RANK_RULES` for `rank_by`.
    """
    return _Search._reachable(replace(layers[name], each=each), rank_by)[form](rate)


def pack_plan(state: State, plan: ModelPlan, options: Options, progress: Progress, workers: Workers = ALONE) -> Packed:
    """The file that a plan describes: each layer in its form at its λ, whatever size that gives.

    Raises MismatchError where the plan is of other layers or a λ is no positive number, UnsupportedError for forms
    that no λ leads to.
    """
    search = _Search(state, options, progress, workers)
    if set(plan.layers) != set(state.layers):
        odd = sorted(set(plan.layers) ^ set(state.layers))
        raise MismatchError(f"the plan is not of this model: {odd[0]!r} is only in one of them")
    for name, layer in plan.layers.items():
        forms = ", ".join(search._reachable(state.layers[name], plan.rank_by))
        if layer.form not in forms.split(", "):
            raise UnsupportedError(f"the plan wants {layer.form} for {name!r}, which a plan can store as {forms}")
    for name, rate in [("the small tensors", plan.rate), *((name, layer.rate) for name, layer in plan.layers.items())]:
        if not 0 < rate < math.inf:
            raise MismatchError(f"the plan's rate of {name} is {rate}: λ is positive; projected gradients have none")
    chosen = search.follow(plan)
    small = search.vectors(plan.rate)
    data = search._written(chosen, small)
    return search.packed(data, chosen, plan.rate, plan.seed, plan.behind_prefix, plan.rank_by)
