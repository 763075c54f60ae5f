"""A report as one HTML page: no file, font or script from elsewhere, nothing that depends on colour.

Names of tensors come from files of strangers. The template escapes whatever is put into it, JSON is written so that no
text in it can end its element, and the page's policy runs no script but the one whose hash it names.
"""

import json
import math
import re
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from factorpack.evaluate.report import Estimate, FileReport, Histogram, LayerNumbers
from factorpack.evaluate.treemap import Box, treemap
from factorpack.sizes import human

LONGEST_NAME = 200
"""Characters of a name that are shown."""
MAP_SHAPE = (100.0, 42.0)
"""Width and height that boxes are made square for; the page stretches them."""
LEAST_SHARE = 0.0003
"""A histogram's heights go with the logarithm of a share, from this one to 1."""
NAMES_OF_FORMS = {
    "direct": "rounded codes with zeros, no basis",
    "sparse_pca": "a dense basis times sparse codes",
    "svd": "low rank: a narrow basis times dense codes",
    "vq": "codewords, one for each tile",
    "separable": "sparse codes in a basis over the taps of kernels",
}
UNITS = {
    "logits": "nats of divergence a prediction",
    "embedding": "half squared distance a prediction, which is 1 − cosine at unit length",
}


def readable(text: str) -> str:
    """What is not printable, as what turns the direction of writing, by its code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def visible(name: str) -> str:
    """A name as it can be read, at most so much of it."""
    return (readable(name[:LONGEST_NAME]) or "(empty name)") + ("…" if len(name) > LONGEST_NAME else "")


def breakable(name: str) -> Markup:
    """As `visible`, with places where a line may end."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])", visible(name)))


def digits(value: float | None, scale: float = 1.0, count: int = 3) -> str:
    """With `count` digits that count."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    value *= scale
    if not value:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{count - 1}e}"
    return f"{value:,.{max(count - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def estimate(found: Estimate) -> str:
    """A loss in thousandths, with its standard error where there is one."""
    error = f" ± {digits(found.error, 1000, 2)}" if math.isfinite(found.error) else ""
    return digits(found.mean, 1000) + error


def signed(number: int) -> str:
    """With a minus sign as wide as a digit."""
    return str(number).replace("-", "−")


def shape_of(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"


def embedded(value: object) -> Markup:
    """JSON for a script element: as escapes of JSON stand < and all else that could end or begin something there."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


@dataclass(frozen=True)
class Cell:
    """A box of the treemap: what it is, its bytes, and the kind that its shade goes with."""

    label: str
    kind: str
    size_bytes: int
    share: float
    box: Box

    @property
    def labelled(self) -> bool:
        """Whether there is room for a label."""
        return self.box.width >= 3.5 and self.box.height >= 8


def cells(report: FileReport) -> list[Cell]:
    """All bytes of the file: each layer, then what layers share."""
    tails = {layer.name.rpartition(".")[2] for layer in report.layers}
    ending = f".{tails.pop()}" if len(tails) == 1 else ""
    entries = [(layer.name.removesuffix(ending) or layer.name, layer.form, layer.size_bytes) for layer in report.layers]
    entries += [(part, "shared", size) for part, size in report.shared.items()]
    entries = [entry for entry in entries if entry[2]]
    boxes = treemap([size for _, _, size in entries], *MAP_SHAPE)
    width, height = MAP_SHAPE
    return [
        Cell(label, kind, size, size / report.size_bytes,
             Box(100 * b.left / width, 100 * b.top / height, 100 * b.width / width, 100 * b.height / height))
        for (label, kind, size), b in zip(entries, boxes, strict=True)
    ]  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A bar of a picture, in parts of its width and height; `whisker` are the ends of a standard error around it."""

    left: float
    width: float
    height: float
    label: str
    whisker: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """Bars of a quantity by layer in the file's order, with what the highest stands for; `outlines` lie around them."""

    key: str
    title: str
    highest: str
    bars: tuple[Bar, ...]
    outlines: tuple[Bar, ...] = ()


Value = float | Estimate | None


def _mean(value: Value) -> float | None:
    found = value.mean if isinstance(value, Estimate) else value
    return found if found is not None and math.isfinite(found) else None


def _bars(
    layers: tuple[LayerNumbers, ...], values: list[Value], top: float, inset: float, scale: float, unit: str
) -> tuple[Bar, ...]:
    found = []
    for place, (layer, value) in enumerate(zip(layers, values, strict=True)):
        mean = _mean(value)
        if mean is None:
            continue
        whisker, told = None, f"{place + 1}. {visible(layer.name)}: {digits(mean, scale)}{unit}"
        if isinstance(value, Estimate) and math.isfinite(value.error):
            whisker = max(mean - value.error, 0.0) / top, min((mean + value.error) / top, 1.0)
            told += f" ± {digits(value.error, scale, 2)}"
        left, width = (place + inset) / len(layers), (1 - 2 * inset) / len(layers)
        found.append(Bar(left, width, max(mean, 0.0) / top, told, whisker))
    return tuple(found)


