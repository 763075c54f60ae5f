"""A weight comes back from its record at the bits foretold, and a record that lies is refused."""

import laws
import numpy as np
import pytest

from factorpack.coding import Reader, append_varint, append_zigzag, encode_integers
from factorpack.coding.records import (
    ALONG_INPUTS,
    FORMS,
    GROUPED,
    MAX_ENTRIES,
    TRANSPOSED,
    decode_vectors,
    decode_weight,
    encode_vectors,
    encode_weight,
    predicted_bits,
    predicted_vector_bits,
)
from factorpack.errors import FormatError
from factorpack.factors import EXPONENT_LIMIT, Basis, Codes, FactoredWeight, Grid, OneHotCodes
from factorpack.tiling import Tiling


@pytest.mark.parametrize(("form", "tiling"), [(form, name) for form in FORMS for name in laws.tilings_of(form)])
def test_every_form_comes_back_over_every_tiling(form, tiling):
    rng = np.random.default_rng(FORMS.index(form))
    for rows in laws.ROW_STEPS:
        for columns in laws.COLUMN_STEPS:
            laws.assert_record_law(laws.weight(rng, form, laws.TILINGS[tiling], rows, columns))


@pytest.mark.parametrize("form", FORMS)
def test_larger_weights_come_back_at_the_bits_foretold(form):
    rng = np.random.default_rng(9)
    tilings = (Tiling((96, 40, 3, 3)), Tiling((300, 128), depth=16))
    for tiling in tilings if form != "separable" else (Tiling((96, 40, 3, 3), depth=9), Tiling((80, 30, 16), depth=16)):
        laws.assert_record_law(laws.weight(rng, form, tiling))
        laws.assert_record_law(laws.weight(rng, form, tiling, "rows", "columns"))


def test_a_step_for_every_column_is_in_the_bits_foretold():
    rng = np.random.default_rng(0)
    tiling = Tiling((4, 3000))
    codes = Codes(np.zeros((4, 3000), np.int32), Grid(-2, 1, rng.integers(-500, 500, 3000).astype(np.int32)))
    weight = FactoredWeight("direct", tiling, Basis(None, laws.grid(rng, 2, 1)), codes)
    data = encode_weight(weight)
    assert len(data) > 3000
    assert abs(predicted_bits(weight) - 8 * len(data)) <= 0.003 * 8 * len(data) + 64
    laws.assert_record_law(weight)


@pytest.mark.parametrize("bits", [1, 2, 8, 16, 25])
def test_grids_of_every_width_come_back(bits):
    rng = np.random.default_rng(bits)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    codes = rng.integers(low, high, (8, 9), endpoint=True).astype(np.int32)
    codes.flat[:2] = low, high
    for exponent in (-EXPONENT_LIMIT, -1, 0, 700):
        basis = Basis(None, Grid(-1, 0, np.zeros(1, np.int32)))
        grid = Grid(low, high, np.array([exponent], np.int32))
        laws.assert_record_law(FactoredWeight("direct", Tiling((8, 9)), basis, Codes(codes, grid)))


def test_the_steps_the_basis_the_codes_and_the_tables_are_booked():
    weight = laws.weight(np.random.default_rng(0), "sparse_pca", Tiling((24, 200)), "rows", "columns")
    data = encode_weight(weight)
    reader = Reader(data)
    decode_weight(reader, (24, 200))
    assert reader.books.keys() == {"steps", "tables", "basis", "codes"}
    assert min(reader.books.values()) > 0
    assert sum(reader.books.values()) == len(data)


