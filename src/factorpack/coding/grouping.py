"""Which rows and columns share a symbol model: the writer's search, by magnitude on a logarithmic scale.

Letters: R rows, C columns, L levels of rows, M levels of columns.

Scales of a row and of a column multiply, so their logarithms add: an integer's context is the sum of its
row's class and its column's, MAX_CONTEXTS - 1 at most. All choices are made from one histogram over levels
finer than the classes. Nothing here is needed to decode but `Grouping`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from factorpack._shapes import Int32, Integer
from factorpack.coding.models import Histogram

MAX_CONTEXTS = 16
# Levels span eight octaves at most; a mean counts magnitudes up to CLIP, and histograms list those beyond apart.
OCTAVES = 8.0
CLIP = 512
SYMBOLS_PER_CONTEXT = 256
SYMBOLS_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class Runs:
    """Rows of integers, one after another; `columns` is their common length C, or 0 where they may differ."""

    values: Int32[np.ndarray, " count"]
    lengths: Integer[np.ndarray, " R"]
    columns: int


@dataclass(frozen=True, eq=False)
class Grouping:
    """The class of each row and of each column (uint8); None for the columns where all have class 0."""

    rows: Integer[np.ndarray, " R"]
    columns: Integer[np.ndarray, " C"] | None
    contexts: int

    def of_symbols(self, lengths: Integer[np.ndarray, " R"]) -> Integer[np.ndarray, " count"] | None:
        """The context of each integer, row after row; None where there is but one."""
        if self.contexts == 1:
            return None
        if self.columns is None:
            return np.repeat(self.rows, lengths)
        sums = self.rows[:, None] + self.columns
        return np.asarray(np.minimum(sums, np.uint8(self.contexts - 1))).reshape(-1)


@dataclass(frozen=True, eq=False)
class Split:
    """The class of each level: of rows (L,), of columns (M,); the least of each is 0."""

    rows: Integer[np.ndarray, " L"]
    columns: Integer[np.ndarray, " M"]

    @property
    def contexts(self) -> int:
        return min(int(self.rows.max()) + int(self.columns.max()) + 1, MAX_CONTEXTS)


@dataclass(frozen=True, eq=False)
class Levels:
    """The levels of rows and columns, how many octaves a level spans, and the integers in each pair of levels.

    `counts` counts them by row level, column level and value; its outermost bins count those that `far` lists
    with their levels.
    """

    rows: Integer[np.ndarray, " R"]
    columns: Integer[np.ndarray, " C"]
    octaves: tuple[float, float]
    counts: Integer[np.ndarray, "L M bins"]
    far: tuple[np.ndarray, np.ndarray, np.ndarray]

    def grouping(self, split: Split) -> Grouping:
        """The classes that a split gives to rows and columns."""
        columns = split.columns[self.columns].astype(np.uint8) if split.columns.any() else None
        return Grouping(split.rows[self.rows].astype(np.uint8), columns, split.contexts)

    def merged(self, split: Split) -> Integer[np.ndarray, "contexts bins"]:
        """`counts` summed over the levels of each context."""
        bins = self.counts.shape[2]
        contexts = np.minimum(split.rows[:, None] + split.columns, split.contexts - 1).reshape(-1)
        order = np.argsort(contexts, kind="stable")
        present, starts = np.unique(contexts[order], return_index=True)
        merged = np.zeros((split.contexts, bins), np.int64)
        merged[present] = np.add.reduceat(self.counts.reshape(-1, bins)[order], starts, axis=0)
        return merged

    def histograms(self, split: Split) -> list[Histogram]:
        """What is in each context, exactly."""
        values, rows, columns = self.far
        far_contexts = np.minimum(split.rows[rows] + split.columns[columns], split.contexts - 1)
        histograms = []
        for context, dense in enumerate(self.merged(split)[:, 1:-1]):
            bins = np.flatnonzero(dense)
            far = Histogram.of(values[far_contexts == context])
            numbers = np.append(bins - dense.size // 2, far.values)
            order = np.argsort(numbers)
            histograms.append(Histogram(numbers[order], np.append(dense[bins], far.counts)[order]))
        return histograms

    def splits(self) -> Iterator[Split]:
        """Splits worth trying: none, then 2, 4, 8 and 16 classes of rows, of columns and of both."""
        row_levels, column_levels = np.arange(self.counts.shape[0]), np.arange(self.counts.shape[1])
        yield Split(row_levels * 0, column_levels * 0)
        present_rows, present_columns = np.unique(self.rows), np.unique(self.columns)
        spans = row_levels.size * self.octaves[0], column_levels.size * self.octaves[1]
        contexts = 2
        while contexts <= min(MAX_CONTEXTS, int(self.counts.sum()) // SYMBOLS_PER_CONTEXT):
            for with_rows, with_columns in ((1, 0), (0, 1), (1, 1)):
                span = with_rows * spans[0] + with_columns * spans[1]
                if (with_rows and not spans[0]) or (with_columns and not spans[1]):
                    continue
                classes = [
                    ((levels + 0.5) * (octaves * used * contexts / span)).astype(np.int64)
                    for levels, octaves, used in (
                        (row_levels, self.octaves[0], with_rows),
                        (column_levels, self.octaves[1], with_columns),
                    )
                ]
                yield Split(
                    np.maximum(classes[0] - classes[0][present_rows].min(), 0),
                    np.maximum(classes[1] - classes[1][present_columns].min(), 0),
                )
            contexts *= 2

    def estimate(self, split: Split) -> float:
        """Bits, roughly and quickly: entropy, tables and classes."""
        merged = self.merged(split).astype(np.float64)
        distinct = np.count_nonzero(merged, axis=1)
        # A table is told symbol by symbol or as a curve that misses what the entropy learns from each symbol.
        tables = np.minimum(8.0 * distinct + 16, 28 + 0.72 * distinct)
        bits = float(np.sum(_entropy(merged) + tables))
        for classes, levels in ((split.rows, self.rows), (split.columns, self.columns)):
            if classes.any():
                counts = np.bincount(classes[levels]).astype(np.float64)
                bits += min(
                    80 + float(_entropy(counts)),
                    8 + levels.size * int(classes.max()).bit_length(),
                )
        return bits


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Bits, ideally, of all that each line of counts counts."""
    totals = counts.sum(-1)
    told = np.sum(counts * np.log2(np.maximum(counts, 1)), axis=-1)
    return np.asarray(totals * np.log2(np.maximum(totals, 1)) - told)


