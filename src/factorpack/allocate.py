"""Rate-distortion curves to choices: one Lagrangian over all tensors, then what is left of the budget is filled.

A point of a tensor is a way to store it, with its bytes and its loss. Choosing at every tensor the point of least
loss + μ·bytes for one μ is the best allocation of those bytes that it spends (Everett 1963; Shoham & Gersho 1988);
only points on the lower convex hull are ever chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from factorpack.errors import BudgetError


@dataclass(frozen=True)
class Point:
    """One way to store a tensor: `size_bytes` of its record and the `loss` that it causes."""

    size_bytes: int
    loss: float


def hull(points: Sequence[Point]) -> list[int]:
    """Indices of the points on the lower convex hull, the smallest first, loss strictly falling."""
    order = sorted(range(len(points)), key=lambda i: (points[i].size_bytes, points[i].loss, i))
    kept: list[int] = []
    for index in order:
        if kept and points[index].loss >= points[kept[-1]].loss:
            continue
        while len(kept) > 1 and _gain(points, kept[-2], kept[-1]) <= _gain(points, kept[-1], index):
            kept.pop()
        kept.append(index)
    return kept


def _gain(points: Sequence[Point], smaller: int, larger: int) -> float:
    """Loss saved a byte from one point to a larger one."""
    bytes_more = points[larger].size_bytes - points[smaller].size_bytes
    return (points[smaller].loss - points[larger].loss) / max(bytes_more, 1e-9)


def allocate(curves: Sequence[Sequence[Point]], budget_bytes: int) -> list[int]:
    """The index of a point for each tensor, within the budget in all.

    Steps along the hulls are taken from the most loss saved a byte to the least; ties by place. A step that no
    longer fits is left out with those behind it on its hull, and smaller ones may still be taken.
    Raises BudgetError where not even the smallest points fit.
    """
    hulls = [hull(points) for points in curves]
    at = [0] * len(curves)
    left = budget_bytes - sum(points[h[0]].size_bytes for points, h in zip(curves, hulls, strict=True))
    if left < 0:
        raise BudgetError(
            f"the smallest way to store the tensors takes {budget_bytes - left} bytes, not {budget_bytes}"
        )
    steps = sorted(
        (-_gain(points, h[k], h[k + 1]), place, k)
        for place, (points, h) in enumerate(zip(curves, hulls, strict=True))
        for k in range(len(h) - 1)
    )
    for _, place, k in steps:
        points, h = curves[place], hulls[place]
        more = points[h[k + 1]].size_bytes - points[h[k]].size_bytes
        if at[place] == k and more <= left:
            at[place] = k + 1
            left -= more
    return [h[k] for h, k in zip(hulls, at, strict=True)]
