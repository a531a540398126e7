"""Evaluates a checkpoint: python evaluate.py checkpoint=outputs/NAME [data.root=/path/to/imagenet]

Model and data are those of the checkpoint's own config. Every image is counted once, at any number of processes.
A folder of runs, or a pattern, is evaluated run by run, with a table of them at the end.
data.root may also be the folder of ImageNet-A, -R, -V2 or -Sketch (class folders without train/ and val/): a model's
prediction is then made among the classes that are there, as those benchmarks do.
"""

from contextual_cnn.guards.stopping import end_when_asked

if __name__ == "__main__":  # before the imports, which take seconds
    end_when_asked()

import glob
from pathlib import Path

import hydra
from omegaconf import DictConfig

from contextual_cnn import exits
from contextual_cnn.config import read_config
from contextual_cnn.errors import UserError
from contextual_cnn.runs.checkpoint_files import find_checkpoint, has_checkpoint
from contextual_cnn.runs.own_files import check_writable
from contextual_cnn.schema import Group, schema_of
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.coco import CocoSettings
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.evaluation import CLIP_KEYS, DATA_KEYS, SCENE_KEYS, EvaluationSettings

SCHEMA = schema_of(EvaluationSettings) | {
    "data": Group(DataSettings, DATA_KEYS).beside(CocoSettings, SCENE_KEYS),
    "clip": Group(ClipSettings, CLIP_KEYS),
}


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).resolve().parent / "conf" / "evaluate"), config_name="evaluate"
)
@exits.job
def main(hydra_config: DictConfig) -> None:
    config = read_config(hydra_config, SCHEMA)
    given = {
        group: {key: value for key, value in config[group].items() if value is not None} for group in ("data", "clip")
    }
    settings = EvaluationSettings(**config | given)
    checkpoints = _checkpoints(settings.checkpoint)
    for key in ("predictions", "per_class"):
        if (path := settings.file(key)) is not None:
            _check_file(key, path, checkpoints)

    from contextual_cnn.evaluation import (
        evaluate_checkpoints,  # here: torch and timm take seconds, a mistake above none
    )

    evaluate_checkpoints(checkpoints, settings)


def _checkpoints(given: str) -> list[Path]:
    """The checkpoint; those of all runs where a folder of runs or a pattern is given."""
    path = Path(given).expanduser()
    several: list[str] = []
    if path.is_dir() and not has_checkpoint(path):
        several = [str(run) for run in path.iterdir() if run.is_dir()]
    elif not path.exists() and glob.has_magic(given):
        several = glob.glob(str(path))
    found = [find_checkpoint(run) for run in sorted(several) if run.endswith(".pt") or has_checkpoint(Path(run))]
    return found or [find_checkpoint(given)]


def _check_file(key: str, path: Path, checkpoints: list[Path]) -> None:
    if len(checkpoints) > 1:
        raise UserError(f"{key}={path} is of one checkpoint, these are {len(checkpoints)}", f"{key}=null")
    check_writable(path, key)


if __name__ == "__main__":
    exits.run(main)
