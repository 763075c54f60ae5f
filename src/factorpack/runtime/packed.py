"""A packed weight in a torch module: integer factors as buffers, recombined at every use.

Letters: d rows along the basis, k rank, N tiles.

The result is bit for bit that of `FactoredWeight.tensor`: the integer product is exact, and it is scaled in
float64. Devices without float64 cannot run it.
"""

from math import prod

import numpy as np
import torch
from torch import nn

from factorpack.errors import UnsupportedError
from factorpack.factors import FactoredWeight, Grid, OneHotCodes
from factorpack.tiling import Tiling

# Integers up to this are exact even in bfloat16, which torch may put behind a float32 product of matrices
# where torch.set_float32_matmul_precision allows it.
EXACT_OPERAND = 256
FLOAT32_BITS = 24
FLOAT64_BITS = 53
BLOCK = 2**18  # entries that are scaled in float64 at a time


class PackedWeight(nn.Module):
    """The factors of one weight, as the parametrisation of a parameter of no elements.

    Its `forward` takes that parameter for its dtype alone, so that `.half()` or `.to(dtype)` act on the weight
    as on any other; `dtype` is the one the weight was stored from, through which it is rounded as well.
    Buffers: `basis` (d, k) int8, int16 or int32, absent for the identity; `codes` (k, N) of the same or two a
    byte, (ceil(k·N/2),); for one-hot codes their indices (N,); `row_steps` and
    `column_steps`, the bits of float32 values held as int32.
    """

    basis: torch.Tensor | None
    codes: torch.Tensor
    row_steps: torch.Tensor
    column_steps: torch.Tensor | None

    def __init__(self, weight: FactoredWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.tiling: Tiling = weight.tiling
        self.dtype = dtype
        self.code_shape = weight.codes.shape
        self.one_hot = isinstance(weight.codes, OneHotCodes)
        self.halves = not isinstance(weight.codes, OneHotCodes) and _fits(weight.codes.grid, 8)
        self.product_dtype = _product_dtype(weight)
        # Steps times steps is exact in float64; so is the product times a step, but only while it is small.
        self.scaled_in_turn = weight.product_bound <= 2 ** (FLOAT64_BITS - FLOAT32_BITS)

        integers = weight.basis.integers
        basis = None if integers is None else _tensor(integers, _signed(weight.basis.grid))
        self.register_buffer("basis", basis)
        self.register_buffer("row_steps", _step_bits(weight.basis.grid))
        if isinstance(weight.codes, OneHotCodes):
            self.register_buffer("codes", _tensor(weight.codes.indices, _unsigned(weight.codes.rank)))
            self.register_buffer("column_steps", None)
        else:
            codes = weight.codes.integers
            packed = _two_a_byte(codes) if self.halves else _tensor(codes, _signed(weight.codes.grid))
            self.register_buffer("codes", packed)
            self.register_buffer("column_steps", _step_bits(weight.codes.grid))

    def forward(self, placeholder: torch.Tensor) -> torch.Tensor:
        """The weight in its own shape and the dtype of `placeholder`."""
        device = self.codes.device.type
        if torch.is_autocast_enabled(device):
            # Autocast would round the integer product to half precision.
            with torch.autocast(device, enabled=False):
                return self._tensor().to(self.dtype).to(placeholder.dtype)
        return self._tensor().to(self.dtype).to(placeholder.dtype)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        """The placeholder itself; raises UnsupportedError for a weight, which cannot be assigned."""
        if value.numel():
            raise UnsupportedError(
                "a weight that is recombined on the fly cannot be assigned; place the file in dense mode to change it"
            )
        return value

    def extra_repr(self) -> str:
        return f"shape={self.tiling.shape}, rank={self.code_shape[0]}, dtype={self.dtype}"

    def _tensor(self) -> torch.Tensor:
        return untiled(self._gathered() if self.one_hot else self._product(), self.tiling)

    def _gathered(self) -> torch.Tensor:
        assert self.basis is not None
        codewords = (self.basis * _steps(self.row_steps)[:, None]).to(torch.float32)
        # Rows of the transpose are gathered whole; tiles along the inputs then need no further copy.
        return codewords.T.contiguous().index_select(0, self.codes.to(torch.int32)).T

    def _product(self) -> torch.Tensor:
        assert self.column_steps is not None
        depth, count = self.tiling.tiled_shape
        left = codes = self._codes()
        if self.basis is not None:
            left, codes = self.basis.to(self.product_dtype), codes.to(self.product_dtype)
        rows = _steps(self.row_steps)[:, None].expand(depth, 1)
        columns = _steps(self.column_steps)[None, :]
        # In blocks, so that float64 never takes more than a few MB; a compiler is given one expression instead.
        lines = depth if torch.compiler.is_compiling() else max(1, BLOCK // count)
        tiles = torch.empty((depth, count), dtype=torch.float32, device=left.device)
        for first in range(0, depth, lines):
            block = slice(first, first + lines)
            product = left[block] if self.basis is None else left[block] @ codes
            if self.scaled_in_turn:
                tiles[block] = (product * rows[block]).mul_(columns)
            else:
                tiles[block] = product * (rows[block] * columns)
        return tiles

    def _codes(self) -> torch.Tensor:
        if not self.halves:
            return self.codes
        low = ((self.codes & 15) ^ 8) - 8
        return torch.cat((low, self.codes >> 4))[: prod(self.code_shape)].reshape(self.code_shape)


def _fits(grid: Grid, limit: int) -> bool:
    return -limit <= grid.low and grid.high < limit


def _signed(grid: Grid) -> torch.dtype:
    if _fits(grid, 2**7):
        return torch.int8
    return torch.int16 if _fits(grid, 2**15) else torch.int32


def _unsigned(count: int) -> torch.dtype:
    if count <= 2**8:
        return torch.uint8
    return torch.int16 if count <= 2**15 else torch.int32


def _tensor(integers: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(integers, dtype=dtype)


def _two_a_byte(codes: np.ndarray) -> torch.Tensor:
    """Codes in -8..7: the first half of them in the low four bits, the second in the high four."""
    half = (codes.size + 1) // 2
    flat = np.zeros(2 * half, np.int8)
    flat[: codes.size] = codes.ravel()
    return torch.from_numpy(flat[:half] & 15 | flat[half:] << 4)


def _step_bits(grid: Grid) -> torch.Tensor:
    """The float32 steps, seen as int32: `.half()` and `.to(dtype)` convert floating-point buffers, never these."""
    return torch.from_numpy(grid.steps.astype(np.float32)).view(torch.int32)


def _steps(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float32).to(torch.float64)


def _product_dtype(weight: FactoredWeight) -> torch.dtype:
    """The narrowest floating point type in which B·Z is exact in whatever order it is added."""
    if isinstance(weight.codes, OneHotCodes) or weight.product_bound >= 2**FLOAT32_BITS:
        return torch.float64
    operands = max(abs(limit) for grid in (weight.basis.grid, weight.codes.grid) for limit in (grid.low, grid.high))
    return torch.float32 if operands <= EXACT_OPERAND else torch.float64


def untiled(tiles: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """`Tiling.untile` for torch: (d, N) to the tensor's own shape, contiguous."""
    if tiling.depth:
        tiles = tiles.T.reshape(-1)[: prod(tiling.shape)].reshape(tiling.matrix_shape)
    if tiling.transposed:
        tiles = tiles.reshape(tiling.groups, -1, tiling.matrix_shape[1]).transpose(1, 2)
    return tiles.reshape(tiling.shape).contiguous()
