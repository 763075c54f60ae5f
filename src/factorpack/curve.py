"""Composition over sizes: a curve of size against score, the smallest file that keeps a score, a file of a plan.

Curve and search for a score make files from one analysis (`cache`) and score what is loaded back from them.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np

from factorpack.assembly import Packed
from factorpack.cache import Analysis, analyse, cached_state, opened
from factorpack.container import write
from factorpack.errors import BudgetError, TaskError, UnsupportedError
from factorpack.nn.state import State
from factorpack.options import Options, Progress
from factorpack.pipeline import Source, dense_bytes, load, one_thread
from factorpack.plan import ModelPlan
from factorpack.search import pack, pack_plan
from factorpack.sizes import human
from factorpack.store import Note
from factorpack.task import Scores, Task
from factorpack.workers import Workers, working

EVALUATIONS = 8
"""At most that many files are scored to find one; two more tell how much scores vary."""
BRACKET = 1.03
"""Sizes this ratio apart are close enough."""
NEIGHBOURS = (0.007, 0.014)
"""Parts by which the two files that tell of the spread are smaller: other roundings at hardly another size."""
MOST_POINTS = 100
DOTS_PER_INCH = 150
EXACTNESS = 1e-6
"""Part of a score that float32 may lose in a mean."""


def score(task: Task, path: Path) -> Scores:
    """The scores of a file, loaded back. Raises TaskError where there are none."""
    found = task.evaluate(load(path, task.model()))
    if not found:
        raise TaskError(f"{task.name}: evaluate() returned no score")
    return found


def require_scores(task: Task, what: str) -> None:
    """Raises TaskError, before anything is computed, where `task` has no evaluate()."""
    if not task.has("evaluate"):
        raise TaskError(f"{task.name} has no function evaluate(), which {what} needs: define it in the task file")


@dataclass(frozen=True)
class Point:
    """One file of a curve: its name, the size asked for, its bytes and scores, what it took, how to make it again."""

    file: str
    asked_bytes: int
    size_bytes: int
    scores: Scores
    predicted_loss: float
    seconds: float
    command: str


@dataclass(frozen=True)
class Curve:
    """Scores over sizes: `original` are those of the network before compression."""

    task: str
    original: Scores
    points: tuple[Point, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def check_points(points: int) -> None:
    """Raises UnsupportedError for what is no number of points."""
    if not 2 <= points <= MOST_POINTS:
        raise UnsupportedError(f"a curve has 2 to {MOST_POINTS} points, not {points}")


def sizes_between(reach: tuple[int, int], points: int) -> list[int]:
    """At most that many sizes in bytes, evenly spaced in their log, to three digits."""
    spaced = np.geomspace(*reach, points)
    return sorted({round(size, 2 - math.floor(math.log10(size))) for size in map(round, spaced)})


def draw_curve(
    task: Task, analysis: Analysis, out: Path, sizes: Sequence[int], command: Callable[[int], str], progress: Progress
) -> Curve:
    """Makes and scores a file of each of `sizes`, as OUT/<size>.fpk; then OUT/curve.json and OUT/curve.png.

    Points that are finished, of the same analysis and original scores, are not made again. `command` tells how
    one makes the file of a size alone.
    """
    require_scores(task, "a curve")
    require_plots()
    progress("evaluating the original", 0, 1)
    original = task.evaluate(task.model())
    if not original:
        raise TaskError(f"{task.name}: evaluate() returned no score")
    progress("evaluating the original", 1, 1)
    points = []
    for done, size in enumerate(sizes):
        progress("points", done, len(sizes))
        points.append(_point(task, analysis, out, size, original, progress))
    progress("points", len(sizes), len(sizes))
    curve = Curve(task.name, original, tuple(Point(**point | {"command": command(point["asked_bytes"])})
                                             for point in points))  # fmt: skip
    write(out / "curve.json", curve.to_json().encode())
    write(out / "curve.png", plot(curve))
    return curve


def _point(
    task: Task, analysis: Analysis, out: Path, size: int, original: Scores, progress: Progress
) -> dict[str, Any]:
    """A point but for its command, from the analysis's folder where it was finished."""
    path = out / f"{size}.fpk"
    name = f"point-{size}"
    known: dict[str, Any] | None = analysis.store.load(name)
    same = known is not None and path.is_file() and sha256(path.read_bytes()).hexdigest() == known["sha256"]
    if known is not None and same and _alike(known["original"], original):
        return dict(known["point"])
    if known is not None and same:
        # Another evaluate(): the file is good, its scores are not.
        point = dict(known["point"])
    else:
        start = time.perf_counter()
        packed = analysis.pack(size, progress)
        seconds = time.perf_counter() - start
        write(path, packed.data)
        loss = sum(layer.loss for layer in packed.plan.layers.values())
        point = {"file": path.name, "asked_bytes": size, "size_bytes": len(packed.data), "predicted_loss": loss,
                 "seconds": seconds}  # fmt: skip
    point["scores"] = score(task, path)
    held = {"sha256": sha256(path.read_bytes()).hexdigest(), "original": original, "point": point}
    analysis.store.save(name, held)
    return point