def levels_of(runs: Runs) -> Levels:
    """The levels of rows and, where they are equally long, of columns."""
    count = runs.values.size
    clip = min(CLIP, max(int(runs.values.max()), -int(runs.values.min()))) if count else 0
    fine = 32 if count >= 1 << 18 else 16 if count >= 1 << 13 else 8
    if count < 2 * SYMBOLS_PER_CONTEXT:
        fine = 1
    rows, columns, octaves = np.zeros(runs.lengths.size, np.int64), np.zeros(max(runs.columns, 1), np.int64), (0.0, 0.0)
    if fine > 1:
        row_sums, column_sums = _sums(runs, clip)
        rows, row_octaves = _levels(row_sums, runs.lengths, fine)
        if runs.columns:
            columns, column_octaves = _levels(column_sums, np.full(runs.columns, runs.lengths.size), fine)
            octaves = row_octaves, column_octaves
        else:
            octaves = row_octaves, 0.0
    return _counted(runs, clip, (rows, columns, octaves))


def _chunks(runs: Runs) -> Iterator[tuple[slice, slice]]:
    """Whole rows, and their integers, some million of them at a time."""
    ends = np.cumsum(runs.lengths)
    row = 0
    while row < ends.size:
        start = int(ends[row - 1]) if row else 0
        stop = max(row + 1, int(np.searchsorted(ends, start + SYMBOLS_AT_ONCE, side="right")))
        yield slice(row, stop), slice(start, int(ends[stop - 1]))
        row = stop


def _sums(runs: Runs, clip: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the magnitudes, clipped, of each row and, where they are equally long, of each column."""
    rows, columns = np.zeros(runs.lengths.size), np.zeros(runs.columns)
    for lines, span in _chunks(runs):
        magnitudes = np.minimum(np.abs(runs.values[span]), clip).astype(np.float32)
        if runs.columns:
            block = magnitudes.reshape(-1, runs.columns)
            rows[lines] = block.sum(axis=1)
            columns += block.sum(axis=0)
        else:
            sums = np.append(0, np.cumsum(magnitudes, dtype=np.float64))
            ends = np.cumsum(runs.lengths[lines])
            rows[lines] = sums[ends] - sums[ends - runs.lengths[lines]]
    return rows, columns


def _levels(sums: np.ndarray, lengths: np.ndarray, fine: int) -> tuple[np.ndarray, float]:
    """Levels 0..fine - 1 of the mean magnitude, outliers at the outermost, and how many octaves one spans."""
    octaves = np.log2((sums + 0.25) / np.maximum(lengths, 1))
    low, high = np.quantile(octaves[lengths > 0], (0.01, 0.99))
    span = min(float(high - low), OCTAVES)
    if span < 1 / 16:
        return np.zeros(sums.size, np.int64), 0.0
    return np.clip((octaves - (high - span)) * (fine / span), 0, fine - 1).astype(np.int64), span / fine


def _counted(runs: Runs, clip: int, levels: tuple[np.ndarray, np.ndarray, tuple[float, float]]) -> Levels:
    rows, columns, octaves = levels
    shape = int(rows.max(initial=0)) + 1, int(columns.max(initial=0)) + 1, 2 * clip + 3
    counts, far = np.zeros(shape, np.int64), []
    row_base = rows * (shape[1] * shape[2]) + clip + 1
    for lines, span in _chunks(runs):
        near = runs.values[span]
        beyond = np.flatnonzero(np.abs(near) > clip)
        if beyond.size:
            near = np.clip(near, -clip - 1, clip + 1)
        base = np.repeat(row_base[lines], runs.lengths[lines])
        if runs.columns:
            base.reshape(-1, runs.columns)[:] += columns * shape[2]
        base += near
        if beyond.size:
            far.append(np.stack([runs.values[span][beyond], *np.divmod(base[beyond] // shape[2], shape[1])]))
        counts += np.bincount(base, minlength=counts.size).reshape(shape)
    values, far_rows, far_columns = np.concatenate([*far, np.empty((3, 0), np.int64)], axis=1)
    return Levels(rows, columns, octaves, counts, (values, far_rows, far_columns))
