"""A model's state as what can be stored: weights as layers to be solved, small tensors, exact ones, ties.

Letters: m outputs, n inputs of one group, g groups.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from factorpack._shapes import Float, Float32
from factorpack.errors import MismatchError, UnsupportedError
from factorpack.nn.layerwise import StoredStatistics, energies
from factorpack.nn.loading import identity, repeats_memory
from factorpack.nn.moments import WeightStatistics
from factorpack.nn.on_disk import NetworkOnDisk
from factorpack.nn.prefix import Prefix
from factorpack.nn.statistics import Statistics
from factorpack.nn.stored import StoredLayers, StoredTensors, pays_record
from factorpack.solve.layer import Layer
from factorpack.solve.objective import Metric
from factorpack.tiling import Tiling

SMOOTHING = 0.1
"""Part of an output's weight that is the mean of all: calibration never saw enough to call one worthless."""
LOOKUP_SMOOTHING = 0.1
"""The same for rows that are looked up, on top of what the estimate of `lookup_weights` gives them."""
UNSEEN_WEIGHT = 2.0
"""What the estimate for rows that were never looked up counts: they get the coarsest steps, where the loss grows
faster than the square of the error (docs/log.md)."""
LOOKUP_WEIGHT = 1.5
"""What all rows that are looked up count beside other weights: texts of another kind than those of calibration cost
about that much more (docs/log.md)."""
NEIGHBOURS = 1000
"""Rows whose places lie within so many are taken to be looked up about as often: vocabularies are mostly sorted."""
LEAST_ENERGY = 1e-28
"""Tensors that are not zero, but whose squares add up to less, have no grid."""


@dataclass(frozen=True, eq=False)
class SmallTensor:
    """A small tensor (any shape) and the curvature of the loss at each entry, None where it is not known."""

    values: Float32[np.ndarray, "..."]
    curvature: Float32[np.ndarray, "..."] | None


@dataclass(frozen=True, eq=False)
class State:
    """Everything of a state dict by name, in its order: `layers`, `small` and `exact` tensors, and `aliases`.

    `dtypes` holds the torch dtype of every name, `aliases` the stored name of each tied one, `unseen` the
    weights that no observed call used in calibration (their moments are taken as the identity). `prefix` is the
    network with its calibration batches, where there are any; a network on disk has `large_moments` instead: its layers
    take long to solve.
    """

    layers: Mapping[str, Layer]
    small: Mapping[str, SmallTensor]
    exact: Mapping[str, np.ndarray]
    aliases: Mapping[str, str]
    dtypes: Mapping[str, str]
    unseen: tuple[str, ...]
    prefix: Prefix | None = None
    large_moments: bool = False

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the layers' tensors."""
        if isinstance(self.layers, StoredLayers):
            return self.layers.shapes
        return {name: layer.tensor.shape for name, layer in self.layers.items()}

    @property
    def stored(self) -> bool:
        """Whether layers are on disk and made whenever they are asked for: none is to be held for longer."""
        return isinstance(self.layers, StoredLayers)


