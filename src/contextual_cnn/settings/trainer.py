"""The keys of conf/trainer/: how a run is trained, beside its model and data."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from contextual_cnn.errors import UserError
from contextual_cnn.settings.keys import may_change

Clipping = Literal["norm", "value", "agc"]
Precision = Literal["auto", "bf16", "fp32"]
_MOST_HOURS = 1000


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How the loop runs; nothing here is about the model.

    device: "auto" takes a GPU where there is one.
    precision: "auto" is bfloat16 autocast on a GPU and float32 on a CPU.
    global_batch_size: images per optimizer step over all processes (paper: 4096).
    micro_batch_size: images per process and forward pass; the accumulation follows from it.
    norm_batch: images in a statistic of a batch norm that trains, the recipe's micro-batch. Larger micro-batches are
        cut into groups of so many.
    sync_bn: ranks whose micro-batches are smaller join them up to norm_batch; false leaves each micro-batch to itself.
    compress_gradients: they cross the ranks as bfloat16, half of the bytes.
    compile: by torch.compile; "auto" does it on a GPU: on an H100 a step of plain ConvNeXt-T took two thirds of the
        time, and the first one a minute more.
    compile_mode: torch's; "max-autotune-no-cudagraphs" takes longer over it.
    ema_decay: per optimizer step; null keeps no average. Evaluated beside the raw weights.
    ema_warmup: lets the decay grow to its value, for runs too short for it.
    grad_clip: largest norm of the gradient; null does not clip.
    grad_clip_mode: "value" limits each entry instead, "agc" each unit by its weights (see `clip_gradients`).
    max_steps: ends the run early, without bending the schedule.
    max_time: ends the run in order after "hours:minutes:seconds", or a number of hours, of this process;
        the same command goes on.
    on_nonfinite: a step whose loss or gradient is not finite is skipped in any case. "skip" stops the run after
        max_skipped_steps of them in a row, "rollback" then goes back to the weights of the newest checkpoint and on
        with the data that follow, and "stop" takes no further step after the first and stops when it is noticed,
        which is when metrics are logged.
    max_skipped_steps: see on_nonfinite.
    timeout_minutes: how long a process waits for one that does not answer.
    dry_run: takes a few steps, tells what the whole run will need, and leaves everything as it was.
    """

    device: Literal["auto", "cuda", "cpu"] = may_change("auto")
    precision: Precision = "auto"
    global_batch_size: int = 4096
    micro_batch_size: int = may_change(128)
    norm_batch: int = 128
    sync_bn: bool = True
    compress_gradients: bool = False
    channels_last: bool = may_change(True)
    compile: Literal["auto"] | bool = may_change("auto")
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = may_change("default")
    ema_decay: float | None = 0.9999
    ema_warmup: bool = False
    grad_clip: float | None = None
    grad_clip_mode: Clipping = "norm"
    max_steps: int | None = may_change(None)
    max_time: str | float | None = may_change(None)
    on_nonfinite: Literal["skip", "stop", "rollback"] = may_change("skip")
    max_skipped_steps: int = may_change(10)
    log_every: int = may_change(50)
    eval_every: int = may_change(1)
    timeout_minutes: float = may_change(10)
    dry_run: bool = may_change(False)

    def compiles_on(self, device_type: str) -> bool:
        """Whether models are compiled on a kind of device."""
        return device_type == "cuda" if self.compile == "auto" else self.compile

    def __post_init__(self) -> None:
        for key in ("log_every", "eval_every", "max_skipped_steps", "max_steps"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"trainer.{key} must be 1 or more, got {getattr(self, key)}", f"trainer.{key}=1")
        if self.norm_batch < 2:
            raise UserError(f"trainer.norm_batch must be 2 or more, got {self.norm_batch}", "trainer.norm_batch=128")
        self.max_seconds  # noqa: B018 - refuses what is no time
        if not 0 < self.timeout_minutes < math.inf:
            raise UserError(
                f"trainer.timeout_minutes must be above 0 and finite, got {self.timeout_minutes}",
                "trainer.timeout_minutes=10",
            )
        if self.grad_clip is not None and not 0 < self.grad_clip < math.inf:
            raise UserError(
                f"trainer.grad_clip must be above 0 and finite, got {self.grad_clip}", "trainer.grad_clip=null is off"
            )
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(
                f"trainer.ema_decay must be at least 0 and below 1, got {self.ema_decay}",
                "trainer.ema_decay=0.9999",
            )

    @property
    def max_seconds(self) -> float | None:
        """max_time in seconds: "3:50:00" or "3:50" (hours first), or a number of hours.

        Raises:
            UserError: neither of them.
        """
        if self.max_time is None:
            return None
        if isinstance(self.max_time, str):
            match = re.fullmatch(r"(\d+):([0-5]\d)(?::([0-5]\d))?", self.max_time)
            hours = match and sum(int(part or 0) / 60**i for i, part in enumerate(match.groups()))
        else:
            hours = self.max_time  # YAML reads an unquoted 3:50:00 as 13800, its seconds
        if not hours or not 0 < hours <= _MOST_HOURS:
            raise UserError(
                f"trainer.max_time={self.max_time} is no time limit",
                "trainer.max_time=3:50:00 (hours:minutes:seconds; quoted in a YAML file) or "
                "trainer.max_time=3.8 (hours)",
            )
        return 3600 * hours
