"""Calibration of networks that are larger than memory should be: block by block, all others on disk.

A network is its blocks and what is around them. Every batch is a run of its own; the runs pause in lockstep at each
block, forwards and then backwards, and for as long as they are there the block's weights are in memory:

    forwards    each run goes through the block without gradients; what came to it is put on disk
    backwards   each run goes through it again, now with gradients, from what came to it and the gradient behind it,
                and what that shows of the block's weights is put in the store

Autograd leads from block to block and through what is around them, so that the statistics are those of
`nn.statistics`: of a weight that is used both in blocks and around them, or as table and as head, the squared
gradients of both uses are added, where there the gradients are. (Gradients from recomputed blocks: Chen et al. 2016.)
"""

import threading
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from factorpack._shapes import Float
from factorpack.errors import TaskError
from factorpack.nn.lockstep import Pause, Run, in_order, running
from factorpack.nn.moments import Sums, WeightStatistics, add_sums
from factorpack.nn.on_disk import NetworkOnDisk
from factorpack.nn.statistics import (
    Observer,
    alike,
    call_model,
    check_gradient,
    check_output,
    of_batch,
    probe,
    tensors_of,
)
from factorpack.nn.stored import pays_record, trim
from factorpack.solve.sequential import row_parts
from factorpack.tiling import Tiling

FORWARDS, BACKWARDS = "forwards", "backwards"
CALIBRATED, BEFORE = "calibrated", "before-"
"""What the store calls that which is known of all tensors, and the gradients of what came to a block."""


@runtime_checkable
class Keeper(Protocol):
    """Keeps what was computed: JSON under a name, with files of bytes beside it, in `folder`."""

    @property
    def folder(self) -> Path: ...

    def path(self, name: str, suffix: str) -> Path: ...

    def load(self, name: str) -> Any:
        """None for what is not there, or not as it was written."""

    def save(self, name: str, content: object, beside: Mapping[str, bytes] | None = None) -> None: ...


@dataclass(frozen=True, eq=False)
class Observation:
    """A network, the batches that it is observed on, and what it gives out: "logits" or "embedding"."""

    network: NetworkOnDisk
    batches: Sequence[object]
    output: str


class Known(NamedTuple):
    """What there is of a tensor: whether a call `met` it as a weight, and whether a gradient `reached` it."""

    met: bool
    reached: bool


@dataclass(frozen=True, eq=False)
class Seen:
    """What calibration says of a tensor: `statistics` of a weight, and the mean squared gradient a prediction.

    Of the latter `energies` are sums over the inputs, (m,); of a small tensor all entries, in its shape.
    """

    statistics: WeightStatistics | None
    energies: Tensor | None


def energies(squares: Tensor, tiling: Tiling) -> Float[Tensor, " m"]:
    """The squared gradients of a weight, in its shape, summed over its inputs."""
    return torch.from_numpy(tiling.matrix(squares.numpy())).sum(1)


def _energies_of(gradient: Tensor, tiling: Tiling) -> Float[Tensor, " m"]:
    """The same from a gradient, some rows at a time: of a head, the squares take as much as all that is held."""
    matrix = torch.from_numpy(tiling.matrix(gradient.numpy()))
    return torch.cat([matrix[rows].square().sum(1) for rows in row_parts(matrix)])


