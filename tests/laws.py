"""Laws that every form keeps: small random weights of each, and the ways that they must come back.

`weights(seed)` yields weights of every form over every tiling and layout of steps; `assert_same_weight` and
`assert_same_contents` say what coming back bit for bit means.
"""

from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np

from factorpack.coding import Reader
from factorpack.coding.records import FORMS, decode_weight, encode_weight, predicted_bits
from factorpack.container import Bill, Contents, read, to_bytes, write
from factorpack.factors import Basis, Codes, FactoredVector, FactoredWeight, Grid, OneHotCodes, kernel_of
from factorpack.tiling import Tiling

TILINGS = {
    "linear": Tiling((12, 20)),
    "linear along inputs": Tiling((12, 20), depth=8),
    "linear, last tile not full": Tiling((7, 11), depth=6),
    "conv1d": Tiling((8, 5, 3)),
    "conv2d": Tiling((10, 4, 3, 3)),
    "conv3d": Tiling((6, 2, 2, 3, 3), depth=9),
    "grouped": Tiling((12, 3, 3, 3), groups=4),
    "grouped along inputs": Tiling((12, 3, 3, 3), groups=4, depth=27),
    "depthwise": Tiling((16, 1, 3, 3), groups=16, depth=9),
    "transposed": Tiling((6, 5, 2, 2), transposed=True),
    "transposed, grouped": Tiling((8, 3, 3, 3), groups=2, transposed=True),
    "transposed, grouped, along inputs": Tiling((8, 3, 3, 3), groups=4, transposed=True, depth=10),
    "conv1d, taps": Tiling((6, 5, 4), depth=4),
    "conv2d, taps": Tiling((10, 4, 3, 3), depth=9),
    "conv2d, taps on one axis": Tiling((7, 3, 1, 5), depth=5),
    "conv3d, taps": Tiling((5, 2, 2, 3, 4), depth=24),
    "grouped, taps": Tiling((12, 2, 3, 2), groups=4, depth=6),
    "embedding": Tiling((50, 6)),
    "a single entry": Tiling((1, 1)),
}
ROW_STEPS = ("one", "rows")
COLUMN_STEPS = ("one", "columns")


def tilings_of(form: str) -> dict[str, Tiling]:
    """Those that a form can have: `separable` is one of tiles that are the taps of a kernel."""
    if form != "separable":
        return TILINGS
    kernels = {name: kernel_of(tiling.shape) for name, tiling in TILINGS.items()}
    return {
        name: tiling
        for name, tiling in TILINGS.items()
        if kernels[name] and tiling.depth == prod(kernels[name]) and not tiling.transposed
    }


def grid(rng: np.random.Generator, bits: int, lines: int) -> Grid:
    """Steps around 2^-6, on whole signed bits."""
    return Grid(-(1 << bits - 1), (1 << bits - 1) - 1, rng.integers(-420, -340, lines).astype(np.int32))


def integers(rng: np.random.Generator, bits: int, shape: tuple[int, int], density: float) -> np.ndarray:
    drawn = rng.integers(-(1 << bits - 1), 1 << bits - 1, shape)
    return (drawn * (rng.random(shape) < density)).astype(np.int32)


