"""Every YAML composes and builds; every mistake is explained. Through Hydra, as a user meets it."""

import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import evaluate
import train
from contextual_cnn import cli
from contextual_cnn.contracts import StagedScores
from contextual_cnn.data import Augmentation
from contextual_cnn.engine.checkpoint_store import CheckpointStore
from contextual_cnn.engine.trainer_settings import TrainerSettings
from contextual_cnn.errors import UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model
from contextual_cnn.optim import build_optimizer, build_schedule

# torchrun's error file wants the real stderr, which pytest holds
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")

CONF = Path(__file__).parent.parent / "conf"
GROUPS = ("model", "data", "augment", "loss", "optimizer", "schedule", "trainer", "checkpoint", "logger")
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("evaluate", "local")
]


@pytest.fixture(autouse=True)
def _fresh_hydra():
    yield
    GlobalHydra.instance().clear()


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return cli.read_config(compose("train", [f"data.root={CONF}", *overrides]), train.SCHEMA)


def test_every_group_has_options():
    assert {group for group, _ in OPTIONS} == {*GROUPS, "experiment"}
    assert len(OPTIONS) >= 20


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=[f"{group}={name}" for group, name in OPTIONS])
def test_every_yaml_composes_and_builds(group, name):
    extra = ["model.name=resnet18"] if name == "timm" else []
    config = composed(f"{group}={name}", *extra)
    Augmentation(**config["augment"])
    StagedCrossEntropy(**config["loss"])
    TrainerSettings(**config["trainer"])
    CheckpointStore(Path(), **config["checkpoint"])
    model = build_model(**config["model"] | {"num_classes": 10})
    optimizer = build_optimizer(model, **config["optimizer"])
    schedule = build_schedule(optimizer, 10, **config["schedule"])
    assert StagedScores.of(model(torch.zeros(2, 3, 32, 32))).logits[-1].shape == (2, 10)
    if group == "experiment":
        train_two_steps(model, StagedCrossEntropy(**config["loss"]), optimizer, schedule)


