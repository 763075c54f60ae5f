"""How fast are streams written and read, and how close to the entropy? Laplacian integers; the last line is JSON.

python bench/coding.py
"""

import json
import statistics
import time

import numpy as np

from factorpack.coding import Reader, decode_integers, plan_integers

REPEATS = 5


def measure(count: int, scale: float) -> dict:
    integers = np.rint(np.random.default_rng(0).laplace(0, scale, (count // 1000, 1000))).astype(np.int32)
    plan = plan_integers(integers)
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        data = plan.to_bytes()
        middle = time.perf_counter()
        decoded = decode_integers(Reader(data), integers.shape)
        times["encode"].append(middle - start)
        times["decode"].append(time.perf_counter() - middle)
    assert np.array_equal(decoded, integers)
    shares = np.unique(integers, return_counts=True)[1] / count
    entropy = float(-(shares * np.log2(shares)).sum())
    return {
        "symbols": count,
        "entropy_bits": entropy,
        "overhead": 8 * len(data) / count / entropy - 1,
        "lane_share": plan.bits.lanes / plan.bits.total,
        **{f"{name}_million_a_second": count / statistics.median(found) / 1e6 for name, found in times.items()},
    }


def main() -> None:
    results = [measure(count, scale) for count in (10_000, 1_000_000, 10_000_000) for scale in (0.3, 0.8, 1.6)]
    for found in results:
        print("  ".join(f"{name} {value:.4g}" for name, value in found.items()))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
