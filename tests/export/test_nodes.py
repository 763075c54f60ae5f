"""Recombination by standard nodes: onnxruntime gives the tensors that the factors mean, of every form."""

import laws
import numpy as np
import onnx_ir
import onnxruntime
import pytest

from factorpack.export.chain import Chain
from factorpack.export.lookups import has_rows, looked_up
from factorpack.export.weights import recombined, vector
from factorpack.factors import Basis, Codes, FactoredVector, FactoredWeight, Grid, OneHotCodes
from factorpack.tiling import Tiling

MODES = pytest.mark.parametrize("stream", [False, True], ids=["fold", "stream"])


def graph_of(chains, outputs, inputs=()):
    graph = onnx_ir.Graph(
        inputs, outputs, nodes=[node for chain in chains for node in chain.nodes],
        initializers=[value for chain in chains for value in chain.initializers], opset_imports={"": 21}, name="law",
    )  # fmt: skip
    return onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)).SerializeToString()


def results(data, **inputs):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options).run(None, inputs)


def assert_close(found, expected, what):
    assert found.shape == expected.shape, what
    assert found.dtype == np.float32
    assert np.abs(found - expected).max(initial=0) <= 1e-6 * np.abs(expected).max(initial=0), what


def wide(rng, form, tiling):
    """A weight a few of whose codes are far larger than the others."""
    weight = laws.weight(rng, form, tiling, "rows", "columns")
    codes = weight.codes.integers.copy()
    codes[rng.random(codes.shape) < 0.05] = 3000
    return FactoredWeight(form, tiling, weight.basis, Codes(codes, Grid(-4096, 4095, weight.codes.grid.exponents)))


def all_weights():
    rng = np.random.default_rng(1)
    yield from laws.weights()
    for name, tiling in (("linear", Tiling((60, 70))), ("along inputs", Tiling((60, 70), depth=70))):
        yield from ((f"{form}, wide; {name}", wide(rng, form, tiling)) for form in ("direct", "sparse_pca", "svd"))


def made(weights, build):
    chains, values = [], []
    for place, weight in enumerate(weights):
        chain = Chain(f"w{place}", stream=build.get("stream", True))
        value = build["make"](chain, weight)
        # Every output has a name of its own, that of an initialiser is no output.
        value = chain.op("Identity", value)
        value.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        chains.append(chain)
        values.append(value)
    return chains, values


@MODES
def test_every_form_gives_its_tensor(stream):
    weights = dict(all_weights())
    assert len(weights) > 200
    chains, values = made(weights.values(), {"make": recombined, "stream": stream})
    for (name, weight), found in zip(weights.items(), results(graph_of(chains, values)), strict=True):
        assert_close(found, weight.tensor(), name)


def test_rows_are_those_of_the_whole_table():
    weights = {name: weight for name, weight in all_weights() if has_rows(weight) and weight.shape[0] > 6}
    assert {weight.form for weight in weights.values()} == {"direct", "sparse_pca", "svd", "vq"}
    places = np.array([[0, 5, 0], [6, 3, 1]])
    rows = onnx_ir.Value(name="rows", shape=onnx_ir.Shape(["a", "b"]), type=onnx_ir.TensorType(onnx_ir.DataType.INT64))
    chains, values = made(weights.values(), {"make": lambda chain, weight: looked_up(chain, weight, rows)})
    found = results(graph_of(chains, values, [rows]), rows=places)
    for (name, weight), part in zip(weights.items(), found, strict=True):
        assert_close(part, weight.tensor()[places], name)


def test_small_tensors_are_the_same():
    rng = np.random.default_rng(0)
    smalls = [laws.vector(rng, shape, logarithmic) for shape in ((500,), (3, 200)) for logarithmic in (False, True)]
    smalls += [FactoredVector((400,), np.zeros(400, np.int32), -7, 3, False)]
    chains, values = made(smalls, {"make": vector})
    for small, found in zip(smalls, results(graph_of(chains, values)), strict=True):
        np.testing.assert_allclose(found, small.tensor(), rtol=3e-7)


def test_small_tensors_that_nodes_would_make_larger_stay_floats():
    small = laws.vector(np.random.default_rng(0), (20,), False)
    assert vector(Chain("w", stream=False), small) is None


@MODES
def test_most_codes_take_four_bits_and_the_others_are_scattered(stream):
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (200, 300)).astype(np.int32)
    codes[rng.random(codes.shape) < 0.01] = 100
    weight = FactoredWeight(
        "direct", Tiling((200, 300)), Basis(None, Grid(-2, 1, np.zeros(1, np.int32))),
        Codes(codes, Grid(-128, 127, np.zeros(1, np.int32))),
    )  # fmt: skip
    chain = Chain("w", stream)
    recombined(chain, weight)
    assert chain.initializers[0].dtype.name == "INT4"
    assert sum(value.const_value.nbytes for value in chain.initializers) < weight.tensor().nbytes / 7
    assert [node.op_type for node in chain.nodes].count("ScatterElements") == 1


def test_codes_of_many_bits_take_whole_bytes():
    codes = np.random.default_rng(0).integers(-100, 101, (64, 64)).astype(np.int32)
    grid = Grid(-128, 127, np.zeros(1, np.int32))
    weight = FactoredWeight("direct", Tiling((64, 64)), Basis(None, Grid(-2, 1, grid.exponents)), Codes(codes, grid))
    chain = Chain("w", stream=False)
    recombined(chain, weight)
    assert chain.initializers[0].dtype.name == "INT8"
    assert [node.op_type for node in chain.nodes] == ["Cast"], "a step of one needs no product"


def test_codewords_are_gathered():
    weight = laws.weight(np.random.default_rng(0), "vq", Tiling((12, 20), depth=4))
    assert isinstance(weight.codes, OneHotCodes)
    chain = Chain("w", stream=False)
    recombined(chain, weight)
    assert "Gather" in [node.op_type for node in chain.nodes]
    assert "MatMul" not in [node.op_type for node in chain.nodes]
