"""What Hydra gives a user at the prompt: completion, the config without a run, sweeps, settings of one machine."""

import shutil

import pytest
import yaml

from tests.conftest import ROOT
from tests.helpers.quick_start import run

pytestmark = pytest.mark.run

NOISE = ["data=synthetic", "data.limit=16", "data.loader=synthetic", "data.image_size=32", "augment=none"]
SMALL = ["model=contextual_convnext_atto", "trainer=smoke", "trainer.device=cpu", "trainer.max_steps=1", "logger=local"]


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("python train.py model=contextual_convnext_", {"atto", "atto_digits", "b", "s", "t"}),
        ("python train.py optimizer.weight", {"_decay="}),
    ],
)
def test_the_shell_completes_groups_and_keys(line, completions, tmp_path):
    status, printed = run(
        "train.py", "-sc", "query=bash", output=tmp_path / "output", COMP_LINE=line, COMP_POINT=str(len(line))
    )
    assert status == 0
    word = line.split()[-1]
    assert {found.removeprefix(word) for found in printed.split()} == completions


def test_the_shells_script_is_installed_by_eval(tmp_path):
    _, printed = run("train.py", "-sc", "install=bash", output=tmp_path / "output")
    assert "complete -o " in printed


def test_the_config_is_printed_and_nothing_is_run(tmp_path):
    status, printed = run(
        "train.py", "--cfg", "job", "data.root=/nowhere", f"output_dir={tmp_path}/runs", output=tmp_path / "output"
    )
    assert status == 0
    assert yaml.safe_load(printed)["trainer"]["global_batch_size"] == 4096
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_a_run_for_each_value_and_none_under_torchrun(tmp_path):
    command = ["train.py", "--multirun", "seed=1,2", "run_name=seed_${seed}", f"output_dir={tmp_path}", *NOISE, *SMALL]
    status, printed = run(*command, output=tmp_path / "output", LOCAL_RANK="0")
    assert status == 2
    assert "--multirun under torchrun" in printed
    status, printed = run(*command, output=tmp_path / "output")
    assert status == 0, printed
    for seed in (1, 2):
        config = yaml.safe_load((tmp_path / f"seed_{seed}" / "config.yaml").read_text())
        assert config["seed"] == seed
        assert (tmp_path / f"seed_{seed}" / "checkpoints" / "last.pt").exists()


def test_what_is_so_on_one_machine_is_kept_beside_the_config(tmp_path):
    """In a copy of conf/, so that a user's own file is left alone."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf", ignore=shutil.ignore_patterns("local"))
    (tmp_path / "conf" / "local").mkdir()
    (tmp_path / "conf" / "local" / "imagenet.yaml").write_text("root: /here\nthreads: 3\n")

    def data(*overrides):
        command = ["train.py", "--config-path", str(tmp_path / "conf"), "--cfg", "job", *overrides]
        status, printed = run(*command, output=tmp_path / "output")
        assert status == 0, printed
        return yaml.safe_load(printed)["data"]

    assert (data()["root"], data()["threads"]) == ("/here", 3)
    assert data("data.root=/there")["root"] == "/there"
    assert data("experiment=digits")["root"] == "data/digits"
