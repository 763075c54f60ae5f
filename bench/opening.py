"""What does it take to open a large file, and to decode one tensor of it? Milliseconds, and memory. On Linux.

    python bench/opening.py --gigabytes 1

The file holds tensors of incompressible codes, all alike. The last line is JSON. Fails where opening takes more than 50
ms in the median, or reads a tenth of the file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from factorpack.coding.records import encode_weight
from factorpack.container import Contents, to_bytes, write
from factorpack.factors import IDENTITY_GRID, Basis, Codes, FactoredWeight, Grid
from factorpack.tiling import Tiling

SHAPE = (2048, 4096)
REPEATS = 15
MOST_MILLISECONDS = 50.0


def large_file(path: Path, size_bytes: int) -> int:
    """Writes a file of about that size; the number of its tensors."""
    codes = np.random.default_rng(0).integers(-128, 128, SHAPE, dtype=np.int32)
    weight = FactoredWeight(
        "direct", Tiling(SHAPE), Basis(None, IDENTITY_GRID), Codes(codes, Grid(-128, 127, np.zeros(1, np.int32)))
    )
    record = encode_weight(weight)
    count = max(size_bytes // len(record), 1)
    names = [f"layer.{place}.weight" for place in range(count)]
    contents = Contents(dict.fromkeys(names, weight), dict.fromkeys(names, "float32"), {})
    write(path, to_bytes(contents, [record] * count))
    return count


def peak() -> int:
    """Bytes of memory, mapped files included, that this process has had at most."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measured(path: Path) -> dict[str, float]:
    """Opens the file, then decodes a tensor from its middle; in a process that has read nothing of it."""
    from factorpack.pipeline import open_file

    # Imports may have taken more for a while than opening does.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    small = peak()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        tensors = open_file(path)
        times.append(time.perf_counter() - start)
    opened = peak()
    name = list(tensors)[len(tensors) // 2]
    start = time.perf_counter()
    tensor = tensors[name]
    decoding = time.perf_counter() - start
    return {
        "first_open_ms": 1e3 * times[0], "open_ms": 1e3 * statistics.median(times), "open_bytes": opened - small,
        "decode_ms": 1e3 * decoding, "decode_bytes": peak() - opened, "tensor_bytes": tensor.nbytes,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--of", type=Path, help="measure this file, and make none")
    arguments = parser.parse_args()
    if arguments.of is not None:
        print(json.dumps(measured(arguments.of)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.fpk"
        count = large_file(path, int(1e9 * arguments.gigabytes))
        print(f"{count} tensors, {path.stat().st_size:,} bytes", flush=True)
        # A process of its own: making the file took more memory than reading it does.
        run = subprocess.run([sys.executable, __file__, "--of", path], env=os.environ, check=True, capture_output=True)
        found = {"size_bytes": path.stat().st_size, "tensors": count} | json.loads(run.stdout)
    print(json.dumps(found))
    return int(found["open_ms"] > MOST_MILLISECONDS or 10 * found["open_bytes"] > found["size_bytes"])


if __name__ == "__main__":
    sys.exit(main())
