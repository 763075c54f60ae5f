"""Reports on files: numbers that agree with file, original and plan; whatever does not belong is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import weight
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import factorpack
from factorpack import MismatchError, Options, TaskError, UnsupportedError
from factorpack.container import Contents, File, read, to_bytes
from factorpack.pipeline import Source
from factorpack.reporting import Subject, measured, original_of
from factorpack.search import pack
from factorpack.task import load_task
from factorpack.tiling import Tiling


@pytest.fixture(scope="module")
def task(digits_task):
    return load_task(str(digits_task.path))


@pytest.fixture(scope="module")
def found(task, digits_file):
    return factorpack.report(digits_file, task.model(), task.calibration(), task.evaluate)


def test_every_byte_of_the_file_is_in_the_report(found, digits_file):
    bill = File(digits_file).bill()
    assert found.size_bytes == digits_file.stat().st_size
    assert sum(found.parts.values()) == found.size_bytes
    assert found.parts == bill.parts
    assert sum(layer.size_bytes for layer in found.layers) + sum(found.shared.values()) == found.size_bytes
    assert [(layer.name, layer.size_bytes) for layer in found.layers] == [(w.name, w.size_bytes) for w in bill.weights]


def test_every_tensor_is_a_layer_or_told_why_not(found, digits_task):
    others = {other.name: other for other in found.others}
    assert {layer.name for layer in found.layers} | others.keys() == set(digits_task.names)
    assert others["head.bias"].kind == "small"
    assert others["head.bias"].why == "one axis"
    assert others["norms.0.num_batches_tracked"].kind == "exact"
    assert others["norms.0.num_batches_tracked"].why.startswith("int64")


def test_codes_are_counted(found, digits_file):
    contents, _ = read(digits_file)
    for layer in found.layers:
        codes = contents.tensors[layer.name].codes.integers
        histogram = layer.histogram
        assert sum(histogram.counts) + histogram.below + histogram.above == codes.size
        assert histogram.counts[-histogram.low] == round(layer.zeros * codes.size) == (codes == 0).sum()


def test_errors_and_scores_are_those_of_the_tensors_loaded_back(found, task, digits_file):
    dense, original = factorpack.load_state_dict(digits_file), task.model().state_dict()
    for layer in found.layers:
        error = (dense[layer.name] - original[layer.name]).square().sum() / original[layer.name].square().sum()
        assert layer.relative_error == pytest.approx(float(error), rel=1e-4)
    assert found.comparison.original == pytest.approx(task.evaluate(task.model()))
    assert found.comparison.scores == pytest.approx(task.evaluate(factorpack.load(digits_file, task.model())))
    assert found.dense_bytes == sum(t.numel() * t.element_size() for t in original.values())


@torch.inference_mode()
def test_losses_are_those_of_networks_with_one_weight_replaced(found, task, digits_file):
    dense, images = factorpack.load_state_dict(digits_file), torch.cat(task.calibration())
    wanted = task.model()(images).log_softmax(-1)
    assert found.comparison.predictions == len(images) == 600
    for layer in found.layers:
        network = task.model()
        network.get_parameter(layer.name).copy_(dense[layer.name])
        loss = F.kl_div(network(images).log_softmax(-1), wanted, log_target=True, reduction="batchmean")
        assert layer.measured_loss.mean == pytest.approx(float(loss), rel=1e-2, abs=1e-7)
    whole = factorpack.load(digits_file, task.model())(images).log_softmax(-1)
    loss = F.kl_div(whole, wanted, log_target=True, reduction="batchmean")
    assert found.comparison.whole_loss.mean == pytest.approx(float(loss), rel=1e-2)
    # Batch norms are folded in the file: all four tensors of one or none may be replaced.
    assert found.comparison.small_loss.mean < found.comparison.whole_loss.mean


def test_embeddings_lose_half_their_squared_distance(task, digits_file):
    batches = task.calibration()[:1]
    found = factorpack.report(digits_file, task.model(), batches, output="embedding")
    with torch.inference_mode():
        distance = factorpack.load(digits_file, task.model())(batches[0]) - task.model()(batches[0])
    assert found.comparison.whole_loss.mean == pytest.approx(float(0.5 * distance.square().sum(1).mean()), rel=1e-3)
    assert sum(layer.predicted_loss for layer in found.layers) > 0
    assert "half squared distance" in found.to_html()


def test_what_is_predicted_is_near_to_what_is_measured(found):
    predicted = sum(layer.predicted_loss for layer in found.layers)
    assert 0.4 < predicted / sum(layer.measured_loss.mean for layer in found.layers) < 2.5
    assert all(layer.met for layer in found.layers)


def test_the_model_is_left_as_it_was(task, digits_file):
    model = task.model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factorpack.report(digits_file, model, task.calibration()[:1], lambda network: float(network.train().training))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_file_alone_tells_of_itself(found, digits_file):
    alone = factorpack.report(digits_file)
    assert alone.comparison is None
    assert alone.parts == found.parts
    assert [layer.histogram for layer in alone.layers] == [layer.histogram for layer in found.layers]
    assert {(layer.relative_error, layer.predicted_loss, layer.measured_loss) for layer in alone.layers} == {
        (None,) * 3
    }
    with pytest.raises(UnsupportedError, match="hand over model too"):
        factorpack.report(digits_file, calibration=[torch.zeros(1)])


def test_a_task_without_data_tells_of_errors_and_scores(task, digits_file):
    found = factorpack.report(digits_file, task.model(), None, task.evaluate)
    assert found.comparison.scores
    assert found.comparison.whole_loss is None
    assert all(layer.relative_error > 0 and layer.predicted_loss is None for layer in found.layers)


def test_bare_weights_tell_of_errors(found, digits_task, digits_file):
    bare = measured(Subject(digits_file, original_of(str(digits_task.weights))))
    assert [layer.relative_error for layer in bare.layers] == [layer.relative_error for layer in found.layers]
    assert not bare.comparison.scores


def test_the_plan_tells_seed_and_command(task, digits_task, tmp_path):
    options = Options("direct", seed=3)
    packed = pack(Source(task.model(), task.calibration()[:1]).state(options), 5000, options, lambda *_: None)
    path = tmp_path / "a file.fpk"
    path.write_bytes(packed.data)
    original = original_of(str(digits_task.path))
    subject = Subject(path, original, packed.plan, tmp_path / "plan.json", tmp_path / "page.html")
    origin = measured(subject).provenance
    assert (origin.seed, origin.rate, origin.behind_prefix) == (3, packed.plan.rate, True)
    compress, report = origin.commands.values()
    assert compress == f"factorpack compress {digits_task.path} --plan {tmp_path}/plan.json --out '{path}'"
    assert report.startswith(f"factorpack report '{path}' --task {digits_task.path} --plan")
    with pytest.raises(MismatchError, match="the plan is of another file"):
        measured(replace(subject, plan=replace(packed.plan, size_bytes=1)))


def test_the_calibration_is_known_by_its_hash(found, task, digits_file):
    again = factorpack.report(digits_file, task.model(), task.calibration(), task.evaluate)
    assert again.to_html() == found.to_html()
    assert found.provenance.calibration_batches == 6
    other = factorpack.report(digits_file, task.model(), task.calibration()[:5]).provenance
    assert len({found.provenance.calibration_sha256, other.calibration_sha256}) == 2


def test_the_numbers_are_json(found):
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert sum(data["parts"].values()) == data["size_bytes"] == found.size_bytes
    assert data["layers"][0]["measured_loss"].keys() == {"mean", "error"}
    alone = replace(found.layers[0], relative_error=math.inf)
    assert replace(found, layers=(alone,)).to_dict()["layers"][0]["relative_error"] is None


def test_another_network_is_refused_and_other_weights_are_told_of(found, task, digits_task, digits_file, tmp_path):
    with pytest.raises(MismatchError, match="the file is for another model"):
        factorpack.report(digits_file, nn.Linear(3, 4), [torch.zeros(1, 3)])
    tensors = load_file(digits_task.weights)
    del tensors["head.weight"]
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match="'head.weight' is .* and missing in other"):
        measured(Subject(digits_file, original_of(str(tmp_path / "other.safetensors"))))
    untrained = type(task.model())().eval()
    assert factorpack.report(digits_file, untrained).comparison.unlike
    assert not found.comparison.unlike
    with pytest.raises(TaskError, match="output is 'classes'"):
        factorpack.report(digits_file, untrained, output="classes")


def test_weights_kept_exactly_are_told_apart(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    model.register_buffer("none", torch.zeros(0))
    with torch.no_grad():
        model[2].weight = model[1].weight
    factorpack.compress(model, 4000, options=Options("direct", exclude=("0.weight",))).save(tmp_path / "a.fpk")
    found = factorpack.report(tmp_path / "a.fpk", model)
    why = {other.name: other.why for other in found.others}
    assert why["0.weight"] == "asked for (--exclude)"
    assert why["phase"].startswith("complex64")
    assert why["mask"].startswith("not finite")
    assert why["none"] == "no entries"
    assert why["2.weight"] == "the same tensor as 1.weight"
    assert found.layers[0].aliases == ("2.weight",)


def test_a_tied_weight_is_replaced_under_all_its_names(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).eval()
    model[2].weight = model[0].weight
    batches = [torch.randn(200, 16)]
    tensors = {name: model.state_dict()[name].numpy() for name in ("0.bias", "2.bias")}
    tensors["0.weight"] = weight(np.random.default_rng(0), "direct", Tiling((16, 16)))
    contents = Contents(tensors, dict.fromkeys((*tensors, "2.weight"), "float32"), {"2.weight": "0.weight"})
    (tmp_path / "a.fpk").write_bytes(to_bytes(contents))
    (layer,) = factorpack.report(tmp_path / "a.fpk", model, batches).layers
    found = factorpack.load_state_dict(tmp_path / "a.fpk")["0.weight"]
    hidden = torch.tanh(F.linear(batches[0], found, model[0].bias))
    with torch.inference_mode():
        logs, wanted = F.linear(hidden, found, model[2].bias).log_softmax(-1), model(batches[0]).log_softmax(-1)
    assert layer.measured_loss.mean == pytest.approx(
        float(F.kl_div(logs, wanted, log_target=True, reduction="batchmean")), rel=1e-3
    )
