"""The Gaussian reference: closed forms, a brute-force one, and what must not change it."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from factorpack.candidates import pricer
from factorpack.coding.records import predicted_bits
from factorpack.errors import MismatchError
from factorpack.evaluate.limit import gaussian_bits, gaussian_bits_of
from factorpack.solve.layer import Layer
from factorpack.solve.objective import Metric
from factorpack.tiling import Tiling


def layer(shape: tuple[int, ...], metric: Metric, groups: int = 1, seed: int = 0, scale: float = 1.0) -> Layer:
    tensor = scale * np.random.default_rng(seed).standard_normal(shape)
    return Layer("weight", tensor.astype(np.float32), Tiling(shape, groups), metric, False)


def moments(groups: int, inputs: int, samples: int, seed: int = 1) -> torch.Tensor:
    """Correlated, of inputs that are not equally strong; singular where there are fewer samples than inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, samples, inputs)) @ rng.standard_normal((inputs, inputs))
    x *= np.logspace(0, -2, inputs)
    return torch.from_numpy((x.transpose(0, 2, 1) @ x / samples).astype(np.float32))


def rows(outputs: int, seed: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0, 1, outputs).astype(np.float32))


def without_some(weights: torch.Tensor) -> torch.Tensor:
    """Every third of them at zero."""
    return weights * (torch.arange(len(weights)) % 3 > 0)


LAYERS = {
    "plain": layer((20, 12), Metric()),
    "rows": layer((20, 12), Metric(None, rows(20))),
    "moments": layer((20, 12), Metric(moments(1, 12, 40)), scale=0.05),
    "both": layer((12, 4, 3, 3), Metric(moments(1, 36, 80), rows(12)), scale=30.0),
    "grouped": layer((12, 4, 3, 3), Metric(moments(3, 36, 80), rows(12)), groups=3),
    "singular": layer((20, 12), Metric(moments(1, 12, 5), rows(20))),
    "worthless rows": layer((20, 12), Metric(moments(1, 12, 40), without_some(rows(20)))),
}
SHARES = (1e-9, 1e-4, 0.01, 0.1, 0.5, 0.9, 0.999)
"""Parts of the full power, as distortions."""


def variances(which: Layer) -> np.ndarray:
    """All s_oi, entry by entry."""
    weight = which.tiling.matrix(which.tensor).astype(np.float64)
    outputs, inputs = weight.shape
    blocks = np.eye(inputs)[None] if which.metric.moments is None else which.metric.moments.double().numpy()
    counts = np.ones(outputs) if which.metric.row_weights is None else which.metric.row_weights.double().numpy()
    block_rows = outputs // len(blocks)
    found = np.zeros((outputs, inputs))
    for group, block in enumerate(blocks):
        values, basis = np.linalg.eigh(block)
        members = range(group * block_rows, (group + 1) * block_rows)
        for i in range(inputs):
            power = np.mean([(basis[:, i] @ weight[o]) ** 2 for o in members])
            for o in members:
                found[o, i] = counts[o] * max(values[i], 0.0) * power
    return found.ravel()


def slow_bits(found: np.ndarray, distortion: float) -> float:
    low, high = 0.0, float(found.max())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(found, middle).sum() < distortion else (low, middle)
    return float(0.5 * np.log2(found[found > high] / high).sum())


def full_loss(which: Layer) -> float:
    """What dropping the whole layer loses, were its rows as the model has them."""
    return 0.5 * float(variances(which).sum())


def test_unit_gaussians_without_a_metric_cost_what_the_textbook_says():
    which = layer((200, 100), Metric())
    count = which.tensor.size
    for distortion in (0.5, 0.1, 1e-3, 1e-6):
        bits = gaussian_bits(which, count * distortion / 2)
        assert bits / count == pytest.approx(0.5 * math.log2(1 / distortion), abs=0.02)


@pytest.mark.parametrize("name", LAYERS)
def test_it_agrees_with_water_filling_by_brute_force(name):
    which = LAYERS[name]
    found = variances(which)
    for share in SHARES:
        distortion = share * found.sum()
        assert gaussian_bits(which, distortion / 2) == pytest.approx(slow_bits(found, distortion), rel=1e-6, abs=1e-6)


def test_the_common_level_agrees_with_water_filling_by_brute_force():
    found = np.concatenate([variances(which) for which in LAYERS.values()])
    for share in SHARES:
        losses = {name: share * full_loss(which) for name, which in LAYERS.items()}
        expected = slow_bits(found, 2 * sum(losses.values()))
        assert gaussian_bits_of(LAYERS, losses) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_more_loss_costs_fewer_bits_down_to_none(name):
    which = LAYERS[name]
    full = full_loss(which)
    bits = [gaussian_bits(which, share * full) for share in SHARES]
    assert all(more > fewer for more, fewer in pairwise(bits))
    assert gaussian_bits(which, full * (1 - 1e-9)) > 0
    assert gaussian_bits(which, full * (1 + 1e-9)) == gaussian_bits(which, 10 * full) == 0
    assert gaussian_bits(which, 0.0) == math.inf


