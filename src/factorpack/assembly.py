"""Files of candidates: what is stored of each layer, and what a file takes beside that."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from factorpack.allocate import Point, allocate
from factorpack.candidates import Candidate
from factorpack.coding.records import encode_weight, predicted_vector_bits
from factorpack.container import Contents, to_bytes
from factorpack.factors import IDENTITY_GRID, Basis, Codes, FactoredVector, FactoredWeight
from factorpack.nn.state import State
from factorpack.plan import LayerPlan, ModelPlan
from factorpack.solve.vectors import quantise
from factorpack.tiling import Tiling
from factorpack.workers import ALONE, Workers

VECTOR_SHARE = 1 / 64
"""Part of λ that small tensors are rounded with: their errors add up over all positions alike, which the curvature
of single entries does not show (docs/log.md)."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A compressed state: the bytes of its file, and what was decided."""

    data: bytes
    plan: ModelPlan


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


@dataclass(eq=False)
class Assembly:
    """Makes files of a state's candidates; the record of each is coded once."""

    state: State
    workers: Workers = ALONE
    records: WeakKeyDictionary[Candidate, _Record] = field(default_factory=WeakKeyDictionary)

    def vectors(self, rate: float) -> dict[str, FactoredVector]:
        """The small tensors at λ = `rate`."""
        return {
            name: quantise(small.values, small.curvature, VECTOR_SHARE * rate)
            for name, small in self.state.small.items()
        }

    def overhead(self, rate: float, sizes: Mapping[str, int]) -> float:
        """Bytes of a file beside its layers, which take `sizes`, and its small tensors.

        These are those of index, names, checksums, header and exact tensors.
        """
        small = self.vectors(rate)
        stored: dict[str, Any] = {name: _outline(shape) for name, shape in self.state.shapes.items()}
        contents = self._contents(stored, small)
        records = [bytes(sizes[name]) for name in contents.tensors if name in sizes]
        counted = sum(sizes.values()) + predicted_vector_bits(list(small.values())) / 8
        return len(to_bytes(contents, records)) - counted

    def best(
        self, found: Mapping[str, Sequence[Candidate]], rate: float, budget: int
    ) -> tuple[bytes, dict[str, Candidate]]:
        """The best file within `budget` of the candidates `found` of each layer, small tensors at λ = `rate`.

        Predicted sizes lead; where the bytes then written exceed the budget, the budget of the weights shrinks by
        what was too much. Raises BudgetError where even the smallest candidates do not fit.
        """
        small = self.vectors(rate)
        names = list(self.state.layers)
        curves = [[Point(math.ceil(c.size_bytes), c.loss) for c in found[name]] for name in names]
        room = budget - len(self.written({}, small))
        while True:
            picked = allocate(curves, room)
            chosen = {name: found[name][i] for name, i in zip(names, picked, strict=True)}
            data = self.written(chosen, small)
            if len(data) <= budget:
                return data, chosen
            room -= len(data) - budget

    def _contents(self, weights: Mapping[str, FactoredWeight], small: Mapping[str, FactoredVector]) -> Contents:
        state = self.state
        stored: dict[str, Any] = dict(weights) | dict(small) | dict(state.exact)
        aliases = {alias: name for alias, name in state.aliases.items() if name in stored}
        return Contents({name: stored[name] for name in state.dtypes if name in stored}, state.dtypes, aliases)

    def written(self, chosen: Mapping[str, Candidate], small: Mapping[str, FactoredVector]) -> bytes:
        shapes = self.state.shapes
        # The largest first: to make it may take most of the memory, while the records of all others take none yet.
        order = sorted(chosen, key=lambda name: -math.prod(shapes[name]))
        missing = [chosen[name] for name in order if chosen[name] not in self.records]
        made = self.workers.map(_record, None, (candidate.make() for candidate in missing))
        self.records.update(zip(missing, made, strict=True))
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
