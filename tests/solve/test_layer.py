"""Candidates of a layer: each form at a price, and what the price does to them."""

from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from factorpack.factors import Codes, FactoredWeight, OneHotCodes
from factorpack.solve.layer import FINEST, Layer
from factorpack.solve.objective import Metric, distortion
from factorpack.tiling import Tiling


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pricer(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ideal bits of a smoothed histogram, one context."""
    reach = max(int(np.abs(codes).max(initial=0)), 1)
    counts = np.bincount((codes + reach).ravel(), minlength=2 * reach + 1) + 0.5
    bits = -np.log2(counts / counts.sum())[None]
    return bits, np.zeros(codes.shape[0], np.int64), np.zeros(1, np.int64)


def correlated(groups: int, inputs: int) -> Tensor:
    samples = rand(groups, 4 * inputs, 3, seed=3) @ rand(groups, 3, inputs, seed=4)
    samples = samples + 0.3 * rand(groups, 4 * inputs, inputs, seed=5)
    return samples.mT @ samples / (4 * inputs)


def layer(shape: tuple[int, ...], groups: int = 1, transposed: bool = False, kind: str = "seen") -> Layer:
    tiling = Tiling(shape, groups, transposed)
    outputs, inputs = tiling.matrix_shape
    # Some directions are stronger than others, as in trained weights.
    strength = torch.logspace(0, -1.5, inputs)
    tensor = tiling.unmatrix((rand(outputs, inputs) * strength).numpy())
    rows = rand(outputs, seed=2).exp()
    moments = correlated(groups, inputs) if kind == "seen" else None
    return Layer("weight", tensor, tiling, Metric(moments, None if kind == "plain" else rows), kind == "looked up")


LAYERS = {
    "linear": layer((24, 16)),
    "wide linear": layer((12, 40)),
    "convolution": layer((12, 4, 3, 3)),
    "grouped": layer((12, 4, 3, 3), groups=3),
    "depthwise": layer((16, 1, 3, 3), groups=16),
    "transposed": layer((8, 6, 2, 2), groups=2, transposed=True),
    "looked up": layer((60, 12), kind="looked up"),
    "without data": layer((24, 16), kind="plain"),
}
RATES = (1e-1, 1e-3, 1e-5)


def solved(form: str, which: Layer, rate: float) -> FactoredWeight:
    return which.solve_direct(rate, pricer) if form == "direct" else which.solve_basis(form, rate, pricer)


def zeroed(which: Layer) -> float:
    weight = which.problem.weight
    return 0.5 * float(distortion(weight, torch.zeros_like(weight), which.metric))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", ["direct", "sparse_pca", "svd"])
def test_every_form_loses_less_as_the_rate_falls(form: str, name: str) -> None:
    which = LAYERS[name]
    found = [solved(form, which, rate) for rate in RATES]
    losses = [which.loss(weight) for weight in found]
    for weight in found:
        assert weight.form == form
        assert weight.tensor().shape == which.tensor.shape
        assert weight.tensor().dtype == np.float32
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[0] < 1.2 * zeroed(which)
    if form != "svd":
        assert losses[2] < 1e-2 * zeroed(which)


@pytest.mark.parametrize("name", LAYERS)
def test_svd_keeps_fewer_directions_than_there_are(name: str) -> None:
    which = LAYERS[name]
    depth, count = which.basis_tiling.tiled_shape
    ranks = [which.solve_basis("svd", rate, pricer).codes.shape[0] for rate in (1e3, *RATES, 1e-12)]
    assert ranks[0] == 1
    assert ranks == sorted(ranks)
    assert min(depth - 1, count) <= ranks[-1] < depth


@pytest.mark.parametrize("name", LAYERS)
def test_loss_is_half_the_distortion(name: str) -> None:
    which = LAYERS[name]
    found = which.solve_direct(1e-2, pricer)
    error = which.tiling.matrix(which.tensor).astype(np.float64) - which.tiling.matrix(found.tensor())
    outputs, inputs = error.shape
    moments, rows = which.metric.moments, which.metric.row_weights
    blocks = np.eye(inputs)[None] if moments is None else moments.double().numpy()
    total = 0.0
    for output in range(outputs):
        count = 1.0 if rows is None else float(rows[output])
        total += 0.5 * count * error[output] @ blocks[output // (outputs // len(blocks))] @ error[output]
    assert which.loss(found) == pytest.approx(total, rel=1e-4)
    assert total > 0


def test_steps_follow_the_square_root_of_the_rate() -> None:
    which = LAYERS["linear"]
    step = which.step(1e-3, 0.5)
    assert which.step(4e-3, 0.5) == pytest.approx(2 * step)
    assert which.step(1e-3, 2.0) == pytest.approx(step / 2)
    # ½·r·D·Δ²/12 an entry is the loss; its derivative per bit (Δ halves, a quarter of it stays) is the rate.
    level = float(which.metric.row_weights.mean()) * 0.5
    assert 2 * np.log(2) * 0.5 * level * step**2 / 12 == pytest.approx(1e-3)


def test_steps_have_an_end() -> None:
    which = LAYERS["linear"]
    assert which.step(0.0, 0.5) == pytest.approx(float(np.abs(which.tensor).max()) / FINEST)
    found = which.solve_direct(0.0, pricer)
    assert np.abs(found.codes.integers).max() <= 4 * FINEST
    np.testing.assert_allclose(found.tensor(), which.tensor, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "convolution", "grouped"])
def test_finer_steps_are_what_the_rate_buys(name: str) -> None:
    which = LAYERS[name]
    found = [which.solve_direct(rate, pricer).codes for rate in RATES]
    assert found[0].grid.steps[0] > found[1].grid.steps[0] > found[2].grid.steps[0]
    zeros = [float((codes.integers == 0).mean()) for codes in found]
    assert zeros[0] > zeros[1] > zeros[2]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", ["direct", "sparse_pca"])
def test_prices_are_asked_in_the_layout_of_the_codes(form: str, name: str) -> None:
    which, asked = LAYERS[name], []

    def note(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        asked.append(codes)
        return pricer(codes)

    found = which.solve_direct(1e-2, note) if form == "direct" else which.solve_basis(form, 1e-2, note)
    assert all(codes.shape == found.codes.shape for codes in asked)
    if name == "looked up":
        # The price is of the plain rounding's symbols, and favours small ones.
        assert len(asked) == 1
        assert np.abs(found.codes.integers).sum() < np.abs(asked[0]).sum()


def test_a_price_of_one_class_of_columns_is_that_of_each_column() -> None:
    which = LAYERS["looked up"]

    def spread(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        bits, rows, columns = pricer(codes)
        return bits, rows, np.repeat(columns, codes.shape[1])

    one, each = which.solve_direct(1e-2, pricer), which.solve_direct(1e-2, spread)
    assert np.array_equal(one.tensor(), each.tensor())


def test_a_basis_lies_along_the_shorter_side() -> None:
    assert LAYERS["linear"].basis_tiling.tiled_shape == (16, 24)
    assert LAYERS["wide linear"].basis_tiling.tiled_shape == (12, 40)
    assert LAYERS["looked up"].basis_tiling.tiled_shape == (12, 60)
    # Groups share no outputs: a basis that serves them all lies along the inputs.
    assert LAYERS["grouped"].basis_tiling.tiled_shape == (36, 12)


def codebooks(which: Layer, seed: int = 0) -> list[FactoredWeight]:
    return list(which.codebooks(torch.Generator().manual_seed(seed)))


def test_codebooks_lose_less_the_more_codewords_they_have() -> None:
    which = layer((64, 16))
    found = codebooks(which)
    pairs = [weight for weight in found if weight.tiling.depth == 2]
    ranks = [weight.codes.shape[0] for weight in pairs]
    assert len(ranks) >= 3
    assert ranks == sorted(set(ranks))
    losses = [which.loss(weight) for weight in pairs]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[0] < zeroed(which)
    for weight in found:
        assert weight.form == "vq"
        assert isinstance(weight.codes, OneHotCodes)
        assert weight.tensor().shape == (64, 16)
        assert 16 % weight.tiling.depth == 0
    again = codebooks(which)
    assert all(np.array_equal(one.tensor(), two.tensor()) for one, two in zip(found, again, strict=True))


def test_codebooks_need_tiles_to_serve() -> None:
    assert codebooks(layer((4, 16))) == []
    assert codebooks(layer((64, 5))) == []


@pytest.mark.parametrize("name", ["grouped", "transposed", "looked up"])
def test_codebooks_fit_every_layout(name: str) -> None:
    which = LAYERS[name]
    found = codebooks(which)
    assert found
    for weight in found:
        assert weight.tensor().shape == which.tensor.shape
        assert which.loss(weight) < zeroed(which)


@pytest.mark.parametrize("form", ["direct", "sparse_pca", "svd"])
def test_projected_gradients_give_candidates_of_their_form(form: str) -> None:
    which = layer((12, 8))
    for weight in islice(which.descents(form, torch.Generator().manual_seed(0)), 2):
        assert weight.form == form
        assert isinstance(weight.codes, Codes)
        assert weight.tensor().shape == (12, 8)
        assert which.loss(weight) < 1.2 * zeroed(which)


@pytest.mark.parametrize("form", ["direct", "sparse_pca", "svd"])
@pytest.mark.parametrize("shape", [(64, 2), (2, 64), (16, 16)])
def test_layers_of_zeros_and_thin_ones(form: str, shape: tuple[int, int]) -> None:
    for kind in ("seen", "plain", "looked up"):
        thin = layer(shape, kind=kind)
        dead = Layer("weight", np.zeros(shape, np.float32), thin.tiling, thin.metric, thin.looked_up)
        assert solved(form, thin, 1e-3).tensor().shape == shape
        assert not solved(form, dead, 1e-3).tensor().any()


@pytest.mark.parametrize("form", ["direct", "sparse_pca", "svd"])
def test_layers_whose_inputs_were_all_zero(form: str) -> None:
    thin = layer((16, 8))
    silent = Layer("weight", thin.tensor, thin.tiling, Metric(torch.zeros(1, 8, 8), torch.zeros(16)), False)
    found = solved(form, silent, 1e-3)
    assert np.isfinite(found.tensor()).all()
    assert silent.loss(found) == 0
