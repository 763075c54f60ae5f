"""Models come back from their bytes, sum to 2^14 and cost what their tables say."""

import numpy as np
import pytest

from factorpack.coding.models import (
    Escape,
    Histogram,
    SymbolModel,
    explicit_model,
    fit,
    normalised,
    power,
    symmetric_model,
)
from factorpack.coding.reader import Reader
from factorpack.coding.reference import TOTAL
from factorpack.errors import FormatError


def entropy(integers):
    counts = np.unique(integers, return_counts=True)[1]
    return float(-(counts * np.log2(counts / integers.size)).sum())


def rounded(values):
    return np.rint(values).astype(np.int32)


SAMPLES = {
    "zeros": lambda _: np.zeros(50, np.int32),
    "constant": lambda _: np.full(50, -70_000, np.int32),
    "one": lambda _: np.array([1], np.int32),
    "ternary": lambda rng: rng.integers(-1, 2, 500).astype(np.int32),
    "laplacian": lambda rng: rounded(rng.laplace(0, 1.5, 20_000)),
    "normal": lambda rng: rounded(rng.normal(0, 3, 20_000)),
    "heavy": lambda rng: rounded(rng.standard_t(2, 20_000)),
    "one-sided": lambda rng: rng.geometric(0.3, 5000).astype(np.int32),
    "uniform": lambda rng: rng.integers(-100, 101, 5000).astype(np.int32),
    "outlier": lambda rng: np.append(rounded(rng.laplace(0, 0.4, 5000)), np.int32(2**24)),
    "huge": lambda rng: rng.integers(-(2**24), 2**24, 300).astype(np.int32),
    "all escaped or zero": lambda rng: rng.choice([0, 9_000_000, -4_000_000], 300).astype(np.int32),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_fitted_model_comes_back_from_its_bytes_and_can_code_everything(name):
    integers = SAMPLES[name](np.random.default_rng(0))
    model = fit(Histogram.of(integers))
    reader = Reader(model.to_bytes() + b"rest")
    back = SymbolModel.from_bytes(reader)

    assert reader.remaining == 4
    assert back.to_bytes() == model.to_bytes()
    assert (back.low, back.order) == (model.low, model.order)
    assert np.array_equal(back.frequencies, model.frequencies)
    assert int(model.frequencies.sum()) == TOTAL
    assert np.isfinite(model.costs(integers)).all()
    assert model.bits(integers) >= entropy(integers) - 1e-6


@pytest.mark.parametrize("name", SAMPLES)
def test_truncated_models_are_refused(name):
    data = fit(Histogram.of(SAMPLES[name](np.random.default_rng(0)))).to_bytes()
    for size in range(len(data)):
        with pytest.raises(FormatError):
            SymbolModel.from_bytes(Reader(data[:size]))


@pytest.mark.parametrize("scale", [0.2, 0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("draw", ["laplace", "normal"])
def test_smooth_integers_are_told_in_a_few_bytes_at_their_entropy(draw, scale):
    integers = rounded(getattr(np.random.default_rng(1), draw)(0, scale, 200_000))
    model = fit(Histogram.of(integers))
    assert len(model.to_bytes()) <= 8
    assert model.bits(integers) <= 1.001 * entropy(integers)


def test_integers_of_no_smooth_law_are_told_symbol_by_symbol():
    integers = np.random.default_rng(2).choice([-5, 1, 2, 9], 20_000, p=[0.1, 0.2, 0.3, 0.4]).astype(np.int32)
    model = fit(Histogram.of(integers))
    assert (model.low, model.high) == (-5, 9)
    assert model.bits(integers) <= 1.001 * entropy(integers)


def test_a_rare_outlier_is_escaped_and_its_cost_is_counted():
    integers = SAMPLES["outlier"](np.random.default_rng(3))
    model = fit(Histogram.of(integers))
    assert model.order is not None
    assert model.high < 20
    beyond = 2**24 - model.high - 1
    digits = (beyond + 2**model.order).bit_length() - 1
    expected = 14 - np.log2(model.frequencies[-1]) + 2 * (digits - model.order) + model.order + 2
    assert model.costs(np.array([2**24]))[0] == pytest.approx(expected)


def test_costs_are_those_of_the_table():
    model = explicit_model(-2, bytes([100, 0, 255, 30]), Escape(50, 1))
    inside = model.costs(np.array([-2, 0, 1]))
    assert inside == pytest.approx(14 - np.log2(model.frequencies[[0, 2, 3]]))
    assert model.costs(np.array([-1]))[0] == np.inf
    assert model.cost(Histogram(np.array([-2, 1]), np.array([3, 5]))) == pytest.approx(3 * inside[0] + 5 * inside[2])


def test_prices_cover_the_radius_and_are_finite():
    model = explicit_model(-2, bytes([100, 0, 255, 30]), None)
    price = model.price(4)
    assert price.shape == (9,)
    assert np.isfinite(price).all()
    assert price[2] == model.costs(np.array([-2]))[0]
    assert (price[[0, 1, 3, 6, 7, 8]] > price[[2, 4, 5]].max()).all()
    assert np.array_equal(model.price(3, centre=1), model.price(5)[1:8])


def test_symmetric_frequencies_fall_on_both_sides_alike():
    model = symmetric_model(6, bytes([140, 60, 40]), None)
    right = model.frequencies[7:]
    assert np.array_equal(model.frequencies[:6][::-1], right)
    assert (np.diff(right) <= 0).all()
    assert model.frequencies[6] > right[0]


def test_powers_are_near_the_true_ones_and_integers_alone():
    exponents = np.arange(0, 38 * 16384, 77)
    true = np.exp2(exponents / 16384)
    assert power(exponents).dtype == np.int64
    assert (np.abs(power(exponents) - true) <= 1 + 3e-5 * true).all()
    assert power(np.array([0, 16384, 20 * 16384])).tolist() == [1, 2, 2**20]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1], [16384]),
        ([1, 1, 1], [5462, 5461, 5461]),
        ([0, 3, 1], [0, 12288, 4096]),
        ([1, 10**9], [1, 16383]),
    ],
)
def test_normalisation_is_fixed(weights, expected):
    assert normalised(np.array(weights)).tolist() == expected


