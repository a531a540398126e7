"""Training steps of one run, shared out over processes of their own: in float64, where rounding hides nothing."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.contracts import Batch
from contextual_cnn.distributed import process_group
from contextual_cnn.engine.training_step import TrainingStep
from contextual_cnn.errors import LostProcess
from contextual_cnn.optim import build_optimizer, build_schedule
from contextual_cnn.randomness import Purpose, seed_all
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.loss import LossSettings
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings
from contextual_cnn.settings.schedule import ScheduleSettings
from contextual_cnn.settings.trainer import TrainerSettings
from contextual_cnn.task import Position
from contextual_cnn.tasks.image_classification.settings import ImageClassificationSettings
from contextual_cnn.tasks.image_classification.task import ImageClassification
from tests.helpers.quick_start import free_port

_context = multiprocessing.get_context("forkserver")
GLOBAL, CLASSES, STEPS = 16, 5, 3


def train(model: ModelSettings, world_size: int, micro_batch: int, **trainer: Any) -> list[dict[str, Any]]:
    """What each rank has in the end: "losses" of the steps (over all ranks) and "state" of the model."""
    with ProcessPoolExecutor(world_size, mp_context=_context) as pool:
        started = [pool.submit(_rank, place, model, micro_batch, trainer) for place in _places(world_size)]
        return [rank.result(timeout=120) for rank in started]


def wait_in_the_first_step(model: ModelSettings, told: Path) -> str:
    """The error of the first of two ranks, whose patience is 0.05 min; the second one does nothing until `told`."""
    with ProcessPoolExecutor(2, mp_context=_context) as pool:
        started = [pool.submit(_step_or_wait, place, model, told) for place in _places(2)]
        try:
            return started[0].result(timeout=30)
        finally:
            told.touch()


def _places(world_size: int) -> list[dict[str, Any]]:
    port = free_port()
    return [
        dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(world_size)
    ]


def _step_or_wait(place: dict[str, Any], model: ModelSettings, told: Path) -> str:
    os.environ.update({name: str(value) for name, value in place.items()})
    plan = BatchPlan.make(images=1000, global_batch=GLOBAL, micro_batch=GLOBAL // 2, world_size=2)
    try:
        with process_group("cpu", 0.05) as world:
            step = training_step(model, Position(plan, 7, world))
            if world.is_main:
                step(0, micro_batches(plan, 0, 0))
            while not told.exists():
                time.sleep(0.05)
    except LostProcess as error:
        return str(error)
    return ""


def _rank(place: dict[str, Any], model: ModelSettings, micro_batch: int, trainer: dict[str, Any]) -> dict[str, Any]:
    os.environ.update({name: str(value) for name, value in place.items()})
    rank, world_size = place["RANK"], place["WORLD_SIZE"]
    torch.set_num_threads(1)
    with process_group("cpu", 1) as world:
        plan = BatchPlan.make(images=1000, global_batch=GLOBAL, micro_batch=micro_batch, world_size=world_size)
        step = training_step(model, Position(plan, 7, world), **trainer)
        step.module.train()
        losses = []
        for number in range(STEPS):
            step(number, micro_batches(plan, rank, number))
            losses.append(step.meter.read()[0]["loss"])
        state = {name: tensor.numpy() for name, tensor in step.module.state_dict().items()}
        return {"losses": losses, "state": state}


def training_step(model: ModelSettings, position: Position, **trainer: Any) -> TrainingStep:
    settings = ImageClassificationSettings(
        model=model,
        data=DataSettings(root=""),
        augment=AugmentSettings(),
        # A mean over the images: one over the considered classes has a denominator of each micro-batch
        loss=LossSettings(reduction="batch"),
    )
    task = ImageClassification(settings, SimpleNamespace(num_classes=CLASSES, sources={}))
    seed_all(Purpose.INITIAL_WEIGHTS, 0)
    built = task.build_model().double()
    optimizer = build_optimizer(built, OptimizerSettings(lr=0.003), GLOBAL)
    schedule = build_schedule(optimizer, ScheduleSettings(epochs=10, warmup_epochs=0), 10)
    trainer = dict(ema_decay=0.9, channels_last=False) | trainer
    return TrainingStep(TrainerSettings(**trainer), task, built, optimizer, schedule, position)


def micro_batches(plan: BatchPlan, rank: int, step: int) -> Iterator[Batch]:
    """Of one step; the images belong to places of the global batch."""
    draw = torch.Generator().manual_seed(step)
    images = torch.randn(GLOBAL, 3, 32, 32, generator=draw, dtype=torch.float64)
    for accumulated in range(plan.accumulation):
        first = plan.first_place(accumulated, rank)
        mine = slice(first, first + plan.micro_batch)
        yield Batch(images[mine].clone(), torch.arange(GLOBAL)[mine] % CLASSES)
