"""Files of peers that come without one: an index of what is in it, as JSON in zlib, and then the bytes."""

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

LENGTH = 4
"""Bytes that the length of the index takes."""


def kept(tensor: torch.Tensor) -> NDArray[Any]:
    """What is not quantised: reals as float16, integers as they are."""
    return tensor.half().numpy() if tensor.is_floating_point() else tensor.numpy().astype("<i8")


def joined(index: Sequence[Any], body: Sequence[bytes]) -> bytes:
    """The file."""
    head = zlib.compress(json.dumps(index).encode(), 9)
    return len(head).to_bytes(LENGTH, "little") + head + b"".join(body)


class Reader:
    """The `index` of a file, and its bytes one part after another."""

    def __init__(self, data: bytes) -> None:
        self.place = LENGTH + int.from_bytes(data[:LENGTH], "little")
        self.data = data
        self.index: list[Any] = json.loads(zlib.decompress(data[LENGTH : self.place]))

    def take(self, dtype: str, size: int) -> NDArray[Any]:
        """The next `size` numbers, an array of its own."""
        found = np.frombuffer(self.data, dtype, size, self.place).copy()
        self.place += found.nbytes
        return found
