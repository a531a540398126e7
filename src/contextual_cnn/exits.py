"""How the two entry scripts start and end: a mistake as its cause, its fix and exit status 2, and no traceback."""

import contextlib
import functools
import hashlib
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from contextual_cnn.command_line import check_choices, explain
from contextual_cnn.errors import STOPPED, LostProcess, Stopped, UserError, report_status, reported_status
from contextual_cnn.text import print_any_text


def run(main: Callable[[], None]) -> None:
    """Starts a Hydra main; a config that cannot be composed is the user's mistake too."""
    report_status(0)
    print_any_text()
    sys.stdout, sys.stderr = _Lasting(sys.stdout), _Lasting(sys.stderr)
    # Hydra then raises its errors instead of printing them in its own way; ours are printed by _exit
    _wants_traceback()
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        _exit(explain(error))


def job(function: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Ends a user's mistake with its cause, its fix and exit status 2; HYDRA_FULL_ERROR=1 adds the traceback.

    A run that was stopped in order ends with status 75, one that lost another process with 1.

    Belongs directly on the function, inside hydra.main, which announces every exception that reaches it.
    """

    @functools.wraps(function)
    def wrapped(config: DictConfig) -> None:
        try:
            _check_mode()
            check_choices()
            function(config)
        except UserError as error:
            _exit(error)
        except OmegaConfBaseException as error:
            _exit(explain(error))
        except Stopped:
            _leave(STOPPED)
        except LostProcess as error:
            print(f"error: {error}\n  fix: see what ended that process; the same command resumes", file=sys.stderr)
            # A restart helps neither a mistake nor a request to stop, whichever process of this node has had it
            sys.exit(0 if reported_status() in ("2", f"{STOPPED}") else 1)

    return _recorded(wrapped)


def _recorded(function: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """torchrun shows the traceback of the process that failed first, if `record` has handed it over."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return function
    from torch.distributed.elastic.multiprocessing.errors import record  # here: torch takes seconds

    return record(function)


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
