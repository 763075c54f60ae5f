"""The decoder of `reference` as machine code, where there was a C compiler when this package was built."""

from collections.abc import Sequence
from ctypes import CDLL, byref, c_int, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from factorpack._shapes import Int32, Integer
from factorpack.coding.reference import TOTAL
from factorpack.errors import FormatError

if TYPE_CHECKING:
    from factorpack.coding.rans import Table

NAME = "_rans"
FUNCTION = "factorpack_decode_1"
"""With the version of what it takes: a library that was built of another is as none."""
MOST_CONTEXTS = 16
GOOD, WORDS_END = 0, 1
assert TOTAL < 1 << 16, "sums of frequencies are handed over in 16 bits"


@cache
def library() -> Any:
    """The function; None where it was not built."""
    for path in sorted(Path(__file__).parent.glob(f"{NAME}.*")):
        try:
            function = getattr(CDLL(str(path)), FUNCTION)
        except (OSError, AttributeError):
            continue
        function.restype = c_int
        function.argtypes = [
            c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p,
            c_size_t, c_void_p,
        ]  # fmt: skip
        return function
    return None


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
    told = library()(
        state.ctypes.data, state.size, word.ctypes.data, word.size, None if context is None else context.ctypes.data,
        starts.ctypes.data, offsets.ctypes.data, firsts.ctypes.data, len(tables), symbols.ctypes.data, count,
        byref(decoded),
    )  # fmt: skip
    if told == WORDS_END:
        raise FormatError(f"the coded words end after {decoded.value} of {count} symbols")
    if told != GOOD:
        raise FormatError("the coded words do not end where their symbols do")
    return symbols
