"""What does it take to compress a folder of weights that are larger than memory should be? Seconds, and peak memory.

    python bench/folder.py --gigabytes 2 --ratio 16

The folder is that of a transformer with random weights, in two files with an index. The last line is JSON. Fails where
it takes more than three times the largest tensor and 1 GB. On Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from factorpack.container.reader import File

WIDTH, HIDDEN, VOCABULARY = 2048, 5632, 32000


def block(place: int) -> dict[str, Tensor]:
    """The weights of one block of a transformer."""
    generator = torch.Generator().manual_seed(place)
    shapes = dict.fromkeys(("attention.q", "attention.k", "attention.v", "attention.out"), (WIDTH, WIDTH))
    shapes |= {"feed.up": (HIDDEN, WIDTH), "feed.gate": (HIDDEN, WIDTH), "feed.down": (WIDTH, HIDDEN)}
    scales = 2.0 ** torch.randint(-7, -4, (len(shapes),), generator=generator)
    weights = zip(shapes.items(), scales, strict=True)
    found = {f"blocks.{place}.{name}.weight": scale * torch.randn(shape, generator=generator)
             for (name, shape), scale in weights}  # fmt: skip
    return found | {f"blocks.{place}.norm.weight": torch.ones(WIDTH)}


def make(folder: Path, size_bytes: int) -> int:
    """Writes such a folder; the bytes of its largest tensor."""
    embedding = torch.randn((VOCABULARY, WIDTH), generator=torch.Generator().manual_seed(-1)) / 32
    parts = [{"embedding.weight": embedding}, {}]
    place = 0
    while sum(tensor.nbytes for part in parts for tensor in part.values()) < size_bytes:
        parts[place % 2] |= block(place)
        place += 1
    homes = {}
    for number, part in enumerate(parts):
        name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / name)
        homes |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    return embedding.nbytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--folder", type=Path, help="make the folder here, and keep it")
    parser.add_argument("--only-make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only_make:
        print(make(arguments.folder, int(1e9 * arguments.gigabytes)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "model"
        folder.mkdir(parents=True, exist_ok=True)
        # Processes of their own, one after another: the memory of this one, which is small, is the least they can have.
        itself = [sys.executable, __file__, "--gigabytes", str(arguments.gigabytes), "--folder", folder, "--only-make"]
        largest = int(subprocess.run(itself, check=True, capture_output=True).stdout)
        out = Path(temporary) / "model.fpk"
        start = time.perf_counter()
        command = [Path(sys.executable).with_name("factorpack"), "compress", folder, "--ratio", str(arguments.ratio)]
        process = subprocess.Popen([*command, "--out", out])
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0
        seconds = time.perf_counter() - start
        dense = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        bill = File(out).bill()
        peak, allowed = 1024 * usage.ru_maxrss, 3 * largest + 10**9
        print(json.dumps({
            "dense_bytes": dense, "size_bytes": bill.size_bytes, "tensors": len(bill.weights), "seconds": seconds,
            "peak_bytes": peak, "allowed_bytes": allowed,
        }))  # fmt: skip
    return int(peak > allowed)


if __name__ == "__main__":
    sys.exit(main())
