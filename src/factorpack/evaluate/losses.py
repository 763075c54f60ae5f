"""What a compressed weight loses: its distance to the original, and what the network's output loses by it alone.

Letters: P predictions, rows of output.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from factorpack.evaluate.report import Estimate
from factorpack.nn.statistics import call_model

PREDICTIONS = 100
"""Batches of the calibration are taken until there are so many rows of output."""
PASSES = 100
"""And until all weights together, one at a time, take so many forwards of a batch."""


def relative_error(original: Tensor, found: Tensor) -> float:
    """‖W−Ŵ‖²/‖W‖², both in the shape of the weight; of an original without power 0 or infinite."""
    original = original.detach().cpu().double()
    energy = float(original.square().sum())
    error = float((original - found.double()).square().sum())
    if not energy:
        return math.inf if error else 0.0
    return error / energy


def divergence(found: Tensor, expected: Tensor, output: str) -> Tensor:
    """What each prediction lost (P,), in the units in which half a layer's distortion predicts it.

    For "logits" the Kullback-Leibler divergence from the distributions of `expected`, in nats; for "embedding" half the
    squared distance, which is 1 − cosine where embeddings have unit length.
    """
    found, expected = (rows.double().reshape(-1, rows.shape[-1]) for rows in (found, expected))
    if output == "embedding":
        return 0.5 * (found - expected).square().sum(-1)
    logs, wanted = found.log_softmax(-1), expected.log_softmax(-1)
    # A class that is impossible to both adds nothing, though its logarithms differ by no number.
    parts = torch.where(wanted == -math.inf, 0.0, wanted.exp() * (wanted - logs))
    return parts.sum(-1)


def _estimate(losses: Tensor) -> Estimate:
    count = len(losses)
    error = float(losses.std()) / math.sqrt(count) if count > 1 else math.inf
    return Estimate(float(losses.mean()), error)


@contextmanager
def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` with other values in some tensors of its state dict, and its own ones again afterwards."""
    own = model.state_dict(keep_vars=True)
    kept = {name: own[name].detach().clone() for name in tensors}
    try:
        for name, tensor in tensors.items():
            own[name].data.copy_(tensor)
        yield
    finally:
        for name, tensor in kept.items():
            own[name].data.copy_(tensor)


class Probe:
    """The output of a network, in eval mode, on the first of its calibration's `batches`.

    There are more of them the fewer `weights` are to be looked at; `output` is "logits" or "embedding".
    """

    def __init__(self, model: nn.Module, batches: Iterable[object], output: str, weights: int) -> None:
        self.model, self.output = model, output
        self.batches: list[object] = []
        self._expected: list[Tensor] = []
        self.predictions = 0
        for batch in batches:
            self._expected.append(self._outputs([batch])[0])
            self.batches.append(batch)
            self.predictions += self._expected[-1].shape[:-1].numel()
            if self.predictions >= PREDICTIONS and len(self.batches) * weights >= PASSES:
                break

    def _outputs(self, batches: Sequence[object]) -> list[Tensor]:
        with torch.no_grad():
            return [call_model(self.model, batch) for batch in batches]

    def loss(self, tensors: Mapping[str, Tensor]) -> Estimate:
        """What is lost with these values in the network's tensors; the network is left as it was."""
        with replaced(self.model, tensors):
            found = self._outputs(self.batches)
        losses = [divergence(a, b, self.output) for a, b in zip(found, self._expected, strict=True)]
        return _estimate(torch.cat(losses))
