"""Palettes, as coremltools makes them by default: k-means of each weight, packed indices, values in float16.

Weights of at most 2,048 entries stay float16. k-means sees at most 100,000 entries of a weight, drawn with seed 0.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import nn

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


def _unpacked(data: bytes, bits: int, size: int) -> NDArray[np.uint8]:
    places = np.unpackbits(np.frombuffer(data, np.uint8))[: size * bits].reshape(size, bits)
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
            kept = tensor.half().numpy() if tensor.is_floating_point() else tensor.numpy().astype("<i8")
            index.append([name, list(tensor.shape), kept.dtype.str])
            body.append(kept.tobytes())
    head = zlib.compress(json.dumps(index).encode(), 9)
    path.write_bytes(len(head).to_bytes(4, "little") + head + b"".join(body))
    return Encoded(quantised)


def decode(model: nn.Module, path: Path) -> nn.Module:
    data = path.read_bytes()
    start = 4 + int.from_bytes(data[:4], "little")
    tensors = {}
    for name, shape, kind in json.loads(zlib.decompress(data[4:start])):
        size = int(np.prod(shape))
        if isinstance(kind, int):
            palette = np.frombuffer(data, "<f2", 2**kind, start)
            start += palette.nbytes
            taken = -(-size * kind // 8)
            values = palette.astype(np.float32)[_unpacked(data[start : start + taken], kind, size)]
        else:
            values = np.frombuffer(data, kind, size, start).copy()
            taken = values.nbytes
        start += taken
        tensors[name] = torch.from_numpy(values).reshape(shape)
    return place(model, tensors)


if __name__ == "__main__":
    serve(encode, decode)
