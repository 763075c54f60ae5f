"""When transformers learns of us: in either order of imports, and not without us."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="this is a hook in transformers")

import hf_folders

import factorpack
from factorpack.hf.folder import read_folder, write_around

SOURCE = str(Path(factorpack.__file__).parents[1])
EQUAL = """
import factorpack
found, stored = AutoModel.from_pretrained(folder).state_dict(), factorpack.load_state_dict(folder + "/model.fpk")
assert all(torch.equal(tensor, stored["transformer." + name]) for name, tensor in found.items())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A compressed one."""
    base = tmp_path_factory.mktemp("folder")
    source = read_folder(hf_folders.gpt2(base / "source"))
    assert source is not None
    from factorpack.hf.folder import load_network

    network = load_network(source)
    packed = factorpack.compress(network, 5_000, options=factorpack.Options(form="direct"))
    packed.save(write_around(source, base / "small", network.state_dict(), {"lm_head.weight"}, 1))
    return base / "small"


def process(code: str, folder: Path) -> subprocess.CompletedProcess:
    head = f"import sys; sys.path.insert(0, {SOURCE!r}); folder = {str(folder)!r}\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False)


def test_without_us_transformers_refuses_and_with_us_it_loads(folder):
    code = """
import torch
from transformers import AutoModel
try:
    AutoModel.from_pretrained(folder)
except Exception:
    pass
else:
    sys.exit("it was loaded, whatever with")
"""
    found = process(code + EQUAL, folder)
    assert found.returncode == 0, found.stderr
    assert "Unknown quantization type, got factorpack" in found.stderr


def test_the_other_order_of_imports(folder):
    code = """
import factorpack
assert "transformers" not in sys.modules and "torch" not in sys.modules
import torch
from transformers import AutoModel
"""
    found = process(code + EQUAL, folder)
    assert found.returncode == 0, found.stderr
    assert "Unknown quantization type" not in found.stderr


def test_names_under_which_others_would_load_it_are_not_there(folder):
    """As model.safetensors, transformers 5 takes the file and begins with random weights."""
    assert not list(folder.rglob("*.safetensors"))
    assert not list(folder.rglob("*.bin"))


@pytest.mark.parametrize("old", [False, True])
def test_a_transformers_without_a_place_for_us_is_left_alone(old, tmp_path):
    package = tmp_path / "transformers" / "quantizers"
    package.mkdir(parents=True)
    (tmp_path / "transformers" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "auto.py").write_text("here = True\n")
    first, second = ("import factorpack", "import transformers.quantizers.auto as auto")[:: -1 if old else 1]
    code = f"sys.path.insert(0, {str(tmp_path)!r})\n{first}\n{second}\nassert auto.here and 'torch' not in sys.modules"
    found = process(code, tmp_path)
    assert found.returncode == 0, found.stderr


def test_watching_twice_changes_nothing():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from factorpack.hf.hook import _Watcher, watch

    before = list(sys.meta_path), dict(AUTO_QUANTIZER_MAPPING)
    watch()
    assert (sys.meta_path, AUTO_QUANTIZER_MAPPING) == before
    assert sum(isinstance(finder, _Watcher) for finder in sys.meta_path) <= 1
    assert "factorpack" in AUTO_QUANTIZER_MAPPING


def test_files_of_others_are_read_as_before(tmp_path, folder):
    import transformers

    model = transformers.AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "dense")
    again = transformers.AutoModel.from_pretrained(tmp_path / "dense")
    assert torch.equal(again.wte.weight, model.wte.weight)
