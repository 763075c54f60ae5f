"""What runs in a peer's process: a network to a file, or a file to a network that is scored.

    python -m factorpack.bench.peers.NAME encode TASK FILE SETTING WORK
    python -m factorpack.bench.peers.NAME score TASK FILE
    python -m factorpack.bench.protocol original TASK

The last line of stdout is a JSON object. What else a peer prints goes to stderr.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from factorpack.task import Task, load_task


@dataclass(frozen=True, eq=False)
class Subject:
    """What is to be written: the network and its calibration batches; `work` is a folder kept between settings."""

    model: nn.Module
    batches: list[Any]
    output: str
    work: Path

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Tensors of two and more dimensions by name, each tied one once."""
        return {name: tensor for name, tensor in self.tensors.items() if tensor.dim() >= 2}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the state by name, each tied one once."""
        found: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            found.setdefault(id(tensor), (name, tensor.detach()))
        return dict(found.values())


@dataclass(frozen=True)
class Encoded:
    """What a peer says of its file: names of the weights that it `quantised`.

    `seconds` and `peak_bytes` are those of work that earlier settings did for this one.
    """

    quantised: Iterable[str]
    seconds: float = 0.0
    peak_bytes: int = 0


Encode = Callable[[Subject, str, Path], Encoded]
"""Writes a network to a file, with a setting."""
Decode = Callable[[nn.Module, Path], nn.Module]
"""The network of a file; the model that it is given is the architecture, all its values being NaN."""


def peak_bytes() -> int:
    """The most memory that this process has had, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def blank(model: nn.Module) -> nn.Module:
    """`model` without its values: what a file does not hold cannot score."""
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.zero_()
    return model


def place(model: nn.Module, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """Puts decoded tensors into `model`, tied ones under whichever name they have; KeyError where one is missing."""
    held: dict[int, str] = {}
    with torch.no_grad():
        for name, target in model.state_dict(keep_vars=True).items():
            known = held.get(id(target))
            if name in tensors:
                target.copy_(tensors[name].reshape(target.shape))
                held[id(target)] = name
            elif known is None:
                raise KeyError(name)
    return model


def encode_once(task: Task, encode: Encode, path: Path, setting: str, work: Path) -> dict[str, Any]:
    """Writes the file and says what that took."""
    batches = task.calibration() if task.has("calibration") else []
    subject = Subject(task.model(), batches, task.output, work)
    weights = {name: tensor.numel() for name, tensor in subject.weights.items()}
    start = time.perf_counter()
    found = encode(subject, setting, path)
    seconds = time.perf_counter() - start
    quantised = set(found.quantised)
    dense = [name for name in weights if name not in quantised]
    return {
        "bytes": path.stat().st_size,
        "encode_seconds": seconds + found.seconds,
        "encode_peak_bytes": max(peak_bytes(), found.peak_bytes),
        "left_dense": dense,
        "quantised_share": 1 - sum(weights[name] for name in dense) / max(1, sum(weights.values())),
    }


def score_once(task: Task, decode: Decode, path: Path) -> dict[str, Any]:
    """Scores the network of the file and says what decoding took, before it is first run."""
    model = blank(task.model())
    start = time.perf_counter()
    model = decode(model, path)
    seconds = time.perf_counter() - start
    return {"decode_seconds": seconds, "decode_peak_bytes": peak_bytes(), "scores": task.evaluate(model)}


def original(task: Task) -> dict[str, Any]:
    """Scores and bytes of the network as it is; tied tensors count once."""
    model = task.model()
    tensors = Subject(model, [], task.output, Path()).tensors
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"bytes": size, "scores": task.evaluate(model)}


def serve(encode: Encode, decode: Decode) -> None:
    """A peer's script: does what its arguments say and answers in one line."""
    with _answering() as answer:
        what, spec, file, *rest = sys.argv[1:]
        task = load_task(spec)
        if what == "encode":
            answer(encode_once(task, encode, Path(file), rest[0], Path(rest[1])))
        else:
            answer(score_once(task, decode, Path(file)))


@contextmanager
def _answering() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Keeps stdout for the answer; all else, of libraries in C too, goes to stderr meanwhile."""
    answers: list[dict[str, Any]] = []
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield answers.append
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
    sys.stdout.write("".join(json.dumps(found) + "\n" for found in answers))
    sys.stdout.flush()


if __name__ == "__main__":
    with _answering() as tell:
        tell(original(load_task(sys.argv[2])))
