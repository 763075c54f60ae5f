"""Which form is best at one size? Compresses a task with each form and prints a table; the last line is JSON.

python bench/forms.py TASK --size 90KB [--only FORM ...]
"""

import argparse
import json
import sys
import tempfile
import time
from math import prod
from pathlib import Path

import factorpack
from factorpack.sizes import parse_size
from factorpack.task import load_task

SETTINGS = {
    "auto": ("auto", "sequential", True),
    "direct": ("direct", "sequential", True),
    "sparse_pca": ("sparse_pca", "sequential", True),
    "svd": ("svd", "sequential", True),
    "vq": ("vq", "sequential", True),
    "separable": ("separable", "sequential", True),
    "direct, data-free": ("direct", "sequential", False),
    "sparse_pca by projected gradients": ("sparse_pca", "projected-gradient", True),
    "sparse_pca by projected gradients, data-free": ("sparse_pca", "projected-gradient", False),
}


def measure(task, size: int, form: str, solver: str, aware: bool) -> dict:
    start = time.perf_counter()
    model = task.model()
    packed = factorpack.compress(
        model,
        size,
        task.calibration() if aware else None,
        output=task.output,
        options=factorpack.Options(form, solver),
    )
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fpk"
        packed.save(path)
        scores = task.evaluate(factorpack.load(path, task.model()))
    large = [w for w in packed.report.bill.weights if len(w.shape) > 1]
    entries = {w.name: prod(w.shape) for w in large}
    above = sum(n for n in entries.values() if n > 1000)
    inside = sum(entries[w.name] for w in large if entries[w.name] > 1000 and form in ("auto", w.form))
    return {"size_bytes": packed.report.size_bytes, "scores": scores, "share": inside / above, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--size", default="90KB")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="names as in the table")
    arguments = parser.parse_args()
    task = load_task(arguments.task)
    results = {}
    for name in arguments.only:
        try:
            found = measure(task, parse_size(arguments.size), *SETTINGS[name])
        except factorpack.BudgetError as error:
            found = {"error": str(error)}
        results[name] = found
        print(name, json.dumps(found), file=sys.stderr, flush=True)
    print(
        "| form | bytes | in that form | " + " | ".join(next(r["scores"] for r in results.values() if "scores" in r)),
        "|",
    )
    for name, found in results.items():
        if "error" in found:
            print(f"| {name} | {found['error']} |")
        else:
            scores = " | ".join(f"{value:.2f}" for value in found["scores"].values())
            print(f"| {name} | {found['size_bytes']:,} | {100 * found['share']:.0f} % | {scores} |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
