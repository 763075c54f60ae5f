"""Palettes, as coremltools makes them by default: k-means of each weight, packed indices, values in float16.

Weights of at most 2,048 entries stay float16. k-means sees at most 100,000 entries of a weight, drawn with seed 0.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import nn

from factorpack.bench.indexed import Reader, joined, kept
from factorpack.bench.protocol import Encoded, Subject, place, serve

SMALLEST = 2048
SEEN = 100_000


def _values(entries: NDArray[np.float32], bits: int) -> NDArray[np.float16]:
    """The palette, sorted."""
    if len(entries) > SEEN:
        entries = np.random.default_rng(0).choice(entries, SEEN, replace=False)
    count = min(2**bits, len(np.unique(entries)))
    found = KMeans(count, n_init=1, random_state=0).fit(entries[:, None]).cluster_centers_[:, 0]
    return np.sort(np.pad(found, (0, 2**bits - count), mode="edge")).astype(np.float16)


def _packed(indices: NDArray[np.uint8], bits: int) -> bytes:
    return np.packbits(np.unpackbits(indices[:, None], axis=1)[:, 8 - bits :]).tobytes()


def _unpacked(data: NDArray[np.uint8], bits: int, size: int) -> NDArray[np.uint8]:
    places = np.unpackbits(data)[: size * bits].reshape(size, bits)
    return np.packbits(np.pad(places, ((0, 0), (8 - bits, 0))), axis=1)[:, 0]


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    bits = int(setting)
    index, body, quantised = [], [], []
    for name, tensor in subject.tensors.items():
        if tensor.dim() >= 2 and tensor.numel() > SMALLEST:
            values = tensor.float().numpy().reshape(-1)
            palette = _values(values, bits)
            wide = palette.astype(np.float32)
            # The nearest of sorted values lies between the middles of neighbours.
            nearest = np.searchsorted((wide[1:] + wide[:-1]) / 2, values).astype(np.uint8)
            index.append([name, list(tensor.shape), bits])
            body += [palette.tobytes(), _packed(nearest, bits)]
            quantised.append(name)
        else:
            values = kept(tensor)
            index.append([name, list(tensor.shape), values.dtype.str])
            body.append(values.tobytes())
    path.write_bytes(joined(index, body))
    return Encoded(quantised)


def decode(model: nn.Module, path: Path) -> nn.Module:
    file = Reader(path.read_bytes())
    tensors = {}
    for name, shape, kind in file.index:
        size = int(np.prod(shape))
        if isinstance(kind, int):
            palette = file.take("<f2", 2**kind).astype(np.float32)
            values = palette[_unpacked(file.take("u1", -(-size * kind // 8)), kind, size)]
        else:
            values = file.take(kind, size)
        tensors[name] = torch.from_numpy(values).reshape(shape)
    return place(model, tensors)


if __name__ == "__main__":
    serve(encode, decode)
