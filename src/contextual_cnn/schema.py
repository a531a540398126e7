"""The schema of a config: which keys there are, and of what type their values must be.

The fields of a group's record of settings are the keys of that group: `conf/model/*.yaml` holds what `ModelSettings`
has, and nothing else.
"""

import difflib
import json
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from contextual_cnn.errors import UserError

Schema = Mapping[str, Any]  # a key's type, or a Group


class Group:
    """A group of keys in `read_config`'s schema.

    Args:
        record: the dataclass whose fields are the group's keys.
        keys: those of them that the group has, each of which may be null; None takes all as they are.
    """

    def __init__(self, record: type, keys: Sequence[str] | None = None) -> None:
        hints = get_type_hints(record)
        self.types = {field.name: hints[field.name] for field in fields(record)}
        self.required = [field.name for field in fields(record) if field.default is MISSING]
        if keys is not None:
            self.types, self.required = {key: self.types[key] | None for key in keys}, []

    def beside(self, record: type, keys: Sequence[str]) -> "Group":
        """The same group with keys of another record too, each of which may be null."""
        self.types |= Group(record, keys).types
        return self


def schema_of(record: type) -> Schema:
    """The fields of a record of settings; those that are records themselves as groups."""
    hints = get_type_hints(record)
    types = {field.name: hints[field.name] for field in fields(record)}
    return {
        name: Group(kind) if isinstance(kind, type) and is_dataclass(kind) else kind for name, kind in types.items()
    }


def check_config(plain: Mapping[str, Any], schema: Schema) -> None:
    """Raises UserError for the first mistake in plain containers, with the nearest key or the values allowed."""
    check_all_keys(plain, schema)
    for key, expected in schema.items():
        if isinstance(expected, Group):
            if absent := [f"{key}.{name}" for name in expected.required if name not in plain[key]]:
                raise UserError(f"no value for {', '.join(absent)}", " ".join(f"{name}=VALUE" for name in absent))
            for name, value in plain[key].items():
                _check_value(f"{key}.{name}", value, expected.types[name])
        else:
            _check_value(key, plain[key], expected)


def check_all_keys(plain: Mapping[str, Any], schema: Schema) -> None:
    _check_keys("", plain, schema)
    for key, expected in schema.items():
        if isinstance(expected, Group):
            if not isinstance(plain.get(key), Mapping):
                raise UserError(f"{key} is a group of keys, got {_yaml(plain.get(key))}", f"{key}=NAME of conf/{key}/")
            _check_keys(f"{key}.", plain[key], expected.types)


def _check_keys(prefix: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key in found:
        if key not in expected:
            raise UserError(f"there is no key {prefix}{_shown(str(key))}", nearest(prefix, str(key), expected))


def _check_value(key: str, value: Any, expected: Any) -> None:
    if isinstance(value, int | float) and expected in (str, str | None):
        kind = _spell(bool if isinstance(value, bool) else float)
        raise UserError(
            f"{key}={_yaml(value)} is {kind}, and not {_spell(expected)}",
            f'in a YAML file in quotes, {key.rpartition(".")[2]}: "{_yaml(value)}"',
        )
    if not _fits(value, expected):
        raise UserError(f"{key}={_yaml(value)} is not {_spell(expected)}", f"for example {key}={_example(expected)}")
    for part in _parts(value):
        if isinstance(part, float) and not math.isfinite(part):
            raise UserError(
                f"{key}={_yaml(value)}: {part} is not a finite number", f"for example {key}={_example(expected)}"
            )
        if isinstance(part, str) and _shown(part) != part:
            raise UserError(f"{key}={_shown(part)} has characters that cannot be printed", f"{key}=TEXT without them")


def _parts(value: Any) -> Iterator[Any]:
    """The values of lists and groups, or the value itself."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, list):
        yield value
        return
    for item in value:
        yield from _parts(item)


def _shown(text: str) -> str:
    """Control characters, turns of the writing direction and broken characters as their codes: they forge lines."""
    return "".join(
        char if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else ascii(char)[1:-1] for char in text
    )


def _fits(value: Any, expected: Any) -> bool:
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is Literal:
        return value in arguments
    if origin is not None and issubclass(origin, Sequence):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _spell(expected: Any) -> str:
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        return " or ".join(_spell(option) for option in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is not None:
        return f"a list of {_spell(arguments[0]).removeprefix('a ').removeprefix('an ')}s"
    return {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "a text",
        dict: "keys and values",
        NoneType: "null",
    }[expected]


def _example(expected: Any) -> str:
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType, Literal):
        return _example(arguments[0]) if origin is not Literal else str(arguments[0])
    if origin is not None:
        return f"[{_example(arguments[0])},{_example(arguments[0])}]"
    return {int: "1", float: "0.1", bool: "true", str: "TEXT", dict: "{KEY: VALUE}"}[expected]


def _yaml(value: Any) -> str:
    """A value as it is typed in a config."""
    return _shown(value) if isinstance(value, str) else json.dumps(value, default=str)


def nearest(prefix: str, key: str, expected: Sequence[str] | Mapping[str, Any]) -> str:
    """A fix for a key that is not there."""
    near = difflib.get_close_matches(key, list(expected), n=1, cutoff=0.5)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"the keys are {', '.join(prefix + name for name in expected)}"
