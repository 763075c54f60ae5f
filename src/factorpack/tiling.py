"""The exact, reversible reshape of a tensor into the matrix (d, N) that is factored.

Letters: m outputs, n inputs of one group, g groups, d rows along the basis, N tiles.

A tensor is first seen as a matrix (m, n), outputs x inputs. Where it is grouped, its rows fall into g
equal blocks, one a group, each with inputs of its own:

    Linear                  (out, in)                    (out, in)
    Conv                    (out, in/g, k...)            (out, in/g·k...)
    transposed Conv         (in, out/g, k...)            (g·out/g·k..., in/g)
    Embedding               (vocab, dim)                 (vocab, dim)
    any other               (a, b, ...)                  (a, b·...)

Then it is cut into tiles: along the outputs (a tile is a column, d = m) or along the inputs (a tile is
a run of d consecutive entries of the flattened matrix, the paper's order; the last one is filled with
zeros where d does not divide m·n).
"""

from dataclasses import dataclass
from math import prod

import numpy as np

from factorpack._shapes import Float32
from factorpack.errors import MismatchError


@dataclass(frozen=True)
class Tiling:
    """How a tensor of `shape` becomes a matrix (d, N) and back.

    `groups` is the number of groups; `transposed` says that inputs come first (transposed convolutions);
    `depth` is the length d of a tile along the inputs, 0 for tiles along the outputs.

    Raises MismatchError where shape, groups and depth do not fit one another.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    depth: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise MismatchError(f"a tiling needs two or more axes, none of them empty, not shape {self.shape}")
        if self.groups < 1 or self.shape[0] % self.groups:
            raise MismatchError(f"{self.groups} groups do not divide the first axis of shape {self.shape}")
        if not 0 <= self.depth <= prod(self.shape):
            raise MismatchError(f"tiles of {self.depth} entries do not fit a tensor of shape {self.shape}")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n): outputs x inputs of one group."""
        if self.transposed:
            inputs = self.shape[0] // self.groups
            return prod(self.shape) // inputs, inputs
        return self.shape[0], prod(self.shape[1:])

    @property
    def tiled_shape(self) -> tuple[int, int]:
        """(d, N): rows along the basis x tiles."""
        if self.depth:
            return self.depth, -(-prod(self.shape) // self.depth)
        return self.matrix_shape

    def matrix(self, tensor: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "m n"]:
        """The tensor as outputs x inputs; rows in g blocks where it is grouped."""
        if tensor.shape != self.shape:
            raise MismatchError(f"this tiling is for shape {self.shape}, not {tensor.shape}")
        if self.transposed:
            inputs = self.shape[0] // self.groups
            tensor = tensor.reshape(self.groups, inputs, -1).transpose(0, 2, 1)
        return np.ascontiguousarray(tensor).reshape(self.matrix_shape)

    def unmatrix(self, matrix: Float32[np.ndarray, "m n"]) -> Float32[np.ndarray, "..."]:
        """The inverse of `matrix`."""
        if matrix.shape != self.matrix_shape:
            raise MismatchError(f"this tiling is for a matrix {self.matrix_shape}, not {matrix.shape}")
        if self.transposed:
            matrix = matrix.reshape(self.groups, -1, self.matrix_shape[1]).transpose(0, 2, 1)
        return np.ascontiguousarray(matrix).reshape(self.shape)

    def tile(self, tensor: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "d N"]:
        """The tensor as the matrix (d, N) that is factored."""
        matrix = self.matrix(tensor)
        if not self.depth:
            return matrix
        depth, count = self.tiled_shape
        flat = np.zeros(depth * count, matrix.dtype)
        flat[: matrix.size] = matrix.ravel()
        return np.ascontiguousarray(flat.reshape(count, depth).T)

    def untile(self, tiled: Float32[np.ndarray, "d N"]) -> Float32[np.ndarray, "..."]:
        """The inverse of `tile`; what fills the last tile is dropped."""
        if tiled.shape != self.tiled_shape:
            raise MismatchError(f"this tiling is for tiles {self.tiled_shape}, not {tiled.shape}")
        if self.depth:
            tiled = np.ascontiguousarray(tiled.T).reshape(-1)[: prod(self.shape)].reshape(self.matrix_shape)
        return self.unmatrix(tiled)
