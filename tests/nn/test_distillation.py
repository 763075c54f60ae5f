"""What a network is held to: values against the formulas, and what blocks are."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from torch import nn

from factorpack.nn.distillation import (
    blocks,
    embedding_loss,
    features_loss,
    logits_loss,
    squares_loss,
    temperature_for,
    watched,
)


def test_logits_are_compared_by_their_divergence() -> None:
    rng = np.random.default_rng(0)
    found, expected = rng.normal(size=(2, 3, 4, 7))
    wanted = np.mean(entropy(softmax(expected, -1), softmax(found, -1), axis=-1))
    assert logits_loss(torch.tensor(found), torch.tensor(expected)).item() == pytest.approx(wanted, rel=1e-5)
    assert logits_loss(torch.tensor(found) + 3, torch.tensor(found)).item() == pytest.approx(0, abs=1e-6)


def test_a_divergence_at_a_temperature_is_that_of_softer_distributions() -> None:
    rng = np.random.default_rng(0)
    found, expected = rng.normal(size=(2, 6, 7)) * 10
    wanted = 9 * np.mean(entropy(softmax(expected / 3, -1), softmax(found / 3, -1), axis=-1))
    assert logits_loss(torch.tensor(found), torch.tensor(expected), 3.0).item() == pytest.approx(wanted, rel=1e-5)


def test_the_temperature_is_the_highest_at_which_the_original_is_sure() -> None:
    rng = np.random.default_rng(0)
    logits = 10 * rng.normal(size=(2, 50, 10))

    def top(temperature: float) -> float:
        return float(softmax(logits / temperature, -1).max(-1).mean())

    found = temperature_for([torch.tensor(batch) for batch in logits])
    assert 1 < found < 4
    assert top(found) >= 0.8 > top(found * 2 ** (1 / 8))
    assert temperature_for([torch.tensor(batch) for batch in 100 * logits]) == 4
    assert temperature_for([torch.tensor(batch) for batch in logits / 10]) == 1
    assert temperature_for([]) == 1


def test_logits_can_be_compared_by_their_squares() -> None:
    rng = np.random.default_rng(0)
    found, expected = rng.normal(size=(2, 5, 7))
    one, other = (rows - rows.mean(-1, keepdims=True) for rows in (found, expected))
    wanted = np.mean((one - other) ** 2) / np.mean(other**2)
    assert squares_loss(torch.tensor(found), torch.tensor(expected)).item() == pytest.approx(wanted, rel=1e-5)
    assert squares_loss(torch.tensor(found) + 3, torch.tensor(found)).item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(squares_loss(torch.ones(2, 3), torch.ones(2, 3)))


def test_embeddings_are_compared_by_their_angles() -> None:
    rng = np.random.default_rng(0)
    found, expected = rng.normal(size=(2, 5, 8))
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (found, expected))
    wanted = np.mean(1 - (one * other).sum(1)) + 10 * np.mean((one @ one.T - other @ other.T) ** 2)
    assert embedding_loss(torch.tensor(found), torch.tensor(expected)).item() == pytest.approx(wanted, rel=1e-5)
    assert embedding_loss(torch.tensor(7 * found), torch.tensor(found)).item() == pytest.approx(0, abs=1e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.inner(x), None


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.blocks = nn.ModuleList([nn.ModuleList([Block(), Block()]), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in (*self.blocks[0], self.blocks[1]):
            x, _ = block(x)
        return x


def test_blocks_are_the_repeated_parts_that_are_made_of_parts() -> None:
    network = Stack()
    assert set(blocks(network)) == {*network.blocks[0], network.blocks[1]}
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []


def test_what_blocks_give_out_is_seen_in_their_order_and_only_meanwhile() -> None:
    network, x = Stack(), torch.randn(3, 4)
    with watched(blocks(network)) as outputs:
        last = network(x)
    assert len(outputs) == 3
    torch.testing.assert_close(outputs[-1], last)
    network(x)
    assert len(outputs) == 3


def test_features_count_by_their_relative_error() -> None:
    one, other = torch.full((2, 2), 3.0), torch.full((3,), -2.0)
    assert features_loss([one * 1.1, other * 0.8], [one, other]).item() == pytest.approx((0.01 + 0.04) / 2, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_features_have_the_gradient_of_their_relative_error(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    found, expected = torch.randn((2, 4, 3, 5, 5), generator=generator).to(dtype)
    found.requires_grad_()
    features_loss([found], [expected]).backward()
    wide = found.detach().double().requires_grad_()
    wanted = (wide - expected.double()).square().sum() / expected.double().square().sum()
    wanted.backward()
    assert found.grad is not None
    assert found.grad.dtype == dtype
    rounding = 1e-6 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    largest = float(wide.grad.abs().max())
    torch.testing.assert_close(found.grad.double(), wide.grad, rtol=rounding, atol=rounding * largest)


def test_padding_does_not_count_in_features() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    other = torch.randn(2, 3, 4)
    one = torch.where(mask[..., None].bool(), other * 1.1, 100.0)
    assert features_loss([one], [other], mask).item() == pytest.approx(0.01, rel=1e-4)
    pooled = torch.full((2, 4), 3.0)
    assert features_loss([pooled * 0.9], [pooled], mask).item() == pytest.approx(0.01, rel=1e-4)
