"""Every YAML composes and builds; every wrong key and number is explained. Through Hydra, as a user meets it."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from contextual_cnn import exits
from contextual_cnn.contracts import StagedScores
from contextual_cnn.data.image_data import ImageData
from contextual_cnn.errors import UserError
from contextual_cnn.losses import StagedCrossEntropy
from contextual_cnn.models import build_model
from contextual_cnn.models.detector import build_detector
from contextual_cnn.optim import build_optimizer, build_schedule
from contextual_cnn.runs.checkpoint_store import CheckpointStore
from contextual_cnn.schema import check_config
from contextual_cnn.settings.augment import AugmentSettings
from contextual_cnn.settings.checkpoint import CheckpointSettings
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.coco import CocoSettings
from contextual_cnn.settings.data import DataSettings
from contextual_cnn.settings.detector import DetectorSettings
from contextual_cnn.settings.logger import LoggerSettings
from contextual_cnn.settings.loss import LossSettings
from contextual_cnn.settings.model import ModelSettings
from contextual_cnn.settings.optimizer import OptimizerSettings
from contextual_cnn.settings.scale_augment import ScaleAugmentSettings
from contextual_cnn.settings.schedule import ScheduleSettings
from contextual_cnn.settings.trainer import TrainerSettings
from tests.helpers.commands import CONF, SCHEMAS, composed, refused
from tests.helpers.commands import fresh_hydra as _fresh_hydra  # noqa: F401 - a fixture

# torchrun's error file wants the real stderr, which pytest holds
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")

GROUPS = ("model", "data", "augment", "loss", "optimizer", "schedule", "trainer", "checkpoint", "logger")
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("evaluate", "local") and not path.name.startswith("_")  # a part of others
]


# Choices of groups that images have too
OF_SCENES = {
    ("data", "coco"), ("data", "digit_scenes"), ("data", "pennfudan"),
    ("augment", "multiscale"), ("augment", "fixed_scale"), ("augment", "large_scale_jitter"),
}  # fmt: skip


def test_every_group_has_options():
    assert {group for group, _ in OPTIONS} == {*GROUPS, "clip", "detector", "task", "experiment"}
    assert len(OPTIONS) >= 20


@pytest.mark.run
@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=[f"{group}={name}" for group, name in OPTIONS])
def test_every_yaml_composes_and_builds(group, name):
    extra = ["model.name=resnet18"] if name == "timm" else []
    if group == "clip":
        extra = ["task=video_classification"]
    if group == "detector" or (group, name) in OF_SCENES:
        extra = ["task=instance_segmentation"]
    config = composed(f"{group}={name}", *extra)
    if config["task"] == "instance_segmentation":
        build_a_detector(config)
        return
    if config["task"] == "image_classification":
        AugmentSettings(**config["augment"])
    else:
        ClipSettings(**config["clip"])
    StagedCrossEntropy(LossSettings(**config["loss"]))
    TrainerSettings(**config["trainer"])
    CheckpointStore(Path(), CheckpointSettings(**config["checkpoint"]))
    model = build_model(ModelSettings(**config["model"] | {"num_classes": 10}))
    optimizer = build_optimizer(model, OptimizerSettings(**config["optimizer"]), 4096)
    schedule = build_schedule(optimizer, ScheduleSettings(**config["schedule"]), 10)
    assert StagedScores.of(model(torch.zeros(2, 3, 32, 32))).logits[-1].shape == (2, 10)
    if group == "experiment":
        train_two_steps(model, StagedCrossEntropy(LossSettings(**config["loss"])), optimizer, schedule)


def build_a_detector(config):
    """Of the size that it is configured with, but for a backbone with narrow maps."""
    for record, key in ((CocoSettings, "data"), (ScaleAugmentSettings, "augment"), (TrainerSettings, "trainer")):
        record(**config[key])
    narrow = {"num_classes": 10, "timm_options": {"dims": [8, 8, 8, 8]}}
    model = build_detector(ModelSettings(**config["model"] | narrow), DetectorSettings(**config["detector"]), 5)
    optimizer = build_optimizer(model, OptimizerSettings(**config["optimizer"]), 16)
    schedule = build_schedule(optimizer, ScheduleSettings(**config["schedule"]), 7330)
    schedule.step_update(600)
    assert all(group["lr"] > 0 for group in optimizer.param_groups)


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


STAND_TWICE = {
    "data": DataSettings, "augment": AugmentSettings, "loss": LossSettings, "optimizer": OptimizerSettings,
    "schedule": ScheduleSettings, "trainer": TrainerSettings, "checkpoint": CheckpointSettings,
    "logger": LoggerSettings,
}  # fmt: skip


@pytest.mark.parametrize("group", STAND_TWICE)
def test_defaults_are_the_same_in_the_config_and_in_the_record(group):
    """YAML must list every key, for --cfg job; a record must have them, for whoever uses it from Python."""
    config = composed()[group]
    for key in dataclasses.fields(STAND_TWICE[group]):
        if key.default is not dataclasses.MISSING:
            default = list(key.default) if isinstance(key.default, tuple) else key.default
            assert config[key.name] == pytest.approx(default) if key.name == "ratio" else config[key.name] == default, (
                key
            )


def test_the_default_is_the_papers_recipe():
    config = composed()
    assert config["trainer"]["global_batch_size"] == 4096
    assert config["schedule"]["epochs"] == 300
    assert config["schedule"]["warmup_epochs"] == 20
    optimizer = dict(name="adamw", lr=1e-3, weight_decay=0.05, betas=[0.9, 0.999], eps=1e-8, momentum=None)
    assert config["optimizer"] == optimizer | dict(
        lr_scaling="none", lr_base_size=4096, bias_lr=None, classifier_lr=None, generator_lr=None, layer_decay=None
    )
    assert config["schedule"]["name"] == "cosine"
    assert config["loss"]["alpha"] == 0.15
    assert config["trainer"]["ema_decay"] == 0.9999
    assert config["augment"]["randaugment"] == "rand-m9-mstd0.5-inc1"
    assert config["augment"] | {"scale": None, "ratio": None} == vars(AugmentSettings()) | {
        "scale": None,
        "ratio": None,
    }


@pytest.mark.parametrize("size", ["t", "s", "b", "atto"])
def test_the_plain_twin_is_one_override_away(size):
    contextual, plain = composed(f"model=contextual_convnext_{size}"), composed(f"model=convnext_{size}")
    differing = {key for key in contextual if contextual[key] != plain[key]}
    assert differing == {"model", "run_name"}
    shared = {key: value for key, value in contextual["model"].items() if key in plain["model"] and key != "name"}
    assert shared == {key: value for key, value in plain["model"].items() if key != "name"}


@pytest.mark.parametrize("size", ["t", "s", "b"])
def test_the_plain_twin_of_a_detector_differs_in_the_backbone_alone(size):
    contextual, plain = composed(f"experiment=table3_{size}"), composed(f"experiment=table3_convnext_{size}")
    assert {key for key in contextual if contextual[key] != plain[key]} == {"model", "run_name"}
    assert plain["model"]["name"] == contextual["model"]["name"].removeprefix("contextual_")
    assert plain["model"]["drop_path_rate"] == contextual["model"]["drop_path_rate"] >= 0.4


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
    (
        ["data.root=x", "trainer.compile=7"],
        "trainer.compile=7 is not one of auto or true or false",
        "trainer.compile=auto",
    ),
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
    (["data.root=x", "experiment=table4_a22"], "no experiment named table4_a22", "experiment=table4_a2?"),
    (["output_dir=x", "experiment=table4_a22", "--cfg", "job"], "no experiment named", "experiment=table4_a2?"),
    (["data.root=x", "model=_contex"], "no model named _contex", "did you mean model=convnext_t?"),
    (["data.root=x", "model=_context"], "a part that other choices of model share", "there are contextual_"),
    (["data.root=x", "run_name="], "run_name=''", "run_name=NAME"),
    (["data.root=x", "run_name=.."], "run_name='..'", "run_name=NAME"),
    (["data.root=x", "run_name=."], "run_name='.'", "run_name=NAME"),
    (["data.root=x", "run_name=../esc"], "run_name='../esc'", "run_name=NAME"),
    (["data.root=x", "run_name=a/../../b"], "run_name='a/../../b'", "run_name=NAME"),
    (["data.root=x", "run_name=/abs"], "run_name='/abs'", "run_name=NAME"),
    (["data.root=x", "run_name=a//b"], "run_name='a//b'", "run_name=NAME"),
    (["data.root=x", "run_name=' a'"], "run_name=' a'", "run_name=NAME"),
    (["data.root=x", 'run_name="a\nerror: b"'], r"run_name=a\nerror: b has", "run_name=TEXT"),
    (["data.root=x", "run_name='a\x1b[31m'"], r"run_name=a\x1b[31m has", "run_name=TEXT"),
    (["data.root=x", "run_name='a\u202eb'"], r"run_name=a\u202eb has", "run_name=TEXT"),
    (["data.root='x\x07'"], r"data.root=x\x07 has", "data.root=TEXT"),
    (["data.root=x", "output_dir='x\ry'"], r"output_dir=x\ry has", "output_dir=TEXT"),
    (["data.root=x", "model.timm_options={patch_size: nan}"], "not a finite number", "model.timm_options"),
    (["data.root=IMAGES", "trainer=smoke", "model=timm", "model.name=resnet18.a1_in1k"], "a1_in1k", "=resnet18 "),
]


@pytest.mark.parametrize(
    ("arguments", "cause", "fix"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistakes_get_a_cause_a_fix_and_status_2(arguments, cause, fix, image_root, tmp_path, monkeypatch, capsys):
    arguments = [argument.replace("IMAGES", str(image_root)) for argument in arguments]
    if not any(argument.startswith("output_dir=") for argument in arguments):
        arguments.append(f"output_dir={tmp_path}")
    found = refused(arguments, monkeypatch, capsys)
    assert cause in found[0]
    assert fix in found[1]
    assert not list(tmp_path.iterdir())  # nothing was started


OUT_OF_RANGE = [
    "optimizer.lr=-1", "optimizer.lr=nan", "optimizer.lr=inf", "optimizer.weight_decay=-0.1",
    "schedule.warmup_epochs=-1", "schedule.epochs=0", "trainer.log_every=0", "trainer.max_steps=0",
    "trainer.global_batch_size=0", "trainer.micro_batch_size=-4", "trainer.ema_decay=1.0", "trainer.grad_clip=0",
    "trainer.timeout_minutes=0", "trainer.max_time=0", "data.threads=0", "data.prefetch=0", "data.eval_batch_size=0",
    "data.image_size=16", "data.crop_pct=1.5", "data.max_bad_images=-1", "data.repeats=0", "augment.mixup=-1",
    "augment.label_smoothing=1.5", "augment.erasing=2", "loss.alpha=-1", "loss.alpha=nan",
    "optimizer.betas=[1,1]", "optimizer.betas=[0.9,0.9,0.9]", "optimizer.eps=-1", "trainer.grad_clip=nan",
    "checkpoint.every_minutes=nan", "data.std=[]", "data.std=[0,0.5,0.5]", "data.threads=100000",
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
        exits.run(train.main)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert argument.split("=")[0].split(".")[-1] in printed.splitlines()[0]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def recipe():
    return composed("model=contextual_convnext_atto")


def start(config, root):
    """What train.py makes of a config before a run folder is made."""
    check_config(config, SCHEMAS[train])
    TrainerSettings(**config["trainer"])
    AugmentSettings(**config["augment"])
    ImageData(DataSettings(**config["data"] | {"root": str(root)}))
    CheckpointStore(Path(), CheckpointSettings(**config["checkpoint"]))
    with torch.device("meta"):
        build_model(ModelSettings(**config["model"] | {"num_classes": 10}))
    build_schedule(
        build_optimizer(torch.nn.Linear(2, 2), OptimizerSettings(**config["optimizer"]), 4096),
        ScheduleSettings(**config["schedule"]),
        10,
    )


NAN, INF = float("nan"), float("inf")
NUMBERS = [
    ("optimizer.betas", [-0.1, 0.9]), ("optimizer.betas", [0.9, NAN]), ("optimizer.betas", []), ("optimizer.eps", NAN),
    ("optimizer.lr_base_size", 0), ("trainer.grad_clip", INF), ("trainer.timeout_minutes", NAN),
    ("trainer.ema_decay", NAN), ("trainer.max_time", NAN), ("checkpoint.every_minutes", INF), ("schedule.min_lr", -1),
    ("schedule.min_lr", NAN), ("schedule.warmup_lr", INF), ("schedule.decay_rate", NAN), ("schedule.decay_rate", 0),
    ("augment.mixup", INF), ("augment.cutmix", NAN), ("augment.color_jitter", NAN), ("augment.scale", [0.1, NAN]),
    ("augment.ratio", [1, INF]), ("augment.hflip", NAN), ("data.std", [0.5, 0.5, NAN]), ("data.std", [0.5, 0.5]),
    ("data.std", [0.5, 0.5, -0.5]), ("data.mean", [0.5]), ("data.mean", [INF, 0, 0]), ("data.crop_pct", NAN),
    ("model.layer_scale", NAN), ("model.drop_rate", NAN), ("model.embedding_dim", 0), ("model.embedding_dim", 10**6),
    ("model.contextual_every", 0), ("model.timm_options", {"patch_size": [2, INF]}), ("logger.patience", INF),
    ("loss.alpha", INF),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), NUMBERS, ids=[f"{key}={value}" for key, value in NUMBERS])
def test_numbers_that_make_no_sense_are_refused(key, value, recipe, image_root):
    group, _, name = key.partition(".")
    start(recipe, image_root)
    with pytest.raises(UserError, match=name):
        start(recipe | {group: recipe[group] | {name: value}}, image_root)


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
                    check_config(config | {group: config[group] | {slip: 1}}, SCHEMAS[train])
                slips += 1
                answered += refused.value.fix == f"did you mean {group}.{key}?"
    assert slips > 150
    assert answered / slips > 0.9


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ([], "no value for checkpoint"),
        (["checkpoint=/nowhere"], "checkpoint: /nowhere"),
        (["checkpoint=CONF"], "holds no checkpoints/best.pt"),
        (["checkpoint=x", "weights=best"], "weights=best is not one of auto, raw, ema"),
        (["checkpont=x"], "there is no key checkpont"),
    ],
)
def test_evaluations_mistakes(arguments, cause, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(a.replace("CONF", str(CONF)) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        exits.run(evaluate.main)
    assert stopped.value.code == 2
    assert cause in capsys.readouterr().err


def test_a_contextual_model_of_one_or_two_classes_has_a_fix_that_works():
    with torch.device("meta"):
        for classes in (1, 2):
            with pytest.raises(UserError, match="classes") as error:
                build_model(ModelSettings(**composed()["model"] | {"num_classes": classes}))
            choices = [word for word in error.value.fix.split() if word.startswith("model")]
            assert (
                build_model(ModelSettings(**composed(*choices)["model"] | {"num_classes": classes})).num_classes
                == classes
            )


@pytest.mark.parametrize(("classes", "counts"), [(3, [500, 200, 50]), (5, [3, 2]), (1000, [50, 200, 500])])
def test_class_counts_that_do_not_fit_have_a_fix_that_works(classes, counts):
    model = composed("model=contextual_convnext_atto")["model"] | {"num_classes": classes}
    with pytest.raises(UserError) as error:
        build_model(ModelSettings(**model | {"class_counts": counts}))
    choice = error.value.fix.split(", ")[0]
    fixed = composed("model=contextual_convnext_atto", choice)["model"]["class_counts"]
    assert (
        build_model(ModelSettings(**model | {"class_counts": fixed})).class_counts
        == build_model(ModelSettings(**model)).class_counts
    )


def test_the_plain_twin_at_its_published_recipe_differs_in_the_learning_rate_alone():
    plain, published = composed("model=convnext_t"), composed("experiment=table1_convnext_t")
    assert published["optimizer"].pop("lr") == 4 * plain["optimizer"].pop("lr") == 4e-3
    assert {key for key in plain if plain[key] != published[key]} == {"run_name"}
