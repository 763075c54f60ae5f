"""Reading bytes that cannot be trusted, and the matching appenders.

varint: unsigned LEB128, seven bits a byte from the lowest, five bytes and 2^32 - 1 at most, no needless last
byte of zero. zigzag: the varint of 0, -1, 1, -2, ... counted from zero.
"""

from threading import Lock

from factorpack.errors import FormatError

VARINT_BYTES = 5
VARINT_LIMIT = 1 << 32


class Allowance:
    """The bytes of memory that what is decoded may still take.

    A stream of one symbol is as short for 2^32 integers as for one, so that a file's size alone bounds nothing.
    """

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._lock = Lock()

    def copy(self) -> "Allowance":
        """One that is spent by itself."""
        other = Allowance(self._size)
        other._left = self._left
        return other

    def spend(self, size: int, what: str) -> None:
        """Takes `size` bytes of it; FormatError, before anything is allocated, where they are not left."""
        with self._lock:
            self._left -= size
            spent = self._left < 0
        if spent:
            raise FormatError(
                f"{what} would take more memory than the {self._size:,} bytes allowed for a file of this size: where "
                f"you trust it, allow more with most_bytes"
            )


class Reader:
    """A position in a buffer; every read names what it wants, and FormatError says so where it is missing."""

    def __init__(self, data: bytes | bytearray | memoryview, allowance: Allowance | None = None) -> None:
        self._data = memoryview(data).cast("B")
        self._allowance = allowance
        self._position = 0
        self._booked = 0
        self.books: dict[str, int] = {}

    def book(self, part: str) -> None:
        """Charge the bytes read since the last booking to `part`, in `books`."""
        self.books[part] = self.books.get(part, 0) + self._position - self._booked
        self._booked = self._position

    def spend(self, size: int, what: str) -> None:
        """Takes `size` bytes of memory from the allowance, where there is one; FormatError where it does not hold."""
        if self._allowance is not None:
            self._allowance.spend(size, what)

    @property
    def remaining(self) -> int:
        """Bytes not yet read."""
        return len(self._data) - self._position

    def take(self, size: int, what: str) -> memoryview:
        """The next `size` bytes, not copied."""
        if not 0 <= size <= self.remaining:
            raise FormatError(f"{what}: {size} bytes are needed and {self.remaining} are left")
        self._position += size
        return self._data[self._position - size : self._position]

    def varint(self, what: str) -> int:
        """The next unsigned integer, below 2^32."""
        place = self._position
        # Most take one byte, and there are hundreds to a record.
        if place < len(self._data) and self._data[place] < 0x80:
            self._position = place + 1
            return self._data[place]
        value = 0
        for index in range(VARINT_BYTES):
            byte = self.take(1, what)[0]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                if byte == 0 and index:
                    raise FormatError(f"{what}: an integer is longer than it need be")
                if value >= VARINT_LIMIT:
                    break
                return value
        raise FormatError(f"{what}: an integer does not fit 32 bits")

    def zigzag(self, what: str) -> int:
        """The next signed integer, in -2^31..2^31 - 1."""
        value = self.varint(what)
        return value >> 1 ^ -(value & 1)


def append_varint(out: bytearray, value: int) -> None:
    """Append an unsigned integer below 2^32."""
    assert 0 <= value < VARINT_LIMIT
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def append_zigzag(out: bytearray, value: int) -> None:
    """Append a signed integer in -2^31..2^31 - 1."""
    append_varint(out, value << 1 if value >= 0 else ~value << 1 | 1)
