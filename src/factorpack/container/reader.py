"""A file to its contents, every length checked before it is believed."""

import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from factorpack.coding.reader import Allowance, Reader
from factorpack.coding.records import MAX_ENTRIES, decode_vectors, decode_weight
from factorpack.container.layout import (
    ALIAS,
    CHECKSUM_BYTES,
    DTYPES,
    EXACT,
    FACTORED_DTYPES,
    HEAD_BYTES,
    KEY,
    MAX_AXES,
    MAX_INDEX_BYTES,
    NUMPY_DTYPES,
    VECTOR,
    VERSION,
    WEIGHT,
    Bill,
    Contents,
    TensorBill,
    Value,
)
from factorpack.errors import FormatError

LEAST_ALLOWED, ALLOWED_RATIO = 1 << 26, 1024
"""Bytes of memory that what is in a file may take where the caller does not say: so many, or that many times its size,
whichever is more."""
ENTRY_BYTES = 512
"""Memory that an entry of the index takes as Python's objects."""


def _blob(path: Path) -> bytes:
    try:
        with safe_open(path, framework="np") as file:
            version = (file.metadata() or {}).get(KEY)
            if version is None or list(file.keys()) != [KEY]:
                raise FormatError(f"{path} is a safetensors file, but not one of Factorpack's")
            if version != VERSION:
                raise FormatError(
                    f"{path} has format version {version}; this reader knows {VERSION}: update factorpack"
                )
            stored = file.get_slice(KEY)
            # Asked before the tensor is: NumPy lacks some of the dtypes that safetensors has.
            if stored.get_dtype() != "U8" or len(stored.get_shape()) != 1:
                raise FormatError(f"{path} is a safetensors file, but not one of Factorpack's")
            return bytes(file.get_tensor(KEY))
    except FileNotFoundError as error:
        raise FormatError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is damaged, truncated or not a Factorpack file ({error})") from error


def inflate(data: bytes | memoryview, size: int, what: str) -> bytes:
    """The `size` bytes that raw deflate made `data` of; FormatError where it is otherwise."""
    packer = zlib.decompressobj(-15)
    try:
        out = packer.decompress(bytes(data), size + 1)
    except zlib.error as error:
        raise FormatError(f"{what} is damaged ({error})") from error
    if len(out) != size or packer.unused_data or not packer.eof:
        raise FormatError(f"{what} is damaged: it does not have the {size} bytes that it should")
    return out


class _Index:
    """The index, parsed: names, kinds, dtypes and shapes of the stored tensors, aliases, record sizes."""

    def __init__(self, data: bytes, allowance: Allowance) -> None:
        reader = Reader(data)
        count, ties = reader.varint("the number of tensors"), reader.varint("the number of ties")
        allowance.spend(ENTRY_BYTES * (count + ties), "the index")
        self.kinds = bytes(reader.take(count, "the kinds"))
        if bytes(reader.take(ties, "the kinds")) != bytes([ALIAS]) * ties or any(k >= ALIAS for k in self.kinds):
            raise FormatError("the index holds kinds of tensors that are unknown")
        dtypes = bytes(reader.take(count, "the dtypes"))
        if any(d >= len(DTYPES) for d in dtypes):
            raise FormatError("the index holds dtypes that are unknown")
        self.dtypes = [DTYPES[d] for d in dtypes]
        if any(k != EXACT and d not in FACTORED_DTYPES for k, d in zip(self.kinds, self.dtypes, strict=True)):
            raise FormatError(f"a factored tensor has a dtype other than {', '.join(FACTORED_DTYPES)}")
        axes = [reader.varint("the axes") for _ in range(count)]
        if any(a > MAX_AXES for a in axes):
            raise FormatError(f"a tensor has more than {MAX_AXES} axes")
        self.shapes = [tuple(reader.varint("a shape") for _ in range(a)) for a in axes]
        if any(prod(max(size, 1) for size in shape) > MAX_ENTRIES for shape in self.shapes):
            raise FormatError(f"a tensor has more than {MAX_ENTRIES} entries")
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            allowance.spend(prod(shape) * max(4, np.dtype(NUMPY_DTYPES[dtype]).itemsize), f"a tensor of shape {shape}")
        targets = [reader.varint("a tie") for _ in range(ties)]
        records = self.kinds.count(WEIGHT) + (VECTOR in self.kinds) + (EXACT in self.kinds)
        self.sizes = [reader.varint("a record's size") for _ in range(records)]
        try:
            text = bytes(reader.take(reader.remaining, "the names")).decode()
        except UnicodeDecodeError as error:
            raise FormatError("the names are not UTF-8") from error
        names = text.split("\n") if count + ties or text else []
        if len(names) != count + ties or len(set(names)) != len(names) or any(t >= count for t in targets):
            raise FormatError("the names of the index do not fit its tensors")
        self.names = names[:count]
        self.aliases = {name: self.names[target] for name, target in zip(names[count:], targets, strict=True)}


