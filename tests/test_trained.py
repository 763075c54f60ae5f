"""From a file to a network that can be trained, and back to a file."""

from pathlib import Path

import pytest
import torch
from digits import Network, data
from torch.nn import functional as F

import factorpack
from factorpack.options import Options
from factorpack.task import Task, load_task


@pytest.fixture(scope="module")
def task(digits_task) -> Task:
    return load_task(str(digits_task.path))


@pytest.fixture(scope="module", params=["auto", "sparse_pca", "svd", "vq"])
def file(request: pytest.FixtureRequest, task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / f"{request.param}.fpk"
    packed = factorpack.compress(task.model(), 6000, task.calibration(), options=Options(request.param))
    packed.save(path)
    return path


def test_a_file_that_was_not_trained_is_written_back_byte_by_byte(file: Path, tmp_path: Path) -> None:
    factorpack.save(factorpack.trainable(Network(), file), tmp_path / "again.fpk")
    assert (tmp_path / "again.fpk").read_bytes() == file.read_bytes()


def trained(file: Path) -> factorpack.TrainableModel:
    """A few steps towards the classes."""
    model = factorpack.trainable(Network(), file)
    images, classes = (part[:500] for part in data())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()
    return model


def test_what_is_saved_is_what_was_computed(file: Path, tmp_path: Path) -> None:
    model, images = trained(file), data()[0][:200]
    factorpack.save(model, tmp_path / "trained.fpk")
    loaded = factorpack.load(tmp_path / "trained.fpk", Network()).eval()
    before = factorpack.load(file, Network()).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), loaded(images), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(before(images), loaded(images), atol=0.1)


def test_a_size_is_kept_or_refused(file: Path, tmp_path: Path) -> None:
    model, path = trained(file), tmp_path / "small.fpk"
    factorpack.save(model, path)
    whole = path.stat().st_size
    if "vq" in file.name:
        wanted = whole
    else:
        wanted = int(0.97 * whole)
        factorpack.save(model, path, size=wanted)
        assert 0.97 * wanted <= path.stat().st_size <= wanted
    saved = path.read_bytes()
    with pytest.raises(factorpack.BudgetError, match="cannot be met"):
        factorpack.save(model, path, size=wanted // 4)
    assert path.read_bytes() == saved
    factorpack.save(model, path, size=whole)
    assert path.stat().st_size == whole


def test_a_file_of_another_network_is_refused(file: Path) -> None:
    with pytest.raises(factorpack.MismatchError, match="another model"):
        factorpack.trainable(torch.nn.Linear(3, 3), file)
