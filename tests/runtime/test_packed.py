"""Packed factors give the bits of the reference, in few bytes, whatever torch is told about precision."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from factorpack.errors import UnsupportedError
from factorpack.factors import Basis, Codes, FactoredWeight, Grid, OneHotCodes, kernel_of
from factorpack.runtime.packed import PackedWeight
from factorpack.tiling import Tiling

PLACEHOLDER = torch.empty(0)


def product(tiling: Tiling, basis_limit: int, low: int, high: int, rank: int = 5) -> FactoredWeight:
    """A weight with a step a row and a step a column; `basis_limit` 0 for the identity."""
    rng = np.random.default_rng(basis_limit + high)
    depth, count = tiling.tiled_shape
    rank = rank if basis_limit else depth
    rows, columns = (rng.integers(-600, 200, lines).astype(np.int32) for lines in (depth, count))
    entries = rng.integers(-basis_limit, basis_limit + 1, (depth, rank)).astype(np.int32) if basis_limit else None
    codes = rng.integers(low, high + 1, (rank, count)).astype(np.int32)
    codes[0, :2] = low, high
    basis = Basis(entries, Grid(-basis_limit, basis_limit, rows))
    return FactoredWeight("sparse_pca", tiling, basis, Codes(codes, Grid(low, high, columns)))


def one_hot(tiling: Tiling, rank: int) -> FactoredWeight:
    rng = np.random.default_rng(rank)
    depth, count = tiling.tiled_shape
    indices = rng.integers(0, rank, count).astype(np.int32)
    indices[0] = rank - 1
    basis = Basis(rng.integers(-100, 101, (depth, rank)).astype(np.int32), Grid(-100, 100, np.full(1, -300, np.int32)))
    return FactoredWeight("vq", tiling, basis, OneHotCodes(indices, rank))


def recombined(weight: FactoredWeight) -> np.ndarray:
    return PackedWeight(weight, torch.float32)(PLACEHOLDER).numpy()


TILINGS = [
    Tiling((7, 9)),
    Tiling((7, 9), depth=4),
    Tiling((8, 2, 3, 3), groups=2),
    Tiling((8, 3, 2, 2), groups=4, transposed=True),
    Tiling((8, 3, 3), groups=2, transposed=True, depth=5),
]
LIMITS = [(0, -8, 7), (0, -1, 200), (0, 0, 40000), (127, -8, 7), (200, -128, 127), (3000, -7, 7), (2**24, -900, 900)]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_products_are_those_of_the_values_at_rest(tiling, limits):
    weight = product(tiling, *limits)
    np.testing.assert_array_equal(recombined(weight), weight.tensor())


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("rank", [3, 256, 257, 40000])
def test_gathered_codewords_are_those_of_the_values_at_rest(tiling, rank):
    weight = one_hot(tiling, rank)
    np.testing.assert_array_equal(recombined(weight), weight.tensor())


@pytest.mark.parametrize("limit", [3, 32, 2**11])
@pytest.mark.parametrize("shape", [(6, 2, 3), (6, 2, 3, 2), (4, 1, 1, 5), (4, 3, 2, 3, 3)])
def test_separable_products_are_those_of_the_values_at_rest(shape, limit):
    rng = np.random.default_rng(limit)
    factors = tuple(rng.integers(-limit, limit, (k, k)).astype(np.int32) for k in kernel_of(shape))
    basis = Basis.separable(tuple(f % 256 for f in factors) if len(factors) > 2 else factors, -320)
    tiling = Tiling(shape, groups=2, depth=len(basis.integers))
    codes = rng.integers(-8, 8, tiling.tiled_shape).astype(np.int32)
    weight = FactoredWeight("separable", tiling, basis, Codes(codes, Grid(-8, 7, np.array([-200], np.int32))))
    np.testing.assert_array_equal(recombined(weight), weight.tensor())


@pytest.mark.parametrize("depth", [0, 64])
def test_large_weights_are_recombined_in_blocks_without_a_seam(depth):
    weight = product(Tiling((1100, 500), depth=depth), 100, -7, 7)
    np.testing.assert_array_equal(recombined(weight), weight.tensor())


@pytest.mark.parametrize(
    ("low", "high", "dtype", "size"),
    [
        (-8, 7, torch.int8, 32),
        (-9, 7, torch.int8, 63),
        (-8, 8, torch.int8, 63),
        (-1, 128, torch.int16, 63),
        (-(2**15), 0, torch.int16, 63),
        (0, 2**15, torch.int32, 63),
    ],
)
def test_codes_take_the_narrowest_integers_of_their_grid(low, high, dtype, size):
    packed = PackedWeight(product(Tiling((7, 9)), 0, low, high), torch.float32)
    assert (packed.codes.dtype, packed.codes.numel()) == (dtype, size)
    assert packed.codes.untyped_storage().nbytes() == size * dtype.itemsize


@pytest.mark.parametrize(("rank", "dtype"), [(256, torch.uint8), (257, torch.int16), (2**15 + 1, torch.int32)])
def test_indices_take_the_narrowest_integers_of_their_rank(rank, dtype):
    assert PackedWeight(one_hot(Tiling((4, 6)), rank), torch.float32).codes.dtype == dtype


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_settings_that_trade_precision_for_speed_change_nothing(limits):
    weight = product(Tiling((40, 70)), *limits, rank=30)
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            values = recombined(weight)
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(values, weight.tensor())


@pytest.mark.parametrize(
    ("basis_limit", "codes_limit", "rank", "dtype"),
    [
        (127, 127, 1040, torch.float32),
        (127, 127, 1041, torch.float64),
        (256, 256, 5, torch.float32),
        (257, 1, 5, torch.float64),
        (1, 257, 5, torch.float64),
    ],
)
def test_float32_multiplies_only_what_every_float32_product_gets_right(basis_limit, codes_limit, rank, dtype):
    weight = product(Tiling((2, 3)), basis_limit, -codes_limit, codes_limit, rank)
    assert PackedWeight(weight, torch.float32).product_dtype == dtype


def test_the_largest_products_are_rounded_once():
    row, column = (Grid(0, 0, np.array([exponent], np.int32)).steps.astype(np.float32) for exponent in (5, 7))
    row, column = row.astype(np.float64), column.astype(np.float64)
    # Products next to the middle of two float32 values, where a second rounding in float64 takes the wrong one.
    scale = int(row[0] * 2**23) * int(column[0] * 2**23)
    middles = (2 * m + 1 << 70 for m in range(2**23, 2**23 + 2**15))
    candidates = np.array([(middle + scale // 2) // scale for middle in middles])
    values = candidates.astype(np.float64)
    twice, once = (values * row * column).astype(np.float32), (values * (row * column)).astype(np.float32)
    delicate = candidates[twice != once]
    assert delicate.size
    basis = Basis(np.array([[2**24, 1]] * 2, np.int32), Grid(0, 2**24, np.array([5, 5], np.int32)))
    codes = np.stack((delicate >> 24, delicate & 2**24 - 1)).astype(np.int32)
    grid = Grid(0, 2**24, np.full(delicate.size, 7, np.int32))
    weight = FactoredWeight("svd", Tiling((2, delicate.size)), basis, Codes(codes, grid))
    np.testing.assert_array_equal(recombined(weight)[0], once[twice != once])
    np.testing.assert_array_equal(recombined(weight), weight.tensor())


def test_conversions_of_the_module_leave_factors_alone_and_round_the_result():
    weight = product(Tiling((7, 9)), 100, -7, 7)
    packed = PackedWeight(weight, torch.bfloat16).half().double()
    expected = torch.from_numpy(weight.tensor()).bfloat16()
    assert torch.equal(packed(PLACEHOLDER.double()), expected.double())
    assert torch.equal(packed(PLACEHOLDER.bfloat16()), expected)


def test_a_packed_weight_cannot_be_assigned():
    layer = nn.Linear(9, 7)
    layer.weight = nn.Parameter(PLACEHOLDER, requires_grad=False)
    packed = PackedWeight(product(Tiling((7, 9)), 0, -7, 7), torch.float32)
    parametrize.register_parametrization(layer, "weight", packed, unsafe=True)
    with pytest.raises(UnsupportedError, match="dense mode"):
        layer.weight = torch.zeros(7, 9)
