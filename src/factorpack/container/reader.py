"""A file to its contents, every length checked before it is believed."""

import struct
import zlib
from functools import cached_property, partial
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
from factorpack.factors import FactoredVector, FactoredWeight
from factorpack.threads import in_threads

LEAST_ALLOWED, ALLOWED_RATIO = 1 << 26, 1024
"""Bytes of memory that what is in a file may take where the caller does not say: so many, or that many times its size,
whichever is more."""
ENTRY_BYTES = 512
"""Memory that an entry of the index takes as Python's objects."""


class _Blob:
    """The one tensor of a safetensors file, read in parts: the file is mapped, not read."""

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="np") as file:
                version = (file.metadata() or {}).get(KEY)
                if version is None or list(file.keys()) != [KEY]:
                    raise FormatError(f"{path} is a safetensors file, but not one of Factorpack's")
                if version != VERSION:
                    raise FormatError(
                        f"{path} has format version {version}; this reader knows {VERSION}: update factorpack"
                    )
                # Holds the mapping for as long as it is there.
                self._bytes = file.get_slice(KEY)
                # Asked before the tensor is: NumPy lacks some of the dtypes that safetensors has.
                if self._bytes.get_dtype() != "U8" or len(self._bytes.get_shape()) != 1:
                    raise FormatError(f"{path} is a safetensors file, but not one of Factorpack's")
            self.file_bytes = path.stat().st_size
        except FileNotFoundError as error:
            raise FormatError(f"{path} does not exist") from error
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path} is damaged, truncated or not a Factorpack file ({error})") from error
        (self.size,) = self._bytes.get_shape()

    def reader(self, start: int, size: int, allowance: Allowance) -> Reader:
        """A reader of `size` bytes from `start` on, or of those that there are."""
        stop = min(start + size, self.size)
        # An empty part, wherever it is, is none to safetensors.
        return Reader(self._bytes[start:stop].data if start < stop else b"", allowance)


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


def _end(reader: Reader, what: str) -> None:
    if reader.remaining:
        raise FormatError(f"{what} is followed by {reader.remaining} bytes that do not belong there")


