"""evaluate.py beyond top-1, by its real command: predictions, benchmarks' folders, ReaL's labels."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from contextual_cnn.runs.loggers import read_metrics
from contextual_cnn.tasks.image_classification.reliability import wilson_interval
from tests.conftest import run_group, small_run
from tests.helpers.facts import tells
from tests.helpers.quick_start import run

pytestmark = pytest.mark.run


@pytest.fixture(scope="module")
def trained(image_root, tmp_path_factory):
    """The folder of a run of two steps, of six classes: far from perfect, and not indifferent."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = small_run(image_root, folder, "trainer.max_steps=2", "optimizer.lr=0.01")
    status, printed = run(*arguments, output=folder / "output")
    assert status == 0, printed
    return folder / "run"


def evaluate(trained, tmp_path, *overrides):
    """The report, and what was printed."""
    command = ["evaluate.py", f"checkpoint={trained}", "device=cpu", "weights=raw", *overrides]
    status, printed = run(*command, output=tmp_path / "output", COLUMNS="150")
    assert status == 0, printed
    (file,) = re.findall(r"^report: (.+)$", printed, re.MULTILINE)
    return json.loads(Path(file).read_text()), printed


def read_csv(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_predictions_are_complete_and_make_the_report_at_1_and_2_processes(trained, image_root, tmp_path):
    report, printed = evaluate(trained, tmp_path, f"predictions={tmp_path}/alone.csv", f"per_class={tmp_path}/c.csv")
    rows = read_csv(tmp_path / "alone.csv")
    assert [row["name"] for row in rows] == [f"val/class_{c}/{i}.JPEG" for c in range(6) for i in range(3)]
    assert all(row["target"] == row["name"].split("/")[1] for row in rows)
    hits = sum(row["class1"] == row["target"] for row in rows)
    assert report["top1"] == pytest.approx(100 * hits / 18)
    assert report["top1_interval"] == pytest.approx([100 * end for end in wilson_interval(hits, 18)])
    assert report["classes"] == 6
    assert 0 < report["calibration_error"] < 100
    assert tells(printed, "ECE", "15")
    assert "Warning" not in printed
    for row in rows:
        probabilities = [float(row[f"probability{i}"]) for i in range(1, 6)]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 5 / 6 <= sum(probabilities) <= 1

    by_class = read_csv(tmp_path / "c.csv")
    assert {row["class"] for row in by_class} == {f"class_{c}" for c in range(6)}
    assert sum(float(row["recall"]) * int(row["images"]) for row in by_class) == pytest.approx(hits)
    assert report["mean_f1"] == pytest.approx(100 * sum(float(row["f1"]) for row in by_class) / 6, abs=1e-3)

    command = ["evaluate.py", f"checkpoint={trained}", "device=cpu", "weights=raw"]
    done = run_group(2, *command, f"predictions={tmp_path}/shared.csv")
    assert done.returncode == 0, done.stderr
    shared = read_csv(tmp_path / "shared.csv")
    assert [(row["name"], row["target"], row["class1"]) for row in shared] == [
        (row["name"], row["target"], row["class1"]) for row in rows
    ]
    for one, other in zip(rows, shared, strict=True):
        assert float(one["probability1"]) == pytest.approx(float(other["probability1"]), abs=1e-5)
    again = json.loads((trained / "checkpoints" / "evaluation.json").read_text())
    assert again["calibration_error"] == pytest.approx(report["calibration_error"], abs=1e-3)


def test_stages_are_named_by_what_they_follow_from_the_log_to_the_report(image_root, tmp_path):
    """Of a model with context in stage 4 alone, which classifies after stages 3 and 4."""
    few = ["model.contextual_stages=[4]", "trainer.max_steps=2"]
    status, printed = run(*small_run(image_root, tmp_path, *few), output=tmp_path / "output")
    assert status == 0, printed
    assert re.search(r"loss \S+ \(s3 \S+ s4 \S+\), recall s3 \d+ %", printed)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    logged = {name for row in rows for name in row if "_stage" in name}
    measured = {"train/loss_stage3", "train/loss_stage4", "train/recall_stage3"}
    assert logged == measured | {"val/recall_stage3", "val_ema/recall_stage3"}
    report, printed = evaluate(tmp_path / "run", tmp_path)
    assert {name for name in report if "_stage" in name} == {"recall_stage3"}
    assert re.findall(r"after stage \d", printed) == ["after stage 3"]


@pytest.mark.parametrize("names", ["class_{}", "{}"], ids=["names", "numbers"])
def test_a_benchmark_of_some_classes_is_predicted_among_these(trained, image_root, tmp_path, names):
    for label in (1, 2, 4):
        shutil.copytree(image_root / "val" / f"class_{label}", tmp_path / "images" / names.format(label))
    found = [f"data.root={tmp_path}/images", f"predictions={tmp_path}/some.csv"]
    report, printed = evaluate(trained, tmp_path, *found)
    rows = read_csv(tmp_path / "some.csv")
    assert (report["images"], report["classes"], len(rows)) == (9, 3, 9)
    assert tells(printed, "3", "6", "classes")
    assert ("the class folders are numbers: 1 is class_1" in printed) == (names == "{}")
    assert [row["target"] for row in rows] == [f"class_{label}" for label in (1, 2, 4) for _ in range(3)]
    for row in rows:
        assert {row[f"class{i}"] for i in (1, 2, 3)} == {"class_1", "class_2", "class_4"}
        assert sum(float(row[f"probability{i}"]) for i in (1, 2, 3)) == pytest.approx(1, abs=1e-5)
    hits = sum(row["class1"] == row["target"] for row in rows)
    assert report["top1"] == pytest.approx(100 * hits / 9)


def test_a_part_and_noise_leave_the_report_of_the_whole_alone(trained, tmp_path):
    whole, printed = evaluate(trained, tmp_path)
    assert (whole["images"], whole["differences"], whole["noise"]) == (18, {}, False)
    assert "NOISE" not in printed
    before = (trained / "checkpoints" / "evaluation.json").read_bytes()
    part, printed = evaluate(trained, tmp_path, "data.limit=4", "data.mean=[0.5,0.5,0.5]", "data.loader=synthetic")
    assert (part["images"], part["noise"]) == (4, True)
    assert part["differences"] == {"limit": 4, "mean": [0.5, 0.5, 0.5], "loader": "synthetic"}
    assert "NOISE" in printed.partition("measure")[0]
    assert (trained / "checkpoints" / "evaluation.json").read_bytes() == before


def test_a_machine_without_dali_evaluates_by_the_other_loader(trained, tmp_path):
    by_dali, _ = evaluate(trained, tmp_path)
    by_torch, _ = evaluate(trained, tmp_path, "data.loader=torch")
    assert (by_dali["loader"], by_torch["loader"]) == ("dali", "torch")
    assert by_torch["loss"] == pytest.approx(by_dali["loss"], rel=0.02)


def test_reals_labels_count_beside_the_splits_own(trained, image_root, tmp_path):
    for number, image in enumerate(sorted((image_root / "val").glob("*/*")), start=1):
        folder = tmp_path / "images" / "val" / image.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"ILSVRC2012_val_{19 - number:08d}.JPEG")  # the last image first
    labels = [[] if i % 3 == 0 else [i % 6, (i + 2) % 6] for i in range(18)]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    files = [f"real_labels={tmp_path}/real.json", f"predictions={tmp_path}/real.csv"]
    report, printed = evaluate(trained, tmp_path, f"data.root={tmp_path}/images", *files)
    fitting = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": labels[i] for i in range(18) if labels[i]}
    rows = [row for row in read_csv(tmp_path / "real.csv") if row["name"].split("/")[-1] in fitting]
    hits = sum(int(row["class1"].removeprefix("class_")) in fitting[row["name"].split("/")[-1]] for row in rows)
    assert report["real_images"] == len(rows) == 12
    assert report["real_top1"] == pytest.approx(100 * hits / 12)
    assert report["images"] == 18
    assert tells(printed, "top-1", "12", "images")


