"""Does joint, data-aware optimisation of sparse, quantised factors give what the paper reports?

    python bench/paper.py TASK [TASK ...] --sparsities 30 50 70 --finetune-steps 200 --out bench/paper.json

Every weight is stored as B·Z by the paper's solver, with steps of rows of B (8 bits) and columns of Z (4 bits) and one
share of zeros for all layers. What is compared:

  naive           SVD, thresholding, grids: no optimisation, no data
  data-free       projected gradients on ‖W − BZ‖², Z thresholded after each iteration
  one-shot        on the output's error, Z thresholded once, after all iterations
  iterative       the same, Z thresholded after each iteration: the paper's method
  sparse start    the same, from factors that are sparse already instead of the SVD

Small tensors are stored alike in all of them. Bytes and scores are of the file written and loaded back.
--finetune-steps trains `naive`, `iterative` and `sparse start` by `factorpack.finetune`, within the bytes that they
have; tasks without training() are left out. --out keeps what was measured after each variant, and what it has is not
measured again. The last line is JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import factorpack
from factorpack.assembly import VECTOR_SHARE
from factorpack.container import Contents, to_bytes, write
from factorpack.nn.state import State
from factorpack.options import Options
from factorpack.pipeline import Source, one_thread
from factorpack.search import rates_of
from factorpack.solve.objective import Metric
from factorpack.solve.projected_gradient import GradientSettings, solve
from factorpack.solve.vectors import quantise
from factorpack.task import Task, load_task

VARIANTS: dict[str, tuple[bool, dict]] = {
    "naive": (False, {"pursuit": 0, "iterations": 0, "refinements": 0}),
    "data-free": (False, {"pursuit": 0}),
    "one-shot": (True, {"pursuit": 0, "one_shot": True}),
    "iterative": (True, {"pursuit": 0}),
    "sparse start": (True, {}),
}
"""Whether the solver sees the data, and its settings."""
TRAINED = ("naive", "iterative", "sparse start")


def stored(state: State, aware: bool, settings: Callable[[int], GradientSettings]) -> bytes:
    """The file of a state, all its weights of form sparse_pca; `settings` are those for a basis of d rows."""
    tensors: dict = {}
    for done, name in enumerate(state.layers):
        layer = state.layers[name]
        print(f"\r{done} of {len(state.layers)} weights", end="", file=sys.stderr, flush=True)
        tiling, metric = layer.basis_tiling, layer.metric if aware else Metric()
        depth, count = tiling.tiled_shape
        chosen = settings(min(depth, count))
        found = solve(layer.tensor, tiling, metric, "sparse_pca", chosen, torch.Generator().manual_seed(0))
        tensors[name] = found.weight
    print("\r" + 30 * " ", end="\r", file=sys.stderr)
    rate = VECTOR_SHARE * rates_of(state)[-1]
    tensors |= {name: quantise(small.values, small.curvature, rate) for name, small in state.small.items()}
    tensors |= state.exact
    ordered = {name: tensors[name] for name in state.dtypes if name in tensors}
    return to_bytes(Contents(ordered, state.dtypes, {a: n for a, n in state.aliases.items() if n in ordered}))


def measure(task: Task, state: State, aware: bool, settings: Callable[[int], GradientSettings], steps: int) -> dict:
    start = time.perf_counter()
    with one_thread():
        data = stored(state, aware, settings)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path, trained = Path(folder) / "model.fpk", Path(folder) / "trained.fpk"
        write(path, data)
        scores = task.evaluate(factorpack.load(path, task.model()))
        found = {"size_bytes": path.stat().st_size, "scores": scores, "seconds": seconds}
        if steps and task.has("training"):
            torch.manual_seed(0)
            lessons = factorpack.Lessons(task.training, task.loss, task.output)
            options = factorpack.TrainingOptions(steps=steps)
            report = factorpack.finetune(task.model(), path, trained, lessons, options, task.evaluate)
            found["finetuned"] = {
                "steps": steps,
                "size_bytes": trained.stat().st_size,
                "scores": dict(report.scores),
                "seconds": report.seconds,
            }
    return found


def table(results: dict) -> None:
    label = "top1, agreement"
    print(f"| network | zeros | variant | bytes | {label} | bytes trained | {label} trained |")
    print("|---|---|---|---|---|---|---|")

    def shown(found: dict | None) -> str:
        if found is None:
            return "– | –"
        scores = ", ".join(f"{value:.1f}" for value in found["scores"].values())
        return f"{found['size_bytes']:,} | {scores}"

    for network, levels in results.items():
        for level, variants in levels.items():
            for name, found in variants.items():
                print(f"| {network} | {level} % | {name} | {shown(found)} | {shown(found.get('finetuned'))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="TASK")
    parser.add_argument("--sparsities", nargs="*", type=int, default=[30, 50, 70], help="percent of Z that is zero")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rank", type=float, default=1.0, help="k as a part of d")
    parser.add_argument("--inner-steps", type=int, default=10, help="of Adam before each projection")
    parser.add_argument("--finetune-steps", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    for spec in arguments.tasks:
        task = load_task(spec)
        with one_thread():
            state = Source(task.model(), task.calibration(), task.output).state(Options())
        levels = results.setdefault(Path(spec).stem, {})
        levels.setdefault("original", {})["-"] = {"size_bytes": 0, "scores": task.evaluate(task.model())}
        for level in arguments.sparsities:
            measured = levels.setdefault(str(level), {})
            for name in arguments.variants:
                aware, chosen = VARIANTS[name]
                steps = arguments.finetune_steps if name in TRAINED else 0
                if name in measured and (not steps or "finetuned" in measured[name]):
                    continue

                def settings(depth: int, zeros: float = level / 100, chosen: dict = chosen) -> GradientSettings:
                    rank = max(1, round(arguments.rank * depth))
                    return GradientSettings(rank=rank, sparsity=zeros, inner_steps=arguments.inner_steps, **chosen)

                measured[name] = measure(task, state, aware, settings, steps)
                print(task.name, level, name, json.dumps(measured[name]), file=sys.stderr, flush=True)
                if arguments.out:
                    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    table(results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
