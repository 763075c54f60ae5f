import pytest
import torch
from torch import Tensor

from factorpack.solve.pursuit import pursue, sparse_axes
from factorpack.solve.sets import Sparse


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sparse_axes_keep_the_product_and_find_codes_that_are_sparse() -> None:
    codes = Sparse(480).project(rand(6, 400))
    basis, mixing = rand(9, 6, seed=1), torch.linalg.qr(rand(6, 6, seed=2)).Q
    mixed = mixing.mT @ codes
    turned_basis, turned = sparse_axes(basis @ mixing, mixed)
    torch.testing.assert_close(turned_basis @ turned, basis @ codes)
    kept = Sparse(480).project(turned)
    before = Sparse(480).project(mixed)
    lost = [float((of - part).square().sum() / of.square().sum()) for of, part in ((turned, kept), (mixed, before))]
    assert lost[0] < 0.3 * lost[1]


def test_sparse_axes_of_codes_that_depend_on_one_another_or_are_nothing() -> None:
    codes = rand(4, 20)
    codes[3] = codes[0] - codes[1]
    for found in (codes, torch.zeros(4, 20, dtype=torch.float64)):
        basis = rand(5, 4, seed=1)
        turned_basis, turned = sparse_axes(basis, found)
        torch.testing.assert_close(turned_basis @ turned, basis @ found)


@pytest.mark.parametrize("metric", ["plain", "coupled"])
def test_a_pursuit_keeps_its_count_and_only_ever_gets_better_with_rounds(metric: str) -> None:
    tiles, count = rand(8, 60), 150
    root = torch.eye(60, dtype=torch.float64) if metric == "plain" else rand(60, 60, seed=5)
    moments = root @ root.mT
    left, values, right = torch.linalg.svd(tiles, full_matrices=False)
    start = sparse_axes(left[:, :6], values[:6, None] * right[:6])

    def reached(rounds: int) -> float:
        curvature = moments.diagonal().expand(8, 60)
        basis, codes = pursue(tiles, start, count, lambda error: error @ moments, curvature, rounds)
        assert int((codes != 0).sum()) <= count
        error = tiles - basis @ codes
        return float((error * (error @ moments)).sum())

    levels = [reached(rounds) for rounds in (0, 1, 5, 20)]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] < 0.9 * levels[0]


def test_a_pursuit_finds_what_was_planted() -> None:
    codes = torch.zeros(8, 200, dtype=torch.float64)
    for column in range(200):
        codes[torch.randperm(8, generator=torch.Generator().manual_seed(column))[:2], column] = rand(2, seed=column)
    tiles = rand(8, 8, seed=9) @ codes
    left, values, right = torch.linalg.svd(tiles, full_matrices=False)
    start = sparse_axes(left, values[:, None] * right)
    basis, found = pursue(tiles, start, 400, lambda error: error, torch.ones_like(tiles), 20)
    assert float((tiles - basis @ found).square().sum()) < 1e-3 * float(tiles.square().sum())


def test_nothing_to_find_is_no_trouble() -> None:
    zeros = torch.zeros(4, 6, dtype=torch.float64)
    basis, codes = pursue(zeros, (rand(4, 3), torch.zeros(3, 6, dtype=torch.float64)), 5, lambda e: e, zeros, 3)
    assert torch.isfinite(basis).all()
    assert not codes.any()
