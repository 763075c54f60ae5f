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

from factorpack._shapes import Float
from factorpack.nn.folding import FORWARDS
from factorpack.nn.trainable import TrainableModel, TrainableVector

LEAST_VALUES = 256
"""Values of a channel that a batch has to have: with fewer its moments are noise."""
FLOOR = 0.01
"""Of a norm's mean variance; it is added to that of each channel. One of which compression left no code is silent, and
what is divided by next to nothing could not wake up."""


class NormByBatch(nn.Module):
    """In place of a batch norm; `weight` and `bias` are given with each call of the network.

    `moments` (2, C) are the means and variances of a channel's inputs that these two numbers go with.
    """

    running_mean: Tensor
    running_var: Tensor
    moments: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, moments: Float[Tensor, "2 C"]) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("moments", moments)
        self.floor = max(norm.eps, FLOOR * float(moments[1].mean()))

    def forward(self, inputs: Tensor) -> Tensor:
        """As the batch norm at `moments`, had the inputs these; small inputs as in the file."""
        if not _enough(inputs):
            return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        mean, deviation = self.at(self.moments)
        slope = self.slope(self.weight)
        bias = self.bias + slope * (mean - self.running_mean)
        return F.batch_norm(inputs, None, None, slope * deviation, bias, training=True, eps=self.floor)

    def slope(self, weight: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
        """What a channel of the file is multiplied by."""
        return weight * (self.running_var + self.eps).rsqrt()

    def at(self, moments: Float[Tensor, "2 C"]) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
        """The mean, and the deviation that a channel with these moments is divided by."""
        mean, variance = moments
        return mean, (variance + self.floor).sqrt()


def _enough(inputs: Tensor) -> bool:
    return inputs.numel() >= LEAST_VALUES * inputs.shape[1]


def _moments(inputs: Tensor) -> Float[Tensor, "2 C"]:
    """Mean and variance of each channel."""
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    variance, mean = torch.var_mean(inputs.detach().float(), axes, correction=0)
    return torch.stack((mean, variance))


def _pooled(moments: list[Tensor]) -> Float[Tensor, "2 C"]:
    """The moments of equally large batches together."""
    means, variances = torch.stack(moments).unbind(1)
    return torch.stack((means.mean(0), variances.mean(0) + means.var(0, correction=0)))


class Norms:
    """The batch norms of a network in training that go by batches.

    `run()` calls the network on the lessons that their first moments are measured on. A batch norm is left as the file
    has it where it is no plain one, is not trained, is called twice, or where batches have fewer than `LEAST_VALUES` a
    channel.
    """

    def __init__(self, model: TrainableModel, run: Callable[[], None]) -> None:
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
        seen, calls = self._seen(plain, run)
        self.placed: dict[str, NormByBatch] = {}
        self._replaced: dict[str, nn.Module] = {}
        for name, module in plain.items():
            if len(seen[name]) != calls or not seen[name]:
                continue
            moments = _pooled(seen[name])
            # Others are of lessons that training will refuse.
            if bool(moments.isfinite().all()):
                self._replaced[name], self.placed[name] = module, NormByBatch(module, moments)
                self._place(name, self.placed[name])

    def _place(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._network.get_submodule(parent), leaf, module)

    @torch.no_grad()
    def _seen(self, norms: Mapping[str, nn.Module], run: Callable[[], None]) -> tuple[dict[str, list[Tensor]], int]:
        """Moments of large enough inputs of these modules in `run`, call by call, and the network's calls."""
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
                run()
        finally:
            for handle in handles:
                handle.remove()
        return seen, calls

    @torch.no_grad()
    def settle(self, run: Callable[[], None], shared: Callable[[Tensor], Tensor] = lambda moments: moments) -> None:
        """Measures moments anew, in `run`, and moves w and b to what does the same with these.

        `shared` gives all processes the moments of one.
        """
        seen, _ = self._seen(self.placed, run)
        self.move({name: shared(_pooled(seen[name])) for name in self.placed})

    @torch.no_grad()
    def move(self, state: Mapping[str, Float[Tensor, "2 C"]]) -> None:
        """Moves w and b to what does the same with these moments, by the names of the norms."""
        for name, placed in self.placed.items():
            moments = state[name]
            if not bool(moments.isfinite().all()):
                continue
            weight, bias = (self._latents[f"{name}.{part}"] for part in ("weight", "bias"))
            (mean, deviation), (known_mean, known_deviation) = placed.at(moments), placed.at(placed.moments)
            factor, slope = known_deviation / deviation, placed.slope(weight.unrounded())
            moved = bias.unrounded() + slope * (known_mean - placed.running_mean)
            bias.set_values(moved - slope * factor * (mean - placed.running_mean))
            weight.set_values(weight.unrounded() * factor)
            placed.moments = moments

    def leave(self) -> None:
        """Takes all batch norms back to what the file has."""
        self.take_up({})

    def state(self) -> dict[str, Tensor]:
        """The moments that w and b go with, by the names of the norms."""
        return {name: placed.moments for name, placed in self.placed.items()}

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from such moments; norms that are not among them are left as in the file."""
        for name in [*self.placed]:
            if name in state:
                self.placed[name].moments = state[name]
            else:
                self._place(name, self._replaced[name])
                del self.placed[name]
