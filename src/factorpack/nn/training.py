"""Training steps of a compressed network: what is minimised, with which optimiser, at which rates.

Latents count in steps of the file's grids, so that one learning rate serves every layer and every network.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from factorpack.nn.distillation import LOSSES, SUITED, Loss, blocks, features_loss, logits_loss, watched
from factorpack.nn.lessons import mask_of
from factorpack.nn.statistics import call_model
from factorpack.nn.trainable import TrainableModel, TrainableVector, TrainableWeight

WARM_UP = 0.02
"""Part of a training in which rates rise."""
LAST = 0.01
"""Part of the rates that is left at the end."""
SECOND, LOWER, LONG = 0.9, 0.4, 4800
"""Where batch norms go by batches, in a training of so many steps, rates fall anew from this part of it on, from this
part of the highest, with norms as in the file. Latents are taken to the middles of their cells before, where few codes
have way enough to leave them: the rest of the network comes to terms with those that there are. In a short training the
end of the first descent is worth more (docs/log.md)."""
BASES, SMALL, STEPS = 0.5, 5.0, 0.02
"""Rates of bases, small tensors and log2 of steps, in units of the rate of codes. Steps are slow: the price pulls all
of them one way from the first batch on, while what coarser ones cost only shows once latents have left the middles of
their cells."""
TRAVEL, FURTHER, HIGHEST = 8.0, 22.5, 0.01
"""Grid steps that a code can go in a training, the same where batch norms go by batches, and its highest rate. Codes go
to and fro at the edges of their cells, and what is kept is a draw of where they were (docs/log.md)."""
BETAS = (0.9, 0.999)
CLIPPED = 3.0
"""A gradient that is so many times longer than they usually are is cut to that."""
SMOOTHING = 0.02


@dataclass(frozen=True)
class Objective:
    """What is minimised: a task's `loss`, distillation from the original network, or a blend.

    `distil` is the share of distillation; None leaves it to the data: with targets and a loss that loss alone,
    without either distillation alone. `output` ("logits" or "embedding") is what the network returns, `compare` how
    that is compared (`LOSSES`; "auto": `SUITED`), by divergence at `temperature`; `features` is the weight of what
    blocks give out beside that, and `orthogonality` that of squared cosines between columns of a basis.
    """

    output: str = "logits"
    loss: Loss | None = None
    distil: float | None = None
    compare: str = "auto"
    features: float = 0.0
    orthogonality: float = 0.0
    temperature: float = 1.0

    @property
    def way(self) -> str:
        """The name in `LOSSES` of how outputs are compared."""
        return SUITED[self.output] if self.compare == "auto" else self.compare

    def share(self, targets: Any) -> float:
        """The share of distillation for a batch with these targets."""
        if targets is None or self.loss is None:
            return 1.0
        return 0.0 if self.distil is None else self.distil


class Learner(nn.Module):
    """The network in training beside the original: a batch and its targets to their loss."""

    def __init__(self, model: TrainableModel, original: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.original = original.eval().requires_grad_(False)
        self.objective = objective

    def train(self, mode: bool = True) -> "Learner":
        """Both networks stay in eval mode: they are to agree there. (Batch norms: `nn.norms`.)"""
        self.training = mode
        return self

    def forward(self, batch: Any, targets: Any) -> Tensor:
        loss = self.loss(self.model, batch, targets, self.objective.features)
        weight = self.objective.orthogonality
        return loss + weight * orthogonality(self.model) if weight else loss

    def loss(self, model: nn.Module, batch: Any, targets: Any, features: float = 0.0) -> Tensor:
        """Of `model`, which has the original's outputs, on one batch; `features` is the weight of its blocks."""
        objective, share = self.objective, self.objective.share(targets)
        if not share:
            assert objective.loss is not None
            return objective.loss(call_model(model, batch), targets).float()
        network = model.network if isinstance(model, TrainableModel) else model
        with torch.no_grad(), watched(blocks(self.original) if features else []) as wanted:
            expected = call_model(self.original, batch)
        with watched(blocks(network) if features else []) as given:
            found = call_model(model, batch)
        if objective.way == "divergence":
            loss = share * logits_loss(found, expected, objective.temperature)
        else:
            loss = share * LOSSES[objective.way](found, expected)
        if given:
            loss = loss + share * features * features_loss(given, wanted, mask_of(batch))
        if share < 1:
            assert objective.loss is not None
            loss = loss + (1 - share) * objective.loss(found, targets).float()
        return loss


def orthogonality(model: TrainableModel) -> Tensor:
    """The mean over bases of the squared cosines between their columns, summed over pairs, for each column.

    0 for orthogonal columns of any length. (As a penalty in training: He, Jiang & Wu 2024.)
    """
    found = []
    for latent in model.trained().values():
        if isinstance(latent, TrainableWeight) and (basis := latent.stepped_basis()) is not None:
            columns = nn.functional.normalize(basis, dim=0)
            cosines = columns.T @ columns
            found.append((cosines.square().sum() - cosines.diagonal().square().sum()) / cosines.shape[0])
    return torch.stack(found).mean() if found else torch.zeros(())


def highest_rate(steps: float, norms_by_batches: bool) -> float:
    """The rate of codes at its highest, in steps of their grid, for a training of so many steps."""
    # Between warm-up and the end the mean of a descent is a half of its height.
    mean = (SECOND + LOWER * (1 - SECOND)) / 2 if norms_by_batches else 0.5
    return min(HIGHEST, (FURTHER if norms_by_batches else TRAVEL) / (mean * max(steps, 1.0)))


def optimiser(model: TrainableModel, rate: float) -> AdamW:
    """AdamW with a learning rate for each kind of latent; `rate`, that of codes, is in steps of their grid."""
    codes: list[nn.Parameter] = []
    groups: dict[float, list[nn.Parameter]] = {1.0: codes, BASES: [], SMALL: [], STEPS: []}
    for latent in model.trained().values():
        if isinstance(latent, TrainableVector):
            groups[SMALL].append(latent.levels)
            continue
        groups[STEPS].append(latent.octaves)
        groups[BASES] += list(latent.basis)
        if latent.codes is not None:
            codes.append(latent.codes)
    # No decay: a latent's zero is nothing to go back to. What makes codes smaller is their price.
    return AdamW(
        [{"params": params, "lr": factor * rate} for factor, params in groups.items() if params],
        betas=BETAS,
        weight_decay=0.0,
    )


def pace_at(done: float, twice: bool) -> float:
    """The factor of the learning rates, which fall once or `twice`, when the part `done` of a training is over."""
    if not twice:
        return warmed_cosine(done)
    if done < SECOND:
        return warmed_cosine(done / SECOND)
    return LOWER * warmed_cosine((done - SECOND) / (1 - SECOND))


def warmed_cosine(done: float) -> float:
    """The factor of the rates of a descent of which the part `done` is over."""
    if done < WARM_UP:
        return max(done / WARM_UP, 0.01)
    return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * min((done - WARM_UP) / (1 - WARM_UP), 1.0)))


@dataclass(eq=False)
class Clipper:
    """Cuts gradients that are much longer than usual; `usual` is their running length."""

    usual: float | None = None

    def __call__(self, clip: Callable[[float], Any]) -> bool:
        """`clip(limit)` cuts to a length and tells the length before; False where that is not finite."""
        limit = math.inf if self.usual is None else CLIPPED * self.usual
        length = float(clip(limit))
        if not math.isfinite(length):
            return False
        kept = min(length, limit)
        self.usual = kept if self.usual is None else self.usual + SMOOTHING * (kept - self.usual)
        return True
