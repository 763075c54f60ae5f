"""Runs peers on tasks, two points at a time, and keeps each point as soon as it is there."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import joblib

import factorpack
from factorpack.bench.environments import python_of, versions
from factorpack.bench.registry import WRAPPER, Run
from factorpack.bench.results import Original, Point, Results, commit, key_of, machine, read_results, source_digest
from factorpack.errors import FactorpackError, TaskError, UnsupportedError

WORK = Path(".bench")
"""Environments and analyses, kept between runs."""
MINUTES = 40
"""What one process may take."""
SIDE_BY_SIDE = 2
"""Points that are measured at a time, with an equal share of the cores each: starting a process, and much of what tools
do, takes but one."""
LINES_OF_AN_ERROR = 2
WRAP = (
    "import sys, pathlib, zstandard;"
    "print(len(zstandard.ZstdCompressor(level=19).compress(pathlib.Path(sys.argv[1]).read_bytes())))"
)


def _process(command: Sequence[object], threads: str | None = None) -> str:
    """The last line of what it prints; it computes in so many `threads`, or in as many as it likes.

    Raises UnsupportedError, with the last lines of its errors, where it fails.
    """
    source = str(Path(factorpack.__file__).parents[1])
    # Peers find this package behind their own: PYTHONPATH would put its neighbours before theirs.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if str(command[0]) == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    try:
        run = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, check=False, timeout=60 * MINUTES
        )
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"not done in {MINUTES} minutes") from None
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    if run.returncode:
        raise UnsupportedError(" / ".join(lines[-LINES_OF_AN_ERROR:]) or f"ended with code {run.returncode}")
    return run.stdout.strip().splitlines()[-1]


@dataclass(frozen=True)
class Bench:
    """Runs on the task of file `spec`, with results in `out` and what is kept besides in `work`."""

    spec: str
    out: Path
    work: Path = WORK

    @property
    def name(self) -> str:
        return Path(self.spec).stem

    @cached_property
    def task_key(self) -> str:
        path = Path(self.spec)
        if path.suffix != ".py" or not path.is_file():
            raise TaskError(f"no task file {self.spec}: a bench needs a .py file")
        return sha256(path.read_bytes()).hexdigest()[:16]

    def held(self) -> Results | None:
        """What is known of this task already; None where it changed, or there is nothing."""
        path = self.out / f"{self.name}.json"
        found = read_results(path) if path.exists() else None
        return found if found is not None and found.original.key == self.task_key else None

    def scored(self) -> Results:
        """Results without points: the original alone."""
        try:
            found = json.loads(_process([sys.executable, "-m", "factorpack.bench.protocol", "original", self.spec]))
        except UnsupportedError as error:
            raise TaskError(f"{self.spec}: the original cannot be scored: {error}") from None
        return Results(self.name, Original(self.task_key, **found))

    def versions(self, run: Run) -> dict[str, str]:
        known = versions(run.peer.requirements)
        return known if run.peer.requirements else known | {"factorpack": source_digest()}

    def key(self, run: Run) -> str:
        scripts = ("protocol.py", "indexed.py", f"peers/{run.peer.script}.py")
        digests = [sha256((Path(__file__).parent / script).read_bytes()).hexdigest() for script in scripts]
        return key_of(self.task_key, run.name, self.versions(run), digests)

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """Those of which there is no point of the same versions; one that failed is tried again."""
        held = self.held()
        known = {point.key for point in held.good} if held else set()
        return [run for run in runs if self.key(run) not in known]

    def command(self, run: Run) -> str:
        """How one makes this point again."""
        return shlex.join(["factorpack", "bench", self.spec, "--peers", run.name, "--out", str(self.out)])

    def measure(self, run: Run, threads: str) -> Point:
        """The point of a run: two processes, one that writes a file and one that has nothing but that file."""
        about = (
            run.peer.name, run.setting, self.key(run), self.versions(run), self.command(run), commit(), machine(threads)
        )  # fmt: skip
        try:
            return Point(*about, **self._measured(run, threads))
        except FactorpackError as error:
            return Point(*about, error=str(error))

    def _measured(self, run: Run, threads: str) -> dict[str, Any]:
        environments = self.work / "environments"
        python = python_of(environments, run.peer.name, run.peer.requirements)
        script = [python, "-m", f"factorpack.bench.peers.{run.peer.script}"]
        kept = self.work / "analyses" / f"{self.name}-{key_of(self.task_key, self.versions(run))}"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network"
            encoded = json.loads(
                _process([*script, "encode", self.spec, file, run.peer.prefix + run.setting, kept.absolute()], threads)
            )
            scored = json.loads(_process([*script, "score", self.spec, file], threads))
            wrapped = int(_process([python_of(environments, "zstd", WRAPPER), "-c", WRAP, file]))
            digest = sha256(file.read_bytes()).hexdigest()
        encoded["left_dense"] = tuple(encoded["left_dense"])
        return {**encoded, **scored, "wrapped_bytes": wrapped, "sha256": digest}


@dataclass(frozen=True)
class _Line:
    """Runs of one peer on one task, which are measured one after the other: they may share what the first found out."""

    bench: Bench
    runs: deque[Run]

    def next_point(self, threads: str) -> tuple[Run, Point, float]:
        """With what it took, in seconds."""
        run, start = self.runs.popleft(), time.perf_counter()
        return run, self.bench.measure(run, threads), time.perf_counter() - start


def _side_by_side(lines: Sequence[_Line], most: int) -> Iterator[tuple[_Line, Run, Point, float]]:
    """The points of all lines as they come, at most so many being measured at a time."""
    waiting = deque(lines)
    running: dict[Future[tuple[Run, Point, float]], _Line] = {}
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, joblib.cpu_count() // most))
    with ThreadPoolExecutor(most) as pool:
        while waiting or running:
            while waiting and len(running) < most:
                line = waiting.popleft()
                running[pool.submit(line.next_point, threads)] = line
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                line = running.pop(future)
                if line.runs:
                    waiting.appendleft(line)
                yield line, *future.result()


def run_all(
    benches: Sequence[Bench], runs: Sequence[Run], tell: Callable[[str], None], draw: Callable[[Results], None]
) -> list[Results]:
    """Measures all runs on all tasks but for those that are known; results are written after each.

    `tell` is told a line about each: what it gave, and how long the others may take, going by those of the same peer.
    `draw` is given the results of a task when they are complete.
    """
    missing = {bench.name: bench.missing(runs) for bench in benches}
    todo = [(name, run) for name, many in missing.items() for run in many]
    total = len(todo)
    tell(f"{total} of {len(benches) * len(runs)} points are to be measured")
    found: dict[str, Results] = {}
    lines: dict[tuple[str, str], _Line] = {}
    for bench in benches:
        results = bench.held()
        if results is None:
            tell(f"{bench.name}: scoring the original")
            results = bench.scored()
            results.save(bench.out)
        found[bench.name] = results
        if not missing[bench.name]:
            draw(results)
        for run in missing[bench.name]:
            lines.setdefault((bench.name, run.peer.name), _Line(bench, deque())).runs.append(run)
    spent: dict[tuple[str, str], list[float]] = {}
    at_a_time = max(1, min(SIDE_BY_SIDE, len(lines)))
    for line, run, point, seconds in _side_by_side(list(lines.values()), at_a_time):
        name = line.bench.name
        results = found[name] = found[name].with_point(point)
        results.save(line.bench.out)
        todo.remove((name, run))
        spent.setdefault((name, run.peer.name), []).append(seconds)
        tell(f"[{total - len(todo)}/{total}] {name} {run.name}: {_told(point, results)}; {_time(seconds)}, "
             f"about {_time(_to_go(todo, spent) / at_a_time)} to go")  # fmt: skip
        if not any(other == name for other, _ in todo):
            draw(results)
    return list(found.values())


def _told(point: Point, results: Results) -> str:
    if point.error:
        return f"failed: {point.error}"
    score = results.original.score
    return f"{point.size_bytes:,} bytes, {score} {point.scores.get(score, float('nan')):.4g}"


def _to_go(todo: Sequence[tuple[str, Run]], spent: dict[tuple[str, str], list[float]]) -> float:
    """Seconds that the rest may take: as others of peer and task, of the task, or of all did."""

    def mean(task: str, peer: str) -> float:
        for same in (
            [s for (t, n), many in spent.items() for s in many if (t, n) == (task, peer)],
            [s for (t, _), many in spent.items() for s in many if t == task],
            [s for many in spent.values() for s in many],
        ):
            if same:
                return sum(same) / len(same)
        return 0.0

    return sum(mean(task, run.peer.name) for task, run in todo)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
