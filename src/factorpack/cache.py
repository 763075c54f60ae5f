"""The cache of an analysis: statistics and rungs in a folder, so that any further size needs neither anew.

The folder holds one subfolder a question, named by the first 16 hex digits of its key:

    statistics.json, .safetensors   what calibration said: scalars, tensors
    tensor-0.json, .safetensors     the same of one tensor, where the network is on disk (`nn.layerwise`)
    rates.json                      the λ of the analysis
    rung-00.json, .fpk              form, loss and size of every layer at one λ, and the weights that are needed again

What is damaged is made again, what is of another key stays where it is (`store`). The key covers all tensors, the
network as it is printed, the data, the options and the version of this package, not the code of the network.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from factorpack import __version__
from factorpack.assembly import Packed
from factorpack.candidates import Candidate, Rung, resolved
from factorpack.container import Contents, make_folder, read, to_bytes
from factorpack.errors import UnsupportedError
from factorpack.factors import FactoredWeight
from factorpack.nn.moments import KINDS, WeightStatistics
from factorpack.nn.state import State
from factorpack.nn.statistics import Sample, Statistics
from factorpack.options import Options, Progress
from factorpack.pipeline import Source, one_thread
from factorpack.search import pack, rates_of, rung
from factorpack.store import Note, Store
from factorpack.workers import ALONE, Workers

RUNGS_HELD = 4
"""So many rungs' weights stay in memory: choices fall on neighbours."""


def _feed(digest: Any, value: object) -> None:
    """Adds a value, whole and with its type, to a hash."""
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        # Without values there is no state either, which is told with the tensor's name.
        if not nn.parameter.is_lazy(value) and not value.is_meta:
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"array {value.dtype.str} {value.shape};".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)};".encode())
        for key, item in value.items():
            _feed(digest, key)
            _feed(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(f"sequence {len(value)};".encode())
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, str | bytes | bool | int | float | torch.dtype | slice):
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)};".encode() + text)
    else:
        raise UnsupportedError(
            f"a calibration batch holds a {type(value).__name__}, which a cache cannot tell from another: "
            f"hand over tensors, numbers and strings in tuples, lists or dicts, or leave the cache out (--cache and "
            f"--resume)"
        )


def fingerprint(value: object) -> str:
    """SHA-256, in hex, of tensors, numbers and strings in tuples, lists or dicts, their types and shapes with them.

    Raises UnsupportedError for anything else.
    """
    digest = sha256()
    _feed(digest, value)
    return digest.hexdigest()


def key_of(source: Source, options: Options) -> str:
    """SHA-256, in hex, of all that an analysis depends on, but for code; see the head of this module.

    Raises UnsupportedError for a calibration batch of which it cannot tell whether it is the same.
    """
    digest = sha256()
    network, printed = source.network, None
    if network is not None:
        # Strides and paddings are in no tensor, nor is what a hook makes of the output. Addresses, which some modules
        # print, change with every run.
        told = [repr(part) for part in (network, *network._forward_hooks.values())]
        printed = re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(told))
    for name, tensor in source.tensors.items():
        if isinstance(tensor, Tensor):
            _feed(digest, name)
            _feed(digest, tensor)
    # Where it is computed changes nothing.
    asked = {name: value for name, value in asdict(options).items() if name not in ("jobs", "cluster")}
    _feed(digest, [printed, source.batches, source.output, asked, __version__])
    return digest.hexdigest()


def opened(source: Source, options: Options, folder: Path, note: Note) -> Store:
    """The part of the cache in `folder` that is of this question, made where it is not there.

    Raises UnsupportedError for forms that no λ leads to, FactorpackError where the folder cannot be made.
    """
    if options.form == "vq" or options.solver == "projected-gradient":
        raise UnsupportedError(
            "there is no analysis of form vq and of projected gradients, which no λ leads to: "
            "ask for a --size without --cache and --resume"
        )
    key = key_of(source, options)
    part = folder / key[:16]
    make_folder(part)
    return Store(part, key, note)


def _save_statistics(store: Store, statistics: Statistics) -> None:
    tensors: dict[str, Tensor] = {f"fisher {name}": fisher for name, fisher in statistics.fisher.items()}
    weights = {}
    for name, seen in statistics.weights.items():
        weights[name], parts = seen.parts()
        tensors |= {f"{kind} {name}": tensor for kind, tensor in parts.items()}
    samples = []
    for place, ((name, batch, use), sample) in enumerate(statistics.samples.items()):
        samples.append([name, batch, use, sample.scale])
        tensors[f"chosen {place}"] = sample.chosen
    content = {
        "weights": weights,
        "fisher": list(statistics.fisher),
        "predictions": statistics.predictions,
        "samples": samples,
    }
    # Clones: safetensors takes no two tensors of one memory.
    data = save({name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                 for name, tensor in tensors.items()})  # fmt: skip
    store.save("statistics", content, {".safetensors": data})


