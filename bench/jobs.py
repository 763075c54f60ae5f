"""How much faster are several jobs, and are the bytes the same?

    python bench/jobs.py TASK --size 4.5MB --jobs 1 2

Each number of jobs compresses the task `--repeats` times in a process of its own, all numbers in turn so that other
work on the machine meets them alike. Loading the task is left out; starting the workers is not. The speed-up is that of
the median seconds over the first number of jobs. The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256

from factorpack.sizes import parse_size


def measure(spec: str, size: int, jobs: int) -> dict:
    from factorpack import Options
    from factorpack.curve import Goal, Workshop
    from factorpack.pipeline import Source, silent
    from factorpack.task import load_task

    task = load_task(spec)
    source = Source(task.model(), task.calibration(), task.output)
    load = os.getloadavg()[0]
    start = time.perf_counter()
    packed, _, _ = Workshop(source, Options(jobs=jobs), None, silent, print).made(Goal(size), task)
    seconds = time.perf_counter() - start
    return {"jobs": jobs, "seconds": seconds, "size_bytes": len(packed.data), "load_before": load,
            "sha256": sha256(packed.data).hexdigest()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--size", type=parse_size, required=True, help="60KB, 4.5MB")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="numbers to compare; 1 2 without")
    parser.add_argument("--repeats", type=int, default=1, help="how often each is measured; once without")
    arguments = parser.parse_args()
    runs = []
    print("jobs  seconds      bytes  load before  SHA-256")
    # A process of its own for each: no worker of the last one is warm.
    context = multiprocessing.get_context("spawn")
    for _ in range(arguments.repeats):
        for jobs in arguments.jobs:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                run = pool.submit(measure, arguments.task, arguments.size, jobs).result()
            runs.append(run)
            print(
                f"{jobs:4}  {run['seconds']:7.1f}  {run['size_bytes']:9,}  {run['load_before']:11.2f}"
                f"  {run['sha256'][:16]}",
                flush=True,
            )
    medians = {
        jobs: statistics.median(run["seconds"] for run in runs if run["jobs"] == jobs) for jobs in arguments.jobs
    }
    first = medians[arguments.jobs[0]]
    speed_ups = {jobs: first / seconds for jobs, seconds in medians.items()}
    same = len({run["sha256"] for run in runs}) == 1
    print(json.dumps({"runs": runs, "speed_ups": speed_ups, "same_bytes": same}))


if __name__ == "__main__":
    main()
