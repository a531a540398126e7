"""How a command ends before its time, other than by a defect: a user's mistake, or a request to stop."""

STOPPED = 75  # exit status EX_TEMPFAIL: nothing is wrong, start the same command again


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


class Stopped(Exception):
    """A signal or a time limit ended the run with everything saved. The entry scripts exit with STOPPED."""


class LostProcess(Exception):
    """Another process of the run has died or does not answer. The entry scripts exit with 1, and torchrun restarts."""
