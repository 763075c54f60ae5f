"""The values at rest mean the same numbers everywhere, and what cannot be a weight is refused."""

import math
from fractions import Fraction

import laws
import numpy as np
import pytest

from factorpack.errors import MismatchError
from factorpack.factors import (
    EXPONENT_LIMIT,
    FRACTION_BITS,
    INTEGER_LIMIT,
    STEPS_PER_OCTAVE,
    Basis,
    Codes,
    FactoredVector,
    FactoredWeight,
    Grid,
    OneHotCodes,
    exponents_of,
    octave,
    parts,
    steps_of,
)
from factorpack.tiling import Tiling


def grid(bits=8, exponents=(0,)):
    return Grid(-(1 << bits - 1), (1 << bits - 1) - 1, np.array(exponents, np.int32))


def matrix(*rows):
    return np.array(rows, np.int32)


def test_the_octave_is_the_floor_of_the_true_powers():
    # 2^30 · 2^(i/64) lies in [t, t + 1) just where its 64th power does, in integers.
    for index, value in enumerate(octave()):
        true = 2 ** (FRACTION_BITS * STEPS_PER_OCTAVE + index)
        assert value**STEPS_PER_OCTAVE <= true < (value + 1) ** STEPS_PER_OCTAVE
        assert abs(value / 2**FRACTION_BITS - math.pow(2, index / STEPS_PER_OCTAVE)) < 2**-30


def test_steps_are_exactly_the_table_times_powers_of_two():
    exponents = np.array([-EXPONENT_LIMIT, -129, -64, -1, 0, 1, 63, 64, 200, EXPONENT_LIMIT], np.int32)
    for exponent, step in zip(exponents.tolist(), steps_of(exponents), strict=True):
        octaves, index = divmod(exponent, STEPS_PER_OCTAVE)
        assert Fraction(float(step)) == Fraction(octave()[index]) * Fraction(2) ** (octaves - FRACTION_BITS)


def test_exponents_are_the_nearest_and_come_back_from_their_steps():
    exponents = np.arange(-EXPONENT_LIMIT, EXPONENT_LIMIT + 1, 7, dtype=np.int32)
    assert np.array_equal(exponents_of(steps_of(exponents)), exponents)
    steps = np.exp(np.random.default_rng(0).uniform(-20, 20, 500))
    found = steps_of(exponents_of(steps))
    assert np.all(np.abs(np.log2(found / steps)) <= 0.5 / STEPS_PER_OCTAVE + 1e-9)
    assert exponents_of(np.array([1e-300, 1e300])).tolist() == [-EXPONENT_LIMIT, EXPONENT_LIMIT]


def exact_tiles(weight):
    """B·Z in Python integers, times the float32 steps as fractions, rounded to float64 and then float32."""
    depth, count = weight.tiling.tiled_shape
    if isinstance(weight.codes, OneHotCodes):
        codes = [[int(i == k) for i in weight.codes.indices.tolist()] for k in range(weight.codes.rank)]
        columns = [Fraction(1)] * count
    else:
        codes = weight.codes.integers.tolist()
        columns = [Fraction(float(np.float32(s))) for s in weight.codes.grid.steps]
        columns = columns * count if len(columns) == 1 else columns
    rows = [Fraction(float(np.float32(s))) for s in weight.basis.grid.steps]
    rows = rows * depth if len(rows) == 1 else rows
    rank = len(codes)
    if weight.basis.integers is None:
        basis = [[int(i == k) for k in range(rank)] for i in range(depth)]
    else:
        basis = weight.basis.integers.tolist()
    return np.array(
        [
            [float(sum(basis[i][k] * codes[k][j] for k in range(rank)) * rows[i] * columns[j]) for j in range(count)]
            for i in range(depth)
        ],
        np.float64,
    ).astype(np.float32)


NAMES = ("linear, last tile not full", "conv1d", "transposed, grouped", "a single entry")
FORMS_AND_NAMES = [(form, name) for form in ("direct", "sparse_pca", "svd", "vq") for name in NAMES]