def random_vectors(seed, count=12):
    rng = np.random.default_rng(seed)
    shapes = [(), (0,), (1,), (64,), (3, 1, 5), (0, 4), (256,)]
    return [
        laws.vector(rng, shapes[i] if i < len(shapes) else (int(rng.integers(1, 100)),), bool(rng.integers(2)))
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
def test_small_tensors_come_back(count):
    vectors = random_vectors(count, count)
    data = encode_vectors(vectors)
    reader = Reader(data + b"next")
    found = decode_vectors(reader, [v.shape for v in vectors])
    assert reader.remaining == len(b"next")
    assert len(found) == count
    for a, b in zip(found, vectors, strict=True):
        laws.assert_same_vector(a, b)
    assert encode_vectors(vectors) == data


def test_the_integers_of_small_tensors_take_what_was_foretold():
    vectors = [v for seed in range(5) for v in random_vectors(seed)]
    heads = sum(
        len(encode_integers(np.array([[getattr(v, part) for v in vectors]], np.int32)))
        for part in ("logarithmic", "exponent", "offset")
    )
    bits = 8 * (len(encode_vectors(vectors)) - heads)
    assert abs(predicted_vector_bits(vectors) - bits) <= 0.003 * bits + 64


def refused(data, shape, match=None):
    with pytest.raises(FormatError, match=match):
        decode_weight(Reader(bytes(data)), shape)


def direct_record(form=0, flags=0, basis_head=2, basis_exponent=0, codes_head=4, codes=((0, 1), (2, 3))):
    out = bytearray([form, flags, basis_head])
    append_zigzag(out, basis_exponent)
    out.append(codes_head)
    append_zigzag(out, 0)
    return bytes(out) + encode_integers(np.array(codes, np.int32))


def test_a_record_made_by_hand_is_read():
    found = decode_weight(Reader(direct_record()), (2, 2))
    assert found.tensor().tolist() == [[0.0, 1.0], [2.0, 3.0]]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"form": len(FORMS)}, "newer version"),
        ({"form": 255}, "newer version"),
        ({"flags": 8}, "newer version"),
        ({"basis_head": 0}, "bits are not"),
        ({"basis_head": 26}, "bits are not"),
        ({"basis_head": 128 | 2}, "bits are not"),
        ({"codes_head": 0}, "bits are not"),
        ({"codes_head": 2}, "outside their grid"),
        ({"basis_exponent": EXPONENT_LIMIT + 1}, "exponent"),
        ({"basis_exponent": 2**31 - 1}, "exponent"),
        ({"basis_exponent": -(2**31)}, "exponent"),
    ],
)
def test_a_record_that_lies_is_refused(change, match):
    refused(direct_record(**change), (2, 2), match)


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (4, 0)])
def test_a_record_for_a_tensor_that_cannot_have_one_is_refused(shape):
    refused(direct_record(), shape, "two or more axes")


@pytest.mark.parametrize(
    ("flag", "number"),
    [(GROUPED, 0), (GROUPED, 3), (GROUPED | TRANSPOSED, 5), (ALONG_INPUTS, 5), (ALONG_INPUTS, 2**32 - 1)],
)
def test_groups_and_depths_that_do_not_fit_are_refused(flag, number):
    out = bytearray([0, flag])
    append_varint(out, number)
    refused(out + direct_record()[2:], (2, 2), "groups|do not fit")


def basis_record(form, rank):
    out = bytearray([FORMS.index(form), 0, 2])
    append_zigzag(out, 0)
    append_varint(out, rank)
    return bytes(out)


@pytest.mark.parametrize("form", ["sparse_pca", "svd", "vq"])
@pytest.mark.parametrize("rank", [0, 4, 2**32 - 1])
def test_a_rank_that_does_not_fit_is_refused(form, rank):
    refused(basis_record(form, rank) + encode_integers(np.zeros((2, 1), np.int32)), (2, 3), "rank")


def test_an_index_beyond_the_codewords_is_refused():
    basis = encode_integers(np.ones((2, 2), np.int32) * -1)
    for indices in ([[0, 2, 1]], [[0, -1, 1]]):
        refused(basis_record("vq", 2) + basis + encode_integers(np.array(indices, np.int32)), (2, 3), "codewords")
    good = decode_weight(
        Reader(basis_record("vq", 2) + basis + encode_integers(np.array([[0, 1, 1]], np.int32))), (2, 3)
    )
    assert isinstance(good.codes, OneHotCodes)


