"""Batch norms in training: by the statistics of each batch, as when the network was trained first.

A file has two numbers a channel, w and b, for w·x + b. In training codes change all the time, and with them what a
channel's mean and deviation are: numbers that are learned slowly lag behind, and each state of the network is judged
with those of others. So a batch is taken to the moments that the file knew, mean μ and deviation σ of lessons, whatever
its own are, and the file's two numbers follow: w·σ·(x − μ_batch)/σ_batch + b + w·μ. Before a state is judged moments
are measured anew, and w and b become those that do the same (as batch renormalisation: Ioffe 2017; that moments must
be measured again after quantised training: Nagel et al. 2022).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factorpack.nn.folding import FORWARDS
from factorpack.nn.trainable import TrainableModel, TrainableVector

LEAST_VALUES = 256
"""Values of a channel that a batch has to have: with fewer its moments are noise."""
FLOOR = 0.01
"""Of a norm's mean variance; it is added to that of each channel. One of which compression left no code is silent, and
what is divided by next to nothing could not wake up."""


class NormByBatch(nn.Module):
    """In place of a batch norm; `weight` and `bias` are given with each call of the network."""

    shift: Tensor
    slope: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.register_buffer("shift", norm.running_mean)
        self.register_buffer("slope", (norm.running_var + norm.eps).rsqrt())
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.by_batch = True
        self.eps = max(norm.eps, FLOOR * float(variance.mean()))

    def forward(self, inputs: Tensor) -> Tensor:
        """As the batch norm with moments `mean` and `variance`, had the inputs these; small inputs as in the file."""
        if not (self.by_batch and _enough(inputs)):
            return self.as_in_file(inputs)
        slope = self.weight * self.slope
        deviation = (self.variance + self.eps).sqrt()
        bias = self.bias + slope * (self.mean - self.shift)
        return F.batch_norm(inputs, None, None, slope * deviation, bias, training=True, eps=self.eps)

    def as_in_file(self, inputs: Tensor) -> Tensor:
        """As the batch norm that it stands for."""
        slope = self.weight * self.slope
        nothing, one = torch.zeros_like(slope), torch.ones_like(slope)
        return F.batch_norm(inputs, nothing, one, slope, self.bias - slope * self.shift, eps=0.0)


def _enough(inputs: Tensor) -> bool:
    return inputs.numel() >= LEAST_VALUES * inputs.shape[1]


def _moments(inputs: Tensor) -> Tensor:
    """Variance and mean of each channel, (2, C)."""
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    return torch.stack(torch.var_mean(inputs.detach().float(), axes, correction=0))


def _pooled(moments: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of equally large batches, of their (2, C) moments."""
    variances, means = torch.stack(moments).unbind(1)
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


class Norms:
    """The batch norms of a network in training that go by batches.

    `run()` calls the network on the lessons that moments are measured on. A batch norm is left as the file has it where
    it is no plain one, is not trained, is called twice, or where batches have fewer than `LEAST_VALUES` a channel.
    """

    def __init__(self, model: TrainableModel, run: Callable[[], None]) -> None:
        self._run = run
        self._latents = cast("dict[str, TrainableVector]", model.trained())
        network = self._network = model.network
        paths = Counter(id(module) for _, module in network.named_modules(remove_duplicate=False))
        plain = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and type(module).forward in FORWARDS
            and module.running_mean is not None
            and paths[id(module)] == 1
            and all(
                isinstance(self._latents.get(f"{name}.{part}"), TrainableVector)
                and f"{name}.{part}" not in model.aliases.values()
                for part in ("weight", "bias")
            )
        }
        moments, calls = self._moments_of(plain)
        self.placed: dict[str, NormByBatch] = {}
        for name, module in plain.items():
            if len(moments[name]) != calls or not moments[name]:
                continue
            pooled = torch.stack(_pooled(moments[name]))
            if not bool(pooled.isfinite().all()):
                # Of lessons that training will refuse.
                continue
            placed = self.placed[name] = NormByBatch(module, *pooled.unbind(0))
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, placed)

    @torch.no_grad()
    def _moments_of(self, norms: Mapping[str, nn.Module]) -> tuple[dict[str, list[Tensor]], int]:
        """What large enough inputs of these modules have, call by call, and how often the network was called."""
        seen: dict[str, list[Tensor]] = {name: [] for name in norms}
        calls = 0

        def look(name: str, inputs: Tensor) -> None:
            if _enough(inputs):
                seen[name].append(_moments(inputs))

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        handles = [self._network.register_forward_pre_hook(count)]
        for name, module in norms.items():
            handles.append(module.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0])))
        try:
            if norms:
                self._run()
        finally:
            for handle in handles:
                handle.remove()
        return seen, calls

    @torch.no_grad()
    def settle(self, shared: Callable[[Tensor], Tensor] = lambda moments: moments) -> None:
        """Measures moments anew, and moves w and b to what does the same with these.

        `shared` gives all processes the moments of one.
        """
        seen, _ = self._moments_of(self.placed)
        for name, placed in self.placed.items():
            pooled = shared(torch.stack(_pooled(seen[name])))
            if not bool(pooled.isfinite().all()):
                continue
            mean, variance = pooled.unbind(0)
            weight, bias = (self._latents[f"{name}.{part}"] for part in ("weight", "bias"))
            slope = weight.unrounded() * placed.slope
            factor = ((placed.variance + placed.eps) / (variance + placed.eps)).sqrt()
            moved = bias.unrounded() + slope * (placed.mean - placed.shift)
            bias.set_values(moved - slope * factor * (mean - placed.shift))
            weight.set_values(weight.unrounded() * factor)
            placed.mean, placed.variance = mean, variance

    def leave(self) -> None:
        """Takes the batch norms back to what the file has."""
        for placed in self.placed.values():
            placed.by_batch = False
        self.placed.clear()

    def state(self) -> dict[str, Tensor]:
        """The moments that w and b go with."""
        return {name: torch.stack((placed.mean, placed.variance)) for name, placed in self.placed.items()}

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from such moments."""
        for name, moments in state.items():
            self.placed[name].mean, self.placed[name].variance = moments.unbind(0)
