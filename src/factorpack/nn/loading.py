"""Putting decoded weights into a model, dense or as packed factors that are recombined at every use.

A decoded file is three mappings: `tensors`, each name of the state dict that is stored, with its factors or, for
integer and exact tensors, its values (widened where NumPy lacks the dtype); `dtypes`, the torch dtypes they had
("bfloat16"); `aliases`, each tied name with the name that is stored for it.
"""

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from factorpack.errors import FormatError, MismatchError, UnsupportedError
from factorpack.factors import FactoredVector, FactoredWeight
from factorpack.runtime.packed import PackedWeight
from factorpack.threads import in_threads

Stored = FactoredWeight | FactoredVector | np.ndarray
Home = tuple[nn.Module, str]

PROBLEMS_SHOWN = 5
REPORT = "_factorpack_kept_dense"


def identity(tensor: torch.Tensor) -> object:
    """What tied tensors have in common: the memory that they show, and how."""
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def repeats_memory(tensor: torch.Tensor) -> bool:
    """Whether entries of it are one and the same memory, as `expand` makes them: nothing can be copied into it."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def state_dict(
    tensors: Mapping[str, Stored], dtypes: Mapping[str, str], aliases: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Every tensor in its original dtype; tied names hold the same tensor object.

    Raises FormatError where a dtype or the target of an alias is unknown.
    """
    _check_file(tensors, dtypes, aliases)
    dense = _all_dense(tensors, dtypes)
    return dense | {tied: dense[stored] for tied, stored in aliases.items()}


def place_dense(
    model: nn.Module, tensors: Mapping[str, Stored], dtypes: Mapping[str, str], aliases: Mapping[str, str]
) -> nn.Module:
    """Copy the weights into the model's own tensors, which keep their dtypes, devices and ties; returns the model.

    Raises MismatchError, before anything is changed, where names, shapes or kinds of dtype differ;
    UnsupportedError for a model without values (meta device, lazy modules) or one that holds packed weights.
    """
    sources = _sources(model, tensors, dtypes, aliases)
    _copy(model, sources, tensors, dtypes)
    return model


def place_on_the_fly(
    model: nn.Module, tensors: Mapping[str, Stored], dtypes: Mapping[str, str], aliases: Mapping[str, str]
) -> nn.Module:
    """Replace each factored parameter by its packed factors, copy in all else; returns the model.

    The classes of modules keep their forwards and ancestors; a parameter `weight` becomes a property that is
    recombined whenever it is read (torch.nn.utils.parametrize), bit for bit what `place_dense` copies. Tied
    parameters are packed once. What cannot be packed is dense: `kept_dense` says why. Raises as `place_dense`.
    """
    sources = _sources(model, tensors, dtypes, aliases)
    homes = _homes(model)
    # Everything that can fail comes before the first change.
    packed, reasons = _pack(model, sources, tensors, dtypes)
    _copy(model, {name: source for name, source in sources.items() if source not in packed}, tensors, dtypes)
    parameters = {id(tensor): (name, tensor) for name, tensor in _expected(model).items() if sources[name] in packed}
    for key, (name, parameter) in parameters.items():
        _install(homes[key], parameter, packed[sources[name]])
    setattr(model, REPORT, reasons)
    return model


