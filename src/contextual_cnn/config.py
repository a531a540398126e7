"""From Hydra's config to checked keyword arguments.

The keyword-only parameters of a group's function or class are the schema of that group: `conf/model/*.yaml` holds
what `build_model` takes, and nothing else. Positional parameters come from the program.
"""

import inspect
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from contextual_cnn.command_line import nearest, typed_texts
from contextual_cnn.errors import UserError

Schema = Mapping[str, Any]  # a key's type, or a Group


class Group:
    """A group of keys in `read_config`'s schema.

    Args:
        takes: the function or class whose keyword-only parameters are the group's keys.
        computed: those of them that the program finds out itself where the config leaves them null.
    """

    def __init__(self, takes: Callable, *computed: str) -> None:
        function = takes.__init__ if inspect.isclass(takes) else takes
        hints = get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
        keys = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        self.types = {name: hints[name] | None if name in computed else hints[name] for name in keys}
        self.required = [name for name, parameter in keys.items() if parameter.default is parameter.empty]


def read_config(config: DictConfig, schema: Schema) -> dict[str, Any]:
    """Plain containers, checked: unknown keys, missing and mistyped values are refused before anything starts.

    Raises:
        UserError: the first mistake, with the nearest key or the values allowed.
    """
    _check_all_keys(_plain(config), schema)
    config = _with_texts_as_typed(config, schema)
    _check_interpolations("", OmegaConf.to_container(config))
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        here = ", or for good on this machine in conf/local/ (docs/train.md)" if "data.root" in missing else ""
        raise UserError(f"no value for {', '.join(missing)}", " ".join(f"{key}=VALUE" for key in missing) + here)
    plain = _plain(config, resolve=True)
    check_config(plain, schema)
    return plain


def _plain(config: DictConfig, resolve: bool = False) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=resolve))


def _with_texts_as_typed(config: DictConfig, schema: Schema) -> DictConfig:
    """Where a text is wanted, what was typed is one: run_name=1_000 and run_name=null are names."""
    config = config.copy()
    for key, text in typed_texts().items():
        group, _, name = key.rpartition(".")
        expected = schema[group].types.get(name) if isinstance(schema.get(group), Group) else schema.get(key)
        if expected is str or (expected == (str | None) and text.lower() != "null"):
            OmegaConf.update(config, key, text)
    return config


def _check_interpolations(prefix: str, value: Any) -> None:
    """Only ${other.key}: a resolver (${oc.env:NAME}) runs code or lets the environment into what is saved and sent."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_interpolations(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_interpolations(f"{prefix}[{i}]", item)
    elif isinstance(value, str) and "${" in re.sub(r"\$\{[\w.]+\}", "", value):
        raise UserError(
            f"{prefix}={value} would be computed when the config is read",
            f"write the value itself; only references to other keys work here, as {prefix}=${{run_name}}",
        )


def check_config(plain: Mapping[str, Any], schema: Schema) -> None:
    """As `read_config`, for containers that are plain already (a checkpoint's)."""
    _check_all_keys(plain, schema)
    for key, expected in schema.items():
        if isinstance(expected, Group):
            if absent := [f"{key}.{name}" for name in expected.required if name not in plain[key]]:
                raise UserError(f"no value for {', '.join(absent)}", " ".join(f"{name}=VALUE" for name in absent))
            for name, value in plain[key].items():
                _check_value(f"{key}.{name}", value, expected.types[name])
        else:
            _check_value(key, plain[key], expected)


def _check_all_keys(plain: Mapping[str, Any], schema: Schema) -> None:
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


def check_run_name(name: str) -> None:
    """A folder below output_dir: a name, or GROUP/NAME."""
    if any(part in ("", ".", "..") or part != part.strip() for part in name.split("/")):
        raise UserError(
            f"run_name={_shown(name)!r} is no folder below output_dir", "run_name=NAME, or run_name=GROUP/NAME"
        )


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
