"""Codes that go to and fro at the edges of their cells are frozen where they usually are, more and more of them.

Each of them shakes the network that the others learn in, and of what is kept at the end each is as it usually was, not
as the others met it. Frozen, those that turn most often first, the rest comes to terms with them (Nagel et al. 2022).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from factorpack.nn.trainable import TrainableModel, TrainableWeight

BEGIN = 0.5
"""Part of the descent of the rates after which codes are frozen."""
MOST, LEAST = 0.04, 0.005
"""Changes of cell a step from which on a code is frozen, at first and at the end."""
MEMORY = 0.01
"""Part that a step makes up in the running mean of these changes."""
SHORTEST = 1500
"""Steps of a training, from which on codes are frozen: in fewer, one that has gone its way once turns as often as one
that goes to and fro."""


def limit_at(done: float, steps: float) -> float:
    """Changes of cell a step from which on codes are frozen, when the part `done` of the descent is over.

    `steps` are those of the whole training.
    """
    if done < BEGIN or steps < SHORTEST:
        return math.inf
    return LEAST + (MOST - LEAST) * 0.5 * (1 + math.cos(math.pi * min((done - BEGIN) / (1 - BEGIN), 1.0)))


class Freezing:
    """How often the codes of a network change their cells, and which of them are frozen."""

    def __init__(self, model: TrainableModel) -> None:
        self._latents: dict[str, TrainableWeight] = {}
        self._codes: dict[str, Tensor] = {}
        for place, latent in model.latents.named_children():
            if isinstance(latent, TrainableWeight) and latent.codes is not None:
                self._latents[f"{place}.codes"], self._codes[f"{place}.codes"] = latent, latent.codes
        self._cells = {name: codes.detach().clone() for name, codes in self._codes.items()}
        self._turns = {name: torch.zeros_like(cells) for name, cells in self._cells.items()}
        self._frozen = {name: torch.zeros_like(cells, dtype=torch.bool) for name, cells in self._cells.items()}

    @torch.no_grad()
    def take(self, resting: Mapping[str, Tensor], since: int) -> None:
        """Takes in what latents stand for, by their names, `since` steps after the last time."""
        for name, turns in self._turns.items():
            # Middles move a little with the step, too.
            changed = (resting[name] - self._cells[name]).abs_() > 0.5 * self._latents[name].unit()
            turns.lerp_(changed.to(turns.dtype).div_(since), MEMORY * since)
            self._cells[name] = resting[name]

    def begin(self, resting: Mapping[str, Tensor]) -> None:
        """Takes what latents stand for from now on as where they were: they have been moved, and did not go there."""
        self._cells = {name: resting[name] for name in self._cells}

    @torch.no_grad()
    def freeze(self, limit: float, usual: Mapping[str, Tensor]) -> None:
        """Takes codes that change their cells more often than `limit` a step to where they usually are, for good."""
        if not math.isfinite(limit):
            return
        for name, codes in self._codes.items():
            added = (self._turns[name] > limit) & ~self._frozen[name]
            codes.copy_(torch.where(added, self._latents[name].middles(usual[name]), codes))
            self._frozen[name] |= added

    @torch.no_grad()
    def still(self) -> None:
        """Takes the gradients of frozen codes away."""
        for name, codes in self._codes.items():
            if codes.grad is not None:
                codes.grad.masked_fill_(self._frozen[name], 0)

    def part(self) -> float:
        """The part of all codes that are frozen."""
        count = sum(frozen.numel() for frozen in self._frozen.values())
        return sum(int(frozen.sum()) for frozen in self._frozen.values()) / max(count, 1)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All of it, by the names of latents."""
        return {"cells": self._cells, "turns": self._turns, "frozen": self._frozen}

    def take_up(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Goes on from such a state."""
        self._cells, self._turns, self._frozen = (dict(state[part]) for part in ("cells", "turns", "frozen"))
