"""The definition of a factored weight, against arithmetic by hand, torch and the fast NumPy way."""

import numpy as np
import pytest
import torch

from factorpack.errors import MismatchError
from factorpack.factors import Basis, Codes, FactoredWeight, Grid, OneHotCodes
from factorpack.runtime.reference import apply, densify
from factorpack.tiling import Tiling

TILINGS = [
    Tiling((6, 4)),
    Tiling((6, 4), depth=3),
    Tiling((5, 3), depth=4),
    Tiling((8, 2, 3, 3), groups=2),
    Tiling((8, 3, 2, 2), groups=4, transposed=True),
    Tiling((4, 3, 3), groups=2, transposed=True, depth=5),
]


def integers(rng: np.random.Generator, limit: int, *shape: int) -> np.ndarray:
    return rng.integers(-limit, limit + 1, shape).astype(np.int32)


def grid(rng: np.random.Generator, limit: int, lines: int) -> Grid:
    return Grid(-limit, limit, rng.integers(-600, 200, lines).astype(np.int32))


def direct(rng: np.random.Generator, tiling: Tiling) -> FactoredWeight:
    depth, count = tiling.tiled_shape
    codes = Codes(integers(rng, 7, depth, count), grid(rng, 7, count))
    return FactoredWeight("direct", tiling, Basis(None, grid(rng, 0, depth)), codes)


def sparse_pca(rng: np.random.Generator, tiling: Tiling) -> FactoredWeight:
    depth, count = tiling.tiled_shape
    basis = Basis(integers(rng, 90000, depth, 3), grid(rng, 90000, depth))
    return FactoredWeight("sparse_pca", tiling, basis, Codes(integers(rng, 7000, 3, count), grid(rng, 7000, count)))


def vq(rng: np.random.Generator, tiling: Tiling) -> FactoredWeight:
    depth, count = tiling.tiled_shape
    codes = OneHotCodes(rng.integers(0, 5, count).astype(np.int32), 5)
    return FactoredWeight("vq", tiling, Basis(integers(rng, 100, depth, 5), grid(rng, 100, 1)), codes)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("form", [direct, sparse_pca, vq])
def test_the_fast_way_gives_the_same_bits(form, tiling):
    weight = form(np.random.default_rng(7), tiling)
    np.testing.assert_array_equal(densify(weight).view(np.int32), weight.tensor().view(np.int32))


def test_a_weight_by_hand():
    halves, twos = np.array([-64], np.int32), np.array([64, 128], np.int32)
    basis = Basis(np.array([[1, 2], [0, -3]], np.int32), Grid(-3, 2, halves))
    codes = Codes(np.array([[5, 0], [1, 4]], np.int32), Grid(0, 5, twos))
    # Rows of B·Z are (7, 8) and (-3, -12); one half times two and times four are one and two.
    weight = FactoredWeight("sparse_pca", Tiling((2, 2)), basis, codes)
    assert densify(weight).tolist() == [[7.0, 16.0], [-3.0, -24.0]]
    assert apply(weight, np.array([[1.0, 1.0], [0.0, 2.0]])).tolist() == [[23.0, -27.0], [32.0, -48.0]]


def test_tiles_along_the_inputs_are_runs_of_the_flattened_tensor():
    step = np.zeros(1, np.int32)
    codes = Codes(np.array([[1, 3, 5], [2, 4, 0]], np.int32), Grid(0, 5, step))
    weight = FactoredWeight("direct", Tiling((1, 5), depth=2), Basis(None, Grid(0, 0, step)), codes)
    assert densify(weight).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]


def test_apply_is_a_grouped_convolution_of_patches():
    rng = np.random.default_rng(3)
    weight = direct(rng, Tiling((8, 2, 3, 3), groups=2))
    images = torch.from_numpy(rng.normal(size=(2, 4, 6, 6)))
    patches = torch.nn.functional.unfold(images, 3).transpose(1, 2).reshape(-1, 36)
    expected = torch.nn.functional.conv2d(images, torch.from_numpy(weight.tensor()).double(), groups=2)
    outputs = apply(weight, patches.numpy()).reshape(2, 16, 8).transpose(0, 2, 1)
    np.testing.assert_allclose(outputs, expected.flatten(2).numpy(), rtol=1e-12)


def test_apply_refuses_inputs_of_another_width():
    weight = direct(np.random.default_rng(0), Tiling((6, 4)))
    with pytest.raises(MismatchError, match=r"\(batch, 4\)"):
        apply(weight, np.zeros((2, 5)))
