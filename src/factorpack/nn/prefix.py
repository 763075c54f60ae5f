"""The compressed prefix: weights in the order in which the network meets them, each on the inputs it will really have.

Letters: m outputs, n inputs of one group, g groups.

Original and compressed network run side by side over all batches, in lockstep: every run pauses at each weight
until all have come there, the weight is solved on what the runs brought, put in place, and all go on. One pass of
each network thus serves all layers. With x the inputs in the original network and x̂ those behind the compressed
prefix, the weight that makes up best for the prefix's errors is, by least squares,

    W* = W · E[x x̂ᵀ] · E[x̂ x̂ᵀ]⁻¹ = W + W · E[(x − x̂) x̂ᵀ] · E[x̂ x̂ᵀ]⁻¹

and errors of its rounding count by E[x̂ x̂ᵀ]. (Errors of the inputs made up
for: Li et al. 2025, GPTAQ; Zhang et al. 2025, Qronos.)
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from factorpack.errors import UnsupportedError
from factorpack.nn.loading import identity
from factorpack.nn.lockstep import Pause, Run, in_order, running
from factorpack.nn.statistics import Statistics, call_model
from factorpack.nn.uses import Convolution, Dense, Names
from factorpack.solve.layer import Met

ROWS_PER_INPUT = 64
"""So many positions an input enter a walk's moments, of all batches together."""


Solve = Callable[[str, Met], np.ndarray]
"""A weight's name and what it meets to the tensor that is put in its place."""


class _Pausing(TorchFunctionMode):
    """Calls `pause` before each use of a weight."""

    def __init__(self, names: Names, pause: Callable[[Dense | Convolution], None]) -> None:
        super().__init__()
        self.names = names
        self.pause = pause

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        use = self.names.use(func, args, kwargs)
        if use is not None:
            self.pause(use)
        out = func(*args, **kwargs)
        self.names.transposes(func, args, out)
        return out


