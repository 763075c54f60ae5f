"""How fast are networks compressed, decoded and loaded, beside NNCodec, fp16 safetensors and an empty Python?

    python bench/speed.py TASK --size 60KB [--file FILE.fpk] [--nncodec --qp -16]

Seconds of the processor and million weights in a second, the least of `REPEATS`; what is compared is measured in turn
and told as the median of the ratios. Large files are loaded in as many threads as torch has, so that loading is told by
the clock too. --file spares the compression. --nncodec decodes
NNCodec 2.1.3 too, in the environment that `factorpack bench` has for it. The last line is JSON.
"""

import argparse
import cProfile
import io
import json
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

import factorpack
from factorpack.bench.environments import python_of
from factorpack.bench.registry import PEERS
from factorpack.bench.runs import WORK
from factorpack.container import read
from factorpack.nn.loading import state_dict
from factorpack.options import Options
from factorpack.pipeline import Source, one_thread
from factorpack.search import pack
from factorpack.sizes import parse_size
from factorpack.task import Task, load_task

REPEATS = 7
PEER = """
import sys, time
import numpy as np
from factorpack.bench.peers.nncodec import codec
from safetensors.numpy import load_file
tensors, qp, folder = sys.argv[1:]
values = {name: np.asarray(value, np.float32).copy() for name, value in load_file(tensors).items()}
start = time.process_time()
stream = bytes(codec.encode(values, {"qp": int(qp), "results": folder, "verbose": False}))
print("ready", len(stream), time.process_time() - start, flush=True)
for _ in sys.stdin:
    start = time.process_time()
    codec.decode(bytearray(stream))
    print("decoded", time.process_time() - start, flush=True)
"""
"""Encodes once, decodes on every line that it is sent, and tells its own seconds."""


class Peer:
    """NNCodec in a process of its own."""

    def __init__(self, tensors: dict, qp: int, folder: str) -> None:
        path = Path(folder) / "floats.safetensors"
        save_file({name: value.float().contiguous() for name, value in tensors.items()}, path)
        python = python_of(WORK / "environments", "nncodec", PEERS["nncodec"].requirements)
        command = [str(python), "-c", PEER, str(path), str(qp), folder]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        size, seconds = self._told("ready")
        self.size_bytes, self.encode_seconds = int(size), float(seconds)

    def _told(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()[1:]
        raise SystemExit("NNCodec ended early: is it installed there?")

    def decode(self) -> float:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return float(self._told("decoded")[0])


def seconds_of(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    start = clock()
    work()
    return clock() - start


def in_turn(first: Callable[[], float], second: Callable[[], float]) -> dict[str, float]:
    """The least seconds of both, and the median of first / second."""
    pairs = [(first(), second()) for _ in range(REPEATS)]
    return {
        "seconds": min(pair[0] for pair in pairs),
        "other_seconds": min(pair[1] for pair in pairs),
        "ratio": statistics.median(mine / other for mine, other in pairs),
    }


def profile(work: Callable[[], object], lines: int = 8) -> str:
    found = cProfile.Profile()
    found.runcall(work)
    text = io.StringIO()
    pstats.Stats(found, stream=text).sort_stats("tottime").print_stats(lines)
    return text.getvalue()


def compressed(task: Task, size: int, path: Path) -> dict[str, float]:
    """Seconds of each stage; the file is at `path` then."""
    stages: dict[str, float] = {}
    model, batches, options = task.model(), task.calibration(), Options()

    def analyse() -> None:
        found["state"] = Source(model, batches, task.output).state(options)

    def solve() -> None:
        found["packed"] = pack(found["state"], size, options, lambda _stage, _done, _total: None)

    found: dict = {}
    with one_thread():
        stages["statistics"] = seconds_of(analyse)
        stages["search and rounding"] = seconds_of(solve)
    stages["writing"] = seconds_of(lambda: factorpack.container.write(path, found["packed"].data))
    return stages


def import_seconds() -> dict[str, float]:
    """Of `import factorpack` and of the command's --help, beside a Python that does nothing."""

    def started(code: str) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

        return run

    empty, package = started("pass"), started("import factorpack")
    command = started("import sys; sys.argv[1:] = ['--help']; from factorpack.cli import main; main()")
    return {"package": in_turn(package, empty)["seconds"] - empty(), "command": min(command() for _ in range(REPEATS))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--size", default="60KB")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--nncodec", action="store_true", help="decode its file too")
    parser.add_argument("--qp", type=int, default=-16)
    arguments = parser.parse_args()
    task, results = load_task(arguments.task), {}
    with tempfile.TemporaryDirectory() as folder:
        path, half = arguments.file or Path(folder) / "model.fpk", Path(folder) / "half.safetensors"
        if not arguments.file:
            results["compress_seconds"] = compressed(task, parse_size(arguments.size), path)
        contents, _ = read(path)
        tensors = state_dict(contents.tensors, contents.dtypes, contents.aliases)
        weights = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
        results |= {"weights": weights, "size_bytes": path.stat().st_size}

        def decode() -> float:
            return seconds_of(lambda: factorpack.load_state_dict(path))

        read_once = min(seconds_of(lambda: read(path)) for _ in range(REPEATS))
        results["decode"] = {"entropy_coding_seconds": read_once, "seconds": min(decode() for _ in range(REPEATS))}
        results["decode"]["million_weights_a_second"] = weights / results["decode"]["seconds"] / 1e6
        print(profile(lambda: factorpack.load_state_dict(path)))
        model = task.model()
        save_file({n: t.half().contiguous() for n, t in tensors.items() if t.is_floating_point()}, half)
        results["load_beside_fp16"] = in_turn(
            lambda: seconds_of(lambda: factorpack.load(path, model)),
            lambda: seconds_of(lambda: model.load_state_dict(load_file(half), strict=False)),
        )
        for name, clock in (("", time.process_time), ("_on_the_clock", time.perf_counter)):
            results[f"load_and_build_beside_fp16{name}"] = in_turn(
                lambda clock=clock: seconds_of(lambda: factorpack.load(path, task.model()), clock),
                lambda clock=clock: seconds_of(
                    lambda: task.model().load_state_dict(load_file(half), strict=False), clock
                ),
            )
        if arguments.nncodec:
            state = task.model().state_dict()
            floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
            peer = Peer(floats, arguments.qp, folder)
            found = in_turn(decode, peer.decode)
            # Of speeds, so that more is better.
            found["ratio"] = 1 / found["ratio"]
            results["decode_beside_nncodec"] = found | {"its_bytes": peer.size_bytes, "its_encode": peer.encode_seconds}
    results["import_seconds"] = import_seconds()
    for name, value in results.items():
        print(name, value)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
