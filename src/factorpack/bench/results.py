"""What was measured of a task, as JSON that is kept point by point."""

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import joblib

import factorpack
from factorpack.container import make_folder, write
from factorpack.errors import UnsupportedError

Scores = dict[str, float]
NOT_MEASURED = {"bench", "cli", "curve.py"}
"""Parts of this package that change no file."""


@dataclass(frozen=True)
class Point:
    """A peer at one setting: its file's bytes, scores of the network of that file, what both took.

    `wrapped_bytes` are those of the file compressed once more by zstd -19. `quantised_share` is the share of weights,
    tensors of two and more dimensions, that the peer does not leave dense; `left_dense` names the others. A point
    that failed has an `error` and none of these. `key` is that of all that it depends on.
    """

    peer: str
    setting: str
    key: str
    versions: dict[str, str]
    command: str
    commit: str
    machine: str
    error: str = ""
    bytes: int = 0
    wrapped_bytes: int = 0
    scores: Scores = field(default_factory=dict)
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    encode_peak_bytes: int = 0
    decode_peak_bytes: int = 0
    quantised_share: float = 0.0
    left_dense: tuple[str, ...] = ()
    sha256: str = ""

    @property
    def size_bytes(self) -> int:
        """The smaller of the file and the file in zstd: what one would send."""
        return min(self.bytes, self.wrapped_bytes)


@dataclass(frozen=True)
class Original:
    """Bytes and scores of the network as it is; `key` is that of the task file."""

    key: str
    bytes: int
    scores: Scores

    @property
    def score(self) -> str:
        """The score that is compared: agreement, which has the least sampling error, or else the first."""
        return "agreement" if "agreement" in self.scores else next(iter(self.scores))


@dataclass(frozen=True)
class Results:
    """All points of a task; `name` is the stem of its file."""

    name: str
    original: Original
    points: tuple[Point, ...] = ()

    @property
    def good(self) -> list[Point]:
        return [point for point in self.points if not point.error]

    def with_point(self, point: Point) -> "Results":
        """These, with `point` in place of an older one of the same peer and setting."""
        others = [p for p in self.points if (p.peer, p.setting) != (point.peer, point.setting)]
        return Results(self.name, self.original, (*others, point))

    def save(self, folder: Path) -> None:
        make_folder(folder)
        write(folder / f"{self.name}.json", (json.dumps(asdict(self), indent=1) + "\n").encode())


def read_results(path: Path) -> Results:
    """The results in a file. Raises UnsupportedError where they are not to be read."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        points = tuple(Point(**(point | {"left_dense": tuple(point["left_dense"])})) for point in held["points"])
        return Results(held["name"], Original(**held["original"]), points)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedError(
            f"{path} holds no results of a bench ({error}): remove it, or choose another --out"
        ) from error


def key_of(*parts: Any) -> str:
    """16 hex digits of a hash of JSON values."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def source_digest() -> str:
    """12 hex digits of the sources of this package, as far as files depend on them."""
    root = Path(factorpack.__file__).parent
    digest = sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in NOT_MEASURED:
            digest.update(f"{name.as_posix()};".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def commit() -> str:
    """The commit of this package's checkout, "+" behind it where files differ; its version where there is none."""
    root = Path(factorpack.__file__).parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", str(root)) else "")
    except (OSError, subprocess.CalledProcessError):
        return factorpack.__version__


@cache
def machine(threads: str) -> str:
    """Processor, cores and memory, system, and how many `threads` a point is allowed."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = joblib.cpu_count()
    return f"{model}, {cores} cores of {os.cpu_count()} and {threads} threads, {memory:.0f} GiB, {platform.system()}"
