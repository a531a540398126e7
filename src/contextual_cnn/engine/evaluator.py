"""Evaluation, used after each epoch and by evaluate.py: several models over one pass of the data, on all ranks."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from contextual_cnn.distributed import World
from contextual_cnn.engine.sums import Sums
from contextual_cnn.task import Call, Evaluation


class EvaluationStopped(Exception):
    """A rank was asked to stop; raised on all of them, with nothing counted."""


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module],
    calls: Mapping[str, Call],
    evaluation: Evaluation,
    world: World,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, float]]:
    """Several sets of weights (raw, EMA) over one pass of the data.

    Args:
        models: by name, without DDP around them; left in the mode they came in.
        calls: the same, as they are called.
        should_stop: looked at after each batch.

    Returns:
        By name: the report of the task's measure, with seconds and images_per_second of the whole pass.

    Raises:
        RuntimeError: the ranks together did not count every sample once.
        EvaluationStopped: `should_stop` on any rank. The batches are then left in the middle of a pass.
    """
    modes = {name: model.training for name, model in models.items()}
    measures = {name: evaluation.measure(model) for name, model in models.items()}
    stopped = Sums(world.device, ["ranks"])
    started = time.perf_counter()
    for model in models.values():
        model.eval()
    for batch in evaluation.batches:
        for name, measure in measures.items():
            measure.add(calls[name], batch)
        if should_stop():
            stopped.add(ranks=1)
            break
    for name, model in models.items():
        model.train(modes[name])
    if stopped.read()["ranks"]:
        raise EvaluationStopped
    reports = {name: measure.report() for name, measure in measures.items()}
    seconds = time.perf_counter() - started
    for report in reports.values():
        if report["images"] != evaluation.samples:
            raise RuntimeError(
                f"evaluation counted {report['images']} images of a split of {evaluation.samples}: "
                "a defect, please report it"
            )
        report |= {"seconds": seconds, "images_per_second": evaluation.samples / seconds}
    return reports
