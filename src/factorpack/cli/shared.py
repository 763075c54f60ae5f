"""What commands share: the application, arguments that several take, how they fail and what they print."""

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from factorpack.errors import FactorpackError, UnsupportedError

if TYPE_CHECKING:
    from factorpack.plan import ModelPlan
    from factorpack.task import Scores, Task

app = typer.Typer(
    help="Trained networks as small as their accuracy allows, in one file whose size is promised.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
exports = typer.Typer(help="Write a compressed network as a file of another format.", no_args_is_help=True)
app.add_typer(exports, name="export")
notes = Console(stderr=True)
screen = Console(markup=False)

TaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="A task file (.py), module:attribute, a .safetensors file or a folder of them; for compress a folder of "
        "Hugging Face too.",
    ),
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE.fpk", help="A compressed file.")]
Form = Annotated[str, typer.Option(help="auto, direct, sparse_pca, svd, vq or separable for all weights.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Keep tensors of such names exactly; may be repeated.")
]
Jobs = Annotated[
    int, typer.Option(metavar="N", help="Cores to use. The file is the same; each takes 0.3 GB of memory and more.")
]
Cluster = Annotated[
    str,
    typer.Option(metavar="tcp://HOST:PORT", help="A Dask scheduler, whose workers then do what processes would."),
]
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
        except BrokenPipeError:
            # Who reads has read enough.
            raise
        except OSError as error:
            # Temporary folders, and what is printed, take space too.
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            text = f"{error}{': free space there' if full else ''}"
            notes.print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            notes.print("stopped; a file is written complete or not at all")
            raise typer.Exit(130) from None

    return wrapped


@contextmanager
def waiting(what: str) -> Iterator[None]:
    with notes.status(f"{what} ..."):
        yield


def print_json(data: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(data), flush=True)


def scores_told(scores: "Scores") -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def score_of(task: "Task", path: Path) -> "Scores":
    from factorpack.pipeline import load

    with waiting("evaluating the file, loaded back"):
        return task.evaluate(load(path, task.model()))


def note(text: str) -> None:
    notes.print(f"note: {escape(text)}", highlight=False, soft_wrap=True)


def read_plan(path: Path) -> "ModelPlan":
    from factorpack.plan import ModelPlan

    try:
        return ModelPlan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedError(f"cannot read the plan {path}: {error}") from error


def check_folder(path: Path | None, option: str) -> None:
    if path is not None and not path.parent.is_dir():
        raise UnsupportedError(f"the folder {path.parent} does not exist: make it first, or choose another {option}")
