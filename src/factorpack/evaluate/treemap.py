"""A squarified treemap: rectangles of given areas, as near to squares as can be (Bruls, Huizing & van Wijk 2000)."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A rectangle: left, top, width and height, in the units of the whole."""

    left: float
    top: float
    width: float
    height: float


def _worst(row: Sequence[float], side: float) -> float:
    """The largest ratio of sides in a row of areas along `side`."""
    thickness = sum(row) / side
    return max(max(thickness * thickness / area, area / (thickness * thickness)) for area in row)


def treemap(sizes: Sequence[float], width: float, height: float) -> list[Box]:
    """Boxes in the order of `sizes`, which are above zero; they fill `width` x `height`, areas in proportion."""
    order = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    scale = width * height / sum(sizes) if sizes else 0.0
    boxes: dict[int, Box] = {}
    left, top = 0.0, 0.0
    start = 0
    while start < len(order):
        side = min(width, height)
        areas = [sizes[order[start]] * scale]
        for place in order[start + 1 :]:
            wider = [*areas, sizes[place] * scale]
            if _worst(wider, side) > _worst(areas, side):
                break
            areas = wider
        thickness, along = sum(areas) / side, 0.0
        for place, area in zip(order[start:], areas, strict=False):
            length = area / thickness
            upright = width >= height
            boxes[place] = (
                Box(left, top + along, thickness, length) if upright else Box(left + along, top, length, thickness)
            )
            along += length
        if width >= height:
            left, width = left + thickness, width - thickness
        else:
            top, height = top + thickness, height - thickness
        start += len(areas)
    return [boxes[place] for place in range(len(sizes))]
