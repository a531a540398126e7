"""train.py and evaluate.py called in this process, as far as their configs go."""

import sys
from pathlib import Path

import hydra
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import evaluate
import train
from contextual_cnn import exits
from contextual_cnn.config import read_config
from contextual_cnn.tasks import task_settings
from contextual_cnn.tasks.image_classification.settings import ImageClassificationSettings

SCHEMAS = {train: train.schema(ImageClassificationSettings), evaluate: evaluate.SCHEMA}
CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(autouse=True)
def fresh_hydra():
    HydraConfig.instance().cfg = None  # what a command before has left
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"data.root={CONF}", *overrides])
        return read_config(config, train.schema(task_settings(config.task)))


def refused(arguments, monkeypatch, capsys, script=train):
    """A command that ends with status 2: cause and fix, without the words around them."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    exits._wants_traceback.cache_clear()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        exits.run(script.main)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2, printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) == 2, printed
    cause, fix = printed.splitlines()
    assert cause.startswith("error: ")
    return cause.removeprefix("error: "), fix.removeprefix("  fix: ")


def read(arguments, monkeypatch, script=train):
    """The configs of all jobs of a command that does nothing else."""
    seen = []
    folder, name = (CONF, "train") if script is train else (CONF / "evaluate", "evaluate")

    @hydra.main(version_base="1.3", config_path=str(folder), config_name=name)
    @exits.job
    def main(config):
        seen.append(read_config(config, SCHEMAS[script]))

    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    exits.run(main)
    return seen
