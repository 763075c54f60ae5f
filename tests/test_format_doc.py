"""docs/format.md says what the code does: its ids, its table of steps, and a file byte for byte."""

import re
from pathlib import Path

import laws
import numpy as np
import pytest

from factorpack.coding.records import FORMS
from factorpack.container import read
from factorpack.container.layout import ALIAS, DTYPES, EXACT, NUMPY_DTYPES, VECTOR, VERSION, WEIGHT
from factorpack.factors import octave

PAGE = Path(__file__).resolve().parents[1] / "docs" / "format.md"


def table(heading):
    """The cells of the first table below a heading, its head left out."""
    below = PAGE.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def block(language):
    """What the only fenced block of a language holds."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture(scope="module")
def example():
    """What the worked example's code makes."""
    names = {}
    exec(block("python"), names)
    return names


def test_the_page_is_of_this_version():
    assert PAGE.read_text(encoding="utf-8").startswith(f"# The file format, version {VERSION}\n")


def test_form_ids():
    assert [(int(row[0]), row[1]) for row in table("### Forms")] == list(enumerate(FORMS))


def test_kinds():
    kinds = {"weight": WEIGHT, "vector": VECTOR, "exact": EXACT, "alias": ALIAS}
    assert {row[1]: int(row[0]) for row in table("### Kinds")} == kinds


def test_dtype_ids_and_what_they_take():
    rows = table("### Dtypes")
    assert [(int(row[0]), row[1]) for row in rows] == list(enumerate(DTYPES))
    sizes = {row[1]: int(row[2].split()[0]) for row in rows}
    assert sizes == {name: np.dtype(held).itemsize for name, held in NUMPY_DTYPES.items()}


def test_the_octave_table():
    rows = table("## 4. Steps")
    assert rows
    assert all(octave()[int(place)] == int(value) for place, value in rows)


def test_the_worked_example_is_what_the_code_writes(example):
    assert example["data"] == bytes.fromhex(block("hex"))


def test_the_worked_example_reads_back(example, tmp_path):
    path = tmp_path / "example.fpk"
    path.write_bytes(bytes.fromhex(block("hex")))
    found, bill = read(path)
    laws.assert_same_contents(found, example["contents"])
    assert bill.size_bytes == 224
    assert found.tensors["fc.bias"].tensor().tolist() == [6 / 128, 5 / 128, 3 / 128]


def test_the_example_is_explained_with_bytes_that_it_has(example):
    """Hex in the tables on the blob and on the two records, joined, is found in the file."""
    text = example["data"].hex()
    for heading in ("The record of `fc.weight`:", "The record of the small tensors:"):
        assert "".join("".join(re.findall(r"`([0-9a-f]+)`", row[0])) for row in table(heading)) in text
    for row in table("Its blob starts at byte 112:"):
        assert all(part in text for part in re.findall(r"`([0-9a-f]+)`", row[0]))
