"""What follows when losses or gradients stay non-finite: nothing yet, a rollback, or the end of the run."""

from typing import Literal

from contextual_cnn.settings.trainer import TrainerSettings

_MOST_ROLLBACKS = 3


class SkippedSteps:
    """Looks at the steps that were skipped, as trainer.on_nonfinite wants it."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._policy, self._most = settings.on_nonfinite, settings.max_skipped_steps
        self._is_skipping, self._rollbacks, self._rolled_back_at = False, 0, -settings.max_skipped_steps

    def look(self, in_a_row: int) -> Literal["continue", "roll back", "stop"]:
        """What to do after this number of skipped steps in a row."""
        self._is_skipping = in_a_row > 0
        if in_a_row < (1 if self._policy == "stop" else self._most):
            return "continue"
        can_roll_back = self._policy == "rollback" and self._rollbacks < _MOST_ROLLBACKS
        return "roll back" if can_roll_back else "stop"

    def rolled_back(self, step: int) -> None:
        """The weights are those of a checkpoint again."""
        self._rollbacks, self._rolled_back_at, self._is_skipping = self._rollbacks + 1, step, False

    def is_sound(self, step: int) -> bool:
        """Whether the weights look like something to go back to: a rollback must not end where it began."""
        return not self._is_skipping and step - self._rolled_back_at > self._most
