"""How peers are told apart in pictures, by marks and dashes first: colour only helps."""

from dataclasses import dataclass
from itertools import cycle
from math import isfinite, nan

from factorpack.bench.registry import PEERS
from factorpack.bench.results import Point, Results


@dataclass(frozen=True)
class Look:
    """A mark, as matplotlib calls it; dashes, on and off in points; a colour."""

    mark: str
    dashes: tuple[float, ...]
    colour: str


MARKS = ("o", "s", "^", "D", "P", "v", "X", "<", "p", ">", "*", "h", "d")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (1, 2), (6, 2, 1, 2), (3, 2))
COLOURS = ("#000000", "#c1121f", "#4a4e69", "#1d6fa5", "#7b8c1f", "#8e5ea2", "#b5651d", "#2a9d8f", "#777777")
LOOKS = {
    name: Look(*look) for name, look in zip(PEERS, zip(MARKS, cycle(DASHES), cycle(COLOURS), strict=False), strict=True)
}


def curves(results: Results) -> dict[str, list[Point]]:
    """The points of each peer that can be drawn, by size, in the order of the peers."""
    score = results.original.score
    found = {}
    for name in PEERS:
        points = [p for p in results.good if p.peer == name and isfinite(p.scores.get(score, nan))]
        if points:
            found[name] = sorted(points, key=lambda point: point.size_bytes)
    return found


def floor(results: Results) -> float:
    """The lowest score that is drawn: a network that lost half of what counts is of no use.

    That is half the way down from the original to the worst that was measured, or the lowest of the first peer's where
    that is lower.
    """
    score, original = results.original.score, results.original.scores[results.original.score]
    drawn = curves(results)
    values = [point.scores[score] for points in drawn.values() for point in points]
    first = [point.scores[score] for point in next(iter(drawn.values()), [])]
    half = original - (original - min(values, default=original)) / 2
    return min([half, *first])
