from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factorpack.errors import MismatchError, UnsupportedError
from factorpack.factors import Codes, OneHotCodes
from factorpack.solve.objective import Metric, distortion
from factorpack.solve.projected_gradient import FORMS, GradientSettings, Solution, _problem, reassign, solve
from factorpack.solve.start import kmeans, nearest_codewords
from factorpack.tiling import Tiling

QUICK = GradientSettings(rank=6, sparsity=0.5, iterations=6, inner_steps=5, refinements=2)
RESNET = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "resnet_cifar10" / "resnet20.safetensors"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def correlated(groups: int, inputs: int, rho: float = 0.9) -> Metric:
    lags = torch.arange(inputs)
    moments = rho ** (lags[:, None] - lags).abs().to(torch.float64)
    spread = torch.randn(groups, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp()
    return Metric(spread[:, :, None] * moments * spread[:, None, :])


def measured(weight: np.ndarray, approximation: np.ndarray, tiling: Tiling, metric: Metric) -> float:
    pair = [torch.from_numpy(tiling.matrix(tensor)).to(torch.float64) for tensor in (weight, approximation)]
    return float(distortion(pair[0], pair[1], metric))


def run(weight: np.ndarray, tiling: Tiling, metric: Metric, form: str, settings: GradientSettings) -> Solution:
    return solve(weight, tiling, metric, form, settings, torch.Generator().manual_seed(0))


TILINGS = [
    Tiling((12, 10)),
    Tiling((12, 5, 2), depth=10),
    Tiling((12, 10), depth=7),
    Tiling((6, 12, 3), groups=3, transposed=True),
    Tiling((12, 10), groups=2, depth=5),
]


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_ends_in_its_sets_and_reports_what_it_reached(form: str, tiling: Tiling, aware: bool) -> None:
    weight = normal(*tiling.shape)
    metric = Metric()
    if aware:
        outputs, inputs = tiling.matrix_shape
        metric = Metric(correlated(tiling.groups, inputs).moments, torch.linspace(0.5, 2, outputs, dtype=torch.float64))
    settings = replace(QUICK, rank=min(6, *tiling.tiled_shape))
    solution = run(weight, tiling, metric, form, settings)
    found = solution.weight
    assert (found.form, found.tiling) == (form, tiling)
    assert (found.basis.integers is None) == (form == "direct")
    if form == "vq":
        assert isinstance(found.codes, OneHotCodes)
    else:
        assert isinstance(found.codes, Codes)
        assert (found.codes.grid.low, found.codes.grid.high) == (-8, 7)
        if form != "svd":
            assert np.count_nonzero(found.codes.integers) <= round(0.5 * found.codes.integers.size)
    assert solution.distortion == pytest.approx(measured(weight, found.tensor(), tiling, metric), rel=1e-9)
    assert solution.distortion == min(solution.trace)
    assert solution.distortion < measured(weight, np.zeros_like(weight), tiling, metric)


@pytest.mark.parametrize("form", FORMS)
def test_equal_seeds_give_equal_integers(form: str) -> None:
    weight, tiling = normal(12, 10), Tiling((12, 10))
    first, second = (run(weight, tiling, correlated(1, 10), form, QUICK) for _ in range(2))
    assert first.trace == second.trace
    assert np.array_equal(first.weight.tensor(), second.weight.tensor())


@pytest.mark.parametrize("form", FORMS)
def test_one_step_a_matrix_where_asked(form: str) -> None:
    weight, tiling = normal(12, 10), Tiling((12, 10))
    found = run(weight, tiling, Metric(), form, replace(QUICK, line_steps=False)).weight
    assert found.basis.grid.exponents.size == 1
    assert isinstance(found.codes, OneHotCodes) or found.codes.grid.exponents.size == 1


def test_svd_on_fine_grids_is_the_truncated_svd() -> None:
    weight, tiling = normal(24, 40), Tiling((24, 40))
    settings = replace(QUICK, rank=8, basis_bits=14, code_bits=14)
    least = float(np.square(np.linalg.svd(weight.astype(np.float64))[1][8:]).sum())
    assert run(weight, tiling, Metric(), "svd", settings).distortion == pytest.approx(least, rel=1e-4)


def test_svd_on_fine_grids_is_the_whitened_svd_where_inputs_are_known() -> None:
    weight, tiling, metric = normal(24, 40), Tiling((24, 40)), correlated(1, 40)
    settings = replace(QUICK, rank=8, basis_bits=14, code_bits=14)
    assert metric.moments is not None
    root = np.linalg.cholesky(metric.moments[0].numpy())
    least = float(np.square(np.linalg.svd(weight @ root)[1][8:]).sum())
    assert run(weight, tiling, metric, "svd", settings).distortion == pytest.approx(least, rel=1e-4)


def test_one_hot_codes_are_no_worse_than_kmeans_from_the_same_start() -> None:
    weight, tiling = normal(32, 36), Tiling((32, 36), depth=4)
    tiles = torch.from_numpy(tiling.tile(weight))
    codewords, indices = kmeans(tiles, 16, torch.Generator().manual_seed(0))
    lloyds = float((tiles - codewords[:, indices]).square().sum())
    assert run(weight, tiling, Metric(), "vq", replace(QUICK, rank=16)).distortion <= 1.01 * lloyds


def test_direct_at_full_density_is_no_worse_than_rounding() -> None:
    weight, tiling = normal(12, 10), Tiling((12, 10))
    settings = replace(QUICK, sparsity=0.0, code_bits=8)
    steps = np.abs(weight).max(0) / 127
    rounded = (np.round(weight / steps) * steps).astype(np.float32)
    # A step that a file can hold is up to 1.1 % above the one that just clips nothing.
    lost = measured(weight, rounded, tiling, Metric())
    assert run(weight, tiling, Metric(), "direct", settings).distortion <= 1.05 * lost


@pytest.mark.parametrize("depth", [0, 5, 10, 20, 7, 13])
@pytest.mark.parametrize("groups", [1, 3])
def test_reassigning_codewords_never_raises_the_distortion_and_ends_at_a_local_optimum(depth: int, groups: int) -> None:
    outputs, inputs, rank = 6, 10, 3
    tiling = Tiling((outputs, inputs), groups=groups, depth=depth)
    metric = Metric(correlated(groups, inputs).moments, torch.linspace(0.5, 2, outputs, dtype=torch.float64))
    problem = _problem(normal(outputs, inputs), tiling, metric, "vq", GradientSettings(rank=rank))
    codewords = problem.tiles[:, :rank] + 0.1

    def reached(indices: torch.Tensor) -> float:
        return float(distortion(problem.weight, problem.matrix(codewords[:, indices]), problem.metric))

    indices = nearest_codewords(problem.tiles, codewords)[0]
    levels = [reached(indices)]
    for _ in range(10):
        indices = reassign(problem, codewords, indices)
        levels.append(reached(indices))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(levels))
    assert levels[-1] == levels[-2]
    for tile in range(indices.numel()):
        for codeword in range(rank):
            other = indices.clone()
            other[tile] = codeword
            assert reached(other) >= levels[-1] * (1 - 1e-5)


