"""Losses of weights alone: closed forms, slow ways to the same number, and a network that is left as it was."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from factorpack.evaluate.losses import PASSES, PREDICTIONS, Probe, divergence, relative_error, replaced


class Tied(nn.Module):
    """Two names of one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_the_relative_error_is_the_squared_distance_over_the_power():
    weight = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_error(weight, torch.zeros(2, 2)) == 1
    assert relative_error(weight, torch.tensor([[3.0, 1.0], [0.0, 4.0]])) == pytest.approx(1 / 25)
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_error(torch.zeros(2, 2), weight) == math.inf


def test_the_divergence_of_logits_is_that_of_kullback_and_leibler():
    found, expected = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    rows = divergence(found, expected, "logits")
    assert rows.shape == (3,)
    reference = F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert torch.allclose(rows, reference)
    assert not divergence(expected, expected + 7, "logits").abs().gt(1e-12).any()
    # A class that is masked out on both sides costs nothing.
    masked = torch.tensor([[0.0, 1.0, -math.inf]])
    assert float(divergence(masked, masked, "logits")) == 0


def test_the_divergence_of_unit_embeddings_is_one_minus_their_cosine():
    found, expected = F.normalize(torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    assert torch.allclose(divergence(found, expected, "embedding"), 1 - (found * expected).sum(-1))


@torch.no_grad()
def test_a_loss_alone_is_what_a_copy_with_that_weight_loses():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [torch.randn(70, 6), torch.randn(80, 6), torch.randn(90, 6)]
    probe = Probe(model, batches, "logits", PASSES)
    assert (len(probe.batches), probe.predictions) == (2, 150)
    weight = before["0.weight"] + 0.1
    found = probe.loss({"0.weight": weight})
    losses = []
    for x in torch.cat(batches[:2]):
        wanted = model(x).softmax(-1)
        other = (model[2].weight @ torch.tanh(weight @ x + model[0].bias) + model[2].bias).softmax(-1)
        losses.append(float((wanted * (wanted / other).log()).sum()))
    losses = torch.tensor(losses, dtype=torch.float64)
    assert found.mean == pytest.approx(float(losses.mean()), rel=1e-3)
    assert found.error == pytest.approx(float(losses.std() / 150**0.5), rel=1e-3)
    assert probe.loss({}).mean == pytest.approx(0, abs=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_few_weights_are_looked_at_on_more_batches():
    model = nn.Linear(2, 3)
    batches = [torch.randn(PREDICTIONS, 2) for _ in range(10)]
    assert len(Probe(model, batches, "logits", PASSES).batches) == 1
    assert len(Probe(model, batches, "logits", PASSES // 4).batches) == 4
    assert len(Probe(model, batches, "logits", 1).batches) == 10
    assert Probe(model, [torch.randn(1, 2)], "logits", 1).loss({}).error == math.inf


def test_tied_weights_are_replaced_and_put_back_under_both_names():
    model = Tied()
    before = model.first.weight.detach().clone()
    with replaced(model, {"first.weight": before + 1, "second.weight": before + 1}):
        assert torch.equal(model.second.weight, before + 1)
    assert torch.equal(model.first.weight, before)
    with pytest.raises(RuntimeError, match="stop"), replaced(model, {"first.weight": before + 1}):
        raise RuntimeError("stop")
    assert torch.equal(model.second.weight, before)
