import pytest
import torch
from torch import Tensor

from factorpack.errors import MismatchError
from factorpack.solve import start
from factorpack.solve.objective import Metric, distortion
from factorpack.solve.start import (
    kmeans,
    lloyd,
    nearest_codewords,
    search_steps,
    singular_factors,
    whitening,
)
from factorpack.tiling import Tiling


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(size: int, seed: int = 3) -> Tensor:
    samples = rand(3 * size, size, seed=seed) @ rand(size, size, seed=seed + 1)
    return (samples.T @ samples)[None]


def test_singular_factors_are_the_truncated_svd_however_it_is_split() -> None:
    tiles, plain = rand(6, 9), whitening(Metric(), Tiling((6, 9)))
    lost = torch.linalg.svdvals(tiles)[3:].square().sum()
    for split in (0.0, 0.5, 1.0):
        basis, codes = singular_factors(tiles, 3, plain, split)
        torch.testing.assert_close((tiles - basis @ codes).square().sum(), lost)
    basis, codes = singular_factors(tiles, 3, plain)
    torch.testing.assert_close(basis.norm(dim=0), codes.norm(dim=1))


@pytest.mark.parametrize("depth", [0, 9])
def test_whitened_factors_are_the_best_of_their_rank_in_the_metric(depth: int) -> None:
    weight, tiling = rand(6, 9), Tiling((6, 9), depth=depth)
    rows = rand(6, seed=8).exp()
    metric = Metric(moments(9), rows)
    root = torch.linalg.cholesky(moments(9)[0])
    least = torch.linalg.svdvals(rows.sqrt()[:, None] * weight @ root)[3:].square().sum()
    tiles = weight.T if depth else weight
    basis, codes = singular_factors(tiles, 3, whitening(metric, tiling))
    product = (basis @ codes).T if depth else basis @ codes
    torch.testing.assert_close(distortion(weight, product, metric), least, rtol=1e-4, atol=0)
    basis, codes = singular_factors(tiles, 3, whitening(Metric(), tiling))
    plain = (basis @ codes).T if depth else basis @ codes
    assert distortion(weight, plain, metric) > 1.01 * least


def test_a_whitening_survives_inputs_and_outputs_that_are_dead() -> None:
    for metric in (Metric(torch.zeros(1, 9, 9)), Metric(torch.diag(torch.eye(9)[0])[None], torch.eye(6)[1])):
        for depth in (0, 3, 9, 4):
            tiling = Tiling((6, 9), depth=depth)
            tiles = torch.from_numpy(tiling.tile(rand(6, 9).to(torch.float32).numpy()))
            basis, codes = singular_factors(tiles, 2, whitening(metric, tiling))
            assert torch.isfinite(basis).all()
            assert torch.isfinite(codes).all()


def test_a_whitening_survives_moments_of_few_samples_summed_in_float32() -> None:
    samples = rand(5, 200).to(torch.float32) * 1e3
    metric = Metric((samples.T @ samples)[None])
    weight = rand(20, 200).to(torch.float32)
    # Five samples make a problem of rank five, which rank eight solves.
    basis, codes = singular_factors(weight, 8, whitening(metric, Tiling((20, 200))))
    assert distortion(weight, basis @ codes, metric) < 1e-4 * distortion(weight, torch.zeros_like(weight), metric)


def test_nearest_codewords_is_the_search_written_out() -> None:
    tiles, codewords, weights = rand(3, 20), rand(3, 5, seed=1), rand(3, 20, seed=2).exp()
    for weight in (None, weights):
        counts = torch.ones_like(tiles) if weight is None else weight
        distances = (counts[:, None] * (tiles[:, None] - codewords[:, :, None]) ** 2).sum(0)
        indices, nearest = nearest_codewords(tiles, codewords, weight)
        assert torch.equal(indices, distances.argmin(0))
        torch.testing.assert_close(nearest, distances.amin(0))


