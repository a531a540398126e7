"""Run folders without the training: a checkpoint as the trainer writes it, of a model whose offsets are awake."""

from pathlib import Path

import torch

from contextual_cnn.models import build_model
from contextual_cnn.runs.checkpoint import write_checkpoint
from contextual_cnn.settings.model import ModelSettings
from tests.conftest import wake_up

CLASSES = ("n01440764", "n01443537", *(f"kind {i}" for i in range(10)))
SIZE = 64
DATA = {
    "root": "/nowhere",
    "image_size": SIZE,
    "crop_pct": 0.875,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def write_run(folder: Path, name: str = "contextual_convnext_atto", **options) -> torch.nn.Module:
    """Writes folder/checkpoints/best.pt; returns the model in it, every block of which counts."""
    torch.manual_seed(0)
    config = {"name": name, "num_classes": len(CLASSES), **options}
    model = wake_up(build_model(ModelSettings(**config))).eval()
    for block in model.modules():
        if getattr(block, "gamma", None) is not None:
            torch.nn.init.ones_(block.gamma)  # layer scale, 1e-6 at first
        if hasattr(block, "bn3"):
            torch.nn.init.constant_(block.bn3.weight, 0.2)  # 0 at first
    (folder / "checkpoints").mkdir(parents=True)
    state = {
        "model": model.state_dict(),
        "ema": None,
        "config": {"model": config, "data": DATA},
        "classes": list(CLASSES),
        "best": {"top1": 50.0, "epoch": 1, "weights": "raw"},
        "step": 7,
    }
    write_checkpoint(state, folder / "checkpoints" / "best.pt")
    return model
