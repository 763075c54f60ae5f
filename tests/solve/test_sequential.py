"""Sequential rounding against the same thing written out slowly, and what it is for: less distortion for its bits."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from factorpack.factors import Codes, FactoredWeight, OneHotCodes
from factorpack.solve import sequential
from factorpack.solve.objective import Metric, distortion
from factorpack.solve.sequential import (
    Feedback,
    Price,
    Problem,
    direct,
    principal_basis,
    round_columns,
    round_paths,
    round_tiles,
    rounded,
    vector_quantised,
    with_basis,
)
from factorpack.tiling import Tiling


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(groups: int, inputs: int, seed: int = 3) -> Tensor:
    samples = rand(groups, 4 * inputs, 3, seed=seed) @ rand(groups, 3, inputs, seed=seed + 1)
    samples = samples + 0.3 * rand(groups, 4 * inputs, inputs, seed=seed + 2)
    return samples.mT @ samples / (4 * inputs)


def damped(moments: np.ndarray) -> np.ndarray:
    """One group's (n, n) as the solver sees it."""
    return moments + sequential.DAMPING * np.diag(moments).mean() * np.eye(len(moments))


def obq(target: np.ndarray, moments: np.ndarray, order: np.ndarray, price: Price | None = None) -> np.ndarray:
    """One group (r, n): the inverse of what is left of H anew for every column, every choice tried."""
    rows, inputs = target.shape
    hessian = damped(moments)[np.ix_(order, order)]
    x, codes = target[:, order].copy(), np.zeros((rows, inputs))
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(inputs)]
    residual = np.mean([1 / inverse[0, 0] for inverse in inverses])
    for j, inverse in enumerate(inverses):
        for row in range(rows):
            value = x[row, j]
            nearest = np.rint(value)
            chosen = nearest
            if price is not None:
                bits = price.bits.numpy()
                context = min(int(price.row_classes[row]) + int(price.column_classes[order[j]]), len(bits) - 1)
                rate, reach = float(price.rate[row]) * inverse[0, 0] * residual, bits.shape[1] // 2
                chosen = min(
                    (nearest, nearest - np.sign(nearest), 0.0),
                    key=lambda q: (value - q) ** 2 + rate * bits[context, int(np.clip(q, -reach, reach)) + reach],
                )
            codes[row, j] = chosen
            x[row, j + 1 :] -= (value - chosen) / inverse[0, 0] * inverse[0, 1:]
    return codes[:, np.argsort(order)]


def laplacian(reach: int = 8, scales: tuple[float, ...] = (1.0, 2.0, 4.0)) -> Tensor:
    levels = torch.arange(-reach, reach + 1).abs()
    weights = torch.stack([torch.exp(-levels / scale) for scale in scales])
    return -(weights / weights.sum(1, keepdim=True)).log2()


def price(rows: int, columns: int, rate: float) -> Price:
    generator = torch.Generator().manual_seed(5)
    row_classes, column_classes = (torch.randint(0, 2, (n,), generator=generator) for n in (rows, columns))
    return Price(laplacian(), row_classes, column_classes, rate * torch.linspace(0.5, 2, rows))


def entropy(codes: Tensor) -> float:
    counts = torch.unique(codes, return_counts=True)[1].double()
    shares = counts / counts.sum()
    return float(-(shares * shares.log2()).sum())


def problem(weight: Tensor, moments: Tensor, rows: Tensor | None = None) -> Problem:
    return Problem(weight, Metric(moments, rows), Feedback(moments))


def assert_whole_signed_bits(weight: FactoredWeight) -> None:
    factors = [weight.basis.grid] + ([weight.codes.grid] if isinstance(weight.codes, Codes) else [])
    for grid in factors:
        assert grid.high >= 0
        assert grid.low == -grid.high - 1
        assert (grid.high + 1).bit_count() == 1


# --- columns --------------------------------------------------------------------------------------------------


def test_uncoupled_inputs_are_plain_rounding() -> None:
    target = 4 * rand(2, 7, 9)
    for moments in (torch.eye(9).expand(2, -1, -1), torch.diag_embed(rand(2, 9, seed=1).exp()), torch.zeros(2, 9, 9)):
        assert torch.equal(round_columns(target, Feedback(moments)), torch.round(target))