def _alike(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    """Whether these are the scores of one evaluation, which threads may add up in another order."""
    return first.keys() == second.keys() and all(
        math.isclose(first[name], second[name], rel_tol=EXACTNESS) or first[name] != first[name] for name in first
    )


def require_plots() -> None:
    """Raises UnsupportedError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("a curve is drawn by matplotlib: pip install factorpack[curve]") from error


def _ticks(low: float, high: float) -> list[float]:
    """Round sizes between two: 1, 2, 5 and their tens; over a short way, more of them."""
    for digits in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(np.arange(10, 100) / 10)):
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [digit * 10.0**ten for ten in tens for digit in digits if low <= digit * 10.0**ten <= high]
        if len(found) >= 3:
            return found[:: max(1, len(found) // 8)]
    return [low, high]


def size_axis(axes: Any, sizes: Sequence[int]) -> None:
    """Gives a plot a log axis of these sizes, with round ones at its ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.1, max(sizes) * 1.1)
    axes.xaxis.set_major_locator(FixedLocator(_ticks(*axes.get_xlim())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _place: human(round(size))))
    axes.xaxis.set_minor_locator(NullLocator())


def plot(curve: Curve) -> bytes:
    """The first score over the size on a log axis, as a PNG; nothing in it depends on colour.

    Raises UnsupportedError where matplotlib is missing.
    """
    require_plots()
    from matplotlib.figure import Figure

    name, original = next(iter(curve.original.items()))
    sizes = [point.size_bytes for point in curve.points]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(original, color="0.45", linestyle="--", linewidth=1.2, label=f"original: {original:.4g}")
    axes.plot(sizes, [point.scores[name] for point in curve.points], "o-", color="black", label="compressed")
    size_axis(axes, sizes)
    axes.grid(color="0.88")
    # Names may hold dollars, which matplotlib takes for mathematics.
    axes.set_xlabel("size of the file")
    axes.set_ylabel(name.replace("$", r"\$"))
    axes.set_title(curve.task.replace("$", r"\$"))
    axes.legend(loc="lower right")
    return png(figure)


def png(figure: Any) -> bytes:
    """A figure of matplotlib as a PNG, which does not tell the version that drew it."""
    out = BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return out.getvalue()


@dataclass(frozen=True, eq=False)
class Kept:
    """The smallest file found that keeps a score: its `scores`, those of the `original`, and how it was found.

    `drop` is by how much the first score is below the original's, `evaluations` counts the files that were scored
    to find this one, and `score_spread` is the standard deviation of the first scores of this file and two that
    are 0.7 % and 1.4 % smaller.
    """

    packed: Packed
    scores: Scores
    original: Scores
    drop: float
    evaluations: int
    score_spread: float
    evaluation_seconds: float


def check_drop(max_drop: float) -> None:
    """Raises UnsupportedError for what cannot be a drop."""
    if not 0 <= max_drop < math.inf:
        raise UnsupportedError(f"--max-drop is how much lower the score may be: zero or more, not {max_drop}")


