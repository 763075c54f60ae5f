"""Composition: a model or a task to a file, and a file back to a model that is scored."""

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from factorpack.assembly import Packed
from factorpack.container import Bill, File, read, write
from factorpack.errors import UnsupportedError
from factorpack.evaluate.limit import gaussian_bits_of
from factorpack.nn.folding import fold_batch_norms
from factorpack.nn.layerwise import Observation, calibrate
from factorpack.nn.loading import place_dense, place_on_the_fly, state_dict
from factorpack.nn.on_disk import NetworkOnDisk
from factorpack.nn.prefix import Prefix, copy_of
from factorpack.nn.state import State, check_on_disk, check_values, own_bytes, read_on_disk, read_state, read_stored
from factorpack.nn.statistics import Statistics, collect
from factorpack.nn.stored import Shaped, StoredTensors
from factorpack.options import Options, Progress
from factorpack.plan import ModelPlan
from factorpack.search import pack
from factorpack.solve.layer import Layer
from factorpack.store import Store
from factorpack.task import Evaluate, Scores, Task, as_scores, checked_output
from factorpack.workers import ALONE, Workers, working

MODES = ("dense", "on-the-fly")
WEIGHTS_SHOWN = 8
"""In the table of a report."""


def silent(_stage: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Report:
    """What a compression gave: the bill of the file, the plan with each layer's loss, and scores of the file.

    `scores` are those of the model loaded back from the file, empty without `evaluate`; `seconds` leaves the
    evaluation out. `unseen` names weights that no observed call used in calibration.

    `bits_per_weight` are the bytes of the weights' records; `gaussian_bits_per_weight` is what Gaussian weights would
    take at the sum of the plan's losses (`evaluate.limit`, docs/method.md). The reference has the statistics of the
    original network, while losses behind a compressed prefix are in the metric of the inputs there: the two differ
    by what the prefix changes. Both are None without calibration, the second too where no finite bits give the loss.
    """

    size_bytes: int
    ratio: float
    bill: Bill
    plan: ModelPlan
    unseen: tuple[str, ...]
    seconds: float
    evaluation_seconds: float
    scores: Mapping[str, float] = field(default_factory=dict)
    bits_per_weight: float | None = None
    gaussian_bits_per_weight: float | None = None

    @property
    def distortion(self) -> float:
        """The predicted loss: half the distortion of all layers in their metrics, added up."""
        return sum(layer.loss for layer in self.plan.layers.values())

    def _repr_html_(self) -> str:
        """A table for notebooks: the size, the scores and the largest weights."""
        size = f"{self.size_bytes:,} bytes, {self.ratio:.1f} times smaller"
        rows = [("file", size), *((name, f"{value:.4g}") for name, value in self.scores.items())]
        largest = sorted(self.bill.weights, key=lambda weight: -weight.size_bytes)[:WEIGHTS_SHOWN]
        for weight in largest:
            shape = " × ".join(map(str, weight.shape))
            bits = 8 * weight.size_bytes / math.prod(weight.shape)
            told = f"{weight.size_bytes:,} bytes, {shape}, {weight.form}, {bits:.2f} bits a weight"
            rows.append((weight.name, told))
        if len(largest) < len(self.bill.weights):
            rest = sum(weight.size_bytes for weight in self.bill.weights) - sum(weight.size_bytes for weight in largest)
            rows.append((f"{len(self.bill.weights) - len(largest)} smaller weights", f"{rest:,} bytes"))
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(told)}</td></tr>" for name, told in rows)
        return f"<table>{cells}</table>"


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
    others = {name: small.values.shape for name, small in state.small.items()}
    others |= {name: array.shape for name, array in state.exact.items()}
    return own_bytes({**state.shapes, **others}, state.dtypes)


Keep = Callable[[Callable[[], Statistics]], Statistics]
"""Given what takes the statistics: takes them, or has them already."""


