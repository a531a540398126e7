"""A dry run: a few steps of the real thing, and what they foretell of the whole run.

Everything is built as for the run itself, and resumed as it would be; then the process ends. Of the run's folder only
dry_run.json and lr_schedule.png are written, and no checkpoint, metric or lock of a run that is there is touched.
"""

import json
import math
import os
import resource
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from contextual_cnn.device import memory_in_use
from contextual_cnn.distributed import gather_numbers
from contextual_cnn.engine.precision import autocast, under
from contextual_cnn.engine.trainer import Trainer
from contextual_cnn.errors import UserError
from contextual_cnn.runs.checkpoint_store import FILES, tensor_bytes
from contextual_cnn.runs.own_files import replaced

_MICRO_BATCHES = 8  # measured at least: more than a loader holds ready, so that its own speed shows
_POINTS = 1000  # of the schedule's picture


@dataclass(frozen=True)
class Forecast:
    """What was found and measured. Bytes, seconds, images; speeds are of all processes together.

    steps: of the whole run. first_step: where it would begin; above 0 it resumes.
    data_wait: percentage of the time. peak_memory: of the process that needs most (GPU: all that is taken of
        the card; CPU: resident). memory: what its device has.
    """

    model: str
    parameters: int
    device: str
    images: dict[str, int]
    classes: int
    processes: int
    global_batch: int
    micro_batch: int
    accumulation: int
    steps_per_epoch: int
    steps: int
    first_step: int
    measured_steps: int
    loss: float
    seconds_per_step: float
    images_per_second: float
    data_wait: float
    peak_memory: int
    memory: int
    checkpoint: int
    disk_needed: int
    disk_free: int

    @property
    def seconds_left(self) -> float:
        return (self.steps - self.first_step) * self.seconds_per_step


def rehearse(trainer: Trainer, folder: Path) -> Forecast:
    """One step to warm up, then one or more to measure; called by all ranks.

    Args:
        trainer: its weights are stepped on, so it is of no use afterwards.
        folder: of the run, for the room on its disk; need not exist.

    Raises:
        UserError: the GPU's memory does not suffice.
    """
    plan, first_step = trainer.plan, trainer.step
    steps = max(1, -(-_MICRO_BATCHES // plan.accumulation))
    metrics = _measure(trainer, steps)
    peak, memory = _memory(trainer.world.device)
    checkpoint = tensor_bytes(trainer.train_step.state())
    return Forecast(
        model=trainer.record["config"]["model"]["name"],
        parameters=sum(parameter.numel() for parameter in trainer.train_step.module.parameters()),
        device=_device_name(trainer.world.device),
        images=trainer.task.splits(),
        classes=len(trainer.record["classes"]),
        processes=plan.world_size,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        steps_per_epoch=plan.steps_per_epoch,
        steps=trainer.last_step,
        first_step=first_step,
        measured_steps=steps,
        loss=metrics["loss"],
        seconds_per_step=plan.global_batch / metrics["images_per_second"],
        images_per_second=metrics["images_per_second"],
        data_wait=metrics["data_wait"],
        peak_memory=max(theirs for (theirs,) in gather_numbers([peak])),
        memory=memory,
        checkpoint=checkpoint,
        disk_needed=FILES * checkpoint,
        disk_free=shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free,
    )


def learning_rates(trainer: Trainer) -> list[tuple[int, float]]:
    """(step, learning rate) over the whole run, at most 1,000 or so of them, the last step included."""
    stride = max(1, trainer.last_step // _POINTS)
    points = []
    for step in sorted({*range(0, trainer.last_step, stride), trainer.last_step - 1}):
        trainer.train_step.schedule.step_update(step)
        points.append((step, trainer.train_step.lr))
    return points


def print_forecast(trainer: Trainer, forecast: Forecast, folder: Path, console: Console) -> None:
    """Prints the table and writes dry_run.json.

    Raises:
        UserError: the run's folder cannot be written, which the run itself could not either.
    """
    console.print(_table(trainer, forecast))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = asdict(forecast) | {"seconds_left": forecast.seconds_left}
        with replaced(folder / "dry_run.json") as new:
            new.write_text(json.dumps(facts, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written: {error}", "set output_dir=FOLDER") from error


def _measure(trainer: Trainer, steps: int) -> dict[str, float]:
    """The metrics of a few steps after the first, which compiles, tunes and allocates."""
    batches = trainer.task.batches(trainer.position.at(trainer.step))
    trainer.train_step.module.train()
    trainer.train_step(trainer.step, batches)
    trainer.meter.read()
    for step in range(trainer.step + 1, trainer.step + 1 + steps):
        trainer.train_step(step, batches)
    metrics, _ = trainer.meter.read()
    _evaluate_a_batch(trainer)
    return metrics


@torch.inference_mode()
def _evaluate_a_batch(trainer: Trainer) -> None:
    """What an evaluation needs beside the training's memory is allocated too."""
    evaluation = trainer.task.evaluation(trainer.world)
    model = trainer.train_step.module.eval()
    call = under(autocast(trainer.settings.precision, trainer.world.device), model)
    for batch in evaluation.batches:
        evaluation.measure(model).add(call, batch)
        break


def _memory(device: torch.device) -> tuple[int, int]:
    """Most bytes that this process has used so far, and what there are."""
    if device.type == "cuda":
        return memory_in_use(device), torch.cuda.get_device_properties(device).total_memory
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _table(trainer: Trainer, forecast: Forecast) -> Table:
    """What people decide by, with what is worth a second look in red."""
    f, rates = forecast, learning_rates(trainer)
    peak = max(rate for _, rate in rates)
    top = next(step for step, rate in rates if rate == peak)
    left = f"; {f.first_step} are done" if f.first_step else ""
    rows = {
        "data": _data(trainer, forecast),
        "batches": str(trainer.plan),
        "steps": f"{f.steps_per_epoch} an epoch, {f.steps} in all{left}",
        "learning rate": f"{rates[0][1]:.3g} -> {peak:.3g} at step {top} -> {rates[-1][1]:.3g} (lr_schedule.png)",
        "model": trainer.task.describe(trainer.train_step.module),
        "loss of the measured steps": f"{f.loss:.4f}",
        "peak memory of a process, training": f"{_gib(f.peak_memory)} of {_gib(f.memory)} ({f.device})",
        "speed": f"{f.seconds_per_step:.3g} s a step, {f.images_per_second:.1f} images/s, "
        f"{f.data_wait:.0f} % of it waiting for data ({f.measured_steps} after one to warm up)",
        "whole run at that speed": f"{_duration(f.seconds_left)}, evaluations not included",
        "checkpoint": _gib(f.checkpoint),
        "room on the disk": f"{_gib(f.disk_needed)} needed, {_gib(f.disk_free)} free",
    }  # fmt: skip
    alarming = {
        "loss of the measured steps": not math.isfinite(f.loss),
        "peak memory of a process, training": f.peak_memory > 0.95 * f.memory,
        "speed": f.data_wait > 10,
        "room on the disk": f.disk_needed > f.disk_free,
    }
    table = Table(
        title="dry run: no step of the run was taken; only dry_run.json and lr_schedule.png were written",
        show_header=False,
    )
    for name, value in rows.items():
        table.add_row(name, escape(value), style="red" if alarming.get(name) else None)
    return table


def _data(trainer: Trainer, forecast: Forecast) -> str:
    counts = ", ".join(f"{split} {count} images" for split, count in forecast.images.items())
    return f"{trainer.record['config']['data']['root']}: {counts}, {forecast.classes} classes"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
