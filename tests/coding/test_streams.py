"""Every matrix comes back, costs what was foretold, and a damaged stream is refused."""

import numpy as np
import pytest

from factorpack.coding import (
    Reader,
    decode_integers,
    decode_runs,
    encode_integers,
    encode_runs,
    plan_integers,
    plan_runs,
)
from factorpack.errors import FormatError, MismatchError
from factorpack.factors import INTEGER_LIMIT


def rounded(values):
    return np.clip(np.rint(values), -INTEGER_LIMIT, INTEGER_LIMIT).astype(np.int32)


def scaled(rng, rows, columns, row_octaves=0.0, column_octaves=0.0):
    rows_scale = np.exp2(rng.normal(0, row_octaves, (rows, 1)))
    return rounded(rng.laplace(0, 1, (rows, columns)) * rows_scale * np.exp2(rng.normal(0, column_octaves, columns)))


CASES = {
    "zeros": lambda _: np.zeros((30, 40), np.int32),
    "constant": lambda _: np.full((30, 40), -7, np.int32),
    "large constant": lambda _: np.full((300, 400), INTEGER_LIMIT, np.int32),
    "one zero": lambda _: np.zeros((1, 1), np.int32),
    "one": lambda _: np.full((1, 1), 12345, np.int32),
    "no rows": lambda _: np.zeros((0, 4), np.int32),
    "no columns": lambda _: np.zeros((4, 0), np.int32),
    "ternary": lambda rng: rng.integers(-1, 2, (64, 27)).astype(np.int32),
    "sparse": lambda rng: scaled(rng, 100, 100) * (rng.random((100, 100)) < 0.02),
    "plain": lambda rng: scaled(rng, 64, 36),
    "rows": lambda rng: scaled(rng, 128, 100, 1.5),
    "columns": lambda rng: scaled(rng, 128, 100, 0.0, 1.5),
    "both": lambda rng: scaled(rng, 200, 150, 1.0, 1.0),
    "dead rows": lambda rng: scaled(rng, 128, 100, 0.5) * (rng.random((128, 1)) < 0.5),
    "heavy tails": lambda rng: rounded(rng.standard_cauchy((100, 100))),
    "huge": lambda rng: rng.integers(-INTEGER_LIMIT, INTEGER_LIMIT + 1, (40, 30)).astype(np.int32),
    "all escaped": lambda rng: rng.choice([-1, 1], (40, 30)) * rng.integers(2**20, 2**24, (40, 30), dtype=np.int32),
    "indices": lambda rng: rng.integers(0, 256, (1, 9000)).astype(np.int32),
    "positions": lambda _: np.arange(512, dtype=np.int32)[None],
    "centred far away": lambda rng: rounded(rng.normal(5000, 3, (50, 60))),
    "one symbol and one more": lambda _: np.eye(1, 5000, 77, dtype=np.int32),
    "many lanes": lambda rng: scaled(rng, 300, 400, 1.0),
}


@pytest.fixture(params=CASES)
def matrix(request):
    return CASES[request.param](np.random.default_rng(0)).astype(np.int32)


def assert_predicted(plan, data):
    assert abs(plan.bits.total - 8 * len(data)) <= 0.003 * 8 * len(data) + 64


def test_every_matrix_comes_back_at_the_bits_foretold(matrix):
    plan = plan_integers(matrix)
    data = plan.to_bytes()
    reader = Reader(data + b"what follows")
    back = decode_integers(reader, matrix.shape)
    assert back.dtype == np.int32
    assert np.array_equal(back, matrix)
    assert reader.remaining == len(b"what follows")
    assert_predicted(plan, data)
    assert encode_integers(np.asfortranarray(matrix)) == data