@dataclass(eq=False)
class _Record:
    """What batches showed of tensors, by the names they are stored by: sums over inputs, and squared gradients."""

    sums: dict[str, Sums] = field(default_factory=dict)
    energies: dict[str, Tensor] = field(default_factory=dict)

    def take_gradient(self, name: str, parameter: Tensor, sums: Mapping[str, Sums]) -> None:
        """Adds the squared gradient of a parameter, and clears it; `sums` say how its inputs reach it."""
        assert parameter.grad is not None
        gradient = parameter.grad
        parameter.grad = None
        if pays_record(gradient.shape):
            seen = sums.get(name)
            shape = tuple(gradient.shape)
            tiling = Tiling(shape) if seen is None else Tiling(shape, seen.groups, seen.transposed)
            squares = _energies_of(gradient, tiling)
        else:
            # Not in place: others upstream may share the memory of a gradient.
            squares = gradient.square()
        self.energies[name] = self.energies[name] + squares if name in self.energies else squares

    def part(self, name: str) -> "_Record":
        """What it has of one tensor."""
        sums = {name: self.sums[name]} if name in self.sums else {}
        return _Record(sums, {name: self.energies[name]} if name in self.energies else {})

    def take(self, other: "_Record") -> None:
        add_sums(self.sums, other.sums)
        for name, part in other.energies.items():
            self.energies[name] = self.energies[name] + part if name in self.energies else part


