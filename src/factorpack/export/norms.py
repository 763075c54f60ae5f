"""Batch norms of a graph as a factor of the convolution's weight and its bias, so that none is left to be computed."""

import numpy as np
import onnx_ir

from factorpack._shapes import Float64
from factorpack.export.chain import initializer


def fold_batch_norms(graph: onnx_ir.Graph) -> None:
    """Folds those that follow a convolution; the weight's initialiser stays, times one number an output."""
    for place, norm in enumerate(list(graph)):
        convolution = norm.inputs[0].producer() if norm.op_type == "BatchNormalization" and norm.inputs[0] else None
        if convolution is None or convolution.op_type != "Conv" or len(convolution.outputs[0].uses()) > 1:
            continue
        found = [_values(value) for value in (*norm.inputs[1:], *convolution.inputs[2:])]
        weight, numbers = convolution.inputs[1], [value for value in found if value is not None]
        if weight is None or weight.shape is None or len(numbers) < len(found):
            continue
        scale, shift, mean, variance, *biases = numbers
        slope = scale / np.sqrt(variance + norm.attributes["epsilon"].as_float())
        slopes = _constant(graph, f"n{place}:0", slope.reshape(-1, *[1] * (len(weight.shape) - 1)), weight)
        bias = _constant(graph, f"n{place}:1", shift + (sum(biases) - mean) * slope, weight)
        scaled = onnx_ir.node("Mul", [weight, slopes])
        scaled.outputs[0].name = f"n{place}/0"
        inputs = [convolution.inputs[0], scaled.outputs[0], bias]
        folded = onnx_ir.Node("", "Conv", inputs, attributes=convolution.attributes.values())
        graph.insert_before(convolution, [scaled, folded])
        name = norm.outputs[0].name
        norm.outputs[0].replace_all_uses_with(folded.outputs[0], replace_graph_outputs=True)
        graph.remove([norm, convolution], safe=True)
        folded.outputs[0].name = name


def _values(value: onnx_ir.Value | None) -> Float64[np.ndarray, " channels"] | None:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy().astype(np.float64)


def _constant(graph: onnx_ir.Graph, name: str, array: np.ndarray, like: onnx_ir.Value) -> onnx_ir.Value:
    """A new initialiser, of the dtype of another."""
    assert like.dtype is not None
    value = initializer(name, onnx_ir.Tensor(array.astype(like.dtype.numpy())))
    graph.register_initializer(value)
    return value
