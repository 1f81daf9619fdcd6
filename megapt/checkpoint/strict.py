"""JSON of unknown origin: what is not exactly as it should be is refused, and nothing of it is ever executed."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

LARGEST = 2**63 - 1  # what file offsets and tensor sizes are counted with
_WORDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


class Malformed(Exception):
    """What is wrong, in words that go on after the name of the place."""


def parse(data: bytes) -> Any:
    """The value of a JSON text in UTF-8. Malformed if it is not, or holds a key twice or no finite number."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refused, parse_float=_finite)
    except RecursionError:
        raise Malformed("it is nested too deeply") from None
    except ValueError as error:
        raise Malformed(f"it is not JSON: {error}") from None


def member(tree: dict[str, Any], key: str, kind: type[T]) -> T:
    """`tree[key]`, which must be there and of this type; True is no number."""
    value = tree.get(key)
    if type(value) is not kind:
        if key not in tree:
            raise Malformed(f"{key!r} is missing")
        raise Malformed(f"{key!r} is {shown(value)}, not {_WORDS[kind]}")
    return value


def typed(value: Any, kind: type[T], what: str) -> T:
    """A value that must be of this type."""
    if type(value) is not kind:
        raise Malformed(f"{what} is {shown(value)}, not {_WORDS[kind]}")
    return value


def dimensions(tree: dict[str, Any], key: str) -> tuple[int, ...]:
    """A list of sizes or positions, one per dimension."""
    values = member(tree, key, list)
    for value in values:
        if type(value) is not int or not 0 <= value <= LARGEST:
            raise Malformed(f"{key!r} is {shown(values)}, not a list of whole numbers from 0 on")
    if len(values) > 8:
        raise Malformed(f"{key!r} has {len(values)} dimensions; legal: up to 8")
    return tuple(values)


def shown(value: Any) -> str:
    """A value in a message: short, and without characters that a terminal would obey."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in tree if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return tree


def _refused(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is too large")
    return value