@pytest.mark.parametrize("inputs", [1, 5, 12])
def test_rounding_is_the_slow_one(inputs: int) -> None:
    target, moments = 3 * rand(1, 8, inputs), correlated(1, inputs)
    feedback = Feedback(moments)
    expected = obq(target[0].double().numpy(), moments[0].double().numpy(), feedback.order.numpy())
    assert np.array_equal(round_columns(target, feedback)[0].numpy(), expected)


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_priced_rounding_is_the_slow_one(rate: float) -> None:
    target, moments = 3 * rand(1, 8, 12), correlated(1, 12)
    feedback, paid = Feedback(moments), price(8, 12, rate)
    expected = obq(target[0].double().numpy(), moments[0].double().numpy(), feedback.order.numpy(), paid)
    found = round_columns(target, feedback, paid)[0]
    assert np.array_equal(found.numpy(), expected)
    assert not torch.equal(found, round_columns(target, feedback)[0])


def test_strong_inputs_go_first() -> None:
    moments = torch.diag(torch.tensor([1.0, 4.0, 9.0, 4.0]))[None]
    assert Feedback(moments).order.tolist() == [2, 1, 3, 0]
    # Tiles keep together.
    assert Feedback(moments, 2).order.tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("block", [1, 7, 32, 1000])
def test_blocks_only_save_time(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, feedback, paid = 3 * rand(2, 10, 80), Feedback(correlated(2, 80)), price(20, 80, 0.2)
    plain, priced = round_columns(target, feedback), round_columns(target, feedback, paid)
    monkeypatch.setattr(sequential, "BLOCK", block)
    assert torch.equal(round_columns(target, feedback), plain)
    assert torch.equal(round_columns(target, feedback, paid), priced)


def test_feedback_clearly_lowers_the_distortion() -> None:
    target, moments = rand(1, 32, 48), correlated(1, 48)
    metric = Metric(moments)
    fed = distortion(target[0], round_columns(target, Feedback(moments))[0], metric)
    plain = distortion(target[0], torch.round(target[0]), metric)
    assert fed < 0.5 * plain


def test_groups_are_problems_of_their_own() -> None:
    # Equal powers in every group, so that the common order is each group's own.
    moments = correlated(3, 10)
    scale = moments.diagonal(dim1=1, dim2=2).rsqrt() * torch.linspace(2, 1, 10)
    moments = moments * scale[:, :, None] * scale[:, None, :]
    target = 3 * rand(3, 6, 10)
    together = round_columns(target, Feedback(moments))
    for group in range(3):
        alone = round_columns(target[group : group + 1], Feedback(moments[group : group + 1]))
        assert torch.equal(together[group], alone[0])


def test_a_rate_of_zero_is_no_price() -> None:
    target, feedback = 3 * rand(1, 8, 12), Feedback(correlated(1, 12))
    assert torch.equal(round_columns(target, feedback, price(8, 12, 0.0)), round_columns(target, feedback))


def test_a_higher_rate_lowers_the_entropy() -> None:
    target, feedback = 2 * rand(1, 32, 64), Feedback(correlated(1, 64))
    found = [entropy(round_columns(target, feedback, price(32, 64, rate))) for rate in (0.0, 0.1, 0.5, 2.0)]
    assert found == sorted(found, reverse=True)
    assert found[3] < 0.8 * found[0]


def test_codes_stay_within_what_a_file_holds() -> None:
    found = round_columns(torch.tensor([[[1e12, -1e12]]]), Feedback(torch.eye(2)[None]))
    assert found.abs().max() == sequential.CODE_LIMIT


# --- several paths --------------------------------------------------------------------------------------------


def lost(target: Tensor, found: Tensor, moments: Tensor) -> float:
    """The distortion that rounding sees: in the damped moments."""
    total = 0.0
    for group, error in enumerate((target - found).double().numpy()):
        total += float(np.sum(error @ damped(moments[group].double().numpy()) * error))
    return total


def test_one_path_is_columns_in_turn() -> None:
    target, feedback = 3 * rand(2, 7, 70), Feedback(correlated(2, 70))
    assert torch.equal(round_paths(target, feedback, 1), round_columns(target, feedback))
    uncoupled = Feedback(torch.eye(70).expand(2, -1, -1))
    assert torch.equal(round_paths(target, uncoupled, 8), torch.round(target))


def best_of_all(target: np.ndarray, moments: np.ndarray, order: np.ndarray) -> np.ndarray:
    """One row (n,): every sequence of the two integers nearest to what feedback makes of each column."""
    hessian = damped(moments)[np.ix_(order, order)]
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(len(target))]
    best, least = target, math.inf
    for ways in product((0, 1), repeat=len(target)):
        x, codes = target[order].copy(), np.zeros(len(target))
        for j, (way, inverse) in enumerate(zip(ways, inverses, strict=True)):
            nearest = np.rint(x[j])
            codes[j] = nearest if not way else nearest + (1 if x[j] >= nearest else -1)
            x[j + 1 :] -= (x[j] - codes[j]) / inverse[0, 0] * inverse[0, 1:]
        error = target[order] - codes
        if error @ hessian @ error < least:
            best, least = codes[np.argsort(order)], error @ hessian @ error
    return best


