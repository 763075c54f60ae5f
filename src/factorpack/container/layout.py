"""The layout of a `.fpk` file: ids, limits and the bill.

A file is a valid safetensors file with the metadata {"factorpack": VERSION} and one U8 tensor, "factorpack":

    u32     bytes of the index as stored; u32 bytes of the index; u32 CRC-32 of the index as stored
    index   deflated: for each tensor a kind, a dtype, its shape; sizes of the records; the names
    records of the weights in the order of the index, then one of the small tensors and one of the exact ones,
            where there are any; each followed by its u32 CRC-32

All integers are little-endian. `docs/format.md` specifies the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from factorpack.factors import FactoredVector, FactoredWeight

VERSION = "0.1"
KEY = "factorpack"
HEAD_BYTES = 12
CHECKSUM_BYTES = 4
WEIGHT, VECTOR, EXACT, ALIAS = range(4)
DTYPES = (
    "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex64", "complex128", "uint16", "uint32", "uint64",
)  # fmt: skip
"""A dtype's place is its id in the file."""
FACTORED_DTYPES = DTYPES[:4]
"""Those that weights and small tensors may have."""
NUMPY_DTYPES = {name: np.dtype("float32" if name == "bfloat16" else name).newbyteorder("<").str for name in DTYPES}
"""How exact tensors are held; bfloat16, which NumPy lacks, as the float32 of equal value."""
MAX_INDEX_BYTES = 1 << 28
MAX_AXES = 16
PARTS = ("codes", "basis", "tables", "steps", "small tensors", "exact tensors", "checksums", "index", "header")

Value = FactoredWeight | FactoredVector | np.ndarray


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds, by name: `tensors`, their original `dtypes` (all names), and `aliases` of tied names.

    An array is an exact tensor; one of dtype bfloat16 is held as float32.
    """

    tensors: Mapping[str, Value]
    dtypes: Mapping[str, str]
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class TensorBill:
    """The bytes of one tensor's record by part; small and exact tensors share records, see `Bill`."""

    name: str
    form: str
    shape: tuple[int, ...]
    parts: Mapping[str, int]

    @property
    def size_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Bill:
    """Where the bytes of a file are: weights one by one, the rest by part; the sum is the file's size."""

    weights: tuple[TensorBill, ...]
    shared: Mapping[str, int]
    size_bytes: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part over the whole file."""
        total = dict.fromkeys(PARTS, 0)
        for parts in (*(weight.parts for weight in self.weights), self.shared):
            for part, size in parts.items():
                total[part] += size
        return total