def _array_of(data: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    found = np.frombuffer(data, NUMPY_DTYPES[dtype]).reshape(shape)
    if (dtype == "bool" and (found.view(np.uint8) > 1).any()) or (
        dtype == "bfloat16" and (found.view("<u4") & 0xFFFF).any()
    ):
        raise FormatError(f"an exact tensor of shape {shape} holds what is no {dtype}")
    return found


class File:
    """A file that is open: the index is checked, a record is read when one of its tensors is asked for.

    `weights`, `small` and `exact` are the names of what is stored, by kind; `aliases` are tied names, each with the
    name that is stored for it; `dtypes` and `shapes` are those of all names, the stored ones first, in the file's
    order. `most_bytes` bounds the memory for all dense tensors, with the integers of the factors of a tensor that is
    asked for alone, or of all in `contents`; None stands for 1,024 times the file's size, or 64 MiB where that is more.
    Raises FormatError, before the memory is used, where the file asks for more, is damaged, truncated, of another kind
    or version.
    """

    def __init__(self, path: Path, most_bytes: int | None = None) -> None:
        self.path = path
        self._blob = blob = _Blob(path)
        self._allowance = allowance = Allowance(
            max(LEAST_ALLOWED, ALLOWED_RATIO * blob.size) if most_bytes is None else most_bytes
        )
        head = blob.reader(0, HEAD_BYTES, allowance).take(HEAD_BYTES, "the head")
        stored, inflated, checksum = struct.unpack("<III", head)
        if inflated > MAX_INDEX_BYTES:
            raise FormatError(f"an index of {inflated} bytes is larger than {MAX_INDEX_BYTES}")
        deflated = blob.reader(HEAD_BYTES, stored, allowance).take(stored, "the index")
        # Of the bytes as stored: deflate ends in bits that mean nothing, and a changed one is damage too.
        if zlib.crc32(deflated) != checksum:
            raise FormatError("the index is damaged: its checksum is wrong")
        allowance.spend(inflated, "the index")
        self._index = index = _Index(inflate(deflated, inflated, "the index"), allowance)
        self.weights, self.small, self.exact = (
            [name for name, found in zip(index.names, index.kinds, strict=True) if found == kind]
            for kind in (WEIGHT, VECTOR, EXACT)
        )
        self._kinds = dict(zip(index.names, index.kinds, strict=True))
        self._places: dict[str | int, tuple[int, int]] = {}
        self._index_bytes = start = HEAD_BYTES + stored
        owners: list[str | int] = [*self.weights, *(kind for kind in (VECTOR, EXACT) if kind in index.kinds)]
        for owner, size in zip(owners, index.sizes, strict=True):
            self._places[owner] = start, size
            start += size + CHECKSUM_BYTES
        if start != blob.size:
            raise FormatError(f"the index tells of {start:,} bytes, and there are {blob.size:,}")
        stored_dtypes = dict(zip(index.names, index.dtypes, strict=True))
        stored_shapes = dict(zip(index.names, index.shapes, strict=True))
        self.aliases = index.aliases
        self.dtypes = stored_dtypes | {tied: stored_dtypes[name] for tied, name in index.aliases.items()}
        self.shapes = stored_shapes | {tied: stored_shapes[name] for tied, name in index.aliases.items()}

    def _record(self, owner: str | int, what: str, allowance: Allowance) -> Reader:
        """The record of a weight, by name, or of a kind of tensors."""
        start, size = self._places[owner]
        reader = self._blob.reader(start, size + CHECKSUM_BYTES, allowance)
        data = reader.take(size, what)
        (checksum,) = struct.unpack("<I", reader.take(CHECKSUM_BYTES, f"the checksum of {what}"))
        if zlib.crc32(data) != checksum:
            raise FormatError(f"{what} is damaged: its checksum is wrong")
        return Reader(data, allowance)

    def _weight(self, name: str, allowance: Allowance) -> tuple[FactoredWeight, TensorBill]:
        shape = self.shapes[name]
        try:
            record = self._record(name, "its record", allowance)
            weight = decode_weight(record, shape)
            _end(record, "its record")
        except FormatError as error:
            raise FormatError(f"{self.path}: tensor {name}: {error}") from error
        return weight, TensorBill(name, weight.form, shape, {**record.books, "checksums": CHECKSUM_BYTES})

    @cached_property
    def _vectors(self) -> dict[str, FactoredVector]:
        if not self.small:
            return {}
        record = self._record(VECTOR, "the record of the small tensors", self._allowance)
        vectors = decode_vectors(record, [self.shapes[name] for name in self.small])
        _end(record, "the record of the small tensors")
        return dict(zip(self.small, vectors, strict=True))

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        if not self.exact:
            return {}
        record = self._record(EXACT, "the record of the exact tensors", self._allowance)
        lengths = [prod(self.shapes[name]) * np.dtype(NUMPY_DTYPES[self.dtypes[name]]).itemsize for name in self.exact]
        data = record.take(record.remaining, "the exact tensors")
        raw = inflate(data, sum(lengths), "the record of the exact tensors")
        found, start = {}, 0
        for name, length in zip(self.exact, lengths, strict=True):
            found[name] = _array_of(raw[start : start + length], self.dtypes[name], self.shapes[name])
            start += length
        return found

    def tensor(self, name: str) -> Value:
        """What is stored of a tensor, or of what it is tied to; KeyError for a name that is not in the file.

        A weight's record alone is read. Small tensors have one record in common, and so have exact ones: these are
        kept once they are read. Raises FormatError, naming the weight or the record, where that is damaged.
        """
        name = self.aliases.get(name, name)
        if self._kinds[name] == WEIGHT:
            # By itself: what was asked for before may be gone.
            return self._weight(name, self._allowance.copy())[0]
        try:
            return self._vectors[name] if self._kinds[name] == VECTOR else self._arrays[name]
        except FormatError as error:
            raise FormatError(f"{self.path}: {error}") from error

    def bill(self) -> Bill:
        """Where the bytes of the file are; every record is decoded, one weight at a time."""
        weights = tuple(self._weight(name, self._allowance.copy())[1] for name in self.weights)
        return self._bill(weights)

    def _bill(self, weights: tuple[TensorBill, ...]) -> Bill:
        small, exact = bool(self._vectors), bool(self._arrays)
        shared = {"index": self._index_bytes, "header": self._blob.file_bytes - self._blob.size}
        shared["checksums"] = CHECKSUM_BYTES * (small + exact)
        if small:
            shared["small tensors"] = self._places[VECTOR][1]
        if exact:
            shared["exact tensors"] = self._places[EXACT][1]
        return Bill(weights, shared, self._blob.file_bytes)

    def contents(self, threads: int = 1) -> tuple[Contents, Bill]:
        """All that the file holds, and where its bytes are; large weights are decoded in so many threads."""
        found: dict[str, Value] = {**self._vectors, **self._arrays}
        # What the small tensors took is gone for good, since they are kept; what the weights take is the caller's.
        decode = partial(self._weight, allowance=self._allowance.copy())
        weights = in_threads(decode, self.weights, lambda name: prod(self.shapes[name]), threads)
        found |= {name: weight for name, (weight, _) in zip(self.weights, weights, strict=True)}
        bill = self._bill(tuple(bill for _, bill in weights))
        return Contents({name: found[name] for name in self._index.names}, self.dtypes, self.aliases), bill


def read(path: Path, most_bytes: int | None = None, threads: int = 1) -> tuple[Contents, Bill]:
    """What the file holds, and where its bytes are; `most_bytes` and errors as for `File`, `threads` for `contents`."""
    return File(path, most_bytes).contents(threads)
