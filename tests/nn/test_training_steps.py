"""Steps of a training: the rule of the loss, rates, clipping, orthogonal bases."""

import math

import numpy as np
import pytest
import torch
from laws import weights
from test_trainable import TOKENS, Tied, network, pricer
from torch import nn
from torch.nn import functional as F

from factorpack.factors import IDENTITY_GRID, Basis, Codes, FactoredWeight, Grid
from factorpack.nn.distillation import LOSSES, logits_loss
from factorpack.nn.trainable import TrainableModel
from factorpack.nn.training import (
    FURTHER,
    HIGHEST,
    LOWER,
    SECOND,
    TRAVEL,
    Clipper,
    Learner,
    Objective,
    highest_rate,
    optimiser,
    orthogonality,
    pace_at,
    warmed_cosine,
)
from factorpack.tiling import Tiling


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, targets)


TARGETS = torch.arange(20)


@pytest.mark.parametrize(("compare", "way"), [("auto", "divergence"), ("squares", "squares")])
@pytest.mark.parametrize(
    ("loss", "distil", "targets", "share"),
    [
        (None, None, None, 1.0),
        (None, None, TARGETS, 1.0),
        (cross_entropy, None, None, 1.0),
        (cross_entropy, None, TARGETS, 0.0),
        (cross_entropy, 0.3, TARGETS, 0.3),
        (cross_entropy, 0.3, None, 1.0),
    ],
)
def test_what_is_minimised_follows_the_rule(loss, distil, targets, share: float, compare: str, way: str) -> None:
    model, _ = network()
    learner = Learner(model, Tied().eval(), Objective("logits", loss, distil, compare))
    with torch.no_grad():
        expected, found = Tied().eval()(TOKENS), model(TOKENS)
        wanted = share * LOSSES[way](found, expected)
        if share < 1:
            wanted = wanted + (1 - share) * cross_entropy(found, targets)
        torch.testing.assert_close(learner(TOKENS, targets), wanted)


@pytest.mark.parametrize("compare", ["auto", "divergence", "squares"])
def test_the_temperature_is_that_of_divergences(compare: str) -> None:
    model, _ = network()
    plain, soft = (Learner(model, Tied().eval(), Objective("logits", compare=compare, temperature=t)) for t in (1, 3))
    with torch.no_grad():
        found, expected = model(TOKENS), Tied().eval()(TOKENS)
        wanted = plain(TOKENS, None) if compare == "squares" else logits_loss(found, expected, 3.0)
        torch.testing.assert_close(soft(TOKENS, None), wanted)


def test_what_blocks_give_out_counts_in_distillation() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Part(), Part()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts:
                x = part(x)
            return x

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    original = Blocks().eval()
    name, rounded = "parts.0.inner.weight", np.ones((4, 4), np.int32)
    weight = FactoredWeight(
        "direct", Tiling((4, 4)), Basis(None, IDENTITY_GRID), Codes(rounded, Grid(-2, 1, IDENTITY_GRID.exponents))
    )
    tensors = {key: value.numpy() for key, value in original.state_dict().items()} | {name: weight}
    student = Blocks()
    model = TrainableModel(student, tensors, dict.fromkeys(tensors, "float32"), {}, pricer)
    x = torch.randn(6, 4)
    with torch.no_grad():
        plain, more = (Learner(model, original, Objective(features=share))(x, None) for share in (0.0, 2.0))
        first, wanted = student.parts[0](x), original.parts[0](x)
        placed = student.parts[1](first), original.parts[1](wanted)
        errors = [F.mse_loss(a, b) / b.square().mean() for a, b in ((first, wanted), placed)]
    torch.testing.assert_close(more - plain, 2 * sum(errors) / 2)


def test_rates_rise_and_fall() -> None:
    found = [warmed_cosine(done / 100) for done in range(101)]
    assert found[2] == max(found) == pytest.approx(1)
    assert found[0] == pytest.approx(0.01)
    assert found[100] == pytest.approx(0.01)
    assert all(a >= b for a, b in zip(found[2:], found[3:], strict=False))


def test_rates_fall_twice() -> None:
    found = np.array([pace_at(done / 1000, twice=True) for done in range(1001)])
    (falls,) = np.nonzero(np.diff(np.sign(np.diff(found))) < 0)
    assert falls.size == 2
    first, second = found[falls + 1]
    assert (first, second) == (pytest.approx(1, abs=1e-3), pytest.approx(LOWER, abs=1e-3))
    # Both come to their ends.
    assert found[int(1000 * SECOND) - 1] == pytest.approx(0.01, abs=1e-3)
    assert found[-1] == pytest.approx(0.01 * LOWER)


@pytest.mark.parametrize(("by_batches", "travel"), [(False, TRAVEL), (True, FURTHER)])
@pytest.mark.parametrize("steps", [5000, 50_000])
def test_codes_travel_as_far_in_a_longer_training(steps: int, by_batches: bool, travel: float) -> None:
    travelled = highest_rate(steps, by_batches) * sum(pace_at(step / steps, by_batches) for step in range(steps))
    assert travelled == pytest.approx(travel, rel=0.03)
    assert all(highest_rate(short, by_batches) == HIGHEST for short in (0, 1, 1000))


def test_each_kind_of_latent_has_its_rate() -> None:
    model, _ = network()
    groups = optimiser(model, 0.02).param_groups
    counted = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    trained = model.trained()
    assert rates[trained["mix.weight"].codes] == 0.02
    assert rates[trained["mix.weight"].octaves] < 0.02 < rates[trained["mix.bias"].levels]
    assert all(group["weight_decay"] == 0 for group in groups)


def test_long_gradients_are_cut_and_infinite_ones_refused() -> None:
    clipper, asked = Clipper(), []

    def gradient(length: float):
        def clip(limit: float) -> float:
            asked.append(limit)
            return length

        return clip

    assert clipper(gradient(2.0))
    assert clipper(gradient(100.0))
    assert not clipper(gradient(math.inf))
    assert clipper.usual == pytest.approx(2 + 0.02 * (6 - 2))
    assert asked == [math.inf, 6.0, 3 * clipper.usual]


def test_orthogonality_is_that_of_the_bases() -> None:
    weight = next(weight for label, weight in weights(0) if label.startswith("sparse_pca; linear"))
    tensors = {"weight": weight}
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model = TrainableModel(layer, tensors, {"weight": "float32"}, {}, pricer)
    basis = weight.basis.integers * weight.basis.grid.steps[:, None]
    units = basis / np.maximum(np.linalg.norm(basis, axis=0), 1e-12)
    cosines = units.T @ units
    wanted = (np.square(cosines).sum() - np.square(np.diag(cosines)).sum()) / basis.shape[1]
    assert orthogonality(model).item() == pytest.approx(wanted, rel=1e-4)
    assert wanted > 0.01
    adam = torch.optim.Adam(model.parameters(), 0.3)
    for _ in range(100):
        adam.zero_grad()
        orthogonality(model).backward()
        adam.step()
    assert orthogonality(model).item() < 0.3 * wanted
