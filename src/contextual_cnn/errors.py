"""A user's mistake, as opposed to a defect: one line with the cause and one with the fix."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something only the user can put right. The entry scripts print it without a traceback and exit with 2.

    Args:
        cause: what is wrong, naming the value, the file or the key.
        fix: what to do about it, as something that can be typed.
    """

    def __init__(self, cause: str, fix: str) -> None:
        super().__init__(cause, fix)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.cause}\n  fix: {self.fix}"


def run_script(main: Callable[[], None]) -> None:
    """Runs a plain script's main; a user's mistake is printed as cause and fix and ends it with status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
