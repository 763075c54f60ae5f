"""The names that people import."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import factorpack

ERRORS = {"BudgetError", "FormatError", "MismatchError", "TaskError", "UnsupportedError", "WorkerError"}
NAMES = ERRORS | {"FactorpackError", "Options", "PackedModel", "Report", "compress", "load", "load_state_dict"}
NAMES |= {"TrainableModel", "kept_dense", "resident_bytes", "save", "trainable"}
NAMES |= {"PackedTensors", "open_file"}
NAMES |= {"from_pretrained", "sentence_transformer"}
NAMES |= {"Lessons", "TrainingOptions", "TrainingReport", "finetune"}
NAMES |= {"FileReport", "report"}
NAMES |= {"OnnxReport", "export_onnx"}


def test_the_names_are_these_and_each_is_there():
    assert set(factorpack.__all__) == NAMES
    for name in factorpack.__all__:
        assert getattr(factorpack, name).__doc__, f"{name} says nothing of itself"
    assert dir(factorpack) == sorted(factorpack.__all__)


def test_every_error_is_caught_by_the_root():
    assert all(issubclass(getattr(factorpack, name), factorpack.FactorpackError) for name in ERRORS)


def test_an_unknown_name_is_the_usual_error():
    with pytest.raises(AttributeError, match="no attribute 'squeeze'"):
        _ = factorpack.squeeze


def test_the_version_is_the_package_s():
    try:
        assert factorpack.__version__ == version("factorpack")
    except PackageNotFoundError:
        text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
        found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
        assert found is not None
        assert factorpack.__version__ == found[1]
