"""HQQ, data-free: linear layers alone, its packed integers with scales in float16, as a safetensors file.

A setting is BITSxGROUP. Convolutions and embeddings, which HQQ has no layers for, stay dense.
"""

import json
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from factorpack.bench.protocol import Encoded, Subject, serve

METADATA = (
    "nbits",
    "group_size",
    "shape",
    "axis",
    "packing",
    "view_as_float",
    "channel_wise",
    "optimize",
    "round_zero",
)


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    bits, group = map(int, setting.split("x"))
    tensors: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {}
    chosen = {
        name: module
        for name, module in subject.model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel() % group == 0
    }
    for name, module in chosen.items():
        config = BaseQuantizeConfig(nbits=bits, group_size=group)
        layer = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        tensors[f"{name}.W_q"] = layer.W_q.data
        for part in ("scale", "zero"):
            tensors[f"{name}.{part}"] = layer.meta[part].half()
        told[name] = {key: layer.meta[key] for key in METADATA if key in layer.meta}
        told[name]["shape"] = list(layer.meta["shape"])
        told[name]["unpack_view_dtype"] = str(layer.meta.get("unpack_view_dtype", "torch.uint8"))
    tensors |= {
        name: tensor
        for name, tensor in subject.tensors.items()
        if not name.endswith(".weight") or name.removesuffix(".weight") not in chosen
    }
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"layers": json.dumps(told)})
    return Encoded(f"{name}.weight" for name in chosen)


def decode(model: nn.Module, path: Path) -> nn.Module:
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["layers"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Without torch.compile, which takes minutes before the first answer.
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    for name, meta in told.items():
        meta["shape"] = torch.Size(meta["shape"])
        meta["unpack_view_dtype"] = getattr(torch, meta["unpack_view_dtype"].removeprefix("torch."))
        meta |= {part: tensors.pop(f"{name}.{part}").float() for part in ("scale", "zero")}
        meta |= {"compute_dtype": torch.float32, "quant_scale": False, "quant_zero": False}
        layer = HQQLinear(None, BaseQuantizeConfig(), compute_dtype=torch.float32, device="cpu", initialize=False)
        layer.W_q = nn.Parameter(tensors.pop(f"{name}.W_q"), requires_grad=False)
        layer.meta, layer.in_gpu, layer.ready = meta, True, True
        layer.bias = tensors.pop(f"{name}.bias", None)
        model.set_submodule(name, layer)
    missing, unknown = model.load_state_dict(tensors, strict=False)
    if unknown:
        raise KeyError(unknown[0])
    for name in missing:
        if name.rpartition(".")[0] not in told:
            raise KeyError(name)
    return model


if __name__ == "__main__":
    serve(encode, decode)
