"""The coded stream, one symbol at a time in plain integers: slow, and the definition of what `rans` must write.

Interleaved rANS (Duda 2013, arXiv:1311.2540; lanes after Giesen 2014, arXiv:1402.3392). Symbol i lives in
lane i mod `lanes`; all lanes share one list of 16-bit words.

A table holds integer frequencies f that sum to 2^14; c is the sum of those before a symbol. To decode a
symbol from a lane's state x, which is at least 2^16 and less than 2^32:

    slot = x mod 2^14;  the symbol is the one with c <= slot < c + f;  x = f·(x div 2^14) + slot - c

Lanes are taken in steps: in a step each lane decodes one symbol (in the last step maybe only the first
lanes do), then the lanes with x < 2^16, in their order, each take one word: x = x·2^16 + word. The encoder
starts every lane at 2^16 and runs backwards, so the decoder ends there with no word left.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from factorpack.errors import FormatError

PRECISION = 14
TOTAL = 1 << PRECISION
LOWER = 1 << 16


def encode(
    symbols: Sequence[int], contexts: Sequence[int] | None, tables: Sequence[Sequence[int]], lanes: int
) -> tuple[list[int], list[int]]:
    """The lanes' states and the words; a context is the index of a symbol's table, None is table 0 for all."""
    starts = [[0, *accumulate(table)] for table in tables]
    states, words = [LOWER] * lanes, []
    for first in reversed(range(0, len(symbols), lanes)):
        # The words of a step are in the order of its lanes, so backwards the last lane comes first.
        for index in reversed(range(first, min(first + lanes, len(symbols)))):
            context = contexts[index] if contexts is not None else 0
            frequency, start = tables[context][symbols[index]], starts[context][symbols[index]]
            state = states[index - first]
            if state >= frequency << (32 - PRECISION):
                words.append(state & 0xFFFF)
                state >>= 16
            states[index - first] = (state // frequency << PRECISION) + start + state % frequency
    return states, words[::-1]


def decode(
    states: Sequence[int],
    words: Sequence[int],
    contexts: Sequence[int] | None,
    tables: Sequence[Sequence[int]],
    count: int,
) -> list[int]:
    """The `count` symbols. FormatError where the words run out, are left over or do not lead back to the start."""
    starts = [[0, *accumulate(table)] for table in tables]
    states, lanes, taken, symbols = list(states), len(states), 0, []
    for first in range(0, count, lanes):
        for index in range(first, min(first + lanes, count)):
            context = contexts[index] if contexts is not None else 0
            state = states[index - first]
            slot = state & (TOTAL - 1)
            symbol = bisect_right(starts[context], slot) - 1
            state = tables[context][symbol] * (state >> PRECISION) + slot - starts[context][symbol]
            if state < LOWER:
                if taken == len(words):
                    raise FormatError(f"the coded words end after {index} of {count} symbols")
                state = state << 16 | words[taken]
                taken += 1
            states[index - first] = state
            symbols.append(symbol)
    if taken != len(words) or any(state != LOWER for state in states):
        raise FormatError("the coded words do not end where their symbols do")
    return symbols
