"""From a model to a file and back, on a network that was really trained."""

import os
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import factorpack
from factorpack import BudgetError, MismatchError, Options, UnsupportedError
from factorpack.container import read
from factorpack.solve import layer as layer_module
from factorpack.task import load_task

SIX_BITS = 11_600
"""Of the digits network: 15,418 parameters."""


@pytest.fixture(scope="module")
def task(digits_task):
    return load_task(str(digits_task.path))


@pytest.fixture(scope="module")
def packed(task):
    return factorpack.compress(task.model(), SIX_BITS, task.calibration(), task.evaluate)


def shares(bill) -> dict[str, float]:
    """Parts of the weights of more than 1,000 entries by form."""
    large = [(weight.form, prod(weight.shape)) for weight in bill.weights if prod(weight.shape) > 1000]
    total = sum(size for _, size in large)
    return {form: sum(size for named, size in large if named == form) / total for form, _ in large}


def test_the_file_keeps_its_size_and_the_score(packed, digits_task, tmp_path):
    report = packed.report
    packed.save(tmp_path / "model.fpk")
    assert report.size_bytes == len(packed.data) == (tmp_path / "model.fpk").stat().st_size
    assert 0.99 * SIX_BITS <= report.size_bytes <= SIX_BITS
    assert sum(report.bill.parts.values()) == report.size_bytes
    assert report.ratio == pytest.approx(digits_task.size_bytes / report.size_bytes)
    assert digits_task.scores["accuracy"] > 95
    # Measured on one run: not a single class more is wrong, and the loss is the same to 0.001 nats.
    assert report.scores["accuracy"] > digits_task.scores["accuracy"] - 1.5
    assert report.scores["minus_nats"] > digits_task.scores["minus_nats"] - 0.02
    assert report.seconds > 0
    assert report.evaluation_seconds > 0
    assert report.distortion > 0
    assert report.unseen == ()


def test_the_report_tells_the_distance_to_the_gaussian_limit(packed, task):
    report = packed.report
    entries = sum(prod(weight.shape) for weight in report.bill.weights)
    stored = sum(weight.size_bytes for weight in report.bill.weights)
    assert report.bits_per_weight == pytest.approx(8 * stored / entries)
    # Uniform steps alone cost a quarter of a bit; the tables of a network as small as this one cost more.
    assert 0.25 < report.bits_per_weight - report.gaussian_bits_per_weight < 1.5
    without = factorpack.compress(task.model(), 8000).report
    assert without.bits_per_weight is without.gaussian_bits_per_weight is None


def test_weights_that_lose_nothing_have_no_gaussian_reference():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5, -0.5]).repeat(8, 8))

        def forward(self, inputs):
            return inputs @ self.weight.T

    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    report = factorpack.compress(Halves(), 100_000, [inputs], output="embedding").report
    assert report.distortion == 0
    assert report.bits_per_weight > 0
    assert report.gaussian_bits_per_weight is None


def test_a_third_of_that_still_knows_the_digits(task):
    report = factorpack.compress(task.model(), 4000, task.calibration(), task.evaluate).report
    assert 3960 <= report.size_bytes <= 4000
    assert report.scores["accuracy"] > 95


def test_the_reported_scores_are_those_of_the_loaded_file(packed, task, tmp_path):
    packed.save(tmp_path / "model.fpk")
    assert task.evaluate(factorpack.load(tmp_path / "model.fpk", task.model())) == packed.report.scores


def test_a_single_score_is_called_score(task):
    report = factorpack.compress(task.model(), 8000, evaluate=lambda _: 0.5).report
    assert report.scores == {"score": 0.5}


def test_the_model_is_left_as_it_was(task):
    model = task.model().train()
    model.head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [parameter.requires_grad for parameter in model.parameters()]
    factorpack.compress(model, 8000, task.calibration(), task.evaluate)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert model.head.training


