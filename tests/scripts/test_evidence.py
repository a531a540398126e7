"""The small-scale evidence: its data sets, and the table from real runs."""

import gzip
import json
import struct

import numpy as np
import pytest
from PIL import Image

from tests.conftest import run_command

pytestmark = pytest.mark.run


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Fashion-MNIST's four files, with 20 images of noise in each split."""
    folder = tmp_path_factory.mktemp("fashion_mnist")
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (20, 28, 28), np.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.repeat(np.arange(10, dtype=np.uint8), 2))
    return folder


@pytest.mark.slow
def test_fashion_becomes_class_folders_and_the_variants_a_table(source, tmp_path):
    done = run_command(
        "scripts/data/prepare_fashion.py", str(tmp_path / "fashion"), "--source", str(source), "--val", "1"
    )
    assert done.returncode == 0, done.stderr
    images = sorted((tmp_path / "fashion").glob("*/*/*.jpg"))
    assert [len([path for path in images if split in path.parts]) for split in ("train", "val")] == [20, 10]
    with Image.open(images[0]) as image:
        assert (image.size, image.mode) == ((40, 40), "RGB")
        assert np.asarray(image)[:4].max() < 20  # the margin is black

    small = ["schedule.epochs=2", "schedule.warmup_epochs=0", "trainer.eval_every=2", "trainer.max_steps=4"]
    small += [f"data.root={tmp_path / 'fashion'}", "trainer.global_batch_size=10", "trainer.micro_batch_size=10"]
    chosen = ["--data", "fashion", "--variants", "a1", "a5-blind", "--seeds", "0", "--folder", str(tmp_path / "runs")]
    done = run_command("scripts/dev/evidence.py", *small, *chosen)
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in json.loads(done.stdout)["results"]}
    assert 0 <= rows["a1"]["val_ema/top1"]["mean"] <= 100
    assert "val_ema/recall_stage1" not in rows["a1"]
    assert rows["a5-blind"]["val_ema/recall_stage1"]["mean"] < 100  # of its own shortlists, which it does not see
    chosen.remove("a5-blind")
    again = run_command("scripts/dev/evidence.py", *small, *chosen)
    assert json.loads(again.stdout)["results"] == [rows["a1"]]
    assert "complete" in again.stderr


def test_files_that_are_not_fashion_mnist_are_refused(source, tmp_path):
    def refusal(folder):
        done = run_command("scripts/data/prepare_fashion.py", str(tmp_path / "out"), "--source", str(folder))
        assert done.returncode == 2
        return done.stderr

    assert "apt-get install dataset-fashion-mnist" in refusal(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    data = gzip.decompress((source / path.name).read_bytes())
    path.write_bytes(gzip.compress(data[:-1]))
    assert path.name in refusal(tmp_path)
    path.write_bytes(gzip.compress(b"no idx"))
    assert path.name in refusal(tmp_path)
    path.write_bytes(b"no gzip")
    assert path.name in refusal(tmp_path)
