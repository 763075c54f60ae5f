"""Records: a factored weight, or all small tensors together, as bytes.

A weight's record is

    byte    form: its place in FORMS
    byte    flags: 1 transposed, 2 grouped, 4 tiles along the inputs
    varint  groups, where grouped; varint depth, where tiles run along the inputs
    grid    of the basis, then, where there is a basis: varint k and the stream of its integers (d, k)
    grid    of the codes and the stream of their integers (k, N); for `vq` the stream of indices (1, N) alone

For `separable`, whose tiles are the taps of a kernel, in place of the basis and its grid

    zigzag  the exponent of the basis
    zigzags the integers of its factors (k_a, k_a), of each kernel axis of more than one tap, row by row

and the stream of the codes is that of Zᵀ as (m, N·k / m): a row for each output, where outputs and taps have their
classes.

where a grid is

    byte    bits b of the signed range −2^(b−1)..2^(b−1)−1; 64 is added where each line has its own exponent
    zigzag  the exponent, or the stream of the exponents (1, lines)

The record of small tensors holds three streams, (1, V) each: logarithmic or not, exponents, offsets of its V
vectors; then the stream of all their integers as runs of their sizes.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from factorpack._shapes import Float32
from factorpack.coding.reader import Reader, append_varint, append_zigzag
from factorpack.coding.streams import (
    IntegerPlan,
    decode_integers,
    decode_runs,
    encode_integers,
    encode_runs,
    plan_integers,
    plan_runs,
)
from factorpack.errors import FormatError, MismatchError
from factorpack.factors import Basis, Codes, FactoredVector, FactoredWeight, Grid, OneHotCodes, kernel_of
from factorpack.tiling import Tiling

FORMS = ("direct", "sparse_pca", "svd", "vq", "separable")
"""A form's place is its id in the file; places are never used again for another."""
BASIS_FORMS = ("sparse_pca", "svd", "vq")
TRANSPOSED, GROUPED, ALONG_INPUTS = 1, 2, 4
LINES = 64
MAX_BITS = 25
MAX_ENTRIES = 1 << 32
"""No tensor or factor has more entries: a stream of one symbol is as short for any number of them."""


def _grid_parts(grid: Grid) -> list[bytes | IntegerPlan]:
    bits = grid.high.bit_length() + 1
    assert (grid.low, grid.high) == (-(1 << bits - 1), (1 << bits - 1) - 1), "grids at rest are whole signed bits"
    if grid.exponents.size > 1:
        return [bytes([bits | LINES]), plan_integers(grid.exponents[None])]
    out = bytearray([bits])
    append_zigzag(out, int(grid.exponents[0]))
    return [bytes(out)]


def _read_grid(reader: Reader, lines: int, what: str) -> Grid:
    head = reader.take(1, what)[0]
    bits = head & ~LINES
    if not 1 <= bits <= MAX_BITS:
        raise FormatError(f"{what}: {bits} bits are not 1 to {MAX_BITS}")
    lined = head & LINES
    exponents = decode_integers(reader, (1, lines))[0] if lined else np.array([reader.zigzag(what)], np.int32)
    reader.book("steps")
    return Grid(-(1 << bits - 1), (1 << bits - 1) - 1, exponents)


def _parts(weight: FactoredWeight) -> list[bytes | IntegerPlan]:
    """The record of a weight: bytes that are known, and streams that can be priced or written."""
    tiling = weight.tiling
    out = bytearray([FORMS.index(weight.form)])
    grouped, along = tiling.groups > 1, tiling.depth > 0
    out.append(TRANSPOSED * tiling.transposed | GROUPED * grouped | ALONG_INPUTS * along)
    if grouped:
        append_varint(out, tiling.groups)
    if along:
        append_varint(out, tiling.depth)
    if weight.basis.factors:
        assert isinstance(weight.codes, Codes)
        append_zigzag(out, int(weight.basis.grid.exponents[0]))
        for integer in np.concatenate([factor.ravel() for factor in weight.basis.factors]).tolist():
            append_zigzag(out, integer)
        codes = weight.codes.integers.T.reshape(tiling.shape[0], -1)
        return [bytes(out), *_grid_parts(weight.codes.grid), plan_integers(codes)]
    parts: list[bytes | IntegerPlan] = [bytes(out), *_grid_parts(weight.basis.grid)]
    if weight.basis.integers is not None:
        append_varint(rank := bytearray(), weight.basis.integers.shape[1])
        parts += [bytes(rank), plan_integers(weight.basis.integers)]
    if isinstance(weight.codes, OneHotCodes):
        return [*parts, plan_integers(weight.codes.indices[None])]
    return [*parts, *_grid_parts(weight.codes.grid), plan_integers(weight.codes.integers)]


def price_codes(weight: FactoredWeight, radius: int) -> tuple[Float32[np.ndarray, "K prices"], np.ndarray, float]:
    """Bits of −radius..radius in each of K contexts, the context (k, N) of each of the codes, and the stream's bits.

    For codes of integers, not for one-hot ones.
    """
    codes = weight.codes
    assert isinstance(codes, Codes)
    integers = codes.integers
    streamed = integers.T.reshape(weight.shape[0], -1) if weight.basis.factors else integers
    plan = plan_integers(streamed)
    prices = plan.price(radius)
    contexts = np.minimum(prices.rows[:, None] + prices.columns, len(prices.bits) - 1).astype(np.uint8)
    contexts = np.broadcast_to(contexts, streamed.shape)
    if weight.basis.factors:
        contexts = contexts.reshape(integers.T.shape).T
    return prices.bits, contexts, plan.bits.total


def encode_weight(weight: FactoredWeight) -> bytes:
    """The record of a weight."""
    return b"".join(part if isinstance(part, bytes) else part.to_bytes() for part in _parts(weight))


