"""Every command of the documentation is run, here or by the test that is named; a new one without a test fails.

Commands run as they are written, in an empty folder, with what is appended making them small.
"""

import importlib
import json
import re
import shlex
import shutil

import pytest
import timm
import torch
import yaml
from PIL import Image

from contextual_cnn.contracts import StagedScores
from contextual_cnn.models import build_model
from contextual_cnn.runs.loggers import read_metrics
from contextual_cnn.settings.model import ModelSettings
from tests.conftest import run_python, small_run, wake_up
from tests.helpers.archives import VAL_IDS, write_archives
from tests.helpers.documentation import PAGES, ROOT, blocks, commands, is_test
from tests.helpers.quick_start import run

pytestmark = pytest.mark.run

SMALL = (
    "data.image_size=32 data.threads=1 data.eval_batch_size=12 trainer.device=cpu trainer.max_steps=2 "
    "trainer.log_every=1 trainer.global_batch_size=8 trainer.micro_batch_size=8 logger=local"
)
ATTO = f"model.name=contextual_convnext_atto {SMALL}"
DIGITS = f"{SMALL} data.limit=64"
NOISE = "data=synthetic data.limit=64 data.image_size=64 model=contextual_convnext_atto trainer=smoke"
ONE = "--device cpu --count 1"
SUMS = "--sums $ARCHIVES/sums.txt --workers 1"
TRAIN = "python train.py model=contextual_convnext_t data.root=$ROOT run_name=ctx_t"
ANALYZE = "python scripts/analysis/analyze.py gradcam shortlist --checkpoint outputs/ctx_t"
DRY_RUN = "outputs/contextual_convnext_tiny/dry_run.json"

# By page, in the order in which they are run: the command, and what is appended
RUN = {
    "README": {
        "python scripts/data/prepare_imagenet.py $ARCHIVES $ROOT": SUMS,
        "python train.py --cfg job": "",
    },
    "prepare-data": {
        "python scripts/data/prepare_imagenet.py $ARCHIVES $ROOT --layout folders": SUMS,
        "python scripts/data/check_data.py $ROOT --write-exclude bad.txt": "--workers 1",
    },
    "train": {
        TRAIN: ATTO,
        "python train.py data.root=$ROOT --cfg job": "",
        "python train.py data.root=$ROOT trainer.dry_run=true": ATTO,
        "python train.py data.root=$ROOT trainer=smoke run_name=smoke": ATTO,
        "python train.py data=synthetic data.limit=256 trainer=smoke": f"{ATTO} data.limit=12",
        'python scripts/model/describe_model.py "contextual_*"': "",
        "python train.py --multirun data.root=$ROOT optimizer.lr=5e-4,1e-3 'run_name=lr_${optimizer.lr}'": ATTO,
    },
    "resume": {TRAIN: ATTO},
    "evaluate": {
        "python evaluate.py checkpoint=outputs/ctx_t": "",
        "python evaluate.py checkpoint=outputs/ctx_t predictions=predictions.csv": "",
        "python evaluate.py checkpoint=outputs/ctx_t per_class=classes.csv": "",
        "python evaluate.py checkpoint=outputs/ctx_t real_labels=real.json": "",
        "python evaluate.py checkpoint=outputs/ctx_t data.root=/data/imagenet-a": "data.root=imagenet-a",
        "python evaluate.py checkpoint='outputs/ctx_t/checkpoints/*.pt'": "",
    },
    "export": {
        "python scripts/model/predict.py photo.jpg --checkpoint outputs/ctx_t": "",
        "python scripts/model/predict.py photos/ --checkpoint outputs/ctx_t": "",
        "python scripts/model/export.py --checkpoint outputs/ctx_t --format timm": "",
        "python scripts/model/export.py --checkpoint outputs/ctx_t outputs/ctx_t/checkpoints/last.pt --format timm": "",
    },
    "figures": {
        f"{ANALYZE} --twin outputs/plain --images photo.jpg": f"{ONE} --stage 3",
        "python scripts/analysis/plot.py outputs/ctx_t outputs/plain": "",
    },
    "cluster": {
        "python train.py model=contextual_convnext_t data.root=$ROOT trainer.dry_run=true": (
            f"{ATTO} run_name=contextual_convnext_tiny"
        ),
        f"python scripts/cluster/plan_cluster.py --measured {DRY_RUN} --intra 200 --inter 40 --price 2.5": "",
    },
    "first-hour": {
        f"python train.py {NOISE}": f"{SMALL} data.limit=12",
        "python scripts/data/prepare_digits.py data/digits": "",
        "python scripts/data/check_data.py data/digits": "--workers 1",
        "python scripts/data/preview_data.py data/digits --image-size 32": "--columns 2 --rows 1",
        "python train.py experiment=digits trainer.dry_run=true": DIGITS,
        "python train.py experiment=digits schedule.epochs=6 run_name=first": DIGITS,
        "python evaluate.py checkpoint=outputs/first per_class=classes.csv": "",
        "python scripts/analysis/analyze.py recall shortlist --checkpoint outputs/first": ONE,
        "python scripts/model/predict.py data/digits/val/7/0000.jpg --checkpoint outputs/first": "",
        "python scripts/model/predict.py data/digits/val/7 --checkpoint outputs/first": "",
        "python train.py experiment=digits schedule.epochs=6 model=convnext_atto run_name=plain": DIGITS,
        "python scripts/analysis/plot.py outputs/first outputs/plain": "",
        "python evaluate.py checkpoint=outputs": "",
        "python scripts/model/export.py --checkpoint outputs/first --format onnx": "",
    },
}

