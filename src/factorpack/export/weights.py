"""Nodes of standard operators that recombine weights and small tensors from their integers.

Letters: m rows and n columns of a weight's matrix, k rank.

Tiles along the outputs are the matrix itself, tiles along the inputs its transpose cut in runs, so both are
diag(l) · (L · R) · diag(r) in the end: L·R is B·Z or Zᵀ·Bᵀ, and l, r are the steps of rows and columns.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir
from onnx_ir import DataType

from factorpack._shapes import Float64, Int32
from factorpack.export.chain import CHAIN_BYTES, Chain, narrowest
from factorpack.factors import STEPS_PER_OCTAVE, FactoredVector, FactoredWeight, OneHotCodes, steps_of


@dataclass(frozen=True, eq=False)
class Factor:
    """One side of the product: `integers` (a, b), None for the identity, or the places (a,) of ones in its columns.

    `steps` (a,) or (1,) scale the lines that it does not share with the other side.
    """

    integers: Int32[np.ndarray, "..."] | None
    steps: Float64[np.ndarray, " lines"]


def sides(weight: FactoredWeight) -> tuple[Factor, Factor]:
    """L with the steps l, and R with r."""
    basis = Factor(weight.basis.integers, _rounded(weight.basis.grid.steps))
    if isinstance(weight.codes, OneHotCodes):
        codes = Factor(weight.codes.indices, np.ones(1))
    else:
        codes = Factor(weight.codes.integers, _rounded(weight.codes.grid.steps))
    if not weight.tiling.depth:
        return basis, codes
    return tuple(Factor(None if s.integers is None else s.integers.T, s.steps) for s in (codes, basis))  # type: ignore[return-value]


def _rounded(steps: Float64[np.ndarray, " lines"]) -> Float64[np.ndarray, " lines"]:
    """As the file's format says: steps are float32."""
    return steps.astype(np.float32).astype(np.float64)


def recombined(chain: Chain, weight: FactoredWeight) -> onnx_ir.Value:
    """The weight in its own shape, float32."""
    left, right = sides(weight)
    rows, columns = left.steps[:, None], right.steps[None]
    one_hot = isinstance(weight.codes, OneHotCodes)
    if left.integers is None or right.integers is None:
        integers = right.integers if left.integers is None else left.integers
        assert integers is not None
        matrix = chain.scaled(chain.integers(integers), rows, columns)
    elif one_hot:
        along_rows = left.integers.ndim == 1
        codewords, places = (right.integers, left.integers) if along_rows else (left.integers, right.integers)
        scaled = chain.scaled(chain.integers(codewords), columns if along_rows else rows)
        matrix = chain.op("Gather", scaled, chain.places(places), axis=0 if along_rows else 1)
    else:
        product = chain.op("MatMul", chain.integers(left.integers), chain.integers(right.integers))
        matrix = chain.scaled(product, rows, columns)
    return _untiled(chain, matrix, weight)


def _untiled(chain: Chain, matrix: onnx_ir.Value, weight: FactoredWeight) -> onnx_ir.Value:
    """`Tiling.untile`, of the transpose where tiles lie along the inputs."""
    tiling = weight.tiling
    if prod(tiling.tiled_shape) > prod(tiling.shape):
        flat = chain.shaped(matrix, [-1])
        bounds = (chain.constant(np.array([bound], np.int64)) for bound in (0, prod(tiling.shape)))
        matrix = chain.op("Slice", flat, *bounds)
    if tiling.transposed:
        blocks = chain.shaped(matrix, [tiling.groups, -1, tiling.matrix_shape[1]])
        matrix = chain.op("Transpose", blocks, perm=[0, 2, 1])
    rows_and_columns = tiling.tiled_shape[::-1] if tiling.depth else tiling.tiled_shape
    return matrix if rows_and_columns == tiling.shape else chain.shaped(matrix, tiling.shape)


def vector(chain: Chain, small: FactoredVector) -> onnx_ir.Value | None:
    """A small tensor in its own shape, float32; None where its floats take no more room than nodes would."""
    levels = small.integers.astype(np.int64) + small.offset
    kind = narrowest(levels)
    if (4 - kind.itemsize) * levels.size <= CHAIN_BYTES or not np.abs(small.tensor()).max() < np.finfo(np.float32).max:
        return None
    integers = chain.cast(chain.constant(levels.reshape(small.shape), kind), DataType.FLOAT)
    if not small.logarithmic:
        return chain.scaled(integers, steps_of(np.array([[small.exponent]], np.int32)))
    power = chain.scaled(integers, np.array([[small.exponent / STEPS_PER_OCTAVE]]))
    return chain.op("Pow", chain.constant(np.array(2, np.float32)), power)
