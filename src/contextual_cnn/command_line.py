"""What was typed on the command line, as it was typed, and what Hydra refuses of it, as cause and fix."""

import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from contextual_cnn.errors import UserError
from contextual_cnn.schema import nearest

_SEVERAL = re.compile(r"Ambiguous value for argument '(.*)'$", re.MULTILINE)  # Hydra's, of a comma without --multirun


def typed_texts() -> dict[str, str]:
    """By key, what was typed for this job and was no text to Hydra: 1_000, 1e5, true, null."""
    texts = {}
    for override, text in _typed():
        value = override.value()
        if not override.is_delete() and (value is None or isinstance(value, bool | int | float)):
            texts[override.key_or_group] = text.strip()
    return texts


def _typed() -> Iterator[tuple[Override, str]]:
    """The overrides of this job, each with the text of its value as it was typed."""
    if not HydraConfig.initialized():
        return
    config = HydraConfig.get()
    # A sweep rewrites its overrides for every job: 1e5 becomes 100000.0
    before = _before_the_sweep() if config.mode == RunMode.MULTIRUN else {}
    lines = cast(list[str], OmegaConf.to_container(config.overrides.task))  # unresolved: ${...} is part of it
    for line in lines:
        override = OverridesParser.create().parse_override(line)
        yield override, before.get(line, line.partition("=")[2])


def _before_the_sweep() -> dict[str, str]:
    """What was typed for a job's override, by the line that the sweep makes of it."""
    texts = {}
    for override in _arguments():
        key, text = override.get_key_element(), override.get_value_string()
        if not override.is_sweep_override():
            texts[f"{key}={override.get_value_element_as_str()}"] = text
        elif override.value_type == ValueType.SIMPLE_CHOICE_SWEEP:
            made, typed = list(override.sweep_string_iterator()), text.split(",")
            if len(made) == len(typed):  # else there are commas in quotes
                texts |= {f"{key}={one}": other for one, other in zip(made, typed, strict=True)}
    return texts


def _arguments() -> list[Override]:
    """The overrides of the whole command."""
    return OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if "=" in a and not a.startswith("-")])


def check_choices() -> None:
    """An optional entry of a defaults list passes over a file that is not there; one that was typed must be there.

    Raises:
        UserError: with the nearest name.
    """
    if not HydraConfig.initialized():
        return
    runtime = HydraConfig.get().runtime
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    for override, _ in _typed():
        group, name = override.key_or_group, override.value()
        if not isinstance(name, str) or override.get_key_element().lstrip("+") not in runtime.choices:
            continue
        there = sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})
        if there and (_is_base(name) or not any((folder / group / f"{name}.yaml").is_file() for folder in folders)):
            raise _no_such_choice(group, name, there)


def check_sweep(config: DictConfig, key: str) -> None:
    """Every run of a sweep needs a value of its own for this key: what is swept over is a part of it.

    Raises:
        UserError: it is not, with what to add.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    value = str(cast(dict[str, Any], OmegaConf.to_container(config))[key])
    parts = {key, *re.findall(r"\$\{([\w.]+)\}", value)}
    arguments = {override.key_or_group: override for override in _arguments()}
    for swept in [name for name, override in arguments.items() if override.is_sweep_override()]:
        if any(part == swept or part.startswith(f"{swept}.") for part in parts):
            continue
        if swept == "experiment" and (key not in arguments or "${" in value):  # an experiment brings its own
            continue
        is_group = isinstance(OmegaConf.select(config, swept), DictConfig)
        fix = shlex.quote(f"{key}={value}_${{{swept}.name}}" if is_group else f"{key}={value}_${{{swept}}}")
        raise UserError(f"the runs over {swept} would all have {key}={value}", fix)


def explain(error: Exception) -> UserError:
    """Hydra's, OmegaConf's and YAML's own refusals, as cause and fix."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return _no_such_choice(group, name, error.options)
    if isinstance(error, OverrideParseException):
        return _explain_argument(error.override)
    if isinstance(error, ConfigCompositionException) and (list_of := _SEVERAL.match(str(error))):
        return _explain_argument(list_of[1], "; --multirun makes a run of each")
    if isinstance(error, YAMLError):
        return _explain_yaml(error)
    reason = error.__cause__ or error
    key, parent = getattr(reason, "full_key", None), getattr(reason, "parent_node", None)
    if isinstance(error, ConfigCompositionException) and key and isinstance(parent, DictConfig):
        # The parent is where the path breaks off: the key's last part is compared with what is there
        prefix, _, name = str(key).rpartition(".")
        return UserError(
            f"there is no key {key}", nearest(f"{prefix}." if prefix else "", name, [str(k) for k in parent])
        )
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return UserError(lines[0] if lines else type(reason).__name__, "; ".join(lines[1:4]) or "see --help and conf/")


def _no_such_choice(group: str, name: str, there: Iterable[str]) -> UserError:
    choices = [choice for choice in there if not _is_base(choice)]
    fix = f"there are {', '.join(choices)}"
    if _is_base(name) and name in there:
        return UserError(f"{group}={name} is a part that other choices of {group} share, not a choice", fix)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.3)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    return UserError(f"there is no {group} named {name}", f"{hint}{fix}")


def _is_base(name: str) -> bool:
    """Of a file that others of its group list in their defaults."""
    return name.startswith("_")


def _explain_argument(argument: str, otherwise: str = "") -> UserError:
    """One that Hydra's grammar does not take: as it was typed, and in quotes that the shell leaves."""
    key, equals, value = argument.partition("=")
    if not equals:
        return UserError(
            f"{argument!r} is not KEY=VALUE", "for example data.root=/data/imagenet; --cfg job lists all keys"
        )
    quoted = f"{key}={QuotedString(value, Quote.single).with_quotes()}"
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return UserError(f"{argument!r} is not KEY=VALUE", "a key is GROUP.NAME, as in --cfg job")
    return UserError(
        f"{argument!r} has characters that need quotes",
        f"with quotes that the shell leaves: {shlex.quote(quoted)}{otherwise}",
    )


def _explain_yaml(error: YAMLError) -> UserError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None:
        return UserError(f"{getattr(error, 'name', 'a config')} is no YAML: {what}", "put it right, or remove the file")
    return UserError(
        f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}: no YAML: {what}",
        "put that line right; a value with unusual characters needs quotes",
    )
