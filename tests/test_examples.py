"""The examples of public functions, run as they stand, in a folder that holds what they name."""

import doctest
import inspect
import logging
import shutil

import pytest
import torch

import factorpack
from factorpack.task import load_task

FUNCTIONS = [name for name in factorpack.__all__ if inspect.isfunction(getattr(factorpack, name))]
NEEDS = {
    "finetune": "accelerate", "from_pretrained": "transformers", "sentence_transformer": "sentence_transformers",
    "export_onnx": "onnxscript",
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A compressed sentence encoder, cut from a real one."""
    import hf_folders

    from factorpack.hf.folder import load_network, read_folder, write_around

    base = tmp_path_factory.mktemp("encoder")
    folder = read_folder(hf_folders.sentence_encoder(base / "source"))
    assert folder is not None
    network = load_network(folder)
    packed = factorpack.compress(network, 1_200_000, options=factorpack.Options(form="direct"))
    packed.save(write_around(folder, base / "small", network.state_dict(), (), 1))
    return base / "small"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_example_does_what_it_says(name, digits_task, digits_file, request, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="the example needs it")
    monkeypatch.chdir(tmp_path)
    # What others print of their work is not part of an example.
    monkeypatch.setattr(logging.root, "handlers", [])
    shutil.copy(digits_file, "model.fpk")
    if name in ("from_pretrained", "sentence_transformer"):
        shutil.copytree(request.getfixturevalue("encoder"), "small-encoder")
    names = {}
    if name == "export_onnx":
        names["onnxruntime"] = pytest.importorskip("onnxruntime", reason="the example runs the graph in it")
    task = load_task(str(digits_task.path))
    torch.manual_seed(0)
    known = {
        "factorpack": factorpack, "torch": torch, "build_model": task.model, "batches": task.calibration(),
        "batch": task.calibration()[0], "inputs": task.calibration()[0], "targets": torch.zeros(100, dtype=torch.int64),
    } | names  # fmt: skip
    found = doctest.DocTestFinder(recurse=False).find(inspect.unwrap(getattr(factorpack, name)), name, globs=known)
    examples = [test for test in found if test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    told: list[str] = []
    for test in examples:
        runner.run(test, out=told.append)
    assert not runner.summarize(verbose=False).failed, "".join(told)
