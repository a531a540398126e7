"""Twenty losses of three small runs, which a refactoring must not move: python -m tests.golden records them anew.

Record them only with a change that is meant to move them, and say so in the commit. --add keeps what is recorded, and
adds this machine: on some processors a rounding puts another class on a shortlist, which moves what follows by a per
cent (step 18 of the third run). Add one only with code that has passed on a machine that is recorded.
"""

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_sample_images

from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import small_run, write_class_folders
from tests.helpers.quick_start import run

FILE = Path(__file__).with_name("golden.json")
LENGTH = ["schedule.epochs=10", "trainer.max_steps=20", "trainer.eval_every=10"]  # of 3 steps; one evaluation
PLAIN = ["model=convnext_atto", "augment=none"]
# one micro-batch a step, no mixing; then two, mixed, with random erasing
RUNS = {
    "plain": [*PLAIN, "trainer.micro_batch_size=16"],
    "contextual": ["augment=none", "trainer.micro_batch_size=16"],
    "contextual, accumulated and mixed": ["trainer.micro_batch_size=8", "model.selection=reduce"],
}
_PROCESSOR = ("cpu family", "model", "stepping", "cache size", "flags")  # lines of /proc/cpuinfo


def losses(name: str, images: Path, folder: Path) -> list[float]:
    """The training loss of each step of a run."""
    folder.mkdir(parents=True)
    status, printed = run(*small_run(images, folder, *LENGTH, *RUNS[name]), output=folder / "output")
    assert status == 0, printed
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    return [row["train/loss"] for row in rows if "train/loss" in row]


def machine() -> str:
    """What the last bits of a loss depend on besides the code: processor and torch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = sorted({line for line in lines if line.startswith(_PROCESSOR)})
    facts = f"{platform.machine()}{processor}{torch.__version__}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        images = write_class_folders(Path(folder) / "images", load_sample_images().images)
        found = {name: losses(name, images, Path(folder) / str(i)) for i, name in enumerate(RUNS)}
    recorded = {"machine": machine(), "losses": found, "others": {}}
    if "--add" in sys.argv[1:]:
        recorded = json.loads(FILE.read_text())
        recorded.setdefault("others", {})[machine()] = found
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