FIGURES = "tests/analysis/test_figures.py::test_the_script_draws_everything_into_the_runs_folder_and_to_wandb"
LAUNCHER = "tests/end_to_end/test_launcher.py::test_a_signal_to_any_process_stops_all_at_the_same_step"
EVIDENCE = "tests/scripts/test_evidence.py::test_fashion_becomes_class_folders_and_the_variants_a_table"
FAULTS = "takes half an hour; what it runs are these tests, and the kills of tests/end_to_end/test_kills.py"
YAML = "tests/test_config.py::test_every_yaml_composes_and_builds"
D, G = "${D}_contextual_convnext_atto", "${G}_contextual_convnext_atto"

# The test that runs it, or what keeps it from being run
DETECTION = "tests/end_to_end/test_detection.py::test_an_evaluation_is_the_same_on_any_number_of_processes"
VIDEO = "tests/end_to_end/test_video.py::test_an_evaluation_counts_every_video_once_by_several_views"

ELSEWHERE = {
    "./scripts/test.sh": "runs these tests",
    "./scripts/quickstart.sh": "installs and trains for minutes; its commands are those of docs/first-hour.md",
    "./scripts/quickstart.sh model=convnext_atto": "the same",
    'pip install -c constraints.txt -e ".[dali-cu13,prepare]"': "installs, as scripts/environment.sh does",
    'pip install -c constraints.txt -e ".[export]"': "the same",
    'pip install -e ".[analysis]"': "the same",
    "wandb sync outputs/ctx_t/wandb/offline-run-*": "needs an account",
    "./scripts/launch.sh --nnodes N --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 "
    "train.py model=contextual_convnext_t data.root=$ROOT run_name=ctx_t": LAUNCHER,
    "./scripts/launch.sh --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id ctx_t --rdzv-endpoint $HEAD:29500 "
    "train.py model=contextual_convnext_t data.root=$ROOT run_name=ctx_t": LAUNCHER,
    f"./scripts/launch.sh --nproc-per-node 8 {TRAIN.removeprefix('python ')}": LAUNCHER,
    f"torchrun --nproc-per-node 8 {TRAIN.removeprefix('python ')}": (
        "tests/end_to_end/test_command_line.py::test_two_processes_train_as_one"
    ),
    "torchrun --nproc-per-node 8 evaluate.py checkpoint=outputs/ctx_t": (
        "tests/end_to_end/test_command_line.py::test_evaluation_counts_every_image_once_at_any_world_size"
    ),
    "python train.py task=mean_color model=timm model.name=resnet18 data.root=$ROOT": (
        "tests/end_to_end/test_docs.py::test_a_task_as_the_page_shows_it_trains_and_is_evaluated"
    ),
    "torchrun --max-restarts": "tests/end_to_end/test_launcher.py::test_restarts_that_would_not_come_back_are_refused",
    "sbatch scripts/cluster/train.sbatch model=contextual_convnext_t data.root=$ROOT run_name=ctx_t": (
        "tests/scripts/test_slurm.py::test_the_signal_before_the_end_saves_and_requeues"
    ),
    "python scripts/cluster/submit.py --nodes 2 --gpus-per-node 8 --hours 24 model=contextual_convnext_t "
    "data.root=$ROOT run_name=ctx_t": (
        "tests/scripts/test_submit.py::test_a_job_that_is_signalled_comes_back_with_the_same_command"
    ),
    "ROOT=/path/to/imagenet ./scripts/dev/gpu_first_hour.sh OUT": (
        "tests/end_to_end/test_first_hour_on_gpus.py::test_the_list_passes_on_a_cpu"
    ),
    "python scripts/dev/gpu_check.py": "tests/end_to_end/test_scripts.py::test_the_gpu_check_passes_on_a_cpu",
    "python scripts/model/describe_model.py": (
        "tests/analysis/test_analysis.py::test_a_contextual_model_costs_its_twin_plus_what_the_definition_adds"
    ),
    "python scripts/doctor.py": "tests/scripts/test_doctor.py::test_a_working_machine_passes",
    'eval "$(python train.py -sc install=bash)"': (
        "tests/end_to_end/test_shell.py::test_the_shells_script_is_installed_by_eval"
    ),
    "python train.py experiment=digits optimizer.lrr=1e-3": (
        "tests/test_config.py::test_mistakes_get_a_cause_a_fix_and_status_2"
    ),
    "python train.py experiment=glyphs": YAML,
    "python scripts/data/preview_data.py ROOT": (
        "tests/end_to_end/test_scripts.py::test_the_preview_is_a_picture_of_labelled_rows"
    ),
    "python scripts/dev/compare_loaders.py": (
        "tests/end_to_end/test_scripts.py::test_the_comparison_of_the_loaders_has_nine_distances"
    ),
    "python scripts/dev/benchmark.py data --rounds 3": (
        "takes minutes; tests/end_to_end/test_scripts.py runs the others of its kinds"
    ),
    "python scripts/dev/benchmark.py op --released": "the same",
    "python -m tests.fault_suite --all": FAULTS,
    "python -m tests.fault_suite --all --output docs/results/cpu-faults.json --markdown docs/faults.md": FAULTS,
    "python evaluate.py checkpoint=outputs/ctx_t context=swap": (
        "tests/end_to_end/test_evaluation.py::test_contexts_are_exchanged_free_of_training"
    ),
    "python scripts/dev/scale.py": "tests/scripts/test_scale.py::test_a_node_holds_a_listing_once",
    "python scripts/dev/compile_kernels.py": (
        "tests/ops/test_sampled_conv_triton.py::test_compiles_for_sm_90_without_spilling_registers"
    ),
    "python scripts/dev/tune_kernels.py": "tests/end_to_end/test_scripts.py::test_the_kernels_can_be_tuned",
    "pip install -e '.[video]'": "installs",
    "python scripts/data/prepare_moving_digits.py data/moving_digits": VIDEO,
    "python scripts/data/prepare_kinetics.py LISTS CLIPS KINETICS": (
        "tests/scripts/test_prepare_kinetics.py::test_what_is_there_is_transcoded_and_the_rest_named"
    ),
    "python scripts/model/predict.py data/moving_digits/val/left/0003.mov --checkpoint "
    "outputs/moving_digits_contextual_resnet50": (
        "tests/end_to_end/test_video.py::test_a_video_is_named_with_its_frames_and_shortlists"
    ),
    "python scripts/model/describe_model.py --frames 8 --num-classes 400": (
        "tests/analysis/test_analysis.py::test_a_clip_costs_what_was_published"
    ),
    "python scripts/dev/benchmark.py clips": "tests/end_to_end/test_scripts.py::test_the_benchmark_of_clips_has_a_twin",
    "python train.py experiment=moving_digits": VIDEO,
    "python evaluate.py checkpoint=outputs/moving_digits_contextual_resnet50": VIDEO,
    "torchrun --nproc-per-node 8 train.py experiment=resnet50_sgd data.root=IMAGENET": YAML,
    "torchrun --nproc-per-node 8 train.py experiment=table2_kinetics data.root=KINETICS "
    "model.weights=outputs/resnet50_sgd": YAML,
    "python evaluate.py checkpoint=outputs/table2_kinetics": VIDEO,
    "python evaluate.py checkpoint=outputs/table2_kinetics clip.crops=10": VIDEO,
    "python evaluate.py checkpoint=outputs/table2_kinetics clip.sampling=dense clip.clips=10 clip.crops=3 "
    "data.eval_batch_size=1": VIDEO,
    "pip install -e '.[detection,analysis]'": "installs",
    "python scripts/data/prepare_digit_scenes.py data/digit_scenes": DETECTION,
    "python train.py experiment=digit_scenes": DETECTION,
    "python evaluate.py checkpoint=outputs/digit_scenes_contextual_convnext_atto": DETECTION,
    "python scripts/model/predict.py data/digit_scenes/val/000005.png --checkpoint "
    "outputs/digit_scenes_contextual_convnext_atto": (
        "tests/end_to_end/test_detection.py::test_a_picture_is_drawn_with_what_is_in_it"
    ),
    "python scripts/data/prepare_pennfudan.py PennFudanPed data/pennfudan": (
        "tests/end_to_end/test_detection.py::test_pedestrians_are_written_as_coco_has_them"
    ),
    "python train.py experiment=pennfudan model.weights=outputs/NAME": YAML,
    "torchrun --nproc-per-node 8 train.py experiment=table3_t data.root=COCO model.weights=outputs/ctx_t": YAML,
    "python evaluate.py checkpoint=outputs/table3_t predictions=detections.json per_class=classes.csv": DETECTION,
    "python scripts/model/describe_model.py --detector": (
        "tests/models/test_mask_rcnn.py::test_a_detector_costs_what_is_published"
    ),
    # docs/figures.md tells how its own pictures were made
    "python scripts/data/prepare_glyphs.py data/glyphs": "draws 14,000 letters in the system's fonts",
    "python scripts/data/prepare_glyphs.py data/glyphs_dark --dark-ink --val 20": "the same",
    "apt-get install dataset-fashion-mnist": "installs",
    "python scripts/data/prepare_fashion.py data/fashion --train 600 --val 500": EVIDENCE,
    "python scripts/dev/evidence.py": EVIDENCE,
    "python scripts/dev/evidence.py --output docs/results/cpu-evidence.json": EVIDENCE,
    'for model in "contextual_convnext_atto_digits model.projection_norm=layer" convnext_atto; do': "shell",
    'for model in "contextual_convnext_atto model.projection_norm=layer" convnext_atto; do': "shell",
    "done": "shell",
    "D=outputs/digits G=outputs/glyphs": "shell",
    "python train.py experiment=digits model=$model data.image_size=96 schedule.epochs=6 "
    "schedule.warmup_epochs=2": YAML,
    "python train.py experiment=glyphs model=$model schedule.epochs=6 schedule.warmup_epochs=1": YAML,
    f"python scripts/analysis/analyze.py gradcam --checkpoint {D} --twin ${{D}}_convnext_atto --stage 3 --count 3": (
        FIGURES
    ),
    f"python scripts/analysis/analyze.py sampling --checkpoint {D} --count 1": FIGURES,
    f"python scripts/analysis/analyze.py weights --checkpoint {D} --count 2": FIGURES,
    f"python scripts/analysis/analyze.py embeddings similarity shortlist recall --checkpoint {G} "
    "--twin ${G}_convnext_atto --count 3": FIGURES,
}


