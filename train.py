"""Trains a model: python train.py model=contextual_convnext_t data.root=/path/to/imagenet run_name=NAME

The same command again resumes. Under torchrun, on any number of nodes, it is the same command too.
Exit status: 0 complete; 75 stopped by a signal or trainer.max_time, to be started again; 2 a mistake to put right.
"""

from contextual_cnn.engine.stopping import end_when_asked

if __name__ == "__main__":  # before the imports, which take seconds
    end_when_asked()

from pathlib import Path

import hydra
from omegaconf import DictConfig

from contextual_cnn import cli
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.data.sampler import BatchPlan
from contextual_cnn.engine.loggers import check_key
from contextual_cnn.engine.stopping import StopRequest
from contextual_cnn.errors import Stopped, UserError
from contextual_cnn.launcher import world_size
from contextual_cnn.settings.run import RunSettings

SCHEMA = cli.schema_of(RunSettings)


@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf"), config_name="train")
@cli.job
def main(hydra_config: DictConfig) -> None:
    cli.check_sweep(hydra_config, "run_name")
    config = cli.read_config(hydra_config, SCHEMA)
    settings = RunSettings.of(config)
    check_key(settings.logger)
    data = ImageData(settings.data)
    plan = BatchPlan.make(
        images=len(data.sources["train"]),
        global_batch=settings.trainer.global_batch_size,
        micro_batch=settings.trainer.micro_batch_size,
        world_size=world_size(),
    )
    settings.augment.check_micro_batch(plan.micro_batch)
    config["model"]["num_classes"] = _num_classes(settings, data)
    request = StopRequest(settings.trainer.max_seconds)

    from contextual_cnn.training import train  # here: torch and timm take seconds, and every mistake above none

    if not train(RunSettings.of(config), data, plan, request, config):
        raise Stopped


def _num_classes(settings: RunSettings, data: ImageData) -> int:
    wanted = settings.model.num_classes
    if wanted is not None and wanted != data.num_classes:
        raise UserError(
            f"model.num_classes={wanted}, but {settings.data.root} has {data.num_classes} classes",
            "model.num_classes=null takes the number from the data",
        )
    return data.num_classes


if __name__ == "__main__":
    cli.run(main)
