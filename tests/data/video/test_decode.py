"""The frames that were asked for, of every kind of codec; of a damaged file a reason."""

import contextlib

import numpy as np
import pytest

from contextual_cnn.data.video import decode
from contextual_cnn.data.video.decode import UnusableVideo, read_frames
from tests.data.video.clips import CODECS, grey_frames, numbers, write_video


def fixed(*frames):
    return lambda count: np.array(frames)


@pytest.mark.parametrize("codec", CODECS)
def test_the_frames_asked_for_come_in_any_order_and_as_often_as_wanted(tmp_path, codec):
    video = write_video(tmp_path / f"a{CODECS[codec]}", grey_frames(21), codec).read_bytes()
    counted = []
    frames = read_frames(video, lambda count: counted.append(count) or np.array([[20, 0, 3], [3, 7, 12]]))
    assert counted == [21]
    assert frames.shape == (2, 3, 48, 64, 3)
    assert numbers(frames) == [[20, 0, 3], [3, 7, 12]]


def test_frames_are_counted_and_not_timed(tmp_path):
    """Of a video of variable rate too, each frame is one."""
    times = [0, 1, 2, 10, 11, 40, 41, 42]
    video = write_video(tmp_path / "a.mkv", grey_frames(8), times=times).read_bytes()
    assert numbers(read_frames(video, lambda count: np.arange(count))) == list(range(8))


@pytest.mark.parametrize("codec", CODECS)
def test_a_truncated_video_gives_its_frames_or_a_reason(tmp_path, codec):
    whole = write_video(tmp_path / f"a{CODECS[codec]}", grey_frames(21), codec).read_bytes()
    for share in (0.2, 0.5, 0.8, 0.99):
        with contextlib.suppress(UnusableVideo):
            assert (
                numbers(read_frames(whole[: int(share * len(whole))], lambda count: np.array([0, count - 1])))[0] == 0
            )


@pytest.mark.parametrize("noise", [b"", b"no video", bytes(10_000), b"RIFF\xff\xff\xff\xffAVI LIST" + bytes(999)])
def test_what_is_no_video_has_a_reason(noise):
    with pytest.raises(UnusableVideo):
        read_frames(noise, fixed(0))


@pytest.mark.parametrize("playlist", ["ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"])
def test_a_file_cannot_name_others_to_be_read(tmp_path, monkeypatch, playlist):
    """Files come from anywhere. FFmpeg by itself follows a relative name in a list of its concat format."""
    other = write_video(tmp_path / "other.mkv", grey_frames(8))
    monkeypatch.chdir(tmp_path)
    for name in (other.name, other, other.as_uri()):
        with pytest.raises(UnusableVideo):
            read_frames(playlist.format(name).encode(), fixed(0))


def test_frames_that_are_too_large_for_a_clip_are_refused_at_the_first(tmp_path, monkeypatch):
    video = write_video(tmp_path / "a.mkv", np.zeros((2, 120, 160, 3), np.uint8)).read_bytes()
    assert read_frames(video, fixed(0, 1)).shape == (2, 120, 160, 3)
    monkeypatch.setattr(decode, "_LARGEST_CLIP", 2 * 3 * 120 * 160 - 1)
    with pytest.raises(UnusableVideo, match="too much"):
        read_frames(video, fixed(0, 1))


def test_bits_that_flipped_end_nothing(tmp_path):
    whole = bytearray(write_video(tmp_path / "a.mp4", grey_frames(12), "libx264").read_bytes())
    draws = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in draws.integers(0, len(whole), 20):
            damaged[place] ^= 1 << int(draws.integers(8))
        try:
            frames = read_frames(bytes(damaged), lambda count: np.arange(min(count, 4)))
        except UnusableVideo:
            continue
        assert frames.dtype == np.uint8
