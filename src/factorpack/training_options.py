"""What a training is given and what it tells: lessons, options, report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from factorpack.errors import UnsupportedError
from factorpack.nn.distillation import LOSSES, Loss
from factorpack.nn.lessons import Training
from factorpack.task import checked_output

COMPARISONS = ("auto", *LOSSES)
PRECISIONS = ("auto", "no", "bf16", "fp16")


@dataclass(frozen=True)
class Lessons:
    """What a network learns from: `training(epoch)` yields pairs of a batch and its targets, which may be None.

    `loss(outputs, targets)` is the task's own; `output`, "logits" or "embedding", says how outputs are compared with
    those of the original network.
    """

    training: Training
    loss: Loss | None = None
    output: str = "logits"

    def __post_init__(self) -> None:
        checked_output(self.output, "finetune")


@dataclass(frozen=True)
class TrainingOptions:
    """How a file is trained: for so many `steps`, `epochs` or `minutes`, one of them.

    `size` is what the new file may take, in bytes; None: what the old one takes. `learning_rate` is that of the codes
    at its highest, in steps of their grids; None: the longer the training the lower (`nn.training.highest_rate`).
    `distil` is the share of distillation beside the task's loss (None: only where there are no targets, or no loss); in
    it, `compare` says how outputs are compared ("divergence" or "squares" of logits, "cosine"; "auto": divergence of
    logits, cosine of embeddings), and `features` is the weight of what blocks give out. `orthogonality` is the weight
    of the squared cosines between columns of a basis. `device` is "auto" or what torch calls it; `precision` "auto",
    "no", "bf16" or "fp16". `resume` goes on where a run of the same options was stopped.

    Raises UnsupportedError for what cannot be.
    """

    size: int | None = None
    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    distil: float | None = None
    compare: str = "auto"
    features: float = 1.0
    orthogonality: float = 0.0
    device: str = "auto"
    precision: str = "auto"
    resume: bool = False

    def __post_init__(self) -> None:
        lengths = [length for length in (self.steps, self.epochs, self.minutes) if length is not None]
        if len(lengths) != 1:
            raise UnsupportedError("say how long to train, in one way: --minutes 30, --epochs 10 or --steps 5000")
        if not 0 <= lengths[0] < math.inf:
            raise UnsupportedError(f"a training is as long as a number says that is not negative, not {lengths[0]}")
        if self.distil is not None and not 0 <= self.distil <= 1:
            raise UnsupportedError(f"--distil is a share from 0 to 1, not {self.distil}")
        for name in ("learning_rate", "features", "orthogonality"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise UnsupportedError(f"--{name.replace('_', '-')} is zero or more, not {getattr(self, name)}")
        if self.compare not in COMPARISONS:
            raise UnsupportedError(f"{self.compare!r} is no way to compare outputs: choose {', '.join(COMPARISONS)}")
        if self.precision not in PRECISIONS:
            raise UnsupportedError(f"{self.precision!r} is no precision: choose {', '.join(PRECISIONS)}")
        if self.size is not None and self.size < 1:
            raise UnsupportedError(f"{self.size} bytes are no file")


@dataclass(frozen=True)
class TrainingReport:
    """What a training gave: the file's size and scores, and the losses on held-out batches that chose it.

    `held_loss_before` is that of the file that was given (infinite where that is larger than the size asked for),
    `held_loss` that of the one that was kept, after `best_step` of `steps`. `seconds` leaves the evaluation out;
    `ratio` is to the tensors in their own dtypes. `complete` is False where training was stopped.
    """

    size_bytes: int
    ratio: float
    steps: int
    epoch: int
    best_step: int
    held_loss_before: float
    held_loss: float
    seconds: float
    evaluation_seconds: float
    complete: bool
    scores: Mapping[str, float] = field(default_factory=dict)
