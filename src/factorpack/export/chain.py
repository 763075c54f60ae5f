"""Nodes and initialisers in the making: integers, in the types that make them smallest, and what is done with them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import DataType

from factorpack._shapes import Float64, Int32, Integer

INTEGERS = (
    (DataType.INT4, -8, 7), (DataType.UINT4, 0, 15), (DataType.INT8, -128, 127), (DataType.UINT8, 0, 255),
    (DataType.INT16, -(2**15), 2**15 - 1), (DataType.UINT16, 0, 2**16 - 1), (DataType.INT32, -(2**31), 2**31 - 1),
)  # fmt: skip
"""The narrowest first."""
CHAIN_BYTES = 300
"""About what the nodes and names of a chain take in the file."""


def narrowest(integers: Integer[np.ndarray, "..."]) -> DataType:
    """The narrowest type that holds all of them."""
    low, high = int(integers.min(initial=0)), int(integers.max(initial=0))
    return next(kind for kind, least, most in INTEGERS if least <= low and high <= most)


def initializer(name: str, tensor: onnx_ir.Tensor[Any]) -> onnx_ir.Value:
    """A value that is constant, still of no graph."""
    return onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)


@dataclass(eq=False)
class Chain:
    """Nodes and initialisers in the making, to be put into a graph before the first use of what they give.

    With `stream` integers become floats by DequantizeLinear, which onnxruntime leaves alone when it folds constants,
    else by Cast. Then they also wait for the value `after`: what depends on no input is made early otherwise, and all
    weights are in memory together. All names begin with `prefix`, and hold signs that those of parameters do not.
    """

    prefix: str
    stream: bool
    after: onnx_ir.Value | None = None
    nodes: list[onnx_ir.Node] = field(default_factory=list)
    initializers: list[onnx_ir.Value] = field(default_factory=list)

    def op(self, kind: str, *inputs: onnx_ir.Value, **attributes: int | str | Sequence[int]) -> onnx_ir.Value:
        """The output of a new node."""
        node = onnx_ir.node(kind, inputs, attributes=attributes)
        node.outputs[0].name = f"{self.prefix}/{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray, dtype: DataType | None = None) -> onnx_ir.Value:
        """A new initialiser."""
        kind = None if dtype is None else dtype.numpy()
        tensor = onnx_ir.Tensor(np.ascontiguousarray(array if kind is None else array.astype(kind)))
        value = initializer(f"{self.prefix}:{len(self.initializers)}", tensor)
        self.initializers.append(value)
        return value

    def shaped(self, value: onnx_ir.Value, shape: Sequence[int]) -> onnx_ir.Value:
        return self.op("Reshape", value, self.constant(np.array(shape, np.int64)))

    def cast(self, value: onnx_ir.Value, dtype: DataType) -> onnx_ir.Value:
        return self.op("Cast", value, to=int(dtype))

    def floats(self, integers: onnx_ir.Value) -> onnx_ir.Value:
        """Integers of an initialiser as float32."""
        if not self.stream:
            return self.cast(integers, DataType.FLOAT)
        return self.op("DequantizeLinear", integers, self._one())

    def _one(self) -> onnx_ir.Value:
        one = self.constant(np.array(1, np.float32))
        return one if self.after is None else self.op("Pow", one, self.op("Size", self.after))

    def integers(self, array: Int32[np.ndarray, "..."]) -> onnx_ir.Value:
        """Integers as float32: most of them in the type that makes them smallest, what lies outside scattered in."""
        kind, outside = _cheapest(array)
        if not outside.any():
            return self.floats(self.constant(array, kind))
        flat = self.floats(self.constant(np.where(outside, 0, array).ravel(), kind))
        gaps, values = np.diff(np.flatnonzero(outside), prepend=0), array[outside]
        distances = self.cast(self.constant(gaps, narrowest(gaps)), DataType.INT64)
        places = self.op("CumSum", distances, self.constant(np.array(0, np.int64)))
        scattered = self.cast(self.constant(values, narrowest(values)), DataType.FLOAT)
        return self.shaped(self.op("ScatterElements", flat, places, scattered), array.shape)

    def places(self, array: Int32[np.ndarray, " lines"]) -> onnx_ir.Value:
        """Places as what Gather takes."""
        return self.cast(self.floats(self.constant(array, narrowest(array))), DataType.INT32)

    def scaled(self, value: onnx_ir.Value, *steps: Float64[np.ndarray, "_ _"]) -> onnx_ir.Value:
        """`value` times steps of rows (a, 1) and columns (1, b); what is one number goes into the other's."""
        whole = [s for s in steps if s.size > 1]
        number = prod(float(s[0, 0]) for s in steps if s.size == 1)
        if not whole:
            return value if number == 1 else self.op("Mul", value, self.constant(np.array(number, np.float32)))
        whole[0] = whole[0] * number
        for step in whole:
            value = self.op("Mul", value, self.constant(step.astype(np.float32)))
        return value


def _cheapest(array: Int32[np.ndarray, "..."]) -> tuple[DataType, np.ndarray]:
    """The type for most of the integers, and which of them (a mask) it leaves out."""
    found: list[tuple[float, DataType, np.ndarray]] = []
    for kind, low, high in INTEGERS:
        outside = (array < low) | (array > high)
        size = kind.itemsize * array.size
        if count := int(outside.sum()):
            gaps = np.diff(np.flatnonzero(outside), prepend=0)
            size += count * (narrowest(gaps).itemsize + narrowest(array[outside]).itemsize) + CHAIN_BYTES
        found.append((size, kind, outside))
        if not count:
            break
    _, kind, outside = min(found, key=lambda one: one[0])
    return kind, outside
