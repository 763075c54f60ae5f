"""Machine code is the reference, in what it gives and in what it refuses."""

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from c_decoder import CHECKED, compiler

from factorpack import factors
from factorpack.coding import compiled, models, rans, reference
from factorpack.coding.models import normalised
from factorpack.errors import FormatError


@pytest.fixture(autouse=True)
def built():
    """It is there wherever a C compiler is."""
    compiler()
    assert compiled.library() is not None, "pip install --editable . builds it"


@pytest.mark.parametrize("lanes", [1, 2, 17, 400])
def test_machine_code_is_the_reference(lanes):
    rng = np.random.default_rng(lanes)
    # Many symbols, some of them absent, and one that has nearly all.
    weights = np.maximum(rng.gamma(0.02, size=(16, 500)) * 1e6, 0).astype(np.int64)
    weights[3] = np.eye(500, dtype=np.int64)[499] * 10**6
    weights[3, 0] = 1
    tables = [rans.Table(normalised(each), first) for first, each in enumerate(weights, start=-250)]
    contexts = rng.integers(0, 16, 20_001).astype(np.uint8)
    indices = [int(rng.choice(np.flatnonzero(tables[context].frequencies))) for context in contexts]
    symbols = np.array([index + tables[context].first for index, context in zip(indices, contexts, strict=True)])
    context_list, plain_tables = contexts.tolist(), [table.frequencies.tolist() for table in tables]
    states, words = reference.encode(indices, context_list, plain_tables, lanes)

    def told(decode, words):
        try:
            return decode(words)
        except FormatError as error:
            return str(error)

    def by_reference(words):
        return reference.decode(states, words.tolist(), context_list, plain_tables, symbols.size)

    def by_machine(words):
        return compiled.decode(np.array(states, np.uint32), words, contexts, tables, symbols.size)

    words = np.array(words, np.uint16)
    assert np.array_equal(by_machine(words), symbols)
    for _ in range(40):
        damaged = words[: rng.integers(0, words.size + 1)].copy()
        if damaged.size and rng.random() < 0.8:
            damaged[rng.integers(damaged.size)] ^= 1 << rng.integers(16)
        expected, found = told(by_reference, damaged), told(by_machine, damaged)
        assert isinstance(expected, str) == isinstance(found, str)
        if isinstance(expected, str):
            assert found == expected
    assert told(by_machine, np.append(words, words[:1])) == told(by_reference, np.append(words, words[:1]))


def test_words_at_an_odd_address():
    table = rans.Table(normalised(np.array([5, 3, 1], np.int64)))
    symbols = np.random.default_rng(0).integers(0, 3, 5000).astype(np.int32)
    states, words = rans.encode(symbols, None, [table], 3)
    odd = np.frombuffer(b"?" + words.astype("<u2").tobytes(), "<u2", offset=1)
    assert not odd.flags.aligned
    assert np.array_equal(compiled.decode(states, odd, None, [table], symbols.size), symbols)


def made_up_models(rng, number):
    """Exponents of models: all that bytes can say, few symbols and many, some of them absent or all."""
    for index in range(number):
        size = int(rng.integers(1, 4096 if index % 20 == 0 else 40))
        exponents = rng.integers(0, rng.choice([2, 16384, 587777]), size)
        yield np.where(rng.random(size) < rng.choice([0, 0.1, 0.9, 1]), -1, exponents)


def told_of(frequencies, exponents):
    try:
        return frequencies(exponents.copy()).tolist()
    except FormatError as error:
        return str(error)


def test_frequencies_are_those_of_the_reference(monkeypatch):
    exponents = list(made_up_models(np.random.default_rng(0), 2000))
    by_machine = [told_of(models.frequencies, each) for each in exponents]
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert by_machine == [told_of(models.frequencies, each) for each in exponents]
    assert {told for told in by_machine if isinstance(told, str)} == {
        "a symbol model has no symbol", "a symbol model has too many symbols for its precision",
    }  # fmt: skip


def fnv(symbols):
    found = 2166136261
    for symbol in symbols:
        found = (found ^ symbol & 0xFFFFFFFF) * 16777619 & 0xFFFFFFFF
    return found


def test_damaged_streams_touch_no_memory_but_theirs(tmp_path):
    """Under the sanitizers, in buffers that end where the stream does."""
    program, source = tmp_path / "rans_check", Path(compiled.__file__).parent
    command = [compiler(), *CHECKED, "-I", source, Path(__file__).with_name("rans_check.c"), "-o", program]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rng = np.random.default_rng(0)
    streams, expected = [], []
    for _ in range(1500):
        number, size, lanes = (int(rng.integers(1, most)) for most in (17, 300, 5))
        count = int(rng.integers(lanes, 400))
        weights = np.maximum(rng.gamma(0.1, size=(number, size)) * 1e6, 1).astype(np.int64)
        tables = [normalised(each) for each in weights]
        contexts = rng.integers(0, number, count).astype(np.uint8)
        states = rng.integers(reference.LOWER, 1 << 32, lanes).astype(np.uint32)
        words = rng.integers(0, 1 << 16, rng.integers(0, count)).astype(np.uint16)
        starts = np.concatenate([np.concatenate([[0], np.cumsum(table)]) for table in tables]).astype(np.uint16)
        offsets = (size + 1) * np.arange(number, dtype=np.int64)
        firsts = rng.integers(-200, 200, number).astype(np.int32)
        head = struct.pack("=7I", lanes, words.size, number, starts.size, count, 1, 0)
        streams.append(head + b"".join(part.tobytes() for part in (states, words, starts, offsets, firsts, contexts)))
        table_objects = [rans.Table(table, int(first)) for table, first in zip(tables, firsts, strict=True)]
        try:
            expected.append(compiled.decode(states, words, contexts, table_objects, count).tolist())
        except FormatError as error:
            expected.append(str(error))
    for exponents in made_up_models(rng, 300):
        head = struct.pack("=7I", 0, 0, 0, 0, 0, 0, exponents.size)
        octave = np.array([*factors.octave(), 2 << factors.FRACTION_BITS], np.int64)
        streams.append(head + exponents.tobytes() + octave.tobytes())
        expected.append(told_of(models.frequencies, exponents))
    run = subprocess.run([program], input=b"".join(streams), capture_output=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr.decode()
    lines = run.stdout.decode().splitlines()
    assert len(lines) == len(streams)
    # Words that end early are told with the symbol at which they do.
    short = [line for line, told in zip(lines, expected, strict=True) if "words end after" in str(told)]
    assert len(short) > 300
    for line, told in zip(lines, expected, strict=True):
        status, decoded, total = line.split()
        if isinstance(told, list):
            assert (status, int(decoded), int(total)) == ("0", len(told), fnv(told))
        elif "end after" in told:
            assert status == "1"
            assert told == f"the coded words end after {decoded} of {told.split()[-2]} symbols"
        elif told == "a symbol model has no symbol":
            assert status == "1"
        else:
            assert status == "2"
