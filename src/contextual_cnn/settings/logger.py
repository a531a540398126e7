"""The keys of conf/logger/: where metrics go beside metrics.jsonl."""

from dataclasses import dataclass
from typing import Literal

from contextual_cnn.settings.keys import may_change


@dataclass(frozen=True, kw_only=True)
class LoggerSettings:
    """wandb: "auto" is what WANDB_MODE says; without it online where there is an API key (WANDB_API_KEY or
        `wandb login`) and offline elsewhere; `wandb sync FOLDER/wandb/offline-run-*` sends an offline run later.
    project, entity: of W&B.
    patience: seconds that the end of the run waits for W&B.
    """

    wandb: Literal["auto", "online", "offline", "off"] = may_change("auto")
    project: str = may_change("contextual-cnn")
    entity: str | None = may_change(None)
    patience: float = may_change(30)