def _load_statistics(store: Store) -> Statistics | None:
    content = store.load("statistics")
    if content is None:
        return None
    tensors = load_file(store.path("statistics", ".safetensors"))
    weights = {
        name: WeightStatistics.of(
            numbers, {kind: tensors[f"{kind} {name}"] for kind in KINDS if f"{kind} {name}" in tensors}
        )
        for name, numbers in content["weights"].items()
    }
    samples = {
        (name, batch, use): Sample(tensors[f"chosen {place}"], scale)
        for place, (name, batch, use, scale) in enumerate(content["samples"])
    }
    fisher = {name: tensors[f"fisher {name}"] for name in content["fisher"]}
    return Statistics(weights, fisher, content["predictions"], samples)


def cached_state(store: Store, source: Source, options: Options, progress: Progress, workers: Workers = ALONE) -> State:
    """The state of `source`; its statistics come from the cache, and go there."""

    def keep(take: Callable[[], Statistics]) -> Statistics:
        found = _load_statistics(store)
        if found is None:
            found = take()
            _save_statistics(store, found)
        return found

    with one_thread():
        return source.state(options, progress, keep, workers, store)


@dataclass(frozen=True, eq=False)
class Analysis:
    """A state and the rungs that were found for it: files of any size without a search over λ."""

    store: Store
    state: State
    options: Options
    rungs: tuple[Rung, ...]
    workers: Workers = ALONE

    def pack(self, size_bytes: int, progress: Progress) -> Packed:
        """The file of at most `size_bytes`. Raises BudgetError where that cannot be met."""
        with one_thread():
            return pack(self.state, size_bytes, self.options, progress, self.rungs, self.workers)

    @property
    def reach(self) -> tuple[int, int]:
        """The smallest and the largest size, in bytes, that lie between rungs."""
        sizes = [step.size_bytes for step in self.rungs]
        # A little within: a search aims a bit below the size that it is given.
        return int(1.01 * min(sizes)), int(0.995 * max(sizes))


def _save_rung(store: Store, name: str, found: Rung, needed: Sequence[str]) -> None:
    layers = {layer: [c.form, c.loss, c.size_bytes, c.rate] for layer, c in found.layers.items()}
    content = {"rate": found.rate, "size_bytes": found.size_bytes, "layers": layers}
    weights = {layer: found.layers[layer].make() for layer in needed}
    data = to_bytes(Contents(weights, dict.fromkeys(weights, "float32"), {})) if weights else None
    store.save(name, content, {} if data is None else {".fpk": data})


def analyse(
    source: Source, options: Options, folder: Path, progress: Progress, note: Note, workers: Workers = ALONE
) -> Analysis:
    """The analysis of `source`, from the cache in `folder` as far as it is there; what is made anew is put there.

    Candidates come from the cache even where they were just made, so that a first run gives the bytes of a second.
    """
    store = opened(source, options, folder, note)
    state = cached_state(store, source, options, progress, workers)
    if not state.layers:
        raise UnsupportedError(
            "there are no weights to analyse, every tensor is small or kept exactly: ask for a --size without --cache "
            "and --resume"
        )
    met = frozenset[str]() if state.prefix is None else state.prefix.names
    # Weights behind the prefix are solved anew for every file, stored ones when they are needed: the outline is enough.
    needed = [] if state.stored else [name for name in state.layers if name not in met]

    @lru_cache(maxsize=RUNGS_HELD)
    def weights_of(name: str) -> Mapping[str, Any]:
        return read(store.path(name, ".fpk"))[0].tensors

    def held(name: str, layer: str) -> FactoredWeight:
        weight = weights_of(name)[layer]
        assert isinstance(weight, FactoredWeight)
        return weight

    def candidate(name: str, layer: str, form: str, loss: float, size_bytes: float, rate: float) -> Candidate:
        again = partial(resolved, state.layers, layer, form, rate, options.rank, workers.map)
        return Candidate(form, loss, size_bytes, rate, partial(held, name, layer) if layer in needed else again)

    with one_thread():
        rates = store.load("rates")
        if rates is None:
            rates = rates_of(state)
            store.save("rates", rates)
        rungs = []
        for place, rate in enumerate(rates):
            progress("analysis", place, len(rates))
            name = f"rung-{place:02}"
            content = store.load(name)
            if content is None:
                _save_rung(store, name, rung(state, rate, options, progress, workers), needed)
                content = store.load(name)
            layers = {layer: candidate(name, layer, *content["layers"][layer]) for layer in state.layers}
            rungs.append(Rung(content["rate"], content["size_bytes"], layers))
        progress("analysis", len(rates), len(rates))
    return Analysis(store, state, options, tuple(rungs), workers)
