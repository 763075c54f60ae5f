"""What a network in training is held to: its outputs, and what its blocks give out, against those of the original.

Letters: N samples, C classes, E embedding dimensions.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAIRS = 10.0
"""Weight of the similarities between samples beside those of each sample to its original."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of what a network returns and what is expected of it."""


def logits_loss(found: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """The Kullback-Leibler divergence from the distributions of the original's logits, in nats a prediction.

    Both (..., C); the mean over all leading axes. Logits are divided by the temperature before and the divergence is
    multiplied by its square after, so that gradients stay as large (Hinton, Vinyals & Dean 2015).
    """
    classes = found.shape[-1]
    rows = (logits.float().reshape(-1, classes) for logits in (found, expected))
    # Not divided by one: of a language model that is a pass over its largest tensor.
    logs, wanted = ((row if temperature == 1 else row / temperature).log_softmax(-1) for row in rows)
    return temperature**2 * F.kl_div(logs, wanted, log_target=True, reduction="batchmean")


SURE = 0.8
TEMPERATURES = [2 ** (eighth / 8) for eighth in range(17)]


def temperature_for(logits: Iterable[Tensor]) -> float:
    """The temperature to compare a network at whose logits, batch by batch (..., C), are these: from 1 to 4.

    The highest of `TEMPERATURES` at which the largest probability of a prediction is at least `SURE` in the mean, and
    1 where it never is. The gradient of a divergence is p − q, next to nothing where both are sure; networks are sure
    of most of what they were trained on, and hardly any of it would teach (docs/log.md).
    """
    tops = []
    for batch in logits:
        wide = batch.float()
        tops.append(torch.stack([(wide / by).softmax(-1).amax(-1).mean() for by in TEMPERATURES]))
    if not tops:
        return 1.0
    means = torch.stack(tops).mean(0).tolist()
    return max((by for by, mean in zip(TEMPERATURES, means, strict=True) if mean >= SURE), default=1.0)


def squares_loss(found: Tensor, expected: Tensor) -> Tensor:
    """The squared error of logits, each sample's mean left out, relative to their power.

    Both (..., C). It minds every class alike, however sure the original is of another (Ba & Caruana 2014; against the
    divergence: Kim et al. 2021).
    """
    centred, wanted = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (found, expected))
    return F.mse_loss(centred, wanted) / wanted.square().mean().clamp_min(1e-12)


def embedding_loss(found: Tensor, expected: Tensor) -> Tensor:
    """1 − cosine to the original's embeddings, and ten times the mean squared error of cosines between samples.

    Both (N, E), or (..., E) with the leading axes taken as samples (similarities of pairs: Park et al. 2019).
    """
    size = found.shape[-1]
    units, wanted = (F.normalize(rows.float().reshape(-1, size), dim=-1) for rows in (found, expected))
    return (1 - (units * wanted).sum(-1)).mean() + PAIRS * F.mse_loss(units @ units.T, wanted @ wanted.T)


LOSSES: dict[str, Loss] = {"divergence": logits_loss, "squares": squares_loss, "cosine": embedding_loss}
"""The ways to compare outputs."""
SUITED = {"logits": "divergence", "embedding": "cosine"}
"""The way that suits what a network returns."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network: elements of its lists and sequences that are made of modules themselves."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            found += [element for element in module if any(True for _ in element.children())]
    return [block for block in found if not isinstance(block, nn.ModuleList | nn.Sequential)]


@contextmanager
def watched(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What each of `modules` gives out in the calls made meanwhile, in the order of the calls."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, found: object) -> None:
        first = found[0] if isinstance(found, tuple) else found
        if isinstance(first, Tensor) and first.is_floating_point():
            outputs.append(first)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class _RelativeError(torch.autograd.Function):
    """The squared error of the first, relative to the power of the second, in one pass over both in their own dtype.

    What blocks give out is the most that a training step has in memory; in float32 this took a seventh of the step.
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, expected: Tensor) -> Tensor:
        wide = torch.promote_types(expected.dtype, torch.float32)
        error = found - expected
        power = torch.linalg.vector_norm(expected, dtype=wide).square().clamp_min(1e-12)
        ctx.save_for_backward(error, power)
        relative: Tensor = torch.linalg.vector_norm(error, dtype=wide).square() / power
        return relative

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        error, power = ctx.saved_tensors
        return error * (2 * gradient / power), None


def features_loss(found: list[Tensor], expected: list[Tensor], mask: Tensor | None = None) -> Tensor:
    """The mean over blocks of the squared error of their outputs, relative to their power (Romero et al. 2015).

    `mask` (N, T) tells which positions of sequences count, in outputs that begin with these axes: what blocks give
    out where there is but padding nobody reads, and compression lets it go.
    """
    errors = []
    for one, other in zip(found, expected, strict=True):
        if mask is not None and other.shape[:2] == mask.shape:
            one, other = one[mask.bool()], other[mask.bool()]  # noqa: PLW2901
        errors.append(_RelativeError.apply(one, other))  # type: ignore[no-untyped-call]
    return torch.stack(errors).mean()
