"""trainer.compile=true: the training and its evaluations are compiled, and compute what they do without."""

import pytest

from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import HAS_COMPILER, small_run
from tests.helpers.overrides import CROPS_ALONE
from tests.helpers.quick_start import Command


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="Inductor needs a C++ compiler on a CPU")
def test_a_compiled_run_computes_the_same(image_root, tmp_path):
    found = {}
    for compiled in ("false", "true"):
        folder = tmp_path / compiled
        folder.mkdir()
        length = ["schedule.epochs=1", "schedule.warmup_epochs=0", "trainer.max_steps=3"]
        small = ["model.timm_options={depths: [1, 1, 2, 1]}", "trainer.micro_batch_size=16"]
        arguments = small_run(image_root, folder, f"trainer.compile={compiled}", *length, *small, *CROPS_ALONE)
        environment = dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"), TORCH_LOGS="recompiles,graph_breaks")
        command = Command(*arguments, output=folder / "output", **environment)
        assert command.wait(500) == 0, command.printed
        assert "Graph break" not in command.printed
        found[compiled] = losses(folder / "run")
    assert {"train/loss", "val/loss", "val_ema/loss"} <= {name for _, name in found["true"]}
    assert found["true"] == pytest.approx(found["false"], rel=1e-3)


def losses(run):
    """By step and name."""
    rows = read_metrics(run / "metrics.jsonl")
    return {(row["step"], name): value for row in rows for name, value in row.items() if name.endswith("/loss")}
