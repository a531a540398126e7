"""Which frames make a clip: as the temporal shift module's code has it, and in range for any number of frames."""

import numpy as np
import pytest

from contextual_cnn.data.video.frames import evaluation_frames, training_frames
from contextual_cnn.settings.clip import ClipSettings

UNIFORM, DENSE = ClipSettings(), ClipSettings(sampling="dense")
COUNTS = range(1, 201)
DRAWS = [np.full(8, share) for share in (0.0, 0.37, 1 - 1e-12)]


@pytest.mark.parametrize("clip", [UNIFORM, DENSE], ids=["uniform", "dense"])
def test_all_frames_are_there(clip):
    several = ClipSettings(sampling=clip.sampling, clips=10)
    for count in COUNTS:
        drawn = [training_frames(count, clip, draws) for draws in DRAWS]
        for frames in (*drawn, evaluation_frames(count, clip), evaluation_frames(count, several)):
            assert frames.min() >= 0, count
            assert frames.max() < count, count


def test_a_training_clip_has_a_frame_of_each_part():
    """tsm: average_duration * i + randint(average_duration)."""
    for count in COUNTS:
        part = count // 8
        for draws in DRAWS:
            frames = training_frames(count, UNIFORM, draws)
            if part:
                assert (frames // part == np.arange(8)).all() or count % 8, count
                assert (frames == np.arange(8) * part + np.floor(draws * part)).all()
            else:
                assert (np.diff(frames) >= 0).all()
                assert set(frames) == set(range(count))


def test_an_evaluation_takes_the_middle_of_each_part():
    """tsm: int(tick / 2 + tick * x)."""
    for count in COUNTS:
        tick = count / 8
        published = [int(tick / 2.0 + tick * x) for x in range(8)]
        assert evaluation_frames(count, UNIFORM).tolist() == [published]


def test_dense_clips_of_an_evaluation_are_the_published_ones():
    clip = ClipSettings(sampling="dense", clips=10)
    for count in COUNTS:
        positions = max(1, 1 + count - 64)
        starts = np.linspace(0, positions - 1, num=10, dtype=int)
        published = [[(x * 8 + start) % count for x in range(8)] for start in starts]
        assert evaluation_frames(count, clip).tolist() == published


def test_a_dense_training_clip_starts_where_it_fits():
    """tsm: randint(0, sample_pos - 1), of which the end is left out."""
    for count in COUNTS:
        starts = {int(training_frames(count, DENSE, np.full(8, share))[0]) for share in np.linspace(0, 1, 997)[:-1]}
        assert starts == set(range(max(1, count - 64)))


def test_frames_of_eight_are_all_of_them_backwards_too():
    """What makes the moving digits fair: an evaluation of 8 frames sees each once."""
    assert evaluation_frames(8, UNIFORM).tolist() == [list(range(8))]