def predicted_bits(weight: FactoredWeight) -> float:
    """What `encode_weight` will take, from the same tables, without the bytes being made."""
    return sum(8.0 * len(part) if isinstance(part, bytes) else part.bits.total for part in _parts(weight))


def decode_weight(reader: Reader, shape: tuple[int, ...]) -> FactoredWeight:
    """The weight of a record, for a tensor of `shape`; FormatError where the record is malformed.

    The reader's books get the bytes of "codes", "basis", "tables" and "steps".
    """
    form_id, flags = reader.take(2, "the form and flags")
    if form_id >= len(FORMS) or flags > TRANSPOSED | GROUPED | ALONG_INPUTS:
        raise FormatError(f"form {form_id} with flags {flags} is unknown: the file may come from a newer version")
    form = FORMS[form_id]
    groups = reader.varint("the groups") if flags & GROUPED else 1
    depth = reader.varint("the depth") if flags & ALONG_INPUTS else 0
    if (flags & GROUPED and groups < 2) or (flags & ALONG_INPUTS and not depth):
        raise FormatError(f"flags {flags} do not fit {groups} groups and a depth of {depth}")
    try:
        tiling = Tiling(shape, groups, bool(flags & TRANSPOSED), depth)
        rows, count = tiling.tiled_shape
        if rows * count > MAX_ENTRIES:
            raise FormatError(f"tiles {(rows, count)} have more than {MAX_ENTRIES} entries")
        if form == "separable":
            return _read_separable(reader, tiling)
        grid = _read_grid(reader, rows, "the basis' grid")
        basis, rank = None, rows
        if form in BASIS_FORMS:
            rank = reader.varint("the rank")
            entries = rank * (rows if form == "vq" else max(rows, count))
            if not 1 <= rank <= max(rows, count) or entries > MAX_ENTRIES:
                raise FormatError(f"a rank of {rank} does not fit tiles {(rows, count)}")
            reader.book("steps")
            basis = decode_integers(reader, (rows, rank))
            reader.book("basis")
        if form == "vq":
            codes: Codes | OneHotCodes = OneHotCodes(decode_integers(reader, (1, count))[0], rank)
        else:
            codes_grid = _read_grid(reader, count, "the codes' grid")
            codes = Codes(decode_integers(reader, (rank, count)), codes_grid)
        reader.book("codes")
        return FactoredWeight(form, tiling, Basis(basis, grid), codes)
    except MismatchError as error:
        raise FormatError(str(error)) from error


def _read_separable(reader: Reader, tiling: Tiling) -> FactoredWeight:
    kernel = kernel_of(tiling.shape)
    taps, count = prod(kernel), prod(tiling.shape[:2])
    if tiling.transposed or not kernel or tiling.depth != taps:
        raise FormatError(f"tiles of {tiling.depth} are not the taps of the kernels of {tiling.shape}, inputs second")
    if taps * taps > MAX_ENTRIES:
        raise FormatError(f"a basis over {taps} taps has more than {MAX_ENTRIES} entries")
    reader.spend(8 * taps * taps, "the basis")
    exponent = reader.zigzag("the basis' exponent")
    reader.book("steps")
    factors = tuple(
        np.array([reader.zigzag("the basis' factors") for _ in range(k * k)], np.int32).reshape(k, k) for k in kernel
    )
    reader.book("basis")
    basis = Basis.separable(factors, exponent)
    grid = _read_grid(reader, count, "the codes' grid")
    integers = decode_integers(reader, (tiling.shape[0], tiling.shape[1] * taps))
    reader.book("codes")
    return FactoredWeight("separable", tiling, basis, Codes(integers.reshape(count, taps).T, grid))


def encode_vectors(vectors: Sequence[FactoredVector]) -> bytes:
    """The record of small tensors."""
    heads = np.array([[v.logarithmic, v.exponent, v.offset] for v in vectors], np.int32).reshape(-1, 3)
    out = b"".join(encode_integers(np.ascontiguousarray(heads[None, :, part])) for part in range(3))
    values = np.concatenate([np.zeros(0, np.int32), *(v.integers for v in vectors)])
    return out + encode_runs(values, np.array([v.integers.size for v in vectors], np.int64))


def predicted_vector_bits(vectors: Sequence[FactoredVector]) -> float:
    """What the integers of small tensors will take together."""
    values = np.concatenate([np.zeros(0, np.int32), *(v.integers for v in vectors)])
    return plan_runs(values, np.array([v.integers.size for v in vectors], np.int64)).bits.total


def decode_vectors(reader: Reader, shapes: Sequence[tuple[int, ...]]) -> list[FactoredVector]:
    """The small tensors of a record, for tensors of `shapes`; FormatError where the record is malformed."""
    count = len(shapes)
    logarithmic, exponents, offsets = (decode_integers(reader, (1, count))[0] for _ in range(3))
    if count and (logarithmic.min() < 0 or logarithmic.max() > 1):
        raise FormatError("a small tensor is neither logarithmic nor not")
    entries = [prod(shape) for shape in shapes]
    if sum(entries) > MAX_ENTRIES:
        raise FormatError(f"the small tensors have more than {MAX_ENTRIES} entries")
    sizes = np.array(entries, np.int64)
    values = decode_runs(reader, sizes)
    parts = np.split(values, np.cumsum(sizes)[:-1]) if count else []
    try:
        return [
            FactoredVector(shape, part, int(exponent), int(offset), bool(log))
            for shape, part, exponent, offset, log in zip(shapes, parts, exponents, offsets, logarithmic, strict=True)
        ]
    except MismatchError as error:
        raise FormatError(str(error)) from error