def _panel(
    layers: tuple[LayerNumbers, ...], key: str, title: str, values: list[Value], unit: str = "", scale: float = 1.0,
    outlined: list[Value] | None = None,
) -> Panel | None:  # fmt: skip
    """None where nothing is known of any layer."""
    known = [mean for value in (*values, *(outlined or ())) if (mean := _mean(value)) is not None]
    if not known:
        return None
    whiskers = [value.mean + value.error for value in values if isinstance(value, Estimate)]
    top = max(*known, *filter(math.isfinite, whiskers), 0.0) or 1.0
    bars = _bars(layers, values, top, 0.22 if outlined else 0.1, scale, unit)
    outlines = _bars(layers, outlined, top, 0.06, scale, f"{unit} predicted") if outlined else ()
    return Panel(key, title, f"{digits(max(known), scale)}{unit}", bars, outlines)


def panels(report: FileReport) -> list[Panel]:
    """The quantities of the layers table as pictures, as far as they are known."""
    layers = report.layers
    found = [
        _panel(layers, "bytes", "Bytes", [float(layer.size_bytes) for layer in layers], " B"),
        _panel(layers, "bits", "Bits a weight", [layer.bits_per_weight for layer in layers]),
        _panel(layers, "zeros", "Zeros among the codes", [layer.zeros for layer in layers], " %", 100),
        _panel(layers, "error", "Relative squared error", [layer.relative_error for layer in layers], " %", 100),
        _panel(
            layers, "loss", "Loss of the output by this weight alone, in thousandths",
            [layer.measured_loss for layer in layers], "", 1000, [layer.predicted_loss for layer in layers],
        ),
    ]  # fmt: skip
    return [panel for panel in found if panel is not None]


@dataclass(frozen=True)
class Column:
    """A column of a histogram: its height, what it counts, and whether it holds all codes beyond."""

    height: float
    label: str
    beyond: bool = False


def columns(histogram: Histogram) -> list[Column]:
    """Heights go with the logarithm of the share."""
    total = max(sum(histogram.counts) + histogram.below + histogram.above, 1)

    def column(count: int, what: str, beyond: bool = False) -> Column:
        share = count / total
        height = 1 - math.log(max(share, LEAST_SHARE)) / math.log(LEAST_SHARE)
        return Column(max(height, 0.015) if count else 0.0, f"{what}: {count:,} ({100 * share:.3g} %)", beyond)

    low, high = histogram.low, histogram.low + len(histogram.counts) - 1
    names = [f"codeword of rank {place + 1}" if histogram.ranked else signed(low + place)
             for place in range(len(histogram.counts))]  # fmt: skip
    found = [column(count, name) for name, count in zip(names, histogram.counts, strict=True)]
    if histogram.below:
        found.insert(0, column(histogram.below, f"below {signed(low)}", beyond=True))
    if histogram.above:
        what = f"the other codewords, beyond {high + 1}" if histogram.ranked else f"above {signed(high)}"
        found.append(column(histogram.above, what, beyond=True))
    return found


def decades() -> list[float]:
    """Heights of the shares 10 %, 1 % and 0.1 %."""
    return [1 - math.log(share) / math.log(LEAST_SHARE) for share in (0.1, 0.01, 0.001)]


def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("factorpack.evaluate"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    found.filters |= {
        "breakable": breakable, "digits": digits, "entries": math.prod, "estimate": estimate, "human": human,
        "readable": readable, "shape": shape_of, "signed": signed, "visible": visible,
    }  # fmt: skip
    return found


def _asset(name: str) -> str:
    return files("factorpack.evaluate").joinpath("templates", name).read_text(encoding="utf-8")


def _largest(layers: tuple[LayerNumbers, ...]) -> dict[str, float]:
    """What the widest bar in a column of the table stands for."""
    columns: dict[str, list[Value]] = {
        "bytes": [float(layer.size_bytes) for layer in layers],
        "bits": [layer.bits_per_weight for layer in layers],
        "error": [layer.relative_error for layer in layers],
        "predicted": [layer.predicted_loss for layer in layers],
        "measured": [layer.measured_loss for layer in layers],
    }
    # Rounding can bring a loss of nothing below zero.
    return {
        key: max((max(_mean(v) or 0.0, 0.0) for v in values), default=0.0) or 1.0 for key, values in columns.items()
    }


def render(report: FileReport) -> str:
    """The page, whose encoding is UTF-8; equal reports give equal pages."""
    script = _asset("report.js")
    layers = report.layers
    page: str = (
        _environment()
        .get_template("report.html")
        .render(
            report=report,
            cells=cells(report),
            panels=panels(report),
            largest=_largest(layers),
            columns=columns,
            decades=decades(),
            forms=NAMES_OF_FORMS,
            used=sorted({layer.form for layer in layers}, key=list(NAMES_OF_FORMS).index),
            unit=UNITS[report.comparison.output] if report.comparison else "",
            style=Markup(_asset("report.css")),
            script=Markup(script),
            script_hash=b64encode(sha256(script.encode()).digest()).decode(),
            numbers=embedded(report.to_dict()),
        )
    )
    return page
