"""Twenty thousand damaged files: each is refused, or means what it meant; nothing else, in bounded time and memory.

Half of them have their checksums put right again, so that the parser behind these is reached: there another result is
allowed, as long as its tensors can be made and the decoder in C makes the same. The mutants are the same in every run.
"""

import resource
import signal
import struct
import subprocess
import zlib
from contextlib import contextmanager
from pathlib import Path

import laws
import numpy as np
import pytest
import torch
from c_decoder import built
from safetensors.numpy import save
from test_container import contents_of, random_contents, small_contents

from factorpack.coding.records import encode_vectors, encode_weight
from factorpack.container import read, to_bytes
from factorpack.container.layout import KEY, VERSION
from factorpack.container.reader import inflate
from factorpack.container.writer import deflate
from factorpack.errors import FormatError
from factorpack.factors import FactoredVector, FactoredWeight
from factorpack.nn.loading import state_dict
from factorpack.tiling import Tiling

MUTANTS, PARTS = 20_000, 8
SECONDS = 2.0
MOST_BYTES = 1 << 22
TELLING = bytes([0, 1, 2, 15, 16, 32, 64, 127, 128, 254, 255])


def streams():
    """Small streams with classes, a centre, escapes and several lanes."""
    rng = np.random.default_rng(4)
    far = laws.weight(rng, "direct", Tiling((16, 60)), "rows", "columns")
    far.codes.integers[:] = np.rint(rng.normal(size=(16, 60)) * 2.0 ** rng.integers(-2, 3, 16)[:, None]).clip(-8, 7)
    return contents_of({"far": far, "kernel": laws.weight(rng, "separable", Tiling((10, 4, 3, 3), depth=9))})


CORPUS = [small_contents(), streams(), *(random_contents(seed) for seed in range(6))]
FILES = [to_bytes(contents) for contents in CORPUS]


def taken_apart(data, contents):
    """The index, inflated, and the records of a file with these contents."""
    blob = data[8 + struct.unpack("<Q", data[:8])[0] :]
    stored, size = struct.unpack("<II", blob[:8])
    values = contents.tensors.values()
    vectors = [value for value in values if isinstance(value, FactoredVector)]
    exact = [value.tobytes() for value in values if isinstance(value, np.ndarray)]
    records = [encode_weight(value) for value in values if isinstance(value, FactoredWeight)]
    records += [encode_vectors(vectors)] * bool(vectors) + [deflate(b"".join(exact))] * bool(exact)
    return inflate(blob[12 : 12 + stored], size, "the index"), records


def put_together(index, records):
    stored = deflate(index)
    blob = struct.pack("<III", len(stored), len(index), zlib.crc32(stored)) + stored
    for record in records:
        blob += record + struct.pack("<I", zlib.crc32(record))
    return save({KEY: np.frombuffer(blob, np.uint8)}, metadata={KEY: VERSION})


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


@contextmanager
def in_time():
    def late(_signal, _frame):
        raise TimeoutError(f"a damaged file took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(path, data):
    """What a reader finds, and the CRC-32 of its tensors; None and "refused" where it refuses."""
    path.write_bytes(data)
    with in_time():
        try:
            contents, _ = read(path, MOST_BYTES)
        except FormatError:
            return None, "refused"
        crc = 0
        for tensor in state_dict(contents.tensors, contents.dtypes, contents.aliases).values():
            crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), crc)
        return contents, f"{crc:08x}"


def test_files_come_apart_and_together_again():
    for data, contents in zip(FILES, CORPUS, strict=True):
        assert put_together(*taken_apart(data, contents)) == data


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    """What the decoder in C makes of files: their lines of `fpk_digests`."""
    program = built(Path(__file__).with_name("fpk_digests.c"), tmp_path_factory.mktemp("c"))

    def found(files):
        data = b"".join(struct.pack("<I", len(file)) + file for file in files)
        run = subprocess.run([program, str(16 * MOST_BYTES)], input=data, capture_output=True, check=False, timeout=300)
        assert run.returncode == 0, run.stderr.decode()
        return run.stdout.decode().split()

    return found


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_file_is_refused_or_means_what_it_meant(part, digests, tmp_path):
    rng = np.random.default_rng(part)
    path = tmp_path / "mutant.fpk"
    apart = [taken_apart(data, contents) for data, contents in zip(FILES, CORPUS, strict=True)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    tried, found_here = [], []
    for _ in range(MUTANTS // PARTS // 2):
        which = int(rng.integers(len(FILES)))
        tried.append(mutated(rng, FILES[which], FILES[int(rng.integers(len(FILES)))]))
        contents, digest = outcome(path, tried[-1])
        if contents is not None:
            laws.assert_same_contents(contents, CORPUS[which])
        refused += contents is None
        found_here.append(digest)
        index, records = apart[which]
        records = list(records)
        place = int(rng.integers(-1, len(records)))
        if place < 0:
            index = mutated(rng, index, index)
        else:
            # As long as the index says: it would be refused at once else.
            other = records[int(rng.integers(len(records)))]
            records[place] = mutated(rng, records[place], other).ljust(len(records[place]), b"\0")[
                : len(records[place])
            ]
        tried.append(put_together(index, records))
        found_here.append(outcome(path, tried[-1])[1])
    # Nearly all of what is damaged is refused; what is not was changed where nothing is said.
    assert refused > 0.9 * (MUTANTS // PARTS // 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < (4 * MOST_BYTES + (64 << 20)) // 1024
    assert found_here == digests(tried)
