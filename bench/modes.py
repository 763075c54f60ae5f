"""What does loading on the fly cost and save? Scores, resident bytes and the time of a forward, dense and on the fly.

    python bench/modes.py TASK --size 40KB

The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import factorpack
from factorpack.nn.statistics import call_model
from factorpack.sizes import parse_size
from factorpack.task import load_task

REPEATS = 15


@torch.inference_mode()
def forward_seconds(model: nn.Module, batch: object) -> float:
    """Median over repeats, after one forward that warms up."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call_model(model, batch)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--size", required=True)
    arguments = parser.parse_args()
    task = load_task(arguments.task)
    packed = factorpack.compress(task.model(), parse_size(arguments.size), task.calibration(), output=task.output)
    batch = task.calibration()[0]
    results = {"size_bytes": packed.report.size_bytes}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fpk"
        packed.save(path)
        for mode in ("dense", "on-the-fly"):
            model = factorpack.load(path, task.model(), mode)
            seconds = forward_seconds(model, batch)
            results[mode] = {
                "scores": task.evaluate(model),
                "resident_bytes": factorpack.resident_bytes(model),
                "forward_seconds": seconds,
                "kept_dense": factorpack.kept_dense(model),
            }
            print(mode, results[mode])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