def test_tables_never_change():
    """Files in the world depend on these frequencies."""
    assert symmetric_model(4, bytes([130, 70, 50]), Escape(40, 2)).frequencies.tolist() == GOLDEN_SYMMETRIC
    assert explicit_model(-1, bytes([200, 255, 180, 0, 90]), None).frequencies.tolist() == GOLDEN_EXPLICIT


GOLDEN_SYMMETRIC = [219, 620, 1579, 3619, 4309, 3619, 1579, 620, 219, 1]
GOLDEN_EXPLICIT = [1336, 14476, 561, 0, 11]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes([0x80 | (2048 << 2 & 0x7F), 2048 << 2 >> 7]) + bytes(3), "too large"),
        (bytes([1 | 2 << 2, 0, 0, 0, 0]), "no symbol"),
        (bytes([1, 0x80, 0x80, 0x80, 0x80, 0x01]), "out of bounds"),
        (bytes([2, 128, 25]), "order"),
        (bytes([0xF9, 0x7F, 0]) + b"\xff" * 2047 + b"\x01" * 2048, "too many"),
        (bytes([0xFD, 0x7F, 0]) + b"\xff" * 4096, "too large"),
    ],
)
def test_malformed_models_are_refused(data, why):
    with pytest.raises(FormatError, match=why):
        SymbolModel.from_bytes(Reader(data))


def test_too_many_symbols_for_the_precision_are_refused():
    with pytest.raises(FormatError, match="too many"):
        explicit_model(0, b"\xff" * 2047 + b"\x01" * 2048, None)
