"""The raw bits of integers outside their alphabet: Exp-Golomb with all prefixes before all digits.

An integer d = 0, 1, ... beyond the alphabet is coded with an order g: D = d + 2^g has g + q + 1 binary
digits. First come q zeros and a one for every integer, then for every integer a sign bit (1: below the
alphabet) and the last g + q digits of D. Kept apart like this, neither part has to be read bit by bit.
"""

import numpy as np

from factorpack._shapes import Integer
from factorpack.errors import FormatError

MAX_ORDER = 24
MAX_DIGITS = 27


def escape_bits(
    distances: Integer[np.ndarray, "..."], order: int | Integer[np.ndarray, "..."]
) -> Integer[np.ndarray, "..."]:
    """Bits of each integer d beyond an alphabet."""
    bits: np.ndarray = 2 * _prefix(distances, order) + order + 2
    return bits


def _prefix(distances: np.ndarray, order: int | np.ndarray) -> np.ndarray:
    """q of each: exact, for frexp counts the binary digits of what float64 holds."""
    return np.asarray(
        np.frexp((distances + (1 << np.asarray(order))).astype(np.float64))[1].astype(np.int64) - 1 - order
    )


def pack(
    distances: Integer[np.ndarray, " escapes"],
    below: Integer[np.ndarray, " escapes"],
    orders: Integer[np.ndarray, " escapes"],
) -> bytes:
    """The bits of escaped integers, filled up with zeros to a byte."""
    prefix = _prefix(distances, orders)
    ends = np.cumsum(prefix + 1)
    widths = prefix + orders + 1
    starts = np.cumsum(widths) - widths + (int(ends[-1]) if ends.size else 0)
    bits = np.zeros(int(np.sum(prefix + 1 + widths)), np.uint8)
    bits[ends - 1] = 1
    bits[starts] = below
    digits = distances + (1 << orders)
    for place in range(int(widths.max(initial=1)) - 1):
        wide = widths > place + 1
        bits[(starts + widths - 1 - place)[wide]] = digits[wide] >> place & 1
    return np.packbits(bits).tobytes()


def unpack(
    data: memoryview, orders: Integer[np.ndarray, " escapes"]
) -> tuple[Integer[np.ndarray, " escapes"], Integer[np.ndarray, " escapes"]]:
    """Distances and signs of as many escaped integers as there are `orders`.

    Raises FormatError where the bits are too few, too many or name an integer out of bounds.
    """
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    ends = np.flatnonzero(bits)[: orders.size] + 1
    if ends.size < orders.size:
        raise FormatError(f"the escapes end after {ends.size} of {orders.size} prefixes")
    prefix = np.diff(ends, prepend=0) - 1
    widths = prefix + orders + 1
    if widths.max(initial=0) > MAX_DIGITS:
        raise FormatError("an escape is out of bounds")
    starts = np.cumsum(widths) - widths + (int(ends[-1]) if ends.size else 0)
    used = int(np.sum(prefix + 1 + widths))
    if -(-used // 8) != len(data) or bits[used:].any():
        raise FormatError(f"the escapes take {used} bits and {len(data)} bytes are given")
    digits = np.ones(orders.size, np.int64)
    for place in range(1, int(widths.max(initial=1))):
        wide = widths > place
        digits[wide] = digits[wide] << 1 | bits[starts[wide] + place]
    return digits - (1 << orders), bits[starts].astype(np.int64)
