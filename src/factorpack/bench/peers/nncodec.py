"""NNCodec, Fraunhofer HHI's encoder and decoder of Neural Network Coding (ISO/IEC 15938-17); it uses no data.

A setting is the quantisation parameter qp of the weights; all else is as NNCodec sets it, which includes a finer
qp for tensors of one dimension. It stores no integers; the counters of batch norms are not used when a network is run.
"""

import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from torch import nn

from factorpack.bench.protocol import Encoded, Subject, place, serve

UNUSED = ("torchvision", "cv2", "pandas", "h5py", "torchmetrics", "ptflops")
"""Imported for its training examples alone."""
COUNTER = "num_batches_tracked"


class _Absent(types.ModuleType):
    """A package that is imported but not used; every name in it is there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class _Finder:
    """Finds the unused packages and whatever is in them."""

    @staticmethod
    def find_spec(name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, _Finder, is_package=True) if name.partition(".")[0] in UNUSED else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    @staticmethod
    def exec_module(_module: types.ModuleType) -> None:
        return None


def _codec() -> Any:
    sys.meta_path.insert(0, _Finder)
    import nncodec.nn

    sys.meta_path.remove(_Finder)
    # Others look for them, to do without.
    for name in [name for name, module in sys.modules.items() if isinstance(module, _Absent)]:
        del sys.modules[name]
    return nncodec.nn


codec = _codec()


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    integers = [name for name, t in subject.tensors.items() if not t.is_floating_point() and not name.endswith(COUNTER)]
    if integers:
        raise ValueError(f"NNCodec stores no integers: {integers[0]}")
    tensors = {name: t.float().numpy().copy() for name, t in subject.tensors.items() if t.is_floating_point()}
    with tempfile.TemporaryDirectory() as folder:
        stream = codec.encode(tensors, {"qp": int(setting), "results": folder, "verbose": False})
    path.write_bytes(bytes(stream))
    return Encoded(subject.weights)


def decode(model: nn.Module, path: Path) -> nn.Module:
    found = codec.decode(bytearray(path.read_bytes()))
    tensors = {name: torch.from_numpy(np.asarray(values).copy()) for name, values in found.items()}
    counters = {name: t for name, t in model.state_dict().items() if not t.is_floating_point()}
    return place(model, counters | tensors)


if __name__ == "__main__":
    serve(encode, decode)