def all_commands():
    return {part for page in PAGES for command in commands(page) for part in command.split(" && ")}


def test_every_command_has_a_test_or_a_reason():
    run_here = {command for group in RUN.values() for command in group}
    known = run_here | ELSEWHERE.keys()
    assert all_commands() - known == set(), "commands of the documentation that no test runs"
    assert known - all_commands() == set(), "commands that the documentation no longer has"
    named = [where for where in ELSEWHERE.values() if where.startswith("tests/")]
    assert [name for name in named if not is_test(name)] == []
    assert len(named) > len(ELSEWHERE) / 2


@pytest.fixture(scope="module")
def place(tmp_path_factory, photos):
    """The folder in which a reader of the documentation is."""
    place = tmp_path_factory.mktemp("reader")
    write_archives(place / "archives", photos)
    Image.fromarray(photos[0]).save(place / "photo.jpg")
    (place / "photos").mkdir()
    shutil.copy(place / "photo.jpg", place / "photos")
    (place / "real.json").write_text(json.dumps([[i % 6] for i in range(len(VAL_IDS))]))
    return place


@pytest.mark.parametrize("page", RUN)
def test_the_commands_run(page, place):
    folder = place / "clone" if page == "first-hour" else place  # the others are one user's
    folder.mkdir(exist_ok=True)
    names = {"ARCHIVES": f"{place}/archives", "ROOT": f"{place}/root"}
    for number, (command, small) in enumerate(RUN[page].items()):
        expanded = re.sub(r"\$(ARCHIVES|ROOT)", lambda match: names[match[1]], f"{command} {small}")
        python, *arguments = shlex.split(expanded)
        assert python == "python"
        before(page, command, place)
        status, printed = run(*arguments, output=place / f"{page}_{number}", folder=folder, COLUMNS="160")
        assert status == 0, f"{command}\n{printed}"


