"""Nodes that recombine single rows of a look-up table, so that the table is never made whole.

Letters: m rows and n columns of the table, k rank.
"""

from math import prod

import numpy as np
import onnx_ir
from onnx_ir import DataType

from factorpack._shapes import Int32
from factorpack.export.chain import Chain, narrowest
from factorpack.export.weights import sides
from factorpack.factors import FactoredWeight


def has_rows(weight: FactoredWeight) -> bool:
    """Whether each row of the tensor has codes or a line of the basis of its own."""
    tiling = weight.tiling
    return len(tiling.shape) == 2 and not tiling.transposed and tiling.depth in (0, tiling.shape[1])


def looked_up(chain: Chain, weight: FactoredWeight, rows: onnx_ir.Value) -> onnx_ir.Value:
    """The rows (...) of a table with `has_rows` as (..., n), float32."""
    left, right = sides(weight)
    if left.integers is None:
        assert right.integers is not None
        found = _rows(chain, right.integers, rows)
    elif left.integers.ndim == 1:
        assert right.integers is not None
        places = chain.cast(chain.op("Gather", _small(chain, left.integers), rows, axis=0), DataType.INT32)
        found = chain.op("Gather", chain.integers(right.integers), places, axis=0)
    else:
        found = _rows(chain, left.integers, rows)
        if right.integers is not None and right.integers.ndim == 1:
            found = chain.op("Gather", found, chain.places(right.integers), axis=-1)
        elif right.integers is not None:
            found = chain.op("MatMul", found, chain.integers(right.integers))
    number = prod(float(side.steps[0]) for side in (left, right) if side.steps.size == 1)
    if left.steps.size > 1:
        steps = chain.constant((left.steps[:, None] * number).astype(np.float32))
        found, number = chain.op("Mul", found, chain.op("Gather", steps, rows, axis=0)), 1.0
    if right.steps.size > 1:
        return chain.op("Mul", found, chain.constant((right.steps * number).astype(np.float32)))
    return found if number == 1 else chain.op("Mul", found, chain.constant(np.array(number, np.float32)))


def _small(chain: Chain, array: Int32[np.ndarray, "..."]) -> onnx_ir.Value:
    """Integers in the narrowest type of whole bytes: Gather takes no others."""
    kind = narrowest(array)
    wider = {DataType.INT4: DataType.INT8, DataType.UINT4: DataType.UINT8}
    return chain.constant(array, wider.get(kind, kind))


def _rows(chain: Chain, table: Int32[np.ndarray, "m k"], rows: onnx_ir.Value) -> onnx_ir.Value:
    """Rows of a matrix of integers as float32: two a byte where that is smaller, what does not fit added by row."""
    outside = (table < -8) | (table > 7)
    odd = np.flatnonzero(outside.any(1))
    corrections = np.zeros((len(odd) + 1, table.shape[1]), np.int32)
    corrections[1:] = np.where(outside, table, 0)[odd]
    slots = np.zeros(len(table), np.int32)
    slots[odd] = np.arange(1, len(odd) + 1)
    whole = max(narrowest(table).itemsize, 1) * table.size
    halved = (
        table.size / 2 + max(narrowest(corrections).itemsize, 1) * corrections.size + 2 * len(table) * bool(len(odd))
    )
    if table.shape[1] % 2 or whole <= halved:
        return chain.cast(chain.op("Gather", _small(chain, table), rows, axis=0), DataType.FLOAT)
    low, high = np.split((np.where(outside, 0, table) + 8).astype(np.uint8), 2, axis=1)
    pairs = chain.op("Gather", chain.constant(low | high << 4), rows, axis=0)
    sixteen = chain.constant(np.array(16, np.uint8))
    halves = chain.op("Mod", pairs, sixteen), chain.op("Div", pairs, sixteen)
    integers = chain.cast(chain.op("Concat", *halves, axis=-1), DataType.FLOAT)
    found = chain.op("Sub", integers, chain.constant(np.array(8, np.float32)))
    if not len(odd):
        return found
    slot = chain.cast(chain.op("Gather", _small(chain, slots), rows, axis=0), DataType.INT32)
    correction = chain.op("Gather", _small(chain, corrections), slot, axis=0)
    return chain.op("Add", found, chain.cast(correction, DataType.FLOAT))
