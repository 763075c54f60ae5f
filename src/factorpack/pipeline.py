"""Composition: a model or a task to a file, and a file back to a model that is scored."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from factorpack.container import Bill, read, write
from factorpack.errors import UnsupportedError
from factorpack.nn.folding import fold_batch_norms
from factorpack.nn.loading import place_dense, place_on_the_fly, state_dict
from factorpack.nn.prefix import Prefix, copy_of
from factorpack.nn.state import State, read_state
from factorpack.nn.statistics import collect
from factorpack.plan import ModelPlan
from factorpack.search import Options, Packed, Progress, pack
from factorpack.task import Evaluate, Scores, as_scores, checked_output

MODES = ("dense", "on-the-fly")


def _silent(_stage: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Report:
    """What a compression gave: the bill of the file, the plan with each layer's loss, and scores of the file.

    `scores` are those of the model loaded back from the file, empty without `evaluate`; `seconds` leaves the
    evaluation out. `unseen` names weights that no observed call used in calibration.
    """

    size_bytes: int
    ratio: float
    bill: Bill
    plan: ModelPlan
    unseen: tuple[str, ...]
    seconds: float
    evaluation_seconds: float
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def distortion(self) -> float:
        """The predicted loss: half the distortion of all layers in their metrics, added up."""
        return sum(layer.loss for layer in self.plan.layers.values())


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A compressed model: `data`, the bytes of its file, and the `report` on them."""

    data: bytes
    report: Report

    def save(self, path: str | Path) -> None:
        """Writes the file, complete or not at all."""
        write(Path(path), self.data)


def dense_bytes(state: State) -> int:
    """Bytes of the tensors in their own dtypes, each tied one once."""
    sizes = {name: layer.tensor.size for name, layer in state.layers.items()}
    sizes |= {name: small.values.size for name, small in state.small.items()}
    sizes |= {name: array.size for name, array in state.exact.items()}
    return sum(size * getattr(torch, state.dtypes[name]).itemsize for name, size in sizes.items())


def model_state(
    model: nn.Module,
    calibration: Iterable[object] | None,
    output: str,
    options: Options,
    progress: Progress = _silent,
) -> State:
    """What of `model` is to be stored, and what calibration says of it; without calibration, by relative error.

    Works on a copy of the model, in eval mode, with its batch norms folded unless the options keep them.
    """
    model = copy_of(model).eval()
    if not options.keep_batch_norms:
        fold_batch_norms(model, lambda name: any(fnmatchcase(name, pattern) for pattern in options.exclude))
    statistics, batches = None, []
    if calibration is not None:
        batches = list(calibration)
        done = iter(range(1, len(batches) + 1))
        progress("calibration", 0, len(batches))
        statistics = collect(
            model, batches, output, options.seed, lambda: progress("calibration", next(done), len(batches))
        )
    state = read_state(model.state_dict(keep_vars=True), model, statistics, options.exclude)
    return state if statistics is None else replace(state, prefix=Prefix(model, batches, statistics))


def pack_state(
    size_bytes: Callable[[State], int],
    make_state: Callable[[], State],
    options: Options,
    progress: Progress = _silent,
) -> tuple[Packed, State]:
    """Makes a state and packs it, on one thread.

    One thread, so that the order of float sums, and with it the bytes, depends on no setting of the machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        state = make_state()
        return pack(state, size_bytes(state), options, progress), state
    finally:
        torch.set_num_threads(threads)


def finish(
    packed: Packed, state: State, seconds: float, score: Callable[[Path], Scores] | None, path: Path | None = None
) -> PackedModel:
    """Writes the file to `path` (a temporary one without), and reports on it as it is read back from there."""
    with tempfile.TemporaryDirectory() as folder:
        target = path or Path(folder) / "model.fpk"
        write(target, packed.data)
        _, bill = read(target)
        start = time.perf_counter()
        scores = score(target) if score else {}
        evaluation = time.perf_counter() - start
    size = len(packed.data)
    ratio = dense_bytes(state) / size
    return PackedModel(
        packed.data,
        Report(size, ratio, bill, packed.plan, state.unseen, seconds, evaluation if scores else 0.0, scores),
    )


def compress(
    model: nn.Module,
    size: int,
    calibration: Iterable[object] | None = None,
    evaluate: Evaluate | None = None,
    output: str = "logits",
    options: Options | None = None,
) -> PackedModel:
    """The model as a file of at most `size` bytes, everything included; the model itself is left as it was.

    `calibration` are unlabelled batches: a tensor, a tuple (positional) or a dict (keyword arguments) each.
    Without them every tensor is stored with the same relative error. `evaluate(model)` gives a score, higher is
    better, or a dict of them; it is asked about the model loaded back from the file. `output` says what the model
    returns, "logits" or "embedding". Raises BudgetError, naming the smallest size, where `size` cannot be met.

    >>> packed = factorpack.compress(model, size=5_500_000, calibration=batches)
    >>> packed.save("model.fpk")
    """
    chosen = options or Options()
    checked_output(output, "compress")
    start = time.perf_counter()
    packed, state = pack_state(lambda _: size, lambda: model_state(model, calibration, output, chosen), chosen)
    seconds = time.perf_counter() - start

    def score(path: Path) -> Scores:
        assert evaluate is not None
        return as_scores(evaluate(load(path, copy.deepcopy(model))), "compress")

    return finish(packed, state, seconds, score if evaluate else None)


def load(path: str | Path, model: nn.Module, mode: str = "dense") -> nn.Module:
    """Puts the weights of a file into `model`, of the same architecture, and returns it.

    `mode` "dense" recombines every weight once; "on-the-fly" keeps the packed factors in memory and recombines a
    weight whenever it is used. Raises FormatError for a damaged file, MismatchError for a file of another model.
    """
    if mode not in MODES:
        raise UnsupportedError(f"{mode!r} is no mode: choose {' or '.join(MODES)}")
    contents, _ = read(Path(path))
    place = place_dense if mode == "dense" else place_on_the_fly
    return place(model, contents.tensors, contents.dtypes, contents.aliases)


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file by name, dense, in their original dtypes; tied names hold the same tensor."""
    contents, _ = read(Path(path))
    return state_dict(contents.tensors, contents.dtypes, contents.aliases)
