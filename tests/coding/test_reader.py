"""Integers come back, and nothing but the shortest spelling is read."""

import pytest

from factorpack.coding.reader import Reader, append_varint, append_zigzag
from factorpack.errors import FormatError

EDGES = [0, 1, 127, 128, 300, 2**14 - 1, 2**14, 2**31, 2**32 - 1]


@pytest.mark.parametrize("value", EDGES)
def test_varints_come_back(value):
    out = bytearray()
    append_varint(out, value)
    reader = Reader(out)
    assert reader.varint("it") == value
    assert reader.remaining == 0
    assert len(out) == max(1, -(-value.bit_length() // 7))


@pytest.mark.parametrize("value", [0, -1, 1, -64, 64, 2**31 - 1, -(2**31)])
def test_zigzags_come_back(value):
    out = bytearray()
    append_zigzag(out, value)
    assert Reader(out).zigzag("it") == value


def test_small_magnitudes_take_one_byte():
    for value in range(-64, 64):
        out = bytearray()
        append_zigzag(out, value)
        assert len(out) == 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "1 bytes are needed and 0 are left"),
        (b"\x80\x80", "are left"),
        (b"\x80\x00", "longer"),
        (b"\xff\xff\xff\xff\x10", "32 bits"),
        (b"\xff\xff\xff\xff\xff\x01", "32 bits"),
    ],
)
def test_malformed_varints_are_named(data, why):
    with pytest.raises(FormatError, match=f"the size: .*{why}"):
        Reader(data).varint("the size")


def test_take_never_reads_beyond():
    reader = Reader(b"abcdef")
    assert bytes(reader.take(2, "two")) == b"ab"
    assert reader.remaining == 4
    for size in (5, -1, 2**40):
        with pytest.raises(FormatError, match=f"more: {size} bytes"):
            reader.take(size, "more")
    assert bytes(reader.take(4, "rest")) == b"cdef"
