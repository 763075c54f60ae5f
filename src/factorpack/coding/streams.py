"""Streams of integers: rows that share symbol models by magnitude, as bytes.

Letters: R rows, C columns of a matrix, K contexts.

Integers come row after row, so that a later version may let a context look at what is above and to the
left. A stream is

    byte    K - 1 in the low four bits; 16: rows have classes; 32: columns have; 64: there is a centre
    zigzag  the centre, where there is one; everything below codes integers less the centre
    classes of the rows, then of the columns, where they have: a byte b
        b in 1..4: each class in b bits, filled up with zeros to a byte
        b = 0: a stream of the classes as one row, which has one context itself
    models  K of them (`models`)
    coded   where a model has more than one symbol: varint 2·words, and 1 more where varint lanes follows
            as there are two or more; the states of the lanes (32 bits), the words (16 bits) (`reference`)
    escapes where a model has one: varint size and so many bytes (`escapes`)

All little-endian; in bytes of bits the highest bit comes first. The context of an integer is the sum of
its row's and its column's class, K - 1 at most; a class that is not stored is 0.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from factorpack._shapes import Float32, Int32, Integer
from factorpack.coding import escapes, rans
from factorpack.coding.escapes import escape_bits
from factorpack.coding.grouping import MAX_CONTEXTS, Grouping, Levels, Runs, Split, levels_of
from factorpack.coding.models import Histogram, SymbolModel, fit
from factorpack.coding.reader import Reader, append_varint, append_zigzag
from factorpack.errors import FormatError, MismatchError
from factorpack.factors import INTEGER_LIMIT

ROWS_CLASSED, COLUMNS_CLASSED, CENTRED = 16, 32, 64
# A lane starts with 16 bits that tell nothing and ends, on average, with 8 more.
LANE_BITS = 24.0
# What a nested stream takes at least beside its payload, so that most need not be planned.
NESTED_BITS = 56.0
# How much is looked at to find a centre, and which splits are fitted: so many, those estimated near the best.
SAMPLE = 1 << 14
CANDIDATES, NEAR, NEAR_BITS = 3, 1.002, 200


@dataclass(frozen=True)
class Bits:
    """What a stream costs, in bits."""

    header: float
    classes: float
    tables: float
    payload: float
    lanes: float
    escapes: float

    @property
    def total(self) -> float:
        return self.header + self.classes + self.tables + self.payload + self.lanes + self.escapes


@dataclass(frozen=True, eq=False)
class Prices:
    """Bits of an integer in its place.

    `bits` (K, 2·radius + 1) prices -radius..radius; the context of entry (r, c) is
    min(rows[r] + columns[c], K - 1), where `columns` is a single zero if they have no classes.
    """

    bits: Float32[np.ndarray, "K prices"]
    rows: Int32[np.ndarray, " R"]
    columns: Int32[np.ndarray, " C"]


@dataclass(frozen=True, eq=False)
class IntegerPlan:
    """All decisions of a stream, and the integers less `centre` that it holds. It predicts, prices and writes."""

    runs: Runs
    centre: int
    grouping: Grouping
    models: tuple[SymbolModel, ...]
    histograms: tuple[Histogram, ...]

    @cached_property
    def bits(self) -> Bits:
        """What `to_bytes` will take, from the tables that it uses."""
        symbols, raw = 0.0, 0
        for model, histogram in zip(self.models, self.histograms, strict=True):
            beyond = model.beyond(histogram.values)
            far = beyond > 0
            if model.order is not None:
                raw += int(np.sum(escape_bits(beyond[far] - 1, model.order) * histogram.counts[far]))
            symbols += model.cost(histogram)
        payload = symbols - raw
        return Bits(
            header=8.0 * len(self._header()),
            classes=sum((_class_bits(ids) for ids in self._classes()), 0.0),
            tables=8.0 * sum(len(model.code) for model in self.models),
            payload=payload,
            lanes=_lane_bits(payload, self._lanes(payload)),
            escapes=8.0 * (-(-raw // 8) + _varint_bytes(-(-raw // 8))) if self._escaping else 0.0,
        )

    def price(self, radius: int) -> Prices:
        """What each integer of -radius..radius costs in each context."""
        bits = np.stack([model.price(radius, self.centre) for model in self.models]).astype(np.float32)
        columns = np.zeros(1, np.int32) if self.grouping.columns is None else self.grouping.columns.astype(np.int32)
        return Prices(bits, self.grouping.rows.astype(np.int32), columns)

    def to_bytes(self) -> bytes:
        """The stream, as the module's docstring lays it out."""
        out = self._header()
        for ids in self._classes():
            _append_classes(out, ids)
        for model in self.models:
            out += model.code
        contexts = self.grouping.of_symbols(self.runs.lengths)
        symbols, raw = self._symbols(contexts)
        lanes = self._lanes(self.bits.payload)
        if lanes:
            tables = [model.table() for model in self.models]
            states, words = rans.encode(symbols, contexts, tables, lanes)
            append_varint(out, 2 * words.size + (lanes > 1))
            if lanes > 1:
                append_varint(out, lanes)
            out += states.astype("<u4").tobytes() + words.astype("<u2").tobytes()
        if self._escaping:
            append_varint(out, len(raw))
            out += raw
        return bytes(out)

    @property
    def _escaping(self) -> bool:
        return any(model.order is not None for model in self.models)

    def _lanes(self, payload: float) -> int:
        """0 where nothing is coded."""
        if not self.runs.values.size or all(model.certain for model in self.models):
            return 0
        return min(rans.lanes_for(payload), self.runs.values.size)

    def _classes(self) -> list[Integer[np.ndarray, " ids"]]:
        return [ids for ids in (self.grouping.rows, self.grouping.columns) if ids is not None and ids.any()]

    def _header(self) -> bytearray:
        columns = self.grouping.columns
        out = bytearray([len(self.models) - 1])
        out[0] |= ROWS_CLASSED * bool(self.grouping.rows.any())
        out[0] |= COLUMNS_CLASSED * bool(columns is not None and columns.any())
        if self.centre:
            out[0] |= CENTRED
            append_zigzag(out, self.centre)
        return out

    def _symbols(self, contexts: Integer[np.ndarray, " count"] | None) -> tuple[Int32[np.ndarray, " count"], bytes]:
        """The integers with escapes in place of those outside their alphabet, and those as bytes."""
        values = self.runs.values
        if not self._escaping:
            return values, b""
        lows = np.array([model.low for model in self.models])
        highs = np.array([model.high for model in self.models])
        # Few are out of the narrowest alphabet; only those are looked at in their context.
        places = np.flatnonzero((values < lows.max()) | (values > highs.min()))
        context = np.zeros(places.size, np.int64) if contexts is None else contexts[places].astype(np.int64)
        far = (values[places] < lows[context]) | (values[places] > highs[context])
        places, context = places[far], context[far]
        symbols = values.copy()
        symbols[places] = highs[context] + 1
        outside, low, high = values[places].astype(np.int64), lows[context], highs[context]
        below = outside < low
        distances = np.where(below, low - outside, outside - high) - 1
        orders = np.array([model.order or 0 for model in self.models])
        return symbols, escapes.pack(distances, below.astype(np.int64), orders[context])