def keep_score(task: Task, analysis: Analysis, max_drop: float, progress: Progress) -> Kept:
    """The smallest file whose first score is at most `max_drop` below the original's, by bisection over log size.

    At most `EVALUATIONS` files of the analysis are scored, each loaded back. Raises BudgetError where even the
    largest file loses more, TaskError for a task without evaluate().
    """
    check_drop(max_drop)
    require_scores(task, "--max-drop")
    spent = 0.0
    made = 0

    def scored(make: Callable[[], Scores]) -> Scores:
        nonlocal spent
        start = time.perf_counter()
        scores = make()
        spent += time.perf_counter() - start
        return scores

    def tried(size: int) -> tuple[Packed, Scores]:
        packed = analysis.pack(size, progress)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.fpk"
            write(path, packed.data)
            return packed, scored(lambda: score(task, path))

    original = scored(lambda: task.evaluate(task.model()))
    if not original:
        raise TaskError(f"{task.name}: evaluate() returned no score")
    name, whole = next(iter(original.items()))

    def drop_of(scores: Scores) -> float:
        if name not in scores:
            raise TaskError(f"{task.name}: evaluate() gave {name!r} for the original but not for the file")
        return whole - scores[name]

    def keeps(scores: Scores) -> bool:
        return drop_of(scores) <= max_drop + EXACTNESS * abs(whole)

    low, high = analysis.reach
    best: tuple[Packed, Scores] | None = None
    while best is None or (made < EVALUATIONS and high / low > BRACKET):
        size = high if best is None else round(math.sqrt(low * high))
        progress("evaluations", made, EVALUATIONS)
        found = tried(size)
        made += 1
        if keeps(found[1]):
            best, high = found, size
        elif best is not None:
            low = size
        else:
            raise BudgetError(
                f"even the largest file of the analysis, {len(found[0].data):,} bytes, has {name} "
                f"{found[1][name]:.4g}, which is {drop_of(found[1]):.3g} below the original's {whole:.4g} "
                f"(--max-drop {max_drop:g}): ask for a larger --size, or allow that much"
            )
    progress("evaluations", EVALUATIONS, EVALUATIONS)
    packed, scores = best
    near = [scores[name]]
    for place, part in enumerate(NEIGHBOURS):
        progress("spread of the score", place, len(NEIGHBOURS))
        near.append(tried(round(len(packed.data) * (1 - part)))[1][name])
    progress("spread of the score", len(NEIGHBOURS), len(NEIGHBOURS))
    return Kept(packed, scores, original, drop_of(scores), made, stdev(near), spent)


@dataclass(frozen=True)
class Goal:
    """What decides the size, one of these: bytes, a ratio to the original tensors, a drop of the score, a plan."""

    size_bytes: int = 0
    ratio: float = 0.0
    max_drop: float | None = None
    plan: ModelPlan | None = None

    def bytes_of(self, state: State) -> int:
        """The size in bytes, where it is not for a score or a plan to decide."""
        return self.size_bytes or int(dense_bytes(state) / self.ratio)


@dataclass(frozen=True, eq=False)
class Workshop:
    """A source, how it is compressed, and the folder of its cache, if any."""

    source: Source
    options: Options
    cache: Path | None
    progress: Progress
    note: Note

    def made(self, goal: Goal, task: Task | None) -> tuple[Packed, State, Kept | None]:
        """The file, the state that it holds, and what was found out where a score of `task` decided.

        Raises BudgetError where the goal cannot be met, MismatchError for a plan of another model, WorkerError where
        workers cannot be had.
        """
        with working(self.options.jobs, self.options.cluster) as workers:
            return self._made(goal, task, workers)

    def _made(self, goal: Goal, task: Task | None, workers: Workers) -> tuple[Packed, State, Kept | None]:
        if goal.plan is not None:
            return self._planned(goal.plan, workers)
        if goal.max_drop is not None:
            assert task is not None, "a score decides"
            with tempfile.TemporaryDirectory() as folder:
                analysis = self._analysis(self.cache or Path(folder), workers)
                kept = keep_score(task, analysis, goal.max_drop, self.progress)
                return kept.packed, analysis.state, kept
        if self.cache is not None:
            analysis = self._analysis(self.cache, workers)
            return analysis.pack(goal.bytes_of(analysis.state), self.progress), analysis.state, None
        with one_thread():
            state = self.source.state(self.options, self.progress, workers=workers)
            return pack(state, goal.bytes_of(state), self.options, self.progress, workers=workers), state, None

    def _analysis(self, folder: Path, workers: Workers) -> Analysis:
        return analyse(self.source, self.options, folder, self.progress, self.note, workers)

    def _planned(self, plan: ModelPlan, workers: Workers) -> tuple[Packed, State, None]:
        # Statistics as they were when the plan was made.
        options = replace(self.options, seed=plan.seed)
        if self.cache is None:
            with one_thread():
                state = self.source.state(options, self.progress, workers=workers)
        else:
            store = opened(self.source, options, self.cache, self.note)
            state = cached_state(store, self.source, options, self.progress, workers)
        with one_thread():
            return pack_plan(state, plan, options, self.progress, workers), state, None
