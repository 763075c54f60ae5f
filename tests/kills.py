"""Command lines in processes that are killed, or meet a full disk, by the hundred.

Each is forked from one process that has imported everything, so that a kill meets its work and not its preparation.
"""

import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import accelerate  # noqa: F401
import numpy as np
import pytest
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401
from typer.testing import CliRunner

import factorpack
from factorpack import cache, container, curve, training  # noqa: F401
from factorpack.cli import app

TESTS = Path(__file__).parent
CONTEXT = get_context("forkserver")
MOST_SECONDS = 120
OLD = b"what was there before"
EVERY_RATE = cache.rates_of


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, or minus the signal, what it printed, how long it took."""

    exit_code: int
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0

    @property
    def killed(self) -> bool:
        return self.exit_code == -signal.SIGKILL


class _Before:
    """A trace function that kills the process before a line of `container.write`, counted over all its calls."""

    def __init__(self, line: int) -> None:
        self.left = line

    def __call__(self, frame, event, _argument):
        if event == "call":
            return self if frame.f_code is container.write.__code__ else None
        if event == "line":
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def _command(told: Connection, arguments: list[str], line: int, most_bytes: int) -> None:
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    # Some λ of an analysis: a rung takes tenths of a second.
    cache.rates_of = lambda state: EVERY_RATE(state)[3::9]
    if line:
        sys.settrace(_Before(line))
    found = CliRunner().invoke(app, arguments)
    sys.settrace(None)
    told.send((found.exit_code, found.stdout, found.stderr))


def _writing(told: Connection, path: Path, data: bytes, times: int) -> None:
    for _ in range(times):
        container.write(path, data)
    told.send((0, "", ""))


class Running:
    """A process that has begun."""

    def __init__(self, action: Callable[..., None], *arguments: object) -> None:
        self._told, told = CONTEXT.Pipe(duplex=False)
        self._process: BaseProcess = CONTEXT.Process(target=action, args=(told, *arguments))
        self._began = time.monotonic()
        self._process.start()
        told.close()

    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self, seconds: float | None = None) -> Ended:
        """Waits for the end, and makes it come after so many seconds."""
        self._process.join(MOST_SECONDS if seconds is None else seconds)
        killed = self._process.is_alive()
        self._process.kill()
        self._process.join()
        took = time.monotonic() - self._began
        assert not killed or seconds is not None, "it takes too long"
        code = self._process.exitcode
        self._process.close()
        with self._told:
            if code == -signal.SIGKILL:
                return Ended(code, seconds=took)
            assert code == 0
            return Ended(*self._told.recv(), took)


class Processes:
    """Begins processes."""

    def __init__(self) -> None:
        search = os.pathsep.join([str(TESTS), str(Path(factorpack.__file__).parents[1])])
        CONTEXT.set_forkserver_preload([__name__])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", search)
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()
        # All is imported when the first one ends.
        assert self.run("--help").exit_code == 0

    def begin(self, *arguments: object, line: int = 0, most_bytes: int = 0) -> Running:
        """Of a command line: killed before that line of writing, refused files of more than that size."""
        return Running(_command, [str(argument) for argument in arguments], line, most_bytes)

    def run(self, *arguments: object, seconds: float | None = None, line: int = 0, most_bytes: int = 0) -> Ended:
        """Of a command line from begin to end, which a kill after so many seconds may bring."""
        return self.begin(*arguments, line=line, most_bytes=most_bytes).end(seconds)

    def begin_to_write(self, path: Path, data: bytes, times: int) -> Running:
        return Running(_writing, path, data, times)


def clear(out: Path) -> None:
    """Removes a file and all that was kept beside it."""
    for path in out.parent.glob(f"*{out.name}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@dataclass(frozen=True)
class Question:
    """A command line that goes on with --resume, but for its --out; the file of at most `size` bytes that it gives
    when it is left alone, and the seconds that this takes."""

    arguments: tuple[object, ...]
    size: int
    out: Path
    seconds: float

    @property
    def whole(self) -> bytes:
        return self.out.read_bytes()

    def kill(self, processes: Processes, out: Path, kills: int, moments: Iterator[dict[str, float]]) -> Counter[str]:
        """Kills it that often, and goes on after each until it ends, whereupon it is begun anew.

        Every second time there is a file before. Asserts what is promised of the file under the final name, and counts
        what was found there: nothing, the old file, a new one.
        """
        found: Counter[str] = Counter()
        old = None
        while found.total() < kills:
            clear(out)
            old = None if old else OLD
            if old:
                out.write_bytes(old)
            while True:
                last = found.total() >= kills
                ended = processes.run(*self.arguments, "--resume", "--out", out, **{} if last else next(moments))
                if not ended.killed:
                    break
                found[self._found(out, old)] += 1
            assert ended.exit_code == 0, ended.stdout + ended.stderr
            assert "damaged" not in ended.stderr
            assert out.read_bytes() == self.whole
        return found

    def _found(self, out: Path, old: bytes | None) -> str:
        if not out.exists():
            assert old is None, "the old file is gone"
            return "nothing"
        data = out.read_bytes()
        if data == old:
            return "old"
        _, bill = container.read(out)
        assert bill.size_bytes == len(data) <= self.size
        return "new"


def at_any_time(seconds: float) -> Iterator[dict[str, float]]:
    rng = np.random.default_rng(0)
    while True:
        yield {"seconds": seconds * rng.random()}


def while_writing() -> Iterator[dict[str, int]]:
    """A write has a dozen lines, a run one to twenty writes."""
    rng = np.random.default_rng(0)
    while True:
        yield {"line": int(rng.integers(1, 100))}


def _asked(processes: Processes, arguments: tuple[object, ...], size: int, out: Path) -> Question:
    ended = processes.run(*arguments, "--resume", "--out", out)
    assert ended.exit_code == 0, ended.stderr
    return Question(arguments, size, out, ended.seconds)


def compressing(processes: Processes, task: Path, folder: Path) -> Question:
    """The digits network, compressed to 6 kB."""
    arguments = ("compress", task, "--size", "6KB", "--form", "direct")
    return _asked(processes, arguments, 6000, folder / "whole.fpk")


def finetuning(processes: Processes, task: Path, folder: Path) -> Question:
    """The digits network in 2.5 kB, trained on 60 batches, in which the file becomes better several times."""
    start = folder / "start.fpk"
    assert processes.run("compress", task, "--size", "2.5KB", "--form", "direct", "--out", start).exit_code == 0
    arguments = ("finetune", task, start, "--steps", "60", "--learning-rate", "0.01")
    question = _asked(processes, arguments, 2500, folder / "whole.fpk")
    assert question.whole != start.read_bytes()
    return question
