"""Batch norms folded into two numbers a channel: in eval mode the network is the same."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from factorpack.nn.folding import fold_batch_norms

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nothing(_name: str) -> bool:
    return False


def filled(norm: nn.Module, seed: int = 0) -> nn.Module:
    """The batch norm as if it had been trained: no number of it is 0 or 1."""
    with torch.no_grad():
        for place, tensor in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            if tensor is not None:
                drawn = rand(*tensor.shape, seed=10 * seed + place)
                tensor.copy_(drawn.exp() if tensor is norm.running_var else drawn + 0.3)
    return norm.eval()


def assert_alone(model: nn.Module, x: Tensor, spared: Callable[[str], bool] = nothing) -> None:
    """Nothing was folded, and nothing has changed."""
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    assert fold_batch_norms(model, spared) == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("axes", BATCH_NORMS)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_outputs_stay_and_running_statistics_become_constants(axes: int, eps: float) -> None:
    norm, x = filled(BATCH_NORMS[axes](5, eps=eps)), rand(3, 5, *(4,) * axes, seed=7)
    expected = norm(x)
    assert fold_batch_norms(norm, nothing) == ("",)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(norm.running_mean, torch.zeros(5))
    assert torch.equal(norm.running_var, torch.ones(5))
    assert norm.weight.requires_grad
    # Folding once more changes no number.
    again = copy.deepcopy(norm)
    fold_batch_norms(again, nothing)
    torch.testing.assert_close(again.weight, norm.weight, rtol=1e-6, atol=0)
    assert torch.equal(again.bias, norm.bias)


def test_the_names_are_those_of_the_modules() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), filled(nn.BatchNorm2d(3)), nn.Sequential(filled(nn.BatchNorm2d(3), 1)))
    model, x = model.eval(), rand(2, 2, 5, 5)
    expected = model(x)
    assert fold_batch_norms(model, nothing) == ("1", "2.0")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["weight", "bias", "running_mean", "running_var"])
def test_one_spared_tensor_spares_its_batch_norm(part: str) -> None:
    model, x = nn.Sequential(filled(nn.BatchNorm1d(4)), filled(nn.BatchNorm1d(4), 1)).eval(), rand(6, 4)
    kept = copy.deepcopy(model[1].state_dict())
    assert fold_batch_norms(model, lambda name: name == f"1.{part}") == ("0",)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model[1].state_dict().items())
    assert_alone(filled(nn.BatchNorm1d(4)), x, lambda name: name == part)


@pytest.mark.parametrize("part", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("by", ["object", "memory"])
def test_shared_tensors_are_left_alone(part: str, by: str) -> None:
    first, second = filled(nn.BatchNorm1d(4)), filled(nn.BatchNorm1d(4), 1)
    if by == "object":
        setattr(second, part, getattr(first, part))
    else:
        getattr(second, part).data = getattr(first, part).data
    assert_alone(nn.Sequential(first, second).eval(), rand(6, 4))


def test_one_batch_norm_at_two_places_is_folded_once() -> None:
    norm, x = filled(nn.BatchNorm1d(4)), rand(6, 4)
    model = nn.Sequential(norm, nn.Tanh(), norm).eval()
    expected = model(x)
    assert fold_batch_norms(model, nothing) == ("0",)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class Own(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean


class Named(nn.BatchNorm1d):
    """Of another class, but with the forward of a batch norm."""


@pytest.mark.parametrize(
    "norm",
    [
        Own(4),
        nn.BatchNorm1d(4, affine=False),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
    ids=["a forward of its own", "no affine", "no running statistics", "instance norm"],
)
def test_what_is_no_plain_batch_norm_is_left_alone(norm: nn.Module) -> None:
    assert_alone(filled(norm), rand(6, 4, 3) if isinstance(norm, nn.InstanceNorm1d) else rand(6, 4))


def test_a_class_that_only_has_another_name_is_folded() -> None:
    norm, x = filled(Named(4)), rand(6, 4)
    expected = norm(x)
    assert fold_batch_norms(norm, nothing) == ("",)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_parametrised_batch_norm_is_left_alone() -> None:
    norm = filled(nn.BatchNorm1d(4))
    parametrize.register_parametrization(norm, "weight", Twice())
    assert_alone(norm, rand(6, 4))


def test_what_is_not_finite_is_left_alone() -> None:
    norm = filled(nn.BatchNorm1d(4))
    norm.running_var[1] = torch.inf
    assert_alone(norm, rand(6, 4))


def test_lazy_ones_are_left_alone() -> None:
    assert fold_batch_norms(nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(2, 2)).eval(), nothing) == ()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_narrow_floats_keep_their_dtype(dtype: torch.dtype, tolerance: float) -> None:
    norm, x = filled(nn.BatchNorm2d(5)).to(dtype), rand(3, 5, 4, 4).to(dtype)
    wide = copy.deepcopy(norm).double()(x.double()).detach()
    assert fold_batch_norms(norm, nothing) == ("",)
    assert norm.weight.dtype == norm.running_var.dtype == dtype
    torch.testing.assert_close(norm(x).double(), wide, rtol=tolerance, atol=tolerance * float(wide.abs().max()))
