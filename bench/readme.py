"""Writes the tables of the README from what is in bench/results, between its markers, and its picture.

    python bench/readme.py            README.md and docs/curves.png are written
    python bench/readme.py --check    it is only compared; exit code 1 where it differs

A table has a row a peer and a column a task: the smallest file that was measured whose score is near enough to the
original's. Nothing is interpolated. Bytes are those of the file, or of the file in zstd -19 where these are fewer.
"""

import sys
from pathlib import Path

from factorpack.bench.plots import plot_all
from factorpack.bench.registry import PEERS
from factorpack.bench.results import Point, Results, read_results

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench: made by `make readme` -->", "<!-- bench: end -->"
NEAR = (0.01, 0.05)
"""Parts of the original's score that may be lost."""
DRAWN = ("resnet20_cifar10", "squeezenet_imagenet", "minilm_sts", "stories260k")
"""Tasks whose curves the picture shows."""


def smallest(results: Results, peer: str, near: float) -> Point | None:
    """The smallest file of a peer that loses at most the part `near` of the original's score."""
    score = results.original.score
    original = results.original.scores[score]
    least = original - near * abs(original)
    points = [p for p in results.good if p.peer == peer and p.scores.get(score, float("-inf")) >= least]
    return min(points, key=lambda point: point.size_bytes, default=None)


def table(tasks: list[Results], near: float) -> str:
    found = {name: [smallest(results, name, near) for results in tasks] for name in PEERS}
    best = [
        min((points[place].size_bytes for points in found.values() if points[place]), default=0)
        for place in range(len(tasks))
    ]
    lines = [f"| score at most {near:.0%} lower | " + " | ".join(results.name for results in tasks) + " |"]
    lines.append("|---" * (len(tasks) + 1) + "|")
    first = [f"{r.original.bytes:,} B: {r.original.scores[r.original.score]:.4g}" for r in tasks]
    lines.append("| original | " + " | ".join(first) + " |")
    for name, points in found.items():
        cells = []
        for place, (results, point) in enumerate(zip(tasks, points, strict=True)):
            if point is None:
                tried = any(p.peer == name for p in results.good)
                cells.append("none" if tried else "–")
                continue
            text = f"{point.size_bytes:,} B: {point.scores[results.original.score]:.4g}"
            cells.append(f"**{text}**" if point.size_bytes == best[place] else text)
        data = "" if PEERS[name].calibrated else " (no data)"
        if set(cells) != {"–"}:
            lines.append(f"| {PEERS[name].title}{data} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(folder: Path) -> str:
    """What belongs between the markers."""
    tasks = [read_results(path) for path in sorted(folder.glob("*.json"))]
    if not tasks:
        return "Nothing has been measured yet: `make bench`."
    points = [point for results in tasks for point in results.good]
    commits = sorted({point.commit for point in points})
    machines = sorted({point.machine for point in points})
    scores = ", ".join(f"{results.name}: {results.original.score}" for results in tasks)
    pages = ", ".join(f"[{results.name}](bench/results/{results.name}.png)" for results in tasks)
    parts = [table(tasks, near) for near in NEAR]
    parts.append(
        f"Scores: {scores}. “none”: no setting that was measured comes as near; “–”: not measured. Pictures: {pages}; "
        f"beside each lies the JSON, with times, memory, what each peer left dense, and the command of each "
        f"point; `make bench` puts a page to point at there too. Measured at {', '.join(commits)} on "
        f"{'; '.join(machines)}."
    )
    return "\n\n".join(parts)


def written(text: str, folder: Path) -> str:
    """The README with its tables as of the results in `folder`."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables(folder)}\n\n{END}{after}"


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = written(text, ROOT / "bench" / "results")
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is not what bench/results says: make readme" if new != text else 0)
    path.write_text(new, encoding="utf-8")
    drawn = [path for path in (ROOT / "bench" / "results" / f"{name}.json" for name in DRAWN) if path.exists()]
    (ROOT / "docs" / "curves.png").write_bytes(plot_all([read_results(path) for path in drawn]))


if __name__ == "__main__":
    main()