@pytest.mark.parametrize("seed", range(3))
def test_enough_paths_find_the_best_of_all(seed: int) -> None:
    target, moments = 2 * rand(2, 6, 5, seed=seed), correlated(2, 5, seed=seed)
    feedback = Feedback(moments)
    found, order = round_paths(target, feedback, 32), feedback.order.numpy()
    differ = 0
    for group, row in product(range(2), range(6)):
        expected = best_of_all(target[group, row].double().numpy(), moments[group].double().numpy(), order)
        assert np.array_equal(found[group, row].numpy(), expected)
        differ += not np.array_equal(expected, round_columns(target, feedback)[group, row].numpy())
    assert differ


@pytest.mark.parametrize(("groups", "inputs"), [(1, 24), (3, 24), (1, 64), (2, 100), (1, 130)])
def test_more_paths_lose_less(groups: int, inputs: int) -> None:
    losses = dict.fromkeys((1, 2, 8), 0.0)
    for seed in range(20):
        target, moments = rand(groups, 8, inputs, seed=seed), correlated(groups, inputs, seed=seed)
        feedback = Feedback(moments)
        for paths in losses:
            found = round_paths(target, feedback, paths)
            assert torch.equal(found, found.round())
            losses[paths] += lost(target, found, moments)
    assert losses[8] < losses[2] < losses[1]
    assert losses[8] < 0.95 * losses[1]


def test_within_a_block_every_row_loses_what_its_path_says() -> None:
    """With all sequences followed no row can lose more than by one path."""
    target, moments = rand(1, 30, 8), correlated(1, 8)
    feedback = Feedback(moments)
    many, one = round_paths(target, feedback, 256), round_columns(target, feedback)
    for row in range(30):
        each = [lost(target[:, row : row + 1], found[:, row : row + 1], moments) for found in (many, one)]
        assert each[0] <= each[1] * (1 + 1e-5)


def test_groups_follow_paths_of_their_own() -> None:
    moments = correlated(3, 10)
    scale = moments.diagonal(dim1=1, dim2=2).rsqrt() * torch.linspace(2, 1, 10)
    moments = moments * scale[:, :, None] * scale[:, None, :]
    target = 3 * rand(3, 6, 10)
    together = round_paths(target, Feedback(moments), 4)
    for group in range(3):
        alone = round_paths(target[group : group + 1], Feedback(moments[group : group + 1]), 4)
        assert torch.equal(together[group], alone[0])


def test_rows_do_not_meet() -> None:
    target, feedback = 3 * rand(1, 9, 90), Feedback(correlated(1, 90))
    together = round_paths(target, feedback, 8)
    assert torch.equal(together[:, 4:5], round_paths(target[:, 4:5], feedback, 8))


