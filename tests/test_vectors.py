"""The golden files mean today what they meant when they were made, to this package and to the readers beside it."""

import json
import sys
from pathlib import Path

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
