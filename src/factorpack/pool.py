"""The pool of candidates: those of every layer, as they are found at one λ after another."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, islice

import numpy as np

from factorpack.assembly import Assembly
from factorpack.candidates import (
    Candidate,
    Outlined,
    cheapest,
    climb,
    ladder_of,
    measured,
    reachable,
    resolved,
    same,
    size_at,
    solve_in_form,
    solvers_of,
)  # fmt: skip
from factorpack.coding.records import predicted_vector_bits
from factorpack.factors import FactoredWeight
from factorpack.nn.state import State
from factorpack.options import Options, Progress
from factorpack.plan import ModelPlan
from factorpack.solve.layer import Layer, Met
from factorpack.workers import ALONE, Workers

TOLERANCE = 0.003
"""A file that is less than this part below its budget is close enough."""
CLOSINGS = 4
ELASTICITY = 1 / 3
"""−∂ log bytes / ∂ log λ, about: from 1 to 2.5 bits a weight measured as 0.3 to 0.4 (docs/log.md)."""
LEARNING = 0.05
"""A walk learns from the layers behind it how large those before it will be; that part of all is taken as expected."""
STEERING = 2.5
"""By so much at most does a walk leave its λ to meet its bytes: in a deep network the layers shrink with all those
before them, and at 1.3 the last ones could not fill what was left, so that every layer was solved again."""
NEARBY = 1.3
"""A candidate whose λ is nearer than that is taken instead of solving anew."""


@dataclass(eq=False)
class Pool:
    """Candidates of every layer, as they are found at one λ after another."""

    state: State
    options: Options
    progress: Progress
    workers: Workers = ALONE
    found: dict[str, list[Candidate]] = field(default_factory=dict)
    assembly: Assembly = field(init=False)
    settled: set[str] = field(default_factory=set)
    """Layers that no λ changes any more."""
    learned: dict[str, float] = field(default_factory=dict)
    """By how much the last walk's layers were larger than what their candidates led to expect."""

    def __post_init__(self) -> None:
        self.found = {name: [] for name in self.state.layers}
        self.assembly = Assembly(self.state, self.workers)

    @property
    def _held(self) -> bool:
        """Whether candidates hold their weights: where these will most likely be needed, and there is memory for them.

        A walk solves its layers again, and of stored ones no more than one is to be held.
        """
        return not self.met and not self.state.stored

    def _told(self, name: str, found: Outlined, rate: float) -> Candidate:
        form, loss, size_bytes, weight = found
        if weight is not None:
            return Candidate(form, loss, size_bytes, rate, partial(same, weight))
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
        for found in self.workers.map(solve_in_form, asked, items):
            name, last = told.popleft()
            self.found[name].append(self._told(name, found, rate))
            if last and stage is not None:
                settled += 1
                self.progress(stage, settled, len(shapes))

    def _asked(self, name: str, told: deque[tuple[str, bool]]) -> Iterator[tuple[Layer, str]]:
        """A layer with each form that it is solved in; `told` gets its name for each, and which one is the last."""
        layer = self.state.layers[name]
        forms = list(solvers_of(layer, self.options))
        for form in forms:
            told.append((name, form == forms[-1]))
            yield layer, form

    def ladder(self) -> None:
        """The candidates that no λ leads to: codebooks, and every form by projected gradients."""
        layers = self.state.layers
        stage = f"{self.options.form}, {self.options.solver}"
        self.progress(stage, 0, len(layers))
        climbed = self.workers.map(climb, (self.options, not self.state.stored), map(layers.__getitem__, layers))
        for done, (name, found) in enumerate(zip(layers, climbed, strict=True), 1):
            for place, (form, loss, size_bytes, weight) in enumerate(found):
                make = partial(self._rung, name, place) if weight is None else partial(same, weight)
                self.found[name].append(Candidate(form, loss, size_bytes, 0.0, make))
                self.settled.add(name)
            self.progress(stage, done, len(layers))

    def _rung(self, name: str, place: int) -> FactoredWeight:
        """The weight at that place of a layer's ladder; what comes before it is drawn from the same generator."""
        return next(islice(ladder_of(self.options, self.state.layers[name]), place, None))

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
        total = sum(cheapest(self.found[name], rate).size_bytes for name in names)
        return total + predicted_vector_bits(list(self.assembly.vectors(rate).values())) / 8

    def overhead(self, rate: float) -> float:
        """Bytes of a file beside what `at` counts."""
        return self.assembly.overhead(
            rate, {name: math.ceil(found[-1].size_bytes) for name, found in self.found.items()}
        )

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
            weight = cheapest(self.found[name], rate).make()
            chosen[name] = replace(cheapest(self.found[name], rate), make=partial(same, weight))
        # The form that wins without the prefix wins with it: the weight hardly changes.
        forms = {name: cheapest(self.found[name], rate).form for name in self.met}
        expected = {name: self.learned.get(name, 1.0) * size_at(self.found[name], rate) for name in self.met}

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
            solve = reachable(layer, self.options.rank)[forms[name]]

            def at(rate: float) -> Candidate:
                return measured(layer, solve(rate), rate)

            found = at(steered())
            if len(chosen) == len(self.state.layers) - 1:
                # Nothing comes after it: the last layer is asked again until it fills what is left.
                left = room - sum(candidate.size_bytes for candidate in chosen.values())
                for _ in range(CLOSINGS):
                    if left <= 0 or abs(found.size_bytes - left) <= room * TOLERANCE / 2:
                        break
                    ratio = math.pow(found.size_bytes / left, 1 / ELASTICITY)
                    found = at(found.rate * min(max(ratio, 1 / STEERING), STEERING))
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
            weight = reachable(layer, plan.rank_by)[decided.form](decided.rate)
            found = measured(layer, weight, decided.rate)
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

    def _behind(
        self, rate: float, chosen: dict[str, Candidate], solved: Callable[[str, Layer], Candidate]
    ) -> dict[str, Candidate]:
        """Adds to `chosen` all other layers in the network's order, each on the inputs that those before it leave.

        `solved` makes a layer's candidate when its turn comes; small tensors are at λ = `rate`.
        """
        prefix, layers = self.state.prefix, self.state.layers
        if prefix is not None and not self.met <= chosen.keys():
            placed = {name: vector.tensor() for name, vector in self.assembly.vectors(rate).items()}
            placed |= {name: candidate.make().tensor() for name, candidate in chosen.items()}
            alone = len(chosen)

            def solve(name: str, met: Met) -> np.ndarray:
                self.progress("rounding behind the prefix", len(chosen) - alone, len(self.met))
                chosen[name] = solved(name, layers[name].behind(met, len(chosen) < len(layers) - 1, self.workers.map))
                return chosen[name].make().tensor()

            prefix.walk(self.met, placed, solve)
            self.progress("rounding behind the prefix", len(self.met), len(self.met))
        return {name: chosen.get(name) or solved(name, self._spread(name)) for name in layers}