def kept_dense(model: nn.Module) -> dict[str, str]:
    """The factored tensors that loading on the fly left dense in this model, each with the reason.

    Examples:
        >>> model = factorpack.load("model.fpk", build_model(), mode="on-the-fly")
        >>> factorpack.kept_dense(model)
        {}
    """
    return dict(getattr(model, REPORT, {}))


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the storages under the model's parameters and buffers, each storage counted once.

    Examples:
        >>> factorpack.resident_bytes(torch.nn.Linear(30, 10))
        1240
    """
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _check_file(tensors: Mapping[str, Stored], dtypes: Mapping[str, str], aliases: Mapping[str, str]) -> None:
    for name in tensors:
        _dtype(name, dtypes)
    for tied, stored in aliases.items():
        if stored not in tensors or tied in tensors:
            raise FormatError(f"{tied!r} is tied to {stored!r}, which is not stored, or is stored itself")


def _dtype(name: str, dtypes: Mapping[str, str]) -> torch.dtype:
    dtype = getattr(torch, dtypes.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise FormatError(f"{name!r} has the dtype {dtypes.get(name)!r}, which torch {torch.__version__} does not know")
    return dtype


def _values(stored: Stored) -> np.ndarray:
    return stored if isinstance(stored, np.ndarray) else stored.tensor()


def _dense(stored: Stored, dtype: torch.dtype) -> torch.Tensor:
    # A copy of what is stored as it is: that may be read-only, which torch warns of.
    values = stored.copy() if isinstance(stored, np.ndarray) else stored.tensor()
    return torch.from_numpy(values).to(dtype)


def _all_dense(tensors: Mapping[str, Stored], dtypes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """As many at once as torch has threads, where they are large."""
    dense = in_threads(
        lambda name: _dense(tensors[name], _dtype(name, dtypes)),
        tensors,
        lambda name: prod(tensors[name].shape),
        torch.get_num_threads(),
    )
    return dict(zip(tensors, dense, strict=True))


def _expected(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors under the names of its state dict; what modules add as extra state is no tensor."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}


def _sources(
    model: nn.Module, tensors: Mapping[str, Stored], dtypes: Mapping[str, str], aliases: Mapping[str, str]
) -> dict[str, str]:
    """For each name of the model the stored name that fills it; raises for every reason not to begin."""
    _check_file(tensors, dtypes, aliases)
    if any(isinstance(module, PackedWeight) for module in model.modules()):
        raise UnsupportedError("the model holds packed weights already; build it anew and place the file in that")
    expected = _expected(model)
    for name, tensor in expected.items():
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise UnsupportedError(
                f"{name!r} of the model has no values to replace: run a batch through lazy modules, "
                "call model.to_empty(device=...) for a model on the meta device"
            )
        if repeats_memory(tensor):
            raise UnsupportedError(f"{name!r} of the model repeats its memory: clone() it where the model makes it")
    sources = {name: name for name in tensors} | dict(aliases)
    problems = [
        f"{name!r} {tuple(tensor.shape)} of the model is not in the file"
        for name, tensor in expected.items()
        if name not in sources
    ]
    problems += [
        f"{name!r} {tensors[source].shape} of the file is not in the model"
        for name, source in sources.items()
        if name not in expected
    ]
    for name, tensor in expected.items():
        if name in sources:
            problems += _differences(name, tensor, tensors[sources[name]], _dtype(sources[name], dtypes))
    if not problems:
        problems = _merge_ties(expected, sources, tensors)
    if problems:
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise MismatchError(
            f"the file is for another model: {'; '.join(problems[:PROBLEMS_SHOWN])}{more}. "
            "Build the model that the file was made from, with the same settings"
        )
    return sources


def _differences(name: str, tensor: torch.Tensor, stored: Stored, dtype: torch.dtype) -> list[str]:
    if tuple(tensor.shape) != stored.shape:
        return [f"{name!r} is {tuple(tensor.shape)} in the model and {stored.shape} in the file"]
    # Floating point dtypes stand for one another; an integer of another width could lose its value.
    if tensor.dtype != dtype and not (tensor.is_floating_point() and dtype.is_floating_point):
        return [f"{name!r} is {tensor.dtype} in the model and {dtype} in the file"]
    return []


def _merge_ties(
    expected: Mapping[str, torch.Tensor], sources: dict[str, str], tensors: Mapping[str, Stored]
) -> list[str]:
    """Give names that are one tensor in the model one source; the ties whose stored values differ."""
    first: dict[object, str] = {}
    problems = []
    for name, tensor in expected.items():
        if not tensor.numel():
            continue
        other = first.setdefault(identity(tensor), name)
        if sources[name] != sources[other]:
            if not np.array_equal(_values(tensors[sources[name]]), _values(tensors[sources[other]])):
                problems.append(
                    f"{other!r} and {name!r} are one tensor in the model and two different ones in the file"
                )
            sources[name] = sources[other]
    return problems


def _copy(
    model: nn.Module, sources: Mapping[str, str], tensors: Mapping[str, Stored], dtypes: Mapping[str, str]
) -> None:
    """Copy dense values into the model's own tensors."""
    dense = _all_dense({source: tensors[source] for source in sources.values()}, dtypes)
    model.load_state_dict({name: dense[source] for name, source in sources.items()}, strict=False)


