"""The values at rest: a weight as integer factors and steps, NumPy only.

Letters: d rows along the basis, k rank, N tiles.

    W = untile( diag(s_B) · (B · Z) · diag(s_Z) )

B and Z hold integers; s_B is one step for the matrix or one a row of B, s_Z one for the matrix or one a
column of Z. Nothing else is scaled, so the product is exact in integers and the last scaling rounds
once: every machine decodes the same float32 values. (Layout of the steps: Kuzmin et al. 2022, eq. 5-6.)

A step is stored as an integer exponent e and is worth 2^(e/64).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from math import isqrt, prod
from typing import Any

import numpy as np

from factorpack._shapes import Float32, Float64, Int32, Integer
from factorpack.errors import MismatchError
from factorpack.tiling import Tiling

OCTAVE_BITS = 6
STEPS_PER_OCTAVE = 1 << OCTAVE_BITS
FRACTION_BITS = 30
EXPONENT_LIMIT = 120 * STEPS_PER_OCTAVE
LOGARITHM_LIMIT = 1000 * STEPS_PER_OCTAVE
INTEGER_LIMIT = 2**24
ENTRIES_AT_ONCE = 1 << 24
"""Of a larger weight so many are worked on at a time: what is half done takes several times as much memory."""
ENTRIES_IN_CACHE, LEAST_COLUMNS = 1 << 16, 32
"""So many entries are recombined at a time, or so many tiles where these are long: what is half done stays in a
processor's cache."""


