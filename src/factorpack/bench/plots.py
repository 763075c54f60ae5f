"""Size against score as a PNG."""

from io import BytesIO

from factorpack.bench.looks import LOOKS, curves, floor
from factorpack.bench.registry import PEERS
from factorpack.bench.results import Results
from factorpack.curve import DOTS_PER_INCH, size_axis


def plot(results: Results) -> bytes:
    """The score that is compared over the size on a log axis, a line a peer; the original's as a line.

    Sizes are those of files, or of files in zstd where that is smaller. Scores below half of what can be lost are
    left to the tables.
    """
    from matplotlib.figure import Figure

    score = results.original.score
    original = results.original.scores[score]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(original, color="0.45", linestyle="--", linewidth=1.2, label=f"original, {original:.4g}")
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
    axes.set_xlabel("size of the file, or of the file in zstd where that is smaller")
    axes.set_ylabel(score.replace("$", r"\$"))
    axes.set_title(results.name.replace("$", r"\$"))
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return out.getvalue()
