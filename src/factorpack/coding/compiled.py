"""Decoding and frequencies as machine code, where there was a C compiler when this package was built."""

from collections.abc import Sequence
from ctypes import CDLL, byref, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from factorpack._shapes import Int32, Int64, Integer
from factorpack.coding.reference import TOTAL
from factorpack.errors import FormatError

if TYPE_CHECKING:
    from factorpack.coding.rans import Table

NAME = "_rans"
DECODE, FREQUENCIES = "factorpack_decode_1", "factorpack_frequencies_1"
"""With the versions of what they take: a library that was built of others is as none."""
MOST_CONTEXTS = 16
GOOD, WORDS_END = 0, 1
NO_SYMBOL = 1
assert TOTAL < 1 << 16, "sums of frequencies are handed over in 16 bits"


class Library(NamedTuple):
    """The two functions of rans.c."""

    decode: Any
    frequencies: Any


@cache
def library() -> Library | None:
    """The functions; None where they were not built."""
    for path in sorted(Path(__file__).parent.glob(f"{NAME}.*")):
        try:
            found = CDLL(str(path))
            functions = Library(getattr(found, DECODE), getattr(found, FREQUENCIES))
        except (OSError, AttributeError):
            continue
        functions.decode.restype = functions.frequencies.restype = c_int
        functions.decode.argtypes = [
            c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p,
            c_size_t, c_void_p,
        ]  # fmt: skip
        functions.frequencies.argtypes = [c_void_p, c_size_t, c_void_p, c_void_p]
        return functions
    return None


def frequencies(
    exponents: Int64[np.ndarray, " symbols"], octave: Int64[np.ndarray, " entries"]
) -> Int32[np.ndarray, " symbols"]:
    """As `models.frequencies`; `exponents` are used up."""
    functions = library()
    assert functions is not None
    found = np.empty(exponents.size, np.int32)
    told = functions.frequencies(exponents.ctypes.data, exponents.size, octave.ctypes.data, found.ctypes.data)
    if told == NO_SYMBOL:
        raise FormatError("a symbol model has no symbol")
    if told != GOOD:
        raise FormatError("a symbol model has too many symbols for its precision")
    return found


def decode(
    states: Integer[np.ndarray, " lanes"],
    words: Integer[np.ndarray, " words"],
    contexts: Integer[np.ndarray, " count"] | None,
    tables: Sequence["Table"],
    count: int,
) -> Int32[np.ndarray, " count"]:
    """As `rans.decode`, unchecked, of at most `MOST_CONTEXTS` tables."""
    assert len(tables) <= MOST_CONTEXTS
    sizes = np.array([table.frequencies.size + 1 for table in tables], np.int64)
    offsets = np.cumsum(sizes) - sizes
    frequencies = np.zeros(int(sizes.sum()), np.int64)
    for table, offset, size in zip(tables, offsets.tolist(), sizes.tolist(), strict=True):
        frequencies[offset + 1 : offset + size] = table.frequencies
    # Each table's sum is TOTAL, so that one sum over all of them does.
    starts = (np.cumsum(frequencies) - np.repeat(TOTAL * np.arange(len(tables)), sizes)).astype(np.uint16)
    firsts = np.array([table.first for table in tables], np.int32)
    state = np.array(states, np.uint32)
    # In a file they may lie at an odd address.
    word = np.require(words, np.uint16, ["C", "A"])
    context = None if contexts is None else np.require(contexts, np.uint8, ["C"])
    symbols = np.empty(count, np.int32)
    decoded = c_size_t()
    functions = library()
    assert functions is not None
    told = functions.decode(
        state.ctypes.data, state.size, word.ctypes.data, word.size, None if context is None else context.ctypes.data,
        starts.ctypes.data, offsets.ctypes.data, firsts.ctypes.data, len(tables), symbols.ctypes.data, count,
        byref(decoded),
    )  # fmt: skip
    if told == WORDS_END:
        raise FormatError(f"the coded words end after {decoded.value} of {count} symbols")
    if told != GOOD:
        raise FormatError("the coded words do not end where their symbols do")
    return symbols
