"""A part's graph cut into graphs of consecutive layers, each of which becomes an engine of its own.

Read and written as protobuf has it on the wire, field by field: the board that builds engines has no onnx, and what a
node says beside its names is copied as it is. What one piece of a decoder hands to the next is the hidden state between
two layers, and what the plugins of earlier layers gave (selections), or what was put in their place; everything else
that a piece needs and that holds no weight, positions say, it computes itself. Layers of the projection of pages read
the same features and nothing of each other: its pieces hand nothing on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engines.bundle.geometry import Geometry, pieces_of
from engines.bundle.kinds import layers_of
from engines.bundle.specs import TensorSpec
from engines.errors import BackendError
from plugins.tensorrt import NAMESPACE

DTYPES = {1: "float32", 3: "int8", 7: "int64", 10: "float16", 16: "bfloat16"}  # onnx.TensorProto.DataType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MODEL_GRAPH = 7
_NODE, _NAME, _INITIALIZER, _INPUT, _OUTPUT, _VALUE = 1, 2, 5, 11, 12, 13  # fields of a graph
_TENSOR_NAME = 8
_LAYER = re.compile(r"model\.layers\.(\d+)\.")  # of the name of a weight
_STORE = re.compile(r"(?:present|past|page)_\w+\.(\d+)")  # of the name of a cache, or a store of pages


@dataclass(frozen=True)
class Piece:
    """The layers of an engine: the first, and the one after the last. graph: an ONNX model, over the weights of the
    graph it was cut from. inputs, outputs: of it; those that are not the whole part's are handed on."""

    begin: int
    end: int
    graph: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class _Node:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    domain: str
    raw: bytes


@dataclass
class _Graph:
    """A model's graph. around: the model's other fields; name: the graph's own, as a field. sources: the node that
    gives a value. types: of values, as fields of type ValueInfoProto's."""

    around: bytes
    name: bytes = b""
    nodes: list[_Node] = field(default_factory=list)
    initializers: dict[str, bytes] = field(default_factory=dict)
    inputs: dict[str, bytes] = field(default_factory=dict)
    outputs: dict[str, bytes] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    sources: dict[str, _Node] = field(default_factory=dict)


def cut(
    part: str,
    model: bytes,
    name: str,
    g: Geometry,
    size: int,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    rebuild: str,
    traced: bytes | None = None,
) -> tuple[Piece, ...]:
    """The pieces of a part, "pages" or "decoder", of `size` of its layers each but perhaps the last.

    model: the .onnx file's bytes; name: what errors call it. inputs, outputs: what the whole engine takes and gives.
    traced: the graph with plugins that it was made of, whose values it still has; None: it is that graph. Raises
    BackendError, whose fix is `rebuild`, for what is no graph of that part.
    """
    try:
        graph = _read(model)
        plugins = graph if traced is None else _read(traced)
        bounds = pieces_of(layers_of(part, g), size)
        states = [_state(plugins, begin) for begin, _ in bounds[1:]] if part == "decoder" else []
        home = _homes(plugins, bounds) | {value: index for index, value in enumerate(states)}
        return _cut(graph, bounds, home, {spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs})
    except (IndexError, KeyError, ValueError, RecursionError) as error:  # ValueError: text that is no UTF-8, too
        raise BackendError(
            f"{name} cannot be cut between its layers: {error}",
            expected=f"the graph of {part} as it was written",
            fix=rebuild,
        ) from error


def _cut(
    graph: _Graph,
    bounds: list[tuple[int, int]],
    home: dict[str, int],
    inputs: dict[str, TensorSpec],
    outputs: dict[str, TensorSpec],
) -> tuple[Piece, ...]:
    """`home`: the piece that gives each value which may be handed on."""
    wanted: list[dict[str, None]] = [{} for _ in bounds]  # outputs of each piece, in a fixed order
    for value in outputs:
        match = _STORE.fullmatch(value)
        wanted[_index(bounds, int(match[1])) if match else -1][value] = None
    pieces: list[Piece] = []
    for index, (begin, end) in reversed([*enumerate(bounds)]):  # what a later one reads, an earlier one gives
        nodes, read = _back_from(graph, [*wanted[index]], home, index)
        for value in read:
            weight = _LAYER.match(value)
            if weight and not begin <= int(weight[1]) < end:
                raise ValueError(f"layers {begin} .. {end - 1} read {value}")
            if value not in graph.inputs and value not in graph.initializers:
                wanted[home[value]][value] = None
        specs_in = [
            inputs[value] if value in graph.inputs else _spec(graph, value)
            for value in read
            if value not in graph.initializers
        ]
        specs_out = [outputs[value] if value in outputs else _spec(graph, value) for value in wanted[index]]
        fields = [_bytes(_NODE, node.raw) for node in nodes] + [graph.name]
        fields += [_bytes(_INITIALIZER, graph.initializers[value]) for value in read if value in graph.initializers]
        fields += [_bytes(_INPUT, graph.values[spec.name]) for spec in specs_in]
        fields += [_bytes(_OUTPUT, graph.values[spec.name]) for spec in specs_out]
        whole = graph.around + _bytes(_MODEL_GRAPH, b"".join(fields))
        pieces.insert(0, Piece(begin, end, whole, tuple(specs_in), tuple(specs_out)))
    return tuple(pieces)