@pytest.mark.parametrize(
    ("form", "name"), [*FORMS_AND_NAMES, *(("separable", n) for n in laws.tilings_of("separable"))]
)
def test_tiles_are_the_exact_product_rounded(form, name):
    rng = np.random.default_rng(3)
    weight = laws.weight(rng, form, laws.TILINGS[name], "rows", "columns")
    assert np.array_equal(weight.tiles(), exact_tiles(weight))


def test_the_largest_products_that_are_allowed_are_exact():
    rng = np.random.default_rng(1)
    rank, basis_bits, codes_bits = 8, 25, 25
    tiling = Tiling((6, 5))
    # 2^24 · 2^24 · 8 = 2^51: no float64 holds all sums of products of floats, but of these integers it does.
    basis = rng.integers(-(2**24), 2**24, (6, rank)).astype(np.int32)
    codes = rng.integers(-(2**24), 2**24, (rank, 5)).astype(np.int32)
    weight = FactoredWeight(
        "sparse_pca",
        tiling,
        Basis(basis, grid(basis_bits, rng.integers(-64, 64, 6))),
        Codes(codes, grid(codes_bits, rng.integers(-64, 64, 5))),
    )
    assert weight.product_bound == 2**51
    assert np.array_equal(weight.tiles(), exact_tiles(weight))


@pytest.mark.parametrize("largest", [1024, 1025])
def test_products_on_both_sides_of_what_float32_holds_are_exact(largest):
    # 8 · 2047 · 1024 is below 2^24, the next one above it, where odd sums have no float32.
    basis = np.full((6, 8), 2047, np.int32)
    codes = np.full((8, 5), largest, np.int32)
    codes[0] = [largest, largest - 1, 1, -largest, 0]
    weight = FactoredWeight("sparse_pca", Tiling((6, 5)), Basis(basis, grid(12)), Codes(codes, grid(12)))
    assert np.array_equal(weight.tiles(), exact_tiles(weight))


def test_a_product_too_large_to_be_exact_is_refused():
    basis, codes = np.zeros((4, 32), np.int32), np.zeros((32, 4), np.int32)
    with pytest.raises(MismatchError, match="too large to be exact"):
        FactoredWeight("sparse_pca", Tiling((4, 4)), Basis(basis, grid(25)), Codes(codes, grid(25)))


def test_the_order_in_memory_does_not_change_a_bit():
    weight = laws.weight(np.random.default_rng(2), "sparse_pca", Tiling((40, 300)), "rows", "columns")
    basis = Basis(np.asfortranarray(weight.basis.integers), weight.basis.grid)
    codes = Codes(np.asfortranarray(weight.codes.integers), weight.codes.grid)
    again = FactoredWeight(weight.form, weight.tiling, basis, codes)
    assert again.tensor().tobytes() == weight.tensor().tobytes() == weight.tensor().tobytes()


def test_the_tensor_has_the_shape_of_the_weight():
    for _, weight in laws.weights():
        assert weight.tensor().shape == weight.tiling.shape
        assert weight.tensor().dtype == np.float32


@pytest.mark.parametrize(
    ("low", "high", "exponents"),
    [
        (1, 0, [0]),
        (-INTEGER_LIMIT - 1, 0, [0]),
        (0, INTEGER_LIMIT + 1, [0]),
        (-2, 1, []),
        (-2, 1, [[0, 1]]),
        (-2, 1, [EXPONENT_LIMIT + 1]),
        (-2, 1, [0, -EXPONENT_LIMIT - 1]),
        (-2, 1, [-(2**31)]),
    ],
)
def test_a_grid_without_sense_is_refused(low, high, exponents):
    with pytest.raises(MismatchError):
        Grid(low, high, np.array(exponents, np.int32))