def test_paths_with_a_price_are_cheaper_in_all_than_one() -> None:
    """By Σ (e·U⁻¹)² + rate·residual·bits, each row with its own rate and each entry in its context."""
    found = {1: 0.0, 8: 0.0}
    for seed in range(10):
        target, moments = 3 * rand(1, 8, 12, seed=seed), correlated(1, 12)
        paid, feedback = price(8, 12, 0.2), Feedback(moments)
        contexts = (paid.row_classes[:, None] + paid.column_classes).clamp_max(len(paid.bits) - 1)
        reach = paid.bits.shape[1] // 2
        for paths in found:
            codes = round_paths(target, feedback, paths, paid)[0]
            bits = paid.bits[contexts, codes.clamp(-reach, reach).long() + reach]
            errors = torch.linalg.solve_triangular(
                feedback.factor[0], (target[0] - codes)[:, feedback.order], upper=True, left=False
            )
            found[paths] += float(errors.square().sum() + (feedback.residual * paid.rate[:, None] * bits).sum())
    assert found[8] < 0.99 * found[1]


def test_paths_are_those_that_the_feedback_asks_for() -> None:
    target, feedback = 3 * rand(1, 8, 12), Feedback(correlated(1, 12), paths=8)
    found = rounded(0.5 * target, 0.5, feedback)
    assert found.dtype == torch.int32
    assert torch.equal(found.float(), round_paths(target, feedback, 8))
    assert not torch.equal(found.float(), round_columns(target, feedback))


