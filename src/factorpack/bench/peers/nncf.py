"""NNCF's compress_weights: int8, or int4 with scales estimated on the calibration data; its state as torch saves it.

A setting is int8, or int4xGROUP, with smaller groups where a row is no multiple of it. Convolutions get 8 bits in both.
NNCF cannot save what it made of a convolution: a file is read by compressing the architecture in the same way, without
values and data, and putting the file's tensors in place.
"""

from pathlib import Path
from typing import Any

import nncf
import torch
from nncf.parameters import BackupMode, CompressWeightsMode
from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode
from torch import nn

from factorpack.bench.protocol import Encoded, Subject, serve


def _compressed(model: nn.Module, setting: str, batches: list[Any], estimate: bool) -> Any:
    dataset = nncf.Dataset(batches)
    if setting == "int8":
        return nncf.compress_weights(model, mode=CompressWeightsMode.INT8_SYM, dataset=dataset)
    return nncf.compress_weights(
        model, mode=CompressWeightsMode.INT4_SYM, ratio=1.0, group_size=int(setting.removeprefix("int4x")),
        all_layers=True, dataset=dataset, scale_estimation=estimate, backup_mode=BackupMode.INT8_SYM,
        advanced_parameters=AdvancedCompressionParameters(group_size_fallback_mode=GroupSizeFallbackMode.ADJUST),
    )  # fmt: skip


def _like(batch: Any) -> Any:
    """A first sample of a batch without its values."""
    if isinstance(batch, dict):
        return {name: _like(part) for name, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(map(_like, batch))
    return [list(batch[:1].shape), str(batch.dtype).removeprefix("torch.")]


def _ones(like: Any) -> Any:
    if isinstance(like, dict):
        return {name: _ones(part) for name, part in like.items()}
    return tuple(map(_ones, like)) if isinstance(like, tuple) else torch.ones(like[0], dtype=getattr(torch, like[1]))


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    if not subject.batches:
        raise ValueError("NNCF traces a network with its calibration data, and there are none")
    weights = set(subject.weights)
    tensors = _compressed(subject.model, setting, subject.batches, estimate=True).state_dict()
    torch.save({"setting": setting, "tensors": tensors, "like": _like(subject.batches[0])}, path)
    return Encoded(name for name in weights if name in tensors and not tensors[name].is_floating_point())


def decode(model: nn.Module, path: Path) -> nn.Module:
    held = torch.load(path, weights_only=True)
    with torch.no_grad():
        # Scales of nothing are no numbers.
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    loaded = _compressed(model, held["setting"], [_ones(held["like"])], estimate=False)
    loaded.load_state_dict(held["tensors"])
    assert isinstance(loaded, nn.Module)
    return loaded


if __name__ == "__main__":
    serve(encode, decode)