def _homes(model: nn.Module) -> dict[int, list[Home]]:
    """For each parameter, by identity, the modules and attributes that are it."""
    homes: dict[int, list[Home]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                homes.setdefault(id(parameter), []).append((module, attribute))
    return homes


def _pack(
    model: nn.Module, sources: Mapping[str, str], tensors: Mapping[str, Stored], dtypes: Mapping[str, str]
) -> tuple[dict[str, PackedWeight], dict[str, str]]:
    """The packed factors of each stored name, and the names that stay dense with the reason; ties stay together."""
    expected = _expected(model)
    homes = _homes(model)
    held = {tensor.untyped_storage().data_ptr() for tensor in _held(model)}
    packed: dict[str, PackedWeight] = {}
    reasons: dict[str, str] = {}
    for source, stored in tensors.items():
        if not isinstance(stored, FactoredWeight):
            continue
        names = [name for name, filled_by in sources.items() if filled_by == source]
        tied = [expected[name] for name in names]
        reason = next(filter(None, (_obstacle(tensor, homes, held) for tensor in tied)), "")
        if not reason and len({tensor.device for tensor in tied}) > 1:
            reason = "it is tied across devices"
        if not reason and tied:
            candidate = PackedWeight(stored, _dtype(source, dtypes)).to(tied[0].device)
            size, dense = resident_bytes(candidate), tied[0].numel() * tied[0].element_size()
            if size < dense:
                packed[source] = candidate
            else:
                reason = f"its factors take {size} bytes in memory, the tensor itself {dense}"
        if reason:
            reasons |= dict.fromkeys(names, reason)
    return packed, reasons


def _obstacle(tensor: torch.Tensor, homes: Mapping[int, list[Home]], held: set[int]) -> str:
    """Why this tensor cannot become a property of its modules; empty where it can."""
    if type(tensor) is not nn.Parameter or id(tensor) not in homes:
        return "it is a buffer or of a tensor class of its own, which modules may write to"
    if tensor.untyped_storage().data_ptr() in held:
        return "a buffer or a plain attribute of a module refers to it too, as those of nn.LSTM do"
    for module, attribute in homes[id(tensor)]:
        if isinstance(module, parametrize.ParametrizationList) or hasattr(module, "parametrizations"):
            return "its module is parametrised already"
        if type(module).__getattr__ is not nn.Module.__getattr__:
            return "the class of its module looks attributes up in a way of its own"
        if hasattr(nn.ModuleDict(), attribute):
            return f"torch.nn.utils.parametrize cannot hold a parameter of the name {attribute!r}"
    return ""


def _held(model: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that modules hold other than as parameters: buffers and, in containers or not, plain attributes."""
    seen = set()
    for module in model.modules():
        waiting = [value for key, value in vars(module).items() if key not in ("_parameters", "_modules")]
        while waiting:
            value = waiting.pop()
            if isinstance(value, torch.Tensor):
                if value.layout is torch.strided:
                    yield value
            elif isinstance(value, (list, tuple, set, frozenset, dict)) and id(value) not in seen:
                seen.add(id(value))
                waiting.extend(value.values() if isinstance(value, dict) else value)


def _install(homes: list[Home], parameter: torch.Tensor, packed: PackedWeight) -> None:
    """Turn a parameter into a property that recombines `packed`; a parameter of no elements keeps its dtype."""
    placeholder = nn.Parameter(torch.empty(0, dtype=parameter.dtype, device=parameter.device), requires_grad=False)
    for module, attribute in homes:
        module._parameters[attribute] = placeholder
        parametrize.register_parametrization(module, attribute, packed, unsafe=True)
