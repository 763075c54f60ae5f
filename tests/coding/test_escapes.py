"""Escaped integers come back at the bits foretold."""

import numpy as np
import pytest

from factorpack.coding.escapes import MAX_ORDER, escape_bits, pack, unpack
from factorpack.errors import FormatError


@pytest.mark.parametrize("order", [0, 1, 5, MAX_ORDER])
def test_round_trip_and_predicted_bits(order):
    rng = np.random.default_rng(order)
    distances = np.append(rng.integers(0, 2 ** rng.integers(0, 25, 500)), [0, 1, 2**25])
    below = rng.integers(0, 2, distances.size)
    orders = np.full(distances.size, order)
    data = pack(distances, below, orders)
    back, signs = unpack(memoryview(data), orders)
    assert np.array_equal(back, distances)
    assert np.array_equal(signs, below)
    assert len(data) == -(-int(escape_bits(distances, order).sum()) // 8)


def test_orders_may_differ():
    distances, below, orders = np.array([0, 9, 1000, 3]), np.array([1, 0, 1, 0]), np.array([0, 3, 8, 1])
    back, signs = unpack(memoryview(pack(distances, below, orders)), orders)
    assert back.tolist() == distances.tolist()
    assert signs.tolist() == below.tolist()


def test_no_escapes_take_no_bytes():
    none = np.empty(0, np.int64)
    assert pack(none, none, none) == b""
    assert unpack(memoryview(b""), none)[0].size == 0


def test_the_bits_are_exp_golomb():
    # d = 4, order 1: D = 6 = 110 in binary, so q = 1: prefix 01, sign 1, digits 10.
    assert pack(np.array([4]), np.array([1]), np.array([1])) == bytes([0b01110000])


@pytest.mark.parametrize(
    ("data", "count", "why"),
    [
        (b"", 1, "0 of 1"),
        (b"\x00\x00", 1, "0 of 1"),
        (b"\xff", 0, "0 bits"),
        (b"\x80", 5, "1 of 5"),
        (b"\x81", 1, "2 bits"),
        (b"\x80\x00", 1, "2 bits"),
        (b"\x00\x00\x00\x00\x01" + b"\x00" * 8, 1, "out of bounds"),
    ],
)
def test_malformed_bits_are_refused(data, count, why):
    with pytest.raises(FormatError, match=why):
        unpack(memoryview(data), np.zeros(count, np.int64))
