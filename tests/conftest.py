"""Real images and real commands for the tests."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from sklearn.datasets import load_sample_images

from tests.helpers import quick_start

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel of ours is declared

ROOT = Path(__file__).parent.parent
HAS_COMPILER = shutil.which("c++") is not None


@pytest.fixture(scope="session")
def photos() -> list[np.ndarray]:
    """Two photographs, (427, 640, 3) uint8."""
    return load_sample_images().images


@pytest.fixture(scope="session")
def image_root(tmp_path_factory, photos) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("images"), photos)


def write_class_folders(root: Path, photos: list[np.ndarray]) -> Path:
    """Class folders in ImageNet's layout: 6 classes, each a part of a photograph; 8 training and 3 val images each."""
    rng = np.random.default_rng(0)
    for label in range(6):
        photo = photos[label % 2][:, label // 2 * 200 : label // 2 * 200 + 240]
        for split, count in (("train", 8), ("val", 3)):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                top, left = rng.integers(0, 427 - 90), rng.integers(0, 240 - 120)
                Image.fromarray(photo[top : top + 90, left : left + 120]).save(folder / f"{i}.JPEG", quality=92)
    return root


@pytest.fixture
def postscript(tmp_path_factory, monkeypatch) -> tuple[bytes, Path]:
    """A PostScript picture; and the file that a stand-in for Ghostscript, first on the PATH, writes when started."""
    folder = tmp_path_factory.mktemp("ghostscript")
    (folder / "gs").write_text(f"#!/bin/sh\necho started > {folder}/note\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # PIL looks for it once
    return (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill\n%%EOF\n",
        folder / "note",
    )


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    # What Hydra's and W&B's parts have left in this process's environment is not for the commands that a test starts
    for name in ("HYDRA_FULL_ERROR", *(name for name in os.environ if name.startswith("WANDB_SERVICE"))):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def _same_log():
    """What a test in this process has done to the package's logger is undone: how the next one sees its records."""
    logger = logging.getLogger("contextual_cnn")
    before = logger.level, logger.propagate, list(logger.handlers)
    yield
    logger.setLevel(before[0])
    logger.propagate, logger.handlers[:] = before[1:]


def wake_up(model):
    """Gives every zero-initialised generator of offsets some weight, as training would."""
    stds = {"weight_offset.out": 0.1, "sampling_offset.out": 0.5, "from_context": 0.1, "offset_mask": 0.1}
    stds["scale_shift.out"] = 0.1
    for name, module in model.named_modules():
        std = next((std for end, std in stds.items() if name.endswith(end)), None)
        if std is not None and module is not None:
            torch.nn.init.normal_(module.weight, std=std)
    return model


def run_command(
    *command: str, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Runs one of the project's scripts: offline, one thread, output captured; without the seconds of imports."""
    with tempfile.TemporaryDirectory() as folder:
        files = {"output": Path(folder) / "stdout", "errors": Path(folder) / "stderr"}
        started = quick_start.Command(*command, folder=cwd, **files, **os.environ | environment)
        status = started.wait(timeout)
        stdout, stderr = (file.read_text() for file in files.values())
        return subprocess.CompletedProcess(command, status, stdout, stderr)


def run_python(
    *arguments: str, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a Python of its own, where that is the point; otherwise as `run_command`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def torchrun(processes: int, *command: str, **options) -> subprocess.CompletedProcess:
    """As `run_python`, in several processes of one node, by the real launcher."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return run_python(*launcher, *command, **options)


def run_group(processes: int, *command: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """As `run_command`, in several processes that meet as those of torchrun do; their output, rank by rank."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = quick_start.group(processes, *command, folder=Path(folder), **os.environ | environment)
        statuses = [rank.wait(timeout) for rank in ranks]
        printed = "".join(rank.printed for rank in ranks)
        return subprocess.CompletedProcess(command, max(statuses, key=abs), printed, printed)


def small_run(image_root: Path, output_dir: Path, *overrides: str) -> list[str]:
    """Arguments of train.py for two seconds of training with every part in place."""
    return [
        "train.py",
        "model=contextual_convnext_atto",
        "model.layer_scale=0.1",
        "model.drop_path_rate=0.1",
        f"data.root={image_root}",
        "data.image_size=32",
        "data.threads=1",
        "data.eval_batch_size=5",
        "schedule.epochs=4",
        "schedule.warmup_epochs=1",
        "trainer.device=cpu",
        "trainer.global_batch_size=16",
        "trainer.micro_batch_size=8",
        "trainer.log_every=1",
        "trainer.ema_decay=0.9",
        "logger=local",
        f"output_dir={output_dir}",
        "run_name=run",
        *overrides,
    ]