def before(page, command, place):
    """What a reader has by then, from elsewhere."""
    if page == "evaluate" and "imagenet-a" in command:
        shutil.copytree(place / "root" / "val", place / "imagenet-a")
        shutil.rmtree(min((place / "imagenet-a").iterdir()))
    if page == "figures" and not (place / "outputs" / "plain").exists():
        arguments = f"train.py model=convnext_t model.name=convnext_atto data.root={place}/root run_name=plain {SMALL}"
        assert run(*shlex.split(arguments), output=place / "plain", folder=place)[0] == 0


def test_the_new_backbone_is_a_model_like_the_others(tmp_path, monkeypatch):
    """docs/extend.md: its code as a module, its yaml as the model's config."""
    (code, *_), (config, _) = (blocks(ROOT / "docs" / "extend.md", language) for language in ("python", "yaml"))
    (tmp_path / "fournet.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("fournet")
    model = build_model(ModelSettings(**yaml.safe_load(config) | {"num_classes": 10}))
    scores = StagedScores.of(model.train()(torch.randn(2, 3, 64, 64)))
    assert [logits.shape for logits in scores.logits] == [(2, 10)] * 4
    wake_up(model)
    sum(logits.square().mean() for logits in StagedScores.of(model(torch.randn(2, 3, 64, 64))).logits).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    features = timm.create_model("contextual_fournet", features_only=True, out_indices=(0, 2))
    assert [m.shape[1:] for m in features(torch.randn(1, 3, 64, 64))] == [(32, 16, 16), (128, 4, 4)]


WITH_MEAN_COLOR = """
import runpy, sys
from contextual_cnn import tasks
folder, *sys.argv = sys.argv[1:]
tasks.__path__.append(folder)
from contextual_cnn.tasks.mean_color.settings import MeanColorSettings
tasks.TASKS["mean_color"] = MeanColorSettings
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.run
def test_a_task_as_the_page_shows_it_trains_and_is_evaluated(image_root, tmp_path):
    """docs/extend.md: its code as a task's folder, its yaml as the task's config; stopped, and resumed."""
    (_, settings, task), (_, config) = (blocks(ROOT / "docs" / "extend.md", kind) for kind in ("python", "yaml"))
    write_files(
        tmp_path, {"mean_color/settings.py": settings, "mean_color/task.py": task, "task/mean_color.yaml": config}
    )
    script, *overrides = small_run(image_root, tmp_path)
    overrides = [override for override in overrides if not override.startswith("model")]
    overrides += ["task=mean_color", "model=timm", "model.name=resnet18", "optimizer.lr=0.01", "trainer.ema_decay=null"]
    command = ["-c", WITH_MEAN_COLOR, str(tmp_path), script, "--config-dir", str(tmp_path), *overrides]
    for steps in ("trainer.max_steps=7", "trainer.max_steps=null"):
        done = run_python(*command, steps)
        assert done.returncode == 0, done.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert sorted(losses) == list(range(1, 13))
    assert losses[12] < losses[1] / 2
    fits = [row["val/fit"] for row in rows if "val/fit" in row]
    assert 0 < fits[0] < fits[-1] < 1


def write_files(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
