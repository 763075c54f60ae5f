"""Contents to a file."""

import errno
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from factorpack.coding.reader import append_varint
from factorpack.coding.records import encode_vectors, encode_weight
from factorpack.container.layout import (
    ALIAS,
    DTYPES,
    EXACT,
    FACTORED_DTYPES,
    KEY,
    MAX_AXES,
    NUMPY_DTYPES,
    VECTOR,
    VERSION,
    WEIGHT,
    Contents,
    Value,
)
from factorpack.errors import FactorpackError, UnsupportedError
from factorpack.factors import FactoredVector, FactoredWeight


def deflate(data: bytes) -> bytes:
    """Raw deflate at its highest level: without the header and checksum of zlib."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def _kind(value: Value) -> int:
    if isinstance(value, FactoredWeight):
        return WEIGHT
    return VECTOR if isinstance(value, FactoredVector) else EXACT


def to_bytes(contents: Contents, records: Sequence[bytes] | None = None) -> bytes:
    """The whole file; `records` are those of the weights in their order where they are at hand already.

    Raises UnsupportedError for a name, a dtype or a number of axes that the file has no place for.
    """
    weights = [v for v in contents.tensors.values() if isinstance(v, FactoredWeight)]
    vectors = [v for v in contents.tensors.values() if isinstance(v, FactoredVector)]
    exact = [v for v in contents.tensors.values() if isinstance(v, np.ndarray)]
    parts = [encode_weight(w) for w in weights] if records is None else list(records)
    if vectors:
        parts.append(encode_vectors(vectors))
    if exact:
        parts.append(deflate(b"".join(np.ascontiguousarray(v).tobytes() for v in exact)))
    stored = deflate(index := _index(contents, [len(part) for part in parts]))
    head = struct.pack("<III", len(stored), len(index), zlib.crc32(stored)) + stored
    checked = (piece for part in parts for piece in (part, struct.pack("<I", zlib.crc32(part))))
    # Copied no more often than can be helped: of a large network this may be the most that memory is asked for.
    return save({KEY: np.frombuffer(b"".join((head, *checked)), np.uint8)}, metadata={KEY: VERSION})


def _index(contents: Contents, sizes: Sequence[int]) -> bytes:
    """Columns of like values, which deflate well: kinds, dtypes, axes, sizes, names."""
    out = bytearray()
    names = [*contents.tensors, *contents.aliases]
    _check(contents, names)
    append_varint(out, len(contents.tensors))
    append_varint(out, len(contents.aliases))
    out += bytes(_kind(v) for v in contents.tensors.values()) + bytes([ALIAS]) * len(contents.aliases)
    out += bytes(DTYPES.index(contents.dtypes[name]) for name in contents.tensors)
    for value in contents.tensors.values():
        append_varint(out, len(value.shape))
    for value in contents.tensors.values():
        for size in value.shape:
            append_varint(out, size)
    places = {name: place for place, name in enumerate(contents.tensors)}
    for target in contents.aliases.values():
        append_varint(out, places[target])
    for size in sizes:
        append_varint(out, size)
    out += "\n".join(names).encode()
    return bytes(out)


def _check(contents: Contents, names: Sequence[str]) -> None:
    for name in names:
        if "\n" in name:
            raise UnsupportedError(f"the name {name!r} holds a line break, which ends a name in the file: rename it")
    for name, value in contents.tensors.items():
        dtype, shape = contents.dtypes[name], value.shape
        if dtype not in DTYPES:
            raise UnsupportedError(f"tensor {name} is of dtype {dtype}: convert it to one of {', '.join(DTYPES)}")
        if len(shape) > MAX_AXES:
            raise UnsupportedError(f"tensor {name} has {len(shape)} axes: reshape it to {MAX_AXES} or fewer")
        if _kind(value) != EXACT and dtype not in FACTORED_DTYPES:
            raise UnsupportedError(f"tensor {name} of dtype {dtype} cannot be factored: store it exactly")
        if _kind(value) == EXACT:
            assert isinstance(value, np.ndarray), f"{name} is a {type(value).__name__}, which is no array"
            assert value.dtype.str == NUMPY_DTYPES[dtype], f"{name} is held as {value.dtype}, not as {dtype}"


def _refusal(what: str, error: OSError, advice: str) -> FactorpackError:
    """What to raise for an error of the disk; `advice` is for whatever is not a lack of space."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return FactorpackError(
        f"{what}: {error.strerror}; {'free space there, or choose another place' if full else advice}"
    )


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, where it is not there. Raises FactorpackError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(f"cannot make the folder {path}", error, "choose another place") from error


def write(path: Path, data: bytes) -> None:
    """Writes `data` to a temporary sibling, syncs it and renames it: nobody ever sees half a file.

    Raises FactorpackError where the folder is missing or the disk full; the old file then stays. A kill can leave the
    sibling behind, `.NAME.*.part`; no other call removes it, since it cannot be told from one that is being written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise _refusal(f"cannot write {path}", error, "does the folder exist, and may you?") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; a model file is as public as the user's others.
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(path)
    except OSError as error:
        raise _refusal(f"cannot write {path}", error, "choose another place") from error
    finally:
        # It is gone where all went well, and cannot go where a broken disk turned read-only.
        with suppress(OSError):
            Path(name).unlink()
