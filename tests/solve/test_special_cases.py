"""The forms as one problem: what its special cases are known to be solved by elsewhere, the solver reaches too."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from factorpack.factors import Codes
from factorpack.solve.objective import Metric
from factorpack.solve.projected_gradient import GradientSettings, Solution, solve
from factorpack.solve.start import _spread_codewords, lloyd
from factorpack.tiling import Tiling

RESNET = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "resnet_cifar10" / "resnet20.safetensors"


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def planted(depth: int, rank: int, count: int, entries: int) -> np.ndarray:
    """Codes of so many entries a column in a random dictionary, under noise of 5 %."""
    generator = np.random.default_rng(0)
    dictionary = generator.standard_normal((depth, rank))
    codes = np.zeros((rank, count))
    for column in codes.T:
        column[generator.choice(rank, entries, replace=False)] = generator.standard_normal(entries)
    exact = dictionary @ codes
    return (exact + 0.05 * exact.std() * generator.standard_normal(exact.shape)).astype(np.float32)


def resnet_layer() -> np.ndarray:
    if not RESNET.exists():
        pytest.skip("the weights of ResNet-20 are not here")
    weight = pytest.importorskip("safetensors.numpy").load_file(RESNET)["layer1.0.conv1.weight"]
    return weight.reshape(len(weight), -1)


def run(weight: np.ndarray, tiling: Tiling, form: str, settings: GradientSettings) -> Solution:
    return solve(weight, tiling, Metric(), form, settings, torch.Generator().manual_seed(0))


def test_without_zeros_on_fine_grids_the_product_is_the_truncated_svd() -> None:
    weight, rank = normal(24, 40), 8
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    truncated = (left[:, :rank] * values[:rank]) @ right[:rank]
    for form in ("svd", "sparse_pca"):
        settings = GradientSettings(rank=rank, basis_bits=20, code_bits=20, iterations=2, refinements=1)
        product = run(weight, Tiling(weight.shape), form, settings).weight.tensor()
        assert np.linalg.norm(product - truncated) < 1e-5 * np.linalg.norm(truncated)


def test_one_hot_codes_are_k_means_from_the_same_start() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    weight, rank = normal(48, 36), 16
    tiling = Tiling(weight.shape, depth=4)
    tiles = torch.from_numpy(tiling.tile(weight))
    start = _spread_codewords(tiles, rank, torch.ones_like(tiles), torch.Generator().manual_seed(0))
    reference = cluster.KMeans(rank, init=start.mT.numpy(), n_init=1, tol=0).fit(tiles.mT.numpy()).inertia_
    codewords, indices = lloyd(tiles, start, iterations=300)
    assert float((tiles - codewords[:, indices]).square().sum()) == pytest.approx(reference, rel=1e-4)
    settings = GradientSettings(rank=rank, basis_bits=12)
    assert run(weight, tiling, "vq", settings).distortion == pytest.approx(reference, rel=0.01)


@pytest.mark.parametrize(
    ("make", "rank", "entries"),
    [(lambda: planted(24, 16, 200, 4), 16, 4), (lambda: normal(12, 200), 12, 4), (resnet_layer, 16, 6)],
    ids=["planted", "noise", "ResNet-20"],
)
def test_without_quantisation_it_is_dictionary_learning_at_as_many_entries(
    make: Callable[[], np.ndarray], rank: int, entries: int
) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    weight = make()
    samples = weight.T.astype(np.float64)
    references = []
    for share in (0.03, 0.1):
        learner = decomposition.DictionaryLearning(
            rank, alpha=share * float(np.linalg.norm(samples, axis=1).mean()), max_iter=30, fit_algorithm="cd",
            transform_algorithm="omp", transform_n_nonzero_coefs=entries, random_state=0,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That it has not converged, and of codes that OMP ends early.
            codes = learner.fit(samples).transform(samples)
        debiased = np.linalg.lstsq(codes, samples, rcond=None)[0]
        references.append((float(np.square(samples - codes @ debiased).sum()), np.count_nonzero(codes)))
    reference, kept = min(references)
    settings = GradientSettings(
        rank=rank, sparsity=1 - kept / (rank * len(samples)), basis_bits=16, code_bits=16,
        pursuit=60, iterations=1, refinements=0,
    )  # fmt: skip
    solution = run(weight, Tiling(weight.shape), "sparse_pca", settings)
    assert isinstance(solution.weight.codes, Codes)
    assert np.count_nonzero(solution.weight.codes.integers) <= kept
    assert solution.distortion <= reference
