"""Weights that stay on disk: what is made of them is what is made of them in memory."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import factorpack
from factorpack.cli import app
from factorpack.errors import MismatchError, TaskError
from factorpack.nn.state import read_state, read_stored
from factorpack.nn.stored import stored_tensors
from factorpack.options import Options
from factorpack.pipeline import Source, silent
from factorpack.search import pack, pack_plan
from factorpack.solve.layer import Layer


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "embedding.weight": rand(300, 16), "0.weight": rand(32, 16), "0.bias": rand(32), "1.weight": rand(8, 32, 3, 3),
        "half.weight": rand(24, 32).to(torch.bfloat16), "steps": torch.tensor(7), "inf.weight": rand(16, 16) / 0,
        "empty.weight": rand(0, 8),
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files with an index, and one beside them that the index does not name."""
    whole = tensors()
    homes = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(whole)}
    for file in set(homes.values()):
        save_file({name: whole[name] for name, home in homes.items() if home == file}, tmp_path / file)
    save_file({"0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return tmp_path


def test_tensors_come_as_they_are(folder: Path) -> None:
    found, whole = stored_tensors(folder), tensors()
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert found.shapes[name] == tuple(tensor.shape)
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num())
    alone = stored_tensors(folder / "other.safetensors")
    assert dict(alone).keys() == {"0.weight"}
    with pytest.raises(KeyError):
        found["1.bias"]


@pytest.mark.parametrize("form", ["auto", "svd", "vq"])
def test_a_file_of_stored_weights_is_that_of_weights_in_memory(folder: Path, form: str) -> None:
    options = Options(form)
    stored = Source(stored_tensors(folder)).state(options)
    # In the order of the files.
    whole = tensors()
    held = read_state({name: whole[name] for name in stored_tensors(folder)})
    found, expected = (pack(state, 8000, options, silent) for state in (stored, held))
    assert found.data == expected.data
    assert found.plan == expected.plan
    if form == "vq":
        return
    again = pack_plan(stored, found.plan, Options(), silent)
    assert again.data == found.data


@pytest.mark.parametrize("form", ["auto", "vq"])
def test_no_more_than_one_layer_is_held(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Layer]] = []
    state = read_stored(stored_tensors(folder))
    make = state.layers._make  # type: ignore[attr-defined]

    def counted(name: str) -> Layer:
        gc.collect()
        assert sum(layer() is not None for layer in alive) == 0
        alive.append(weakref.ref(layer := make(name)))
        return layer

    monkeypatch.setattr(state.layers, "_make", counted)
    pack(state, 8000, Options(form), silent)
    assert len(alive) > 2 * len(state.layers)


def test_a_folder_is_compressed_and_analysed(folder: Path, tmp_path: Path) -> None:
    for number, more in enumerate(([], ["--cache", str(tmp_path / "cache")], ["--exclude", "half*"])):
        out = tmp_path / f"{number}.fpk"
        found = CliRunner().invoke(app, ["compress", str(folder), "--size", "8000", "--out", str(out), *more])
        assert found.exit_code == 0, found.output
        assert out.stat().st_size <= 8000
        assert factorpack.open_file(out).shapes.keys() == tensors().keys()
    assert torch.equal(factorpack.load_state_dict(tmp_path / "2.fpk")["half.weight"], tensors()["half.weight"])


def test_what_is_no_such_file_or_folder_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(TaskError, match=r"bad\.safetensors is no valid safetensors file"):
        stored_tensors(tmp_path / "bad.safetensors")
    with pytest.raises(TaskError, match=r"no file .*missing\.safetensors"):
        stored_tensors(tmp_path / "missing.safetensors")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(TaskError, match="there is no .safetensors file in"):
        stored_tensors(tmp_path / "nothing")
    index = folder / "model.safetensors.index.json"
    for homes, told in (
        ({"0.weight": "gone.safetensors"}, r"names gone\.safetensors, which is not there"),
        ({"0.weight": "other.safetensors", "lost": "other.safetensors"}, "names 'lost', which is not in other"),
    ):
        index.write_text(json.dumps({"weight_map": homes}))
        with pytest.raises(TaskError, match=told):
            stored_tensors(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(TaskError, match="the index of its safetensors files cannot be read"):
        stored_tensors(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "bad.safetensors").unlink()
    with pytest.raises(TaskError, match=r"'0\.weight' is in .*other\.safetensors and in .*part-"):
        stored_tensors(folder)
    with pytest.raises(MismatchError, match="--exclude 'bias' fits no tensor"):
        read_stored(stored_tensors(folder / "other.safetensors"), ["bias"])