@pytest.mark.parametrize("seed", range(40))
def test_random_matrices_and_runs_come_back_at_the_bits_foretold(seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(1, 70, 2)
    draw = (rng.laplace, rng.normal, lambda _, scale, size: scale * rng.standard_t(2, size))[seed % 3]
    scale = np.exp2(rng.uniform(-4, 12)) * np.exp2(rng.normal(0, rng.uniform(0, 2), (rows, 1)))
    matrix = rounded(draw(0, 1.0, (rows, columns)) * scale + rng.choice([0, 100]))
    plan = plan_integers(matrix)
    data = plan.to_bytes()
    assert np.array_equal(decode_integers(Reader(data), matrix.shape), matrix)
    assert_predicted(plan, data)

    lengths = rng.integers(0, 90, rows)
    values = rounded(draw(0, 1.0, lengths.sum()) * np.repeat(scale[:, 0], lengths))
    runs = plan_runs(values, lengths)
    assert np.array_equal(decode_runs(Reader(runs.to_bytes()), lengths), values)
    assert_predicted(runs, runs.to_bytes())


@pytest.mark.parametrize("value", [0, 3, -200, INTEGER_LIMIT])
def test_a_constant_matrix_takes_a_few_bytes(value):
    assert len(encode_integers(np.full((1000, 1000), value, np.int32))) <= 6


def test_rows_and_columns_of_different_scales_pay_for_their_classes():
    rng = np.random.default_rng(1)
    both = plan_integers(scaled(rng, 300, 200, 1.2, 1.2))
    assert both.grouping.rows.any()
    assert both.grouping.columns is not None
    rows = plan_integers(scaled(rng, 300, 200, 1.2, 0.0))
    assert rows.grouping.rows.any()
    assert rows.grouping.columns is None
    alike = plan_integers(scaled(rng, 300, 200))
    assert len(alike.models) == 1
    one_scale = both.runs.values.reshape(300, 200)
    assert both.bits.total < 0.93 * plan_runs(one_scale.reshape(-1), np.array([one_scale.size])).bits.total


def test_laplacian_streams_are_near_their_entropy():
    rng = np.random.default_rng(2)
    for scale in (0.2, 0.5, 1.5):
        matrix = rounded(rng.laplace(0, scale, (500, 400)))
        counts = np.unique(matrix, return_counts=True)[1]
        ideal = -(counts * np.log2(counts / matrix.size)).sum() / 8
        assert len(encode_integers(matrix)) < 1.006 * ideal + 16


@pytest.mark.parametrize("name", ["both", "rows", "heavy tails", "centred far away", "plain"])
def test_prices_in_place_add_up_to_the_payload(name):
    matrix = CASES[name](np.random.default_rng(0))
    plan = plan_integers(matrix)
    radius = int(np.abs(matrix).max())
    prices = plan.price(radius)
    contexts = np.minimum(prices.rows[:, None] + prices.columns, len(prices.bits) - 1)
    total = prices.bits.astype(np.float64)[contexts, matrix + radius].sum()
    assert prices.bits.shape == (len(plan.models), 2 * radius + 1)
    assert np.isfinite(prices.bits).all()
    assert abs(total - plan.bits.payload - plan.bits.escapes) <= 24 + 1e-5 * total


def test_items_of_the_bill_add_up():
    bits = plan_integers(CASES["both"](np.random.default_rng(0))).bits
    assert min(bits.header, bits.classes, bits.tables, bits.payload, bits.lanes) > 0
    assert bits.total == bits.header + bits.classes + bits.tables + bits.payload + bits.lanes + bits.escapes


def test_integers_out_of_bounds_are_refused():
    with pytest.raises(MismatchError, match="outside"):
        plan_integers(np.array([[0, INTEGER_LIMIT + 1]], np.int32))
    with pytest.raises(MismatchError, match="outside"):
        plan_integers(np.array([[-(2**31), 0]], np.int32))


def test_lengths_must_cut_up_the_values():
    for lengths in ([1, 1], [4, -1]):
        with pytest.raises(MismatchError, match="rows of"):
            encode_runs(np.zeros(3, np.int32), np.array(lengths))


def test_truncated_streams_are_refused(matrix):
    data = encode_integers(matrix)
    for size in {*range(min(len(data), 60)), *np.linspace(0, len(data) - 1, 20).astype(int).tolist()}:
        with pytest.raises(FormatError):
            decode_integers(Reader(data[:size]), matrix.shape)


@pytest.mark.parametrize("name", ["both", "heavy tails", "centred far away", "plain", "huge", "indices"])
def test_damaged_streams_are_refused_or_decode_to_the_shape(name):
    matrix = CASES[name](np.random.default_rng(0))
    data = encode_integers(matrix)
    rng = np.random.default_rng(3)
    refused = 0
    places = [*range(min(40, len(data))), *rng.integers(0, len(data), 25).tolist()]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        try:
            assert decode_integers(Reader(damaged), matrix.shape).shape == matrix.shape
        except FormatError:
            refused += 1
    assert refused > len(places) // 4


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([128, 0], "head"),
        ([32, 0], "head"),
        ([17, 5, 0], "5 bits"),
        ([16, 1, 0x80], "outside the 1 contexts"),
        ([17, 1, 0xC1], "not zero"),
        ([17, 0, 1, 0, 0], "head"),
        ([64, 0x82, 0x80, 0x80, 0x20, 0], "outside"),
        ([0, 1 << 2, 128, 3, 0, 0, 0, 1, 0], "lanes"),
        ([0, 1 << 2, 128, 3, 1, 0, 0, 1, 0], "lanes"),
        ([0, 1 << 2, 128, 3, 4, 0, 0, 1, 0], "lanes"),
        ([0, 1 << 2, 128, 2, 0, 0, 1, 0], "words: 2 bytes"),
        ([0, 1 << 2, 128, 0, 0, 0, 0, 0], "state"),
    ],
)
def test_malformed_runs_are_refused(data, why):
    with pytest.raises(FormatError, match=why):
        decode_runs(Reader(bytes(data)), np.array([2, 1]))