def test_a_short_record_cannot_ask_for_all_memory():
    constant = encode_integers(np.zeros((1, 1), np.int32))
    refused(direct_record()[:6] + constant, (2**20, 2**20), "more than")
    # Tiles that are small enough, and a rank that makes the codes as large as their square.
    out = bytearray([FORMS.index("sparse_pca"), ALONG_INPUTS])
    append_varint(out, 1)
    refused(bytes(out) + basis_record("sparse_pca", 2**17)[2:] + constant, (1, 2**17), "rank")
    shapes = [(2**16, 2**15)] * 3
    assert sum(a * b for a, b in shapes) > MAX_ENTRIES
    with pytest.raises(FormatError, match="more than"):
        decode_vectors(Reader(encode_integers(np.zeros((1, 3), np.int32)) * 4), shapes)


def test_a_product_too_large_to_be_exact_is_refused():
    out = bytearray([FORMS.index("sparse_pca"), 0, 25])
    append_zigzag(out, 0)
    append_varint(out, 32)
    out += encode_integers(np.zeros((2, 32), np.int32))
    out.append(25)
    append_zigzag(out, 0)
    out += encode_integers(np.zeros((32, 40), np.int32))
    refused(out, (2, 40), "too large to be exact")


def one_of(rng, form):
    tiling = Tiling((6, 2, 3, 3), groups=3, depth=9 if form == "separable" else 6)
    return laws.weight(rng, form, tiling, "rows", "columns")


def separable_record(flags=ALONG_INPUTS, depth=6, exponent=0, factors=(1, 2, 0, 1, *[1] * 9), codes_head=4):
    """A record for 2 outputs of 3 inputs and a kernel of (2, 3); its codes are all ones."""
    out = bytearray([FORMS.index("separable"), flags])
    if flags & GROUPED:
        append_varint(out, 2)
    if flags & ALONG_INPUTS:
        append_varint(out, depth)
    append_zigzag(out, exponent)
    for integer in factors:
        append_zigzag(out, integer)
    out.append(codes_head)
    append_zigzag(out, 0)
    return bytes(out) + encode_integers(np.ones((2, 18), np.int32))


def test_a_separable_record_made_by_hand_is_read():
    found = decode_weight(Reader(separable_record()), (2, 3, 2, 3))
    # Each line of the kernel's second axis sums three ones; its first axis weighs them 1 + 2 and 0 + 1.
    assert found.tensor().tolist() == [[[[9.0] * 3, [3.0] * 3]] * 3] * 2
    assert [factor.tolist() for factor in found.basis.factors] == [[[1, 2], [0, 1]], [[1] * 3] * 3]


def test_an_axis_of_one_tap_has_no_factor():
    for shape in ((2, 3, 2, 1, 3), (2, 3, 1, 2, 3), (2, 3, 2, 3, 1)):
        found = decode_weight(Reader(separable_record()), shape)
        assert found.tensor().shape == shape
        assert len(found.basis.factors) == 2


@pytest.mark.parametrize(
    ("change", "shape", "match"),
    [
        ({}, (36,), "two or more axes"),
        ({}, (2, 18), "are not the taps"),
        ({}, (36, 1), "are not the taps"),
        ({}, (6, 6, 1, 1), "are not the taps"),
        ({}, (2, 3, 6, 2), "are not the taps"),
        ({"depth": 9}, (2, 3, 2, 3), "are not the taps"),
        ({"depth": 18}, (2, 3, 2, 3), "are not the taps"),
        ({"flags": 0}, (2, 3, 2, 3), "are not the taps"),
        ({"flags": ALONG_INPUTS | TRANSPOSED}, (2, 3, 2, 3), "are not the taps"),
        ({"depth": 2**16 + 1}, (2, 3, 2**16 + 1), "more than"),
        ({"exponent": EXPONENT_LIMIT + 1}, (2, 3, 2, 3), "exponent"),
        ({"factors": (2**24, *[1] * 12)}, (2, 3, 2, 3), "empty or wider"),
        ({"factors": (-(2**24), 0, 0, 0, 2, *[1] * 8)}, (2, 3, 2, 3), "outside"),
        ({"factors": (2**16, 0, 0, 0, 2**16, *[1] * 8)}, (2, 3, 2, 3), "outside"),
        ({"factors": (-(2**31), 0, 0, 0, -2, *[1] * 8)}, (2, 3, 2, 3), "outside"),
        ({"codes_head": 26}, (2, 3, 2, 3), "bits are not"),
        ({"codes_head": 1}, (2, 3, 2, 3), "outside their grid"),
    ],
)
def test_a_separable_record_that_lies_is_refused(change, shape, match):
    refused(separable_record(**change), shape, match)


