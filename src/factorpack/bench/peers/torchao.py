"""torchao, weight-only, data-free: its Int weights of 8 or 4 bits of linear layers and embeddings, as torch saves them.

A setting is int8 or int4, a scale a row, or int4x32, a scale for each 32 weights of a row. Convolutions stay dense:
torchao has no forward of theirs. It keeps integers of 4 bits in bytes, so that only zstd makes their files smaller.
"""

from pathlib import Path

import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from factorpack.bench.protocol import Encoded, Subject, serve


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    bits, _, group = setting.removeprefix("int").partition("x")
    chosen = {
        name: module
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
        and not (group and module.weight.shape[1] % int(group))
    }  # fmt: skip
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(int(group)) if group else PerAxis(0)
    )
    quantize_(subject.model, config, filter_fn=lambda _module, name: name in chosen)
    torch.save(subject.model.state_dict(), path)
    return Encoded(f"{name}.weight" for name in chosen)


def decode(model: nn.Module, path: Path) -> nn.Module:
    model.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return model


if __name__ == "__main__":
    serve(encode, decode)