def _works(model: nn.Module, batches: Sequence[object], names: frozenset[str]) -> Iterator[Callable[[Pause], None]]:
    """The network on each of the batches, pausing before each use of one of the weights `names`."""
    found = {id(parameter): name for name, parameter in model.named_parameters() if name in names}
    # Modules of their own for each run, over the same parameters: some keep what they saw on themselves.
    shared = {id(parameter): parameter for parameter in model.parameters()}

    def work(own: nn.Module, batch: object, pause: Pause) -> None:
        with torch.no_grad(), _Pausing(Names(dict(found)), pause):
            call_model(own, batch)

    return (partial(work, copy.deepcopy(model, dict(shared)), batch) for batch in batches)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy whose parameters share memory where those of `model` do, which copy.deepcopy alone forgets.

    Raises UnsupportedError where the model cannot be copied.
    """
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(f"the model cannot be copied (copy.deepcopy): {error}") from error
    owners: dict[object, Tensor] = {}
    tensors = copied.state_dict(keep_vars=True)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor):
            owner = owners.setdefault(identity(tensor), tensors[name])
            if owner is not tensors[name]:
                tensors[name].data = owner.data
    return copied


@dataclass(frozen=True, eq=False)
class Prefix:
    """The network `model`, in eval mode, its calibration `batches`, and the `statistics` that were taken of them.

    So many `threads` at a time run it.
    """

    model: nn.Module
    batches: Sequence[object]
    statistics: Statistics
    threads: int = 1

    @property
    def names(self) -> frozenset[str]:
        """Weights that a walk meets: products and convolutions that no batch has twice and no look-ups.

        Those of which no position reaches the output have nothing to be solved on.
        """
        uses = Counter(name for name, _, _ in self.statistics.samples)
        repeated = {name for name, _, before in self.statistics.samples if before}
        return frozenset(
            name
            for name, seen in self.statistics.weights.items()
            if seen.counts is None and seen.positions and 0 < uses[name] == seen.uses and name not in repeated
        )

    def walk(self, names: frozenset[str], placed: Mapping[str, np.ndarray], solve: Solve) -> None:
        """Solves the weights `names` in turn, on a copy of the network in which the `placed` tensors are in place.

        A weight's turn comes when all batches that use it have come there; where they come in different orders, when
        the first one has.
        """
        users: dict[str, set[int]] = {name: set() for name in names}
        for name, at, _ in self.statistics.samples:
            if name in names:
                users[name].add(at)
        solved: set[str] = set()
        compressed = copy_of(self.model)
        tensors = compressed.state_dict(keep_vars=True)
        for name, values in placed.items():
            tensors[name].data.copy_(torch.from_numpy(values).reshape(tensors[name].shape))
        with (
            ThreadPoolExecutor(self.threads) as pool,
            running(list(_works(self.model, self.batches, names))) as originals,
            running(list(_works(compressed, self.batches, names))) as follows,
        ):
            pairs = list(zip(originals, follows, strict=True))
            _advance(pool, [*originals, *follows])
            while waiting := {at: run.waiting.name for at, run in enumerate(originals) if run.waiting is not None}:
                ready = (name for name in waiting.values() if all(waiting.get(at) == name for at in users[name]))
                name = next(ready, next(iter(waiting.values())))
                there = [(at, pair) for at, pair in enumerate(pairs) if _alike(pair, name)]
                met = None if name in solved else self._met(pool, name, there)
                if met is not None:
                    solved.add(name)
                    tensors[name].data.copy_(torch.from_numpy(solve(name, met)))
                _advance(pool, [run for run in (*originals, *follows) if run.waiting and run.waiting.name == name])

    def _met(self, pool: ThreadPoolExecutor, name: str, there: Sequence[tuple[int, tuple[Run, Run]]]) -> Met | None:
        """Means over the positions that entered the statistics; None where there are none."""
        seen = self.statistics.weights[name].moments
        sums = [(torch.zeros_like(seen), torch.zeros_like(seen)) for _ in range(2)]
        totals, positions = [0.0, 0.0], [0, 0]
        # Batch by batch in any order, added up in theirs: the sums do not depend on the number of threads.
        parts = (p for p in in_order(pool, lambda at: self._part(name, *at), there, self.threads) if p is not None)
        for at, part in enumerate(parts):
            half = at % 2
            sums[half][0].add_(part[0])
            sums[half][1].add_(part[1])
            totals[half] += part[2]
            positions[half] += part[3]
        if not sum(totals):
            return None
        both = [(a + b) / sum(totals) for a, b in zip(*sums, strict=True)]
        if not all(totals):
            return Met(both[0], both[1], sum(positions))
        halves = (
            Met(moments / total, drift / total, count)
            for (moments, drift), total, count in zip(sums, totals, positions, strict=True)
        )
        return Met(both[0], both[1], sum(positions), tuple(halves))

    def _part(self, name: str, at: int, pair: tuple[Run, Run]) -> tuple[Tensor, Tensor, float, int] | None:
        """What one batch adds to Σ x̂ x̂ᵀ and Σ (x − x̂) x̂ᵀ, the positions that it stands for, and those it is of."""
        sample = self.statistics.samples.get((name, at, 0))
        if sample is None or not len(sample.chosen):
            return None
        chosen = sample.chosen.long()
        most = -(-ROWS_PER_INPUT * self.statistics.weights[name].moments.shape[1] // len(self.batches))
        if len(chosen) > most:
            # At random: every k-th position of an image would leave whole columns of it out.
            order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
            chosen = chosen[order[:most]]
        scale = sample.scale * len(sample.chosen) / len(chosen)
        before, now = (_rows(run, chosen) for run in pair)
        return scale * (now.mT @ now), scale * ((before - now).mT @ now), scale * len(chosen), len(chosen)


def _advance(pool: ThreadPoolExecutor, runs: Sequence[Run]) -> None:
    """All of them to their next pause, as many at a time as the pool has threads."""
    for _ in pool.map(Run.advance, runs):
        pass


def _alike(pair: tuple[Run, Run], name: str) -> bool:
    """Whether both networks use the weight `name`, at equally many positions: routes may depend on values."""
    before, now = (run.waiting for run in pair)
    return bool(before and now and before.name == now.name == name and before.inputs.shape == now.inputs.shape)


def _rows(run: Run, chosen: Tensor) -> Tensor:
    """The inputs (g, P, n) of a paused run at `chosen` positions."""
    use: Dense | Convolution = run.waiting
    return use.rows(chosen).float().cpu().movedim(1, 0).contiguous()
