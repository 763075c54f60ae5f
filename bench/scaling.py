"""How does the time of compression grow with the parameters? Stacks of equal layers, without a task.

    python bench/scaling.py --largest 16

Stacks of k layers Linear(512, 512) and ReLU, k = 3, 6, 12, ...; k = 384 has 101 million parameters. Each is
compressed to 2 bits a weight by one job in a process of its own, after a stack of one layer that warms it up. CPU
seconds mind other work on the machine less. Peak RSS is that of the whole process, PyTorch included. The last line is
JSON; `doublings` and `cpu_doublings` hold each time over the one before it.
"""

import argparse
import json
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import torch
from torch import nn

import factorpack

WIDTH = 512
FIRST = 3
BITS = 2
BATCHES, INPUTS = 4, 256
MOST = 101
"""Millions of parameters."""


def stack(layers: int) -> nn.Sequential:
    """He's initialisation: signals and gradients keep their size through any number of layers."""
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for _ in range(layers):
        linear = nn.Linear(WIDTH, WIDTH)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules).eval()


def measure(layers: int) -> dict:
    torch.set_num_threads(1)
    model = stack(layers)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(INPUTS, WIDTH, generator=generator) for _ in range(BATCHES)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    factorpack.compress(stack(1), WIDTH * WIDTH * BITS // 8, batches, output="embedding")
    start, cpu_start = time.perf_counter(), time.process_time()
    packed = factorpack.compress(model, parameters * BITS // 8, batches, output="embedding")
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "layers": layers,
        "parameters": parameters,
        "size_bytes": packed.report.size_bytes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_per_million": seconds / parameters * 1e6,
        # Linux counts in KiB.
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }


def counted(text: str) -> float:
    millions = float(text)
    if not 1 <= millions <= MOST:
        raise argparse.ArgumentTypeError(f"1 to {MOST} millions, not {text}")
    return millions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=counted, default=16, help="millions of parameters, 1 to 101; 16 without")
    arguments = parser.parse_args()
    points, layers = [], FIRST
    print("parameters  seconds  CPU seconds  seconds/M  peak RSS, MB")
    # A process's peak never falls: each point has its own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        while layers * WIDTH * (WIDTH + 1) <= 1e6 * arguments.largest:
            point = pool.submit(measure, layers).result()
            points.append(point)
            print(
                f"{point['parameters']:10,}  {point['seconds']:7.1f}  {point['cpu_seconds']:11.1f}"
                f"  {point['seconds_per_million']:9.2f}  {point['peak_rss_mb']:12.0f}",
                flush=True,
            )
            layers *= 2
    wall, cpu = ([b[key] / a[key] for a, b in pairwise(points)] for key in ("seconds", "cpu_seconds"))
    print(json.dumps({"points": points, "doublings": wall, "cpu_doublings": cpu}))


if __name__ == "__main__":
    main()
