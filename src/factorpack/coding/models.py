"""Which integers are likely: tables of integer frequencies, how they are stored and what a symbol costs.

A model has an alphabet low..high and maybe an escape, the symbol after `high`, for integers outside it.
Weights become frequencies that sum to 2^14 in integers alone: with W the sum of all weights w, a symbol
has f = max(1, w·2^14 div W), or 0 where w = 0; what is then missing from 2^14, or is too much, is added
to, or taken from, the first of the largest.

P(n) = round-down(2^(n/16384)) stands for the integer power that `power` defines. A model is stored as

    varint  kind + 2·escaped + 4·size
    kind 0, symmetric: the alphabet is -size..size; the first min(size, 3) of the bytes z, t, u
        w(0) = P(2048·(z - 128) + 327680), P(327680) where z is not stored
        w(±k) = P(max(0, 327680 - (k - 1)·4·t² - (k - 1)(k - 2)/2·u²)), t and u zero where not stored
        that is: t sets the ratio of neighbours, which falls geometrically with u as in a Gaussian's tails
    kind 1, explicit: zigzag low; the alphabet has size + 1 symbols; a byte b for each, none where
        there is one symbol and no escape; w = P(65536 + 1024·b), 0 where b = 0
    where escaped: a byte e and a byte g; the escape's w = P(2048·(e - 128) + 327680) for kind 0,
        P(65536 + 1024·e) for kind 1

What escaped integers cost beside their symbol, with the Exp-Golomb order g, is told in `escapes`.
"""

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from factorpack._shapes import Float64, Int32, Int64, Integer
from factorpack.coding import compiled
from factorpack.coding.escapes import MAX_ORDER, escape_bits
from factorpack.coding.rans import Table
from factorpack.coding.reader import Reader, append_varint, append_zigzag
from factorpack.coding.reference import PRECISION, TOTAL
from factorpack.errors import FormatError
from factorpack.factors import FRACTION_BITS, INTEGER_LIMIT, STEPS_PER_OCTAVE, octave

OCTAVE = 16384
UNIT = 20 * OCTAVE
MAX_BOUND = 2047


def power(exponents: Integer[np.ndarray, "..."]) -> Integer[np.ndarray, "..."]:
    """round-down(2^(n/16384)) for n in 0..38·16384, near enough: straight lines between the entries of `octave`.

    With o octaves, entry i and the rest r of 256: (table[i]·(256 - r) + table[i + 1]·r) >> (38 - o).
    """
    # Shifts, which take less time than divisions.
    octaves, entry, rest = exponents >> 14, exponents >> 8 & STEPS_PER_OCTAVE - 1, exponents & 255
    table = _octave_table()
    line = table[entry] * (256 - rest) + table[entry + 1] * rest
    return np.asarray(line >> (FRACTION_BITS + 8 - octaves))


@cache
def _octave_table() -> np.ndarray:
    return np.array([*octave(), 2 << FRACTION_BITS], np.int64)