def parts(lines: int, entries: int, most: int | None = None, least: int = 1) -> Iterator[slice]:
    """Lines of so many entries, some of them at a time: `most` entries (`ENTRIES_AT_ONCE`), but `least` lines."""
    at_once = max((most or ENTRIES_AT_ONCE) // max(entries, 1), least)
    return (slice(start, start + at_once) for start in range(0, lines, at_once))


@cache
def octave() -> tuple[int, ...]:
    """round-down(2^30 · 2^(i/64)) for i in 0..63, by integer square roots alone: the same on every machine."""
    wide = 1 << 120
    roots = [2 * wide]
    for _ in range(6):
        roots.append(isqrt(roots[-1] * wide))
    table = []
    for index in range(STEPS_PER_OCTAVE):
        value = wide
        for bit in range(6):
            if index >> bit & 1:
                value = value * roots[6 - bit] >> 120
        table.append(value >> (120 - FRACTION_BITS))
    return tuple(table)


def steps_of(exponents: Int32[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """2^(e/64) as float64, exact to the table of `octave`; any shape."""
    # Shifts and masks, which take less time than divisions, also of negative ones.
    return np.asarray(
        np.ldexp(_octave_steps()[exponents & STEPS_PER_OCTAVE - 1], (exponents >> OCTAVE_BITS) - FRACTION_BITS)
    )


@cache
def _octave_steps() -> Float64[np.ndarray, " 64"]:
    return np.array(octave(), np.float64)


def exponents_of(steps: Float64[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
    """The exponents whose steps are nearest to positive `steps` in the logarithm."""
    exponents = np.rint(np.log2(steps) * STEPS_PER_OCTAVE)
    return np.asarray(np.clip(exponents, -EXPONENT_LIMIT, EXPONENT_LIMIT), np.int32)


@dataclass(frozen=True, eq=False)
class Grid:
    """A quantiser: integers in low..high and the exponents of its steps, (1,) for the matrix or one a line."""

    low: int
    high: int
    exponents: Int32[np.ndarray, "..."]

    def __post_init__(self) -> None:
        if not -INTEGER_LIMIT <= self.low <= self.high <= INTEGER_LIMIT:
            raise MismatchError(f"a grid of {self.low}..{self.high} is empty or wider than ±{INTEGER_LIMIT}")
        if self.exponents.ndim != 1 or not self.exponents.size:
            raise MismatchError(f"a grid has one exponent or one a line, not shape {self.exponents.shape}")
        if self.exponents.min() < -EXPONENT_LIMIT or self.exponents.max() > EXPONENT_LIMIT:
            raise MismatchError(f"a step's exponent lies outside ±{EXPONENT_LIMIT}")

    @classmethod
    def holding(cls, integers: Int32[np.ndarray, "..."], exponents: Int32[np.ndarray, " lines"]) -> "Grid":
        """The narrowest signed grid of whole bits that holds `integers`."""
        largest = max(int(integers.max(initial=0)), -int(integers.min(initial=0)) - 1)
        bits = largest.bit_length() + 1
        return cls(-(1 << bits - 1), (1 << bits - 1) - 1, exponents)

    @property
    def steps(self) -> Float64[np.ndarray, " lines"]:
        return steps_of(self.exponents)


IDENTITY_GRID = Grid(-2, 1, np.zeros(1, np.int32))
"""The grid of a basis that is the identity and scales nothing."""


def _checked(integers: Int32[np.ndarray, "..."], grid: Grid, lines: int, what: str) -> None:
    if integers.size and (integers.min() < grid.low or integers.max() > grid.high):
        raise MismatchError(f"{what} hold integers outside their grid {grid.low}..{grid.high}")
    if grid.exponents.size not in (1, lines):
        raise MismatchError(f"{what} have {grid.exponents.size} steps where 1 or {lines} are expected")


def kernel_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The kernel axes (all but the first two) of more than one tap; () where there are none."""
    return tuple(taps for taps in shape[2:] if taps > 1)


def _kronecker(factors: Iterable[Int32[np.ndarray, "_ _"]]) -> Int32[np.ndarray, "d k"]:
    """The Kronecker product, the first factor outermost; MismatchError where it may leave ±INTEGER_LIMIT."""
    # Python's integers, which do not overflow.
    if prod(max(int(factor.max(initial=0)), -int(factor.min(initial=0))) for factor in factors) > INTEGER_LIMIT:
        raise MismatchError(f"the factors' product may lie outside ±{INTEGER_LIMIT}")
    return reduce(_kron, factors, np.ones((1, 1), np.int32))


def _kron(one: Int32[np.ndarray, "_ _"], other: Int32[np.ndarray, "_ _"]) -> Int32[np.ndarray, "_ _"]:
    """As np.kron, which takes ten times as long for factors this small."""
    product = one[:, None, :, None] * other[None, :, None, :]
    return np.asarray(product.reshape(one.shape[0] * other.shape[0], one.shape[1] * other.shape[1]))


@dataclass(frozen=True, eq=False)
class Basis:
    """The dense, quantised factor: integers (d, k), steps for the matrix or one a row.

    `integers` is None for the identity, which form `direct` has and does not store; its grid then carries
    the steps of the rows. Form `separable` stores the square `factors`, one a kernel axis of several taps, whose
    Kronecker product, the first axis outermost, `integers` is: on the narrowest grid, with one step.
    """

    integers: Int32[np.ndarray, "d k"] | None
    grid: Grid
    factors: tuple[Int32[np.ndarray, "_ _"], ...] = ()

    def __post_init__(self) -> None:
        if self.integers is not None:
            _checked(self.integers, self.grid, self.integers.shape[0], "the basis")
        if not self.factors:
            return
        if any(factor.shape[0] != factor.shape[1] for factor in self.factors):
            raise MismatchError(f"factors of a basis are square, not {[factor.shape for factor in self.factors]}")
        product = _kronecker(self.factors)
        if self.integers is None or not np.array_equal(product, self.integers):
            raise MismatchError("the basis is not the Kronecker product of its factors")
        narrowest = Grid.holding(product, self.grid.exponents)
        if (self.grid.low, self.grid.high, self.grid.exponents.size) != (narrowest.low, narrowest.high, 1):
            raise MismatchError("a basis with factors has the narrowest grid of whole bits and one step")

    @classmethod
    def separable(cls, factors: tuple[Int32[np.ndarray, "_ _"], ...], exponent: int) -> "Basis":
        """The basis with these factors, and the step of their product."""
        integers = _kronecker(factors)
        return cls(integers, Grid.holding(integers, np.array([exponent], np.int32)), factors)


@dataclass(frozen=True, eq=False)
class Codes:
    """The sparse, quantised factor: integers (k, N), steps for the matrix or one a column."""

    integers: Int32[np.ndarray, "k N"]
    grid: Grid

    def __post_init__(self) -> None:
        _checked(self.integers, self.grid, self.integers.shape[1], "the codes")

    @property
    def shape(self) -> tuple[int, int]:
        return self.integers.shape[0], self.integers.shape[1]


@dataclass(frozen=True, eq=False)
class OneHotCodes:
    """Codes with a single one in each column: `indices` (N,) of the codewords, `rank` k of them."""

    indices: Int32[np.ndarray, " N"]
    rank: int

    def __post_init__(self) -> None:
        if self.indices.size and (self.indices.min() < 0 or self.indices.max() >= self.rank):
            raise MismatchError(f"the codes point outside the {self.rank} codewords")

    @property
    def shape(self) -> tuple[int, int]:
        return self.rank, self.indices.size


def _exact_type(basis: Int32[np.ndarray, "d k"], codes: Codes | OneHotCodes) -> type[np.floating[Any]]:
    """What the product B·Z is exact in: float32, twice as fast, where no sum of its terms passes 2^24."""
    if isinstance(codes, OneHotCodes) or not codes.integers.size or not basis.size:
        return np.float64
    largest = max(int(codes.integers.max()), -int(codes.integers.min()))
    bound = int(np.abs(basis.astype(np.int64)).sum(axis=1).max()) * largest
    return np.float32 if bound <= INTEGER_LIMIT else np.float64


@dataclass(frozen=True, eq=False)
class FactoredWeight:
    """A weight tensor as `untile(B·Z)`.

    Raises MismatchError where the shapes of tiling, basis and codes do not meet, or where the exact
    product could leave the integers that float64 holds.
    """

    form: str
    tiling: Tiling
    basis: Basis
    codes: Codes | OneHotCodes

    def __post_init__(self) -> None:
        depth, count = self.tiling.tiled_shape
        rank, columns = self.codes.shape
        basis = (depth, depth) if self.basis.integers is None else self.basis.integers.shape
        if basis != (depth, rank) or columns != count:
            raise MismatchError(
                f"a basis {basis} and codes {(rank, columns)} do not make tiles {(depth, count)} of {self.tiling.shape}"
            )
        if self.basis.grid.exponents.size not in (1, depth):
            raise MismatchError(f"the basis has {self.basis.grid.exponents.size} steps where 1 or {depth} are expected")
        if isinstance(self.codes, Codes) and self.basis.integers is not None and self.product_bound >= 2**53:
            raise MismatchError("the product of basis and codes is too large to be exact")
        if self.form == "separable" or self.basis.factors:
            self._check_separable()

    def _check_separable(self) -> None:
        sizes = tuple(len(factor) for factor in self.basis.factors)
        if self.form != "separable" or isinstance(self.codes, OneHotCodes):
            raise MismatchError(f"form {self.form} with such codes has no separable basis")
        if not sizes or sizes != kernel_of(self.shape) or self.tiling.transposed or self.tiling.depth != prod(sizes):
            raise MismatchError(
                f"factors of {sizes} taps do not make tiles of {self.tiling.depth} of the kernels of {self.shape}, "
                f"each the taps of one input of one output"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.tiling.shape

    @property
    def product_bound(self) -> int:
        """No entry of the integer product B·Z is larger than this."""
        basis = self.basis.grid
        largest = 1 if self.basis.integers is None else max(abs(basis.low), abs(basis.high))
        if isinstance(self.codes, OneHotCodes):
            return largest
        codes = max(abs(self.codes.grid.low), abs(self.codes.grid.high))
        return largest * codes * (1 if self.basis.integers is None else self.codes.shape[0])

    def with_steps(self, exponents: Int32[np.ndarray, " outputs"] | None) -> "FactoredWeight":
        """The weight with each output times 2^(e/64); None leaves it as it is.

        Outputs are the rows of an identity, or the tiles where a tile is one whole output.
        """
        if exponents is None:
            return self
        assert isinstance(self.codes, Codes)
        if not self.tiling.depth:
            assert self.basis.integers is None
            grid = self.basis.grid
            basis = Basis(None, Grid(grid.low, grid.high, grid.exponents + exponents))
            return FactoredWeight(self.form, self.tiling, basis, self.codes)
        assert self.tiling.depth == self.tiling.matrix_shape[1]
        grid = self.codes.grid
        codes = Codes(self.codes.integers, Grid(grid.low, grid.high, grid.exponents + exponents))
        return FactoredWeight(self.form, self.tiling, self.basis, codes)

    def tiles(self) -> Float32[np.ndarray, "d N"]:
        """The recombined matrix, float32."""
        depth, count = self.tiling.tiled_shape
        basis, codes = self.basis.integers, self.codes
        exact = None if basis is None else basis.astype(_exact_type(basis, codes))
        # Rounded to float32 first, so that steps times steps is exact in float64 and one rounding remains.
        row_steps, column_steps = (
            np.asarray(grid.steps, np.float32).astype(np.float64)
            for grid in (self.basis.grid, IDENTITY_GRID if isinstance(codes, OneHotCodes) else codes.grid)
        )
        rows, columns = np.broadcast_to(row_steps[:, None], (depth, 1)), np.broadcast_to(column_steps, (1, count))
        along = self.tiling.depth > 0
        # Tiles along the inputs are runs of the tensor: in its order, so that `untile` need not turn them.
        tiles = np.empty((count, depth), np.float32).T if along else np.empty((depth, count), np.float32)
        by_rows = exact is None and not along
        lines, entries = (depth, count) if by_rows else (count, depth)
        for part in parts(lines, entries, ENTRIES_IN_CACHE, 1 if by_rows else LEAST_COLUMNS):
            block = (part, slice(None)) if by_rows else (slice(None), part)
            if isinstance(codes, OneHotCodes):
                assert exact is not None
                product = exact[:, codes.indices[part]]
            else:
                product = codes.integers[block]
                # Integers below 2^53: exact in float64 in whatever order a machine adds them.
                product = product if exact is None else exact @ product.astype(exact.dtype)
            tiles[block] = product * (rows[block[0]] * columns[:, block[1]])
        return tiles

    def tensor(self) -> Float32[np.ndarray, "..."]:
        """The weight in its own shape, float32."""
        return self.tiling.untile(self.tiles())


@dataclass(frozen=True, eq=False)
class FactoredVector:
    """A small tensor on a grid of its own: `values = offset · step + integers · step`, or powers of two.

    `integers` (size,) are counted from `offset`; on the logarithmic scale a value is 2^((offset+i)·r/64)
    with `exponent` holding r. Values beyond float32 become its largest.

    Raises MismatchError where the integers do not fill the shape or the steps leave what float64 holds.
    """

    shape: tuple[int, ...]
    integers: Int32[np.ndarray, " size"]
    exponent: int
    offset: int
    logarithmic: bool

    def __post_init__(self) -> None:
        if self.integers.shape != (prod(self.shape),):
            raise MismatchError(f"{self.integers.size} integers do not fill a tensor of shape {self.shape}")
        levels = self._levels * self.exponent if self.logarithmic else np.array([self.exponent])
        limit = LOGARITHM_LIMIT if self.logarithmic else EXPONENT_LIMIT
        if levels.size and (levels.min() < -limit or levels.max() > limit):
            raise MismatchError(f"an exponent of a small tensor lies outside ±{limit}")

    @property
    def _levels(self) -> Integer[np.ndarray, " size"]:
        return self.integers.astype(np.int64) + self.offset

    def tensor(self) -> Float32[np.ndarray, "..."]:
        """The tensor in its own shape, float32."""
        if self.logarithmic:
            values = steps_of(np.asarray(self._levels * self.exponent, np.int32))
        else:
            values = self._levels.astype(np.float64) * steps_of(np.array(self.exponent, np.int32))
        largest = np.finfo(np.float32).max
        return np.asarray(np.clip(values, -largest, largest), np.float32).reshape(self.shape)
