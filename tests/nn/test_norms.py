"""Batch norms by batches: the function is the file's where moments are, and stays what it is when they are measured."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from digits import Network, data
from torch import Tensor, nn

import factorpack
from factorpack.container import Contents, read
from factorpack.nn.loading import place_dense
from factorpack.nn.norms import NormByBatch, Norms
from factorpack.nn.trainable import TrainableModel
from factorpack.task import load_task
from factorpack.trained import trainable_of

BATCH = data()[0][:200]


@pytest.fixture(scope="module")
def contents(digits_task, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    task = load_task(str(digits_task.path))
    path: Path = tmp_path_factory.mktemp("files") / "small.fpk"
    factorpack.compress(task.model(), 3000, task.calibration()).save(path)
    return read(path)[0]


def measured(model: nn.Module) -> Callable[[], None]:
    return lambda: model(BATCH)


def at_rest(model: TrainableModel) -> Tensor:
    """What the network of the file gives that the model would be."""
    network = place_dense(Network(), model.factored(), model.dtypes, model.aliases).eval()
    with torch.no_grad():
        return network(BATCH)


def moved(model: TrainableModel) -> None:
    """Half of the codes of each layer moved by a step, always to the same side."""
    with torch.no_grad():
        for name, latent in model.trained().items():
            if name.startswith("convolutions"):
                latent.codes.view(-1)[::2] += 1


@torch.no_grad()
def test_where_the_moments_are_those_of_the_batch_nothing_changes(contents: Contents) -> None:
    model = trainable_of(Network(), contents)
    before = model(BATCH)
    norms = Norms(model, measured(model))
    assert sorted(norms.placed) == ["norms.0", "norms.1", "norms.2"]
    torch.testing.assert_close(model(BATCH), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_moments_of_inputs_do_not_matter(contents: Contents) -> None:
    model = trainable_of(Network(), contents)
    norms = Norms(model, measured(model))
    norm = norms.placed["norms.0"]
    inputs = torch.randn(300, 16, 2, 2)
    torch.testing.assert_close(norm(3 * inputs - 7), norm(inputs), rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_settling_keeps_the_function_that_was_trained_in_the_file(contents: Contents) -> None:
    model = trainable_of(Network(), contents)
    norms = Norms(model, measured(model))
    moved(model)
    trained, lagging = model(BATCH), at_rest(model)
    norms.settle(measured(model))
    scale = trained.std()
    assert (lagging - trained).std() > 0.3 * scale
    # The two numbers a channel are rounded anew.
    assert (model(BATCH) - trained).std() < 0.03 * scale
    assert (at_rest(model) - trained).std() < 0.03 * scale


@torch.no_grad()
def test_small_batches_go_by_the_file(contents: Contents) -> None:
    model = trainable_of(Network(), contents)
    before = model(BATCH[:2])
    Norms(model, measured(model))
    torch.testing.assert_close(model(BATCH[:2]), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_norms_that_are_left_are_those_of_the_file(contents: Contents) -> None:
    model = trainable_of(Network(), contents)
    before = model(BATCH[:150])
    norms = Norms(model, measured(model))
    norms.leave()
    torch.testing.assert_close(model(BATCH[:150]), before, rtol=1e-4, atol=1e-4)
    assert not norms.placed


def test_a_silent_channel_can_wake_up(contents: Contents) -> None:
    model = trainable_of(Network(), contents)
    latent = model.trained()["convolutions.0.weight"]
    with torch.no_grad():
        latent.codes.zero_()
    Norms(model, measured(model))
    found = model(BATCH)
    assert found.isfinite().all()
    found.square().mean().backward()
    assert latent.codes.grad.isfinite().all()
    assert latent.codes.grad.any()


@torch.no_grad()
def test_a_state_is_taken_up(contents: Contents) -> None:
    first, second = trainable_of(Network(), contents), trainable_of(Network(), contents)
    norms, others = Norms(first, measured(first)), Norms(second, measured(second))
    moved(first)
    norms.settle(measured(first))
    second.latents.load_state_dict(first.latents.state_dict())
    others.take_up(norms.state())
    assert torch.equal(first(BATCH), second(BATCH))
    others.take_up({"norms.1": norms.state()["norms.1"]})
    assert list(others.placed) == ["norms.1"]
    assert isinstance(second.network.norms[0], nn.BatchNorm2d)


class Twice(Network):
    """Calls a batch norm twice, and has one with few values."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.norms[0](self.convolutions[0](x)))
        x = self.norms[1](self.convolutions[1](x)).amax((2, 3), keepdim=True)
        return self.head(self.norms[2](self.convolutions[2](x)).flatten(1).repeat(1, 4))


@torch.no_grad()
def test_norms_without_moments_of_their_own_stay(contents: Contents) -> None:
    model = trainable_of(Twice(), contents)
    norms = Norms(model, measured(model))
    # One is called twice, one has 200 values a channel.
    assert list(norms.placed) == ["norms.1"]
    assert isinstance(model.network.norms[1], NormByBatch)
    assert isinstance(model.network.norms[0], nn.BatchNorm2d)
    plain = trainable_of(Network().train(), contents)
    for norm in plain.network.norms:
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    assert not Norms(plain, measured(plain)).placed
