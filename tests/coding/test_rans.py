"""The fast coder is the reference bit for bit, reaches the entropy, and refuses what is damaged."""

import numpy as np
import pytest

from factorpack.coding import compiled, rans, reference
from factorpack.coding.models import normalised
from factorpack.errors import FormatError, MismatchError


@pytest.fixture(autouse=True, params=["compiled", "Python"])
def decoder(request, monkeypatch):
    """Everything here is true with the decoder as machine code, and where there is none."""
    if request.param == "Python":
        monkeypatch.setattr(compiled, "library", lambda: None)
    elif compiled.library() is None:
        pytest.skip("there was no C compiler when the package was installed")


def tables_of(rng, symbols, number, skew):
    weights = np.maximum(rng.gamma(skew, size=(number, symbols)) * 1e6, 1).astype(np.int64)
    return [rans.Table(normalised(each), first) for first, each in enumerate(weights, start=-3)]


def drawn(rng, tables, contexts):
    probabilities = [table.frequencies / reference.TOTAL for table in tables]
    cumulative = np.cumsum(probabilities, axis=1)
    uniform = rng.random(contexts.size)
    indices = (uniform[:, None] >= cumulative[contexts]).sum(1)
    return (indices + np.array([table.first for table in tables])[contexts]).astype(np.int32)


def plain(tables, symbols, contexts):
    firsts = np.array([table.first for table in tables])
    return (symbols - firsts[contexts]).tolist(), contexts.tolist(), [table.frequencies.tolist() for table in tables]


