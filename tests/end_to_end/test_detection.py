"""A detector by the real commands: trained, stopped, gone on with, shared by processes, evaluated."""

import csv
import json
import math
import signal

import numpy as np
import pytest
from PIL import Image

from contextual_cnn.data.detection.annotations import open_coco
from contextual_cnn.data.detection.coco_loader import training_scene
from contextual_cnn.runs.loggers import read_metrics
from tests.conftest import run_command, run_group
from tests.helpers.endings import assert_same_end, checkpoint, losses, steps_logged
from tests.helpers.quick_start import Command, run

pytestmark = pytest.mark.run


def small_detection_run(root, output_dir, *overrides):
    return [
        "train.py",
        "experiment=digit_scenes",
        f"data.root={root}",
        "data.threads=1",
        "data.short_side=64",
        "data.longest=64",
        "augment.short_sides=[64,96]",
        "model.timm_options={depths: [1, 1, 2, 1]}",
        "detector.fpn_channels=16",
        "detector.head_width=32",
        "detector.proposals=50",
        "schedule.epochs=2",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=1",
        "trainer.device=cpu",
        "trainer.log_every=1",
        "trainer.ema_decay=0.9",
        "trainer.eval_every=1",
        "logger=local",
        f"output_dir={output_dir}",
        "run_name=run",
        *overrides,
    ]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    made = run_command("scripts/data/prepare_digit_scenes.py", str(folder), "--train", "24", "--val", "9")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def straight(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    status, printed = run(*small_detection_run(scenes, folder), output=folder / "output")
    assert status == 0, printed
    assert "train 24 images with" in printed
    assert "mask AP" in printed
    return folder


def test_scenes_are_as_their_annotations_say(scenes):
    content = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    assert len(content["images"]) == 24
    assert {entry["category_id"] for entry in content["annotations"]} <= set(range(1, 11))
    empty = {image["id"] for image in content["images"]} - {entry["image_id"] for entry in content["annotations"]}
    assert empty  # an image without objects trains too
    images = open_coco(scenes, "train")
    for index in range(len(images)):
        scene = training_scene(images, index)
        for box, mask in zip(scene.boxes.tolist(), scene.masks, strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box == [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def test_a_run_that_was_stopped_in_an_epoch_ends_with_the_same_bits(straight, scenes, tmp_path):
    started = Command(*small_detection_run(scenes, tmp_path), output=tmp_path / "output")
    started.wait_until(lambda: 2 in steps_logged(tmp_path))
    started.send(signal.SIGTERM)
    assert started.wait() == 75, started.printed
    assert checkpoint(tmp_path)["step"] < 12
    status, printed = run(*small_detection_run(scenes, tmp_path), output=tmp_path / "output")
    assert status == 0, printed
    assert_same_end(straight, tmp_path)


def test_a_run_that_was_killed_ends_with_the_same_bits(straight, scenes, tmp_path):
    """In the second epoch, from the checkpoint of the first."""
    started = Command(*small_detection_run(scenes, tmp_path), output=tmp_path / "output")
    started.wait_until(lambda: 8 in steps_logged(tmp_path))
    started.send(signal.SIGKILL)
    started.wait()
    assert checkpoint(tmp_path)["step"] == 6
    status, printed = run(*small_detection_run(scenes, tmp_path), output=tmp_path / "output")
    assert status == 0, printed
    assert_same_end(straight, tmp_path)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_learn_what_one_learns(straight, scenes, tmp_path, processes):
    """With and without accumulation, with images of different sizes and without objects, on one rank alone."""
    together = run_group(processes, *small_detection_run(scenes, tmp_path))
    assert together.returncode == 0, together.stdout
    first = [[loss for _, loss, *_ in losses(folder)][:3] for folder in (tmp_path, straight)]
    assert first[0] == pytest.approx(first[1], rel=1e-3)  # rounding grows from step to step


def test_a_context_that_is_taught_trains_on_processes_of_one_image(scenes, tmp_path):
    """Its classes are the data's, its loss is logged, and the drawing names them."""
    command = small_detection_run(scenes, tmp_path, "detector.context=multilabel", "trainer.max_steps=3")
    together = run_group(2, *command)
    assert together.returncode == 0, together.stdout
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(row["train/loss_context"] > 0 for row in rows if "train/loss" in row)
    picture = str(min((scenes / "val").iterdir()))
    predict = ("scripts/model/predict.py", picture, "--checkpoint", str(tmp_path / "run"), "--device", "cpu")
    done = run_command(*predict, "--output", str(tmp_path / "seen.png"))
    assert done.returncode == 0, done.stderr
    assert "context after stage 1: 5 of 10 classes: " in done.stdout


def test_a_class_table_that_trains_through_the_contexts_trains_on_processes(scenes, tmp_path):
    """Accumulated gradients of what only the contexts reach, on a rank whose image may be empty."""
    command = small_detection_run(scenes, tmp_path, "detector.context=embeddings", "trainer.max_steps=2")
    together = run_group(2, *command)
    assert together.returncode == 0, together.stdout


def report_of(folder):
    return json.loads((folder / "run" / "checkpoints" / "evaluation.json").read_text())


def figures(report):
    return {key: value for key, value in report.items() if key.startswith(("box_", "mask_")) or key == "images"}


def test_an_evaluation_is_the_same_on_any_number_of_processes(straight, tmp_path):
    evaluate = ("evaluate.py", f"checkpoint={straight / 'run'}", "device=cpu")
    answers, classes = tmp_path / "answers.json", tmp_path / "classes.csv"
    done = run_command(*evaluate, f"predictions={answers}", f"per_class={classes}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(("mask AP ", "classes: "))
    alone = figures(report_of(straight))
    assert alone["images"] == 9
    assert all(math.isfinite(value) for value in alone.values())
    for processes in (2, 4):
        together = run_group(processes, *evaluate)
        assert together.returncode == 0, together.stdout
        assert figures(report_of(straight)) == alone
    found = json.loads(answers.read_text())
    assert found
    assert found[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
    assert {row["class"] for row in csv.DictReader(classes.read_text().splitlines())} <= set("0123456789")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_finds_digits(tmp_path):
    """Both commands of docs/detection.md, as they are written: 45 in ten minutes of one core."""
    scenes = str(tmp_path / "scenes")
    assert run_command("scripts/data/prepare_digit_scenes.py", scenes).returncode == 0
    command = ("experiment=digit_scenes", f"data.root={scenes}", f"output_dir={tmp_path}", "run_name=run")
    started = Command("train.py", *command, "logger=local", "trainer.device=cpu", output=tmp_path / "output")
    assert started.wait(timeout=1500) == 0, started.printed
    assert checkpoint(tmp_path)["best"]["mask_ap"] >= 40


def test_keys_of_classification_are_refused(straight):
    for key in ("context=swap", "clip.crops=3", "data.crop_pct=0.9"):
        refused = run_command("evaluate.py", f"checkpoint={straight / 'run'}", "device=cpu", key)
        assert refused.returncode == 2, key
        assert key.split("=")[0] in refused.stderr


def test_another_size_is_a_report_of_its_own(straight):
    done = run_command(
        "evaluate.py", f"checkpoint={straight / 'run'}", "device=cpu", "data.short_side=96", "data.longest=96"
    )
    assert done.returncode == 0, done.stderr
    (other,) = (straight / "run" / "checkpoints").glob("evaluation_short_side-96*.json")
    assert json.loads(other.read_text())["differences"] == {"short_side": 96, "longest": 96}


def test_a_script_of_images_refuses_a_detector(straight):
    refused = run_command("scripts/analysis/analyze.py", "shortlist", "--checkpoint", str(straight / "run"))
    assert refused.returncode == 2
    assert "instance_segmentation" in refused.stderr


def test_a_detector_is_not_compiled_as_a_whole(scenes, tmp_path):
    refused = run_command(*small_detection_run(scenes, tmp_path, "trainer.compile=true"))
    assert refused.returncode == 2
    assert "trainer.compile=false" in refused.stderr


def test_a_run_begins_from_the_weights_of_a_detector_and_of_a_classifier(straight, scenes, tmp_path):
    """The number of the context's classes is that of the weights."""
    again = small_detection_run(scenes, tmp_path, f"model.weights={straight / 'run'}", "trainer.max_steps=1")
    status, printed = run(*again, output=tmp_path / "output")
    assert status == 0, printed
    assert "tensors of a detector given, 0 left as initialised" in printed


def test_a_dry_run_tells_what_a_detector_needs(scenes, tmp_path):
    done = run_command(*small_detection_run(scenes, tmp_path, "trainer.dry_run=true"))
    assert done.returncode == 0, done.stderr
    forecast = json.loads((tmp_path / "run" / "dry_run.json").read_text())
    assert forecast["classes"] == 10
    assert forecast["images"] == {"train": 24, "val": 9}


def test_a_picture_is_drawn_with_what_is_in_it(straight, scenes, tmp_path):
    """A folder becomes one JSON file; a damaged picture is named and left out."""
    predict = ("scripts/model/predict.py", "--checkpoint", str(straight / "run"), "--device", "cpu", "--score", "0.0")
    pictures = sorted((scenes / "val").iterdir())
    done = run_command(*predict, str(pictures[0]), "--output", str(tmp_path / "seen.png"))
    assert done.returncode == 0, done.stderr
    assert "certainty" in done.stdout
    assert "of random classes" in done.stdout
    with Image.open(tmp_path / "seen.png") as picture:
        assert picture.width > 900
    folder = tmp_path / "pictures"
    folder.mkdir()
    for picture in pictures[:2]:
        (folder / picture.name).write_bytes(picture.read_bytes())
    (folder / "broken.png").write_bytes(b"nothing")
    done = run_command(*predict, str(folder), "--output", str(tmp_path / "seen.json"))
    assert done.returncode == 1
    assert "broken.png" in done.stderr
    found = json.loads((tmp_path / "seen.json").read_text())
    assert {one["file_name"].rpartition("/")[2] for one in found} <= {picture.name for picture in pictures[:2]}
    assert all(one["segmentation"]["size"] == [128, 128] for one in found)


def test_pedestrians_are_written_as_coco_has_them(tmp_path):
    """Masks whose pixels are numbers of people, in palette images as the data set has them."""
    source = tmp_path / "PennFudanPed"
    for name in ("PNGImages", "PedMasks"):
        (source / name).mkdir(parents=True)
    draws = np.random.default_rng(0)
    for city in ("Fudan", "Penn"):
        for number in range(3):
            people = np.zeros((50, 60), np.uint8)
            people[5:45, 3:13], people[10:40, 30:38] = 1, 2
            mask = Image.fromarray(people, "P")
            mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
            mask.save(source / "PedMasks" / f"{city}Ped{number}_mask.png")
            pixels = draws.integers(0, 256, (50, 60, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(source / "PNGImages" / f"{city}Ped{number}.png")
    done = run_command("scripts/data/prepare_pennfudan.py", str(source), str(tmp_path / "coco"), "--val", "2")
    assert done.returncode == 0, done.stderr
    images = open_coco(tmp_path / "coco", "train")
    assert len(images) == 4
    assert len(open_coco(tmp_path / "coco", "val", ("person",))) == 2
    scene = training_scene(images, 0)
    assert scene.boxes.tolist() == [[3, 5, 13, 45], [30, 10, 38, 40]]
    assert [int(mask.sum()) for mask in scene.masks] == [400, 240]
    refused = run_command("scripts/data/prepare_pennfudan.py", str(tmp_path), str(tmp_path / "coco"))
    assert refused.returncode == 2
    assert "PNGImages" in refused.stderr