def plan_integers(matrix: Int32[np.ndarray, "R C"]) -> IntegerPlan:
    """Decide how a matrix of integers in ±2^24 is coded; MismatchError where one lies outside."""
    rows, columns = matrix.shape
    runs = Runs(np.ascontiguousarray(matrix).reshape(-1), np.full(rows, columns), columns)
    return _plan(runs)


def plan_runs(values: Int32[np.ndarray, " count"], lengths: Integer[np.ndarray, " R"]) -> IntegerPlan:
    """As `plan_integers` for rows of different lengths, one after another in `values`."""
    if int(lengths.sum()) != values.size or (lengths < 0).any():
        raise MismatchError(f"rows of {int(lengths.sum())} integers in all do not cut up {values.size} of them")
    return _plan(Runs(values, lengths.astype(np.int64), 0))


def encode_integers(matrix: Int32[np.ndarray, "R C"]) -> bytes:
    """The stream of a matrix of integers in ±2^24."""
    return plan_integers(matrix).to_bytes()


def encode_runs(values: Int32[np.ndarray, " count"], lengths: Integer[np.ndarray, " R"]) -> bytes:
    """The stream of rows of different lengths."""
    return plan_runs(values, lengths).to_bytes()


def decode_integers(reader: Reader, shape: tuple[int, int]) -> Int32[np.ndarray, "R C"]:
    """The matrix whose stream starts at the reader's position; FormatError where it is malformed.

    A stream of one symbol is as short for a large matrix as for a small one: the reader's allowance bounds memory.
    """
    rows, columns = shape
    reader.spend(8 * rows, "a stream's rows")
    return _decode(reader, np.full(rows, columns), columns).reshape(shape)


