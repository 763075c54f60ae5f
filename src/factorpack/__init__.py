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
from factorpack.hf.hook import watch

if TYPE_CHECKING:
    from factorpack.evaluate.report import FileReport
    from factorpack.export.onnx import OnnxReport, export_onnx
    from factorpack.hf.loading import from_pretrained, sentence_transformer
    from factorpack.nn.loading import kept_dense, resident_bytes
    from factorpack.nn.trainable import TrainableModel
    from factorpack.options import Options
    from factorpack.pipeline import PackedModel, PackedTensors, Report, compress, load, load_state_dict, open_file
    from factorpack.reporting import report
    from factorpack.trained import save, trainable
    from factorpack.training import finetune
    from factorpack.training_options import Lessons, TrainingOptions, TrainingReport

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "FactorpackError",
    "FileReport",
    "FormatError",
    "Lessons",
    "MismatchError",
    "OnnxReport",
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
    "export_onnx",
    "finetune",
    "from_pretrained",
    "kept_dense",
    "load",
    "load_state_dict",
    "open_file",
    "report",
    "resident_bytes",
    "save",
    "sentence_transformer",
    "trainable",
]

_HOMES = {
    "FileReport": "factorpack.evaluate.report",
    "Lessons": "factorpack.training_options",
    "OnnxReport": "factorpack.export.onnx",
    "Options": "factorpack.options",
    "PackedModel": "factorpack.pipeline",
    "PackedTensors": "factorpack.pipeline",
    "Report": "factorpack.pipeline",
    "TrainableModel": "factorpack.nn.trainable",
    "TrainingOptions": "factorpack.training_options",
    "TrainingReport": "factorpack.training_options",
    "compress": "factorpack.pipeline",
    "export_onnx": "factorpack.export.onnx",
    "finetune": "factorpack.training",
    "from_pretrained": "factorpack.hf.loading",
    "kept_dense": "factorpack.nn.loading",
    "load": "factorpack.pipeline",
    "load_state_dict": "factorpack.pipeline",
    "open_file": "factorpack.pipeline",
    "report": "factorpack.reporting",
    "resident_bytes": "factorpack.nn.loading",
    "save": "factorpack.trained",
    "sentence_transformer": "factorpack.hf.loading",
    "trainable": "factorpack.trained",
}

watch()


def __getattr__(name: str) -> object:
    """What needs torch is imported when it is first used: `import factorpack` takes no seconds."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'factorpack' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
