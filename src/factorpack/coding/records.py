"""Records: a factored weight, or all small tensors together, as bytes.

A weight's record is

    byte    form: its place in FORMS
    byte    flags: 1 transposed, 2 grouped, 4 tiles along the inputs
    varint  groups, where grouped; varint depth, where tiles run along the inputs
    grid    of the basis, then, where there is a basis: varint k and the stream of its integers (d, k)
    grid    of the codes and the stream of their integers (k, N); for `vq` varint k and the stream of indices (1, N)

where a grid is

    byte    bits b of the signed range −2^(b−1)..2^(b−1)−1; 64 is added where each line has its own exponent
    zigzag  the exponent, or the stream of the exponents (1, lines)

The record of small tensors holds three streams, (1, V) each: logarithmic or not, exponents, offsets of its V
vectors; then the stream of all their integers as runs of their sizes.
"""

from collections.abc import Sequence
from math import prod

import numpy as np

from factorpack.coding.reader import Reader, append_varint, append_zigzag
from factorpack.coding.streams import (
    decode_integers,
    decode_runs,
    encode_integers,
    encode_runs,
    plan_integers,
    plan_runs,
)
from factorpack.errors import FormatError, MismatchError
from factorpack.factors import Basis, Codes, FactoredVector, FactoredWeight, Grid, OneHotCodes
from factorpack.tiling import Tiling

FORMS = ("direct", "sparse_pca", "svd", "vq")
"""A form's place is its id in the file; places are never used again for another."""
BASIS_FORMS = ("sparse_pca", "svd", "vq")
TRANSPOSED, GROUPED, ALONG_INPUTS = 1, 2, 4
LINES = 64
MAX_BITS = 25


def _append_grid(out: bytearray, grid: Grid) -> None:
    bits = grid.high.bit_length() + 1
    assert (grid.low, grid.high) == (-(1 << bits - 1), (1 << bits - 1) - 1), "grids at rest are whole signed bits"
    if grid.exponents.size == 1:
        out.append(bits)
        append_zigzag(out, int(grid.exponents[0]))
    else:
        out.append(bits | LINES)
        out += encode_integers(grid.exponents[None])


def _read_grid(reader: Reader, lines: int, what: str) -> Grid:
    head = reader.take(1, what)[0]
    bits = head & ~LINES
    if not 1 <= bits <= MAX_BITS:
        raise FormatError(f"{what}: {bits} bits are not 1 to {MAX_BITS}")
    if head & LINES:
        exponents = decode_integers(reader, (1, lines))[0]
    else:
        exponents = np.array([reader.zigzag(what)], np.int32)
    reader.book("steps")
    return Grid(-(1 << bits - 1), (1 << bits - 1) - 1, exponents)


def encode_weight(weight: FactoredWeight) -> bytes:
    """The record of a weight."""
    tiling = weight.tiling
    out = bytearray([FORMS.index(weight.form)])
    grouped, along = tiling.groups > 1, tiling.depth > 0
    out.append(TRANSPOSED * tiling.transposed | GROUPED * grouped | ALONG_INPUTS * along)
    if grouped:
        append_varint(out, tiling.groups)
    if along:
        append_varint(out, tiling.depth)
    _append_grid(out, weight.basis.grid)
    if weight.basis.integers is not None:
        append_varint(out, weight.basis.integers.shape[1])
        out += encode_integers(weight.basis.integers)
    if isinstance(weight.codes, OneHotCodes):
        out += encode_integers(weight.codes.indices[None])
    else:
        _append_grid(out, weight.codes.grid)
        out += encode_integers(weight.codes.integers)
    return bytes(out)


def predicted_bits(weight: FactoredWeight) -> float:
    """What `encode_weight` will take, from the same tables, without the bytes being made."""
    head = bytearray(6)
    _append_grid(head, weight.basis.grid)
    bits = 8.0 * len(head)
    if weight.basis.integers is not None:
        bits += plan_integers(weight.basis.integers).bits.total
    if isinstance(weight.codes, OneHotCodes):
        return bits + plan_integers(weight.codes.indices[None]).bits.total
    return bits + plan_integers(weight.codes.integers).bits.total


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
    try:
        tiling = Tiling(shape, groups, bool(flags & TRANSPOSED), depth)
        rows, count = tiling.tiled_shape
        grid = _read_grid(reader, rows, "the basis' grid")
        basis, rank = None, rows
        if form in BASIS_FORMS:
            rank = reader.varint("the rank")
            if not 1 <= rank <= max(rows, count):
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
    sizes = np.array([prod(shape) for shape in shapes], np.int64)
    parts = np.split(decode_runs(reader, sizes), np.cumsum(sizes)[:-1]) if count else []
    try:
        return [
            FactoredVector(shape, part, int(exponent), int(offset), bool(log))
            for shape, part, exponent, offset, log in zip(shapes, parts, exponents, offsets, logarithmic, strict=True)
        ]
    except MismatchError as error:
        raise FormatError(str(error)) from error
