"""Whether all processes run the same thing: code, configuration, data. Found at the start, not in a bad result."""

import hashlib
import json
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

import contextual_cnn
from contextual_cnn.distributed import gather_numbers
from contextual_cnn.errors import UserError

_FIXES = {
    "configuration": "start every node with the same command",
    "code": "bring every node to the same commit and the same versions of Python and torch",
    "operators": "export CONTEXTUAL_CNN_OPS=torch (cpp, triton) on every node; by itself each takes what it can build",
    "train images": "copy the data set to the nodes again; compare the number of files",
    "val images": "copy the data set to the nodes again; compare the number of files",
    "checkpoint": "set output_dir to a folder that all nodes share",
}


def digest(*parts: str | bytes) -> str:
    """SHA-256 of the parts, kept apart."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()


def digest_config(config: Mapping[str, Any], by_node: Collection[str]) -> str:
    """Without the keys (GROUP.NAME) that may differ from node to node."""
    kept = {
        group: {key: value for key, value in keys.items() if f"{group}.{key}" not in by_node}
        if isinstance(keys, Mapping)
        else keys
        for group, keys in config.items()
    }
    return digest(json.dumps(kept, sort_keys=True))


def digest_code() -> str:
    """Of this package's sources and of the versions that results hang on."""
    root = Path(contextual_cnn.__file__).parent
    sources = [path for path in sorted(root.rglob("*")) if path.suffix in (".py", ".cpp")]
    contents = [part for path in sources for part in (str(path.relative_to(root)), path.read_bytes())]
    return digest(platform.python_version(), torch.__version__, *contents)


def check_agreement(facts: Mapping[str, str]) -> None:
    """Compares facts over the ranks; called by all of them with the same names.

    Args:
        facts: a text by name (a key of _FIXES); only a hash of it crosses the ranks.

    Raises:
        UserError: on all ranks, naming those that differ from rank 0.
    """
    numbers = [int(digest(text)[:15], 16) for text in facts.values()]
    everyones = gather_numbers(numbers)
    for i, name in enumerate(facts):
        others = [rank for rank, theirs in enumerate(everyones) if theirs[i] != everyones[0][i]]
        if others:
            ranks = f"rank {others[0]}" + (f" and {len(others) - 1} more" if others[1:] else "")
            raise UserError(f"not the same {name} on {ranks} of {len(everyones)} as on rank 0", _FIXES[name])
