"""Size against score as a PNG."""

from collections.abc import Sequence
from typing import Any

from factorpack.bench.looks import LOOKS, curves, floor
from factorpack.bench.registry import PEERS
from factorpack.bench.results import Results
from factorpack.curve import png, size_axis

SIZES = "size of the file, or of the file in zstd where that is smaller"
ORIGINAL = "original"


def plot(results: Results) -> bytes:
    """The score that is compared over the size on a log axis, a line a peer; the original's as a line.

    Sizes are those of files, or of files in zstd where that is smaller. Scores below half of what can be lost are
    left to the tables.
    """
    figure = _figure(9, 5)
    axes = figure.add_subplot()
    _draw(axes, results, f"original, {results.original.scores[results.original.score]:.4g}")
    axes.set_xlabel(SIZES)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return png(figure)


def plot_all(tasks: Sequence[Results]) -> bytes:
    """As `plot`, several tasks beside and below one another, with one legend."""
    rows = -(-len(tasks) // 2)
    figure = _figure(11, 3.7 * rows + 1.2)
    named: dict[str, Any] = {}
    for place, results in enumerate(tasks):
        axes = figure.add_subplot(rows, 2, place + 1)
        _draw(axes, results, ORIGINAL)
        if place >= len(tasks) - 2:
            axes.set_xlabel(SIZES)
        handles, names = axes.get_legend_handles_labels()
        named |= dict(zip(names, handles, strict=True))
    order = [*(peer.title for peer in PEERS.values() if peer.title in named), ORIGINAL]
    figure.legend(
        [named[name] for name in order], order, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return png(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw(axes: Any, results: Results, told: str) -> None:
    """`told` is what the line of the original is called."""
    score = results.original.score
    original = results.original.scores[score]
    axes.axhline(original, color="0.45", linestyle="--", linewidth=1.2, label=told)
    sizes = []
    for name, points in curves(results).items():
        look, main = LOOKS[name], name == "factorpack"
        sizes += [point.size_bytes for point in points]
        axes.plot(
            [point.size_bytes for point in points], [point.scores[score] for point in points], color=look.colour,
            marker=look.mark, dashes=look.dashes or (None, None), label=PEERS[name].title, markersize=6,
            markerfacecolor=look.colour if main else "white", linewidth=2 if main else 1.1,
            zorder=3 if main else 2,
        )  # fmt: skip
    lowest = floor(results)
    above = original - lowest or 1.0
    axes.set_ylim(lowest - 0.05 * above, original + 0.08 * above)
    if sizes:
        size_axis(axes, sizes)
    axes.grid(color="0.9")
    # Names may hold dollars, which matplotlib takes for mathematics.
    axes.set_ylabel(score.replace("$", r"\$"))
    axes.set_title(results.name.replace("$", r"\$"))