def decode_runs(reader: Reader, lengths: Integer[np.ndarray, " R"]) -> Int32[np.ndarray, " count"]:
    """The rows, one after another, whose stream starts at the reader's position; FormatError as above."""
    return _decode(reader, lengths.astype(np.int64), 0)


def _plan(runs: Runs) -> IntegerPlan:
    values = runs.values
    if values.size and max(int(values.max()), -int(values.min())) > INTEGER_LIMIT:
        raise MismatchError(f"integers {values.min()}..{values.max()} lie outside ±{INTEGER_LIMIT}")
    centre = _centre(values)
    if centre:
        runs = Runs(values - np.int32(centre), runs.lengths, runs.columns)
    levels = levels_of(runs)
    # An estimate may err: the one without classes, which comes first, is always tried, others where they are near.
    splits = list(levels.splits())
    estimates = [levels.estimate(split) for split in splits]
    order = sorted(range(len(splits)), key=estimates.__getitem__)[:CANDIDATES]
    near = {0} | {index for index in order if estimates[index] <= NEAR * estimates[order[0]] + NEAR_BITS}
    likely = [splits[index] for index in sorted(near)]
    plans = [_planned(runs, centre, levels, split) for split in likely]
    return min(plans, key=lambda plan: plan.bits.total)


def _planned(runs: Runs, centre: int, levels: Levels, split: Split) -> IntegerPlan:
    histograms = tuple(levels.histograms(split))
    return IntegerPlan(runs, centre, levels.grouping(split), tuple(fit(each) for each in histograms), histograms)


