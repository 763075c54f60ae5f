"""Where the latents of a network in training usually are: what is judged, priced and kept.

In training codes go to and fro at the edges of their cells (Nagel et al. 2022), and their roundings at one moment are a
draw: one whose best value is 0.3 of a step is 0 most of the time and 1 for the rest. The mean of its roundings over the
last steps, rounded, is the nearest. (Averages of weights that are quantised: Yang et al. 2019, Shin et al. 2020.)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from factorpack.nn.trainable import TrainableModel

SPAN, LEAST_SPAN, PART = 300.0, 20.0, 0.1
"""Training steps that a mean goes over: this part of those so far, within the first two."""


class Averages:
    """Running means of what a network's latents stand for, from where they are now on."""

    def __init__(self, model: TrainableModel) -> None:
        self._model = model
        self._means = {name: latent.detach().clone() for name, latent in model.latents.named_parameters()}

    @torch.no_grad()
    def take(self, resting: Mapping[str, Tensor], step: int, since: int) -> None:
        """Takes in what latents stand for, by their names, after `step` steps, `since` of them after the last time."""
        share = min(since / min(max(PART * step, LEAST_SPAN), SPAN), 1.0)
        for name, mean in self._means.items():
            mean.lerp_(resting[name], share)

    def become(self) -> None:
        """Takes the network to its means."""
        self._go(self._means)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the network is at its means, after it where it was before."""
        found = {name: latent.detach().clone() for name, latent in self._model.latents.named_parameters()}
        self.become()
        try:
            yield
        finally:
            self._go(found)

    @torch.no_grad()
    def _go(self, to: Mapping[str, Tensor]) -> None:
        for name, latent in self._model.latents.named_parameters():
            latent.copy_(to[name])

    def keep(self) -> None:
        """Takes the means from where the network is now."""
        self.take_up(dict(self._model.latents.named_parameters()))

    def state(self) -> dict[str, Tensor]:
        """The means, by the names of latents."""
        return self._means

    @torch.no_grad()
    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from such means."""
        for name, mean in self._means.items():
            mean.copy_(state[name])
