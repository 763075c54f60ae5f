"""How much calibration is enough? The score at one size against the part of calibration used, and against the seed.

    python bench/calibration.py TASK --size 60KB --shares 0.1,0.25,0.5,1 --seeds 0,1 --score agreement --out FILE.png

A share stands for the first batches of `calibration()`, at least one. `spread` is the largest score over the seeds less
the smallest. The last line is JSON.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import matplotlib as mpl

from factorpack.curve import score
from factorpack.options import Options
from factorpack.pipeline import Source, finish, one_thread
from factorpack.search import pack
from factorpack.sizes import parse_size
from factorpack.task import Task, load_task

mpl.use("Agg")
import matplotlib.pyplot as plt


def measure(task: Task, size: int, batches: list[object], seed: int) -> dict:
    options = Options(seed=seed)
    with one_thread():
        state = Source(task.model(), batches, task.output).state(options)
        packed = pack(state, size, options, lambda _stage, _done, _total: None)
    report = finish(packed, state, 0.0, partial(score, task)).report
    return {
        "batches": len(batches),
        "seed": seed,
        "size_bytes": report.size_bytes,
        "predicted_loss": report.distortion,
        "scores": dict(report.scores),
    }


def draw(points: list[dict], name: str, size: int, out: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.0, 3.8), dpi=150, layout="constrained")
    counts = sorted({p["batches"] for p in points})
    at = {count: [p["scores"][name] for p in points if p["batches"] == count] for count in counts}
    axes.plot(counts, [sum(found) / len(found) for found in at.values()], "-k", label="mean over seeds")
    for seed, style in zip(sorted({p["seed"] for p in points}), "osd^vx+*<>" * 10, strict=False):
        found = [(p["batches"], p["scores"][name]) for p in points if p["seed"] == seed]
        axes.plot(*zip(*found, strict=True), style, color="0.45", label=f"seed {seed}")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set(xlabel="batches of calibration", ylabel=name, title=f"{size / 1000:g} kB")
    axes.grid(visible=True, color="0.92")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(out, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--size", required=True)
    parser.add_argument("--shares", default="0.1,0.25,0.5,1", help="separated by commas")
    parser.add_argument("--seeds", default="0,1", help="separated by commas")
    parser.add_argument("--score", help="the one to draw; the first without")
    parser.add_argument("--out", type=Path, help="the figure")
    arguments = parser.parse_args()
    task, size = load_task(arguments.task), parse_size(arguments.size)
    batches = task.calibration()
    counts = sorted({max(1, round(float(share) * len(batches))) for share in arguments.shares.split(",")})
    points = []
    for count in counts:
        for seed in map(int, arguments.seeds.split(",")):
            points.append(measure(task, size, batches[:count], seed))
            print(points[-1], file=sys.stderr, flush=True)
    name = arguments.score or next(iter(points[0]["scores"]))
    if arguments.out:
        draw(points, name, size, arguments.out)
    rows = []
    for count in counts:
        found = [p["scores"][name] for p in points if p["batches"] == count]
        rows.append({"batches": count, "mean": sum(found) / len(found), "spread": max(found) - min(found)})
    print(json.dumps({"task": task.name, "score": name, "of_batches": len(batches), "shares": rows, "points": points}))


if __name__ == "__main__":
    main()
