"""The command line: arguments and printing, nothing else."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from factorpack.errors import FactorpackError, UnsupportedError

if TYPE_CHECKING:
    from factorpack.container import Bill
    from factorpack.nn.state import State
    from factorpack.task import Scores, Task

app = typer.Typer(
    help="Trained networks as small as their accuracy allows, in one file whose size is promised.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
notes = Console(stderr=True)
screen = Console(markup=False)

UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}

TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="A task file (.py), module:attribute, or a bare .safetensors file.")
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE.fpk", help="A compressed file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose known errors are one line on stderr and exit code 1."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except FactorpackError as error:
            notes.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            notes.print("stopped; a file is written complete or not at all")
            raise typer.Exit(130) from None

    return wrapped


def parse_size(text: str) -> int:
    """Bytes of "60KB", "5.5 MB", "1MiB" or "60_000": kB = 1,000 bytes; UnsupportedError where it is no size."""
    # A comma is no decimal point here: it stands between thousands or is refused.
    found = re.fullmatch(r"\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|[\d_]*\.?\d+)\s*([a-zA-Z]*)\s*", text)
    try:
        assert found is not None
        size = int(float(found[1].replace("_", "").replace(",", "")) * UNITS[found[2].upper()])
    except (AssertionError, KeyError, ValueError, OverflowError):
        raise UnsupportedError(f"{text!r} is no size: write 60KB, 5.5MB or a number of bytes") from None
    if size < 1:
        raise UnsupportedError(f"a file of {text!r} is no file: write 60KB, 5.5MB or a number of bytes")
    return size


def human(size: int) -> str:
    """Bytes for people, kB = 1,000."""
    for unit, scale in (("GB", 1000**3), ("MB", 1000**2), ("kB", 1000)):
        if size >= scale:
            return f"{size / scale:.4g} {unit}"
    return f"{size} B"


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars with a time to go on stderr, one a stage; a stage that starts again counts its passes."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=notes, transient=True,
    )  # fmt: skip
    with bar:
        tasks: dict[str, Any] = {}
        passes: dict[str, int] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if done == 0:
                passes[stage] = passes.get(stage, 0) + 1
                if stage in tasks:
                    bar.reset(tasks[stage], description=f"{stage}, pass {passes[stage]}")
                else:
                    tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield progress


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    with notes.status(f"{what} ..."):
        yield


def _result(data: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(data), flush=True)


def _scores(scores: "Scores") -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def _score(task: "Task", path: Path) -> "Scores":
    from factorpack.pipeline import load

    with _waiting("evaluating the file, loaded back"):
        return task.evaluate(load(path, task.model()))


def _state_maker(spec: str, options: Any, progress: Any) -> tuple["Task | None", Callable[[], "State"]]:
    """The task (None for bare weights) and what makes its state."""
    from factorpack.nn.state import read_state
    from factorpack.pipeline import model_state
    from factorpack.task import load_task, load_weights

    if spec.endswith(".safetensors"):
        tensors = load_weights(Path(spec))
        return None, lambda: read_state(tensors, exclude=options.exclude)
    task = load_task(spec)
    if not task.has("calibration"):
        notes.print(f"{escape(task.name)} has no calibration(): compressing without data", highlight=False)
    batches = task.calibration() if task.has("calibration") else None
    model = task.model()
    return task, lambda: model_state(model, batches, task.output, options, progress)


@app.command(epilog="Example: factorpack compress task.py --size 60KB --out model.fpk")
@command
def compress(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(metavar="FILE.fpk", help="The file to write.")],
    size: Annotated[str, typer.Option(help="Size of the whole file: 60KB, 5.5MB; kB = 1,000 bytes.")] = "",
    ratio: Annotated[float, typer.Option(help="Instead of --size: times smaller than the original tensors.")] = 0.0,
    form: Annotated[str, typer.Option(help="auto, direct, sparse_pca, svd, vq or separable for all weights.")] = "auto",
    solver: Annotated[str, typer.Option(help="sequential, or projected-gradient with a form.")] = "sequential",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Keep tensors of such names exactly; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress a trained network to a file of at most the size that is asked for."""
    from factorpack.pipeline import dense_bytes, finish, pack_state
    from factorpack.search import Options

    if bool(size) == bool(ratio):
        raise UnsupportedError("say how small: either --size 60KB or --ratio 18")
    if ratio and not 0 < ratio < float("inf"):
        raise UnsupportedError(f"--ratio is a positive number, not {ratio}")
    if not out.parent.is_dir():
        raise UnsupportedError(f"the folder {out.parent} does not exist: make it first, or choose another --out")
    goal = parse_size(size) if size else 0
    options = Options(form, solver, seed, tuple(exclude or ()))
    with _bars() as progress:
        start = time.perf_counter()
        loaded, make = _state_maker(task, options, progress)
        packed, state = pack_state(lambda s: goal or int(dense_bytes(s) / ratio), make, options, progress)
        seconds = time.perf_counter() - start
    score = (lambda path: _score(loaded, path)) if loaded is not None and loaded.has("evaluate") else None
    report = finish(packed, state, seconds, score, out).report
    for name in report.unseen:
        notes.print(f"note: {escape(name)} was not met in calibration; it is stored by relative error", highlight=False)
    screen.print(
        f"{out}: {report.size_bytes:,} bytes, {report.ratio:.1f} times smaller, {report.seconds:.0f} s", highlight=False
    )
    if report.scores:
        screen.print(f"scores of the file, loaded back: {_scores(dict(report.scores))}", highlight=False)
    _result(
        {
            "file": str(out), "size_bytes": report.size_bytes, "ratio": report.ratio, "seconds": report.seconds,
            "evaluation_seconds": report.evaluation_seconds, "scores": report.scores,
            "predicted_loss": report.distortion, "forms": _forms(report.bill), "unseen": report.unseen,
        },
        as_json,
    )  # fmt: skip