def test_factors_off_their_grid_are_refused():
    with pytest.raises(MismatchError, match="outside their grid -2..1"):
        Basis(matrix([0, 2]), grid(2))
    with pytest.raises(MismatchError, match="outside their grid -2..1"):
        Codes(matrix([0, -3]), grid(2))
    with pytest.raises(MismatchError, match="2 steps where 1 or 3"):
        Basis(np.zeros((3, 2), np.int32), grid(2, (0, 0)))
    with pytest.raises(MismatchError, match="3 steps where 1 or 2"):
        Codes(np.zeros((3, 2), np.int32), grid(2, (0, 0, 0)))
    for index in (-1, 4):
        with pytest.raises(MismatchError, match="outside the 4 codewords"):
            OneHotCodes(np.array([0, index], np.int32), 4)


def test_factors_that_do_not_meet_are_refused():
    tiling = Tiling((4, 6))
    codes = Codes(np.zeros((3, 6), np.int32), grid())
    FactoredWeight("sparse_pca", tiling, Basis(np.zeros((4, 3), np.int32), grid()), codes)
    for basis in (np.zeros((4, 2), np.int32), np.zeros((5, 3), np.int32), None):
        with pytest.raises(MismatchError, match="do not make tiles"):
            FactoredWeight("sparse_pca", tiling, Basis(basis, grid()), codes)
    with pytest.raises(MismatchError, match="do not make tiles"):
        FactoredWeight("direct", tiling, Basis(None, grid()), Codes(np.zeros((4, 5), np.int32), grid()))
    with pytest.raises(MismatchError, match="3 steps where 1 or 4"):
        FactoredWeight("direct", tiling, Basis(None, grid(8, (0, 0, 0))), Codes(np.zeros((4, 6), np.int32), grid()))


def taps_weight(factors, shape, **tiling):
    basis = Basis.separable(factors, -64)
    d = len(basis.integers)
    codes = np.arange(np.prod(shape), dtype=np.int32).reshape(-1, d).T % 5
    return FactoredWeight("separable", Tiling(shape, depth=d, **tiling), basis, Codes(codes, grid()))


@pytest.mark.parametrize("shape", [(4, 3, 3), (4, 2, 3, 2), (4, 2, 1, 3), (2, 2, 2, 3, 4)])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_separable_basis_acts_on_each_axis_of_each_kernel(shape, groups):
    rng = np.random.default_rng(1)
    factors = tuple(rng.integers(-7, 8, (k, k)).astype(np.int32) for k in shape[2:] if k > 1)
    weight = taps_weight(factors, shape, groups=groups)
    codes = iter(weight.codes.integers.T)
    for output in weight.tensor():
        for kernel in output:
            made = next(codes).reshape(kernel.shape).astype(float)
            remaining = iter(factors)
            for axis, taps in enumerate(shape[2:]):
                if taps > 1:
                    made = np.moveaxis(np.tensordot(next(remaining), made, (1, axis)), 0, axis)
            assert np.array_equal(kernel, made / 2)


def test_a_separable_basis_that_is_none_is_refused():
    eye = np.eye(3, dtype=np.int32)
    good = Basis.separable((eye, eye), 0)
    with pytest.raises(MismatchError, match="square"):
        Basis(np.kron(eye, eye[:2]), grid(), (eye, eye[:2]))
    for integers in (None, good.integers[::-1], eye):
        with pytest.raises(MismatchError, match="not the Kronecker product"):
            Basis(integers, good.grid, (eye, eye))
    for other in (grid(5), grid(2, [0] * 9)):
        with pytest.raises(MismatchError, match="narrowest grid"):
            Basis(good.integers, other, (eye, eye))
    with pytest.raises(MismatchError, match="may lie outside"):
        Basis.separable((eye * 2**13, eye * 2**12), 0)


@pytest.mark.parametrize("shape", [(4, 9), (3, 3, 9), (6, 3, 1, 1), (4, 3, 3, 3, 3), (4, 3, 3, 2)])
def test_a_separable_basis_of_another_kernel_is_refused(shape):
    eye = np.eye(3, dtype=np.int32)
    with pytest.raises(MismatchError):
        taps_weight((eye, eye), shape)


