"""What a network learns from: batches of one epoch after another, and a slice of them that is held out.

A batch is a tensor, a tuple or a dict of them; where their first axes agree in length they are samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from factorpack.errors import TaskError

HELD_SHARE = 1 / 16
"""Part of an epoch that is held out to choose between states of the network."""
MOST_HELD = 16
"""Batches that are held out at most."""
HELD_EPOCH = 1_000_003
"""What is held out is drawn from an epoch that training does not come to. Samples of epoch 0 are often those that
calibration drew with the same seed: compression knows them already, and they judge a file too kindly."""
MEASURED = 32
"""Batches that the moments of batch norms are measured on, of the epochs after that."""
EXCHANGED = 0.3
"""Of the tokens of a batch so many at most are exchanged for others where the original network says what is right."""
TOKENS = "input_ids"
MASK = "attention_mask"
"""Where a batch has one, padding is told by it, and two samples that differ in padding alone are one."""

Lesson = tuple[Any, Any]
"""A batch, and its targets or None."""
Training = Callable[[int], Iterable[Lesson]]
"""The batches of an epoch, as a function of its number."""


def _tensors(batch: Any) -> list[Tensor]:
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    return [part for part in parts if isinstance(part, Tensor)]


def mask_of(batch: Any) -> Tensor | None:
    """What tells padding in a batch, where there is such."""
    return batch.get(MASK) if isinstance(batch, Mapping) else None


def samples_in(batch: Any) -> int:
    """The number of samples of a batch; 0 where its tensors do not agree on one."""
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in _tensors(batch)}
    return lengths.pop() if len(lengths) == 1 else 0


def _fingerprints(batch: Any) -> list[bytes]:
    """What tells each sample from others."""
    count = samples_in(batch)
    mask = mask_of(batch)
    rows = []
    for sample in range(count):
        found = blake2b(digest_size=16)
        for tensor in _tensors(batch):
            row = tensor[sample]
            if mask is not None and row.shape == mask[sample].shape:
                row = row[mask[sample].bool()]
            found.update(str((row.dtype, tuple(row.shape))).encode())
            found.update(row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        rows.append(found.digest())
    return rows


def _chosen(part: Any, keep: Tensor) -> Any:
    if isinstance(part, Mapping):
        return {name: _chosen(value, keep) for name, value in part.items()}
    if isinstance(part, tuple | list):
        return tuple(_chosen(value, keep) for value in part)
    return part[keep] if isinstance(part, Tensor) and part.ndim and len(part) == len(keep) else part


def exchanged(batch: Any, number: int) -> Any:
    """A batch of token ids in which some are exchanged for others of it; any other batch as it is.

    Token ids are the int64 or int32 tensor that a batch is, that comes first in a tuple, or `TOKENS` of a dict; where
    `MASK` tells padding, that stays. The share is drawn anew for each `number`, evenly up to `EXCHANGED`. What the
    original network makes of such a text is as good a lesson as any, and a small set of them is learned by heart else.
    """
    if isinstance(batch, Mapping):
        tokens = batch.get(TOKENS)
    else:
        tokens = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32) or not tokens.numel():
        return batch
    generator = torch.Generator().manual_seed(number)
    ids = tokens.cpu()
    share = EXCHANGED * torch.rand((), generator=generator)
    others = torch.randint(ids.numel(), ids.shape, generator=generator)
    chosen = torch.rand(ids.shape, generator=generator) < share
    mask = mask_of(batch)
    if mask is not None and mask.shape == ids.shape:
        real = mask.cpu().bool()
        chosen &= real & real.reshape(-1)[others]
    varied = torch.where(chosen, ids.reshape(-1)[others], ids).to(tokens.device)
    if isinstance(batch, Mapping):
        return {**batch, TOKENS: varied}
    return varied if batch is tokens else (varied, *batch[1:])


@dataclass(frozen=True)
class Held:
    """The lessons that are held out, and the fingerprints of their samples."""

    lessons: list[Lesson]
    samples: frozenset[bytes]

    def without(self, lesson: Lesson) -> Lesson | None:
        """The lesson less what is held out; None where nothing is left."""
        batch, targets = lesson
        keep = [found not in self.samples for found in _fingerprints(batch)]
        if all(keep):
            return lesson
        if not any(keep):
            return None
        chosen = torch.tensor(keep)
        return _chosen(batch, chosen), _chosen(targets, chosen)


def _epoch(training: Training, number: int) -> Iterator[Lesson]:
    for lesson in training(number):
        if not isinstance(lesson, tuple | list) or len(lesson) != 2:
            raise TaskError("training() yields pairs: a batch, and its targets or None")
        yield lesson[0], lesson[1]


def batches_in(training: Training) -> int:
    """How many batches an epoch has."""
    return sum(1 for _ in _epoch(training, 0))


def hold_out(training: Training) -> Held:
    """The first batches of an epoch of its own (`HELD_EPOCH`), held out: a sixteenth of them, at most 16.

    What comes again, as it is, in other batches is left out there; what is augmented anew in each epoch is not
    recognised. Raises TaskError for an epoch of fewer than two batches.
    """
    first: list[Lesson] = []
    count = 0
    for lesson in islice(_epoch(training, HELD_EPOCH), int(MOST_HELD / HELD_SHARE)):
        if count < MOST_HELD:
            first.append(lesson)
        count += 1
    if count < 2:
        raise TaskError(f"an epoch of training() has {count} batches: at least two are needed, one of them to judge by")
    lessons = first[: max(1, int(count * HELD_SHARE))]
    return Held(lessons, frozenset(found for batch, _ in lessons for found in _fingerprints(batch)))


def to_measure_on(training: Training, held: Held, sample: int) -> Iterator[Any]:
    """The first `MEASURED` batches of the `sample`-th epoch after the one that is held out, less what is."""
    lessons = (held.without(lesson) for lesson in _epoch(training, HELD_EPOCH + sample))
    return (lesson[0] for lesson in islice((lesson for lesson in lessons if lesson), MEASURED))


@dataclass(eq=False)
class Course:
    """Lessons without end, epoch after epoch from the place (`epoch`, `place` in it) on, for one of `processes`."""

    training: Training
    held: Held
    epoch: int = 0
    place: int = 0
    processes: int = 1
    process: int = 0
    _iterator: Iterator[Lesson] | None = field(default=None, init=False)

    def _next(self) -> Lesson:
        """The next lesson of all processes; raises TaskError where an epoch has none."""
        empty = False
        while True:
            if self._iterator is None:
                self._iterator = islice(_epoch(self.training, self.epoch), self.place, None)
            for lesson in self._iterator:
                self.place += 1
                left = self.held.without(lesson)
                if left is not None:
                    return left
            if empty:
                raise TaskError(f"training({self.epoch}) has no batch that is not held out")
            self._iterator, self.epoch, self.place, empty = None, self.epoch + 1, 0, True

    def __next__(self) -> Lesson:
        return [self._next() for _ in range(self.processes)][self.process]