def _forms(bill: "Bill") -> dict[str, int]:
    """Parameters by form."""
    found: dict[str, int] = {}
    for weight in bill.weights:
        found[weight.form] = found.get(weight.form, 0) + prod(weight.shape)
    return found


@app.command(epilog="Example: factorpack evaluate task.py model.fpk")
@command
def evaluate(
    task: TaskArgument,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE.fpk]", help="A compressed file.")] = None,
    as_json: Json = False,
) -> None:
    """Score the original network and, beside it, the one that is loaded back from a file."""
    from factorpack.task import load_task

    loaded = load_task(task)
    size = None
    scores: Scores = {}
    if file is not None:
        scores = _score(loaded, file)
        size = file.stat().st_size
    with _waiting("evaluating the original"):
        original = loaded.evaluate(loaded.model())
    table = Table("score", "original", *([str(file)] if file else []))
    for name, value in original.items():
        table.add_row(name, f"{value:.4f}", *([f"{scores[name]:.4f}" if name in scores else "-"] if file else []))
    screen.print(table)
    _result({"size_bytes": size, "scores": scores, "original": original}, as_json)


@app.command(epilog="Example: factorpack inspect model.fpk")
@command
def inspect(file: FileArgument, as_json: Json = False) -> None:
    """Show where the bytes of a file are; the bill adds up to the file's size."""
    from factorpack.container import read
    from factorpack.factors import FactoredVector

    contents, bill = read(file)
    table = Table("tensor", "form", "shape", "codes", "basis", "tables", "steps", "check", "bytes", "bits/weight")
    for column in table.columns[3:]:
        column.justify = "right"
    for weight in bill.weights:
        parts = [weight.parts.get(part, 0) for part in ("codes", "basis", "tables", "steps", "checksums")]
        bits = 8 * weight.size_bytes / prod(weight.shape)
        shape = "x".join(map(str, weight.shape))
        table.add_row(weight.name, weight.form, shape, *map(str, parts), str(weight.size_bytes), f"{bits:.2f}")
    table.add_section()
    small = sum(isinstance(tensor, FactoredVector) for tensor in contents.tensors.values())
    for part, value in bill.shared.items():
        table.add_row(f"{part} ({small})" if part == "small tensors" else part, *[""] * 7, str(value), "")
    table.add_section()
    table.add_row("file", *[""] * 7, str(bill.size_bytes), "")
    (screen if screen.is_terminal else Console(width=max(screen.width, 150), markup=False)).print(table)
    weights = [asdict(w) | {"size_bytes": w.size_bytes} for w in bill.weights]
    _result({"size_bytes": bill.size_bytes, "parts": bill.parts, "weights": weights, "shared": bill.shared}, as_json)


@app.command(epilog="Example: factorpack verify model.fpk")
@command
def verify(file: FileArgument, as_json: Json = False) -> None:
    """Check every length and checksum of a file and decode all of it."""
    from factorpack.container import read
    from factorpack.factors import FactoredVector, FactoredWeight

    contents, bill = read(file)
    for tensor in contents.tensors.values():
        if isinstance(tensor, FactoredWeight | FactoredVector):
            tensor.tensor()
    names = len(contents.tensors) + len(contents.aliases)
    screen.print(f"{file}: good, {names} tensors, {bill.size_bytes:,} bytes", highlight=False)
    _result({"ok": True, "tensors": names, "size_bytes": bill.size_bytes}, as_json)


@app.command(epilog="Example: factorpack decompress model.fpk --out model.safetensors")
@command
def decompress(
    file: FileArgument,
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="The file to write.")],
    as_json: Json = False,
) -> None:
    """Write all tensors, dense and in their original dtypes, as a safetensors file."""
    from safetensors.torch import save

    from factorpack.container import write
    from factorpack.pipeline import load_state_dict

    # Tied tensors are written under each of their names: safetensors holds no two names for one tensor.
    dense = {name: tensor.clone().contiguous() for name, tensor in load_state_dict(file).items()}
    try:
        data = save(dense)
    except KeyError as error:
        raise UnsupportedError(f"safetensors has no place for {error}: use factorpack.load_state_dict") from error
    write(out, data)
    screen.print(f"{out}: {len(dense)} tensors, {human(out.stat().st_size)}", highlight=False)
    _result({"file": str(out), "tensors": len(dense), "size_bytes": out.stat().st_size}, as_json)


def main() -> None:
    """The entry point."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(app())
