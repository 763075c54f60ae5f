"""What an installation gives: each extra alone is enough for what it is there for, and none is needed to begin."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

import factorpack

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"pillow": "PIL", "onnx-ir": "onnx_ir", "scikit-learn": "sklearn", "pyyaml": "yaml"}
"""Where a package has another name than its module."""
NEEDS = {
    "finetune": "from factorpack.devices import accelerator_for as f; f(factorpack.TrainingOptions(steps=1))",
    "cluster": "import distributed, factorpack.workers",
    "curve": "from factorpack.curve import require_plots as f; f()",
    "onnx": "import factorpack.export.checking, factorpack.export.surgery, factorpack.export.tracing",
    "hf": "import factorpack.hf.quantizer, PIL, factorpack.hf.folder, factorpack.hf.calibration",
}
"""For each extra what it is there for."""


def modules(requirements: list[str]) -> set[str]:
    """Modules of the packages, and of those that these need."""
    names, found = [re.split(r"[^\w.-]", requirement)[0] for requirement in requirements], set()
    while names:
        name = names.pop().lower()
        if name in found:
            continue
        found.add(name)
        try:
            needed = requires(name) or []
        except PackageNotFoundError:
            continue
        names += [re.split(r"[^\w.-]", other)[0] for other in needed if "extra ==" not in other]
    return {MODULES.get(name, name.replace("-", "_")) for name in found}


EXTRAS = {extra: modules(needs) for extra, needs in PROJECT["optional-dependencies"].items()}
OPTIONAL = set().union(*EXTRAS.values()) - modules(PROJECT["dependencies"])


def run_without(missing: set[str], statement: str) -> subprocess.CompletedProcess[str]:
    """Runs a statement where these modules cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({sorted(missing)!r})); import factorpack; {statement}"
    environment = os.environ | {"FACTORPACK_NO_SHAPE_CHECKS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_every_extra_is_tried():
    assert set(NEEDS) == set(EXTRAS) - {"dev", "demo"}


@pytest.mark.parametrize("extra", NEEDS)
def test_an_extra_is_enough_for_what_it_is_there_for(extra):
    found = run_without(OPTIONAL - EXTRAS[extra], NEEDS[extra])
    assert found.returncode == 0, found.stderr


def test_a_file_is_made_and_loaded_without_any_extra(tmp_path):
    path = tmp_path / "model.fpk"
    statement = (
        "import torch; model = torch.nn.Linear(40, 30); "
        f"factorpack.compress(model, 1500, [torch.randn(8, 40)]).save({str(path)!r}); "
        f"factorpack.load({str(path)!r}, model)"
    )
    found = run_without(OPTIONAL, statement)
    assert found.returncode == 0, found.stderr
    assert path.stat().st_size <= 1500


def test_types_go_along():
    assert Path(factorpack.__file__).with_name("py.typed").is_file()
