"""λ in training: it brings a size to its goal, and starts where bits are worth what they cost."""

import math

import pytest

from factorpack.nn.control import RateController


def test_it_starts_where_theory_says() -> None:
    controller = RateController(1000, 500)
    assert controller.rate == 0
    controller.heard(0.5)
    assert controller.rate == pytest.approx(2 * math.log(2) * 0.5 / 1000)


@pytest.mark.parametrize("start", [650.0, 500.0, 400.0])
def test_a_size_comes_to_its_goal(start: float) -> None:
    """Of a file that grows or shrinks slowly while bits are cheaper or dearer than e times what they were at first."""
    controller, size = RateController(1000, 500), start
    controller.heard(0.5)
    first = controller.rate
    for _ in range(300):
        controller.seen(size)
        size *= math.exp(-0.002 * (math.log(controller.rate / first) - 1))
    assert size == pytest.approx(500, rel=0.005)


def test_larger_files_make_bits_dearer() -> None:
    rates = []
    for size in (450, 500, 550):
        controller = RateController(1000, 500)
        controller.heard(0.5)
        controller.seen(size)
        rates.append(controller.rate)
    assert rates[0] < rates[1] < rates[2]
