"""Trains a model: python train.py model=contextual_convnext_t data.root=/path/to/imagenet run_name=NAME

The same command again resumes. Under torchrun, on any number of nodes, it is the same command too.
Exit status: 0 complete; 75 stopped by a signal or trainer.max_time, to be started again; 2 a mistake to put right.
"""

from contextual_cnn.guards.stopping import end_when_asked

if __name__ == "__main__":  # before the imports, which take seconds
    end_when_asked()

from dataclasses import asdict
from pathlib import Path

import hydra
from omegaconf import DictConfig

from contextual_cnn import exits
from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.command_line import check_sweep
from contextual_cnn.config import read_config
from contextual_cnn.errors import Stopped
from contextual_cnn.guards.stopping import StopRequest
from contextual_cnn.launcher import is_main_process, leave_out, world_size
from contextual_cnn.runs.loggers import check_key
from contextual_cnn.schema import Schema, schema_of
from contextual_cnn.settings.keys import record_of
from contextual_cnn.settings.run import RunSettings
from contextual_cnn.tasks import task_settings


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="train")
@exits.job
def main(hydra_config: DictConfig) -> None:
    check_sweep(hydra_config, "run_name")
    kind = task_settings(hydra_config.get("task"))
    config = read_config(hydra_config, schema(kind))
    settings = record_of(RunSettings, config)
    check_key(settings.logger)
    found = record_of(kind, config).open()
    plan = BatchPlan.make(
        images=found.samples,
        global_batch=settings.trainer.global_batch_size,
        micro_batch=settings.trainer.micro_batch_size,
        world_size=world_size(),
    )
    found.check(plan)
    request = StopRequest(settings.trainer.max_seconds)

    if not is_main_process():
        leave_out("wandb")  # which timm imports: most of a second and thousands of files, for rank 0 alone
    from contextual_cnn.training import train  # here: torch and timm take seconds, and every mistake above none

    if not train(settings, found.load(), plan, request, config | asdict(found.settings)):
        raise Stopped


def schema(task: type) -> Schema:
    """The keys of a run: those that all have, and the task's own."""
    return schema_of(RunSettings) | schema_of(task)


if __name__ == "__main__":
    exits.run(main)
