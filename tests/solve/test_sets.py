from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from factorpack.errors import MismatchError
from factorpack.solve.sets import ConstraintSet, OneHot, Orthonormal, RankAtMost, Sparse, SparseGrid, Uniform

ROWS, COLUMNS = 4, 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape: int, seed: int = 5) -> Tensor:
    return rand(*shape, seed=seed).exp()


SETS: dict[str, ConstraintSet] = {
    "grid of the matrix": Uniform(-2, 1, torch.tensor(0.3, dtype=torch.float64)),
    "grid of rows": Uniform(-8, 7, 0.1 * positive(ROWS, 1)),
    "grid of columns": Uniform(-8, 7, 0.1 * positive(1, COLUMNS)),
    "sparse": Sparse(5),
    "weighted sparse": Sparse(5, positive(ROWS, COLUMNS)),
    "empty": Sparse(0),
    "sparse grid": SparseGrid(5, Uniform(-2, 1, 0.5 * positive(1, COLUMNS))),
    "weighted sparse grid": SparseGrid(5, Uniform(-2, 1, 0.5 * positive(1, COLUMNS)), positive(ROWS, COLUMNS)),
    "one-hot": OneHot(),
    "rank": RankAtMost(2),
    "orthonormal": Orthonormal(),
}
MEMBERS: dict[str, Tensor] = {
    "grid of the matrix": 0.3 * torch.randint(-2, 2, (ROWS, COLUMNS)).to(torch.float64),
    "sparse": torch.diag(rand(ROWS))[:, :COLUMNS],
    "one-hot": torch.eye(ROWS, COLUMNS, dtype=torch.float64),
    "rank": rand(ROWS, 2) @ rand(2, COLUMNS),
    "orthonormal": torch.linalg.qr(rand(ROWS, COLUMNS)).Q,
}


@pytest.mark.parametrize("name", SETS)
def test_a_projection_is_in_the_set_and_stays(name: str) -> None:
    members = SETS[name]
    for seed in range(20):
        x = rand(ROWS, COLUMNS, seed=seed)
        y = members.project(x)
        assert not members.contains(x)
        assert members.contains(y)
        torch.testing.assert_close(members.project(y), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_its_own_projection(name: str) -> None:
    assert SETS[name].contains(MEMBERS[name])
    torch.testing.assert_close(SETS[name].project(MEMBERS[name]), MEMBERS[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_no_other_member_is_nearer(name: str) -> None:
    members = SETS[name]
    weights = getattr(members, "weights", None)
    weights = torch.ones(ROWS, COLUMNS) if weights is None else weights
    x = rand(ROWS, COLUMNS)
    least = float((weights * (x - members.project(x)) ** 2).sum())
    for seed in range(200):
        other = members.project(x + 0.3 * rand(ROWS, COLUMNS, seed=seed + 1))
        assert float((weights * (x - other) ** 2).sum()) >= least - 1e-12


def brute_force(x: Tensor, count: int, grid: Uniform, weights: Tensor) -> float:
    """The least weighted error over all supports of `count` entries and all points of the grid."""
    values, flat = x.flatten(), weights.flatten()
    steps = grid.steps.expand(x.shape).flatten()
    least = float("inf")
    for support in combinations(range(values.numel()), count):
        for levels in product(range(grid.low, grid.high + 1), repeat=count):
            y = torch.zeros_like(values)
            y[list(support)] = steps[list(support)] * torch.tensor(levels, dtype=values.dtype)
            least = min(least, float((flat * (values - y) ** 2).sum()))
    return least


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_sparse_grid_is_optimal_by_brute_force(seed: int, weighted: bool) -> None:
    x = 2 * rand(2, 3, seed=seed)
    weights = positive(2, 3, seed=seed) if weighted else torch.ones(2, 3, dtype=torch.float64)
    grid = Uniform(-2, 1, positive(1, 3, seed=seed + 50))
    y = SparseGrid(2, grid, weights if weighted else None).project(x)
    assert float((weights * (x - y) ** 2).sum()) == pytest.approx(brute_force(x, 2, grid, weights), rel=1e-12)


def test_sparse_grid_keeps_the_gain_and_not_the_magnitude() -> None:
    # The grid's end clips 4 to 1, which gains 7; -3 lies on the grid nearly whole and gains 9.
    x = torch.tensor([[4.0, -3.0]])
    grid = Uniform(-4, 1, torch.tensor(1.0))
    assert torch.equal(SparseGrid(1, grid).project(x), torch.tensor([[0.0, -3.0]]))
    assert torch.equal(Sparse(1).project(x), torch.tensor([[4.0, 0.0]]))


def test_a_grid_is_its_formula() -> None:
    x = torch.tensor([[-10.0, -0.6, 0.2, 0.6, 10.0]])
    grid = Uniform(-2, 1, torch.tensor(0.5))
    assert torch.equal(grid.project(x), torch.tensor([[-1.0, -0.5, 0.0, 0.5, 0.5]]))
    assert torch.equal(grid.integers(x), torch.tensor([[-2.0, -1.0, 0.0, 1.0, 1.0]]))


def test_ties_fall_to_the_first_by_index() -> None:
    ones = torch.ones(2, 3)
    assert torch.equal(Sparse(2).project(ones), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(OneHot().project(ones), torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))


def test_sparse_counts_over_the_whole_matrix() -> None:
    x = torch.tensor([[5.0, 4.0, 3.0], [0.1, 0.2, 0.3]])
    assert torch.equal(Sparse(3).project(x), torch.tensor([[5.0, 4.0, 3.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(Sparse(9).project(x), x)


def test_one_hot_is_nearest_by_brute_force() -> None:
    x = rand(3, 4)
    choices = (torch.eye(3, dtype=torch.float64)[:, list(rows)] for rows in product(range(3), repeat=4))
    least = min(float((x - choice).square().sum()) for choice in choices)
    assert float((x - OneHot().project(x)).square().sum()) == pytest.approx(least)


def test_rank_leaves_the_singular_values_it_drops() -> None:
    x = rand(5, 4)
    lost = (x - RankAtMost(2).project(x)).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(x)[2:].square().sum())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(1, 0, torch.tensor(1.0)),
        lambda: Sparse(-1),
        lambda: SparseGrid(-1, Uniform(-1, 1, torch.tensor(1.0))),
        lambda: SparseGrid(1, Uniform(1, 2, torch.tensor(1.0))),
        lambda: RankAtMost(-1),
        lambda: Orthonormal().project(torch.ones(2, 3)),
    ],
)
def test_sets_without_members_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(MismatchError):
        make()