@dataclass(frozen=True, eq=False)
class Source:
    """What is compressed: a network with its calibration `batches` (None: by relative error), or tensors alone.

    Of a network that is on disk, calibrated block by block, there are batches.

    `output` says what the network returns, "logits" or "embedding".
    """

    model: nn.Module | StoredTensors | NetworkOnDisk
    batches: Sequence[object] | None = None
    output: str = "logits"

    @classmethod
    def of(cls, task: Task) -> "Source":
        """What a task hands over; without calibration() by relative error."""
        return cls(task.model(), task.calibration() if task.has("calibration") else None, task.output)

    @property
    def network(self) -> nn.Module | None:
        """The network, without its values where these are on disk; None where there are tensors alone."""
        if isinstance(self.model, NetworkOnDisk):
            return self.model.model
        return self.model if isinstance(self.model, nn.Module) else None

    @property
    def tensors(self) -> Mapping[str, Any]:
        """What there is by name."""
        if isinstance(self.model, NetworkOnDisk):
            return self.model.tensors
        return self.model.state_dict() if isinstance(self.model, nn.Module) else self.model

    def state(
        self, options: Options, progress: Progress = silent, keep: Keep = lambda take: take(),
        workers: Workers = ALONE, store: Store | None = None,
    ) -> State:  # fmt: skip
        """What is to be stored, and what calibration says of it.

        The latter, of a network on disk, is put in `store`, or where there is none in a temporary folder. Otherwise
        works on a copy of the network, in eval mode, with its batch norms folded unless the options keep them.
        """
        if isinstance(self.model, NetworkOnDisk):
            # First of all: calibration may take hours.
            check_on_disk(self.model, options.exclude)
            observation = Observation(self.model, [] if self.batches is None else self.batches, self.output)
            found = calibrate(observation, options.seed, store or Store.temporary(), progress, workers.threads)
            return read_on_disk(self.model, found, options.exclude)
        if not isinstance(self.model, nn.Module):
            return read_stored(self.model, options.exclude)
        # Before the network is run: without values it fails in ways of its own.
        check_values(self.model.state_dict(keep_vars=True))
        model = copy_of(self.model).eval()
        if not options.keep_batch_norms:
            fold_batch_norms(model, lambda name: any(fnmatchcase(name, pattern) for pattern in options.exclude))
        if self.batches is None:
            return read_state(model.state_dict(keep_vars=True), model, None, options.exclude)
        statistics = keep(lambda: self._observed(model, options.seed, progress, workers))
        state = read_state(model.state_dict(keep_vars=True), model, statistics, options.exclude)
        with ThreadPoolExecutor(workers.threads) as pool:
            for _ in pool.map(Layer.prepare, state.layers.values()):
                pass
        return replace(state, prefix=Prefix(model, self.batches, statistics, workers.threads))

    def _observed(self, model: nn.Module, seed: int, progress: Progress, workers: Workers) -> Statistics:
        assert self.batches is not None
        total = len(self.batches)
        done = iter(range(1, total + 1))
        progress("calibration", 0, total)

        def told() -> None:
            progress("calibration", next(done), total)

        return collect(model, self.batches, self.output, seed, told, workers.threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, so that the order of float sums, and with it the bytes, depends on no setting of the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _bits_per_weight(state: State, bill: Bill, plan: ModelPlan) -> tuple[float | None, float | None]:
    """Bits a weight, of the file and of the Gaussian reference; see `Report`."""
    entries = sum(math.prod(shape) for shape in state.shapes.values())
    # Without calibration losses are relative errors, which no reference is known for.
    if state.prefix is None or not entries:
        return None, None
    reference = gaussian_bits_of(state.layers, {name: layer.loss for name, layer in plan.layers.items()})
    stored = 8 * sum(weight.size_bytes for weight in bill.weights)
    return stored / entries, reference / entries if math.isfinite(reference) else None


def finish(
    packed: Packed, state: State, seconds: float, score: Callable[[Path], Scores] | None, path: Path | None = None
) -> PackedModel:
    """Writes the file to `path` (a temporary one without), and reports on it as it is read back from there."""
    with nullcontext("") if path else tempfile.TemporaryDirectory() as folder:
        target = path or Path(folder) / "model.fpk"
        write(target, packed.data)
        bill = File(target).bill()
        start = time.perf_counter()
        scores = score(target) if score else {}
        evaluation = time.perf_counter() - start
    size = len(packed.data)
    ratio = dense_bytes(state) / size
    if not scores:
        evaluation = 0.0
    bits = _bits_per_weight(state, bill, packed.plan)
    return PackedModel(
        packed.data, Report(size, ratio, bill, packed.plan, state.unseen, seconds, evaluation, scores, *bits)
    )


def _watched(shown: bool) -> AbstractContextManager[Progress]:
    if not shown:
        return nullcontext(silent)
    from rich.console import Console

    from factorpack.bars import bars

    return bars(Console(stderr=True))


def compress(
    model: nn.Module,
    size: int,
    calibration: Iterable[object] | None = None,
    evaluate: Evaluate | None = None,
    output: str = "logits",
    options: Options | None = None,
    *,
    progress: bool = False,
) -> PackedModel:
    """The model as a file of at most `size` bytes, everything included; the model itself is left as it was.

    `calibration` are unlabelled batches: a tensor, a tuple (positional) or a dict (keyword arguments) each.
    Without them every tensor is stored with the same relative error. `evaluate(model)` gives a score, higher is
    better, or a dict of them; it is asked about the model loaded back from the file. `output` says what the model
    returns, "logits" or "embedding". `progress` shows bars, in terminals and notebooks (these need ipywidgets). Raises
    BudgetError, naming the smallest size, where `size` cannot be met.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        >>> batches = [torch.randn(50, 20) for _ in range(4)]
        >>> packed = factorpack.compress(model, size=1500, calibration=batches)
        >>> packed.save("small.fpk")
        >>> packed.report.size_bytes <= 1500
        True
    """
    chosen = options or Options()
    checked_output(output, "compress")
    start = time.perf_counter()
    batches = None if calibration is None else list(calibration)
    with one_thread(), working(chosen.jobs, chosen.cluster) as workers, _watched(progress) as told:
        state = Source(model, batches, output).state(chosen, told, workers=workers)
        packed = pack(state, size, chosen, told, workers=workers)
    seconds = time.perf_counter() - start

    def score(path: Path) -> Scores:
        assert evaluate is not None
        return as_scores(evaluate(load(path, copy.deepcopy(model))), "compress")

    return finish(packed, state, seconds, score if evaluate else None)


def load(path: str | Path, model: nn.Module, mode: str = "dense", most_bytes: int | None = None) -> nn.Module:
    """Puts the weights of a file into `model`, of the same architecture, and returns it.

    `mode` "dense" recombines every weight once; "on-the-fly" keeps the packed factors in memory and recombines a
    weight whenever it is used. `most_bytes` bounds the memory that a file may ask for when it is read; None stands for
    1,024 times its size, or 64 MiB where that is more. Raises FormatError for a damaged file or one that asks for more,
    MismatchError for a file of another model.

    Examples:
        >>> model = factorpack.load("model.fpk", build_model())
        >>> model = factorpack.load("model.fpk", build_model(), mode="on-the-fly")
    """
    if mode not in MODES:
        raise UnsupportedError(f"{mode!r} is no mode: choose {' or '.join(MODES)}")
    contents, _ = read(Path(path), most_bytes, threads=torch.get_num_threads())
    place = place_dense if mode == "dense" else place_on_the_fly
    return place(model, contents.tensors, contents.dtypes, contents.aliases)


def load_state_dict(path: str | Path, most_bytes: int | None = None) -> dict[str, Tensor]:
    """All tensors of a file by name, dense, in their original dtypes; tied names hold the same tensor.

    `most_bytes` and errors as for `load`.

    Examples:
        >>> tensors = factorpack.load_state_dict("model.fpk")
        >>> build_model().load_state_dict(tensors)
        <All keys matched successfully>
    """
    contents, _ = read(Path(path), most_bytes, threads=torch.get_num_threads())
    return state_dict(contents.tensors, contents.dtypes, contents.aliases)


class PackedTensors(Shaped[Tensor]):
    """The tensors of an open file by name, each decoded, dense and in its original dtype, when it is asked for.

    The file is mapped, not read: a weight takes its own record alone. Whoever shortens the file in place meanwhile ends
    this process; one that is replaced, as every write of this package does it, stays what it was.
    `shapes` and `dtypes` tell of all names without decoding.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        self.shapes = file.shapes
        self.dtypes: Mapping[str, str] = file.dtypes

    def __getitem__(self, name: str) -> Tensor:
        return state_dict({name: self._file.tensor(name)}, {name: self.dtypes[name]}, {})[name]


def open_file(path: str | Path, most_bytes: int | None = None) -> PackedTensors:
    """Opens a file to read single tensors of it, without reading the rest; `most_bytes` and errors as for `load`.

    Examples:
        >>> tensors = factorpack.open_file("model.fpk")
        >>> tensors["head.weight"].shape
        torch.Size([10, 128])
    """
    return PackedTensors(File(Path(path), most_bytes))
