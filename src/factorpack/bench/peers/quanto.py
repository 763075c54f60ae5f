"""optimum-quanto, weight-only, data-free: linear layers and convolutions, as its own safetensors state.

A setting is int8, int4 or int2. What it made of which layer, which quanto keeps in a file of its own, is in the
metadata of the safetensors file.
"""

import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from optimum.quanto import QModuleMixin, freeze, qint2, qint4, qint8, quantization_map, quantize, requantize
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from factorpack.bench.protocol import Encoded, Subject, serve

KINDS = {"int8": qint8, "int4": qint4, "int2": qint2}


def _own_forwards(model: nn.Module) -> dict[str, Any]:
    """Forwards of layers whose class has one of its own: quanto puts its own layers in place, with torch's forwards."""
    found = {}
    for name, module in model.named_modules():
        for base in (nn.Linear, nn.Conv2d):
            if isinstance(module, base) and type(module).forward is not base.forward:
                found[name] = type(module).forward
    return found


class _Plain(nn.Module):
    """A network that is never run in inference mode, which quanto's tensors do not bear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(mode=False), torch.no_grad():
            return self.inner(*args, **kwargs)


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    model = subject.model
    quantize(model, weights=KINDS[setting])
    freeze(model)
    layers = quantization_map(model)
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    places: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        first = places.setdefault(tensor.data_ptr() or id(tensor), name)
        if first == name:
            tensors[name] = tensor.contiguous()
        else:
            tied[name] = first
    save_file(tensors, path, {"layers": json.dumps(layers), "tied": json.dumps(tied)})
    return Encoded(f"{name}.weight" for name in layers)


def decode(model: nn.Module, path: Path) -> nn.Module:
    with safe_open(path, "pt") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors |= {name: tensors[first] for name, first in json.loads(told["tied"]).items()}
    forwards = _own_forwards(model)
    kept = {name: buffer for name, buffer in model.named_buffers() if name not in model.state_dict()}
    requantize(model, tensors, json.loads(told["layers"]), torch.device("cpu"))
    # What is in no state, such as the mean of images, is part of the architecture; quanto builds anew without it.
    for name, buffer in kept.items():
        holder, _, last = name.rpartition(".")
        setattr(model.get_submodule(holder), last, buffer)
    for name, module in model.named_modules():
        if name in forwards and isinstance(module, QModuleMixin):
            module.forward = MethodType(forwards[name], module)
    return _Plain(model)


if __name__ == "__main__":
    serve(encode, decode)
