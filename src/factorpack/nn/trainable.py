"""A compressed network that can be trained: latents, of which the factors at rest are the roundings.

Letters: d rows along the basis, k rank, N tiles, K contexts.

A latent u counts in the units that its integers had when training began. With o whole, one for all codes of a weight
and learned too, it stands for round(u·2^(−o/64))·2^(o/64) of them. Gradients pass the rounding as if it were none (the
straight-through estimator), so that the one of o comes from the rounding errors, as for learned steps (Esser et al.
2020). Before training every latent is an integer, o is 0, and the factors are bit for bit those of the file.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from factorpack._shapes import Float, Float32, Float64, Integer
from factorpack.factors import (
    STEPS_PER_OCTAVE,
    Basis,
    Codes,
    FactoredVector,
    FactoredWeight,
    Grid,
    OneHotCodes,
    steps_of,
)
from factorpack.nn.loading import Stored, place_dense
from factorpack.nn.uses import bound
from factorpack.runtime.packed import untiled

EMBEDDING = ("input", "weight", "padding_idx", "max_norm")
LARGEST = 2**20
"""No latent leaves ±2^20 units."""


Pricer = Callable[[FactoredWeight], tuple[Float32[np.ndarray, "K prices"], Integer[np.ndarray, "k N"], float]]
"""Of a weight the bits of each integer −radius..radius in each context, the context of each of its codes, and the bits
that the coder takes for all of them, tables included."""


class _Rounded(torch.autograd.Function):
    """u, o → round(u·2^(−o/64))·2^(o/64), o rounded first."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, octaves: Tensor) -> Tensor:
        unit = _unit(octaves)
        rounded = torch.round(latents / unit).mul_(unit)
        ctx.save_for_backward(rounded - latents)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (error,) = ctx.saved_tensors
        return gradient, math.log(2) * (gradient * error).sum()


def _rounded(latents: Tensor, octaves: Tensor) -> Tensor:
    found: Tensor = _Rounded.apply(latents, octaves)  # type: ignore[no-untyped-call]
    return found


