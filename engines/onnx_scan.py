"""Names of the files that an ONNX graph reads besides its own, found without the onnx package.

A graph may keep tensors in other files, which runtimes open by the path in the graph: a bundle from elsewhere must not
read files that it does not list. Source of the field numbers: onnx.proto, IR version 10.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastfundus.errors import BundleError

__all__ = ["external_files"]

_Fields = dict[int, str]
# Fields that lead to tensors, by message: number of the field and the message in it.
_MESSAGES: dict[str, _Fields] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_KEY, _VALUE = 1, 2
_MAX_DEPTH = 64


def external_files(graph: bytes) -> set[str]:
    """Return the locations of all tensors outside the graph.

    Args:
        graph: content of an ONNX file.

    Raises:
        BundleError: it is not an ONNX graph.
    """
    try:
        return set(_locations(memoryview(graph), "model", 0))
    except (IndexError, ValueError) as error:
        raise BundleError(f"its graph is not valid ONNX ({error}); rebuild the engine") from None


def _locations(data: memoryview, message: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if message == "entry":
        entry = {number: bytes(value) for number, value in _fields(data)}
        if entry.get(_KEY) == b"location":
            yield entry.get(_VALUE, b"").decode("utf-8", "replace")
        return
    following = _MESSAGES[message]
    for number, value in _fields(data):
        if number in following:
            yield from _locations(value, following[number], depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and content of each field of a message that has a length; skip the others."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, place = _varint(data, place)
        elif kind == 1:
            place += 8
        elif kind == 5:
            place += 4
        elif kind == 2:
            size, place = _varint(data, place)
            if place + size > len(data):
                raise ValueError("a field ends behind the file")
            yield number, data[place : place + size]
            place += size
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number has too many bytes")