def _centre(values: Int32[np.ndarray, " count"]) -> int:
    """What to subtract from all integers, judged on some of them: nothing, their median or the middle of the range."""
    if not values.size:
        return 0
    sample = values[:: max(1, values.size // SAMPLE)]
    median = int(np.median(sample))
    if not median:
        return 0

    def cost(centre: int) -> float:
        histogram = Histogram.of(sample - np.int32(centre))
        model = fit(histogram)
        return model.cost(histogram) * values.size / sample.size + 8 * len(model.code) + 16 * bool(centre)

    return min((0, median, (int(values.min()) + int(values.max())) // 2), key=cost)


def _varint_bytes(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _lane_bits(payload: float, lanes: int) -> float:
    """What the states, and whole words, take beyond the payload, and the counts of both."""
    if not lanes:
        return 0.0
    # A lane's state grows from 16 to 32 bits before it gives up words; where there is one lane, that is exact.
    start = LANE_BITS * lanes if lanes > 1 else 32 + 16 * (payload // 16) - payload
    return start + 8 * (_varint_bytes(int(payload / 8)) + (_varint_bytes(lanes) if lanes > 1 else 0))


def _nested(ids: Integer[np.ndarray, " ids"]) -> IntegerPlan | None:
    """The stream of classes, a single row, which gets a single context; None where packed bits are shorter."""
    packed = 8.0 * -(-ids.size * int(ids.max()).bit_length() // 8)
    counts = np.bincount(ids)
    entropy = float(np.sum(counts * np.log2(ids.size / np.maximum(counts, 1))))
    if packed <= entropy + NESTED_BITS:
        return None
    plan = plan_runs(ids.astype(np.int32), np.array([ids.size]))
    return plan if plan.bits.total < packed else None


def _class_bits(ids: Integer[np.ndarray, " ids"]) -> float:
    nested = _nested(ids)
    return 8.0 + (nested.bits.total if nested else 8 * -(-ids.size * int(ids.max()).bit_length() // 8))


def _append_classes(out: bytearray, ids: Integer[np.ndarray, " ids"]) -> None:
    nested = _nested(ids)
    if nested:
        out.append(0)
        out += nested.to_bytes()
    else:
        width = int(ids.max()).bit_length()
        out.append(width)
        out += np.packbits(np.unpackbits(ids[:, None], axis=1)[:, 8 - width :]).tobytes()


def _decode(
    reader: Reader, lengths: Integer[np.ndarray, " R"], columns: int, nested: bool = False
) -> Int32[np.ndarray, " count"]:
    count = int(lengths.sum())
    reader.spend(4 * count, "a stream's integers")
    flags = reader.take(1, "a stream's head")[0]
    contexts = (flags & 15) + 1
    known = CENTRED if nested else CENTRED | ROWS_CLASSED | (COLUMNS_CLASSED if columns else 0) | MAX_CONTEXTS - 1
    if flags & ~known:
        raise FormatError(f"a stream's head {flags} is unknown, or does not fit its place")
    centre = reader.zigzag("a stream's centre") if flags & CENTRED else 0
    rows = np.zeros(lengths.size, np.uint8)
    if flags & ROWS_CLASSED:
        rows = _read_classes(reader, lengths.size, contexts)
    column_classes = _read_classes(reader, columns, contexts) if flags & COLUMNS_CLASSED else None
    grouping = Grouping(rows, column_classes, contexts)
    models = [SymbolModel.from_bytes(reader) for _ in range(contexts)]
    reader.book("tables")
    symbol_contexts = grouping.of_symbols(lengths)
    values = _read_symbols(reader, symbol_contexts, models, count)
    if any(model.order is not None for model in models):
        _read_escapes(reader, symbol_contexts, models, values)
    low, high = (int(values.min()) + centre, int(values.max()) + centre) if count else (0, 0)
    if max(high, -low, abs(centre)) > INTEGER_LIMIT:
        raise FormatError(f"a stream's integers {low}..{high} lie outside ±{INTEGER_LIMIT}")
    if centre:
        values += np.int32(centre)
    return values


def _read_classes(reader: Reader, count: int, contexts: int) -> Integer[np.ndarray, " count"]:
    width = reader.take(1, "the classes' width")[0]
    if width > 4:
        raise FormatError(f"classes of {width} bits are unknown")
    if width == 0:
        ids = _decode(reader, np.array([count]), 0, nested=True)
    else:
        data = np.frombuffer(reader.take(-(-count * width // 8), "the classes"), np.uint8)
        bits = np.unpackbits(data)
        if bits[count * width :].any():
            raise FormatError("the classes are followed by bits that are not zero")
        ids = bits[: count * width].reshape(count, width) @ (1 << np.arange(width)[::-1])
    if count and (ids.min() < 0 or ids.max() >= contexts):
        raise FormatError(f"a class lies outside the {contexts} contexts")
    return ids.astype(np.uint8)


def _read_symbols(
    reader: Reader, contexts: Integer[np.ndarray, " count"] | None, models: list[SymbolModel], count: int
) -> Int32[np.ndarray, " count"]:
    """The integers, escapes as the symbol after the highest."""
    if not count or all(model.certain for model in models):
        only = np.array([model.low + int(model.frequencies.argmax()) for model in models], np.int32)
        return only[contexts] if contexts is not None else np.full(count, only[0])
    head = reader.varint("a stream's words")
    words, lanes = head >> 1, reader.varint("a stream's lanes") if head & 1 else 1
    if not 1 + (head & 1) <= lanes <= count:
        raise FormatError(f"{lanes} lanes for {count} symbols")
    states = np.frombuffer(reader.take(4 * lanes, "the lanes' states"), "<u4")
    coded = np.frombuffer(reader.take(2 * words, "the coded words"), "<u2")
    return rans.decode(states, coded, contexts, [model.table() for model in models], count)


def _read_escapes(
    reader: Reader,
    contexts: Integer[np.ndarray, " count"] | None,
    models: list[SymbolModel],
    values: Int32[np.ndarray, " count"],
) -> None:
    """Put the escaped integers in the place of their symbols."""
    lows = np.array([model.low for model in models])
    # No symbol is as large as this, so that nothing equals it where there are no escapes.
    marks = np.array([model.high + 1 if model.order is not None else 2**31 - 1 for model in models])
    # A Python integer: NumPy widens all values to compare them with one of its own.
    places = np.flatnonzero(values >= int(marks.min()))
    context = np.zeros(places.size, np.int64) if contexts is None else contexts[places].astype(np.int64)
    escaped = values[places] == marks[context]
    places, context = places[escaped], context[escaped]
    orders = np.array([model.order or 0 for model in models])
    data = reader.take(reader.varint("the escapes' size"), "the escapes")
    distances, below = escapes.unpack(data, orders[context])
    values[places] = np.where(below == 1, lows[context] - 1 - distances, marks[context] + distances)
