"""Candidates of a layer: each form at a price, and what the price does to them."""

from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from factorpack.factors import Codes, FactoredWeight, OneHotCodes, steps_of
from factorpack.solve import layer as layer_module
from factorpack.solve.layer import FINEST, PATHS, STEP_GRAIN, STEP_POWER, Layer, Met
from factorpack.solve.objective import Metric, distortion
from factorpack.solve.sequential import damped
from factorpack.solve.vbmf import rank_of
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


def planted(shape: tuple[int, int], rank: int) -> Layer:
    """A weight that, as its inputs see it, is of `rank`, on the strong inputs, and white noise on strong and weak."""
    outputs, inputs = shape
    moments = torch.logspace(0, -4, inputs).diag()[None]
    seen = rand(outputs, inputs, seed=21)
    seen[:, : inputs // 3] += 2 * rand(outputs, rank, seed=22) @ rand(rank, inputs // 3, seed=23)
    # A basis along the inputs is in the metric with a floor.
    root = torch.linalg.cholesky(damped(moments) if outputs > inputs else moments.double())[0]
    weight = torch.linalg.solve_triangular(root, seen.double(), upper=False, left=False).float()
    return Layer("weight", weight.numpy(), Tiling(shape), Metric(moments, None), False)


@pytest.mark.parametrize("shape", [(24, 40), (60, 30)], ids=["basis along the outputs", "basis along the inputs"])
def test_svd_keeps_the_planted_directions_at_every_rate_by_vbmf(shape: tuple[int, int]) -> None:
    which = planted(shape, 4)
    found = [which.solve_basis("svd", rate, pricer, "vbmf") for rate in (1e3, *RATES, 1e-12)]
    assert [weight.codes.shape[0] for weight in found] == [4] * len(found)
    losses = [which.loss(weight) for weight in found]
    assert losses[-1] < 0.2 * losses[0]
    assert {which.solve_basis("svd", rate, pricer).codes.shape[0] for rate in (1e3, 1e-12)} == {1, min(shape) - 1}
    # In the weight alone the noise of weak inputs is the largest.
    assert rank_of(torch.linalg.svdvals(which.problem.weight.double()).square().numpy(), shape) != 4


@pytest.mark.parametrize("name", LAYERS)
def test_svd_has_a_rank_by_vbmf_in_every_layout(name: str) -> None:
    which = LAYERS[name]
    found = [which.solve_basis("svd", rate, pricer, "vbmf") for rate in RATES]
    assert len({weight.codes.shape for weight in found}) == 1
    assert 1 <= found[0].codes.shape[0] < which.basis_tiling.tiled_shape[0]
    assert which.loss(found[-1]) < zeroed(which)


def test_svd_of_zeros_has_rank_one_by_vbmf() -> None:
    which = LAYERS["linear"]
    dead = replace(which, tensor=np.zeros_like(which.tensor))
    assert dead.solve_basis("svd", 1e-3, pricer, "vbmf").codes.shape[0] == 1


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


def smooth(shape: tuple[int, ...], groups: int = 1, transposed: bool = False, rows: bool = True) -> Layer:
    """Kernels whose taps resemble their neighbours, as those of trained convolutions, and inputs that do so too."""
    tiling = Tiling(shape, groups, transposed)
    tensor = rand(*shape)
    for axis in range(2, len(shape)):
        distance = (torch.arange(shape[axis])[:, None] - torch.arange(shape[axis])).abs()
        tensor = (tensor.movedim(axis, -1) @ torch.linalg.cholesky(0.9**distance).T).movedim(-1, axis)
    outputs, inputs = tiling.matrix_shape
    weights = rand(outputs, seed=2).exp() if rows else None
    return Layer("weight", tensor.numpy(), tiling, Metric(correlated(groups, inputs), weights), False)


KERNELS = {
    "one axis": smooth((12, 6, 4)),
    "two": smooth((16, 8, 3, 3)),
    "one tap and three": smooth((16, 8, 1, 3)),
    "three axes": smooth((6, 4, 2, 3, 3)),
    "grouped": smooth((12, 2, 3, 3), groups=4),
    "depthwise": smooth((24, 1, 5, 5), groups=24),
    "without weights of rows": smooth((8, 4, 3, 3), rows=False),
}


@pytest.mark.parametrize("name", KERNELS)
def test_separable_loses_less_as_the_rate_falls(name: str) -> None:
    which = KERNELS[name]
    found = [which.solve_separable(rate) for rate in RATES]
    losses = [which.loss(weight) for weight in found]
    for weight in found:
        assert weight.form == "separable"
        assert weight.tensor().shape == which.tensor.shape
        np.testing.assert_array_equal(weight.basis.integers, found[0].basis.integers)
        error = which.tiling.matrix(weight.tensor() - which.tensor).astype(np.float64)
        assert which.metric.moments is not None
        moments = which.metric.moments.double().numpy()
        blocks = error.reshape(len(moments), -1, error.shape[1])
        squares = np.einsum("grn,gnk,grk->gr", blocks, moments, blocks).ravel()
        rows = np.ones(len(error)) if which.metric.row_weights is None else which.metric.row_weights.numpy()
        assert which.loss(weight) == pytest.approx(0.5 * float(squares @ rows), rel=1e-3)
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[2] < 1e-2 * zeroed(which)


@pytest.mark.parametrize("name", ["two", "grouped", "one axis"])
def test_separable_takes_about_the_loss_its_rate_asks_for(name: str) -> None:
    """At a fine step errors are uniform: the loss is that of direct at the same λ."""
    which = KERNELS[name]
    losses = [which.loss(weight) for weight in (which.solve_separable(1e-6), which.solve_direct(1e-6, pricer))]
    assert 0.7 < losses[0] / losses[1] < 1.3


def test_smooth_kernels_take_fewer_bytes_separable() -> None:
    which = smooth((64, 24, 3, 3))
    rates = np.logspace(-2, -5, 7)
    direct, separable = (
        np.array([(which.loss(w), ideal_bits(w)) for w in weights])
        for weights in ([which.solve_direct(r, pricer) for r in rates], [which.solve_separable(r) for r in rates])
    )
    at_equal_loss = np.interp(np.log(direct[1:-1, 0]), np.log(separable[::-1, 0]), separable[::-1, 1])
    assert (at_equal_loss < 0.9 * direct[1:-1, 1]).all()


def ideal_bits(weight: FactoredWeight) -> float:
    """The codes' entropy where each tap has a histogram of its own, and a byte for each entry of the factors."""
    assert isinstance(weight.codes, Codes)
    codes = weight.codes.integers
    bits = 8.0 * sum(factor.size for factor in weight.basis.factors)
    for line in codes if weight.form == "separable" else codes.reshape(-1, int(np.prod(weight.shape[2:]))).T:
        counts = np.unique(line, return_counts=True)[1]
        bits += float(np.sum(counts * np.log2(line.size / counts)))
    return bits


def test_the_separable_basis_is_the_principal_one_of_each_axis() -> None:
    which = smooth((400, 8, 3, 3), rows=False)
    factors = which.solve_separable(1e-3).basis.factors
    # The eigenvectors of 0.9^|i - j|: the sum, the slope and the bend, the largest entry of each positive.
    vectors = np.linalg.eigh(0.9 ** np.abs(np.subtract.outer(np.arange(3), np.arange(3))))[1]
    expected = vectors[:, ::-1] * 32
    for factor in factors:
        assert np.abs(np.abs(factor) - np.abs(expected)).max() < 2.5
        assert (np.take_along_axis(factor, np.abs(factor).argmax(0)[None], 0) > 0).all()
        np.testing.assert_allclose(factor.T @ factor, 1024 * np.eye(3), atol=40)


def test_a_factor_is_of_its_own_axis() -> None:
    """Axes of 2 and 3 taps, unlike in power: the first factor is the first axis' one."""
    which = smooth((12, 4, 2, 3))
    assert [len(factor) for factor in which.solve_separable(1e-3).basis.factors] == [2, 3]


@pytest.mark.parametrize(
    "which",
    [
        smooth((12, 8)),
        smooth((12, 8, 1, 1)),
        smooth((8, 6, 2, 2), transposed=True),
        layer((12, 4, 3, 3), kind="looked up"),
        layer((4, 2, 64), kind="plain"),
        layer((4, 2, 2, 2, 2, 2), kind="plain"),
        layer((2, 1, 33, 33), kind="plain"),
    ],
    ids=["linear", "one tap", "transposed", "looked up", "a long axis", "many axes", "many taps"],
)
def test_layers_without_taps_are_not_separable(which: Layer) -> None:
    assert not which.has_taps


def test_separable_layers_of_zeros_and_of_silent_inputs() -> None:
    which = KERNELS["two"]
    dead = Layer("weight", np.zeros(which.tensor.shape, np.float32), which.tiling, which.metric, False)
    assert not dead.solve_separable(1e-3).tensor().any()
    silent = Layer("weight", which.tensor, which.tiling, Metric(torch.zeros(1, 72, 72), torch.zeros(16)), False)
    assert np.isfinite(silent.solve_separable(1e-3).tensor()).all()
    unseen = Layer("weight", which.tensor, which.tiling, Metric(None, None), False)
    assert unseen.loss(unseen.solve_separable(1e-5)) < 1e-2 * zeroed(unseen)
    far = unseen.solve_separable(1e36)
    assert not far.tensor().any()


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


# --- behind a prefix ------------------------------------------------------------------------------------------


def inputs_of(groups: int, inputs: int, count: int = 400) -> tuple[Tensor, Tensor]:
    """Inputs (g, P, n) before and behind a prefix that adds errors which follow the inputs."""
    now = rand(groups, count, inputs, seed=11) + rand(groups, count, 1, seed=12)
    before = now + 0.3 * now @ rand(groups, inputs, inputs, seed=13) / inputs**0.5 + 0.1 * rand(*now.shape, seed=14)
    return before, now


BEHIND = {
    "linear": layer((6, 10)),
    "convolution": layer((8, 3, 2, 2)),
    "grouped": layer((12, 4, 2, 2), groups=3),
    "transposed": layer((8, 6, 2, 2), groups=2, transposed=True),
    "without data": layer((6, 10), kind="plain"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_behind_a_prefix_a_layer_fits_what_the_original_gave(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    which = BEHIND[name]
    groups, width = which.tiling.groups, which.tiling.matrix_shape[1]
    before, now = inputs_of(groups, width)
    moments, drift = now.mT @ now / now.shape[1], (before - now).mT @ now / now.shape[1]
    monkeypatch.setattr(layer_module, "DRIFT_DAMPING", 1e-9)
    found = which.behind(Met(moments, drift, now.shape[1]))
    blocks = which.tiling.matrix(which.tensor).reshape(groups, -1, width)
    expected = [
        np.linalg.lstsq(y.double().numpy(), x.double().numpy() @ block.T.astype(np.float64), rcond=None)[0].T
        for x, y, block in zip(before, now, blocks, strict=True)
    ]
    assert found.tensor.dtype == np.float32
    np.testing.assert_allclose(
        which.tiling.matrix(found.tensor), np.concatenate(expected), rtol=1e-3, atol=1e-4 * np.abs(blocks).max()
    )
    assert (found.name, found.tiling, found.looked_up, found.paths) == ("weight", which.tiling, False, PATHS)
    assert found.metric.moments is moments
    assert found.metric.row_weights is which.metric.row_weights


@pytest.mark.parametrize("name", BEHIND)
def test_without_drift_the_weight_is_the_same(name: str) -> None:
    which = BEHIND[name]
    _, now = inputs_of(which.tiling.groups, which.tiling.matrix_shape[1])
    moments = now.mT @ now / now.shape[1]
    np.testing.assert_array_equal(which.behind(Met(moments, torch.zeros_like(moments), 100)).tensor, which.tensor)


def test_damping_keeps_a_thin_sample_from_moving_the_weight_far() -> None:
    which = layer((6, 40))
    before, now = inputs_of(1, 40, count=5)
    moments, drift = now.mT @ now / 5, (before - now).mT @ now / 5
    found = which.behind(Met(moments, drift, 5)).tensor
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - which.tensor) < 2 * np.linalg.norm(which.tensor)
    dead = which.behind(Met(torch.zeros(1, 40, 40), torch.zeros(1, 40, 40), 5))
    np.testing.assert_array_equal(dead.tensor, which.tensor)


def halved(before: torch.Tensor, now: torch.Tensor) -> Met:
    """Inputs (g, P, n) of both networks as what is met, the even and the odd positions as its halves."""

    def met(x: torch.Tensor, y: torch.Tensor, halves: tuple[Met, ...] = ()) -> Met:
        count = y.shape[1]
        return Met(y.mT @ y / count, (x - y).mT @ y / count, count, halves)

    return met(before, now, tuple(met(before[:, at::2], now[:, at::2]) for at in range(2)))


@pytest.mark.parametrize("name", BEHIND)
def test_halves_tell_how_much_to_make_up_for(name: str) -> None:
    """Where the prefix has turned the inputs all is made up for; where it only added noise, hardly anything."""
    which = BEHIND[name]
    groups, width = which.tiling.groups, which.tiling.matrix_shape[1]
    now = rand(groups, 4 * width, width)
    turned = now + now @ (0.3 * rand(width, width, seed=1))
    blocks = torch.from_numpy(which.tiling.matrix(which.tensor)).reshape(groups, -1, width)

    def left(before: torch.Tensor, drift: torch.Tensor, met: Met) -> float:
        """The error on other inputs, over that of a weight that makes up for nothing."""
        found = torch.from_numpy(which.tiling.matrix(which.behind(met).tensor)).reshape(groups, -1, width)
        error = (before + drift) @ blocks.mT - before @ found.mT
        return float(error.square().sum() / (drift @ blocks.mT).square().sum())

    fresh = rand(groups, 500, width, seed=2)
    assert left(fresh, fresh @ (0.3 * rand(width, width, seed=1)), halved(turned, now)) < 0.01
    moved = blindly = 0.0
    for seed in range(3, 13):
        noisy = halved(now + rand(groups, 4 * width, width, seed=seed), now)
        moved += np.square(which.behind(noisy).tensor - which.tensor).sum()
        blindly += np.square(which.behind(replace(noisy, halves=())).tensor - which.tensor).sum()
    assert moved < 0.6 * blindly


@pytest.mark.parametrize("name", BEHIND)
def test_losses_of_dampings_are_those_on_the_inputs(name: str) -> None:
    which = BEHIND[name]
    groups, width = which.tiling.groups, which.tiling.matrix_shape[1]
    now = rand(groups, 4 * width, width).double()
    before = now + 0.3 * rand(groups, 4 * width, width, seed=1).double()
    blocks = torch.from_numpy(which.tiling.matrix(which.tensor)).double().reshape(groups, -1, width)
    rows = rand(groups, blocks.shape[1], 1, seed=2).double().abs()
    fitted, other = ((before[:, at::2], now[:, at::2]) for at in range(2))
    halves = tuple(Met(y.mT @ y / y.shape[1], (x - y).mT @ y / y.shape[1], y.shape[1]) for x, y in (fitted, other))
    found = layer_module._drift_losses((rows, blocks, 0.5), halves)

    def error(weight: Tensor) -> float:
        x, y = other
        return float((rows.mT * (x @ blocks.mT - y @ weight.mT).square()).sum() / y.shape[1])

    expected = []
    for damping in layer_module.DRIFT_DAMPINGS:
        level = damping * halves[0].moments.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        inverse = torch.linalg.inv(halves[0].moments + level * torch.eye(width, dtype=torch.float64))
        expected.append(error(blocks + blocks @ halves[0].drift @ inverse) - error(blocks))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_symbols_have_a_price_where_others_follow() -> None:
    """It makes weights smaller, which only a later layer can make up for."""
    which = LAYERS["linear"]
    moments = which.metric.moments
    followed, last = (which.behind(Met(moments, 0 * moments, 100), followed) for followed in (True, False))
    priced, free = (layer.solve_direct(1e-2, pricer) for layer in (followed, last))
    assert last.problem.feedback.paths == PATHS
    assert np.abs(priced.codes.integers).sum() < np.abs(free.codes.integers).sum()
    asked = []
    last.solve_direct(1e-2, lambda codes: asked.append(codes) or pricer(codes))
    assert not asked


@pytest.mark.parametrize("form", ["direct", "sparse_pca", "svd"])
def test_behind_a_prefix_rounding_follows_several_paths(form: str) -> None:
    which = LAYERS["linear"]
    moments = which.metric.moments
    behind = which.behind(Met(moments, torch.zeros_like(moments), 100))
    assert behind.problem.feedback.paths == PATHS > which.problem.feedback.paths == 1
    assert behind.loss(solved(form, behind, 1e-2)) < which.loss(solved(form, which, 1e-2))


# --- steps of rows that are looked up -------------------------------------------------------------------------


def test_only_rows_that_are_looked_up_have_steps_of_their_own() -> None:
    for name, which in LAYERS.items():
        assert (which.row_exponents is not None) == (name == "looked up"), name
    assert layer((60, 12), kind="plain").row_exponents is None
    even = Layer("weight", LAYERS["looked up"].tensor, Tiling((60, 12)), Metric(None, torch.full((60,), 3.0)), True)
    assert even.row_exponents is None
    assert even.scaled is even.problem
    worthless = Layer("weight", LAYERS["looked up"].tensor, Tiling((60, 12)), Metric(None, torch.zeros(60)), True)
    assert worthless.row_exponents is None


def looked_up(weights: Tensor, width: int = 12) -> Layer:
    tensor = rand(len(weights), width).numpy()
    return Layer("table", tensor, Tiling(tensor.shape), Metric(None, weights), True)


def test_rows_that_count_more_get_finer_steps_by_half_octaves() -> None:
    weights = torch.logspace(-4, 2, 50)
    exponents = looked_up(weights).row_exponents
    assert exponents.dtype == np.int32
    assert (np.diff(exponents) <= 0).all()
    assert exponents[0] > 0 > exponents[-1]
    assert STEP_GRAIN == 32
    assert not (exponents % STEP_GRAIN).any()
    ideal = -0.5 * STEP_POWER * np.log2(weights.double().numpy() / weights.double().mean().item()) * 64
    assert np.abs(exponents - ideal).max() <= STEP_GRAIN / 2 + 1e-6


@pytest.mark.parametrize("form", ["direct", "sparse_pca", "svd"])
def test_the_scaled_problem_is_the_same_in_units_of_the_steps(form: str) -> None:
    which = looked_up(torch.logspace(-4, 2, 50))
    steps = steps_of(which.row_exponents)
    found = solved(form, which, 1e-3)
    in_units = torch.from_numpy((found.tensor() / steps[:, None]).astype(np.float32))
    scaled = 0.5 * float(distortion(which.scaled.weight, in_units, which.scaled.metric))
    assert which.loss(found) == pytest.approx(scaled, rel=1e-4)
    grid = found.basis.grid if form == "direct" else found.codes.grid
    assert np.array_equal(grid.exponents - grid.exponents[0], which.row_exponents - which.row_exponents[0])


def test_steps_of_their_own_save_what_they_are_for() -> None:
    """At a loss a row of weight to the power of minus three quarters, rare rows take fewer bits."""
    which = looked_up(torch.logspace(-4, 2, 50))
    magnitudes = np.abs(which.solve_direct(1e-3, pricer).codes.integers).mean(1)
    assert magnitudes[-10:].mean() > 4 * magnitudes[:10].mean()


@pytest.mark.parametrize(("form", "depth"), [("direct", 0), ("sparse_pca", 12), ("svd", 12)])
def test_with_steps_scales_whole_outputs(form: str, depth: int) -> None:
    even = Layer("weight", LAYERS["looked up"].tensor, Tiling((60, 12)), Metric(None, torch.ones(60)), True)
    found = solved(form, even, 1e-3)
    assert found.tiling.depth == depth
    exponents = np.arange(-30, 30, dtype=np.int32) * 8
    scaled = found.with_steps(exponents)
    np.testing.assert_allclose(scaled.tensor(), found.tensor() * steps_of(exponents)[:, None], rtol=2e-2)
    # Octaves are exact.
    octaves = found.with_steps(np.arange(60, dtype=np.int32) % 5 * 64)
    np.testing.assert_array_equal(octaves.tensor(), found.tensor() * 2.0 ** (np.arange(60) % 5)[:, None])
    assert found.with_steps(None) is found