def batch_norm_curvature(model: nn.Module, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Curvature of the running statistics, by name, from those of the affine parameters.

    With y = w·(x − μ)/σ + b: ∂y/∂μ = −w/σ · ∂y/∂b and ∂y/∂σ² = −w/(2σ²) · ∂y/∂w. Without affine parameters
    nothing is known.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or module.running_var is None:
            continue
        prefix = f"{name}." if name else ""
        if f"{prefix}bias" in fisher and f"{prefix}weight" in fisher:
            variance = module.running_var.detach().cpu().float() + module.eps
            weight = module.weight.detach().cpu().float()
            found[f"{prefix}running_mean"] = weight.square() / variance * fisher[f"{prefix}bias"]
            found[f"{prefix}running_var"] = (weight / (2 * variance)).square() * fisher[f"{prefix}weight"]
    return found


def _array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return np.array(tensor.detach().cpu().numpy(), order="C")


def _floats(tensor: Tensor) -> Float32[np.ndarray, "..."]:
    # One copy, whatever the dtype.
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()


def _tiling(tensor: Tensor, seen: WeightStatistics | None) -> Tiling:
    if seen is None:
        return Tiling(tuple(tensor.shape))
    return Tiling(tuple(tensor.shape), len(seen.moments), seen.transposed)


def _smoothed(rows: Tensor, share: float) -> Tensor:
    return (1 - share) * rows + share * rows.mean()


def lookup_weights(weights: Tensor, counts: Tensor) -> Tensor:
    """What an error of each row (m,) counts, from `weights` (m,) measured where `counts` (m,) look-ups met it.

    Rows that were met once tell of those that were not (Good 1953: as much falls to all unseen ones together as fell
    to these), here among rows whose places are near. A row that was met keeps its weight a look-up, moved towards the
    mean of these as by one look-up more, times its look-ups less a part of one, the same for all (absolute
    discounting: Ney, Essen & Kneser 1994), so that what falls to unseen rows is taken from these.
    """
    once, unseen = counts == 1, counts == 0
    mean = weights[once].mean() if bool(once.any()) else weights.sum() / counts.sum().clamp_min(1)

    def nearby(values: Tensor) -> Tensor:
        sums = torch.cat([values.new_zeros(1), values.double().cumsum(0)])
        places = torch.arange(len(values))
        half = NEIGHBOURS // 2
        return sums[(places + half).clamp_max(len(values))] - sums[(places - half).clamp_min(0)]

    # Among few unseen rows the share of each would be noise: twenty at least are taken to share it.
    shared = (nearby(weights.double() * once) / nearby(unseen.double()).clamp_min(NEIGHBOURS / 50)).to(weights.dtype)
    look_up = (weights + mean) / (counts + 1)
    # One look-up more in the sum: of a single row that was met once half is left, not nothing.
    discount = shared[unseen].sum() / (look_up[~unseen].sum() + mean).clamp_min(1e-30)
    return torch.where(unseen, UNSEEN_WEIGHT * shared, look_up * (counts - discount).clamp_min(0))


def _metric(tiling: Tiling, seen: WeightStatistics | None, entries: Float[Tensor, " m"]) -> Metric:
    """Row weights r_o = Σ_j F_oj / tr H over the moments of the inputs; the identity's where those were not seen.

    `entries` are Σ_j F_oj.
    """
    outputs, inputs = tiling.matrix_shape
    if seen is None:
        return Metric(None, _smoothed(entries / inputs, SMOOTHING))
    trace = seen.moments.diagonal(dim1=-2, dim2=-1).sum(1).clamp_min(1e-30)
    rows = entries / trace.repeat_interleave(outputs // len(trace))
    if seen.counts is not None:
        rows = lookup_weights(rows, seen.counts)
        # Added, not blended: what was measured stays.
        return Metric(None, LOOKUP_WEIGHT * (rows + LOOKUP_SMOOTHING * rows.mean()))
    return Metric(seen.moments, _smoothed(rows, SMOOTHING))


def _power(layer: Layer) -> float:
    """What it would cost the network to lose the whole layer, as the metric has it."""
    matrix = torch.from_numpy(layer.tiling.matrix(layer.tensor))
    return 0.5 * float((matrix * layer.metric.apply(matrix)).sum())


def _measured(name: str, tensor: Tensor, seen: WeightStatistics | None, entries: Float[Tensor, " m"]) -> Layer:
    """A layer in the metric that calibration gave it; `entries` as for `_metric`."""
    tiling = _tiling(tensor, seen)
    metric = _metric(tiling, seen, entries)
    return Layer(name, _floats(tensor), tiling, metric, seen is not None and seen.embedding)


def _relative(name: str, tensor: Tensor, power: float | None = None) -> Layer:
    """A layer without data: its loss is the tensor's relative squared error, times `power` or its entries' number."""
    energy = float(tensor.detach().float().square().sum())
    weight = 2 * (tensor.numel() if power is None else power) / max(energy, 1e-30)
    metric = Metric(None, torch.full((tensor.shape[0],), weight))
    return Layer(name, _floats(tensor), Tiling(tuple(tensor.shape)), metric, False)


def own_bytes(shapes: Mapping[str, Sequence[int]], dtypes: Mapping[str, str]) -> int:
    """Bytes of tensors of these shapes in their own dtypes."""
    return sum(math.prod(shape) * getattr(torch, dtypes[name]).itemsize for name, shape in shapes.items())


def _refuse_small(name: str, dtype: str) -> NoReturn:
    raise UnsupportedError(f"{name!r} is {dtype}, which is small already: cast it to bfloat16 first")


def check_values(tensors: Mapping[str, object]) -> None:
    """UnsupportedError for a tensor that cannot be stored: one without values, say."""
    for name, tensor in tensors.items():
        # What a module adds to its state by itself need not be a tensor.
        if not isinstance(tensor, Tensor):
            continue
        if nn.parameter.is_lazy(tensor) or tensor.is_meta:
            raise UnsupportedError(f"{name!r} has no values: load the trained weights into the model first")
        if tensor.layout is not torch.strided:
            raise UnsupportedError(f"{name!r} is of layout {tensor.layout}: make it dense first, by to_dense()")
        if repeats_memory(tensor):
            raise UnsupportedError(f"{name!r} repeats its memory, which no file can be loaded into: clone() it first")
        if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            _refuse_small(name, str(tensor.dtype))


def _check_patterns(names: Iterable[str], exclude: Sequence[str]) -> None:
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise MismatchError(f"--exclude {pattern!r} fits no tensor; names look like {next(iter(names), '')!r}")


def gridded(tensor: Tensor) -> bool:
    """Whether a grid holds the values: as float32 they and their squares are finite, and not all but lost.

    Beyond half of the dtype's range a rounded value could lie outside it.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    values = tensor.detach().float()
    energy, largest = float(values.square().sum()), float(values.abs().max())
    if not energy:
        return not bool(tensor.any())
    return LEAST_ENERGY <= energy < math.inf and largest <= torch.finfo(tensor.dtype).max / 2


def read_state(
    tensors: Mapping[str, Tensor],
    model: nn.Module | None = None,
    statistics: Statistics | None = None,
    exclude: Sequence[str] = (),
) -> State:
    """Sorts a state dict (`keep_vars=True` keeps its ties) into what can be stored.

    Weights are floating parameters of two and more axes; without a model all such tensors count. Small tensors
    are other floating ones. Integers, tensors that are not finite or outside the range of grids and those whose name
    fits a pattern of `exclude` are kept exactly. Without statistics a layer's loss is its relative error.
    Raises MismatchError where a pattern of `exclude` fits no name, UnsupportedError as `check_values`.
    """
    # What a module adds to its state by itself need not be a tensor; loading leaves it alone too.
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    check_values(tensors)
    _check_patterns(tensors, exclude)
    fisher = {} if statistics is None else dict(statistics.fisher)
    parameters = set(tensors) if model is None else {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if model is not None and statistics is not None:
        fisher |= batch_norm_curvature(model, fisher)
    # A pattern that fits one name of a tied tensor spares them all.
    spared = {identity(t) for name, t in tensors.items() if any(fnmatchcase(name, pattern) for pattern in exclude)}
    owners: dict[object, str] = {}
    layers: dict[str, Layer] = {}
    small: dict[str, SmallTensor] = {}
    exact: dict[str, np.ndarray] = {}
    aliases: dict[str, str] = {}
    unseen: list[str] = []
    pending: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner = owners.setdefault(identity(tensor), name)
        if owner != name:
            aliases[name] = owner
            continue
        if identity(tensor) in spared or not gridded(tensor):
            exact[name] = _array(tensor)
        elif pays_record(tensor.shape) and name in parameters:
            pending[name] = tensor
        else:
            curvature = fisher.get(name)
            small[name] = SmallTensor(_floats(tensor), None if curvature is None else _floats(curvature))
    for name, tensor in pending.items():
        seen = None if statistics is None else statistics.weights.get(name)
        known = fisher.get(name)
        if statistics is not None and seen is None:
            unseen.append(name)
        if known is not None and bool(known.any()):
            squares = known.detach().cpu().float()
            layers[name] = _measured(name, tensor, seen, energies(squares, _tiling(tensor, seen)))
    # A layer that nothing is known of counts as much as the others do in the middle.
    powers = [_power(layer) for layer in layers.values()] if len(layers) < len(pending) else []
    typical = float(np.median(powers)) if powers else None
    for name, tensor in pending.items():
        if name not in layers:
            layers[name] = _relative(name, tensor, typical)
    return State(
        {name: layers[name] for name in pending},
        small,
        exact,
        aliases,
        {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        tuple(unseen),
    )


def read_stored(tensors: StoredTensors, exclude: Sequence[str] = ()) -> State:
    """As `read_state`, of tensors on disk: what is factored stays there, and a layer's loss is its relative error.

    Raises as `read_state`.
    """
    _check_patterns(tensors, exclude)
    shapes: dict[str, tuple[int, ...]] = {}
    small: dict[str, SmallTensor] = {}
    exact: dict[str, np.ndarray] = {}
    dtypes: dict[str, str] = {}
    for name, tensor in tensors.items():
        check_values({name: tensor})
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        if any(fnmatchcase(name, pattern) for pattern in exclude) or not gridded(tensor):
            exact[name] = _array(tensor)
        elif pays_record(tensor.shape):
            shapes[name] = tuple(tensor.shape)
        else:
            small[name] = SmallTensor(_floats(tensor), None)

    return State(StoredLayers(shapes, lambda name: _relative(name, tensors[name])), small, exact, {}, dtypes, ())


def check_on_disk(network: NetworkOnDisk, exclude: Sequence[str]) -> None:
    """Raises as `read_on_disk` where that can be told without reading the tensors."""
    _check_patterns(list(network.model.state_dict()), exclude)
    for name, stored in network.tensors.formats.items():
        if stored.startswith("F8"):
            _refuse_small(name, stored)


def read_on_disk(network: NetworkOnDisk, statistics: StoredStatistics, exclude: Sequence[str] = ()) -> State:
    """As `read_state`, of a network on disk: what is factored stays there, and what is known of it too.

    Raises as `read_state`.
    """
    names = list(network.model.state_dict())
    check_on_disk(network, exclude)
    spared = {network.stored_name(name) for name in names if any(fnmatchcase(name, pattern) for pattern in exclude)}
    parameters = {name for name, _ in network.model.named_parameters(remove_duplicate=False)}
    shapes: dict[str, tuple[int, ...]] = {}
    small: dict[str, SmallTensor] = {}
    exact: dict[str, np.ndarray] = {}
    dtypes: dict[str, str] = {}
    unseen: list[str] = []
    unknown: list[str] = []
    for name in names:
        tensor = network.tensors[network.stored_name(name)]
        check_values({name: tensor})
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        if name in network.tied:
            continue
        if name in spared or not gridded(tensor):
            exact[name] = _array(tensor)
        elif pays_record(tensor.shape) and name in parameters:
            shapes[name] = tuple(tensor.shape)
            known = statistics.known.get(name)
            if known is None or not known.met:
                unseen.append(name)
            if known is None or not known.reached:
                unknown.append(name)
        else:
            seen = statistics[name]
            curvature = None if seen is None or seen.energies is None else _floats(seen.energies)
            small[name] = SmallTensor(_floats(tensor), curvature)

    def measured(name: str) -> Layer:
        seen = statistics[name]
        assert seen is not None
        assert seen.energies is not None
        return _measured(name, network.tensors[name], seen.statistics, seen.energies)

    # All others have to be read for that.
    powers = [_power(measured(name)) for name in shapes if name not in unknown] if unknown else []
    typical = float(np.median(powers)) if powers else None

    def made(name: str) -> Layer:
        return _relative(name, network.tensors[name], typical) if name in unknown else measured(name)

    aliases = {name: owner for name, owner in network.tied.items() if name in dtypes}
    return State(StoredLayers(shapes, made), small, exact, aliases, dtypes, tuple(unseen), large_moments=True)
