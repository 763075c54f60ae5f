"""The golden files mean today what they meant when they were made, to this package and to the readers beside it."""

import json
import subprocess
import sys
from pathlib import Path

import c_decoder
import numpy as np
import pytest

from factorpack.coding.records import encode_vectors, encode_weight
from factorpack.container import read
from factorpack.factors import FactoredVector, FactoredWeight

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "vectors"
sys.path[:0] = [str(FOLDER), str(ROOT / "tools")]

import make  # noqa: E402
import minireader  # noqa: E402

EXPECTED = json.loads((FOLDER / "digests.json").read_text(encoding="utf-8"))
every_file = pytest.mark.parametrize("name", sorted(EXPECTED))


def test_every_golden_file_is_there_and_listed():
    assert {path.name for path in FOLDER.glob("*.fpk")} == set(EXPECTED)


@every_file
def test_this_package_reads_what_is_in_it(name):
    assert make.digests(FOLDER / name) == EXPECTED[name]


@every_file
def test_this_package_would_write_the_same_records(name):
    data = (FOLDER / name).read_bytes()
    tensors = read(FOLDER / name)[0].tensors.values()
    for weight in tensors:
        if isinstance(weight, FactoredWeight):
            assert encode_weight(weight) in data
    vectors = [value for value in tensors if isinstance(value, FactoredVector)]
    assert not vectors or encode_vectors(vectors) in data


@every_file
def test_the_small_reader_finds_the_same(name):
    found = minireader.read((FOLDER / name).read_bytes())
    assert {tensor: make.digest(values) for tensor, values in sorted(found.items())} == EXPECTED[name]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return c_decoder.built(c_decoder.SOURCES / "fpk_dump.c", tmp_path_factory.mktemp("c"))


def decoded(program, path, folder):
    """The tensors that the C decoder writes, bfloat16 as the float32 of equal value; None where it refuses."""
    folder.mkdir()
    run = subprocess.run([program, path, folder], capture_output=True, check=False, timeout=60)
    assert run.returncode in (0, 1), run.stderr.decode()
    if run.returncode:
        return None
    found = {}
    for line in run.stdout.decode().split("\n")[1:-1]:
        number, dtype, _kind, _target, axes, rest = line.split(" ", 5)
        *numbers, name = rest.split(" ", int(axes) + 2)
        data = (folder / f"{number}.bin").read_bytes()
        if dtype == "bfloat16":
            values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data, dtype)
        found[name] = values.reshape([int(n) for n in numbers[: int(axes)]])
    return found


@every_file
def test_the_decoder_in_c_finds_the_same(name, decoder, tmp_path):
    found = decoded(decoder, FOLDER / name, tmp_path / "out")
    assert {tensor: make.digest(values) for tensor, values in sorted(found.items())} == EXPECTED[name]


def test_the_decoder_in_c_is_as_small_as_it_says_and_needs_no_library():
    text = [(c_decoder.SOURCES / name).read_text(encoding="utf-8") for name in ("factorpack.h", "factorpack.c")]
    assert sum(len(part.splitlines()) for part in text) <= 1000
    included = {line for part in text for line in part.splitlines() if line.startswith("#include <")}
    assert included == {"#include <stddef.h>", "#include <stdint.h>", "#include <string.h>"}