def weight(
    rng: np.random.Generator, form: str, tiling: Tiling, rows: str = "one", columns: str = "one"
) -> FactoredWeight:
    """A random weight of a form; `rows` and `columns` lay out the steps of basis and codes.

    A separable basis has one step, whatever `rows` says.
    """
    depth, count = tiling.tiled_shape
    basis_grid = grid(rng, 6, depth if rows == "rows" else 1)
    if form == "direct":
        basis, rank = Basis(None, basis_grid), depth
    elif form == "separable":
        factors = tuple(integers(rng, 4, (taps, taps), 1.0) for taps in kernel_of(tiling.shape))
        basis, rank = Basis.separable(factors, int(rng.integers(-420, -340))), depth
    else:
        rank = {"sparse_pca": depth, "svd": max(1, depth // 2), "vq": max(1, min(4, count))}[form]
        basis = Basis(integers(rng, 6, (depth, rank), 1.0), basis_grid)
    if form == "vq":
        return FactoredWeight(form, tiling, basis, OneHotCodes(rng.integers(0, rank, count).astype(np.int32), rank))
    codes_grid = grid(rng, 4, count if columns == "columns" else 1)
    density = 1.0 if form == "svd" else 0.3
    return FactoredWeight(form, tiling, basis, Codes(integers(rng, 4, (rank, count), density), codes_grid))


def weights(seed: int = 0) -> Iterator[tuple[str, FactoredWeight]]:
    """Every form x tiling x layout of steps, with a name of its own."""
    rng = np.random.default_rng(seed)
    for form in FORMS:
        for (name, tiling), rows in product(tilings_of(form).items(), ROW_STEPS):
            for columns in ("one",) if form == "vq" else COLUMN_STEPS:
                yield f"{form}; {name}; {rows}, {columns}", weight(rng, form, tiling, rows, columns)


def vector(rng: np.random.Generator, shape: tuple[int, ...], logarithmic: bool) -> FactoredVector:
    size = int(np.prod(shape))
    ratio = int(rng.integers(1, 9)) if logarithmic else int(rng.integers(-900, 0))
    return FactoredVector(
        shape, rng.integers(-99, 100, size).astype(np.int32), ratio, int(rng.integers(-50, 50)), logarithmic
    )


def assert_same_array(found: np.ndarray | None, expected: np.ndarray | None) -> None:
    if expected is None or found is None:
        assert found is expected
        return
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def assert_same_grid(found: Grid, expected: Grid) -> None:
    assert (found.low, found.high) == (expected.low, expected.high)
    assert_same_array(found.exponents, expected.exponents)


def assert_same_weight(found: FactoredWeight, expected: FactoredWeight) -> None:
    assert (found.form, found.tiling) == (expected.form, expected.tiling)
    assert_same_grid(found.basis.grid, expected.basis.grid)
    assert_same_array(found.basis.integers, expected.basis.integers)
    assert len(found.basis.factors) == len(expected.basis.factors)
    for a, b in zip(found.basis.factors, expected.basis.factors, strict=True):
        assert_same_array(a, b)
    assert type(found.codes) is type(expected.codes)
    if isinstance(expected.codes, OneHotCodes):
        assert found.codes.rank == expected.codes.rank
        assert_same_array(found.codes.indices, expected.codes.indices)
    else:
        assert_same_grid(found.codes.grid, expected.codes.grid)
        assert_same_array(found.codes.integers, expected.codes.integers)
    assert_same_array(found.tensor(), expected.tensor())


def assert_same_vector(found: FactoredVector, expected: FactoredVector) -> None:
    for field in ("shape", "exponent", "offset", "logarithmic"):
        assert getattr(found, field) == getattr(expected, field)
    assert_same_array(found.integers, expected.integers)
    assert_same_array(found.tensor(), expected.tensor())


def assert_same_contents(found: Contents, expected: Contents) -> None:
    assert list(found.tensors) == list(expected.tensors)
    assert dict(found.dtypes) == dict(expected.dtypes)
    assert dict(found.aliases) == dict(expected.aliases)
    for name, value in expected.tensors.items():
        if isinstance(value, FactoredWeight):
            assert_same_weight(found.tensors[name], value)
        elif isinstance(value, FactoredVector):
            assert_same_vector(found.tensors[name], value)
        else:
            assert_same_array(found.tensors[name], value)


def assert_record_law(expected: FactoredWeight) -> None:
    """A weight comes back from its record, which is as long as was foretold and stops where it should."""
    data = encode_weight(expected)
    reader = Reader(data + b"next")
    assert_same_weight(decode_weight(reader, expected.tiling.shape), expected)
    assert reader.remaining == len(b"next")
    assert sum(reader.books.values()) == len(data)
    assert encode_weight(expected) == data
    assert abs(predicted_bits(expected) - 8 * len(data)) <= 0.003 * 8 * len(data) + 64


def assert_file_law(expected: Contents, folder) -> Bill:
    """Contents come back from their file, all of whose bytes the bill accounts for."""
    path = folder / "law.fpk"
    data = to_bytes(expected)
    assert to_bytes(expected) == data
    write(path, data)
    assert path.read_bytes() == data
    found, bill = read(path)
    assert_same_contents(found, expected)
    assert sum(bill.parts.values()) == bill.size_bytes == path.stat().st_size
    return bill
