"""What does each part of training give? One file of a task, trained anew without it.

python bench/finetuning.py ../shared/tasks/resnet8_cifar10.py --size 15KB --steps 1000

"plain" is the straight-through estimator at fixed steps and masks, without a price: zeros stay zeros and codes cost
what they cost. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import factorpack
from factorpack.nn.averages import Averages
from factorpack.nn.control import RateController
from factorpack.nn.freezing import Freezing
from factorpack.nn.trainable import TrainableWeight
from factorpack.sizes import parse_size
from factorpack.task import load_task
from factorpack.training import Run


class Free(RateController):
    """Bits cost nothing."""

    @property
    def rate(self) -> float:
        return 0.0


def as_it_is(_run: Run) -> None:
    """All of it."""


def fixed_steps(run: Run) -> None:
    """Steps stay; codes are priced."""
    for latent in run.compressed.trained().values():
        if isinstance(latent, TrainableWeight):
            latent.octaves.requires_grad_(False)


def norms_of_the_file(run: Run) -> None:
    """Batch norms are the two numbers a channel that the file has."""
    run.norms.leave()


class OfTheMoment(Averages):
    """Where latents are now in place of where they usually are."""

    def take(self, *_: object, **__: object) -> None:
        self.keep()


class NeverFrozen(Freezing):
    """All codes go on."""

    def freeze(self, *_: object, **__: object) -> None:
        pass


def of_the_moment(run: Run) -> None:
    """What is judged and kept is the network as it is at that step."""
    run.averages = OfTheMoment(run.compressed)


def never_frozen(run: Run) -> None:
    """No code is frozen."""
    run.freezing = NeverFrozen(run.compressed)


def neither(run: Run) -> None:
    """Both of these."""
    of_the_moment(run)
    never_frozen(run)


def plain(run: Run) -> None:
    """Steps and masks stay; bits cost nothing and no size is kept. The network is that of the moment, none frozen."""
    neither(run)
    run.size = 2**62
    for latent in run.compressed.trained().values():
        if isinstance(latent, TrainableWeight) and latent.codes is not None:
            mask = latent.codes.detach() != 0
            latent.codes.register_hook(lambda gradient, mask=mask: gradient * mask)
            latent.octaves.requires_grad_(False)
    run.controller = Free(run.controller.count, float("inf"))


VARIANTS: dict[str, tuple[dict[str, Any], Callable[[Run], None]]] = {
    "all of it": ({}, as_it_is),
    "plain straight-through, fixed steps and masks": ({}, plain),
    "fixed steps": ({}, fixed_steps),
    "batch norms as in the file": ({}, norms_of_the_file),
    "nothing frozen": ({}, never_frozen),
    "the network of the moment": ({}, of_the_moment),
    "the network of the moment, nothing frozen": ({}, neither),
    "outputs alone, without features": ({"features": 0.0}, as_it_is),
    "squares of logits": ({"compare": "squares"}, as_it_is),
    "orthogonality 0.1": ({"orthogonality": 0.1}, as_it_is),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--size", required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--form", default="auto")
    parser.add_argument("--rank", default="rate")
    parser.add_argument("--variants", nargs="*", default=[name for name in VARIANTS if "orthogonality" not in name])
    arguments = parser.parse_args()
    console, task = Console(), load_task(arguments.task)
    rows: list[dict[str, Any]] = []

    def told(name: str, size: int, scores: dict[str, float], held: float | None, seconds: float) -> None:
        rows.append({"variant": name, "size_bytes": size, "scores": scores, "held_loss": held, "seconds": seconds})
        console.print(rows[-1])

    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.fpk"
        options = factorpack.Options(arguments.form, rank=arguments.rank)
        packed = factorpack.compress(
            task.model(), parse_size(arguments.size), task.calibration(), task.evaluate, task.output, options
        )
        packed.save(first)
        told("before training", packed.report.size_bytes, dict(packed.report.scores), None, packed.report.seconds)
        for name in arguments.variants:
            chosen, change = VARIANTS[name]
            start, out = time.perf_counter(), Path(folder) / "trained.fpk"
            torch.manual_seed(0)
            run = Run(
                task.model(), first, out, factorpack.Lessons(task.training, task.loss, task.output),
                factorpack.TrainingOptions(steps=arguments.steps, **chosen),
            )  # fmt: skip
            change(run)
            run.train()
            report = run.report(task.evaluate)
            told(name, report.size_bytes, dict(report.scores), report.held_loss, time.perf_counter() - start)
    table = Table("variant", "bytes", *rows[0]["scores"], "held-out loss")
    for row in rows:
        held = "" if row["held_loss"] is None else f"{row['held_loss']:.4f}"
        table.add_row(row["variant"], f"{row['size_bytes']:,}", *(f"{s:.2f}" for s in row["scores"].values()), held)
    console.print(table)
    print(json.dumps({"task": arguments.task, "size": arguments.size, "steps": arguments.steps, "rows": rows}))


if __name__ == "__main__":
    main()
