"""Tasks: what people write in a file, and what they are told where it is wrong."""

from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

from factorpack.errors import MismatchError, TaskError
from factorpack.task import Task, load_task


def write(folder: Path, text: str, name: str = "task.py") -> str:
    path = folder / name
    path.write_text(dedent(text))
    return str(path)


def task(**functions: object) -> Task:
    return Task("a task", functions)


def raising(error: Exception):
    def function(*_: object) -> None:
        raise error

    return function


def test_a_file_gives_its_functions_and_may_import_from_its_own_folder(tmp_path):
    write(tmp_path, "width = 3", "neighbour_of_the_task.py")
    spec = write(
        tmp_path,
        """
        import torch
        from neighbour_of_the_task import width

        def model():
            return torch.nn.Linear(width, 2)

        def calibration():
            from neighbour_of_the_task import width
            yield torch.zeros(4, width)

        def evaluate(network):
            return {"second": 1, "first": 2.5}
        """,
    )
    found = load_task(spec)
    network = found.model()
    assert isinstance(network, nn.Linear)
    assert [batch.shape for batch in found.calibration()] == [(4, 3)]
    assert list(found.evaluate(network).items()) == [("second", 1.0), ("first", 2.5)]
    assert found.output == "logits"
    assert found.has("model")
    assert not found.has("training")


def test_a_file_may_hold_dataclasses(tmp_path):
    spec = write(
        tmp_path,
        """
        from __future__ import annotations
        from dataclasses import dataclass

        @dataclass
        class Settings:
            width: int = 3
        """,
    )
    assert load_task(spec).functions["Settings"]().width == 3


def test_two_files_of_one_name_are_two_tasks(tmp_path):
    specs = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        specs.append(write(tmp_path / str(number), f"def evaluate(network): return {number}"))
    first, second = map(load_task, specs)
    assert (first.evaluate(nn.Identity()), second.evaluate(nn.Identity())) == ({"score": 1.0}, {"score": 2.0})


def test_a_module_and_an_attribute_name_an_object_with_the_functions(tmp_path, monkeypatch):
    write(
        tmp_path,
        """
        import torch

        class Holder:
            output = "embedding"

            def model(self):
                return torch.nn.Identity()

        holder = Holder()
        """,
        "module_with_a_task.py",
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = load_task("module_with_a_task:holder")
    assert isinstance(found.model(), nn.Identity)
    assert found.output == "embedding"
    with pytest.raises(TaskError, match=r"module_with_a_task:nothing cannot be loaded: AttributeError"):
        load_task("module_with_a_task:nothing")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py", r"no task file nowhere\.py"),
        ("model.onnx", r"model\.onnx is no task: give a \.py file"),
        ("no_such_module:task", "no_such_module"),
    ],
)
def test_what_cannot_be_found_is_named(spec, message):
    with pytest.raises(TaskError, match=message):
        load_task(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def model(:\n    pass", "SyntaxError"),
        ("import torch\n\nraise RuntimeError('no weights here')", r"RuntimeError: no weights here \(task\.py:3\)"),
        ("import no_such_package_at_all", "no_such_package_at_all"),
    ],
)
def test_a_file_that_fails_says_where(tmp_path, text, message):
    with pytest.raises(TaskError, match=message):
        load_task(write(tmp_path, text))


def test_what_a_task_lacks_is_named_when_it_is_asked_for():
    with pytest.raises(TaskError, match=r"a task has no function evaluate\(\): define it"):
        task().evaluate(nn.Identity())


@pytest.mark.parametrize("function", ["model", "calibration"])
def test_a_function_that_fails_says_where(function):
    found = task(**{function: raising(ValueError("broken"))})
    with pytest.raises(TaskError, match=rf"{function}\(\) failed: ValueError: broken \(test_task\.py:\d+\)"):
        getattr(found, function)()


def test_calibration_that_fails_half_way_says_where():
    def calibration():
        yield torch.zeros(1)
        raise OSError("the disk is gone")

    with pytest.raises(TaskError, match=r"calibration\(\) failed: OSError: the disk is gone \(test_task\.py:"):
        task(calibration=calibration).calibration()


def test_errors_of_ours_keep_their_kind():
    with pytest.raises(MismatchError, match="^as it was$"):
        task(evaluate=raising(MismatchError("as it was"))).evaluate(nn.Identity())


@pytest.mark.parametrize("score", ["good", {"top1": "good"}, None, {"top1": None}])
def test_a_score_is_a_number_or_a_dict_of_numbers(score):
    with pytest.raises(TaskError, match=r"evaluate\(\) must return a number or a dict of numbers"):
        task(evaluate=lambda _: score).evaluate(nn.Identity())


def test_a_single_number_is_called_score():
    assert task(evaluate=lambda _: torch.tensor(3)).evaluate(nn.Identity()) == {"score": 3.0}


def test_a_model_is_a_module():
    with pytest.raises(TaskError, match=r"model\(\) returned dict, not a torch\.nn\.Module"):
        task(model=dict).model()


def test_an_output_is_one_of_two():
    with pytest.raises(TaskError, match="output is 'classes'; it must be one of logits, embedding"):
        _ = task(output="classes").output
