"""Files to damage, and how: beside the checksums and behind them."""

import struct
import zlib

import laws
import numpy as np
import torch
from test_container import contents_of, crafted, random_contents, small_contents

from factorpack.coding import Reader, append_varint
from factorpack.container import read, to_bytes
from factorpack.container.layout import CHECKSUM_BYTES, EXACT, HEAD_BYTES, VECTOR, WEIGHT
from factorpack.nn.loading import state_dict
from factorpack.tiling import Tiling

MOST_BYTES = 1 << 22
INDEX_BYTES = 1 << 20
"""No index that is taken apart is larger: one that deflates to nearly nothing is left alone."""
TELLING = bytes([0, 1, 2, 15, 16, 32, 64, 127, 128, 254, 255])


def streams():
    """Small streams with classes, a centre, escapes and several lanes."""
    rng = np.random.default_rng(4)
    far = laws.weight(rng, "direct", Tiling((16, 60)), "rows", "columns")
    far.codes.integers[:] = np.rint(rng.normal(size=(16, 60)) * 2.0 ** rng.integers(-2, 3, 16)[:, None]).clip(-8, 7)
    return contents_of({"far": far, "kernel": laws.weight(rng, "separable", Tiling((10, 4, 3, 3), depth=9))})


CORPUS = [small_contents(), streams(), *(random_contents(seed) for seed in range(6))]
FILES = [to_bytes(contents) for contents in CORPUS]


def taken_apart(data):
    """What a file's index holds before the sizes of the records, the records, and the names.

    FormatError, zlib.error or struct.error where that cannot be told; checksums are not looked at.
    """
    file = Reader(data)
    file.take(struct.unpack("<Q", file.take(8, "the header's size"))[0], "the header")
    (stored,) = struct.unpack("<I", file.take(HEAD_BYTES, "the head")[:4])
    index = zlib.decompressobj(-15).decompress(file.take(stored, "the index"), INDEX_BYTES)
    columns = Reader(index)
    count, ties = columns.varint("the tensors"), columns.varint("the ties")
    kinds = bytes(columns.take(count + ties, "the kinds"))
    columns.take(count, "the dtypes")
    axes = [columns.varint("the axes") for _ in range(count)]
    for _ in range(sum(axes) + ties):
        columns.varint("shapes and ties")
    front = index[: len(index) - columns.remaining]
    records = []
    for _ in range(kinds.count(WEIGHT) + (VECTOR in kinds) + (EXACT in kinds)):
        records.append(bytes(file.take(columns.varint("a size"), "a record")))
        file.take(CHECKSUM_BYTES, "a checksum")
    return front, records, bytes(columns.take(columns.remaining, "the names"))


def index_with(front, records, names):
    out = bytearray(front)
    for record in records:
        append_varint(out, len(record))
    return bytes(out + names)


def put_together(front, records, names):
    """The file of these parts, whose sizes and checksums are right."""
    return crafted(index_with(front, records, names), records)


def mutated(rng, data, other):
    """One to three changes: bits, telling bytes, a cut, something put in, left out, doubled or taken from elsewhere."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at, length = int(rng.integers(len(data) + 1)), int(rng.integers(1, 9))
        match int(rng.integers(8)) if data else 3:
            case 0 | 1:
                if at < len(data):
                    data[at] ^= 1 << int(rng.integers(8))
            case 2:
                if at < len(data):
                    data[at] = TELLING[int(rng.integers(len(TELLING)))]
            case 3:
                data[at:at] = rng.bytes(length)
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case 6:
                start = int(rng.integers(len(other) + 1))
                data[at : at + length] = other[start : start + length]
            case 7:
                del data[at:]
    return bytes(data)


def decoded(path):
    """What the package finds in a file, and the CRC-32 of its tensors, one after another; or FormatError."""
    contents, _ = read(path, MOST_BYTES)
    crc = 0
    for tensor in state_dict(contents.tensors, contents.dtypes, contents.aliases).values():
        # Torch gives an array of no entries strides with which it cannot be seen as bytes.
        if tensor.numel():
            crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), crc)
    return contents, f"{crc:08x}"
