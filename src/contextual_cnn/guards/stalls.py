"""A warning for a run that waits for its data."""

import logging

log = logging.getLogger(__name__)

_MOST_DATA_WAIT = 20  # percent of the time


class StallWatch:
    """Warns once; the figure is in every line of the log."""

    def __init__(self) -> None:
        self._is_first, self._has_warned = True, False

    def look(self, step: int, data_wait: float) -> None:
        """The share of the time since the last log step that went by in waiting, in percent."""
        is_stall = data_wait > _MOST_DATA_WAIT and not self._is_first
        self._is_first = False  # until the first log step the pipelines start
        if is_stall and not self._has_warned:
            log.warning(
                "step %d: %.0f %% of the time went by in waiting for images; more data.threads, a faster disk or "
                "smaller images would help",
                *(step, data_wait),
            )
            self._has_warned = True