def test_bytes_depend_on_nothing_but_the_question(task, digits_task, digits_file, tmp_path):
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(number)
            found.append(factorpack.compress(task.model(), 8000, task.calibration()).data)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    code = "from factorpack.cli import main; main()"
    source = str(Path(factorpack.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", code, "compress", str(digits_task.path), "--size", "8000", "--out", "second.fpk"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "2"}, check=True, capture_output=True,
    )  # fmt: skip
    assert found[0] == found[1] == digits_file.read_bytes() == (tmp_path / "second.fpk").read_bytes()


def test_every_way_to_load_gives_the_same_network(task, digits_file):
    dense = factorpack.load(digits_file, task.model())
    packed = factorpack.load(digits_file, task.model(), mode="on-the-fly")
    tensors = factorpack.load_state_dict(digits_file)
    images = task.calibration()[0]
    with torch.inference_mode():
        torch.testing.assert_close(packed(images), dense(images), rtol=1e-5, atol=1e-5)
    assert not isinstance(packed.convolutions[1].weight, nn.Parameter)
    state = dense.state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name
    assert tensors["norms.0.num_batches_tracked"] == task.model().norms[0].num_batches_tracked


def test_an_open_file_gives_each_tensor_as_it_is_asked_for(digits_file):
    tensors, opened = factorpack.load_state_dict(digits_file), factorpack.open_file(digits_file)
    assert list(opened) == list(tensors)
    for name, tensor in tensors.items():
        assert opened.shapes[name] == tuple(tensor.shape)
        assert opened.dtypes[name] == str(opened[name].dtype).removeprefix("torch.")
        assert opened[name].dtype == tensor.dtype
        assert torch.equal(opened[name], tensor), name
    assert "weight" not in opened
    with pytest.raises(KeyError):
        opened["weight"]


def test_a_mode_that_does_not_exist_is_refused(task, digits_file):
    with pytest.raises(UnsupportedError, match="'sparse' is no mode: choose dense or on-the-fly"):
        factorpack.load(digits_file, task.model(), mode="sparse")


def test_a_file_of_another_model_is_refused(digits_file):
    with pytest.raises(MismatchError, match="the file is for another model"):
        factorpack.load(digits_file, nn.Linear(3, 4))


@pytest.mark.parametrize("form", ["direct", "sparse_pca", "svd", "vq", "separable"])
def test_every_form_gives_a_file_that_works(task, form, tmp_path):
    found = factorpack.compress(task.model(), 8000, task.calibration(), task.evaluate, options=Options(form))
    assert found.report.size_bytes <= 8000
    assert shares(found.report.bill)[form] >= 0.9
    assert found.report.scores["accuracy"] > 95
    found.save(tmp_path / "model.fpk")
    assert factorpack.load_state_dict(tmp_path / "model.fpk").keys() == task.model().state_dict().keys()


class Linear(nn.Module):
    """One layer of 1,152 weights of falling importance."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(96, 12, generator=generator) * torch.logspace(0, -1, 12))

    def forward(self, x):
        return F.linear(x, self.weight)


@pytest.mark.parametrize("form", ["direct", "sparse_pca", "svd", "vq"])
def test_projected_gradients_give_a_file_of_their_form(form, monkeypatch, tmp_path):
    # One rung of the ladder instead of twelve: they take seconds each.
    monkeypatch.setattr(layer_module, "SPARSITIES", (0.3,))
    monkeypatch.setattr(layer_module, "RANKS", (1.0,))
    monkeypatch.setattr(layer_module, "CODEWORDS", ((2, 32),))
    model, batches = Linear(), [torch.randn(64, 12, generator=torch.Generator().manual_seed(1))]
    packed = factorpack.compress(model, 2000, batches, options=Options(form, "projected-gradient"))
    assert packed.report.size_bytes <= 2000
    assert shares(packed.report.bill) == {form: 1.0}
    packed.save(tmp_path / "model.fpk")
    found = factorpack.load(tmp_path / "model.fpk", Linear())
    error = (found.weight - model.weight).square().sum() / model.weight.square().sum()
    assert error < 0.25


def test_a_size_that_cannot_be_met_is_told_with_one_that_can(task):
    with pytest.raises(BudgetError, match=r"^300 bytes cannot be met: the smallest file") as caught:
        factorpack.compress(task.model(), 300, task.calibration())
    smallest = int(str(caught.value).split(" takes ")[1].split()[0].replace(",", ""))
    assert 300 < smallest < 1000
    assert factorpack.compress(task.model(), smallest, task.calibration()).report.size_bytes <= smallest


def test_without_data_it_works_too(task):
    report = factorpack.compress(task.model(), SIX_BITS, evaluate=task.evaluate).report
    assert 0.99 * SIX_BITS <= report.size_bytes <= SIX_BITS
    assert report.scores["accuracy"] > 95
    assert report.unseen == ()


def test_what_is_excluded_stays_bit_exact(task, tmp_path):
    model = task.model()
    packed = factorpack.compress(
        model, 14_000, task.calibration(), options=Options(exclude=("head.*", "*running_mean"))
    )
    packed.save(tmp_path / "model.fpk")
    assert 13_860 <= packed.report.size_bytes <= 14_000
    found, original = factorpack.load_state_dict(tmp_path / "model.fpk"), model.state_dict()
    for name, tensor in original.items():
        kept = name.startswith("head.") or name.endswith("running_mean") or not tensor.is_floating_point()
        assert torch.equal(found[name], tensor) or not kept, name
    assert not torch.equal(found["convolutions.1.weight"], original["convolutions.1.weight"])
    assert "head.weight" not in packed.report.plan.layers


def test_a_pattern_that_fits_nothing_is_refused(task):
    with pytest.raises(MismatchError, match=r"'tail\.\*' fits no tensor"):
        factorpack.compress(task.model(), 8000, options=Options(exclude=("tail.*",)))


class TiedModel(nn.Module):
    """A language model of one layer, whose head is its embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(150, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 150, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(torch.tanh(self.mix(x.cumsum(1))))


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    model = TiedModel()
    batches = torch.randint(0, 150, (4, 2, 20), generator=torch.Generator().manual_seed(0)).unbind(0)
    packed = factorpack.compress(model, 2500, batches)
    packed.save(tmp_path / "model.fpk")
    assert {weight.name for weight in packed.report.bill.weights} == {"embedding.weight", "mix.weight"}
    assert packed.report.ratio == pytest.approx(4 * (150 * 16 + 16 * 16 + 16) / packed.report.size_bytes)
    contents, _ = read(tmp_path / "model.fpk")
    assert contents.aliases == {"head.weight": "embedding.weight"}
    tensors = factorpack.load_state_dict(tmp_path / "model.fpk")
    assert tensors["head.weight"] is tensors["embedding.weight"]
    for mode in ("dense", "on-the-fly"):
        found = factorpack.load(tmp_path / "model.fpk", TiedModel(), mode)
        assert torch.equal(found.head.weight, tensors["embedding.weight"])
        assert torch.equal(found.embedding.weight, tensors["embedding.weight"])
    found = factorpack.load(tmp_path / "model.fpk", TiedModel())
    assert found.head.weight is found.embedding.weight
    error = (tensors["embedding.weight"] - model.embedding.weight).square().mean() / model.embedding.weight.var()
    assert error < 0.05


def test_a_network_that_returns_embeddings_keeps_their_directions(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.Tanh(), nn.Linear(64, 16))
    inputs = torch.randn(400, 24, generator=torch.Generator().manual_seed(1))
    inputs[:, 12:] *= 0.1

    def likeness(network: nn.Module) -> float:
        with torch.inference_mode():
            return float(F.cosine_similarity(network(inputs[200:]), model(inputs[200:])).mean())

    report = factorpack.compress(model, 1700, inputs[:200].split(50), likeness, output="embedding").report
    assert 1683 <= report.size_bytes <= 1700
    assert report.scores["score"] > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_come_back(dtype, tmp_path):
    model = nn.Linear(16, 40).to(dtype)
    factorpack.compress(model, 900).save(tmp_path / "model.fpk")
    tensors = factorpack.load_state_dict(tmp_path / "model.fpk")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert np.corrcoef(tensors["weight"].double().ravel(), model.weight.detach().double().ravel())[0, 1] > 0.98


class SharedMemory(nn.Module):
    """Two parameters of their own over one memory: a usual way to tie a head to an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = nn.Parameter(self.embedding.weight)

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def test_parameters_that_share_memory_are_stored_once_and_load_back(tmp_path):
    tokens = torch.randint(40, (8, 6), generator=torch.Generator().manual_seed(0))
    packed = factorpack.compress(SharedMemory().eval(), 2000, [tokens])
    assert len(packed.report.bill.weights) == 1
    packed.save(tmp_path / "m.fpk")
    loaded = factorpack.load(tmp_path / "m.fpk", SharedMemory())
    assert loaded.head.weight.data_ptr() == loaded.embedding.weight.data_ptr()


def test_faults_of_the_caller_are_told_without_a_stack_of_torch():
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 10))
    with pytest.raises(factorpack.TaskError, match="it must be one of"):
        factorpack.compress(model, 4000, [torch.randn(4, 12)], output="logit")
    with pytest.raises(factorpack.TaskError, match="batch 1"):
        factorpack.compress(model, 4000, [torch.randn(4, 13)])
    with pytest.raises(factorpack.TaskError, match="not finite"):
        factorpack.compress(model, 4000, [torch.full((4, 12), torch.nan)])
    with pytest.raises(UnsupportedError, match="no values"):
        factorpack.compress(nn.Linear(12, 20, device="meta"), 4000)


def test_notebooks_get_a_table(packed):
    html = packed.report._repr_html_()
    rows = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", html))
    assert rows["file"] == f"{packed.report.size_bytes:,} bytes, {packed.report.ratio:.1f} times smaller"
    assert rows["accuracy"] == f"{packed.report.scores['accuracy']:.4g}"
    largest = max(packed.report.bill.weights, key=lambda weight: weight.size_bytes)
    first = list(rows)[1 + len(packed.report.scores)]
    assert first == largest.name
    assert rows[first].startswith(f"{largest.size_bytes:,} bytes, ")


def test_names_of_strangers_are_no_html():
    network = nn.Sequential()
    network.add_module("<b>&", nn.Linear(12, 20))
    html = factorpack.compress(network, 2000).report._repr_html_()
    assert "&lt;b&gt;&amp;.weight" in html
    assert "<b>" not in html


def test_bars_are_shown_where_they_are_asked_for(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    network = nn.Linear(12, 20)
    batches = [torch.randn(4, 12, generator=torch.Generator().manual_seed(place)) for place in range(3)]
    quiet = factorpack.compress(network, 2000, batches)
    assert capfd.readouterr() == ("", "")
    shown = factorpack.compress(network, size=2000, calibration=batches, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "calibration" in err
    assert "3/3" in err
    assert shown.data == quiet.data
