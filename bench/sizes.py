"""How does the score fall with the size? Compresses a task to several sizes and draws the scores of the files.

    python bench/sizes.py TASK --sizes 40KB 60KB 90KB --score agreement --peers points.json --out docs/sizes.png

`--peers` is a JSON file {"name of a peer": [[bytes, score], ...]}. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl

import factorpack
from factorpack.sizes import parse_size
from factorpack.task import Task, load_task

mpl.use("Agg")
import matplotlib.pyplot as plt


def measure(task: Task, size: int) -> dict:
    packed = factorpack.compress(task.model(), size, task.calibration(), output=task.output)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fpk"
        packed.save(path)
        return {"size_bytes": path.stat().st_size} | task.evaluate(factorpack.load(path, task.model()))


def draw(points: list[dict], score: str, peers: dict[str, list], original: float, out: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=150, layout="constrained")
    axes.plot([p["size_bytes"] / 1000 for p in points], [p[score] for p in points], "o-k", label="Factorpack")
    for (name, found), style in zip(peers.items(), ("s--", "^:", "d-."), strict=False):
        axes.plot([size / 1000 for size, _ in found], [value for _, value in found], style, color="0.45", label=name)
    axes.axhline(original, color="0.7", linewidth=1)
    axes.annotate("original", (axes.get_xlim()[1], original), ha="right", va="bottom", color="0.4", fontsize=8)
    axes.set(xlabel="file, kB", ylabel=score)
    axes.grid(visible=True, color="0.92")
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--sizes", nargs="+", required=True)
    parser.add_argument("--score", required=True, help="the one to draw")
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    task = load_task(arguments.task)
    points = []
    for size in arguments.sizes:
        points.append(measure(task, parse_size(size)))
        print(points[-1], file=sys.stderr, flush=True)
    original = task.evaluate(task.model())
    peers = json.loads(arguments.peers.read_text()) if arguments.peers else {}
    draw(points, arguments.score, peers, original[arguments.score], arguments.out)
    print(json.dumps({"original": original, "points": points}))


if __name__ == "__main__":
    main()
