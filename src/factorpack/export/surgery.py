"""Factors in place of the initialisers of a graph."""

from collections.abc import Iterable

import onnx
import onnx_ir
from onnx_ir import DataType
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    RemoveUnusedNodesPass,
    TopologicalSortPass,
)

from factorpack.container import Contents
from factorpack.errors import UnsupportedError
from factorpack.export.chain import Chain
from factorpack.export.lookups import has_rows, looked_up
from factorpack.export.weights import recombined, vector
from factorpack.factors import FactoredVector, FactoredWeight

DTYPES = {
    "float32": DataType.FLOAT, "float16": DataType.FLOAT16, "bfloat16": DataType.BFLOAT16, "float64": DataType.DOUBLE,
}  # fmt: skip
"""Those that factored tensors were stored from."""
MOST_BYTES = 2**31 - 1
"""Of a protobuf message."""


def place_factors(model: onnx_ir.Model, contents: Contents, stream: bool) -> tuple[str, ...]:
    """Has initialisers recombined from the factors of the same name; returns the names of weights that are none.

    With `stream` at every run, each weight when its inputs are there; tables that are only looked up never as a whole.
    """
    graph = model.graph
    depending = _depending(graph)
    found: dict[str, list[onnx_ir.Value]] = {}
    for name, value in graph.initializers.items():
        source = contents.aliases.get(name, name)
        if source in contents.tensors:
            found.setdefault(source, []).append(value)
    for place, (source, values) in enumerate(found.items()):
        stored, dtypes = contents.tensors[source], (DTYPES.get(contents.dtypes[source]), values[0].dtype)
        if isinstance(stored, FactoredWeight):
            if stream and has_rows(stored):
                _put_lookups(graph, values, stored, dtypes, f"r{place}")
            if any(value.uses() for value in values):
                chain = Chain(f"w{place}", stream, _met(values, depending) if stream else None)
                _put(graph, chain, values, _cast(chain, recombined(chain, stored), dtypes))
        elif isinstance(stored, FactoredVector):
            chain = Chain(f"w{place}", stream=False)
            if (tensor := vector(chain, stored)) is not None:
                _put(graph, chain, values, _cast(chain, tensor, dtypes))
    for tidying in (
        TopologicalSortPass(), RemoveUnusedNodesPass(), DeduplicateInitializersPass(),
        CommonSubexpressionEliminationPass(),
    ):  # fmt: skip
        tidying(model)
    weights = (name for name, stored in contents.tensors.items() if isinstance(stored, FactoredWeight))
    return tuple(name for name in weights if name not in found)


def _depending(graph: onnx_ir.Graph) -> set[onnx_ir.Value]:
    """All values that depend on the inputs of the graph."""
    found = set(graph.inputs)
    for node in graph:
        if found.intersection(node.inputs):
            found.update(node.outputs)
    return found


def _met(values: Iterable[onnx_ir.Value], depending: set[onnx_ir.Value]) -> onnx_ir.Value | None:
    """What depends on the inputs and meets one of `values`, or what is made of it, first."""
    waiting = list(values)
    for value in waiting:
        for node in value.consumers():
            if met := [other for other in node.inputs if other in depending]:
                return met[0]
            waiting.extend(node.outputs)
    return None


def _cast(chain: Chain, value: onnx_ir.Value, dtypes: Iterable[DataType | None]) -> onnx_ir.Value:
    """Through the dtype that a tensor was stored from to that of the network."""
    held = DataType.FLOAT
    for dtype in dtypes:
        if dtype is not None and dtype != held:
            value, held = chain.cast(value, dtype), dtype
    return value


def _put(graph: onnx_ir.Graph, chain: Chain, values: list[onnx_ir.Value], made: onnx_ir.Value) -> None:
    """Has what is `made` used instead of `values`, from just before their first use on."""
    users = {node for value in values for node in value.consumers()}
    first = next((node for node in graph if node in users), graph[0])
    for initializer in chain.initializers:
        graph.register_initializer(initializer)
    graph.insert_before(first, chain.nodes)
    for value in values:
        value.replace_all_uses_with(made)


def _put_lookups(
    graph: onnx_ir.Graph, values: list[onnx_ir.Value], weight: FactoredWeight,
    dtypes: Iterable[DataType | None], prefix: str,
) -> None:  # fmt: skip
    """Has rows recombined where a table is looked up, if that is all that is done with it."""
    users = [(node, place) for value in values for node, place in value.uses()]
    if any((node.op_type, place) != ("Gather", 0) or node.attributes.get_int("axis", 0) for node, place in users):
        return
    for number, (node, _) in enumerate(users):
        rows = node.inputs[1]
        assert rows is not None
        chain = Chain(f"{prefix}.{number}", stream=True)
        made = _cast(chain, looked_up(chain, weight, rows), dtypes)
        for initializer in chain.initializers:
            graph.register_initializer(initializer)
        graph.insert_before(node, chain.nodes)
        node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def to_bytes(model: onnx_ir.Model) -> bytes:
    """The graph as it is written, checked, without what readers find themselves: names of nodes, shapes in between."""
    for node in model.graph.all_nodes():
        node.name = None
    model.producer_name = "factorpack"
    proto = onnx_ir.to_proto(model)
    del proto.graph.value_info[:]
    if proto.ByteSize() > MOST_BYTES:
        raise UnsupportedError(
            f"the graph would take {proto.ByteSize():,} bytes, and an ONNX file takes {MOST_BYTES:,} at most: "
            "compress to a smaller size"
        )
    data: bytes = proto.SerializeToString(deterministic=True)
    onnx.checker.check_model(data, full_check=True)
    return data
