"""Its place puts this folder on the path: tests of every folder import `laws` and `digits` from it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import shape_checks
from torch import nn

shape_checks.install()


@dataclass(frozen=True)
class Trained:
    """A task file in a folder of its own, and what is known of its network."""

    path: Path
    scores: dict[str, float]
    names: tuple[str, ...]
    size_bytes: int

    @property
    def weights(self) -> Path:
        return self.path.with_name("digits.safetensors")


@pytest.fixture(scope="session")
def digits_task(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The digits network, trained: a task file that stands on its own, its original scores and dense bytes."""
    # Late, so that tests of NumPy's part run where only that is installed.
    import digits
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("digits")
    network = digits.train()
    tensors = network.state_dict()
    save_file(tensors, folder / "digits.safetensors")
    path = shutil.copy(digits.__file__, folder / "digits_task.py")
    dense = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Trained(path, digits.evaluate(network), tuple(tensors), dense)


@pytest.fixture
def digits_network(digits_task: Trained) -> nn.Module:
    """A fresh copy of the digits network."""
    from factorpack.task import load_task

    return load_task(str(digits_task.path)).model()


@pytest.fixture(scope="session")
def digits_file(digits_task: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network at 8,000 bytes, about four bits a weight."""
    import factorpack
    from factorpack.task import load_task

    task = load_task(str(digits_task.path))
    path = tmp_path_factory.mktemp("packed") / "digits.fpk"
    factorpack.compress(task.model(), 8000, task.calibration()).save(path)
    return path


@pytest.fixture
def short_analysis(monkeypatch):
    """A few λ and evaluations: each takes a moment."""
    from factorpack import cache, curve

    rates_of = cache.rates_of
    monkeypatch.setattr(cache, "rates_of", lambda state: rates_of(state)[::5])
    monkeypatch.setattr(curve, "EVALUATIONS", 3)
    monkeypatch.setattr(curve, "DOTS_PER_INCH", 20)