def train_two_steps(model, loss, optimizer, schedule):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for step in (1, 2):  # of step 0 the learning rate is 0
        schedule.step_update(step)
        total = loss(StagedScores.of(model(torch.randn(2, 3, 32, 32))), torch.tensor([0, 1])).total
        assert total.isfinite()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    after = list(model.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


def test_the_default_is_the_papers_recipe():
    config = composed()
    assert config["trainer"]["global_batch_size"] == 4096
    assert config["schedule"]["epochs"] == 300
    assert config["schedule"]["warmup_epochs"] == 20
    optimizer = dict(name="adamw", lr=1e-3, weight_decay=0.05, betas=[0.9, 0.999], eps=1e-8, momentum=None)
    assert config["optimizer"] == optimizer | dict(lr_scaling="none", lr_base_size=4096)
    assert config["schedule"]["name"] == "cosine"
    assert config["loss"]["alpha"] == 0.15
    assert config["trainer"]["ema_decay"] == 0.9999
    assert config["augment"]["randaugment"] == "rand-m9-mstd0.5-inc1"
    assert config["augment"] | {"scale": None, "ratio": None} == vars(Augmentation()) | {"scale": None, "ratio": None}


@pytest.mark.parametrize("size", ["t", "s", "b", "atto"])
def test_the_plain_twin_is_one_override_away(size):
    contextual, plain = composed(f"model=contextual_convnext_{size}"), composed(f"model=convnext_{size}")
    differing = {key for key in contextual if contextual[key] != plain[key]}
    assert differing == {"model", "run_name"}
    shared = {key: value for key, value in contextual["model"].items() if key in plain["model"] and key != "name"}
    assert shared == {key: value for key, value in plain["model"].items() if key != "name"}


MISTAKES = [
    # command line, cause, fix
    (["optimizer.lrr=1"], "there is no key optimizer.lrr", "did you mean optimizer.lr?"),
    (["+optimizer.lrr=1"], "there is no key optimizer.lrr", "did you mean optimizer.lr?"),
    (["+runname=x"], "there is no key runname", "did you mean run_name?"),
    (["trainer.global_batchsize=8"], "there is no key trainer.global_batchsize", "trainer.global_batch_size?"),
    (["optimizer=admw"], "there is no optimizer named admw", "did you mean optimizer=adamw?"),
    (["model=contextual_convnxt_t"], "there is no model named", "did you mean model=contextual_convnext_t?"),
    ([], "no value for data.root", "data.root=VALUE"),
    (["+optimizer._target_=os.system"], "there is no key optimizer._target_", "the keys are optimizer.name"),
    (["data.root=pipe:touch x"], "pipe:touch x", "ROOT/train/CLASS"),
    (["data.root=s3://bucket/imagenet"], "looked for the folder", "ROOT/train/CLASS"),
    (["data.root=IMAGES", "trainer=smoke", "model=timm", "model.name=hf-hub:timm/resnet18"], "no model named", "timm"),
    (["data.root=/nowhere"], "looked for the folder /nowhere/train", "ROOT/train/CLASS"),
    (["data.root=x", "trainer.global_batch_size=many"], "is not an integer", "trainer.global_batch_size=1"),
    (["data.root=x", "run_name=${oc.env:HOME}"], "run_name=${oc.env:HOME} would be computed", "write the value itself"),
    (["data.root=${oc.decode:x}"], "data.root=${oc.decode:x} would be computed", "write the value itself"),
    (["data.root=x", "run_name='${${model.name}:x}'"], "would be computed", "write the value itself"),
    (["data.root=x", "trainer.max_time=soon"], "trainer.max_time=soon is no time limit", "trainer.max_time=3:50:00"),
    (["data.root=x", "trainer.on_nonfinite=ignore"], "is not one of skip, stop, rollback", "trainer.on_nonfinite=skip"),
    (["data.root=x", "checkpoint.every_minutes=soon"], "is not a number", "checkpoint.every_minutes"),
    (["data.root=x", "trainer.compile=7"], "trainer.compile=7 is not true or false", "true"),
    (["data.root=x", "model.selection=best"], "is not one of rerank, reduce", "model.selection=rerank"),
    (["data.root=x", "augment.hflip=3"], "augment.hflip is a share", "augment.hflip=0"),
    (
        ["data.root=x", "augment.randaugment=rand-m9"],
        "only RandAugment with increasing severity",
        "rand-m9-mstd0.5-inc1",
    ),
    (["data.root=IMAGES", "trainer.global_batch_size=7"], "mixing needs an even micro-batch", "augment=none"),
    (["data.root=IMAGES"], "48 images, less than one global batch of 4096", "trainer.global_batch_size=12"),
    (["data.root=IMAGES", "trainer=smoke", "model.num_classes=9"], "model.num_classes=9", "null"),
    (
        ["data.root=IMAGES", "trainer=smoke", "model.class_counts=[5,5,2]"],
        "class_counts must fall from stage to stage",
        "model.class_counts",
    ),
    (
        ["data.root=IMAGES", "trainer=smoke", "model=timm", "model.name=resnt50"],
        "no model named 'resnt50'",
        "did you mean resnet50, ",
    ),
    (["data.root=x", "data.limit=0"], "data.limit must be 1 or more", "data.limit=1"),
]


@pytest.mark.parametrize(
    ("arguments", "cause", "fix"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistakes_get_a_cause_a_fix_and_status_2(arguments, cause, fix, image_root, tmp_path, monkeypatch, capsys):
    arguments = [argument.replace("IMAGES", str(image_root)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"output_dir={tmp_path}"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    cli._wants_traceback.cache_clear()
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert printed.splitlines()[0].startswith("error: ")
    assert cause in printed.splitlines()[0]
    assert fix in printed.splitlines()[1]
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())  # nothing was started


OUT_OF_RANGE = [
    "optimizer.lr=-1", "optimizer.lr=.nan", "optimizer.lr=.inf", "optimizer.weight_decay=-0.1",
    "schedule.warmup_epochs=-1", "schedule.epochs=0", "trainer.log_every=0", "trainer.max_steps=0",
    "trainer.global_batch_size=0", "trainer.micro_batch_size=-4", "trainer.ema_decay=1.0", "trainer.grad_clip=0",
    "trainer.timeout_minutes=0", "trainer.max_time=0", "data.threads=0", "data.prefetch=0", "data.eval_batch_size=0",
    "data.image_size=16", "data.crop_pct=1.5", "data.max_bad_images=-1", "data.repeats=0", "augment.mixup=-1",
    "augment.label_smoothing=1.5", "augment.erasing=2", "loss.alpha=-1", "loss.alpha=.nan",
    "checkpoint.every_epochs=0", "checkpoint.every_minutes=-1", "model.drop_path_rate=1", "model.drop_rate=-0.5",
    "seed=-1",
]  # fmt: skip


@pytest.mark.parametrize("argument", OUT_OF_RANGE)
def test_numbers_out_of_range_are_refused(argument, image_root, tmp_path, monkeypatch, capsys):
    """Before a run folder is made."""
    small = ["trainer=smoke", "trainer.device=cpu", "model=contextual_convnext_atto", "logger=local"]
    arguments = [f"data.root={image_root}", *small, argument, f"output_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.run(train.main)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert argument.split("=")[0].split(".")[-1] in printed.splitlines()[0]
    assert not list(tmp_path.iterdir())


def test_a_slip_in_any_key_is_answered_with_the_key():
    """Of each key of each group a letter is lost, doubled, or changes places with the next; a few are too short."""
    config = composed()
    slips = answered = 0
    for group in GROUPS:
        for key in config[group]:
            middle = len(key) // 2
            for slip in (
                key[:middle] + key[middle + 1 :],
                key[:middle] + key[middle] + key[middle:],
                key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :],
            ):
                if slip in config[group]:
                    continue
                with pytest.raises(UserError, match=rf"^there is no key {group}\.{slip}\n") as refused:
                    cli.check_config(config | {group: config[group] | {slip: 1}}, train.SCHEMA)
                slips += 1
                answered += refused.value.fix == f"did you mean {group}.{key}?"
    assert slips > 150
    assert answered / slips > 0.9


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ([], "no value for checkpoint"),
        (["checkpoint=/nowhere"], "there is no checkpoint /nowhere"),
        (["checkpoint=CONF"], "holds no checkpoints/best.pt"),
        (["checkpoint=x", "weights=best"], "weights=best is not one of auto, raw, ema"),
        (["checkpont=x"], "there is no key checkpont"),
    ],
)
def test_evaluations_mistakes(arguments, cause, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(a.replace("CONF", str(CONF)) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(evaluate.main)
    assert stopped.value.code == 2
    assert cause in capsys.readouterr().err