def test_a_file_that_cannot_be_written_is_said_before_the_work(trained, tmp_path):
    command = ["evaluate.py", f"checkpoint={trained}", "predictions=/nowhere/a.csv"]
    status, printed = run(*command, output=tmp_path / "output")
    assert status == 2
    assert tells(printed, "predictions", "/nowhere/a.csv")


def test_a_pattern_or_a_folder_of_runs_gives_one_table_the_best_first(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs" / "one")
    shutil.copytree(trained, tmp_path / "runs" / "other")
    command = ["evaluate.py", f"checkpoint={tmp_path}/runs/*/checkpoints/*.pt", "device=cpu"]
    status, printed = run(*command, output=tmp_path / "output", COLUMNS="200")
    assert status == 0, printed
    table = printed[printed.index("4 checkpoints") :]
    scores = [float(line.split("│")[3]) for line in table.splitlines() if ".pt" in line]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    status, printed = run(
        "evaluate.py", f"checkpoint={tmp_path}/runs", "device=cpu", "per_class=a.csv", output=tmp_path / "output"
    )
    assert status == 2
    assert tells(printed, "per_class=a.csv", "2")


def test_contexts_are_exchanged_free_of_training(trained, tmp_path):
    own, _ = evaluate(trained, tmp_path)
    swapped, printed = evaluate(trained, tmp_path, "context=swap", "context_stages=[3,4]")
    assert (swapped["top1"], swapped["images"]) == (own["top1"], own["images"])
    assert swapped["control"] == {"context": "swap", "stages": [3, 4]}
    assert 0 <= swapped["controlled_top1"] <= 100
    assert tells(printed, "contexts", "stages", "3", "4")
    assert "control" not in json.loads((trained / "checkpoints" / "evaluation.json").read_text())
    assert len(list((trained / "checkpoints").glob("evaluation_context-swap_stages*.json"))) == 1
