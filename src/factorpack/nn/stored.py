"""Tensors that stay on disk: each is read when it is used, so that networks may be larger than memory."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ctypes import CDLL
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from factorpack.errors import TaskError
from factorpack.solve.layer import Layer

SMALL = 64
"""Tensors of fewer entries are small, whatever their axes: a record of their own costs more than it saves."""


def pays_record(shape: Sequence[int]) -> bool:
    """Whether a record of its own pays for a tensor."""
    return len(shape) >= 2 and math.prod(shape) >= SMALL


def trim() -> None:
    """Hands freed memory back to the system: between large tensors glibc keeps more than is in use."""
    with suppress(OSError, AttributeError, TypeError):
        CDLL(None).malloc_trim(0)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise TaskError(f"{path} is no valid safetensors file ({error})") from error


Value = TypeVar("Value")


class Shaped(Mapping[str, Value]):
    """A mapping whose values are made when they are asked for; `shapes` tells of all names without that."""

    shapes: Mapping[str, tuple[int, ...]]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class StoredTensors(Shaped[Tensor]):
    """The tensors of `.safetensors` files by name, read from disk whenever they are asked for.

    Each time they are in memory of their own, so that no two of them look tied. `shapes` tells of all without reading
    them, `formats` what safetensors calls their dtypes, `size_bytes` what the files take. Raises TaskError for what is
    no safetensors file, and for a name that is in two files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._homes: dict[str, Path] = {}
        self.size_bytes = sum(path.stat().st_size for path in paths if path.is_file())
        shapes: dict[str, tuple[int, ...]] = {}
        self.formats: dict[str, str] = {}
        for path in paths:
            with _opened(path) as file:
                # It is no mapping: without keys() it cannot be walked.
                for name in file.keys():  # noqa: SIM118
                    if name in shapes:
                        raise TaskError(
                            f"{name!r} is in {self._homes[name]} and in {path}: give the file that is meant"
                        )
                    self._homes[name] = path
                    part = file.get_slice(name)
                    shapes[name], self.formats[name] = tuple(part.get_shape()), part.get_dtype()
        self.shapes = shapes

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self._homes[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def holds_weights_alone(spec: str) -> bool:
    """Whether what a command line names is a safetensors file or a folder, and no task."""
    return spec.endswith(".safetensors") or Path(spec).is_dir()


def stored_tensors(path: Path) -> StoredTensors:
    """The tensors of a `.safetensors` file, or of a folder: of the files that its index names, or of all in it.

    Raises TaskError where there are none, and as `StoredTensors`.
    """
    if path.is_file():
        return StoredTensors([path])
    if not path.is_dir():
        raise TaskError(f"no file {path}; give a .py file, module:attribute, a .safetensors file or a folder of them")
    indexes = sorted(path.glob("*.safetensors.index.json"))
    homes: dict[str, str] = {}
    try:
        for index in indexes:
            homes |= json.loads(index.read_bytes())["weight_map"]
        named = sorted({path / name for name in homes.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaskError(f"{path}: the index of its safetensors files cannot be read ({error})") from error
    for file in named:
        if not file.is_file():
            raise TaskError(f"the index of {path} names {file.name}, which is not there: fetch it again")
    paths = named or sorted(path.glob("*.safetensors"))
    if not paths:
        raise TaskError(f"there is no .safetensors file in {path}: give a folder of them, or a task file (.py)")
    found = StoredTensors(paths)
    for name, home in homes.items():
        if name not in found:
            raise TaskError(f"the index of {path} names {name!r}, which is not in {home}: fetch that again")
    return found


class StoredLayers(Shaped[Layer]):
    """Layers of stored tensors, each read and made whenever it is asked for; `shapes` tells of all without that."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], Layer]) -> None:
        self.shapes = shapes
        self._make = make

    def __getitem__(self, name: str) -> Layer:
        if name not in self.shapes:
            raise KeyError(name)
        trim()
        return self._make(name)
