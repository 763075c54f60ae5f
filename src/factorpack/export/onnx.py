"""Composition: a compressed network as a file of standard ONNX operators that stays small and recombines itself."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from factorpack.container import read, write
from factorpack.errors import UnsupportedError
from factorpack.nn.loading import place_dense

MODES = ("fold", "stream")


@dataclass(frozen=True)
class OnnxReport:
    """What an export gave: bytes of the file, and `dense`, names of factored weights that are plain floats in it.

    `largest_difference` is that of onnxruntime's outputs from torch's, as a part of the largest output where that is
    above one; None where onnxruntime is not installed.
    """

    size_bytes: int
    dense: tuple[str, ...]
    largest_difference: float | None


def export_onnx(path: str | Path, model: nn.Module, batch: object, out: str | Path, mode: str = "fold") -> OnnxReport:
    """Writes a file as an ONNX graph of standard operators, which holds integers and recombines them itself.

    `model` is of the same architecture and gets the weights of the file; `batch` is one that it can be called with: a
    tensor, a tuple of positional or a dict of keyword arguments, all of them tensors. In the graph the first two axes
    of inputs (samples, places) are free where the network allows it. With `mode` "fold" a runtime that folds constants
    recombines each weight once, when it loads the graph; with "stream" onnxruntime does so at every run, in little
    memory. Where onnxruntime is installed, it runs the graph before that is written.

    Raises FormatError and MismatchError as `load`, MismatchError where onnxruntime computes something else,
    UnsupportedError where torch cannot export the network or onnxruntime cannot run it.

    Examples:
        >>> report = factorpack.export_onnx("model.fpk", build_model(), batch, "model.onnx")
        >>> session = onnxruntime.InferenceSession("model.onnx")
        >>> logits = session.run(None, {"x": batch.numpy()})[0]
    """
    if mode not in MODES:
        raise UnsupportedError(f"{mode!r} is no mode of export: choose {' or '.join(MODES)}")
    try:
        from factorpack.export.checking import largest_difference
        from factorpack.export.surgery import place_factors, to_bytes
        from factorpack.export.tracing import Call, trace
    except ModuleNotFoundError as error:
        raise UnsupportedError(f'{error.name} is missing: pip install "factorpack[onnx]"') from error
    contents, _ = read(Path(path))
    place_dense(model, contents.tensors, contents.dtypes, contents.aliases)
    call = Call.of(model, batch)
    graph = trace(model, call)
    dense = place_factors(graph, contents, mode == "stream")
    data = to_bytes(graph)
    difference = largest_difference(data, model, call)
    write(Path(out), data)
    return OnnxReport(len(data), dense, difference)