def normalised(weights: Integer[np.ndarray, " symbols"]) -> Int32[np.ndarray, " symbols"]:
    """Frequencies that sum to 2^14, as the module's docstring spells out.

    Raises FormatError where all weights are zero, or where the floor of one leaves the largest without any.
    """
    total = int(weights.sum())
    if total <= 0:
        raise FormatError("a symbol model has no symbol")
    frequencies = np.maximum(weights * TOTAL // total, weights > 0)
    largest = int(frequencies.argmax())
    frequencies[largest] += TOTAL - int(frequencies.sum())
    if frequencies[largest] < 1:
        raise FormatError("a symbol model has too many symbols for its precision")
    return np.asarray(frequencies, np.int32)


def frequencies(exponents: Int64[np.ndarray, " symbols"]) -> Int32[np.ndarray, " symbols"]:
    """Frequencies of symbols with the weights P(exponent), of none where that is negative.

    The array of exponents may be used up. Raises FormatError as `normalised`.
    """
    if compiled.library() is not None:
        return compiled.frequencies(exponents, _octave_table())
    return normalised(np.where(exponents < 0, 0, power(np.maximum(exponents, 0))))


@dataclass(frozen=True, eq=False)
class Histogram:
    """Distinct integers in ascending order and how often each occurs, never zero times."""

    values: Integer[np.ndarray, " distinct"]
    counts: Integer[np.ndarray, " distinct"]

    @classmethod
    def of(cls, integers: Integer[np.ndarray, "..."]) -> "Histogram":
        values, counts = np.unique(integers, return_counts=True)
        return cls(values.astype(np.int64), counts.astype(np.int64))


@dataclass(frozen=True, eq=False)
class SymbolModel:
    """Frequencies of low, low + 1, ... and, where `order` is not None, of the escape, which comes last.

    `order` is the escapes' Exp-Golomb order and `code` the model as stored.
    """

    low: int
    frequencies: Int32[np.ndarray, " symbols"]
    order: int | None
    code: bytes

    @property
    def high(self) -> int:
        """The largest integer that is not escaped; the escape's symbol is the next one."""
        return self.low + self.frequencies.size - 1 - (self.order is not None)

    @property
    def certain(self) -> bool:
        """Whether there is but one symbol, which then costs nothing."""
        return int(self.frequencies.max()) == TOTAL

    def table(self) -> Table:
        """The table that codes the integers themselves, escapes as `high` + 1."""
        return Table(self.frequencies, self.low)

    def to_bytes(self) -> bytes:
        """The model as stored."""
        return self.code

    @classmethod
    def from_bytes(cls, reader: Reader) -> "SymbolModel":
        """The model that starts at the reader's position; FormatError where it is malformed."""
        head = reader.varint("a symbol model's head")
        size, escaped, explicit = head >> 2, head >> 1 & 1, head & 1
        if size > (2 * MAX_BOUND if explicit else MAX_BOUND):
            raise FormatError(f"a symbol model's alphabet of size {size} is too large")
        low = reader.zigzag("a symbol model's lowest integer") if explicit else 0
        if max(abs(low), abs(low + size)) > 2 * INTEGER_LIMIT:
            raise FormatError(f"a symbol model's alphabet {low}..{low + size} is out of bounds")
        weights = (size + 1 if size or escaped else 0) if explicit else min(size, 3)
        stored = bytes(reader.take(weights, "a symbol model's weights"))
        escape = None
        if escaped:
            weight, order = reader.take(2, "a symbol model's escape")
            if explicit and not weight:
                raise FormatError("a symbol model has an escape that never comes")
            escape = Escape(weight, order)
        return explicit_model(low, stored, escape) if explicit else symmetric_model(size, stored, escape)

    def costs(self, values: Integer[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
        """Bits of each integer, escapes with their raw bits; infinite where the model cannot code it."""
        with np.errstate(divide="ignore"):
            table = PRECISION - np.log2(self.frequencies)
        beyond = self.beyond(values)
        bits: np.ndarray = table[np.where(beyond > 0, 0, values - self.low)]
        raw = np.inf if self.order is None else table[-1] + escape_bits(np.maximum(beyond - 1, 0), self.order)
        return np.where(beyond > 0, raw, bits)

    def beyond(self, values: Integer[np.ndarray, "..."]) -> Integer[np.ndarray, "..."]:
        """How far each integer lies outside the alphabet: 0 inside, 1 next to it."""
        return np.asarray(np.maximum(np.maximum(values - self.high, self.low - values), 0))

    def cost(self, histogram: Histogram) -> float:
        """Bits of all the integers of a histogram."""
        return float(np.sum(self.costs(histogram.values) * histogram.counts))

    def bits(self, values: Integer[np.ndarray, "..."]) -> float:
        """Bits of the integers given."""
        return self.cost(Histogram.of(values))

    def price(self, radius: int, centre: int = 0) -> Float64[np.ndarray, " prices"]:
        """Bits of -radius..radius less `centre`, for a solver: 28 where the table has none."""
        costs = self.costs(np.arange(-radius - centre, radius - centre + 1))
        return np.where(np.isinf(costs), 2.0 * PRECISION, costs)


@dataclass(frozen=True)
class Escape:
    """The byte of an escape's weight and its Exp-Golomb order."""

    weight: int
    order: int

    def __post_init__(self) -> None:
        if self.order > MAX_ORDER:
            raise FormatError(f"an escape's order {self.order} is more than {MAX_ORDER}")


def symmetric_model(bound: int, stored: bytes, escape: Escape | None) -> SymbolModel:
    """The model of kind 0 with its bytes z, t, u, as many as are stored; FormatError where it has too many symbols."""
    z, t, u = stored + bytes((128, 0, 0))[len(stored) :]
    k, pairs = _distances()
    exponents = np.empty(2 * bound + 1 + (escape is not None), np.int64)
    tail = np.maximum(UNIT - k[:bound] * (4 * t * t) - pairs[:bound] * (u * u), 0, out=exponents[bound + 1 :][:bound])
    exponents[:bound] = tail[::-1]
    exponents[bound] = (z - 128) * (OCTAVE // 8) + UNIT
    if escape:
        exponents[-1] = (escape.weight - 128) * (OCTAVE // 8) + UNIT
    out = bytearray()
    append_varint(out, bound << 2 | (escape is not None) << 1)
    out += stored
    return _model(-bound, exponents, escape, out)


@cache
def _distances() -> tuple[np.ndarray, np.ndarray]:
    """k and k(k - 1)/2 of all that a symmetric model may have: models are small, and many."""
    k = np.arange(MAX_BOUND, dtype=np.int64)
    return k, k * (k - 1) // 2


def explicit_model(low: int, stored: bytes, escape: Escape | None) -> SymbolModel:
    """The model of kind 1 with a byte for each symbol from `low`, none for a single one without an escape.

    Raises FormatError where all are zero, or too many.
    """
    codes = np.frombuffer(stored + (bytes((escape.weight,)) if escape else b""), np.uint8).astype(np.int64)
    # A single symbol, which has no byte, is certain whatever its weight.
    exponents = np.where(codes > 0, 4 * OCTAVE + codes * (OCTAVE // 16), -1) if codes.size else np.zeros(1, np.int64)
    out = bytearray()
    append_varint(out, max(len(stored) - 1, 0) << 2 | (escape is not None) << 1 | 1)
    append_zigzag(out, low)
    out += stored
    return _model(low, exponents, escape, out)


def _model(low: int, exponents: np.ndarray, escape: Escape | None, code: bytearray) -> SymbolModel:
    code += bytes((escape.weight, escape.order)) if escape else b""
    return SymbolModel(low, frequencies(exponents), escape.order if escape else None, bytes(code))


def fit(histogram: Histogram) -> SymbolModel:
    """The model that codes the histogram in the fewest bits, its own bytes included, of those tried."""
    values, counts = histogram.values, histogram.counts
    if not values.size or (values.size == 1 and values[0] == 0):
        return symmetric_model(0, b"", None)
    # No table can beat the entropy, so a candidate whose own bytes exceed what is left to gain is not built.
    entropy = float(np.sum(counts * np.log2(counts.sum() / counts)))
    best, best_bits = None, np.inf
    for bound in _bounds(values, counts):
        inside = np.abs(values) <= bound
        kept, escaped = Histogram(values[inside], counts[inside]), Histogram(values[~inside], counts[~inside])
        for build, size in ((_fit_symmetric, 1 + min(bound, 3)), (_fit_explicit, 2 + int(np.count_nonzero(inside)))):
            if entropy + 8 * size >= best_bits:
                continue
            candidate = build(kept, escaped, bound)
            if candidate is not None:
                bits = 8 * len(candidate.code) + candidate.cost(histogram)
                if bits < best_bits:
                    best, best_bits = candidate, bits
    assert best is not None
    return best


def _bounds(values: np.ndarray, counts: np.ndarray) -> list[int]:
    """Bounds worth trying: none escaped, the rarest escaped, or all but zero."""
    magnitudes, place = np.unique(np.abs(values), return_inverse=True)
    beyond = np.cumsum(np.bincount(place, counts)[::-1])[::-1]
    total, largest = int(beyond[0]), int(magnitudes[-1])
    bounds = {largest}
    for few in (max(1, total >> 14), max(2, total >> 11)):
        kept = int(np.searchsorted(-beyond, -few))
        bounds.add(int(magnitudes[kept - 1]) if kept else 0)
    if largest > 255:
        bounds.add(0)
    return sorted(bounds, reverse=True)


def _fit_symmetric(kept: Histogram, escaped: Histogram, bound: int) -> SymbolModel | None:
    if bound > MAX_BOUND:
        return None
    counts = np.bincount(np.abs(kept.values), kept.counts, bound + 1)
    zeros, others, tails = float(counts[0]), float(counts[1:].sum()), float(escaped.counts.sum())
    # The mass of all others in units of w(1), which zero and escape are stored against; where there are none, of w(0).
    mass, t, u = 1.0, 0, 0
    if others:
        t, u, mass = _search_tail(counts[1:])
    z = _peak(zeros, mass, others) if bound else 128
    escape = None
    if tails:
        weight = _peak(tails, mass, others) if bound else _peak(tails, 1.0, zeros)
        escape = Escape(weight, _order(escaped, -bound, bound))
    try:
        return symmetric_model(bound, bytes((z, t, u)[: min(bound, 3)]), escape)
    except FormatError:
        return None


def _peak(count: float, mass: float, others: float) -> int:
    """The byte of a weight that is to w(1) as `count` times `mass` to `others`."""
    if not count or not others:
        return 255 if count else 0
    return int(np.clip(np.rint(128 + 8 * np.log2(count * mass / others)), 0, 255))


def _fit_explicit(kept: Histogram, escaped: Histogram, bound: int) -> SymbolModel | None:
    if not bound or kept.values[-1] - kept.values[0] > 2 * MAX_BOUND:
        return None
    low, high = int(kept.values[0]), int(kept.values[-1])
    tails = escaped.counts.sum()
    counts = np.zeros(high - low + 1)
    counts[kept.values - low] = kept.counts
    scale = 255 - 16 * np.log2(max(counts.max(), tails))
    with np.errstate(divide="ignore"):
        codes = np.where(counts > 0, np.clip(np.rint(16 * np.log2(counts) + scale), 1, 255), 0).astype(np.int64)
    escape = None
    if tails:
        weight = int(np.clip(np.rint(16 * np.log2(tails) + scale), 1, 255))
        escape = Escape(weight, _order(escaped, low, high))
    try:
        return explicit_model(low, bytes(codes.tolist()) if codes.size > 1 or escape else b"", escape)
    except FormatError:
        return None


def _order(escaped: Histogram, low: int, high: int) -> int:
    """The Exp-Golomb order that takes the fewest bits."""
    distances = np.where(escaped.values > high, escaped.values - high, low - escaped.values) - 1
    near = int(np.log2(np.sum(distances * escaped.counts) / escaped.counts.sum() + 1))
    orders = range(max(0, near - 2), min(MAX_ORDER, near + 1) + 1)
    return min(orders, key=lambda order: int(np.sum(escape_bits(distances, order) * escaped.counts)))


def _search_tail(counts: np.ndarray) -> tuple[int, int, float]:
    """The bytes t, u under which magnitudes 1, 2, ... are likeliest, and the mass of all in units of w(1).

    The cost is convex in the exponents, so a coarse grid and two finer ones around its best find it.
    """
    k = np.arange(counts.size, dtype=np.float64)
    moments = float(np.sum(counts)), float(np.sum(counts * k)), float(np.sum(counts * k * (k - 1) / 2))
    nodes = np.arange(0, 256, 16)
    t, u = _best_tail(nodes, nodes, _coarse_masses(counts.size), moments)
    for step in (4, 1):
        offsets = np.arange(-4, 5) * step
        near_t, near_u = np.clip(t + offsets, 0, 255), np.clip(u + offsets, 0, 255)
        t, u = _best_tail(near_t, near_u, _masses(near_t, near_u, counts.size), moments)
    return t, u, float(_masses(np.array([t]), np.array([u]), counts.size)[0, 0])


def _best_tail(
    t: np.ndarray, u: np.ndarray, masses: np.ndarray, moments: tuple[float, float, float]
) -> tuple[int, int]:
    total, first, second = moments
    bits = total * np.log2(masses) + (first * 4 / OCTAVE) * (t * t)[:, None] + (second / OCTAVE) * u * u
    row, column = divmod(int(bits.argmin()), u.size)
    return int(t[row]), int(u[column])


def _masses(t: np.ndarray, u: np.ndarray, bound: int) -> np.ndarray:
    """Twice the sum of w(k) / w(1) over k in 1..bound, for each t and u."""
    k = np.arange(bound, dtype=np.float64)
    linear, bent = (
        np.exp2((-4 / OCTAVE) * (t * t)[:, None] * k),
        np.exp2((-0.5 / OCTAVE) * (u * u)[:, None] * (k * (k - 1))),
    )
    return np.asarray(2 * np.einsum("tk,uk->tu", linear, bent))


@lru_cache(maxsize=64)
def _coarse_masses(bound: int) -> np.ndarray:
    return _masses(np.arange(0, 256, 16), np.arange(0, 256, 16), bound)
