"""Classes partition the integers, and the histograms of a split are those of its contexts."""

import numpy as np
import pytest

from factorpack.coding.grouping import Grouping, Runs, levels_of


def matrix_of(rows, columns, seed):
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.normal(0, 1, (rows, 1))) * np.exp2(rng.normal(0, 1, (1, columns)))
    return np.rint(rng.laplace(0, 1, (rows, columns)) * scale).astype(np.int32)


def assert_histograms_are_those_of_the_contexts(runs):
    levels = levels_of(runs)
    seen = set()
    for split in levels.splits():
        grouping = levels.grouping(split)
        contexts = grouping.of_symbols(runs.lengths)
        seen.add(grouping.contexts)
        for context, histogram in enumerate(levels.histograms(split)):
            inside = runs.values if contexts is None else runs.values[contexts == context]
            values, counts = np.unique(inside, return_counts=True)
            assert np.array_equal(histogram.values, values)
            assert np.array_equal(histogram.counts, counts)
    return seen


def test_histograms_of_a_matrix():
    matrix = matrix_of(90, 120, 0)
    assert max(assert_histograms_are_those_of_the_contexts(Runs(matrix.reshape(-1), np.full(90, 120), 120))) >= 15


def test_histograms_of_a_matrix_with_far_integers():
    matrix = matrix_of(90, 120, 1)
    matrix[::7, ::11] = 2**24 - np.arange(matrix[::7, ::11].size).reshape(matrix[::7, ::11].shape)
    matrix[3, 5] = -(2**24)
    assert_histograms_are_those_of_the_contexts(Runs(matrix.reshape(-1), np.full(90, 120), 120))


def test_histograms_of_rows_of_different_lengths():
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, 300, 80)
    lengths[[0, 7, 79]] = 0
    scale = np.repeat(np.exp2(rng.normal(0, 1.5, 80)), lengths)
    values = np.rint(rng.laplace(0, 1, scale.size) * scale).astype(np.int32)
    assert len(assert_histograms_are_those_of_the_contexts(Runs(values, lengths, 0))) > 1


def test_large_matrices_are_counted_in_pieces():
    matrix = matrix_of(2300, 1000, 3)
    levels = levels_of(Runs(matrix.reshape(-1), np.full(2300, 1000), 1000))
    clip = int(np.abs(matrix).max())
    assert clip <= 512
    expected = np.bincount(matrix.reshape(-1) + clip, minlength=2 * clip + 1)
    assert np.array_equal(levels.counts.sum((0, 1))[1:-1], expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (20, 20)])
def test_small_matrices_have_no_classes(shape):
    levels = levels_of(Runs(np.zeros(shape[0] * shape[1], np.int32), np.full(*shape), shape[1]))
    assert [split.contexts for split in levels.splits()] == [1]


def test_louder_rows_have_higher_classes():
    matrix = np.repeat([[1], [64]], 32, axis=0).astype(np.int32) * matrix_of(64, 64, 4)
    levels = levels_of(Runs(matrix.reshape(-1), np.full(64, 64), 64))
    rows_alone = [split for split in levels.splits() if split.rows.any() and not split.columns.any()]
    for split in rows_alone:
        rows = levels.grouping(split).rows
        assert rows[:32].mean() < rows[32:].mean()


def test_contexts_add_up_to_the_last_one_at_most():
    grouping = Grouping(np.array([0, 2], np.uint8), np.array([0, 1, 3], np.uint8), 4)
    assert grouping.of_symbols(np.array([3, 3])).tolist() == [0, 1, 3, 2, 3, 3]
