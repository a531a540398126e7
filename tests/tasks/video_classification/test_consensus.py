"""Frames to clips to videos: means of logits over frames, of probabilities over views; every shortlist kept."""

import torch
from torch.testing import assert_close

from contextual_cnn.contracts import StagedScores
from contextual_cnn.tasks.image_classification.hits import stage_hits
from contextual_cnn.tasks.video_classification.consensus import consensus, of_videos

B, V, T, N = 3, 2, 4, 5


def of_frames(images, told=None, staged=True):
    """A model that knows a frame by its first pixel."""
    logits = images[:, 0, 0, 0, None] * torch.arange(N)
    shortlists = logits.topk(2).indices
    return StagedScores((logits, 2 * logits), (shortlists,), (3, 4))


def test_a_clips_logits_are_the_mean_of_its_frames():
    images = torch.randn(B, 1, T, 3, 8, 8)
    scores = of_videos(of_frames)(images)
    mean = images[:, 0, :, 0, 0, 0].mean(1, keepdim=True) * torch.arange(N)
    assert_close(scores.logits[0], mean)
    assert_close(scores.logits[1], 2 * mean)
    assert scores.stages == (3, 4)
    assert scores.shortlists[0].shape == (B, T, 2)


def test_views_count_by_their_probabilities():
    scores = of_videos(of_frames)(images := torch.randn(B, V, T, 3, 8, 8))
    views = images[..., 0, 0, 0].mean(2).unsqueeze(-1) * torch.arange(N)
    assert_close(scores.logits[0].softmax(1), views.softmax(-1).mean(1))


def test_a_plain_models_scores_are_averaged_as_well():
    logits = torch.randn(B * T, N)
    scores = of_videos(lambda images: logits)(torch.zeros(B, 1, T, 3, 8, 8))
    assert_close(scores.logits[0], logits.unflatten(0, (B, T)).mean(1))
    assert scores.shortlists == ()


def test_a_class_that_the_whole_clip_has_dropped_stays_dropped():
    logits = torch.zeros(B * T, N)
    logits[:T, 1] = -torch.inf
    scores = consensus(StagedScores((logits,), (), (4,)), 1, T)
    assert scores.logits[0][0, 1] == -torch.inf
    assert scores.logits[0].isfinite().sum() == B * N - 1


def test_every_frame_is_told_its_videos_class():
    given = []

    def call(images, told, staged):
        given.append((told.tolist(), staged))
        return torch.zeros(len(images), N)

    of_videos(call)(torch.zeros(2, 1, 3, 3, 8, 8), told=torch.tensor([4, -1]), staged=True)
    assert given == [([4, 4, 4, -1, -1, -1], True)]


def test_recall_of_a_video_is_the_share_of_its_frames():
    shortlists = torch.tensor([[[0, 1], [2, 3]], [[4, 1], [4, 0]]])
    scores = StagedScores((torch.zeros(2, N), torch.zeros(2, N)), (shortlists,), (3, 4))
    assert stage_hits(scores, torch.tensor([2, 4]))["recall_stage3"] == 1.5
