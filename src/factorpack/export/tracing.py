"""A network as a graph of standard ONNX operators, its tensors initialisers under the names of the state dict."""

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import (
    ClearMetadataAndDocStringPass,
    CommonSubexpressionEliminationPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.export import Dim

from factorpack.errors import TaskError, UnsupportedError
from factorpack.export.norms import fold_batch_norms

OPSET = 21
"""The first with integers of four bits."""
SHAPES_ALONE = {"Shape", "CastLike", "Size"}
"""What these make of a weight does not depend on its values."""


@dataclass(frozen=True, eq=False)
class Call:
    """A batch as tensors by input name, and whether a network takes them as keyword arguments.

    Raises TaskError where a batch holds no tensors, or something else beside them.
    """

    inputs: Mapping[str, Tensor]
    keywords: bool

    @classmethod
    def of(cls, model: nn.Module, batch: object) -> "Call":
        """The call that a Batch means: a tensor, a tuple (positional) or a dict (keyword arguments).

        A single sample is taken twice.
        """
        keywords = isinstance(batch, dict)
        if isinstance(batch, dict):
            inputs = {str(name): part for name, part in batch.items()}
        else:
            parts = batch if isinstance(batch, tuple | list) else [batch]
            inputs = dict(zip(_argument_names(model, len(parts)), parts, strict=True))
        wrong = [name for name, part in inputs.items() if not isinstance(part, Tensor)]
        if wrong or not inputs:
            raise TaskError(
                f"an ONNX graph takes tensors alone, and {wrong[0] if wrong else 'the batch'} is none: leave it out of "
                "the first batch of calibration()"
            )
        if all(part.ndim and len(part) == 1 for part in inputs.values()):
            # Sizes of one are taken for constants.
            inputs = {name: torch.cat([part, part]) for name, part in inputs.items()}
        return cls(inputs, keywords)

    def first(self) -> "Call":
        """Its first sample alone."""
        return Call({name: part[:1] for name, part in self.inputs.items()}, self.keywords)

    def run(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """What the model gives out for `tensors` in place of the inputs."""
        if self.keywords:
            return model(**dict(zip(self.inputs, tensors, strict=True)))
        return model(*tensors)


def _argument_names(model: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in parameters if parameter.kind in kinds][:count]
    return names + [f"input_{place}" for place in range(len(names), count)]


class Positional(nn.Module):
    """A network as a function of tensors, in the order of the call's inputs, that returns a tuple of tensors."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network = network
        self.call = call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = torch.utils._pytree.tree_leaves(self.call.run(self.network, tensors))
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def output_names(found: object, count: int) -> list[str]:
    """Names of the tensors that a network returned: its own where it has some."""
    if isinstance(found, Mapping) and len(found) == count and all(isinstance(part, Tensor) for part in found.values()):
        return [str(name) for name in found]
    return ["output"] if count == 1 else [f"output_{place}" for place in range(count)]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of what nobody can do anything about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def trace(model: nn.Module, call: Call) -> onnx_ir.Model:
    """The network, in eval mode, as a graph whose initialisers are named after its state dict.

    The first two axes of inputs (samples, places) are free where the network allows it.
    Nothing that depends on a tensor's values is folded. Raises UnsupportedError where torch cannot export the network.
    """
    positional = Positional(model, call).eval()
    tensors = tuple(call.inputs.values())
    # Few networks have more, and graphs that allow for it are larger. Sizes of one are taken for constants.
    free = tuple({axis: Dim.AUTO for axis in range(min(part.ndim, 2)) if part.shape[axis] > 1} for part in tensors)
    with torch.no_grad(), _quiet():
        found = call.run(model, tensors)
        outputs = output_names(found, len(positional(*tensors)))
        try:
            program = torch.onnx.export(
                positional, tensors, dynamo=True, optimize=False, verbose=False, opset_version=OPSET,
                input_names=list(call.inputs), output_names=outputs, dynamic_shapes={"tensors": free},
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            cause = str(error.__cause__ or error).strip().splitlines()
            raise UnsupportedError(
                f"torch cannot export this network to ONNX: {cause[0] if cause else type(error).__name__}"
            ) from error
        assert program is not None
        assert program.exported_program is not None
        graph, ranges = program.model, program.exported_program.range_constraints
        _name_axes(graph, {str(symbol): int(r.lower) for symbol, r in ranges.items() if r.lower == r.upper})
        _rename(graph)
        _tidy(graph)
        fold_batch_norms(graph.graph)
    return graph


def _name_axes(model: onnx_ir.Model, fixed: Mapping[str, int]) -> None:
    """Gives axes that turned out to be fixed their sizes, and the free ones names that people know."""
    names = {symbol: str(size) for symbol, size in fixed.items()}
    for axis, name in enumerate(("batch", "sequence")):
        symbols = [str(value.shape[axis]) for value in model.graph.inputs if value.shape and len(value.shape) > axis]
        free = [symbol for symbol in symbols if not symbol.isdigit() and symbol not in names]
        names |= {symbol: name + (str(place) if place else "") for place, symbol in enumerate(dict.fromkeys(free))}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None:
            sizes = [re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(size)) for size in value.shape]
            value.shape = onnx_ir.Shape([int(size) if size.isdigit() else size for size in sizes])


def _rename(model: onnx_ir.Model) -> None:
    for name in list(model.graph.initializers):
        model.graph.initializers[name].name = name.removeprefix("network.")


def _tidy(model: onnx_ir.Model) -> None:
    """Folds what no tensor's values enter, and leaves out what is there twice or only tells of the export."""
    kept = set(model.graph.initializers.values())

    def should_fold(node: onnx_ir.Node) -> bool | None:
        return False if node.op_type not in SHAPES_ALONE and kept.intersection(node.inputs) else None

    fold_constants(model, should_fold=should_fold)
    for tidying in (RemoveUnusedNodesPass(), CommonSubexpressionEliminationPass(), ClearMetadataAndDocStringPass()):
        tidying(model)
    for node in model.graph.all_nodes():
        if node.op_type == "Conv":
            for name in [name for name, attribute in node.attributes.items() if _is_default(name, attribute)]:
                del node.attributes[name]


def _is_default(name: str, attribute: onnx_ir.Attr) -> bool:
    """Of a convolution."""
    if name in ("dilations", "strides"):
        return set(attribute.as_ints()) == {1}
    return (name == "group" and attribute.as_int() == 1) or (name == "auto_pad" and attribute.as_string() == "NOTSET")