def _record(reader: Reader, size: int, what: str, allowance: Allowance) -> Reader:
    data = reader.take(size, what)
    (checksum,) = struct.unpack("<I", reader.take(CHECKSUM_BYTES, f"the checksum of {what}"))
    if zlib.crc32(data) != checksum:
        raise FormatError(f"{what} is damaged: its checksum is wrong")
    return Reader(data, allowance)


def _end(reader: Reader, what: str) -> None:
    if reader.remaining:
        raise FormatError(f"{what} is followed by {reader.remaining} bytes that do not belong there")


def _exact(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    found = np.frombuffer(data, NUMPY_DTYPES[dtype]).reshape(shape)
    if (dtype == "bool" and (found.view(np.uint8) > 1).any()) or (
        dtype == "bfloat16" and (found.view("<u4") & 0xFFFF).any()
    ):
        raise FormatError(f"an exact tensor of shape {shape} holds what is no {dtype}")
    return found


def read(path: Path, most_bytes: int | None = None) -> tuple[Contents, Bill]:
    """What the file holds, and where its bytes are.

    `most_bytes` bounds the memory for its dense tensors and the integers of their factors together; None stands for
    1,024 times the file's size, or 64 MiB where that is more. Raises FormatError, naming the tensor and before the
    memory is used, where the file asks for more, is damaged, truncated, of another kind or version.
    """
    blob = _blob(path)
    reader = Reader(blob)
    allowance = Allowance(max(LEAST_ALLOWED, ALLOWED_RATIO * len(blob)) if most_bytes is None else most_bytes)
    stored, size, checksum = struct.unpack("<III", reader.take(HEAD_BYTES, "the head"))
    if size > MAX_INDEX_BYTES:
        raise FormatError(f"an index of {size} bytes is larger than {MAX_INDEX_BYTES}")
    deflated = reader.take(stored, "the index")
    # Of the bytes as stored: deflate ends in bits that mean nothing, and a changed one is damage too.
    if zlib.crc32(deflated) != checksum:
        raise FormatError("the index is damaged: its checksum is wrong")
    allowance.spend(size, "the index")
    index = _Index(inflate(deflated, size, "the index"), allowance)
    sizes = iter(index.sizes)
    found: dict[str, Value] = {}
    bills = []
    members = {kind: [i for i, k in enumerate(index.kinds) if k == kind] for kind in (WEIGHT, VECTOR, EXACT)}
    for place in members[WEIGHT]:
        name, shape = index.names[place], index.shapes[place]
        try:
            record = _record(reader, next(sizes), "its record", allowance)
            weight = decode_weight(record, shape)
            _end(record, "its record")
        except FormatError as error:
            raise FormatError(f"{path}: tensor {name}: {error}") from error
        found[name] = weight
        bills.append(TensorBill(name, weight.form, shape, {**record.books, "checksums": CHECKSUM_BYTES}))
    shared = {"index": stored + HEAD_BYTES, "header": path.stat().st_size - len(blob), "checksums": 0}
    if members[VECTOR]:
        size = next(sizes)
        record = _record(reader, size, "the record of the small tensors", allowance)
        vectors = decode_vectors(record, [index.shapes[i] for i in members[VECTOR]])
        _end(record, "the record of the small tensors")
        found |= {index.names[i]: v for i, v in zip(members[VECTOR], vectors, strict=True)}
        shared["small tensors"] = size
        shared["checksums"] += CHECKSUM_BYTES
    if members[EXACT]:
        size = next(sizes)
        record = _record(reader, size, "the record of the exact tensors", allowance)
        lengths = [prod(index.shapes[i]) * np.dtype(NUMPY_DTYPES[index.dtypes[i]]).itemsize for i in members[EXACT]]
        raw = inflate(record.take(size, "the exact tensors"), sum(lengths), "the record of the exact tensors")
        start = 0
        for place, length in zip(members[EXACT], lengths, strict=True):
            found[index.names[place]] = _exact(raw[start : start + length], index.dtypes[place], index.shapes[place])
            start += length
        shared["exact tensors"] = size
        shared["checksums"] += CHECKSUM_BYTES
    _end(reader, "the last record")
    dtypes = dict(zip(index.names, index.dtypes, strict=True))
    contents = Contents(
        {name: found[name] for name in index.names},
        dtypes | {alias: dtypes[target] for alias, target in index.aliases.items()},
        index.aliases,
    )
    return contents, Bill(tuple(bills), shared, path.stat().st_size)