def test_kmeans_finds_clusters_that_lie_apart() -> None:
    centres = 100 * rand(2, 4)
    tiles = centres.repeat(1, 10) + 0.1 * rand(2, 40, seed=1)
    codewords, indices = kmeans(tiles, 4, torch.Generator().manual_seed(0))
    assert (codewords[:, indices] - centres.repeat(1, 10)).abs().max() < 0.2


def test_kmeans_repeats_itself_with_equal_seeds() -> None:
    tiles = rand(3, 60)
    runs = [kmeans(tiles, 6, torch.Generator().manual_seed(seed), iterations=2)[0] for seed in (4, 4, 5)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_codewords_of_a_sample_are_nearly_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, weights = rand(2, 8000), rand(1, 8000, seed=1).exp().expand(2, -1)

    def error(most: int) -> float:
        monkeypatch.setattr(start, "TILES_PER_CODEWORD", most)
        codewords, indices = kmeans(tiles, 16, torch.Generator().manual_seed(0), weights)
        assert torch.equal(indices, nearest_codewords(tiles, codewords, weights)[0])
        return float((weights * (tiles - codewords[:, indices]) ** 2).sum())

    of_all = error(500)
    assert of_all != error(250) < 1.05 * of_all
    assert error(4) > 1.2 * of_all


def test_the_nearest_codewords_do_not_depend_on_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, codewords, weights = rand(3, 50), rand(3, 5, seed=1), rand(3, 50, seed=2).exp()
    whole = nearest_codewords(tiles, codewords, weights)
    monkeypatch.setattr(start, "DISTANCES_AT_ONCE", 35)
    for found, expected in zip(nearest_codewords(tiles, codewords, weights), whole, strict=True):
        assert torch.equal(found, expected)


def test_weights_pull_codewords_towards_what_counts() -> None:
    tiles = torch.tensor([[0.0, 1.0]])
    codewords, _ = kmeans(tiles, 1, torch.Generator(), weights=torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(codewords, torch.tensor([[0.75]]))


def test_codewords_without_tiles_move_to_the_tiles_that_fare_worst() -> None:
    tiles = torch.tensor([[0.0, 0.1, 5.0, 9.0]])
    codewords, indices = lloyd(tiles, torch.tensor([[0.0, 1000.0, 2000.0]]))
    torch.testing.assert_close(codewords.sort(dim=1).values, torch.tensor([[0.05, 5.0, 9.0]]))
    assert len(set(indices.tolist())) == 3


def test_equal_tiles_are_no_trouble() -> None:
    codewords, indices = kmeans(torch.ones(2, 5), 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(codewords[:, indices], torch.ones(2, 5))


def test_steps_are_the_best_of_a_fine_search() -> None:
    lines = rand(5, 200) * rand(5, 1, seed=1).exp()
    found = search_steps(lines, -4, 3)

    def error(steps: Tensor) -> Tensor:
        return (lines - steps[:, None] * torch.clamp(torch.round(lines / steps[:, None]), -4, 3)).square().sum(1)

    fine = torch.stack([error(found * ratio) for ratio in torch.linspace(0.3, 3, 400, dtype=torch.float64)]).amin(0)
    assert (error(found) <= 1.05 * fine).all()


def test_steps_are_positive_even_for_zeros() -> None:
    assert torch.equal(search_steps(torch.zeros(2, 3), -8, 7), torch.ones(2))
    steps = search_steps(torch.tensor([[0.0, 0.0], [-8.0, 7.0]]), -8, 7)
    torch.testing.assert_close(steps, torch.ones(2))


@pytest.mark.parametrize("rank", [0, 7])
def test_ranks_that_the_tiles_cannot_have_are_refused(rank: int) -> None:
    with pytest.raises(MismatchError):
        singular_factors(rand(6, 9), rank, whitening(Metric(), Tiling((6, 9))))
    with pytest.raises(MismatchError):
        kmeans(rand(9, 6), rank, torch.Generator())
