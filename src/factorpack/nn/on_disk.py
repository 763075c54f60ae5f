"""A network whose weights stay on disk: it is run with one block at a time in memory."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from factorpack.errors import MismatchError
from factorpack.nn.distillation import blocks
from factorpack.nn.stored import StoredTensors


@dataclass(frozen=True, eq=False)
class NetworkOnDisk:
    """A network whose parameters are on disk, in `tensors`; `model` has them without values (on "meta").

    Raises MismatchError where a parameter is not in `tensors`, in its shape.
    """

    model: nn.Module
    tensors: StoredTensors

    def __post_init__(self) -> None:
        for name, parameter in self.model.named_parameters():
            stored = self.tensors.shapes.get(self.stored_name(name))
            if stored != tuple(parameter.shape):
                found = "is not there" if stored is None else f"has shape {stored}"
                raise MismatchError(f"the network's {name!r} is of shape {tuple(parameter.shape)}; on disk it {found}")

    @cached_property
    def tied(self) -> dict[str, str]:
        """Each name of a tied tensor that is not stored itself, with the one that is."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if isinstance(tensor, nn.Parameter):
                names.setdefault(id(tensor), []).append(name)
        found: dict[str, str] = {}
        for group in names.values():
            owner = next((name for name in group if name in self.tensors), group[0])
            found |= {name: owner for name in group if name != owner}
        return found

    @cached_property
    def entries(self) -> dict[str, str]:
        """What a store calls that which is known of each tensor: names may hold what no file's name may."""
        return {name: f"tensor-{place}" for place, name in enumerate(self.tensors)}

    def stored_name(self, name: str) -> str:
        return self.tied.get(name, name)

    @cached_property
    def blocks(self) -> dict[str, nn.Module]:
        """The repeated parts of the network by name; none is within another."""
        repeated = {id(block) for block in blocks(self.model)}
        found: dict[str, nn.Module] = {}
        for name, module in self.model.named_modules():
            if id(module) in repeated and not any(name.startswith(f"{outer}.") for outer in found):
                found[name] = module
        return found

    @contextmanager
    def placed(self, module: nn.Module, names: Mapping[str, str]) -> Iterator[dict[str, nn.Parameter]]:
        """The parameters `names` of `module`, with the names that they are stored by, in memory, in float32.

        Each is a leaf of its own, tied ones over the same memory.
        """
        from accelerate.utils import set_module_tensor_to_device

        values = {stored: self.tensors[stored].float() for stored in names.values()}
        for name, stored in names.items():
            set_module_tensor_to_device(module, name, "cpu", value=values[stored], dtype=torch.float32)
        # What whoever is asked here lets go of, a head that has done its part, is to be let go of indeed.
        del values
        placed = dict(module.named_parameters(remove_duplicate=False))
        try:
            yield {name: placed[name] for name in names}
        finally:
            for name in names:
                set_module_tensor_to_device(module, name, "meta")

    def parameters_of(self, block: str) -> dict[str, str]:
        """Names of the parameters within a block, as it knows them, with those that they are stored by."""
        within = self.blocks[block].named_parameters(remove_duplicate=False)
        return {name: self.stored_name(f"{block}.{name}") for name, _ in within}

    @property
    def around(self) -> dict[str, str]:
        """Names of the parameters in no block, with those that they are stored by."""
        starts = tuple(f"{block}." for block in self.blocks)
        everywhere = self.model.named_parameters(remove_duplicate=False)
        return {name: self.stored_name(name) for name, _ in everywhere if not name.startswith(starts)}

    @contextmanager
    def stubbed(self, called: Callable[..., Any]) -> Iterator[None]:
        """Every block of the network calls `called`, with its name before its arguments, not its own forward."""
        stubs = {}
        for name, block in self.blocks.items():
            stub = copy.copy(block)
            stub.forward = partial(called, name)
            stubs[name] = stub
        try:
            for name, stub in stubs.items():
                _put(self.model, name, stub)
            yield
        finally:
            for name, block in self.blocks.items():
                _put(self.model, name, block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives out, without gradients, with one block at a time in memory."""

        def called(block: str, *args: Any, **kwargs: Any) -> Any:
            with self.placed(self.blocks[block], self.parameters_of(block)):
                return self.blocks[block](*args, **kwargs)

        with torch.no_grad(), self.stubbed(called), self.placed(self.model, self.around):
            return self.model(*args, **kwargs)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    model.get_submodule(parent)._modules[own] = module
