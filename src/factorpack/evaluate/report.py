"""The numbers of a report: what is in a compressed file and, beside its original network, what that lost.

Letters: d rows along the basis, k rank, N tiles.

Everything here is plain data: `evaluate.page` makes a page of it, `FileReport.to_dict` a JSON object.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from factorpack._shapes import Int32
from factorpack.container import Bill, Contents, TensorBill
from factorpack.container.layout import Value
from factorpack.factors import FactoredWeight, OneHotCodes
from factorpack.nn.loading import state_dict
from factorpack.nn.state import gridded, own_bytes
from factorpack.nn.stored import SMALL

WIDEST = 32
"""Codes beyond ±32 are counted together, and so are all but the 65 codewords that are used most."""


@dataclass(frozen=True)
class Histogram:
    """How often codes are: `counts[i]` is the number of `low + i`, `below` and `above` that of integers beyond.

    Of `ranked` codes, which are one-hot, `counts` are those of the codewords, most used first, `above` of the rest.
    """

    low: int
    counts: tuple[int, ...]
    below: int
    above: int
    ranked: bool = False

    @classmethod
    def of(cls, integers: Int32[np.ndarray, "..."]) -> "Histogram":
        low, high = (int(np.clip(end, -WIDEST, WIDEST)) for end in (integers.min(initial=0), integers.max(initial=0)))
        inside = integers[(integers >= low) & (integers <= high)]
        counts = np.bincount(inside.astype(np.int64) - low, minlength=high - low + 1)
        return cls(low, tuple(counts.tolist()), int((integers < low).sum()), int((integers > high).sum()))

    @classmethod
    def of_codewords(cls, codes: OneHotCodes) -> "Histogram":
        counts = sorted(np.bincount(codes.indices, minlength=codes.rank).tolist(), reverse=True)
        shown = 2 * WIDEST + 1
        return cls(0, tuple(counts[:shown]), 0, sum(counts[shown:]), ranked=True)


@dataclass(frozen=True)
class Estimate:
    """A mean over predictions and its standard error; the error is infinite where there is one prediction alone."""

    mean: float
    error: float


@dataclass(frozen=True)
class LayerNumbers:
    """A factored weight: its form, `parts` of its bytes, codes and, where there is an original, its losses.

    `tiles` are (d, N), `steps` the smallest and the largest of its codes (of its basis, where codes are one-hot).
    `zeros` is the share of zeros among the codes, None where they are one-hot. `relative_error` is ‖W−Ŵ‖²/‖W‖².
    `predicted_loss` is half its distortion in the metric of the calibration, `measured_loss` what the output loses
    where this weight alone is replaced in the original network; both are None where they are not known. `met` tells
    whether calibration met the weight: where it did not, its predicted loss is a guess.
    """

    name: str
    aliases: tuple[str, ...]
    form: str
    shape: tuple[int, ...]
    dtype: str
    parts: Mapping[str, int]
    rank: int
    tiles: tuple[int, int]
    steps: tuple[float, float]
    zeros: float | None
    histogram: Histogram
    relative_error: float | None = None
    predicted_loss: float | None = None
    measured_loss: Estimate | None = None
    met: bool | None = None

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / self.entries


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that was not factored: its `kind`, "small", "exact" or "tied", and why it is of that kind."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    why: str


@dataclass(frozen=True)
class Comparison:
    """The file against its original: scores of both by name, and losses of parts of the file in the original network.

    A loss is a divergence of outputs over `predictions` rows of the first `batches` of the calibration: nats of
    Kullback-Leibler divergence for "logits", half the squared distance for "embedding", as `output` says. `small_loss`
    is that of all tensors that are not factored weights, replaced together, `whole_loss` that of the whole file.
    `unlike` tells that the weights are further from the original's than zeros are: is it the file's own original?
    """

    task: str
    output: str
    original: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    predictions: int = 0
    batches: int = 0
    small_loss: Estimate | None = None
    whole_loss: Estimate | None = None
    unlike: bool = False


@dataclass(frozen=True)
class Provenance:
    """Where the file comes from, as far as that is known, and how to make file and report again.

    `commands` tell what each command does. `seed`, `rate` (λ of the small tensors) and `behind_prefix` are a plan's.
    `calibration_sha256` is a hash of all `calibration_batches`, types, shapes and values.
    """

    sha256: str
    format_version: str
    versions: Mapping[str, str]
    commands: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    rate: float | None = None
    behind_prefix: bool | None = None
    calibration_batches: int | None = None
    calibration_sha256: str | None = None


@dataclass(frozen=True)
class FileReport:
    """The numbers on a file: `layers` and `others` are its tensors, `shared` the bytes that belong to no one layer.

    `dense_bytes` are those of the tensors in their own dtypes, each tied one once. `comparison` is None without an
    original.
    """

    file: str
    size_bytes: int
    dense_bytes: int
    layers: tuple[LayerNumbers, ...]
    shared: Mapping[str, int]
    others: tuple[OtherTensor, ...]
    provenance: Provenance
    comparison: Comparison | None = None

    @property
    def ratio(self) -> float:
        return self.dense_bytes / self.size_bytes

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes by part over the whole file; they sum to its size."""
        return Bill(
            tuple(TensorBill(layer.name, layer.form, layer.shape, layer.parts) for layer in self.layers),
            self.shared,
            self.size_bytes,
        ).parts

    @property
    def bits_per_weight(self) -> float | None:
        """Of the records of the factored weights; None where there are none."""
        entries = sum(layer.entries for layer in self.layers)
        return 8 * sum(layer.size_bytes for layer in self.layers) / entries if entries else None

    def to_dict(self) -> dict[str, Any]:
        """All of it for JSON, with what follows from it; numbers that are not finite are None."""
        found = asdict(self) | {"ratio": self.ratio, "parts": self.parts, "bits_per_weight": self.bits_per_weight}
        for held, layer in zip(found["layers"], self.layers, strict=True):
            held |= {"size_bytes": layer.size_bytes, "bits_per_weight": layer.bits_per_weight}
        return dict(_finite(found))

    def to_html(self) -> str:
        """One page that needs nothing beside it."""
        from factorpack.evaluate.page import render

        return render(self)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _layer(weight: FactoredWeight, bill: TensorBill, dtype: str, aliases: tuple[str, ...]) -> LayerNumbers:
    codes = weight.codes
    if isinstance(codes, OneHotCodes):
        steps, zeros, histogram = weight.basis.grid.steps, None, Histogram.of_codewords(codes)
    else:
        # An identity's grid carries the steps of the rows.
        rows = weight.basis.grid.steps if weight.basis.integers is None else np.ones(1)
        steps = np.array([codes.grid.steps.min() * rows.min(), codes.grid.steps.max() * rows.max()])
        zeros = 1 - np.count_nonzero(codes.integers) / codes.integers.size
        histogram = Histogram.of(codes.integers)
    return LayerNumbers(
        bill.name, aliases, weight.form, bill.shape, dtype, bill.parts, codes.shape[0], weight.tiling.tiled_shape,
        (float(steps.min()), float(steps.max())), zeros, histogram,
    )  # fmt: skip