def test_a_separable_basis_goes_with_its_form_and_inputs_second():
    eye = np.eye(3, dtype=np.int32)
    weight = taps_weight((eye, eye), (4, 3, 3, 3))
    with pytest.raises(MismatchError, match="no separable basis"):
        FactoredWeight("sparse_pca", weight.tiling, weight.basis, weight.codes)
    with pytest.raises(MismatchError, match="no separable basis"):
        FactoredWeight("separable", weight.tiling, weight.basis, OneHotCodes(np.zeros(12, np.int32), 9))
    with pytest.raises(MismatchError, match="taps of one input"):
        FactoredWeight("separable", weight.tiling, Basis(weight.basis.integers, weight.basis.grid), weight.codes)
    with pytest.raises(MismatchError, match="taps of one input"):
        taps_weight((eye, eye), (4, 3, 3, 3), transposed=True)


def test_a_vector_on_a_uniform_grid_is_exact():
    vector = FactoredVector((2, 3), np.arange(6, dtype=np.int32), -65, 100, logarithmic=False)
    step = Fraction(octave()[63]) * Fraction(2) ** (-2 - FRACTION_BITS)
    expected = [[float(np.float32(float((100 + 3 * i + j) * step))) for j in range(3)] for i in range(2)]
    assert vector.tensor().tolist() == expected


def test_a_vector_on_a_logarithmic_grid_is_a_table_of_powers():
    vector = FactoredVector((4,), np.array([-3, 0, 5, 64], np.int32), 3, -2, logarithmic=True)
    assert vector.tensor().tolist() == steps_of(np.array([-15, -6, 9, 186], np.int32)).astype(np.float32).tolist()
    assert np.allclose(vector.tensor(), np.exp2(np.array([-15, -6, 9, 186]) / 64), rtol=1e-7)


def test_a_vector_may_be_empty_or_have_no_axes():
    empty = FactoredVector((0, 3), np.zeros(0, np.int32), 1, 0, logarithmic=True)
    assert empty.tensor().shape == (0, 3)
    single = FactoredVector((), np.array([7], np.int32), 64, 0, logarithmic=False)
    assert single.tensor().shape == ()
    assert float(single.tensor()) == 14.0


def test_a_vector_beyond_float32_is_its_largest_value():
    largest = np.finfo(np.float32).max
    vector = FactoredVector((2,), np.array([-(2**15), 2**15], np.int32), 113 * 64, 0, logarithmic=False)
    assert vector.tensor().tolist() == [-largest, largest]
    tiny = FactoredVector((1,), np.array([-140], np.int32), 64, 0, logarithmic=True)
    assert float(tiny.tensor()[0]) == 2.0**-140


@pytest.mark.parametrize(
    ("shape", "count", "exponent", "offset", "logarithmic"),
    [
        ((3,), 2, 0, 0, False),
        ((), 0, 0, 0, False),
        ((2,), 2, EXPONENT_LIMIT + 1, 0, False),
        ((2,), 2, 2**24, 2**24, True),
        ((2,), 2, -(2**24), 2**24, True),
    ],
)
def test_a_vector_without_sense_is_refused(shape, count, exponent, offset, logarithmic):
    with pytest.raises(MismatchError):
        FactoredVector(shape, np.zeros(count, np.int32), exponent, offset, logarithmic)


@pytest.mark.parametrize("entries", [1, 8, 50])
def test_weights_are_recombined_in_parts(monkeypatch, entries):
    def counted(*given):
        found = list(parts(*given))
        numbers.append(len(found))
        return found

    numbers = []
    weights = dict(laws.weights(0))
    whole = {name: weight.tensor() for name, weight in weights.items()}
    monkeypatch.setattr("factorpack.factors.ENTRIES_IN_CACHE", entries)
    monkeypatch.setattr("factorpack.factors.LEAST_COLUMNS", 1)
    monkeypatch.setattr("factorpack.factors.parts", counted)
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.tensor(), whole[name], err_msg=name)
    assert len(numbers) == len(weights)
    assert np.mean(np.array(numbers) > 1) > 0.9