@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 16, 64, 100, 333, 1000])
@pytest.mark.parametrize("skew", [0.05, 0.5, 50.0])
def test_lanes_match_the_reference_bit_for_bit(lanes, skew):
    rng = np.random.default_rng(lanes)
    tables = tables_of(rng, 9, 5, skew)
    contexts = rng.integers(0, 5, 1000 + lanes // 2).astype(np.uint8)
    symbols = drawn(rng, tables, contexts)

    states, words = rans.encode_lanes(symbols, contexts, tables, lanes)
    indices, context_list, plain_tables = plain(tables, symbols, contexts)
    expected_states, expected_words = reference.encode(indices, context_list, plain_tables, lanes)

    assert states.tolist() == expected_states
    assert words.tolist() == expected_words
    assert reference.decode(expected_states, expected_words, context_list, plain_tables, symbols.size) == indices
    assert np.array_equal(rans.decode_lanes(states, words, contexts, tables, symbols.size), symbols)


@pytest.mark.parametrize("lanes", [1, 5, 40])
def test_encode_and_decode_are_inverse_with_and_without_contexts(lanes):
    rng = np.random.default_rng(1)
    tables = tables_of(rng, 30, 3, 0.3)
    for contexts in (None, rng.integers(0, 3, 5000).astype(np.uint8)):
        symbols = drawn(rng, tables, np.zeros(5000, np.uint8) if contexts is None else contexts)
        states, words = rans.encode(symbols, contexts, tables, lanes)
        decoded = rans.decode(states, words, contexts, tables, symbols.size)
        assert decoded.dtype == np.int32
        assert np.array_equal(decoded, symbols)


def test_a_certain_symbol_costs_nothing():
    table = rans.Table(np.array([0, reference.TOTAL, 0], np.int32), 5)
    states, words = rans.encode(np.full(10_000, 6, np.int32), None, [table], 20)
    assert words.size == 0
    assert (states == reference.LOWER).all()
    assert (rans.decode(states, words, None, [table], 10_000) == 6).all()


def test_no_symbols_need_no_words():
    table = rans.Table(np.array([reference.TOTAL], np.int32))
    states, words = rans.encode(np.empty(0, np.int32), None, [table], 1)
    assert words.size == 0
    assert rans.decode(states, words, None, [table], 0).size == 0


def test_length_is_within_half_a_percent_of_the_ideal_and_of_another_coder():
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(2)
    (table,) = tables_of(rng, 15, 1, 0.5)
    symbols = drawn(rng, [table], np.zeros(200_000, np.uint8))
    frequencies = table.frequencies / reference.TOTAL
    ideal = -np.log2(frequencies[symbols - table.first]).sum()

    states, words = rans.encode(symbols, None, [table], rans.lanes_for(ideal))
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(
        symbols - table.first, constriction.stream.model.Categorical(frequencies.astype(np.float32), perfect=False)
    )

    assert states.nbytes <= 0.005 * ideal / 8
    assert 0 < 8 * (states.nbytes + words.nbytes) - ideal < 0.005 * ideal
    assert 8 * (states.nbytes + words.nbytes) < 1.005 * coder.num_bits()


def test_lanes_cost_half_a_percent_at_most():
    assert rans.lanes_for(0.0) == 1
    assert rans.lanes_for(8.0 * 799) == 1
    for size in (1600, 12_345, 10**6, 10**9):
        lanes = rans.lanes_for(8.0 * size)
        assert 4 * lanes <= 0.005 * size
        assert lanes <= rans.MAX_LANES


@pytest.mark.parametrize("lanes", [1, 50])
class TestDamage:
    @pytest.fixture
    def coded(self, lanes):
        rng = np.random.default_rng(3)
        tables = tables_of(rng, 9, 2, 0.5)
        contexts = rng.integers(0, 2, 3000).astype(np.uint8)
        states, words = rans.encode(drawn(rng, tables, contexts), contexts, tables, lanes)
        return states, words, contexts, tables, 3000

    def test_missing_words(self, coded):
        states, words, *rest = coded
        for size in (0, words.size // 2, words.size - 1):
            with pytest.raises(FormatError, match="words"):
                rans.decode(states, words[:size], *rest)

    def test_words_left_over(self, coded):
        states, words, *rest = coded
        with pytest.raises(FormatError, match="words"):
            rans.decode(states, np.append(words, words[:1]), *rest)

    def test_changed_words(self, coded):
        states, words, *rest = coded
        for place in (0, words.size // 2, words.size - 1):
            changed = words.copy()
            changed[place] ^= 1 << 7
            with pytest.raises(FormatError, match="words"):
                rans.decode(states, changed, *rest)

    def test_states_out_of_bounds(self, coded):
        states, words, *rest = coded
        changed = states.copy()
        changed[0] = reference.LOWER - 1
        with pytest.raises(FormatError, match="state"):
            rans.decode(changed, words, *rest)
        with pytest.raises(FormatError, match="lane"):
            rans.decode(states[:0], words, *rest)

    def test_contexts_without_a_table(self, coded):
        states, words, contexts, tables, count = coded
        with pytest.raises(FormatError, match="no table"):
            rans.decode(states, words, contexts, tables[:1], count)
        with pytest.raises(FormatError, match="shape"):
            rans.decode(states, words, contexts[:-1], tables, count)
        with pytest.raises(MismatchError, match="no table"):
            rans.encode(np.zeros(3000, np.int32), contexts, tables[:1], states.size)


def test_tables_must_sum_and_hold_no_negative_frequency():
    total = reference.TOTAL
    for frequencies in ([total - 1], [total, 1], [total + 1, -1], []):
        with pytest.raises(FormatError, match="table"):
            rans.Table(np.array(frequencies, np.int32))


def test_lanes_must_fit_the_symbols():
    table = rans.Table(np.array([reference.TOTAL], np.int32))
    for lanes in (0, 4):
        with pytest.raises(MismatchError, match="lanes"):
            rans.encode(np.zeros(3, np.int32), None, [table], lanes)


def test_the_stream_never_changes():
    """Files in the world depend on these words."""
    tables = [rans.Table(np.array([8192, 4096, 3000, 1096], np.int32)), rans.Table(np.array([1, 16383], np.int32))]
    symbols = np.array([0, 1, 2, 3, 0, 0, 1, 1, 3, 3, 2, 0] * 2, np.int32)
    contexts = np.array([0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0] * 2, np.uint8)
    states, words = rans.encode(symbols, contexts, tables, 2)
    assert (states.tolist(), words.tolist()) == GOLDEN


GOLDEN = ([711144, 13233462], [60836, 14216, 53208, 60840])
