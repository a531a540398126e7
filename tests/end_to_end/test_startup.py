"""What a command loads: a mistake is found before torch, and a run loads only what it uses."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ROOT, run_python, small_run
from tests.helpers.quick_start import free_port

pytestmark = pytest.mark.run

HEAVY = ("torch", "torchvision", "timm", "nvidia.dali", "wandb", "matplotlib", "sklearn", "scipy", "triton")
WATCHED = f"""
import atexit, json, runpy, sys
atexit.register(lambda: print(json.dumps([name for name in {HEAVY} if sys.modules.get(name)]), file=sys.stderr))
sys.argv = sys.argv[1:]
sys.path.insert(0, "{ROOT}")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def loaded(*command, status=0, **environment):
    """Which of the heavy packages a command has imported when it ends."""
    done = run_python("-c", WATCHED, *command, **environment)
    assert done.returncode == status, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["train.py", "--help"], 0),
        (["train.py", "--cfg", "job"], 0),
        (["train.py", "experiment=tabel1_t"], 2),
        (["train.py", "optimizer.lrr=1"], 2),
        (["train.py", "data.root=/nowhere", "optimizer.lr=-1"], 2),
        (["train.py", "data.root=/nowhere"], 2),
        (["evaluate.py", "--help"], 0),
        (["evaluate.py", "checkpoint=/nowhere"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_mistakes_load_nothing_heavy(arguments, status):
    assert loaded(*arguments, status=status) == set()


BY_TIMM = {"torch", "torchvision", "timm", "wandb", "triton"}  # it imports all of them itself


def test_a_run_loads_what_it_uses(image_root, tmp_path):
    """A run without DALI, stopped by its time limit before there is a picture to draw."""
    limit = ["data.loader=synthetic", "trainer.max_time=0.0001"]
    assert loaded(*small_run(image_root, tmp_path, *limit), status=75) <= BY_TIMM


def test_wandb_is_for_rank_0_alone(image_root, tmp_path):
    """It is most of a second and thousands of files for each process."""
    meeting = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    command = small_run(image_root, tmp_path, "data.loader=synthetic", "trainer.max_steps=1")
    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(loaded, *command, RANK=rank, LOCAL_RANK=rank, **meeting) for rank in ("0", "1")]
    assert "wandb" in ranks[0].result()
    assert ranks[1].result() == ranks[0].result() - {"wandb", "matplotlib"}