class _Priced(torch.autograd.Function):
    """u, o → bits of the integers, linear between them."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, octaves: Tensor, bits: Tensor, places: Tensor) -> Tensor:
        """`places` (k, N): where the price of 0 is in the flat `bits`, for each latent."""
        unit, radius = _unit(octaves), bits.shape[1] // 2
        integers = (latents / unit).clamp_(-radius, radius)
        below = integers.floor().clamp_(max=radius - 1)
        at = places + below.to(places.dtype)
        flat = bits.reshape(-1)
        low = flat[at]
        slope = flat[at.add_(1)].sub_(low)
        ctx.save_for_backward(slope, (slope * integers).sum(), unit)
        return (low + slope * integers.sub_(below)).sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slope, turned, unit = ctx.saved_tensors
        scale = gradient.to(slope.dtype)
        return slope * (scale / unit), -math.log(2) * scale * turned, None, None


def _unit(octaves: Tensor) -> Tensor:
    return torch.exp2(torch.round(octaves.detach() * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE)


def _at_rest(latents: Tensor, octaves: Tensor) -> Tensor:
    """The middles of the cells that latents are in."""
    unit = _unit(octaves)
    return torch.round(latents / unit) * unit


def _through(latents: Tensor) -> Tensor:
    """Rounded; the gradient passes."""
    return latents + (torch.round(latents) - latents).detach()


def _parameter(integers: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.array(integers, np.float32, order="C")))


def _integers(latents: Tensor) -> np.ndarray:
    rounded = torch.round(latents.detach().clamp(-LARGEST, LARGEST))
    return np.asarray(rounded.to(torch.int32).cpu().numpy())


class _LookUps(TorchFunctionMode):
    """Recombines of some tables only the rows that are looked up; of other uses of them, the whole.

    `tables` are latents by the identity of the parameter that stands for them in the network.
    """

    def __init__(self, tables: "Mapping[int, TrainableWeight]") -> None:
        super().__init__()
        self.tables = tables
        self.whole: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            call = bound(EMBEDDING, args, kwargs)
            latent = self.tables.get(id(call["weight"]))
            if latent is not None and call.get("max_norm") is None:
                rows, places = torch.unique(call["input"], return_inverse=True)
                found = latent.rows_at(rows).to(call["weight"].dtype)
                if call.get("padding_idx") is not None:
                    padding = call["padding_idx"] % len(call["weight"])
                    found = torch.where((rows == padding)[:, None], found.detach(), found)
                return F.embedding(places, found)
        if any(id(value) in self.tables for value in (*args, *kwargs.values())):
            args = tuple(map(self._dense, args))
            kwargs = {name: self._dense(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _dense(self, value: Any) -> Any:
        key = id(value)
        if key not in self.tables:
            return value
        if key not in self.whole:
            self.whole[key] = self.tables[key]().to(value.dtype)
        return self.whole[key]


class Latents(nn.Module, ABC):
    """The latents of one tensor of a file."""

    @abstractmethod
    def resting(self) -> dict[str, Tensor]:
        """What `factored` makes of them, by their names: the middles of the cells that they are in."""

    @torch.no_grad()
    def rest(self) -> None:
        """Takes latents to what `factored` makes of them."""
        resting = self.resting()
        for name, latent in self.named_parameters():
            latent.copy_(resting[name])


class TrainableWeight(Latents):
    """A factored weight with latents for its codes, its basis, or the factors of that, and its step.

    Codes of form `vq` stay as they are: their codewords are trained. `octaves` is log2 of the step over the first one.
    """

    rows: Tensor
    columns: Tensor
    indices: Tensor
    prices: Tensor
    places: Tensor
    slopes: Tensor

    def __init__(self, weight: FactoredWeight) -> None:
        super().__init__()
        self._first = weight
        self.coded_bits = 0.0
        """What the coder takes for the codes, tables included, as far as `reprice` and `recount` know."""
        self._beside = 0.0
        """What of it is no price of a code: tables."""
        codes, basis = weight.codes, weight.basis
        self.octaves = nn.Parameter(torch.zeros(()))
        self.codes = _parameter(codes.integers) if isinstance(codes, Codes) else None
        if basis.factors:
            self.basis = nn.ParameterList([_parameter(factor) for factor in basis.factors])
        else:
            self.basis = nn.ParameterList([] if basis.integers is None else [_parameter(basis.integers)])
        rows = steps_of(basis.grid.exponents)
        columns = steps_of(codes.grid.exponents) if isinstance(codes, Codes) else np.ones(1)
        self.register_buffer("rows", torch.from_numpy(np.float32(rows))[:, None], persistent=False)
        self.register_buffer("columns", torch.from_numpy(np.float32(columns)), persistent=False)
        if isinstance(codes, OneHotCodes):
            self.register_buffer("indices", torch.from_numpy(codes.indices.astype(np.int64)), persistent=False)
        self.register_buffer("prices", torch.zeros(1, 1), persistent=False)
        self.register_buffer("places", torch.zeros((), dtype=torch.int32), persistent=False)
        self.register_buffer("slopes", torch.zeros(()), persistent=False)

    def forward(self) -> Float[Tensor, "..."]:
        """The tensor, in its own shape."""
        tiling = self._first.tiling
        if self.codes is None:
            tiles = _rounded(self.basis[0], self.octaves)[:, self.indices]
            return untiled(tiles * self.rows, tiling)
        tiles = _rounded(self.codes, self.octaves)
        if len(self.basis):
            tiles = reduce(torch.kron, [_through(factor) for factor in self.basis]) @ tiles
        return untiled(tiles * self.rows * self.columns, tiling)

    @property
    def row_by_row(self) -> bool:
        """Whether rows of the tensor can be recombined without the others."""
        tiling = self._first.tiling
        alone = not tiling.depth and not len(self.basis)
        whole = tiling.depth == tiling.matrix_shape[1]
        return self.codes is not None and not tiling.transposed and tiling.groups == 1 and (alone or whole)

    def rows_at(self, rows: Integer[Tensor, " rows"]) -> Float[Tensor, "rows n"]:
        """These rows of the tensor, which is `row_by_row`."""
        assert self.codes is not None
        columns = self.columns.expand(self.codes.shape[1])
        if not self._first.tiling.depth:
            steps = self.rows.expand(self.codes.shape[0], 1)[rows]
            return _rounded(self.codes[rows], self.octaves) * steps * columns
        tiles = _rounded(self.codes[:, rows], self.octaves)
        if len(self.basis):
            tiles = reduce(torch.kron, map(_through, self.basis)) @ tiles
        return (tiles * self.rows * columns[rows]).T

    def stepped_basis(self) -> Float[Tensor, "d k"] | None:
        """The basis as it is used, in its steps; None where there is none."""
        if not len(self.basis):
            return None
        factors = [_rounded(self.basis[0], self.octaves)] if self.codes is None else map(_through, self.basis)
        return reduce(torch.kron, factors) * self.rows

    def reprice(self, pricer: Pricer) -> None:
        """Takes the prices of `bits` from the integers as they are now."""
        if self.codes is None:
            return
        bits, contexts, self.coded_bits = pricer(self.factored())
        width = bits.shape[1]
        places = np.array(contexts, np.int32, order="C") * np.int32(width) + np.int32(width // 2)
        self.prices = torch.from_numpy(np.ascontiguousarray(bits)).to(self.octaves.device)
        self.places = torch.from_numpy(places).to(self.octaves.device)
        self.take_slopes()
        with torch.no_grad():
            self._beside = self.coded_bits - float(self.bits())

    @torch.no_grad()
    def recount(self) -> None:
        """Takes what the codes take now at the prices last taken.

        Too much, as tables made anew would suit them better, but by little: they were the best for codes near these.
        """
        if self.codes is not None:
            self.coded_bits = self._beside + float(self.bits())

    def bits(self) -> Float64[Tensor, ""]:
        """What the codes take at the prices last taken, linear between integers; 0 for codes that are not trained."""
        if self.codes is None:
            return self.octaves.new_zeros((), dtype=torch.float64)
        found: Tensor = _Priced.apply(self.codes, self.octaves, self.prices, self.places)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def take_slopes(self) -> None:
        """Takes the slopes of `bits` for `price` where the codes are now."""
        if self.codes is None:
            return
        radius = self.prices.shape[1] // 2
        # As wide as prices, so that places are good for both; the last one of a context is never asked for.
        slopes = F.pad(self.prices[:, 1:] - self.prices[:, :-1], (0, 1)).reshape(-1)
        at = (self.codes / _unit(self.octaves)).clamp_(-radius, radius - 1).floor_().to(self.places.dtype)
        self.slopes = slopes[at.add_(self.places)]

    @torch.no_grad()
    def price(self, rate: float) -> None:
        """Adds the gradient of λ = `rate` times `bits`, at the slopes taken last, to that of the codes.

        What no sample reached, such as rows of a table that were not looked up, pays nothing: it would be rounded
        away for the benefit of the rest.
        """
        if self.codes is None or self.codes.grad is None:
            return
        unit = float(_unit(self.octaves))
        slopes = self.slopes * (self.codes.grad != 0)
        if self.octaves.grad is not None:
            self.octaves.grad -= math.log(2) * rate / unit * torch.dot(slopes.view(-1), self.codes.view(-1))
        self.codes.grad.add_(slopes, alpha=rate / unit)

    @torch.no_grad()
    def resting(self) -> dict[str, Tensor]:
        found = {"octaves": (self.octaves * STEPS_PER_OCTAVE).round() / STEPS_PER_OCTAVE}
        for index, latent in enumerate(self.basis):
            found[f"basis.{index}"] = latent.round() if self.codes is not None else _at_rest(latent, self.octaves)
        if self.codes is not None:
            found["codes"] = self.middles(self.codes)
        return found

    def unit(self) -> Tensor:
        """The width of a cell of the codes."""
        return _unit(self.octaves)

    def middles(self, codes: Float[Tensor, "k N"]) -> Float[Tensor, "k N"]:
        """The middles of the cells that such codes are in."""
        return _at_rest(codes, self.octaves)

    def factored(self, threshold: float = 0.5) -> FactoredWeight:
        """The factors at rest. Codes below `threshold` steps are zero."""
        shift = round(STEPS_PER_OCTAVE * self.octaves.item())
        first, basis, codes = self._first, self._first.basis, self._first.codes
        if self.codes is None:
            assert isinstance(codes, OneHotCodes)
            words = _integers(self.basis[0] / _unit(self.octaves))
            return FactoredWeight(first.form, first.tiling, Basis(words, _held(words, basis.grid, shift)), codes)
        assert isinstance(codes, Codes)
        latents = self.codes.detach() / _unit(self.octaves)
        if threshold > 0.5:
            latents = latents * (latents.abs() >= threshold)
        integers = _integers(latents)
        kept = Codes(integers, _held(integers, codes.grid, shift))
        if basis.factors:
            factors = tuple(_integers(factor) for factor in self.basis)
            basis = Basis.separable(factors, int(basis.grid.exponents[0]))
        elif len(self.basis):
            words = _integers(self.basis[0])
            basis = Basis(words, _held(words, basis.grid))
        return FactoredWeight(first.form, first.tiling, basis, kept)


def _held(integers: np.ndarray, grid: Grid, shift: int = 0) -> Grid:
    """The grid with its steps moved; a wider one where the integers have left it."""
    exponents = grid.exponents + np.int32(shift)
    if integers.size and (integers.min() < grid.low or integers.max() > grid.high):
        return Grid.holding(integers, exponents)
    return Grid(grid.low, grid.high, exponents)


class TrainableVector(Latents):
    """A small tensor with a latent for each of its integers."""

    def __init__(self, vector: FactoredVector) -> None:
        super().__init__()
        self._first = vector
        self.levels = _parameter(vector.integers.astype(np.int64) + vector.offset)

    def forward(self) -> Float[Tensor, "..."]:
        """The tensor, in its own shape."""
        return self._values(_through(self.levels))

    def unrounded(self) -> Float[Tensor, "..."]:
        """As it would be if its latents were not rounded."""
        return self._values(self.levels)

    def _values(self, levels: Tensor) -> Tensor:
        if self._first.logarithmic:
            values = torch.exp2(levels * (self._first.exponent / STEPS_PER_OCTAVE))
        else:
            values = levels * self._step
        return values.reshape(self._first.shape)

    @property
    def _step(self) -> float:
        return float(steps_of(np.array(self._first.exponent, np.int32)))

    @torch.no_grad()
    def set_values(self, values: Float[Tensor, "..."]) -> None:
        """Takes the latents to these values; on a logarithmic scale they are positive."""
        if self._first.logarithmic:
            levels = torch.log2(values) * (STEPS_PER_OCTAVE / self._first.exponent)
        else:
            levels = values / self._step
        self.levels.copy_(levels.reshape(self.levels.shape))

    @torch.no_grad()
    def resting(self) -> dict[str, Tensor]:
        return {"levels": self.levels.round()}

    def factored(self) -> FactoredVector:
        """The small tensor at rest."""
        first = self._first
        integers = _integers(self.levels) - np.int32(first.offset)
        return FactoredVector(first.shape, integers, first.exponent, first.offset, first.logarithmic)


class TrainableModel(nn.Module):
    """A network that computes with the tensors of a compressed file, as they would come out of it.

    Its parameters are the latents alone. The network stays in eval mode: batch norms are the two numbers a channel
    that the file holds, and nothing is dropped out.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Mapping[str, Stored],
        dtypes: Mapping[str, str],
        aliases: Mapping[str, str],
        pricer: Pricer,
    ) -> None:
        super().__init__()
        self._pricer = pricer
        self.network = place_dense(model, tensors, dtypes, aliases).eval().requires_grad_(False)
        self.dtypes, self.aliases, self.tensors = dict(dtypes), dict(aliases), dict(tensors)
        parameters = dict(self.network.named_parameters(remove_duplicate=False))
        trainable = {
            name: stored
            for name, stored in tensors.items()
            if isinstance(stored, FactoredWeight | FactoredVector) and name in parameters
        }
        # Names have dots, which modules' names cannot have.
        self.names = tuple(trainable)
        self.latents = nn.ModuleList(
            [TrainableWeight(t) if isinstance(t, FactoredWeight) else TrainableVector(t) for t in trainable.values()]
        )
        tied = {*self.aliases, *self.aliases.values()}
        tables = {f"{name}.weight" for name, module in self.network.named_modules() if isinstance(module, nn.Embedding)}
        self._tables = {
            name: latent
            for name, latent in self.trained().items()
            if name in tables - tied and isinstance(latent, TrainableWeight) and latent.row_by_row
        }
        """Weights of which a batch needs the rows that it looks up."""
        self.reprice()

    def train(self, mode: bool = True) -> "TrainableModel":
        """The network itself stays in eval mode."""
        self.training = mode
        return self

    def trained(self) -> dict[str, "TrainableWeight | TrainableVector"]:
        """What is trained, by the names of the file."""
        return dict(zip(self.names, cast("list[TrainableWeight | TrainableVector]", list(self.latents)), strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network returns with these weights."""
        places = dict(self.network.named_parameters(remove_duplicate=False))
        latents = self.trained()
        tensors = {name: latent().to(places[name].dtype) for name, latent in latents.items()
                   if name not in self._tables}  # fmt: skip
        tensors |= {alias: tensors[name] for alias, name in self.aliases.items() if name in tensors}
        if not self._tables:
            return functional_call(self.network, tensors, args, kwargs)
        with _LookUps({id(places[name]): latent for name, latent in self._tables.items()}):
            return functional_call(self.network, tensors, args, kwargs)

    def reprice(self) -> None:
        """Takes the prices of `bits` from the coder's tables for the integers as they are now."""
        for latent in self.trained().values():
            if isinstance(latent, TrainableWeight):
                latent.reprice(self._pricer)

    def recount(self) -> None:
        """Takes what the codes take now (`coded_bytes`) without new tables, which is some thirty times cheaper."""
        for latent in self.trained().values():
            if isinstance(latent, TrainableWeight):
                latent.recount()

    def bits(self) -> Float64[Tensor, ""]:
        """What all codes take together, at the prices last taken (`reprice`): differentiable, exact at integers.

        Tables, bases and small tensors, which hardly change while codes are trained, are not in it.
        """
        found = [latent.bits() for latent in self.trained().values() if isinstance(latent, TrainableWeight)]
        return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64)

    def codes_count(self) -> int:
        """How many codes there are in all."""
        latents = [latent for latent in self.trained().values() if isinstance(latent, TrainableWeight)]
        return sum(latent.codes.numel() for latent in latents if latent.codes is not None)

    def coded_bytes(self) -> float:
        """What the coder takes for all codes, tables included, as of the last `reprice` or `recount`."""
        return sum(latent.coded_bits for latent in self.trained().values() if isinstance(latent, TrainableWeight)) / 8

    def price(self, rate: float, fresh: bool = True) -> None:
        """Adds the gradient of λ = `rate` times `bits` to that of codes that training reached.

        In place of `bits` in the loss: after `backward`, and cheaper. Where it is not `fresh` it takes the slopes of
        the last time, which have hardly changed after a few steps.
        """
        for latent in self.trained().values():
            if isinstance(latent, TrainableWeight):
                if fresh:
                    latent.take_slopes()
                latent.price(rate)

    def resting(self) -> dict[str, Tensor]:
        """The integers, and the steps, that all latents stand for now, by the names of `latents.named_parameters`."""
        return {
            f"{place}.{name}": resting
            for place, latent in self.latents.named_children()
            for name, resting in cast("Latents", latent).resting().items()
        }

    def factored(self, threshold: float = 0.5) -> dict[str, Stored]:
        """Every tensor of the file at rest."""
        found: dict[str, Stored] = dict(self.tensors)
        for name, latent in self.trained().items():
            found[name] = latent.factored(threshold) if isinstance(latent, TrainableWeight) else latent.factored()
        return found
