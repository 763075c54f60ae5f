"""Factorpack: trained networks as small as their accuracy allows, in one file whose size is promised."""

from importlib import import_module
from typing import TYPE_CHECKING

from factorpack.errors import (
    BudgetError,
    FactorpackError,
    FormatError,
    MismatchError,
    TaskError,
    UnsupportedError,
    WorkerError,
)

if TYPE_CHECKING:
    from factorpack.nn.loading import kept_dense, resident_bytes
    from factorpack.nn.trainable import TrainableModel
    from factorpack.pipeline import PackedModel, PackedTensors, Report, compress, load, load_state_dict, open_file
    from factorpack.search import Options
    from factorpack.trained import save, trainable
    from factorpack.training import finetune
    from factorpack.training_options import Lessons, TrainingOptions, TrainingReport

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "FactorpackError",
    "FormatError",
    "Lessons",
    "MismatchError",
    "Options",
    "PackedModel",
    "PackedTensors",
    "Report",
    "TaskError",
    "TrainableModel",
    "TrainingOptions",
    "TrainingReport",
    "UnsupportedError",
    "WorkerError",
    "compress",
    "finetune",
    "kept_dense",
    "load",
    "load_state_dict",
    "open_file",
    "resident_bytes",
    "save",
    "trainable",
]

_HOMES = {
    "Lessons": "factorpack.training_options",
    "Options": "factorpack.search",
    "PackedModel": "factorpack.pipeline",
    "PackedTensors": "factorpack.pipeline",
    "Report": "factorpack.pipeline",
    "TrainableModel": "factorpack.nn.trainable",
    "TrainingOptions": "factorpack.training_options",
    "TrainingReport": "factorpack.training_options",
    "compress": "factorpack.pipeline",
    "finetune": "factorpack.training",
    "kept_dense": "factorpack.nn.loading",
    "load": "factorpack.pipeline",
    "load_state_dict": "factorpack.pipeline",
    "open_file": "factorpack.pipeline",
    "resident_bytes": "factorpack.nn.loading",
    "save": "factorpack.trained",
    "trainable": "factorpack.trained",
}


def __getattr__(name: str) -> object:
    """What needs torch is imported when it is first used: `import factorpack` takes no seconds."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'factorpack' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
