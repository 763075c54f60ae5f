"""Rounding to multiples of a step, relative to each weight's deviation, and an entropy coder: the honest floor.

The integers of a weight are coded by a range coder at their own frequencies, which are in the file; tensors of one
dimension are float16. No data, no search: the least that any method has to beat.
"""

from pathlib import Path
from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from factorpack.bench.indexed import Reader, joined, kept
from factorpack.bench.protocol import Encoded, Subject, place, serve


def _model(frequencies: NDArray[Any]) -> object:
    return constriction.stream.model.Categorical(frequencies.astype(np.float64), perfect=False)


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    index, body = [], []
    weights = subject.weights
    for name, tensor in subject.tensors.items():
        values = tensor.float().numpy().reshape(-1)
        step = float(np.float32(float(setting) * values.std())) if name in weights else 0.0
        if step:
            integers = np.rint(values / step).astype(np.int32)
            low = int(integers.min())
            counts = np.bincount(integers - low)
            # Frequencies of a half float: nothing that occurs may vanish.
            frequencies = np.maximum(counts / counts.max(), 6e-5).astype(np.float16)
            coder = constriction.stream.queue.RangeEncoder()
            coder.encode(integers - low, _model(frequencies))
            coded = coder.get_compressed().tobytes()
            index.append([name, list(tensor.shape), step, low, len(frequencies), len(coded)])
            body += [frequencies.tobytes(), coded]
        else:
            values = kept(tensor)
            index.append([name, list(tensor.shape), values.dtype.str])
            body.append(values.tobytes())
    path.write_bytes(joined(index, body))
    return Encoded(weights)


def decode(model: nn.Module, path: Path) -> nn.Module:
    file = Reader(path.read_bytes())
    tensors = {}
    for name, shape, *rest in file.index:
        size = int(np.prod(shape))
        if len(rest) == 1:
            values = file.take(rest[0], size)
        else:
            step, low, alphabet, coded = rest
            frequencies = file.take("<f2", alphabet)
            coder = constriction.stream.queue.RangeDecoder(file.take("<u4", coded // 4).astype(np.uint32))
            values = (coder.decode(_model(frequencies), size) + low) * np.float32(step)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).reshape(shape)
    return place(model, tensors)


if __name__ == "__main__":
    serve(encode, decode)
