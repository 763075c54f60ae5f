"""Interleaved rANS over static integer tables, a step of all lanes at a time; `reference` defines the stream.

Decoding is machine code where that was built (`compiled`). Elsewhere it costs five to ten microseconds a step almost
whatever the lanes, so that speed is a matter of lanes, and a lane costs four bytes. Streams of a few lanes are handed
to the reference, which is then the faster one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from factorpack._shapes import Int32, Integer
from factorpack.coding import compiled, reference
from factorpack.coding.reference import LOWER, PRECISION, TOTAL
from factorpack.errors import FactorpackError, FormatError, MismatchError

# 800 bytes a lane: states take half a percent of the payload; more than 2048 lanes decode hardly faster.
MAX_LANES = 2048
BYTES_PER_LANE = 800
FEW_LANES = 16
STEPS_AT_ONCE = 64

_PRECISION, _SLOT, _LOWER = np.array(PRECISION), np.array(TOTAL - 1), np.array(LOWER)
_WORD, _WORD_BITS = np.array(0xFFFF), np.array(16)


@dataclass(frozen=True, eq=False)
class Table:
    """Frequencies of the symbols `first`, `first` + 1, ...: integers that sum to 2^14, zero for an absent symbol.

    Raises FormatError where they do not.
    """

    frequencies: Int32[np.ndarray, " symbols"]
    first: int = 0

    def __post_init__(self) -> None:
        if self.frequencies.ndim != 1 or not self.frequencies.size or self.frequencies.min() < 0:
            raise FormatError("a table of frequencies is empty or holds negative ones")
        if int(self.frequencies.sum(dtype=np.int64)) != TOTAL:
            raise FormatError(f"a table's frequencies sum to {self.frequencies.sum(dtype=np.int64)}, not {TOTAL}")


def lanes_for(bits: float) -> int:
    """How many lanes a payload of so many bits gets: their states are half a percent of it at most, one lane apart."""
    return max(1, min(MAX_LANES, int(bits / 8) // BYTES_PER_LANE))


def encode(
    symbols: Int32[np.ndarray, " count"],
    contexts: Integer[np.ndarray, " count"] | None,
    tables: Sequence[Table],
    lanes: int,
) -> tuple[Integer[np.ndarray, " lanes"], Integer[np.ndarray, " words"]]:
    """The lanes' states (uint32) and the words (uint16).

    `contexts` holds the index of each symbol's table; None is table 0 for all. Every symbol must be in its
    table. Raises MismatchError where contexts, tables and lanes do not fit the symbols.
    """
    _check_contexts(contexts, tables, symbols.size, MismatchError)
    if not 1 <= lanes <= max(1, symbols.size):
        raise MismatchError(f"{symbols.size} symbols cannot be coded in {lanes} lanes")
    if lanes >= FEW_LANES:
        return encode_lanes(symbols, contexts, tables, lanes)
    firsts = np.array([table.first for table in tables])
    plain = symbols - (firsts[0] if contexts is None else firsts[contexts])
    plain_contexts = None if contexts is None else contexts.tolist()
    states, words = reference.encode(plain.tolist(), plain_contexts, _plain(tables), lanes)
    return np.array(states, np.uint32), np.array(words, np.uint16)


def decode(
    states: Integer[np.ndarray, " lanes"],
    words: Integer[np.ndarray, " words"],
    contexts: Integer[np.ndarray, " count"] | None,
    tables: Sequence[Table],
    count: int,
) -> Int32[np.ndarray, " count"]:
    """The `count` symbols that `encode` was given.

    Raises FormatError where the states, the words and the tables do not belong together.
    """
    _check_contexts(contexts, tables, count, FormatError)
    if not states.size or int(states.min()) < LOWER:
        raise FormatError("a lane's state lies below 2^16, or there is no lane")
    if len(tables) <= compiled.MOST_CONTEXTS and compiled.library() is not None:
        return compiled.decode(states, words, contexts, tables, count)
    if states.size >= FEW_LANES:
        return decode_lanes(states, words, contexts, tables, count)
    plain = None if contexts is None else contexts.tolist()
    symbols = np.array(reference.decode(states.tolist(), words.tolist(), plain, _plain(tables), count), np.int32)
    firsts = np.array([table.first for table in tables], np.int32)
    return np.asarray(symbols + (firsts[0] if contexts is None else firsts[contexts]))


def encode_lanes(
    symbols: Int32[np.ndarray, " count"],
    contexts: Integer[np.ndarray, " count"] | None,
    tables: Sequence[Table],
    lanes: int,
) -> tuple[Integer[np.ndarray, " lanes"], Integer[np.ndarray, " words"]]:
    """`encode` for many lanes, unchecked."""
    sizes = np.array([table.frequencies.size for table in tables])
    offsets = np.cumsum(sizes) - sizes - np.array([table.first for table in tables])
    frequencies = np.concatenate([table.frequencies for table in tables]).astype(np.int64)
    starts = np.concatenate([np.cumsum(table.frequencies, dtype=np.int64) - table.frequencies for table in tables])
    state = np.full(lanes, LOWER, np.int64)
    chunks: list[np.ndarray] = []
    for begin in reversed(range(0, symbols.size, lanes * STEPS_AT_ONCE)):
        block = slice(begin, begin + lanes * STEPS_AT_ONCE)
        index = symbols[block] + (offsets[0] if contexts is None else offsets[contexts[block]])
        frequency, start = frequencies[index], starts[index]
        assert frequency.min() > 0, "a symbol is not in its table"
        for first in reversed(range(0, index.size, lanes)):
            step = slice(first, first + lanes)
            f = frequency[step]
            x = state[: f.size]
            full = np.flatnonzero(x >= f << (32 - PRECISION))
            if full.size:
                high = x[full]
                chunks.append(high.astype(np.uint16))
                x[full] = high >> 16
            # (x // f << 14) + c + x % f, with one division.
            x += x // f * (TOTAL - f)
            x += start[step]
    chunks.append(np.empty(0, np.uint16))
    return state.astype(np.uint32), np.concatenate(chunks[::-1])


def decode_lanes(
    states: Integer[np.ndarray, " lanes"],
    words: Integer[np.ndarray, " words"],
    contexts: Integer[np.ndarray, " count"] | None,
    tables: Sequence[Table],
    count: int,
) -> Int32[np.ndarray, " count"]:
    """`decode` for many lanes; contexts and states are taken as checked.

    Slots are kept for a block of steps and turned into symbols at its end. A step is a dozen calls whose
    fixed cost counts, hence results in place and operands that NumPy need not convert.
    """
    lanes = states.size
    slot_symbols, slot_steps = _slots(tables)
    state, feed, taken = states.astype(np.int64), words.astype(np.int64), 0
    symbols = np.empty(count, np.int32)
    slots = np.empty(min(lanes * STEPS_AT_ONCE, count), np.int64)
    bases = np.zeros(slots.size, np.int64)
    packed, factor, short = np.empty(lanes, np.int64), np.empty(lanes, np.int64), np.empty(lanes, np.bool_)
    for begin in range(0, count, lanes * STEPS_AT_ONCE):
        size = min(slots.size, count - begin)
        if contexts is not None:
            np.multiply(contexts[begin : begin + size], TOTAL, out=bases[:size], dtype=np.int64)
        for first in range(0, size, lanes):
            slot, base = slots[first : first + lanes], bases[first : first + lanes]
            x = state
            if size - first < lanes:
                active = slice(size - first)
                x, slot, base = state[active], slot[active], base[active]
                packed, factor, short = packed[active], factor[active], short[active]
            np.bitwise_and(x, _SLOT, out=slot)
            if contexts is not None:
                np.bitwise_or(slot, base, out=slot)
            slot_steps.take(slot, out=packed, mode="wrap")
            np.right_shift(x, _PRECISION, out=x)
            np.bitwise_and(packed, _WORD, out=factor)
            np.multiply(x, factor, out=x)
            np.right_shift(packed, _WORD_BITS, out=packed)
            np.add(x, packed, out=x)
            needy = np.less(x, _LOWER, out=short).nonzero()[0]
            if needy.size:
                chunk = feed[taken : taken + needy.size]
                if chunk.size < needy.size:
                    raise FormatError(f"the coded words end after {begin + first} of {count} symbols")
                x[needy] = x[needy] << _WORD_BITS | chunk
                taken += needy.size
        slot_symbols.take(slots[:size], out=symbols[begin : begin + size], mode="wrap")
    if taken != feed.size or np.any(state != LOWER):
        raise FormatError("the coded words do not end where their symbols do")
    return symbols


def _slots(tables: Sequence[Table]) -> tuple[np.ndarray, np.ndarray]:
    """For each slot of each table its symbol (int32), and f | (slot - c) << 16.

    One look-up costs less than two; int64 because NumPy would copy any other index or mixed operand.
    """
    symbols, steps = [], []
    for table in tables:
        f = table.frequencies.astype(np.int64)
        index = np.repeat(np.arange(f.size), f)
        symbols.append((index + table.first).astype(np.int32))
        steps.append(f[index] | (np.arange(TOTAL) - (np.cumsum(f) - f)[index]) << 16)
    return np.concatenate(symbols), np.concatenate(steps)


def _check_contexts(
    contexts: np.ndarray | None, tables: Sequence[Table], count: int, error: type[FactorpackError]
) -> None:
    if contexts is not None and contexts.shape != (count,):
        raise error(f"{count} symbols have contexts of shape {contexts.shape}")
    highest = 0 if contexts is None or not count else int(contexts.max())
    if highest >= len(tables) or (contexts is not None and count and int(contexts.min()) < 0):
        raise error(f"a context {highest} has no table, there are {len(tables)}")


def _plain(tables: Sequence[Table]) -> list[list[int]]:
    return [table.frequencies.tolist() for table in tables]