@pytest.mark.parametrize("paths", [1, 8])
def test_large_weights_are_rounded_in_parts(paths: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, feedback = 3 * rand(2, 11, 12), Feedback(correlated(2, 12), paths=paths)
    paid = price(22, 12, 0.2)
    whole = rounded(target, 0.5, feedback, paid)
    monkeypatch.setattr("factorpack.factors.ENTRIES_AT_ONCE", 3 * 2 * 12)
    assert torch.equal(rounded(target, 0.5, feedback, paid), whole)


def test_no_matrix_is_needed_where_no_error_travels() -> None:
    without, told = Feedback(12), Feedback(torch.eye(12)[None])
    assert torch.equal(without.order, told.order)
    assert torch.equal(without.factor, told.factor)
    assert without.residual == pytest.approx(told.residual, rel=1e-12)
    assert not without.coupled
    for paid in (None, price(8, 12, 0.2)):
        target = 3 * rand(1, 8, 12)
        assert torch.equal(round_columns(target, without, paid), round_columns(target, told, paid))


@pytest.mark.parametrize("along_inputs", [False, True])
def test_bases_of_large_weights_are_found_in_parts(along_inputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = rand(15, 9) if along_inputs else rand(9, 15)
    tiling = Tiling(tuple(weight.shape), depth=9 if along_inputs else 0)
    whole, parts = [], []
    for found, at_once in ((whole, 1 << 24), (parts, 40)):
        monkeypatch.setattr("factorpack.factors.ENTRIES_AT_ONCE", at_once)
        for metric in (Metric(), Metric(row_weights=1 + rand(len(weight)).square())):
            basis, powers = principal_basis(Problem(weight, metric, Feedback(weight.shape[1])), along_inputs)
            solved = sequential.with_basis(
                Problem(weight, metric, Feedback(weight.shape[1])), tiling, basis.float(), 0.1
            )
            found += [basis, powers, solved.target]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def test_paths_stay_within_what_a_file_holds() -> None:
    moments = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
    for sign in (1, -1):
        found = round_paths(torch.full((1, 1, 2), sign * 1e12), Feedback(moments), 4)
        assert found.abs().max() == sequential.CODE_LIMIT


@pytest.mark.parametrize("form", ["direct", "along outputs", "along inputs", "taps"])
def test_every_form_follows_the_paths_of_its_problem(form: str) -> None:
    weight, moments = rand(14, 18), correlated(1, 18)
    losses = []
    for paths in (1, 8):
        found = Problem(weight, Metric(moments), Feedback(moments, paths=paths))
        if form == "direct":
            stored = direct(found, Tiling((14, 18)), 0.7)
        elif form == "taps":
            stored = sequential.with_tap_basis(found, Tiling((14, 6, 3))).solve("separable", 0.7)
        else:
            basis, _ = principal_basis(found, form == "along inputs")
            tiling = Tiling((14, 18), depth=18 if form == "along inputs" else 0)
            stored = with_basis(found, tiling, basis.float(), 0.01).solve("sparse_pca", 0.7)
        assert_whole_signed_bits(stored)
        losses.append(lost(weight[None], torch.from_numpy(stored.tensor()).reshape(1, 14, 18), moments))
    assert losses[1] < losses[0]


# --- codewords ------------------------------------------------------------------------------------------------


def test_one_tile_gets_the_codeword_that_is_best_of_all() -> None:
    target, moments, codewords = rand(2, 20, 4), correlated(2, 4), rand(9, 4, seed=7)
    found = round_tiles(target, Feedback(moments, 4), codewords)
    for group in range(2):
        hessian = torch.from_numpy(damped(moments[group].double().numpy()))
        for row in range(20):
            errors = (target[group, row] - codewords).double()
            costs = ((errors @ hessian) * errors).sum(1)
            assert found[group, row, 0] == costs.argmin()


def test_tiles_in_turn_beat_the_nearest_codewords() -> None:
    target, moments, codewords = rand(1, 30, 24), correlated(1, 24), rand(32, 3, seed=7)
    metric = Metric(moments)
    indices = round_tiles(target, Feedback(moments, 3), codewords)
    nearest = torch.cdist(target.reshape(-1, 3), codewords).argmin(1)
    fed, plain = (codewords[which.reshape(-1)].reshape(30, 24) for which in (indices, nearest))
    assert distortion(target[0], fed, metric) < 0.7 * distortion(target[0], plain, metric)
    uncoupled = round_tiles(target, Feedback(torch.eye(24)[None], 3), codewords)
    assert torch.equal(uncoupled.reshape(-1), nearest)


# --- forms ----------------------------------------------------------------------------------------------------


def test_direct_is_the_rounding_times_the_step() -> None:
    weight, moments = rand(10, 16), correlated(1, 16)
    found = direct(problem(weight, moments), Tiling((10, 4, 2, 2)), 0.25)
    assert found.form == "direct"
    assert found.basis.integers is None
    expected = round_columns(weight[None] / 0.25, Feedback(moments))[0] * 0.25
    np.testing.assert_allclose(found.tensor().reshape(10, 16), expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("along_inputs", "weighted"), [(False, False), (True, False), (True, True)])
def test_principal_bases_are_orthonormal_and_the_best_of_every_rank(along_inputs: bool, weighted: bool) -> None:
    weight, moments = rand(14, 10), correlated(1, 10)
    rows = rand(14, seed=8).exp() if weighted else torch.ones(14)
    # Along the inputs the basis is made for the damped moments.
    seen = moments if not along_inputs else torch.from_numpy(damped(moments[0].numpy()))[None].float()
    found = problem(weight, moments, rows)
    basis, powers = principal_basis(found, along_inputs)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=basis.dtype), atol=1e-6, rtol=0)
    assert bool((powers.diff() <= 1e-9 * powers[0]).all())
    values = torch.linalg.svdvals(rows.sqrt()[:, None] * weight @ torch.linalg.cholesky(seen[0])).square()
    torch.testing.assert_close(powers[:10].float(), values, rtol=1e-3, atol=1e-4 * float(values[0]))
    tiling = Tiling((14, 10), depth=10 if along_inputs else 0)
    for rank in (1, 4, 8):
        product = with_basis(found, tiling, basis[:, :rank].float(), 1e-6).solve("svd", 1e-5)
        assert product.codes.shape[0] == rank
        lost = distortion(weight, torch.from_numpy(product.tensor()), Metric(seen, rows))
        torch.testing.assert_close(lost, values[rank:].sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize("depth", [0, 10])
def test_a_full_basis_at_fine_steps_is_the_weight(depth: int) -> None:
    weight = rand(14, 10) if depth else rand(10, 14)
    found = problem(weight, correlated(1, weight.shape[1]))
    basis, _ = principal_basis(found, depth > 0)
    product = with_basis(found, Tiling(tuple(weight.shape), depth=depth), basis.float(), 0.01)
    np.testing.assert_allclose(product.solve("sparse_pca", 1e-5).tensor(), weight.numpy(), atol=1e-4)
    coarse = product.solve("sparse_pca", 0.5).tensor()
    assert 0.05 < np.abs(coarse - weight.numpy()).max() < 3


def test_a_basis_is_never_finer_than_its_bits() -> None:
    found = problem(rand(14, 10), correlated(1, 10))
    basis, _ = principal_basis(found, True)
    product = with_basis(found, Tiling((14, 10), depth=10), basis.float(), 1e-9)
    assert product.basis.grid.high < 1 << sequential.BASIS_BITS
    assert np.abs(product.basis.integers).max() >= 1 << sequential.BASIS_BITS - 2


def test_a_price_of_basis_codes_lowers_their_entropy() -> None:
    for depth, shape in ((0, (10, 40)), (10, (40, 10))):
        found = problem(rand(*shape), correlated(1, shape[1]))
        basis, _ = principal_basis(found, depth > 0)
        solver = with_basis(found, Tiling(shape, depth=depth), basis.float(), 0.02)
        paid = Price(laplacian(), torch.zeros(10).long(), torch.zeros(40).long(), torch.full((shape[0],), 2.0))
        plain, priced = (solver.solve("sparse_pca", 0.5, cost).codes for cost in (None, paid))
        assert priced.shape == (10, 40)
        assert entropy(torch.from_numpy(priced.integers)) < 0.9 * entropy(torch.from_numpy(plain.integers))


def test_codebooks_hold_tiles_in_turn() -> None:
    weight, moments = rand(40, 12), correlated(1, 12)
    tiling = Tiling((40, 12), depth=3)
    found = vector_quantised(problem(weight, moments), tiling, 16, torch.Generator().manual_seed(0))
    assert isinstance(found.codes, OneHotCodes)
    assert found.codes.shape == (16, 160)
    again = vector_quantised(problem(weight, moments), tiling, 16, torch.Generator().manual_seed(0))
    assert np.array_equal(found.tensor(), again.tensor())
    assert np.square(found.tensor() - weight.numpy()).mean() < 0.6 * float(weight.square().mean())


def forms(found: Problem) -> list[FactoredWeight]:
    outputs, inputs = found.weight.shape
    groups = found.moments.shape[0]
    weights = [direct(found, Tiling((outputs, inputs), groups), 0.1)]
    for depth in (0, inputs) if groups == 1 else (inputs,):
        basis, _ = principal_basis(found, depth > 0)
        tiling = Tiling((outputs, inputs), groups, depth=depth)
        weights.append(with_basis(found, tiling, basis.float(), 0.01).solve("sparse_pca", 0.1))
        weights.append(with_basis(found, tiling, basis[:, :1].float(), 0.01).solve("svd", 0.1))
    tiling = Tiling((outputs, inputs), groups, depth=1)
    weights.append(vector_quantised(found, tiling, 2, torch.Generator().manual_seed(0)))
    return weights


@pytest.mark.parametrize("shape", [(12, 8), (12, 1), (2, 6), (1, 6)])
@pytest.mark.parametrize("scale", [1.0, 0.0, 1e-8, 1e8])
def test_every_form_has_grids_of_whole_bits(shape: tuple[int, int], scale: float) -> None:
    weight, moments = scale * rand(*shape), correlated(1, shape[1])
    for found in forms(problem(weight, moments)):
        assert_whole_signed_bits(found)
        assert found.tensor().shape == shape
        assert np.isfinite(found.tensor()).all()
        if not scale:
            assert not found.tensor().any(), found.form


def test_every_form_survives_moments_that_say_little() -> None:
    thin = rand(3, 8)
    cases = {
        "dead layer": torch.zeros(1, 8, 8),
        "dead inputs": torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0]))[None],
        "few samples": (thin.T @ thin)[None],
        "one dead group": torch.cat([torch.zeros(1, 8, 8), correlated(1, 8)]),
    }
    weight = rand(12, 8)
    for name, moments in cases.items():
        for found in forms(problem(weight, moments)):
            assert np.isfinite(found.tensor()).all(), name
            if found.form in ("direct", "sparse_pca") and "dead" in name:
                # Nothing pulls at a weight whose input was never seen.
                assert np.abs(found.tensor() - weight.numpy()).max() < 1, (name, found.form)


def test_steps_are_those_of_a_file() -> None:
    step, exponents = sequential.snapped(0.3)
    assert math.isclose(step, 0.3, rel_tol=0.006)
    assert sequential.snapped(step)[1] == exponents
