"""Second moments of the inputs of weights: running sums over batches, and the means that come of them.

Letters: m outputs, n inputs of one group, g groups, P positions (samples x places where a weight is applied).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from factorpack.errors import TaskError

KINDS = ("moments", "counts")
"""Tensors that are written of the statistics of a weight."""


@dataclass(frozen=True, eq=False)
class WeightStatistics:
    """What one weight met: `moments` (g, n, n), the mean of x·xᵀ, and how its inputs reach it.

    `transposed` says that inputs come first in the tensor (transposed convolutions, `x @ W`); `embedding`
    that it is only looked up by row, its moments then being the identity, and `counts` (m,) tells how often each
    row was. `positions` counts what entered the mean, `uses` the calls.
    """

    moments: Tensor
    transposed: bool
    embedding: bool
    positions: float
    uses: int
    counts: Tensor | None = None

    def parts(self) -> tuple[list[Any], dict[str, Tensor]]:
        """What is written of it: numbers, and tensors by their kind."""
        tensors = {"moments": self.moments} | ({} if self.counts is None else {"counts": self.counts})
        return [self.transposed, self.embedding, self.positions, self.uses], tensors

    @classmethod
    def of(cls, numbers: Sequence[Any], tensors: Mapping[str, Tensor]) -> "WeightStatistics":
        """The inverse of `parts`."""
        transposed, embedding, positions, uses = numbers
        return cls(tensors["moments"], transposed, embedding, positions, uses, tensors.get("counts"))


@dataclass(eq=False)
class Sums:
    """Running sums of one weight: second moments over its dense uses; look-ups by row are only counted."""

    groups: int
    inputs: int
    transposed: bool = False
    uses: int = 0
    counts: Tensor | None = None
    moments: Tensor = field(init=False)
    positions: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.moments = torch.zeros(self.groups, self.inputs, self.inputs)
        self.positions = torch.zeros(self.groups)

    def add(self, group: int, rows: Tensor, scale: float) -> None:
        """Adds a group's inputs `rows` (P, n), each standing for `scale` positions."""
        rows = rows.float()
        squares = (rows.T @ rows).cpu()
        self.moments[group] += squares if scale == 1 else scale * squares
        self.positions[group] += scale * len(rows)

    def merge(self, other: "Sums") -> None:
        """Adds what a later batch met; nothing where that was in another layout."""
        if (self.groups, self.inputs, self.transposed) != (other.groups, other.inputs, other.transposed):
            return
        self.moments += other.moments
        self.positions += other.positions
        self.uses += other.uses
        if other.counts is not None:
            self.counts = other.counts if self.counts is None else self.counts + other.counts

    def finish(self, name: str) -> WeightStatistics:
        """The means, made of the sums in place; a weight both looked up and multiplied gets both by their positions.

        A look-up meets a one-hot input and hands the row on: its moment over the columns is the identity,
        brought to the level of the dense uses. Raises TaskError, with the weight's name, where they are not finite.
        """
        total = float(self.positions.max())
        lookups = 0.0 if self.counts is None else float(self.counts.sum())
        if not total:
            identity = torch.eye(self.inputs).repeat(self.groups, 1, 1)
            return WeightStatistics(
                identity, self.transposed, lookups > 0, lookups, self.uses, self.counts if lookups else None
            )
        moments = self.moments.div_(self.positions.clamp_min(1)[:, None, None])
        if not bool(moments.isfinite().all()):
            raise TaskError(f"the inputs of {name!r} in calibration are too large to be squared: scale them down")
        if lookups:
            share = lookups / (lookups + total)
            level = moments.diagonal(dim1=-2, dim2=-1).mean()
            moments = (1 - share) * moments + share * level * torch.eye(self.inputs)
        return WeightStatistics(moments, self.transposed, False, total + lookups, self.uses)


def add_sums(to: dict[str, Sums], found: Mapping[str, Sums]) -> None:
    """Adds what a later batch met, by weight."""
    for name, part in found.items():
        if name in to:
            to[name].merge(part)
        else:
            to[name] = part
