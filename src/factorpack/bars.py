"""Progress bars, in terminals and notebooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Bars with a time to go, one a stage, gone in the end; a stage that starts again counts its passes."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        tasks: dict[str, Any] = {}
        passes: dict[str, int] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                passes[stage] = 1
                tasks[stage] = bar.add_task(stage, total=total)
            elif done == 0:
                passes[stage] += 1
                bar.reset(tasks[stage], description=f"{stage}, pass {passes[stage]}")
            bar.update(tasks[stage], completed=done, total=total)

        yield progress
