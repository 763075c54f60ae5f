"""What is each part worth? A task is compressed to several sizes with each part taken away in turn.

    python bench/ablation.py TASK --sizes 40KB,60KB,90KB --without prefix,taps,all

The parts:
  prefix          layers are solved on the inputs that the compressed layers before them leave
  making-up       a layer makes up for what those before it changed
  paths           several survivors a row are followed while it is rounded
  price           a rounding decision weighs its bits against its error
  taps            bases of kernels (form separable)
  forms           forms compete: without, all is form direct
  fisher          a layer's loss is its effect on the output: without, its output's relative error, alike for all
  row-steps       rows that are looked up have steps of their own
  lookup-weights  rows that were seldom looked up weigh by the estimate of Good and Turing, not by what was measured
  folding         batch norms are stored as two numbers a channel
  contexts        integers of rows and columns of unlike magnitude have tables of their own
  all             all of these together

`bytes` in the table is how many times the bytes one pays for an equal score without the part: the mean, over the scores
that both reach, of the log of bytes interpolated over the score. Above 1 the part is worth having; a part that does
nothing for this network gives 1. The score is `agreement` where there is one, else the task's first, or `--score`.
The last line is JSON.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import numpy as np
import torch

import factorpack.coding.grouping
import factorpack.nn.state
import factorpack.solve.layer
from factorpack.curve import score
from factorpack.errors import BudgetError
from factorpack.nn.state import State
from factorpack.options import Options
from factorpack.pipeline import Source, finish, one_thread
from factorpack.search import pack
from factorpack.sizes import parse_size
from factorpack.solve.layer import Layer
from factorpack.solve.objective import Metric
from factorpack.task import Task, load_task

LOST = 1e30
"""Damping that leaves nothing to make up for."""
PATCHES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "paths": lambda: patch.object(factorpack.solve.layer, "PATHS", 1),
    "making-up": lambda: patch.object(factorpack.solve.layer, "DRIFT_DAMPINGS", (LOST,)),
    "price": lambda: patch.object(factorpack.solve.layer, "RATE_SHARE", 0.0),
    "taps": lambda: patch.object(Layer, "has_taps", False),
    "row-steps": lambda: patch.object(factorpack.solve.layer, "STEP_POWER", 0.0),
    "lookup-weights": lambda: patch.object(factorpack.nn.state, "lookup_weights", lambda weights, _counts: weights),
    "contexts": lambda: patch.object(factorpack.coding.grouping, "MAX_CONTEXTS", 1),
}
"""The writer's part of each alone: files are read as ever."""
SINGLE = (
    "prefix",
    "making-up",
    "paths",
    "price",
    "taps",
    "forms",
    "fisher",
    "row-steps",
    "lookup-weights",
    "folding",
    "contexts",
)


def _relative(state: State) -> State:
    """Every layer costs the same to lose, the mean of what they do cost; its rows weigh alike."""

    def lost(layer: Layer, metric: Metric) -> float:
        matrix = layer.problem.weight
        return float((matrix * metric.apply(matrix)).sum())

    mean = sum(lost(layer, layer.metric) for layer in state.layers.values()) / len(state.layers)
    layers = {}
    for name, layer in state.layers.items():
        alike = Metric(layer.metric.moments, torch.ones(layer.tiling.matrix_shape[0]))
        rows = torch.full_like(alike.row_weights, mean / max(lost(layer, alike), 1e-30))
        layers[name] = replace(layer, metric=Metric(alike.moments, rows))
    return replace(state, layers=layers)


def measure(task: Task, sizes: list[int], without: tuple[str, ...]) -> list[dict]:
    options = Options(form="direct" if "forms" in without else "auto", keep_batch_norms="folding" in without)
    points = []
    with ExitStack() as stack:
        for part in without:
            if part in PATCHES:
                stack.enter_context(PATCHES[part]())
        with one_thread():
            state = Source(task.model(), task.calibration(), task.output).state(options)
        if "prefix" in without:
            state = replace(state, prefix=None)
        if "fisher" in without:
            state = _relative(state)
        for size in sizes:
            try:
                with one_thread():
                    packed = pack(state, size, options, lambda _stage, _done, _total: None)
            except BudgetError as error:
                points.append({"error": str(error)})
                continue
            report = finish(packed, state, 0.0, partial(score, task)).report
            points.append({"size_bytes": report.size_bytes, "scores": dict(report.scores)})
    return points


def bytes_at_equal_score(points: list[dict], reference: list[dict], name: str) -> float | None:
    """Bytes of `points` over those of `reference`, the geometric mean over the scores that both reach; None: none."""
    curves = []
    for found in (points, reference):
        pairs = sorted((p["size_bytes"], p["scores"][name]) for p in found if "scores" in p)
        if not pairs:
            return None
        sizes, scores = np.array(pairs).T
        # A score that a smaller file reached is had at that size.
        best, first = np.unique(np.maximum.accumulate(scores), return_index=True)
        curves.append((best, np.log(sizes[first])))
    low, high = max(curve[0][0] for curve in curves), min(curve[0][-1] for curve in curves)
    if low > high:
        return None
    scores = np.linspace(low, high, 201)
    mine, its = (np.interp(scores, *curve) for curve in curves)
    return math.exp(float(np.mean(mine - its)))


def row(name: str, points: list[dict], label: str, ratio: float | None) -> str:
    found = [f"{p['scores'][label]:.4g} at {p['size_bytes']:,}" if "scores" in p else "too small" for p in points]
    return f"| {name} | {' | '.join(found)} | {'beyond' if ratio is None else f'{ratio:.3f}'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--sizes", required=True, help="separated by commas; the more, the better is the interpolation")
    parser.add_argument("--without", default=",".join((*SINGLE, "all")), help="parts, separated by commas; all of them")
    parser.add_argument("--score", help="the one to compare")
    arguments = parser.parse_args()
    parts = arguments.without.split(",")
    if unknown := set(parts) - {*SINGLE, "all"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; choose among {', '.join(SINGLE)}, all")
    task, sizes = load_task(arguments.task), sorted(map(parse_size, arguments.sizes.split(",")))
    results = {}
    for name, without in {"nothing": (), **{part: SINGLE if part == "all" else (part,) for part in parts}}.items():
        results[name] = measure(task, sizes, without)
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    scores = next(p["scores"] for found in results.values() for p in found if "scores" in p)
    label = arguments.score or ("agreement" if "agreement" in scores else next(iter(scores)))
    ratios = {name: bytes_at_equal_score(found, results["nothing"], label) for name, found in results.items()}
    print(f"| without | {' | '.join(f'{label}, {size / 1000:g} kB' for size in sizes)} | bytes |")
    for name, found in results.items():
        print(row(name, found, label, ratios[name]))
    print(json.dumps({"task": task.name, "score": label, "bytes_ratio": ratios, "points": results}))


if __name__ == "__main__":
    main()
