"""The decoder as machine code is the reference, in what it gives and in what it refuses."""

import numpy as np
import pytest

from factorpack.coding import compiled, rans, reference
from factorpack.coding.models import normalised
from factorpack.errors import FormatError

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="there was no C compiler at the installation")


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
