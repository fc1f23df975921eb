"""Hypothesis strategies that damage things: JSON values, and bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, 1, 2, 3, 2**31, 2**32, 2**63, 2**64, 10**12, -(10**12), 10**30, -(10**30), 0.5),
            *(
                1e-300,
                1e308,
                float("nan"),
                float("inf"),
                -0.0,
                "",
                " ",
                "0",
                "-1",
                "9" * 5000,
                "x" * 5000,
                "../x",
                "/x",
            ),
            *(
                ".",
                "..",
                "a/b",
                "a\\b",
                "C:\\x",
                "\0",
                "null",
                "NaN",
                "<image>",
                "{prompt}",
                "\ud800",
                "\u202e",
                [],
                {},
            ),
            *([[]], [None], {"": None}, [0] * 1000),
        ]
    ),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
)
DEEP = 100_000  # brackets


def near(value: Any) -> st.SearchStrategy[Any]:
    """Values that could be mistaken for `value`."""
    if isinstance(value, bool):
        return st.sampled_from([not value, int(value), str(value), None])
    if isinstance(value, int | float):
        return st.sampled_from([value + 1, value - 1, value * 2, value / 2, -value, str(value), [value], float(value)])
    if isinstance(value, str):
        return st.sampled_from([value + "x", value[:-1], value.upper(), value * 2, [value], {"": value}])
    if isinstance(value, list):
        return st.sampled_from([value[:-1], value + value[-1:], value[::-1], value * 2, dict.fromkeys(map(str, value))])
    if isinstance(value, dict):
        return st.sampled_from([{}, list(value), list(value.values()), {**value, "unknown": 1}])
    return ODD


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


def _at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


@st.composite
def damaged_json(draw: st.DrawFn, original: Any) -> Any:
    """A JSON value that differs from `original` in one to three places."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in places(value) if path]
        if not paths:
            return draw(ODD)
        path = draw(st.sampled_from(paths))
        holder, key = _at(value, path[:-1]), path[-1]
        how = draw(st.sampled_from(["near", "near", "odd", "delete", "other", "rename"]))
        if how == "near":
            holder[key] = copy.deepcopy(draw(near(holder[key])))
        elif how == "odd":
            holder[key] = copy.deepcopy(draw(ODD))  # what Hypothesis holds stays as it is
        elif how == "delete":
            del holder[key]
        elif how == "other":
            holder[key] = copy.deepcopy(_at(value, draw(st.sampled_from(paths))))
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from([str(key) + "x", str(key).upper(), str(key)[:-1]]))] = holder.pop(key)
    return value


@st.composite
def damaged_text(draw: st.DrawFn, original: Any) -> bytes:
    """What a JSON file may hold in place of `original`: mostly other JSON, sometimes none."""
    how = draw(st.sampled_from(["json"] * 12 + ["bytes"] * 3 + ["deep", "twice", "empty"]))
    text = json.dumps(original).encode()
    if how == "json":
        return json.dumps(draw(damaged_json(original))).encode("utf-8", "surrogatepass")
    if how == "bytes":
        return draw(damaged_bytes(text))
    if how == "deep":
        return draw(st.sampled_from([b"[", b'{"a":'])) * DEEP
    if how == "twice" and isinstance(original, dict) and original:
        key = draw(st.sampled_from(sorted(original)))
        return (
            b"{"
            + json.dumps(key).encode()
            + b":"
            + json.dumps(draw(ODD)).encode("utf-8", "surrogatepass")
            + b","
            + text[1:]
        )
    return b""


@st.composite
def damaged_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes that differ from `original`: bits flipped, cut, doubled, overwritten, or longer."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["bit", "bit", "byte", "cut", "drop", "double", "insert"]))
        if how == "bit" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and data:
            data[at] = draw(st.sampled_from([0, 0x7F, 0x80, 0xFF, 0x30, 0x22]))
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + draw(st.integers(1, 64))]
        elif how == "double":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
    return bytes(data)
