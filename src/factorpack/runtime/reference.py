"""What a factored weight means, entry by entry: slow, NumPy only, the oracle of every faster way.

Letters: m outputs, n inputs of one group, g groups, d rows along the basis, k rank, N tiles.
"""

from math import prod

import numpy as np

from factorpack._shapes import Float, Float32, Float64
from factorpack.errors import MismatchError
from factorpack.factors import FactoredWeight, OneHotCodes
from factorpack.tiling import Tiling


def densify(weight: FactoredWeight) -> Float32[np.ndarray, "..."]:
    """The weight in its own shape: each entry an exact integer product, scaled once, rounded once."""
    products = _products(weight)
    rows = _lines(weight.basis.grid.steps, len(products))
    steps = np.ones(1) if isinstance(weight.codes, OneHotCodes) else weight.codes.grid.steps
    columns = _lines(steps, weight.codes.shape[1])
    tensor = np.zeros(prod(weight.tiling.shape), np.float32)
    for i, line in enumerate(products):
        for j, product in enumerate(line):
            place = _place(weight.tiling, i, j)
            if place is not None:
                # One rounding to float64 (the steps' product is exact there), one to float32.
                tensor[place] = np.float32(float(product) * (rows[i] * columns[j]))
    return tensor.reshape(weight.tiling.shape)


def apply(weight: FactoredWeight, inputs: Float[np.ndarray, "batch inputs"]) -> Float64[np.ndarray, "batch m"]:
    """Outputs of the weight's matrix for `inputs` (batch, g·n), one block of n after another; float64.

    The inputs of a convolution are the patches under its kernel, as torch.nn.functional.unfold gives them.
    Raises MismatchError where the inputs have another width.
    """
    outputs, width = weight.tiling.matrix_shape
    groups = weight.tiling.groups
    if inputs.shape[1:] != (groups * width,):
        raise MismatchError(f"this weight takes inputs of shape (batch, {groups * width}), not {inputs.shape}")
    matrix = weight.tiling.matrix(densify(weight)).astype(np.float64).reshape(groups, outputs // groups, width)
    blocks = inputs.astype(np.float64).reshape(len(inputs), groups, width)
    products: Float64[np.ndarray, "batch g m"] = np.einsum("bgn,gmn->bgm", blocks, matrix)
    return products.reshape(len(inputs), outputs)


def _products(weight: FactoredWeight) -> list[list[int]]:
    """B·Z as Python's integers, which do not overflow."""
    depth, count = weight.tiling.tiled_shape
    if isinstance(weight.codes, OneHotCodes):
        codes = np.zeros(weight.codes.shape, np.int32)
        codes[weight.codes.indices, np.arange(count)] = 1
    else:
        codes = weight.codes.integers
    columns = codes.T.tolist()
    if weight.basis.integers is None:
        return [[column[i] for column in columns] for i in range(depth)]
    return [
        [sum(b * z for b, z in zip(row, column, strict=True)) for column in columns]
        for row in weight.basis.integers.tolist()
    ]


def _lines(steps: Float64[np.ndarray, " steps"], count: int) -> list[float]:
    """One float32 step for each of `count` lines."""
    return [float(step) for step in np.broadcast_to(steps.astype(np.float32), (count,))]


def _place(tiling: Tiling, i: int, j: int) -> int | None:
    """Where entry (i, j) of the tiles lies in the flattened tensor; None for what fills the last tile."""
    width = tiling.matrix_shape[1]
    flat = j * tiling.depth + i if tiling.depth else i * width + j
    if flat >= prod(tiling.shape):
        return None
    if not tiling.transposed:
        return flat
    row, column = divmod(flat, width)
    block = tiling.matrix_shape[0] // tiling.groups
    group, row = divmod(row, block)
    return (group * width + column) * block + row