@dataclass(frozen=True, eq=False)
class _Call:
    """The arguments of a block in one run: `leaves` of their tree, without those at `places`, which take gradients."""

    leaves: list[Any]
    spec: Any
    places: tuple[int, ...]

    def of(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


def _floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class _Through(torch.autograd.Function):
    """A block in one run, as that pauses for it forwards and backwards; floating tensors of its output."""

    @staticmethod
    def forward(
        ctx: Any, pause: Pause, block: str, call: _Call, told: list[Any], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.pause, ctx.block = pause, block
        # The first is there for a block before which nothing has gradients.
        leaves, spec = pause((FORWARDS, block, (call, inputs[1:])))
        told += [leaves, spec]
        return tuple(leaf for leaf in leaves if _floating(leaf))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, None, *ctx.pause((BACKWARDS, ctx.block, gradients))


class _Needed(TorchFunctionMode):
    """Puts in `parameters` those used other than by a look-up, whose gradient needs nothing of the table."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.parameters = parameters

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.embedding:
            leaves = pytree.tree_leaves((args, kwargs))
            self.parameters.update(id(leaf) for leaf in leaves if isinstance(leaf, nn.Parameter))
        return func(*args, **kwargs)


def _let_go(parameter: Tensor) -> None:
    """Frees what a parameter holds, which nobody asks for any more; shape and gradient stay."""
    parameter.data = parameter.data.new_zeros(1).expand(parameter.shape)


@dataclass(eq=False)
class _Calibration:
    """One pass of a network over its batches; what is found goes to `store`, what is needed on the way to `folder`."""

    observation: Observation
    seed: int
    store: Keeper
    folder: Path
    progress: Callable[[], None]
    threads: int
    predictions: int = 0
    outside: _Record = field(default_factory=_Record)
    """Of what is around the blocks, and of tensors that are used in several places."""
    kept: "dict[str, Known]" = field(default_factory=dict)
    """Of what is in the store."""
    taken: Counter[int] = field(default_factory=Counter)
    """In how many runs the gradient of a tensor around the blocks was taken, by its identity."""
    needed: set[int] = field(default_factory=set)
    """Of these, by their identity: all that are more than tables."""
    calls: dict[tuple[str, int], _Call] = field(default_factory=dict)
    here: threading.local = field(default_factory=threading.local)
    """Of the thread: how its run pauses."""

    def __post_init__(self) -> None:
        self.network, self.batches = self.observation.network, self.observation.batches
        self.generator = torch.Generator().manual_seed(self.seed)
        inside = [set(self.network.parameters_of(block).values()) for block in self.network.blocks]
        uses = Counter(name for names in (*inside, set(self.network.around.values())) for name in names)
        self.shared = frozenset(name for name, count in uses.items() if count > 1)
        """Tensors of several blocks, or of a block and what is around them."""

    def run(self) -> None:
        names = self.network.around
        with self.network.stubbed(self._called), self.network.placed(self.network.model, names) as parameters:
            for name, parameter in parameters.items():
                parameter.requires_grad_(True)
                parameter.register_post_accumulate_grad_hook(partial(self._taken, names[name]))
            self.tensors = tensors_of(self.network.model)
            known = {id(parameter): names[name] for name, parameter in parameters.items()}
            observers = [Observer(known, at, self.generator) for at in range(len(self.batches))]
            works = [partial(self._work, at, observer) for at, observer in enumerate(observers)]
            with ThreadPoolExecutor(self.threads) as pool, running(works) as runs:
                # One after the other, also because the network around the blocks is one for all.
                for run in runs:
                    run.advance()
                tables = list(parameters.values())
                while any(run.waiting for run in runs):
                    self._drain(observers)
                    if all(run.waiting and run.waiting[0] == BACKWARDS for run in runs):
                        # Tables that words were looked up in are of no more use, and may be the largest of all.
                        for parameter in tables:
                            if id(parameter) not in self.needed:
                                _let_go(parameter)
                        tables.clear()
                    self._at_block(pool, runs)
            self._drain(observers)
        self._keep(self.outside)

    def _drain(self, observers: Sequence[Observer]) -> None:
        for observer in observers:
            add_sums(self.outside.sums, observer.sums)
            observer.sums = {}

    def _called(self, block: str, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = tuple(place for place, leaf in enumerate(leaves) if _floating(leaf) and leaf.requires_grad)
        inputs = [leaves[place] for place in places]
        for place in places:
            leaves[place] = None
        told: list[Any] = []
        anchor = torch.zeros(1, requires_grad=True)
        call = _Call(leaves, spec, places)
        floats = iter(_Through.apply(self.here.pause, block, call, told, anchor, *inputs))  # type: ignore[no-untyped-call]
        given, tree = told
        return pytree.tree_unflatten([next(floats) if _floating(leaf) else leaf for leaf in given], tree)

    def _take(
        self, record: _Record, name: str, parameter: Tensor, sums: Mapping[str, Sums],
        tensors: Mapping[str, Tensor], at: int,
    ) -> None:  # fmt: skip
        """Puts in `record` the gradient of a parameter in batch `at`; raises TaskError where it is not finite."""
        # Autograd tells of a gradient of nothing but zeros without making one.
        if parameter.grad is not None:
            record.take_gradient(name, parameter, sums)
            check_gradient(name, record.energies[name], tensors, self.batches[at])

    def _taken(self, name: str, parameter: Tensor) -> None:
        """Of a tensor around the blocks: its gradient in the run of this thread, which then makes room for others."""
        observer: Observer = self.here.observer
        sums = ChainMap(observer.sums, self.outside.sums)
        self._take(self.outside, name, parameter, sums, self.tensors, observer.batch)
        self.taken[id(parameter)] += 1
        if self.taken[id(parameter)] == len(self.batches):
            # A head is of no more use once all runs are back at the last block, and may be the largest of all weights.
            _let_go(parameter)

    def _work(self, at: int, observer: Observer, pause: Pause) -> None:
        """One batch through the network and back."""
        self.here.pause, self.here.observer = pause, observer
        with torch.enable_grad(), observer, _Needed(self.needed):
            out = call_model(self.network.model, self.batches[at])
        check_output(out, self.tensors, self.batches[at])
        self.predictions += out.shape[:-1].numel()
        # A sum, so that nothing as large as the output is held while blocks are gone through.
        loss = (out * probe(out, self.observation.output, self.generator)).sum()
        del out
        loss.backward()

    def _at_block(self, pool: ThreadPoolExecutor, runs: Sequence[Run]) -> None:
        """All runs through the block at which the first of them waits."""
        kind, block = next(run.waiting[:2] for run in runs if run.waiting)
        if any(run.waiting is None or run.waiting[:2] != (kind, block) for run in runs):
            raise TaskError(f"batches take different ways through the network's blocks, at {block}: write a task file")
        asked = [run.waiting[2] for run in runs]
        answers = (self._forwards if kind == FORWARDS else self._backwards)(pool, block, asked)
        trim()
        self.progress()
        for run, answer in zip(runs, answers, strict=True):
            run.advance(answer)
            trim()

    @contextmanager
    def _copies(self, block: str) -> Iterator["SimpleQueue[nn.Module]"]:
        """The block with its weights, once a thread; each with gradients of its own."""
        module = self.network.blocks[block]
        with self.network.placed(module, self.network.parameters_of(block)):
            copies: SimpleQueue[nn.Module] = SimpleQueue()
            for _ in range(self.threads):
                copies.put(alike(module))
            yield copies

    def _file(self, block: str, at: int) -> Path:
        return self.folder / f"{block}-{at}.safetensors"

    def _forwards(self, pool: ThreadPoolExecutor, block: str, asked: Sequence[Any]) -> list[Any]:
        def through(at: int) -> Any:
            call, inputs = asked[at]
            # In memory of their own: two may be one tensor, and blocks may work in place on what they are given.
            own = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in inputs]
            save_file({str(place): tensor for place, tensor in enumerate(own)}, self._file(block, at))
            self.calls[block, at] = call
            module = copies.get()
            try:
                with torch.no_grad(), of_batch(at):
                    args, kwargs = call.of(own)
                    return pytree.tree_flatten(module(*args, **kwargs))
            finally:
                copies.put(module)

        if (block, 0) in self.calls:
            raise TaskError(f"the network goes through {block} more than once a batch: write a task file")
        with self._copies(block) as copies:
            return list(pool.map(through, range(len(asked))))

    def _backwards(self, pool: ThreadPoolExecutor, block: str, asked: Sequence[Any]) -> list[tuple[Tensor, ...]]:
        """Gradients of what came to the block, by run; those of a pass that was stopped are in the store."""
        name = f"{BEFORE}{block}"
        counts = [len(self.calls[block, at].places) for at in range(len(asked))]
        if (known := _known(self.network, self.store, name)) is not None:
            self.kept |= known
            held = load_file(self.store.path(name, ".safetensors"))
            found = [tuple(held[f"{at}.{place}"] for place in range(count)) for at, count in enumerate(counts)]
        else:
            record, found = _Record(), []
            work = partial(self._back, block, self.network.parameters_of(block), asked)
            with self._copies(block) as copies:
                for part, gradients in in_order(pool, partial(work, copies), range(len(asked)), self.threads):
                    record.take(part)
                    found.append(gradients)
                    # While the next one is made there is to be one less of them.
                    del part
                    trim()
            whole = self._keep(record, self.shared)
            tensors = {f"{at}.{place}": g.contiguous() for at, part in enumerate(found) for place, g in enumerate(part)}
            if whole is not None:
                self.store.save(name, whole, {".safetensors": save(tensors)})
        for at in range(len(asked)):
            self._file(block, at).unlink()
        return found

    def _back(
        self, block: str, names: Mapping[str, str], asked: Sequence[Any], copies: "SimpleQueue[nn.Module]", at: int
    ) -> tuple[_Record, tuple[Tensor, ...]]:
        """One batch through the block again, and back: what it shows, and the gradients of what came to the block."""
        held = load_file(self._file(block, at))
        inputs = [held[str(place)].requires_grad_(True) for place in range(len(held))]
        module = copies.get()
        # Two of them may be stored as one.
        parameters = [(names[name], parameter) for name, parameter in module.named_parameters()]
        tensors = dict(parameters)
        generator = torch.Generator().manual_seed(self.seed + at)
        observer = Observer({id(parameter): name for name, parameter in parameters}, at, generator)
        record = _Record()

        def taken(name: str, parameter: Tensor) -> None:
            self._take(record, name, parameter, observer.sums, tensors, at)

        handles = [parameter.register_post_accumulate_grad_hook(partial(taken, name)) for name, parameter in parameters]
        try:
            with of_batch(at):
                with torch.enable_grad(), observer:
                    # Leaves could not be worked on in place.
                    args, kwargs = self.calls[block, at].of([tensor.clone() for tensor in inputs])
                    leaves, _ = pytree.tree_flatten(module(*args, **kwargs))
                outputs = [leaf for leaf in leaves if _floating(leaf)]
                pairs = [pair for pair in zip(outputs, asked[at], strict=True) if pair[0].requires_grad]
                torch.autograd.backward([out for out, _ in pairs], [gradient for _, gradient in pairs])
            add_sums(record.sums, observer.sums)
        finally:
            for handle in handles:
                handle.remove()
            copies.put(module)
        return record, tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs)

    def _keep(self, record: _Record, later: frozenset[str] = frozenset()) -> "dict[str, Known] | None":
        """Puts in the store what is known of tensors, each by itself, so that each can be read by itself.

        Those `later` are left for the end. What is known of the others; None where some were left.
        """
        names = sorted(record.sums.keys() | record.energies.keys())
        for name in later.intersection(names):
            self.outside.take(record.part(name))
        whole = {}
        for name in (name for name in names if name not in later):
            squares = record.energies.get(name)
            numbers, tensors = record.sums.pop(name).finish(name).parts() if name in record.sums else ([], {})
            if squares is not None:
                tensors["energies"] = squares / self.predictions
            whole[name] = Known(bool(numbers), squares is not None and bool(squares.any()))
            data = save({kind: tensor.contiguous() for kind, tensor in tensors.items()})
            self.store.save(self.network.entries[name], numbers, {".safetensors": data})
        self.kept |= whole
        return None if later.intersection(names) else whole


@dataclass(frozen=True, eq=False)
class StoredStatistics:
    """What calibration said of the tensors of `network`, each read from `store` whenever it is asked for.

    Raises TaskError where that is not there any more as it was written.
    """

    network: NetworkOnDisk
    store: Keeper
    known: Mapping[str, Known]

    def __getitem__(self, name: str) -> Seen | None:
        """None for a tensor that no gradient reached and no call used."""
        name = self.network.stored_name(name)
        if name not in self.known:
            return None
        path = self.store.path(self.network.entries[name], ".safetensors")
        if (numbers := self.store.load(path.stem)) is None:
            raise TaskError(f"{path} was damaged meanwhile: start again")
        tensors = load_file(path)
        return Seen(WeightStatistics.of(numbers, tensors) if self.known[name].met else None, tensors.get("energies"))


def _known(network: NetworkOnDisk, store: Keeper, name: str) -> dict[str, Known] | None:
    """What the store has under `name`; None where something of it is not as it was written."""
    found = store.load(name)
    if found is None or any(store.load(network.entries[of]) is None for of in found):
        return None
    return {of: Known(*parts) for of, parts in found.items()}


def calibrate(
    observation: Observation, seed: int, store: Keeper, progress: Callable[[str, int, int], None], threads: int = 1
) -> StoredStatistics:
    """Statistics of every parameter, block by block, `threads` batches at a time, kept in `store`.

    What is in the store already is not computed again, though a pass that was stopped goes through the network once
    more. Raises TaskError as `nn.statistics.collect`, and where batches take different ways through the blocks, or one
    more than once.
    """
    network = observation.network
    if not observation.batches:
        raise TaskError(
            "calibration() gave no batch, or none with a sample in it: give at least one, or leave calibration out"
        )
    known = _known(network, store, CALIBRATED)
    if known is None:
        total = 2 * len(network.blocks)
        done = iter(range(1, total + 1))
        progress("calibration", 0, total)
        with TemporaryDirectory(dir=store.folder) as folder:
            pass_ = _Calibration(
                observation, seed, store, Path(folder), lambda: progress("calibration", next(done), total), threads
            )
            pass_.run()
        known = pass_.kept
        store.save(CALIBRATED, known)
    # Only a pass that is stopped needs them, and they take as much as all batches do at all blocks.
    for block in network.blocks:
        for suffix in (".json", ".safetensors"):
            store.path(f"{BEFORE}{block}", suffix).unlink(missing_ok=True)
    return StoredStatistics(network, store, known)