def _why_small(shape: tuple[int, ...]) -> str:
    if len(shape) < 2:
        return "one axis"
    if math.prod(shape) < SMALL:
        return f"fewer than {SMALL} entries"
    return "no parameter of the network"


def _why_exact(name: str, value: np.ndarray, dtype: str) -> str:
    tensor = state_dict({name: value}, {name: dtype}, {})[name]
    if not tensor.is_floating_point():
        return f"{dtype}, and only real numbers are rounded"
    if not tensor.numel():
        return "no entries"
    if not gridded(tensor):
        return "not finite, too large or too small for a grid"
    return "asked for (--exclude)"


def describe(file: str, contents: Contents, bill: Bill, provenance: Provenance) -> FileReport:
    """What a file tells by itself."""

    def other(name: str, value: Value) -> OtherTensor:
        dtype = contents.dtypes[name]
        if isinstance(value, np.ndarray):
            return OtherTensor(name, "exact", value.shape, dtype, _why_exact(name, value, dtype))
        return OtherTensor(name, "small", value.shape, dtype, _why_small(value.shape))

    names: dict[str, list[str]] = {}
    for tied, stored in contents.aliases.items():
        names.setdefault(stored, []).append(tied)
    layers = []
    for entry in bill.weights:
        weight = contents.tensors[entry.name]
        assert isinstance(weight, FactoredWeight)
        layers.append(_layer(weight, entry, contents.dtypes[entry.name], tuple(names.get(entry.name, ()))))
    others = [other(name, value) for name, value in contents.tensors.items() if not isinstance(value, FactoredWeight)]
    others += [
        OtherTensor(tied, "tied", contents.tensors[stored].shape, contents.dtypes[tied], f"the same tensor as {stored}")
        for tied, stored in contents.aliases.items()
    ]
    dense = own_bytes({name: value.shape for name, value in contents.tensors.items()}, contents.dtypes)
    return FileReport(file, bill.size_bytes, dense, tuple(layers), bill.shared, tuple(others), provenance)


def with_losses(
    report: FileReport,
    errors: Mapping[str, float],
    predicted: Mapping[str, float],
    measured: Mapping[str, Estimate],
    unseen: tuple[str, ...],
) -> FileReport:
    """The report with the losses of its layers by name, where they are known."""
    layers = tuple(
        replace(
            layer,
            relative_error=errors.get(layer.name),
            predicted_loss=predicted.get(layer.name),
            measured_loss=measured.get(layer.name),
            met=layer.name not in unseen if predicted else None,
        )
        for layer in report.layers
    )
    return replace(report, layers=layers)
