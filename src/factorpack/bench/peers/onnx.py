"""ONNX Runtime's dynamic quantisation to 8 bits, data-free: what it writes as an .onnx file, run by ONNX Runtime.

A setting is "tensor" or "channel", what a scale is for. Inputs of layers are quantised too, as they come: its score is
that of the network as it runs.
"""

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from factorpack.bench.protocol import Encoded, Subject, serve


class _Session(nn.Module):
    """A network that ONNX Runtime runs; inputs by their names, or in their order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs()]

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.names, args, strict=False)) | {n: t for n, t in kwargs.items() if n in self.names}
        return torch.from_numpy(self.session.run(None, {name: tensor.numpy() for name, tensor in given.items()})[0])


class _Listed(nn.Module):
    """A network that takes the parts of a batch in a list."""

    def __init__(self, inner: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, parts: list[torch.Tensor]) -> Any:
        return self.inner(**dict(zip(self.names, parts, strict=True))) if self.names else self.inner(*parts)


def _parts(batch: Any) -> list[torch.Tensor]:
    return list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, tuple) else [batch]


def _export(subject: Subject, path: Path) -> None:
    """The first axis of an input, and each that differs between calibration batches, may have any length."""
    if not subject.batches:
        raise ValueError("exporting takes an example input, which a task has in calibration()")
    batches = [_parts(batch) for batch in subject.batches]
    names = list(subject.batches[0]) if isinstance(subject.batches[0], dict) else []
    free = []
    for place, part in enumerate(batches[0]):
        lengths = [{batch[place].shape[axis] for batch in batches} for axis in range(part.dim())]
        free.append({axis: torch.export.Dim.AUTO for axis, found in enumerate(lengths) if axis == 0 or len(found) > 1})
    # An export takes a length of one for a constant.
    example = [torch.cat([part, part]) if len(part) == 1 else part for part in batches[0]]
    torch.onnx.export(
        _Listed(subject.model, names).eval(), (example,), path, dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=(free,), input_names=names or [f"input{place}" for place in range(len(example))],
    )  # fmt: skip


def _strip(path: Path) -> None:
    """Takes away where in the source each node came from: with a small network, more bytes than its weights."""
    model = onnx.load(path)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
    onnx.save(model, path)


def encode(subject: Subject, setting: str, path: Path) -> Encoded:
    weights = subject.weights
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "network.onnx"
        _export(subject, exported)
        _strip(exported)
        # Its integer convolutions take unsigned weights alone.
        quantize_dynamic(exported, path, per_channel=setting == "channel", weight_type=QuantType.QUInt8)
    initializers = onnx.load(path).graph.initializer
    floats = {tuple(sorted(t.dims)) for t in initializers if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) >= 2}
    # Names change in the export, layouts may be transposed; shapes tell.
    return Encoded(name for name, tensor in weights.items() if tuple(sorted(tensor.shape)) not in floats)


def decode(_model: nn.Module, path: Path) -> nn.Module:
    return _Session(path)


if __name__ == "__main__":
    serve(encode, decode)
