"""Whether a graph computes what the network does."""

import numpy as np
import torch
from torch import Tensor, nn

from factorpack.errors import MismatchError, UnsupportedError
from factorpack.export.tracing import Call, Positional

TOLERANCE = 1e-4


def largest_difference(data: bytes, model: nn.Module, call: Call) -> float | None:
    """Of onnxruntime's outputs from torch's, for the batch and its first sample alone, None without onnxruntime.

    Raises MismatchError where it is too large, UnsupportedError where onnxruntime cannot run the graph.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    parts, found = [call], []
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        if all(entry.shape and not isinstance(entry.shape[0], int) for entry in session.get_inputs()):
            parts.append(call.first())
        for part in parts:
            # Those that the network does not use are no inputs of the graph.
            given = {entry.name: part.inputs[entry.name].detach().cpu().numpy() for entry in session.get_inputs()}
            found.append(session.run(None, given))
            names = [entry.name for entry in session.get_outputs()]
    except Exception as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedError(f"onnxruntime cannot run the graph, so nothing was written: {cause}") from error
    largest = 0.0
    for part, outputs in zip(parts, found, strict=True):
        with torch.no_grad():
            expected = Positional(model, part).eval()(*part.inputs.values())
        for name, output, wanted in zip(names, outputs, expected, strict=True):
            difference = _difference(output, wanted)
            limit = max(TOLERANCE, 10 * torch.finfo(wanted.dtype).eps) if wanted.is_floating_point() else 0
            if not difference <= limit:
                raise MismatchError(
                    f"onnxruntime's {name} differs from torch's by {difference:.2g}, more than {limit:.2g}; nothing "
                    "was written: is the network the same at each call, and free of choices that depend on its inputs?"
                )
            largest = max(largest, difference)
    return largest


def _difference(found: np.ndarray, expected: Tensor) -> float:
    wanted = expected.detach().cpu().double().numpy()
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.size:
        return 0.0
    differences = np.abs(found.astype(np.float64) - wanted)
    differences[(found == wanted) | (np.isnan(found) & np.isnan(wanted))] = 0
    return float(differences.max() / max(1.0, np.abs(wanted[np.isfinite(wanted)]).max(initial=0)))
