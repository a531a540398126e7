"""What the records of settings have in common: marks on keys, and records made of a config."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from contextual_cnn.errors import UserError

Record = TypeVar("Record")

# What the absence of a key means in the config of a run that was started before there was the key
LATER_KEYS: dict[str, Any] = {
    "task": "image_classification",
    "data": {"interpolation": "bicubic"},
    "trainer": {
        "norm_batch": 128,
        "sync_bn": True,
        "compress_gradients": False,
    },  # which nothing is made of where a run is of DRAWS 1
}


def may_change(default: Any = MISSING, *, by_node: bool = False) -> Any:
    """A key whose value may change from one start of a run to the next without making another run of it.

    Args:
        by_node: it may also differ from node to node of one start.
    """
    return field(default=default, metadata={"may_change": True, "by_node": by_node})


def marked(record: type, mark: str, prefix: str = "") -> Iterator[str]:
    """The keys with a mark ("may_change" or "by_node"), as they are typed: data.root."""
    types = get_type_hints(record)
    for key in fields(record):
        if is_dataclass(kind := types[key.name]):
            yield from marked(kind, mark, f"{prefix}{key.name}.")  # type: ignore[arg-type] # it is a class
        elif key.metadata.get(mark):
            yield f"{prefix}{key.name}"


def record_of(kind: type[Record], config: Mapping[str, Any]) -> Record:
    """A record of its keys of a checked config; groups become records themselves. Other keys are left alone."""
    types = get_type_hints(kind)
    values = {key.name: config[key.name] for key in fields(kind)}  # type: ignore[arg-type] # of dataclasses
    return kind(**{key: types[key](**value) if is_dataclass(types[key]) else value for key, value in values.items()})


def overridden(record: Record, group: str, given: Mapping[str, Any]) -> Record:
    """A record with other values.

    Raises:
        UserError: keys that it does not have; the group is what messages call it.
    """
    keys = [f"{group}.{key}" for key in given if not hasattr(record, key)]
    if keys:
        raise UserError(f"the run of this checkpoint has no {', '.join(keys)}", " ".join(f"{key}=null" for key in keys))
    return replace(record, **given)  # type: ignore[type-var] # of dataclasses