@pytest.mark.parametrize("name", ["plain", "moments"])
def test_without_row_weights_the_full_loss_is_that_of_the_layer_itself(name):
    which = LAYERS[name]
    weight = which.problem.weight
    dropped = 0.5 * float((weight * which.metric.apply(weight)).sum())
    assert gaussian_bits(which, dropped * (1 - 1e-5)) > 0
    assert gaussian_bits(which, dropped * (1 + 1e-5)) == 0


def test_the_common_level_never_costs_more_than_levels_of_their_own():
    rng = np.random.default_rng(0)
    for _ in range(20):
        losses = {name: full_loss(which) * 10 ** rng.uniform(-4, 0.1) for name, which in LAYERS.items()}
        own = sum(gaussian_bits(which, losses[name]) for name, which in LAYERS.items())
        assert gaussian_bits_of(LAYERS, losses) < own


def test_the_common_level_of_one_layer_is_its_own():
    which = LAYERS["both"]
    loss = 0.1 * full_loss(which)
    assert gaussian_bits_of({"it": which}, {"it": loss}) == gaussian_bits(which, loss)


def test_a_layer_without_loss_may_have_some_at_the_common_level():
    pair = {name: LAYERS[name] for name in ("plain", "rows")}
    losses = {"plain": 0.0, "rows": 5.0}
    assert math.isfinite(gaussian_bits_of(pair, losses))
    assert gaussian_bits_of(pair, dict.fromkeys(pair, 0.0)) == math.inf


@pytest.mark.parametrize(
    "which",
    [
        layer((20, 12), Metric(), scale=0.0),
        layer((20, 12), Metric(torch.zeros(1, 12, 12))),
        layer((20, 12), Metric(None, torch.zeros(20))),
    ],
    ids=["weight", "moments", "row weights"],
)
def test_what_is_all_zero_costs_nothing_at_any_loss(which):
    assert gaussian_bits(which, 0.0) == gaussian_bits(which, 1.0) == 0


def test_a_uniform_quantiser_with_an_ideal_coder_lies_a_quarter_of_a_bit_above():
    which = layer((512, 256), Metric())
    for step in (0.125, 0.25):
        weight = which.solve_direct(math.log(2) * step**2 / 12, pricer)
        above = predicted_bits(weight) - gaussian_bits(which, which.loss(weight))
        assert above / which.tensor.size == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("name", ["rows", "both", "grouped", "singular"])
def test_the_unit_of_weights_and_of_losses_does_not_matter(name):
    which = LAYERS[name]
    metric, loss = which.metric, 0.05 * full_loss(which)
    bits = gaussian_bits(which, loss)
    assert metric.row_weights is not None
    larger = Layer("weight", 8 * which.tensor, which.tiling, metric, False)
    assert gaussian_bits(larger, 64 * loss) == pytest.approx(bits, rel=1e-9)
    dearer = Layer("weight", which.tensor, which.tiling, Metric(metric.moments, 1024 * metric.row_weights), False)
    assert gaussian_bits(dearer, 1024 * loss) == pytest.approx(bits, rel=1e-9)
    # Where every component is above the level, twice the weight is one bit more for each.
    if name == "rows":
        fine = 1e-4 * loss
        twice = Layer("weight", 2 * which.tensor, which.tiling, metric, False)
        expected = gaussian_bits(which, fine) + which.tensor.size
        assert gaussian_bits(twice, fine) == pytest.approx(expected, rel=1e-9)


def test_the_order_of_rows_does_not_matter():
    which = LAYERS["both"]
    loss = 0.05 * full_loss(which)
    assert which.metric.row_weights is not None
    flipped = Layer(
        "weight",
        which.tensor[::-1].copy(),
        which.tiling,
        Metric(which.metric.moments, which.metric.row_weights.flip(0)),
        False,
    )
    assert gaussian_bits(flipped, loss) == pytest.approx(gaussian_bits(which, loss), rel=1e-9)


def test_names_and_shapes_that_do_not_fit_are_refused():
    plain = LAYERS["plain"]
    with pytest.raises(MismatchError, match="'other'"):
        gaussian_bits_of({"plain": plain}, {"plain": 1.0, "other": 1.0})
    with pytest.raises(MismatchError, match="7 row weights"):
        gaussian_bits(layer((20, 12), Metric(None, torch.ones(7))), 1.0)
    with pytest.raises(MismatchError, match="moments"):
        gaussian_bits(layer((20, 12), Metric(torch.eye(11)[None])), 1.0)