def test_a_weight_of_zeros_costs_nothing() -> None:
    for form in FORMS:
        solution = run(np.zeros((8, 6), np.float32), Tiling((8, 6)), Metric(), form, replace(QUICK, rank=3))
        assert solution.distortion == 0
        assert not solution.weight.tensor().any()


@pytest.mark.skipif(not RESNET.exists(), reason="the weights of ResNet-20 are not here")
def test_on_real_weights_the_iterations_beat_one_threshold_and_both_beat_none() -> None:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    weight = load_file(RESNET)["layer2.1.conv2.weight"]
    tiling, metric = Tiling(weight.shape), correlated(1, weight[0].size)
    settings = GradientSettings(rank=32, sparsity=0.6)
    naive = run(weight, tiling, metric, "sparse_pca", replace(settings, pursuit=0, iterations=0, refinements=0))
    one_shot = run(weight, tiling, metric, "sparse_pca", replace(settings, one_shot=True))
    iterated = run(weight, tiling, metric, "sparse_pca", settings)
    blind = run(weight, tiling, Metric(), "sparse_pca", settings)
    assert iterated.distortion < 0.9 * one_shot.distortion
    assert one_shot.distortion < 0.5 * naive.distortion
    assert iterated.distortion < 0.5 * measured(weight, blind.weight.tensor(), tiling, metric)


@pytest.mark.skipif(not RESNET.exists(), reason="the weights of ResNet-20 are not here")
@pytest.mark.parametrize(("sparsity", "part"), [(0.8, 0.8), (0.3, 1.0)])
def test_sparse_factors_to_start_from_help_where_few_entries_stay(sparsity: float, part: float) -> None:
    load_file = pytest.importorskip("safetensors.numpy").load_file
    weight = load_file(RESNET)["layer1.0.conv1.weight"]
    tiling, metric = Tiling(weight.shape), correlated(1, weight[0].size, 0.5)
    settings = GradientSettings(rank=16, sparsity=sparsity, inner_steps=5)
    plain = run(weight, tiling, metric, "sparse_pca", replace(settings, pursuit=0))
    assert run(weight, tiling, metric, "sparse_pca", settings).distortion <= part * plain.distortion


def test_what_does_not_fit_is_refused() -> None:
    weight, tiling = normal(12, 10), Tiling((12, 10))
    with pytest.raises(UnsupportedError, match="separable"):
        run(weight, tiling, Metric(), "separable", QUICK)
    with pytest.raises(MismatchError, match="not for a matrix"):
        run(weight, tiling, correlated(1, 9), "svd", QUICK)
    with pytest.raises(MismatchError, match="rank 11"):
        run(weight, tiling, Metric(), "svd", replace(QUICK, rank=11))
    with pytest.raises(MismatchError, match="11 codewords"):
        run(weight, tiling, Metric(), "vq", replace(QUICK, rank=11))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 0), ("sparsity", 1.5), ("basis_bits", 1), ("code_bits", 21), ("inner_steps", 0), ("learning_rate", 0.0)],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(MismatchError):
        replace(QUICK, **settings)
