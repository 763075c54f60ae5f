"""Choices within a budget, against every other choice there is."""

from itertools import product

import numpy as np
import pytest

from factorpack.allocate import Point, allocate, hull
from factorpack.errors import BudgetError


def curves_of(seed, tensors=4, points=5):
    """Whole numbers, so that sums of losses are exact; some points are alike, dominated or above the hull."""
    rng = np.random.default_rng(seed)
    return [
        [Point(int(b), float(loss)) for b, loss in rng.integers(0, (20, 60), (int(rng.integers(1, points + 1)), 2))]
        for _ in range(tensors)
    ]


def spent(curves, choice):
    return sum(points[i].size_bytes for points, i in zip(curves, choice, strict=True))


def lost(curves, choice):
    return sum(points[i].loss for points, i in zip(curves, choice, strict=True))


def everything(curves):
    return list(product(*(range(len(points)) for points in curves)))


def steps_of(curves):
    """All steps along all hulls as (loss saved a byte, bytes)."""
    found = []
    for points in curves:
        kept = hull(points)
        for a, b in zip(kept, kept[1:], strict=False):
            more = points[b].size_bytes - points[a].size_bytes
            found.append(((points[a].loss - points[b].loss) / more, more))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(60))
def test_the_hull_is_what_some_price_of_a_byte_chooses(seed):
    points = curves_of(seed, 1, 9)[0]
    kept = hull(points)
    sizes, losses = [points[i].size_bytes for i in kept], [points[i].loss for i in kept]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)
    gains = [(losses[k] - losses[k + 1]) / (sizes[k + 1] - sizes[k]) for k in range(len(kept) - 1)]
    assert gains == sorted(set(gains), reverse=True)
    # No point lies below the hull at any price; a price between two gains has its only best choice there.
    for price in [*gains, *((a + b) / 2 for a, b in zip(gains, gains[1:], strict=False)), 0.0, 1e-9, 1e9]:
        best = min(p.loss + price * p.size_bytes for p in points)
        assert min(points[i].loss + price * points[i].size_bytes for i in kept) == pytest.approx(best, abs=1e-6)
    assert points[kept[0]].size_bytes == min(p.size_bytes for p in points)
    assert points[kept[-1]].loss == min(p.loss for p in points)


@pytest.mark.parametrize("seed", range(40))
def test_where_the_budget_ends_with_a_step_no_choice_of_so_many_bytes_loses_less(seed):
    curves = curves_of(seed)
    # Budgets at which all steps down to some gain fit just so: Everett's theorem holds there, against any choice.
    budget = spent(curves, [hull(points)[0] for points in curves])
    for more in [0, *(more for _, more in steps_of(curves))]:
        budget += more
        found = allocate(curves, budget)
        assert spent(curves, found) == budget
        best = min(lost(curves, other) for other in everything(curves) if spent(curves, other) <= budget)
        assert lost(curves, found) == best


@pytest.mark.parametrize("seed", range(25))
def test_at_every_budget_the_loss_is_within_one_step_of_the_best_there_is(seed):
    curves = curves_of(seed)
    choices = [(spent(curves, other), lost(curves, other)) for other in everything(curves)]
    smallest = spent(curves, [hull(points)[0] for points in curves])
    largest = max(size for size, _ in choices)
    for budget in range(smallest, largest + 2):
        found = allocate(curves, budget)
        assert spent(curves, found) <= budget
        assert all(i in hull(points) for i, points in zip(found, curves, strict=True))
        # The first step that does not fit could have been taken in part: what it would have saved bounds the gap.
        left, gap = budget - smallest, 0.0
        for gain, more in steps_of(curves):
            if more > left:
                gap = gain * left
                break
            left -= more
        best = min(loss for size, loss in choices if size <= budget)
        assert best <= lost(curves, found) <= best + gap + 1e-9


def test_smaller_steps_fill_what_a_larger_one_leaves():
    curves = [[Point(0, 100.0), Point(50, 0.0)], [Point(0, 10.0), Point(10, 5.0), Point(20, 3.0)]]
    assert allocate(curves, 49) == [0, 2]
    assert allocate(curves, 50) == [1, 0]
    assert allocate(curves, 60) == [1, 1]


def test_ties_go_to_the_first():
    curves = [[Point(0, 5.0), Point(1, 4.0)]] * 3
    assert allocate(curves, 2) == [1, 1, 0]
    assert allocate([[Point(3, 1.0), Point(3, 1.0)]], 3) == [0]


def test_a_budget_without_end_takes_the_least_loss():
    for seed in range(10):
        curves = curves_of(seed)
        assert lost(curves, allocate(curves, 10**9)) == sum(min(p.loss for p in points) for points in curves)


def test_a_budget_below_the_smallest_says_what_would_do():
    curves = [[Point(30, 1.0), Point(10, 2.0)], [Point(5, 0.0)]]
    assert allocate(curves, 15) == [1, 0]
    with pytest.raises(BudgetError, match="takes 15 bytes, not 14"):
        allocate(curves, 14)
    assert allocate([], 0) == []
    with pytest.raises(BudgetError):
        allocate([], -1)
