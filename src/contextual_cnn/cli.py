"""What the two entry scripts share: from Hydra's config to checked keyword arguments, and errors made for people.

The keyword-only parameters of a group's function or class are the schema of that group: `conf/model/*.yaml` holds
what `build_model` takes, and nothing else. Positional parameters come from the program.
"""

import contextlib
import difflib
import functools
import hashlib
import inspect
import json
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TextIO, Union, get_args, get_origin, get_type_hints

from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from contextual_cnn.errors import STOPPED, LostProcess, Stopped, UserError, report_status

Schema = Mapping[str, Any]  # a key's type, or a Group


def run(main: Callable[[], None]) -> None:
    """Starts a Hydra main; a config that cannot be composed is the user's mistake too."""
    report_status(0)
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)
    # Hydra then raises its errors instead of printing them in its own way; ours are printed by _exit
    _wants_traceback()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        _exit(_explain(error))


def job(function: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Ends a user's mistake with its cause, its fix and exit status 2; HYDRA_FULL_ERROR=1 adds the traceback.

    A run that was stopped in order ends with status 75, one that lost another process with 1.

    Belongs directly on the function, inside hydra.main, which announces every exception that reaches it.
    """

    @functools.wraps(function)
    def wrapped(config: DictConfig) -> None:
        try:
            _check_mode()
            function(config)
        except UserError as error:
            _exit(error)
        except OmegaConfBaseException as error:
            _exit(_explain(error))
        except Stopped:
            _leave(STOPPED)
        except LostProcess as error:
            print(f"error: {error}\n  fix: see what ended that process; the same command resumes", file=sys.stderr)
            # A restart helps neither a mistake nor a request to stop, whichever process of this node has had it
            sys.exit(0 if _reported_status() in ("2", f"{STOPPED}") else 1)
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command resumes from the last checkpoint")

    return wrapped


def _check_mode() -> None:
    """Raises UserError where every process of a run would start a sweep of its own."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN and "LOCAL_RANK" in os.environ:
        raise UserError(
            "--multirun under torchrun: every process would go through the sweep by itself",
            "a shell loop or a job array, one torchrun for each value; --multirun alone runs in one process",
        )


@functools.cache
def _wants_traceback() -> bool:
    """Asked of the user's environment, once, before `run` sets the variable for Hydra."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _exit(error: UserError) -> NoReturn:
    if _wants_traceback():
        traceback.print_exc()
    if _is_first_to_say(str(error)):
        where = (
            f"\n  on: rank {os.environ.get('RANK', '0')}, {socket.gethostname()}"
            if os.environ.get("WORLD_SIZE", "1") != "1"
            else ""
        )
        print(f"error: {error}{where}", file=sys.stderr)
    _leave(2)


def _is_first_to_say(message: str) -> bool:
    """Of the processes that torchrun started here together: a mistake of all is printed once, one of each by each."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # ATTEMPT/RANK/error.json
    if error_file is None:
        return True
    said = Path(error_file).parent.parent / f"said_{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # rather twice than never
        return True
    return True


def _leave(status: int) -> NoReturn:
    """Ends with a status that a restart would not change."""
    sys.exit(0 if report_status(status) else status)


def _reported_status() -> str | None:
    """What a process of this node has written."""
    path = os.environ.get("CONTEXTUAL_CNN_STATUS_FILE")
    return Path(path).read_text() if path is not None else None


class _Lasting:
    """A terminal or a pipe that may go away: then what is printed is lost, and not the run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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
        names = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        self.types = {name: hints[name] | None if name in computed else hints[name] for name in names}


def read_config(config: DictConfig, schema: Schema) -> dict[str, Any]:
    """Plain containers, checked: unknown keys, missing and mistyped values are refused before anything starts.

    Raises:
        UserError: the first mistake, with the nearest key or the values allowed.
    """
    _check_all_keys(OmegaConf.to_container(config), schema)
    _check_interpolations("", OmegaConf.to_container(config))
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        here = ", or for good on this machine in conf/local/ (docs/train.md)" if "data.root" in missing else ""
        raise UserError(f"no value for {', '.join(missing)}", " ".join(f"{key}=VALUE" for key in missing) + here)
    plain = OmegaConf.to_container(config, resolve=True)
    check_config(plain, schema)
    return plain


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
            raise UserError(f"there is no key {prefix}{key}", _nearest(prefix, str(key), expected))


def _nearest(prefix: str, key: str, expected: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, list(expected), n=1, cutoff=0.5)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"the keys are {', '.join(prefix + name for name in expected)}"


def _check_value(key: str, value: Any, expected: Any) -> None:
    if not _fits(value, expected):
        raise UserError(f"{key}={_yaml(value)} is not {_spell(expected)}", f"for example {key}={_example(expected)}")


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
    return str(value) if isinstance(value, str) else json.dumps(value, default=str)


def _explain(error: Exception) -> UserError:
    """Hydra's and OmegaConf's own refusals, as cause and fix."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        near = difflib.get_close_matches(name, error.options, n=1, cutoff=0.3)
        hint = f"did you mean {group}={near[0]}? " if near else ""
        return UserError(f"there is no {group} named {name}", f"{hint}there are {', '.join(error.options)}")
    if unreadable := re.search(r"LexerNoViableAltException: ([\w.]+)=(.*)", str(error.__cause__ or error)):
        key, value = unreadable.groups()
        return UserError(
            f"{key}={value} has unusual characters", f"with quotes that the shell leaves: \"{key}='{value}'\""
        )
    reason = error.__cause__ or error
    key, parent = getattr(reason, "full_key", None), getattr(reason, "parent_node", None)
    if isinstance(error, ConfigCompositionException) and key and isinstance(parent, DictConfig):
        # The parent is where the path breaks off: the key's last part is compared with what is there
        prefix, _, name = str(key).rpartition(".")
        return UserError(
            f"there is no key {key}", _nearest(f"{prefix}." if prefix else "", name, [str(k) for k in parent])
        )
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return UserError(lines[0] if lines else type(reason).__name__, "; ".join(lines[1:4]) or "see --help and conf/")
