"""Batches of clips: each video where it belongs, the same from any step on and for any number of processes."""

import logging
from itertools import islice

import numpy as np
import pytest
import torch

from contextual_cnn.batch_plan import BatchPlan
from contextual_cnn.data.video.video_data import VideoData
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.settings.clip import ClipSettings
from contextual_cnn.settings.data import DataSettings
from tests.data.video.clips import grey_frames, numbers, write_video

CPU = torch.device("cpu")
SETTINGS = dict(loader="torch", image_size=32, crop_pct=1.0, interpolation="bilinear", threads=1, eval_batch_size=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes; video i of the train split has 8 + i frames."""
    folder = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 12), ("val", 5)):
        for i in range(count):
            write_video(folder / split / "ab"[i % 2] / f"{i:02}.mkv", grey_frames(8 + i))
    return folder


def data(root, clip=None, **options):
    return VideoData(DataSettings(root=str(root), **SETTINGS | options), clip or ClipSettings(frames=4))


def train(videos, count, first_step=0, micro_batch=4, world_size=1, rank=0):
    plan = BatchPlan.make(images=12, global_batch=4, micro_batch=micro_batch, world_size=world_size)
    return list(islice(videos.train_batches(plan, 0, World(rank, world_size, rank, CPU), first_step), count))


def test_clips_have_frames_in_order_of_one_crop(root):
    (batch,) = train(data(root), 1)
    assert batch.images.shape == (4, 1, 4, 3, 32, 32)
    assert batch.size == 4
    grey = batch.images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
        3, 1, 1
    )
    for clip in (grey[:, 0] * 255).movedim(-3, -1).numpy():
        seen = numbers(clip)
        assert seen == sorted(set(seen))


def test_a_run_goes_on_with_the_same_clips_and_any_number_of_processes_sees_them(root):
    straight = train(data(root), 5)  # an epoch has 3 steps
    for batch, again in zip(straight[2:], train(data(root), 3, first_step=2), strict=True):
        assert torch.equal(batch.images, again.images)
        assert torch.equal(batch.targets, again.targets)
    shared = [train(data(root), 2, world_size=2, rank=rank, micro_batch=2) for rank in range(2)]
    for step in range(2):
        joined = torch.cat([shared[rank][step].images for rank in range(2)])
        assert torch.equal(joined, straight[step].images)
    assert not torch.equal(straight[0].images[0], straight[3].images[0])


def test_every_video_is_evaluated_once_by_all_its_views(root):
    for world_size in (1, 2, 3):
        counted = []
        for rank in range(world_size):
            videos = data(root, ClipSettings(frames=4, clips=2, crops=3))
            batches = videos.evaluation_batches(World(rank, world_size, rank, CPU))
            assert batches.images == 5
            for _ in range(2):
                found = [target for batch in batches for target in batch.targets.tolist()]
            counted += found
            assert all(batch.images.shape[1:] == (6, 4, 3, 32, 32) for batch in batches)
        assert sorted(counted) == [0, 0, 0, 1, 1]


def test_a_video_that_cannot_be_used_is_named_replaced_and_counted_as_wrong(root, tmp_path, caplog):
    for split, i in (("train", 3), ("val", 1)):
        for path in (root / split).rglob("*.mkv"):
            copy = tmp_path / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes()
            copy.write_bytes(b"" if path.stem == f"{i:02}" else content)
    videos = data(tmp_path)
    with caplog.at_level(logging.WARNING, "contextual_cnn"):
        batches = train(videos, 3)
        (last,) = [list(videos.evaluation_batches(World(0, 1, 0, CPU)))]
    assert sum(batch.replaced for batch in batches) == 1
    assert sorted(target for batch in last for target in batch.targets.tolist()) == [-1, 0, 0, 0, 1]
    assert "the video train/b/03.mkv cannot be used" in caplog.text
    assert "the video val/b/01.mkv cannot be used" in caplog.text


def test_lists_may_have_the_number_of_frames(root, tmp_path):
    for split in ("train", "val"):
        paths = sorted((root / split).rglob("*.mkv"))
        frames = "{} " if split == "train" else ""  # the number of frames
        lines = [f"{path.relative_to(root)} {frames.format(8 + i)}{i % 2}" for i, path in enumerate(paths)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
        (tmp_path / split).symlink_to(root / split)
    videos = VideoData(DataSettings(root=str(tmp_path), layout="list", **SETTINGS), ClipSettings(frames=4))
    assert [len(videos.sources[split]) for split in ("train", "val")] == [12, 5]
    assert videos.sources["train"].name(0) == "train/a/00.mkv"
    assert videos.sources["train"].targets.tolist() == [0, 1] * 6
    assert train(videos, 1)[0].images.shape == (4, 1, 4, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(loader="dali"), "data.loader=torch"),
        (dict(randaugment_on="device"), "data.randaugment_on=loader"),
        (dict(shuffle_shards=2), "data.shuffle_shards=null"),
        (dict(layout="synthetic"), "ROOT/train/CLASS/VIDEO.mp4"),
    ],
)
def test_keys_that_mean_nothing_for_videos_are_refused(root, options, named):
    with pytest.raises(UserError) as refused:
        data(root, **options)
    assert named in refused.value.fix


def test_a_folder_of_images_is_no_folder_of_videos(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "x.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no videos, but 1 \.jpg") as refused:
        data(tmp_path)
    assert ".mp4" in refused.value.fix


@pytest.mark.parametrize(
    "options",
    [
        dict(frames=0),
        dict(shift_div=1),
        dict(crops=2),
        dict(scales=[]),
        dict(scales=[1.5]),
        dict(hflip=2.0),
        dict(clips=0),
    ],
)
def test_clips_that_cannot_be_are_refused_by_their_key(options):
    with pytest.raises(UserError, match=f"clip.{next(iter(options))}"):
        ClipSettings(**options)


def test_draws_fill_the_unit_interval():
    from contextual_cnn.data.sampler import TrainSampler
    from contextual_cnn.data.video.video_loader import draws

    plan = BatchPlan.make(images=400, global_batch=400, micro_batch=400, world_size=1)
    rows = draws(TrainSampler(plan, 0, 0), 0, ClipSettings())
    assert rows.shape == (400, 12)
    assert (np.abs(rows.mean(0) - 0.5) < 0.1).all()