def test_the_format_never_changes():
    """Files in the world depend on these bytes."""
    matrix = (np.arange(20)[:, None] * 7919 + np.arange(60) * 104729) % 13 - 6
    matrix *= (np.abs(matrix) < 4) * np.where(np.arange(20) > 9, 9, 1)[:, None]
    matrix[5, 5] = 4000
    assert np.array_equal(decode_integers(Reader(bytes.fromhex("".join(GOLDEN))), (20, 60)), matrix)
    assert len(encode_integers(matrix.astype(np.int32))) <= len("".join(GOLDEN)) // 2 + 8


GOLDEN = (
    "1101043ff00c960812db0135d00000000000000000d00000000000000000cf00000000009c9c97ff9797970000000000cf00",
    "00000000000000cf0000000000000000d0770cd80288a47f04b2e19d255eb4f8d00afbfd0839bdb2caae8a0c2c71ebca5210",
    "3af7c5c33fc348f7c5c03f014898e8ec896114c653382a68b7c33fa349c313454ca72013ddb8ad27fa8d3c008e6b2c44eefe",
    "dbdd7a7ac7c43e8a8d41ce3ef263a72b8e9fa4a9324d0ef9566b32ff0d792da0f2c50dc69b843674072a3f628c473093106f",
    "1902ad8ab916496b3b524eb35596ec088ffdb671ebca52103af7c5c03f0148dee857cdde1a4b1ea5eec69b84367407703fd3",
    "cecfac0aa41d60f8662d7a9a00f5b8c5c7dafef8662d7a9a0093b838085f3dfb0c7f929a0093b83808663dba0a5669708cf6",
    "d40ee2923342ed5cfba204507fe14afd4f3d4b43cc03529ad68225c630a063d1b94cc5b63b9079ef01913a1d45113fd90a97",
    "1d480bc81edd51173684574db84d0577bdab09617e80edd4f44deab2395b4732becdc78bfcee87c8bc1bca35fd2a4cea8fcb",
    "26c05fee87c8bc1bca35fd2a4c1491e42f0cda02be10",
)