def _state(graph: _Graph, layer: int) -> str:
    """The value that goes into a layer: of its last token the tracer made `hidden` of the layer before."""
    return graph.sources[f"hidden.{layer - 1}"].inputs[0]


def _homes(graph: _Graph, bounds: list[tuple[int, int]]) -> dict[str, int]:
    """The piece of every value that a plugin gives: of its layer, which its caches name, or of the plugins it reads."""
    home: dict[str, int] = {}
    for node in graph.nodes:
        if node.domain == NAMESPACE:
            stores = [int(match[1]) for value in node.inputs if (match := _STORE.fullmatch(value))]
            places = [_index(bounds, layer) for layer in stores] + [home[v] for v in node.inputs if v in home]
            if not places:
                raise ValueError(f"no layer of the plugin that gives {node.outputs[0]}")
            home |= dict.fromkeys(node.outputs, max(places))
    return home


def _back_from(
    graph: _Graph, outputs: list[str], home: dict[str, int], index: int
) -> tuple[list[_Node], dict[str, None]]:
    """The nodes that a piece needs for its outputs, in their order, and what these read of others: inputs of the graph,
    initializers, and values of earlier pieces."""
    needed: set[int] = set()
    read: dict[str, None] = {}
    todo = [*reversed(outputs)]
    while todo:
        value = todo.pop()
        node = graph.sources.get(value)
        if not value or value in read or (node is not None and id(node) in needed):
            continue
        if node is None or home.get(value, index) < index:
            if node is None and value not in graph.inputs and value not in graph.initializers:
                raise ValueError(f"nothing gives {value}")
            read[value] = None
            continue
        if home.get(value, index) > index:
            raise ValueError(f"{value} of a later layer is read")
        needed.add(id(node))
        todo += reversed(node.inputs)
    return [node for node in graph.nodes if id(node) in needed], read


def _index(bounds: list[tuple[int, int]], layer: int) -> int:
    """The piece that a layer is in."""
    for index, (begin, end) in enumerate(bounds):
        if begin <= layer < end:
            return index
    raise ValueError(f"layer {layer} of {bounds[-1][1]}")


def _spec(graph: _Graph, value: str) -> TensorSpec:
    """What a graph says of a value that is handed on."""
    tensor = dict(_fields(_only(_only(graph.values[value], 2), 1)))  # its type; its tensor type
    shape: list[int | str] = []
    for _, dimension in _fields(tensor[2]):
        ((number, size),) = _fields(dimension)
        shape.append(size.decode() if number == 2 else int(_number(size)))
    return TensorSpec(value, DTYPES[_number(tensor[1])], tuple(shape))


# The wire: fields one after the other, each a number and bytes. A number's bytes are kept as they are.


def _read(model: bytes) -> _Graph:
    around = b"".join(_raw(model, {_MODEL_GRAPH}))
    graph = _Graph(around)
    for number, content in _fields(_only(model, _MODEL_GRAPH)):
        match number:
            case 1:
                if any(number in (6, 11) for each in _all(content, 5) for number, _ in _fields(each)):
                    raise ValueError("a node holds a graph of its own, and may read what its inputs do not name")
                node = _Node(_texts(content, 1), _texts(content, 2), "".join(_texts(content, 7)), content)
                graph.nodes.append(node)
                graph.sources |= {value: node for value in node.outputs if value}
            case 2:
                graph.name = _bytes(_NAME, content)
            case 5:
                graph.initializers[_only(content, _TENSOR_NAME).decode()] = content
            case 11 | 12 | 13:
                value = _only(content, 1).decode()
                graph.values[value] = content
                if number != _VALUE:
                    (graph.inputs if number == _INPUT else graph.outputs)[value] = content
            case _:
                pass  # what people read
    return graph


def _all(content: bytes, number: int) -> list[bytes]:
    return [value for found, value in _fields(content) if found == number]


def _texts(content: bytes, number: int) -> tuple[str, ...]:
    return tuple(value.decode() for value in _all(content, number))


def _only(content: bytes, number: int) -> bytes:
    found = _all(content, number)
    if len(found) != 1:
        raise ValueError(f"field {number} is there {len(found)} times")
    return found[0]


def _fields(content: bytes) -> Iterator[tuple[int, bytes]]:
    for number, start, end, _ in _walk(content):
        yield number, content[start:end]


def _raw(content: bytes, without: set[int]) -> Iterator[bytes]:
    """The fields with their headers, but for those of some numbers."""
    begin = 0
    for number, _, _, end in _walk(content):
        if number not in without:
            yield content[begin:end]
        begin = end


def _walk(content: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Of each field its number, where its value begins and ends, and where the next one begins."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        kind = key & 7
        start, size = place, {_FIXED64: 8, _FIXED32: 4}.get(kind)
        if kind == _VARINT:
            place = _varint(content, place)[1]
        elif kind == _BYTES:
            size, start = _varint(content, place)
            place = start + size
        elif size is not None:
            place += size
        else:
            raise ValueError(f"wire type {kind}")
        if place > len(content):
            raise ValueError("it ends too early")
        yield key >> 3, start, place, place


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value, place, shift = value | (byte & 127) << shift, place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number of too many bytes")


def _number(content: bytes) -> int:
    return _varint(content, 0)[0]


def _bytes(number: int, content: bytes) -> bytes:
    return _encoded(number << 3 | _BYTES) + _encoded(len(content)) + content


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))
