"""Every tensor cast to a float of 16 bits, in a safetensors file that zstd compresses."""

from pathlib import Path

import torch
import zstandard
from safetensors.torch import load, save
from torch import nn

from factorpack.bench.protocol import Encoded, Subject, place, serve

LEVEL = 19


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[setting]
    cast = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in subject.tensors.items()
    }
    path.write_bytes(zstandard.ZstdCompressor(level=LEVEL).compress(save(cast)))
    return Encoded(subject.weights)


def decode(model: nn.Module, path: Path) -> nn.Module:
    return place(model, load(zstandard.ZstdDecompressor().decompress(path.read_bytes())))


if __name__ == "__main__":
    serve(encode, decode)
