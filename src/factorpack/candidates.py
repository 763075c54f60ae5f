"""Candidates: ways to store a layer, each in a form and at a λ."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from factorpack.coding import plan_integers
from factorpack.coding.records import predicted_bits
from factorpack.factors import FactoredWeight
from factorpack.options import Options
from factorpack.solve.layer import Layer
from factorpack.solve.sequential import Map, in_turn

PRICED_RADIUS = 31
"""Integers beyond pay what the outermost of these does."""


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

    def cost(self, rate: float) -> float:
        """Loss + λ·bits at λ = `rate`."""
        return self.loss + 8 * rate * self.size_bytes


@dataclass(frozen=True, eq=False)
class Rung:
    """What a state would be at one λ: the cheapest candidate of each layer, and the bytes of that file."""

    rate: float
    size_bytes: float
    layers: Mapping[str, Candidate]


def cheapest(candidates: Sequence[Candidate], rate: float) -> Candidate:
    """The least loss + λ·bits."""
    return min(candidates, key=lambda candidate: candidate.cost(rate))


def size_at(candidates: Sequence[Candidate], rate: float) -> float:
    """The bytes of the cheapest at λ = `rate`, between two λ by the log of both."""
    rates = sorted({candidate.rate for candidate in candidates})
    sizes = [cheapest([c for c in candidates if c.rate == r], r).size_bytes for r in rates]
    return float(np.exp(np.interp(math.log(rate), np.log(rates), np.log(np.maximum(sizes, 1.0)))))


def pricer(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits, row and column classes of the coder for integers (k, N); see `solve.layer.Pricer`."""
    prices = plan_integers(codes).price(PRICED_RADIUS)
    return prices.bits, prices.rows, prices.columns


def reachable(layer: Layer, rank_by: str) -> dict[str, Callable[[float], FactoredWeight]]:
    """How this layer is solved at a λ, by form; see `plan.RANK_RULES` for `rank_by`."""
    basis = partial(layer.solve_basis, pricer=pricer)
    solvers: dict[str, Callable[[float], FactoredWeight]] = {"direct": partial(layer.solve_direct, pricer=pricer)}
    if layer.has_taps:
        solvers["separable"] = layer.solve_separable
    solvers["sparse_pca"] = partial(basis, "sparse_pca")
    if min(layer.tiling.matrix_shape) > 1:
        solvers["svd"] = partial(basis, "svd", rank_by=rank_by)
    return solvers


def solvers_of(layer: Layer, options: Options) -> dict[str, Callable[[float], FactoredWeight]]:
    """Of those that are reachable the form asked for, `direct` where it cannot be had, or those that can win."""
    form, solvers = options.form, reachable(layer, options.rank)
    if form != "auto":
        return {form: solvers[form]} if form in solvers else {"direct": solvers["direct"]}
    # A basis pays for itself only where it is small beside the codes.
    depth, count = layer.basis_tiling.tiled_shape
    wanted = ("direct", "separable", "sparse_pca") if count >= 8 * depth else ("direct", "separable")
    return {name: solvers[name] for name in wanted if name in solvers}


def resolved(
    layers: Mapping[str, Layer], name: str, form: str, rate: float, rank_by: str, each: Map = in_turn
) -> FactoredWeight:
    """The weight of a layer in a form that λ leads to, solved at λ = `rate`, its parts called for by `each`.

    See `plan.RANK_RULES` for `rank_by`.
    """
    return reachable(replace(layers[name], each=each), rank_by)[form](rate)


def same(weight: FactoredWeight) -> FactoredWeight:
    """What makes a candidate that holds its weight."""
    return weight


def measured(layer: Layer, weight: FactoredWeight, rate: float) -> Candidate:
    return Candidate(weight.form, layer.loss(weight), predicted_bits(weight) / 8, rate, partial(same, weight))


Outlined = tuple[str, float, float, FactoredWeight | None]
"""Form, loss and predicted bytes of a candidate, and its weight where that is to be held."""


def _outlined(layer: Layer, weight: FactoredWeight, held: bool) -> Outlined:
    return weight.form, layer.loss(weight), predicted_bits(weight) / 8, weight if held else None


def solve_in_form(asked: tuple[float, str, bool], item: tuple[Layer, str]) -> Outlined:
    """A layer in a form at λ = `rate`; see `plan.RANK_RULES` for `rank_by`."""
    (rate, rank_by, held), (layer, form) = asked, item
    return _outlined(layer, reachable(layer, rank_by)[form](rate), held)


def ladder_of(options: Options, layer: Layer) -> Iterator[FactoredWeight]:
    """The weights of a layer that no λ leads to."""
    generator = torch.Generator().manual_seed(options.seed)
    if options.solver == "projected-gradient":
        return layer.descents(options.form, generator)
    return layer.codebooks(generator)


def climb(asked: tuple[Options, bool], layer: Layer) -> list[Outlined]:
    """All of a layer's ladder."""
    options, held = asked
    return [_outlined(layer, weight, held) for weight in ladder_of(options, layer)]
