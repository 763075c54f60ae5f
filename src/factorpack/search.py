"""The search over λ, until the file has the size that was asked for."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from factorpack.assembly import Packed
from factorpack.candidates import Candidate, Rung, cheapest, reachable
from factorpack.coding.records import predicted_vector_bits
from factorpack.errors import BudgetError, MismatchError, UnsupportedError
from factorpack.nn.state import State
from factorpack.options import Options, Progress
from factorpack.plan import ModelPlan
from factorpack.pool import TOLERANCE, Pool
from factorpack.solve.layer import Layer
from factorpack.workers import ALONE, Workers

SEARCHES = 14
LARGE_BRACKET = 1.15
"""Where layers take long to solve, sizes this ratio apart are close enough, and candidates of both are mixed."""
WALKS = 4
WALK_TOLERANCE = 0.03
COARSEST_BITS, FINEST_BITS = 0.5, 6
"""Bits a weight that an analysis reaches to."""
FLAT = 0.01
"""Where log size changes by less than that part of log λ, λ has hardly a hold on the size."""
STRIDE = 1.1
"""What a search for λ goes beyond what the size says."""
FILLINGS = 8
FILLING_RATIO = 1.15
LARGEST_RATE = 1e36
"""At that λ all weights are rounded away; past it, and below its inverse, nothing changes."""


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
    pool = Pool(state, options, progress, workers)
    size = pool.at(rate) + pool.overhead(rate)
    return Rung(rate, size, {name: cheapest(found, rate) for name, found in pool.found.items()})


def pack(
    state: State, size_bytes: int, options: Options, progress: Progress, rungs: Sequence[Rung] = (),
    workers: Workers = ALONE,
) -> Packed:  # fmt: skip
    """The best file of at most `size_bytes` for a state.

    λ is searched by the secant of log size over log λ, or looked up between `rungs` of an analysis. Layers are then
    solved behind the compressed prefix; where there is none, all candidates met compete.
    Raises BudgetError, with the smallest size, where the size cannot be met.
    """
    pool = Pool(state, options, progress, workers)
    if pool.laddered:
        pool.ladder()
    goal = max(size_bytes * (1 - TOLERANCE / 2), 1.0)
    for step in rungs:
        for name, candidate in step.layers.items():
            pool.found[name].append(candidate)
    bracket = _between(rungs, goal) or _bracket(pool, _first_rate(state, size_bytes), goal)
    if pool.met and (found := _walked(pool, bracket, size_bytes)) is not None:
        data, chosen, rate = found
        return pool.assembly.packed(data, chosen, rate, options.seed, True, options.rank)
    best = bracket.below or bracket.above
    assert best is not None
    try:
        rate, (data, chosen) = _fitting(pool, best[0], size_bytes)
        # Where a layer changes its form the size jumps: finer candidates of the others fill the gap.
        finer = bracket.above[0] if bracket.above else rate
        for _ in range(FILLINGS):
            if len(data) >= size_bytes * (1 - 2 * TOLERANCE) or finer < 1 / LARGEST_RATE:
                break
            finer /= FILLING_RATIO
            pool.at(finer)
            data, chosen = pool.assembly.best(pool.found, rate, size_bytes)
    except BudgetError:
        rate, (data, chosen) = LARGEST_RATE, _smallest(pool)
        if len(data) > size_bytes:
            raise BudgetError(
                f"{size_bytes:,} bytes cannot be met: the smallest file of this model takes {len(data):,} bytes, "
                f"with every weight at its coarsest; ask for more"
            ) from None
    return pool.assembly.packed(data, chosen, rate, options.seed, False, options.rank)


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


def _bracket(pool: Pool, rate: float, goal: float) -> _Bracket:
    """Looks for the λ where a file would have `goal` bytes, by the secant of log size over log λ.

    Where walks follow, which steer themselves, a λ that is nearly right will do.
    """
    tolerance = WALK_TOLERANCE if pool.met else TOLERANCE / 2
    above: tuple[float, float] | None = None
    below: tuple[float, float] | None = None
    nearest: tuple[float, float] | None = None
    overhead: float | None = None
    last: tuple[float, float] | None = None
    stride = STRIDE
    for _ in range(SEARCHES):
        counted = pool.at(rate)
        overhead = pool.overhead(rate) if overhead is None else overhead
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
        slow = pool.state.large_moments
        if slow and above is not None and below is not None and above[1] < LARGE_BRACKET * below[1]:
            break
        rate = following
    assert nearest is not None
    return _Bracket(above, below, nearest)


def _walked(pool: Pool, bracket: _Bracket, size_bytes: int) -> tuple[bytes, dict[str, Candidate], float] | None:
    """The largest file within `size_bytes` of at most `WALKS` walks, its layers and the λ of its small tensors.

    None where none of them fits.
    """
    rate, unforeseen = bracket.nearest[0], 0.0
    goal = size_bytes * (1 - TOLERANCE / 2)
    best: tuple[bytes, dict[str, Candidate], float] | None = None
    for _ in range(WALKS):
        small = pool.assembly.vectors(rate)
        room = goal - pool.overhead(rate) - predicted_vector_bits(list(small.values())) / 8
        chosen = pool.walk(rate, room - unforeseen)
        data = pool.assembly.written(chosen, small)
        if len(data) <= size_bytes and (best is None or len(data) > len(best[0])):
            best = data, chosen, rate
        if size_bytes * (1 - 1.5 * TOLERANCE) <= len(data) <= size_bytes:
            break
        # Records take other bytes than predicted, by little.
        unforeseen = room - goal + len(data) - sum(candidate.size_bytes for candidate in chosen.values())
        rate = float(np.median([chosen[name].rate for name in pool.met]))
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


def _fitting(pool: Pool, rate: float, size_bytes: int) -> tuple[float, tuple[bytes, dict[str, Candidate]]]:
    """The file at λ = `rate`, or at the next larger one, in growing strides, at which it fits."""
    stride = 1.01
    while True:
        try:
            return rate, pool.assembly.best(pool.found, rate, size_bytes)
        except BudgetError:
            if rate >= LARGEST_RATE:
                raise
        rate = min(rate * stride, LARGEST_RATE)
        stride *= stride
        pool.at(rate)


def _smallest(pool: Pool) -> tuple[bytes, dict[str, Candidate]]:
    """The smallest file. Of candidates that every search meets alone, so that all name the same size."""
    pool.at(LARGEST_RATE)
    chosen = {}
    for name, found in pool.found.items():
        met = [candidate for candidate in found if candidate.rate in (0.0, LARGEST_RATE)]
        chosen[name] = min(met, key=lambda c: c.size_bytes)
    return pool.assembly.written(chosen, pool.assembly.vectors(LARGEST_RATE)), chosen


def pack_plan(state: State, plan: ModelPlan, options: Options, progress: Progress, workers: Workers = ALONE) -> Packed:
    """The file that a plan describes: each layer in its form at its λ, whatever size that gives.

    Raises MismatchError where the plan is of other layers or a λ is no positive number, UnsupportedError for forms
    that no λ leads to.
    """
    pool = Pool(state, options, progress, workers)
    if set(plan.layers) != set(state.layers):
        odd = sorted(set(plan.layers) ^ set(state.layers))
        raise MismatchError(f"the plan is not of this model: {odd[0]!r} is only in one of them")
    for name, layer in plan.layers.items():
        forms = ", ".join(reachable(state.layers[name], plan.rank_by))
        if layer.form not in forms.split(", "):
            raise UnsupportedError(f"the plan wants {layer.form} for {name!r}, which a plan can store as {forms}")
    for name, rate in [("the small tensors", plan.rate), *((name, layer.rate) for name, layer in plan.layers.items())]:
        if not 0 < rate < math.inf:
            raise MismatchError(f"the plan's rate of {name} is {rate}: λ is positive; projected gradients have none")
    chosen = pool.follow(plan)
    small = pool.assembly.vectors(plan.rate)
    data = pool.assembly.written(chosen, small)
    return pool.assembly.packed(data, chosen, plan.rate, plan.seed, plan.behind_prefix, plan.rank_by)