def test_codes_of_taps_lie_in_rows_of_their_outputs():
    """Taps of unlike size make columns of unlike size, which the coder knows how to tell apart."""
    rng = np.random.default_rng(0)
    scale = np.array([20.0, 5, 1, 0.5, 0.2, 0.1, 0.1, 0.1, 0.05])
    codes = np.rint(rng.laplace(size=(64, 32, 9)) * scale).astype(np.int32)
    tiling = Tiling((64, 32, 3, 3), depth=9)
    basis = Basis.separable((np.eye(3, dtype=np.int32),) * 2, 0)
    grid = Grid.holding(codes, np.zeros(1, np.int32))
    weight = FactoredWeight("separable", tiling, basis, Codes(codes.reshape(-1, 9).T, grid))
    laws.assert_record_law(weight)
    assert np.array_equal(weight.tensor(), codes.reshape(64, 32, 3, 3))
    assert len(encode_weight(weight)) < 40 + len(encode_integers(codes.reshape(64, -1)))
    one_context = sum(np.log2(codes.size / n) * n for n in np.unique(codes, return_counts=True)[1]) / 8
    assert len(encode_weight(weight)) < 0.75 * one_context


@pytest.mark.parametrize("form", FORMS)
def test_a_record_cut_anywhere_is_refused(form):
    weight = one_of(np.random.default_rng(4), form)
    data = encode_weight(weight)
    for length in range(len(data)):
        refused(data[:length], weight.tiling.shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("default")
def test_a_record_with_changed_bytes_is_read_or_refused_and_nothing_else(form):
    rng = np.random.default_rng(5)
    weight = one_of(rng, form)
    data = encode_weight(weight)
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            found = decode_weight(Reader(changed), weight.tiling.shape)
        except FormatError:
            continue
        assert found.tensor().shape == weight.tiling.shape


def vectors_record(logarithmic, exponents, offsets, values):
    heads = (logarithmic, exponents, offsets, values)
    return b"".join(encode_integers(np.array([part], np.int32)) for part in heads)


def test_small_tensors_without_sense_are_refused():
    shapes = [(1,), (2,)]
    good = vectors_record([0, 1], [5, 6], [0, 0], [1, 2, 3])
    assert [v.tensor().size for v in decode_vectors(Reader(good), shapes)] == [1, 2]
    for data in (
        vectors_record([0, 2], [5, 6], [0, 0], [1, 2, 3]),
        vectors_record([-1, 0], [5, 6], [0, 0], [1, 2, 3]),
        vectors_record([0, 1], [2**24, 6], [0, 0], [1, 2, 3]),
        vectors_record([0, 1], [5, 2**24], [0, 0], [1, 2, 3]),
        vectors_record([0, 1], [5, 6], [0, 2**24], [1, 2, 3]),
    ):
        with pytest.raises(FormatError):
            decode_vectors(Reader(data), shapes)
    for length in range(len(good)):
        with pytest.raises(FormatError):
            decode_vectors(Reader(good[:length]), shapes)


@pytest.mark.filterwarnings("default")
def test_small_tensors_with_changed_bytes_are_read_or_refused_and_nothing_else():
    rng = np.random.default_rng(6)
    vectors = random_vectors(1)
    data = encode_vectors(vectors)
    for _ in range(1500):
        changed = bytearray(data)
        changed[int(rng.integers(len(data)))] = int(rng.integers(256))
        try:
            found = decode_vectors(Reader(changed), [v.shape for v in vectors])
        except FormatError:
            continue
        assert all(np.isfinite(v.tensor()).all() for v in found)
