"""Does the additive prediction hold? The summed loss of the plan against the measured loss, at several sizes.

    python bench/prediction.py TASK --sizes 40KB,60KB,90KB --out docs/prediction.png

Measured is the mean over outputs of the Kullback-Leibler divergence from the original's probabilities for logits, half
the squared difference for embeddings: what half the distortion predicts. It is measured on calibration's own inputs,
which tells whether losses add up, and on those of the task's `training(0)`, if it has that, which tells whether they
are the same on other inputs; some of these may be calibration's. `--out` takes a .png, a .json or both. The last line
is JSON.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor, nn

from factorpack.nn.statistics import call_model
from factorpack.options import Options
from factorpack.pipeline import Source, finish, load, one_thread
from factorpack.search import pack
from factorpack.sizes import parse_size
from factorpack.task import load_task

mpl.use("Agg")
import matplotlib.pyplot as plt


@torch.inference_mode()
def observed(model: nn.Module, batches: Iterable[object], wanted: int) -> list[tuple[object, Tensor]]:
    """Batches of about `wanted` inputs, and what the original network makes of each."""
    found, seen = [], 0
    for batch in batches:
        found.append((batch, call_model(model, batch)))
        seen += len(found[-1][1])
        if seen >= wanted:
            break
    return found


@torch.inference_mode()
def loss(model: nn.Module, kind: str, seen: list[tuple[object, Tensor]]) -> float:
    """The mean over all outputs: KL in nats for logits, half the squared difference for embeddings."""
    total = count = 0
    for batch, before in seen:
        now = call_model(model, batch)
        if kind == "logits":
            logs = before.double().log_softmax(-1)
            found = logs.exp() * (logs - now.double().log_softmax(-1))
        else:
            found = 0.5 * (before - now).double().square()
        total += float(found.sum())
        count += before.shape[:-1].numel()
    return total / count


def draw(points: list[dict], title: str, out: Path) -> None:
    figure, axes = plt.subplots(figsize=(4.8, 4.4), dpi=150, layout="constrained")
    predicted = [p["predicted"] for p in points]
    both = predicted + [value for p in points for value in p["measured"].values()]
    low, high = min(both) / 1.4, max(both) * 1.4
    axes.plot((low, high), (low, high), color="0.6", linewidth=1, label="equal")
    for name, style in zip(points[0]["measured"], ("o-", "s--"), strict=False):
        axes.plot(predicted, [p["measured"][name] for p in points], style, color="black", mfc="white", label=name)
    for point in points:
        place = point["predicted"], point["measured"]["calibration"]
        name = f"{point['size_bytes'] / 1000:.0f} kB"
        axes.annotate(name, place, (6, -10), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal", title=title)
    axes.set(xlabel="predicted loss", ylabel="measured loss")
    axes.grid(visible=True, color="0.92")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(out, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--sizes", required=True, help="separated by commas")
    parser.add_argument("--inputs", type=int, default=500, help="about so many are measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    task, options = load_task(arguments.task), Options(seed=arguments.seed)
    kinds = {"calibration": task.calibration()}
    if task.has("training"):
        kinds["training(0)"] = (batch for batch, _ in task.functions["training"](0))
    inputs = {name: observed(task.model(), batches, arguments.inputs) for name, batches in kinds.items()}

    def losses(path: Path) -> dict[str, float]:
        model = load(path, task.model())
        return {name: loss(model, task.output, seen) for name, seen in inputs.items()}

    with one_thread():
        state = Source(task.model(), task.calibration(), task.output).state(options)
    points = []
    for size in map(parse_size, arguments.sizes.split(",")):
        start = time.perf_counter()
        with one_thread():
            packed = pack(state, size, options, lambda _stage, _done, _total: None)
        seconds = time.perf_counter() - start
        report = finish(packed, state, seconds, losses).report
        points.append(
            {
                "size_bytes": report.size_bytes,
                "predicted": report.distortion,
                "measured": dict(report.scores),
                "ratios": {name: value / report.distortion for name, value in report.scores.items()},
                "bits_per_weight": report.bits_per_weight,
                "gaussian_bits_per_weight": report.gaussian_bits_per_weight,
                "seconds": seconds,
            }
        )
        print(points[-1], file=sys.stderr, flush=True)
    counts = {name: sum(len(outputs) for _, outputs in seen) for name, seen in inputs.items()}
    found = {"task": task.name, "inputs": counts, "points": points}
    for out in arguments.out:
        if out.suffix == ".json":
            out.write_text(json.dumps(found, indent=1) + "\n")
        else:
            draw(points, task.name, out)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
