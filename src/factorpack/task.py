"""Tasks: how a user hands over a network, its data and its score.

A task is a Python file, or `module:attribute`, that defines plain functions: `model()`, `calibration()`,
`evaluate(model)` and, for training, `training(epoch)` and `loss(outputs, targets)`; `output` says what the network
returns, "logits" (the default) or "embedding". A `.safetensors` file is a task too: weights alone.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from factorpack.errors import FactorpackError, TaskError

OUTPUTS = ("logits", "embedding")
Scores = dict[str, float]


def checked_output(output: object, what: str) -> str:
    """What a network returns, by name; TaskError, naming `what`, where it is unknown."""
    if output not in OUTPUTS:
        raise TaskError(f"{what}: output is {output!r}; it must be one of {', '.join(OUTPUTS)}")
    return str(output)


def as_scores(found: Any, what: str) -> Scores:
    """What an evaluation returned as numbers by name; TaskError, naming `what`, where it is something else."""
    scores = found if isinstance(found, dict) else {"score": found}
    try:
        return {str(name): float(score) for name, score in scores.items()}
    except (TypeError, ValueError) as error:
        raise TaskError(f"{what}: evaluate() must return a number or a dict of numbers") from error


@dataclass(frozen=True)
class Task:
    """A task's functions; what it lacks raises TaskError when it is asked for."""

    name: str
    functions: Mapping[str, Any]

    @property
    def output(self) -> str:
        """What the network returns."""
        return checked_output(self.functions.get("output", "logits"), self.name)

    def has(self, function: str) -> bool:
        return callable(self.functions.get(function))

    def _call(self, function: str, *arguments: object) -> Any:
        if not self.has(function):
            raise TaskError(f"{self.name} has no function {function}(): define it in the task file")
        try:
            return self.functions[function](*arguments)
        except FactorpackError:
            raise
        except Exception as error:
            raise TaskError(f"{self.name}: {function}() failed: {_place(error)}") from error

    def model(self) -> nn.Module:
        """A fresh copy of the trained network, in eval mode."""
        model = self._call("model")
        if not isinstance(model, nn.Module):
            raise TaskError(f"{self.name}: model() returned {type(model).__name__}, not a torch.nn.Module")
        return model

    def calibration(self) -> list[object]:
        """Its unlabelled batches."""
        batches = self._call("calibration")
        if batches is None:
            raise TaskError(f"{self.name}: calibration() returned None: return a list of batches, or yield them")
        try:
            return list(batches)
        except FactorpackError:
            raise
        except Exception as error:
            raise TaskError(f"{self.name}: calibration() failed: {_place(error)}") from error

    def training(self, epoch: int) -> Iterator[Any]:
        """Pairs of a batch and its targets, or None: those of an epoch."""
        pairs = iter(self._call("training", epoch))
        while True:
            try:
                pair = next(pairs)
            except StopIteration:
                return
            except Exception as error:
                raise TaskError(f"{self.name}: training() failed: {_place(error)}") from error
            yield pair

    @property
    def loss(self) -> Callable[[Tensor, Any], Tensor] | None:
        """Its own loss of outputs and targets, if it has one."""
        return self.functions["loss"] if self.has("loss") else None

    def evaluate(self, model: nn.Module) -> Scores:
        """Scores by name, the first one being the one that counts; a single number is called "score"."""
        found = self._call("evaluate", model)
        return as_scores(found, self.name)


def _place(error: Exception) -> str:
    """An exception with the line it came from, for people who will not see a traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}: {error}{where}"


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"factorpack_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The folder stays importable: task functions may import from it when they run.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    # Dataclasses and pickles of a task look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_task(spec: str) -> Task:
    """The task of a `.py` file or of `module:attribute` (a module or any object that has the functions).

    Raises TaskError where it is not found or fails while it is loaded.
    """
    path = Path(spec)
    try:
        if path.suffix == ".py":
            if not path.is_file():
                raise TaskError(f"no task file {spec}; give a .py file, module:attribute, or .safetensors files")
            return Task(path.name, vars(_module(path.resolve())))
        if ":" in spec:
            name, attribute = spec.split(":", 1)
            holder = getattr(importlib.import_module(name), attribute)
            return Task(spec, {key: getattr(holder, key) for key in dir(holder) if not key.startswith("_")})
    except FactorpackError:
        raise
    except Exception as error:
        raise TaskError(f"{spec} cannot be loaded: {_place(error)}") from error
    if path.suffix == ".safetensors" or path.is_dir():
        raise TaskError(f"{spec} holds weights alone: to evaluate, give a task file (.py) or module:attribute")
    raise TaskError(f"{spec} is no task: give a .py file, module:attribute, a .safetensors file or a folder of them")


Evaluate = Callable[[nn.Module], float | Scores]
