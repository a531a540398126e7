"""What happens to an image that cannot be read or decoded: it is named, counted and replaced, or it ends the run.

Whether an image is bad depends on its bytes (and on the part that is decoded), never on what was met before, and what
stands in for it on its place in the epoch: so a resumed run and any number of processes see the same batches.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Literal, TypeVar

from contextual_cnn.errors import UserError
from contextual_cnn.text import printable

log = logging.getLogger(__name__)

COUNTS_AS_WRONG = -1  # the target of a val image that cannot be used: no class, so that no answer is right
_TRIES = 100  # substitutes for one image, before it looks as if there were none

T = TypeVar("T")


class BadImage(Exception):
    """One image that cannot be used, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = printable(name)
        self.reason = printable(reason)


class BadImages:
    """The different images that this process could not use since it started. Threads may report at once.

    Args:
        policy: "skip" goes on until there are more than `limit` of them; "stop" ends with the first.
        noun: what one of them is called.
    """

    def __init__(self, policy: Literal["skip", "stop"], limit: int, noun: str = "image") -> None:
        self._policy, self._limit, self._noun = policy, limit, noun
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def report(self, bad: BadImage) -> None:
        """Names an image in the log, once.

        Raises:
            UserError: by the policy, or for one too many.
        """
        if self._policy == "stop":
            raise UserError(f"the {self._noun} {bad.name} cannot be used: {bad.reason}", f"restore it; {_FIX}")
        with self._lock:
            if bad.name in self._names:
                return
            self._names.add(bad.name)
            count = len(self._names)
        if count > self._limit:
            raise UserError(
                f"more than data.max_bad_images={self._limit} {self._noun}s cannot be used; the last is "
                f"{bad.name}: {bad.reason}",
                f"see to the disk; {_FIX}; or raise data.max_bad_images",
            )
        log.warning(
            "the %s %s cannot be used: %s (bad %ss so far: %d)", self._noun, bad.name, bad.reason, self._noun, count
        )


def first_usable(
    candidates: Iterable[int], use: Callable[[int], T], report: Callable[[BadImage], None], blank: T | None = None
) -> tuple[int | None, T]:
    """The first image that `use` makes something of, and what it makes; those before it are reported.

    Args:
        use: raises BadImage.
        blank: what takes the place if none of them can be used, as in an evaluation, which counts every image.

    Returns:
        Number of the image, None for a blank; what is made of it.

    Raises:
        UserError: none can be used, and no blank was given.
    """
    for index in islice(candidates, _TRIES):
        try:
            return index, use(index)
        except BadImage as bad:
            report(bad)
            last = bad
    if blank is not None:
        return None, blank
    raise UserError(
        f"{_TRIES} images in a row cannot be used; the last is {last.name}: {last.reason}", f"see to the disk; {_FIX}"
    )


_FIX = "list bad images in a file for data.exclude (scripts/data/check_data.py ROOT --write-exclude FILE)"
