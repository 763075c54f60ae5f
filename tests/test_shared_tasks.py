"""Ready tasks on real networks and data, where they lie beside the project."""

from pathlib import Path

import pytest

import factorpack
from factorpack.task import Task, load_task

SHARED = Path(__file__).resolve().parents[2] / "shared"
pytestmark = pytest.mark.skipif(not (SHARED / "tasks").is_dir(), reason="the ready tasks are not beside this project")


def scored(task: Task, size: int, folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the file of at most `size` bytes, dense and recombined on the fly."""
    packed = factorpack.compress(task.model(), size, task.calibration(), output=task.output)
    packed.save(folder / "model.fpk")
    assert 0.995 * size <= (folder / "model.fpk").stat().st_size <= size
    dense, packed = (
        task.evaluate(factorpack.load(folder / "model.fpk", task.model(), mode)) for mode in ("dense", "on-the-fly")
    )
    return dense, packed


def test_a_residual_network_at_four_bits(tmp_path):
    pytest.importorskip("PIL", reason="the images are JPEG files")
    dense, packed = scored(load_task(str(SHARED / "tasks" / "resnet8_cifar10.py")), 40_000, tmp_path)
    # Measured: 96.1.
    assert dense["agreement"] > 90
    assert packed == pytest.approx(dense, abs=0.05)


def test_a_language_model_at_five_bits(tmp_path):
    dense, packed = scored(load_task(str(SHARED / "tasks" / "stories260k.py")), 150_000, tmp_path)
    # Measured: -1.575.
    assert dense["minus_nats_per_token"] > -1.60
    assert packed == pytest.approx(dense, abs=1e-3)
