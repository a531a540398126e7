"""Average precision is pycocotools', of every image once, whatever shares it."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from contextual_cnn.data.detection.annotations import ground_truth, open_coco
from contextual_cnn.data.detection.coco_data import CocoData
from contextual_cnn.distributed import World
from contextual_cnn.engine.evaluator import evaluate
from contextual_cnn.settings.coco import CocoSettings
from contextual_cnn.tasks.instance_segmentation.measure import FIGURES, CocoEvaluation, judge, pasted, scaled
from tests.helpers.scenes import ANNOTATIONS, rectangle, write_scenes, write_split

ALONE = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def truth(root):
    return ground_truth(open_coco(root, "val"))[0]


def perfect(truth):
    return [
        {key: entry[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.9}
        for entry in truth["annotations"]
        if not entry["iscrowd"]
    ]


def test_perfect_answers_are_worth_100(truth):
    answer = judge(truth, perfect(truth))
    for kind in ("box", "mask"):
        assert answer.figures[f"{kind}_ap"] == pytest.approx(100)
        assert answer.by_class[kind] == pytest.approx([100, 100, 100])


def test_no_answer_is_worth_nothing(truth):
    answer = judge(truth, [])
    assert answer.figures["mask_ap"] == answer.figures["box_ap"] == 0


def test_what_is_found_in_a_crowd_costs_nothing(truth):
    in_crowd = coco_mask.frPyObjects({"size": [60, 80], "counts": [2400, 1200, 1200]}, 60, 80)
    found = [*perfect(truth)]
    found.append({"image_id": 25, "category_id": 3, "bbox": [40, 0, 20, 60], "segmentation": in_crowd, "score": 0.99})
    assert judge(truth, found).figures["mask_ap"] == pytest.approx(100)
    found[-1] = found[-1] | {"image_id": 32}  # where there is none
    assert judge(truth, found).figures["mask_ap"] < 90


def noisy(truth):
    """Shifted boxes, wrong classes and doubles."""
    draws = np.random.default_rng(0)
    found = []
    for entry in truth["annotations"]:
        for _ in range(6):
            left, top, width, height = (np.array(entry["bbox"]) + draws.integers(-6, 7, 4)).astype(int)
            mask = np.zeros((60, 80), np.uint8)
            mask[max(0, top) : top + height, max(0, left) : left + width] = 1
            found.append(
                {
                    "image_id": entry["image_id"],
                    "category_id": int(draws.choice([3, 17, 90])) if draws.random() < 0.3 else entry["category_id"],
                    "bbox": [float(left), float(top), float(width), float(height)],
                    "segmentation": coco_mask.encode(np.asfortranarray(mask)),
                    "score": float(draws.random()),
                }
            )
    return found


def test_every_figure_is_pycocotools_own(truth):
    """By its own way to load results: boxes alone, and masks alone."""
    found = noisy(truth)
    answer = judge(truth, found)
    assert 0 < answer.figures["mask_ap"] < 100
    for kind, name, left_out in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        with contextlib.redirect_stdout(io.StringIO()):
            annotated = COCO()
            annotated.dataset = truth
            annotated.createIndex()
            alone = [{key: value for key, value in one.items() if key != left_out} for one in found]
            evaluation = COCOeval(annotated, annotated.loadRes(alone), name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for figure, place in FIGURES.items():
            theirs = 100 * evaluation.stats[place]
            assert answer.figures.get(f"{kind}_{figure}", -100) == pytest.approx(theirs, abs=1e-9), (kind, figure)


def test_the_mean_over_the_classes_is_the_average_precision(truth):
    answer = judge(truth, noisy(truth))
    for kind in ("box", "mask"):
        assert np.nanmean(answer.by_class[kind]) == pytest.approx(answer.figures[f"{kind}_ap"])


def test_a_class_without_objects_counts_nothing(tmp_path):
    write_split(tmp_path, "val", ANNOTATIONS[:1])
    truth, _ = ground_truth(open_coco(tmp_path, "val"))
    answer = judge(truth, perfect(truth))
    assert answer.figures["mask_ap"] == pytest.approx(100)
    assert np.isnan(answer.by_class["mask"]).tolist() == [True, False, True]
    assert "mask_ap_large" not in answer.figures


def test_crowds_alone_are_worth_nothing(truth):
    crowds = {**truth, "annotations": [entry for entry in truth["annotations"] if entry["iscrowd"]]}
    assert judge(crowds, perfect(truth)).figures["mask_ap"] == 0


def as_found(source, index, size, score=0.9):
    """What a detector that sees everything would say: in the pixels of the resized image, with masks of 28 x 28."""
    objects = source.objects(index)
    kept = ~objects.crowd
    height, width = source.size(index)
    boxes = torch.tensor(objects.boxes[kept]).float()
    boxes[:, 2:] += boxes[:, :2]
    boxes *= torch.tensor([size[1] / width, size[0] / height]).repeat(2)
    labels = torch.tensor(objects.labels[kept]) + 1
    return {
        "boxes": boxes,
        "labels": labels,
        "scores": torch.full((len(boxes),), score),
        "masks": torch.ones(len(boxes), 1, 28, 28),
    }


@pytest.mark.parametrize("eval_batch_size", [1, 3])
def test_a_detector_that_sees_everything_is_worth_100(root, eval_batch_size):
    """Through loader, scaling, pasting and run lengths, with ids that have gaps."""
    settings = CocoSettings(root=str(root), threads=1, short_side=96, longest=200, eval_batch_size=eval_batch_size)
    data = CocoData(settings)
    source, evaluation = data.sources["val"], CocoEvaluation(data, ALONE)
    places = iter(range(len(source)))

    def call(images, sizes):
        return [as_found(source, next(places), size) for size in sizes]

    model = torch.nn.Identity()
    report = evaluate({"model": model}, {"model": call}, evaluation, ALONE)["model"]
    assert report["box_ap"] == pytest.approx(100)
    assert report["mask_ap"] == pytest.approx(100, abs=6)  # 28 x 28 probabilities fade at the border of a box
    assert report["mask_ap50"] == pytest.approx(100)
    assert report["images"] == 4
    assert report["bad_images"] == 0


def test_a_bad_image_counts_as_one_in_which_nothing_is_found(tmp_path):
    write_scenes(tmp_path)
    (tmp_path / "val" / "picture 1.png").write_bytes(b"")
    data = CocoData(CocoSettings(root=str(tmp_path), threads=1, short_side=60, longest=100))
    source, places = data.sources["val"], iter(range(4))
    answers = []
    report = evaluate(
        {"model": torch.nn.Identity()},
        {"model": lambda images, sizes: [as_found(source, next(places), size) for size in sizes]},
        CocoEvaluation(data, ALONE, answers.append),
        ALONE,
    )["model"]
    assert report["bad_images"] == 1
    assert report["box_ap"] == pytest.approx(200 / 3)
    assert {one["image_id"] for one in answers[0].found} == {11, 25}


def test_an_annotation_whose_mask_cannot_be_made_is_left_out_and_named(tmp_path, caplog):
    broken = rectangle(999, 32, 3, (1, 1, 20, 20)) | {"segmentation": {"size": [60, 80], "counts": [1, 2]}}
    write_split(tmp_path, "val", [*ANNOTATIONS, broken])
    truth, problems = ground_truth(open_coco(tmp_path, "val"))
    assert len(truth["annotations"]) == len(ANNOTATIONS)
    assert problems == ["val/picture 3.png: annotation 999: its run lengths make up 3 pixels of 4800"]


def test_masks_are_pasted_where_their_boxes_are():
    answer = {"boxes": torch.tensor([[20.0, 40, 60, 80]]), "masks": torch.ones(1, 1, 28, 28)}
    boxes, masks = scaled(answer, (120, 160), (60, 80))
    assert boxes.tolist() == [[10, 20, 30, 40]]
    (mask,) = pasted(masks, boxes, 60, 80)
    rows, columns = np.nonzero(mask)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == pytest.approx([10, 20, 30, 40], abs=1)
