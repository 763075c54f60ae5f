"""A tensor becomes tiles and comes back bit for bit, and its matrix is the one that the layer multiplies by."""

from itertools import product
from math import prod

import laws
import numpy as np
import pytest

from factorpack.errors import MismatchError
from factorpack.tiling import Tiling


def tensor(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


SHAPES = {
    "linear": (Tiling((6, 10)), (6, 10)),
    "embedding": (Tiling((30, 4)), (30, 4)),
    "conv1d": (Tiling((6, 4, 5)), (6, 20)),
    "conv2d": (Tiling((6, 4, 3, 2)), (6, 24)),
    "conv3d": (Tiling((6, 4, 3, 2, 2)), (6, 48)),
    "grouped": (Tiling((6, 4, 3, 3), groups=3), (6, 36)),
    "depthwise": (Tiling((8, 1, 3, 3), groups=8), (8, 9)),
    "transposed": (Tiling((6, 4, 3, 3), transposed=True), (36, 6)),
    "transposed, grouped": (Tiling((6, 4, 3, 3), groups=2, transposed=True), (72, 3)),
    "transposed, depthwise": (Tiling((6, 1, 3), groups=6, transposed=True), (18, 1)),
    "five groups of one": (Tiling((5, 7), groups=5), (5, 7)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_matrix_is_outputs_by_inputs_and_comes_back(name):
    tiling, expected = SHAPES[name]
    values = tensor(tiling.shape)
    matrix = tiling.matrix(values)
    assert matrix.shape == tiling.matrix_shape == tiling.tiled_shape == expected
    assert matrix.flags.c_contiguous
    assert tiling.unmatrix(matrix).tobytes() == values.tobytes()
    assert np.array_equal(tiling.tile(values), matrix)


@pytest.mark.parametrize("name", SHAPES)
def test_tiles_of_every_depth_come_back(name):
    whole = SHAPES[name][0]
    values = tensor(whole.shape)
    size = prod(whole.shape)
    for depth in {*range(1, min(size, 60) + 1), size - 1, size}:
        tiling = Tiling(whole.shape, whole.groups, whole.transposed, depth)
        tiles = tiling.tile(values)
        assert tiles.shape == tiling.tiled_shape == (depth, -(-size // depth))
        assert tiling.untile(tiles).tobytes() == values.tobytes()
        # The paper's order: tile after tile is the matrix, row after row, and zeros fill the last.
        flat = tiles.T.reshape(-1)
        assert flat[:size].tobytes() == whole.matrix(values).tobytes()
        assert not flat[size:].any()


@pytest.mark.parametrize("name", laws.TILINGS)
def test_what_fills_the_last_tile_is_dropped(name):
    tiling = laws.TILINGS[name]
    values = tensor(tiling.shape)
    tiles = tiling.tile(values)
    depth, count = tiles.shape
    beyond = depth * count - values.size
    if beyond:
        tiles[-beyond:, -1] = 7.0
    assert tiling.untile(tiles).tobytes() == values.tobytes()


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("kernel", [(1,), (3,), (2, 3), (2, 1, 3)])
def test_a_convolution_is_its_matrix_times_its_patches_group_by_group(groups, kernel):
    outputs, inputs = 6, 6 // groups
    values = tensor((outputs, inputs, *kernel))
    tiling = Tiling(values.shape, groups)
    patch = tensor((groups * inputs, *kernel), 1)
    # One position of the output by the definition: output o sees the channels of its own group only.
    expected = np.zeros(outputs)
    for output in range(outputs):
        group = output // (outputs // groups)
        for channel in range(inputs):
            for place in product(*map(range, kernel)):
                expected[output] += float(values[(output, channel, *place)]) * patch[(group * inputs + channel, *place)]
    blocks = tiling.matrix(values).reshape(groups, outputs // groups, -1)
    found = np.einsum("gmn,gn->gm", blocks, patch.reshape(groups, -1)).reshape(-1)
    assert np.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("kernel", [(1,), (3,), (2, 3), (2, 1, 3)])
def test_a_transposed_convolution_is_its_matrix_times_its_inputs_group_by_group(groups, kernel):
    inputs, outputs = 6, 4
    values = tensor((inputs, outputs, *kernel))
    tiling = Tiling(values.shape, groups, transposed=True)
    pixel = tensor((inputs,), 1)
    # What one pixel adds to the output: channel i gives to the `outputs` channels of its own group.
    expected = np.zeros((groups * outputs, *kernel))
    for channel in range(inputs):
        group = channel // (inputs // groups)
        for output in range(outputs):
            expected[group * outputs + output] += float(pixel[channel]) * values[channel, output]
    rows, columns = tiling.matrix_shape
    assert (rows, columns) == (groups * outputs * prod(kernel), inputs // groups)
    blocks = tiling.matrix(values).reshape(groups, rows // groups, columns)
    found = np.einsum("gmn,gn->gm", blocks, pixel.reshape(groups, -1)).reshape(expected.shape)
    assert np.allclose(found, expected, atol=1e-5)


def test_a_linear_layer_is_its_matrix_and_an_embedding_its_rows():
    values = tensor((5, 7))
    assert np.array_equal(Tiling((5, 7)).matrix(values), values)
    assert np.array_equal(Tiling((5, 7)).tile(values)[3], values[3])


def test_a_view_in_another_order_tiles_alike():
    values = tensor((8, 3, 3, 3))
    for tiling in (Tiling((8, 3, 3, 3), 2, True, 5), Tiling((8, 3, 3, 3), depth=9)):
        assert tiling.tile(np.asfortranarray(values)).tobytes() == tiling.tile(values).tobytes()


@pytest.mark.parametrize(
    ("shape", "groups", "depth"),
    [
        ((4,), 1, 0),
        ((), 1, 0),
        ((4, 0), 1, 0),
        ((4, 3), 0, 0),
        ((4, 3), -2, 0),
        ((4, 3), 3, 0),
        ((4, 3), 8, 0),
        ((4, 3), 1, -1),
        ((4, 3), 1, 13),
    ],
)
def test_a_tiling_without_sense_is_refused(shape, groups, depth):
    for transposed in (False, True):
        with pytest.raises(MismatchError):
            Tiling(shape, groups, transposed, depth)


def test_another_shape_is_refused():
    tiling = Tiling((4, 3), depth=5)
    for call, shape in (
        (tiling.matrix, (3, 4)),
        (tiling.tile, (12,)),
        (tiling.unmatrix, (3, 4)),
        (tiling.untile, (3, 5)),
    ):
        with pytest.raises(MismatchError, match="this tiling is for"):
            call(np.zeros(shape, np.float32))
