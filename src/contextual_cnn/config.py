"""From Hydra's config to plain containers that fit a schema."""

import re
from collections.abc import Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from contextual_cnn.command_line import typed_texts
from contextual_cnn.errors import UserError
from contextual_cnn.schema import Group, Schema, check_all_keys, check_config


def read_config(config: DictConfig, schema: Schema) -> dict[str, Any]:
    """Plain containers, checked: unknown keys, missing and mistyped values are refused before anything starts.

    Raises:
        UserError: the first mistake, with the nearest key or the values allowed.
    """
    check_all_keys(_plain(config), schema)
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
