"""How a small run ended, and whether two of them ended alike to the last bit."""

import torch

from contextual_cnn.runs.checkpoint import load_checkpoint
from contextual_cnn.runs.loggers import read_metrics


def checkpoint(folder, name="last"):
    return load_checkpoint(folder / "run" / "checkpoints" / f"{name}.pt")


def tensors(value, prefix=""):
    """Every tensor and number of a state by its path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in tensors(item, f"{prefix}/{key}").items()}
    return {prefix: value}


def assert_same_end(one, other):
    """Weights, averages, moments, counts, best so far: bit for bit; and the metrics but for the speeds."""
    for name in ("last", "best"):
        first, second = (tensors(checkpoint(folder, name)) for folder in (one, other))
        first, second = ({k: v for k, v in state.items() if not k.startswith("/config/")} for state in (first, second))
        assert first.keys() == second.keys()
        for key, value in first.items():
            same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
            assert same, f"{name}: {key}"
    assert losses(one) == losses(other)


def losses(folder):
    return [
        (row["step"], row.get("train/loss"), row.get("train/grad_norm"), row.get("val/top1"), row.get("val_ema/loss"))
        for row in read_metrics(folder / "run" / "metrics.jsonl")
    ]


def steps_logged(folder):
    return [row["step"] for row in read_metrics(folder / "run" / "metrics.jsonl") if "train/loss" in row]
