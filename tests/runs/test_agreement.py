"""What the processes compare: all that results hang on, and nothing that may differ from node to node."""

import os

import numpy as np
import pytest
import torch
from torch import nn

from contextual_cnn.data.sources.source import ImageFiles
from contextual_cnn.errors import UserError
from contextual_cnn.models.contextual_conv import ContextualConv2d, operators
from contextual_cnn.runs import agreement
from contextual_cnn.runs.agreement import check_agreement, digest_code, digest_config
from contextual_cnn.settings.keys import marked
from contextual_cnn.tasks.image_classification.classification import _digest_listing as digest_listing
from contextual_cnn.tasks.image_classification.settings import ImageClassificationSettings

CONFIG = {"seed": 0, "data": {"root": "/a", "threads": 2, "image_size": 32}}


def folder(*paths, root="/a", targets=(0, 1)):
    return ImageFiles(root, ("x", "y"), paths, np.array(targets))


def test_the_place_of_the_data_may_differ_and_nothing_else():
    by_node = tuple(marked(ImageClassificationSettings, "by_node"))
    mine = digest_config(CONFIG, by_node)
    assert mine == digest_config({**CONFIG, "data": {"root": "/b", "threads": 4, "image_size": 32}}, by_node)
    assert mine != digest_config({**CONFIG, "seed": 1}, by_node)
    assert mine != digest_config({**CONFIG, "data": {**CONFIG["data"], "image_size": 64}}, by_node)
    listing = digest_listing(folder("a", "b"))
    assert listing == digest_listing(folder("a", "b", root="/b"))
    not_utf_8 = folder("a", os.fsdecode(b"b\xe9"))
    assert digest_listing(not_utf_8) != digest_listing(folder("a", "bé"))
    others = [not_utf_8, folder("b", "a"), folder("a", "c"), folder("a\0b", ""), folder("a", "b", targets=(1, 0))]
    assert listing not in map(digest_listing, others)
    assert digest_code() == digest_code()


def test_who_computes_the_convolutions_of_a_model_that_has_any(monkeypatch):
    contextual = nn.Sequential(ContextualConv2d(nn.Conv2d(4, 4, 3, padding=1, groups=4), context_dim=2))
    monkeypatch.setenv("CONTEXTUAL_CNN_OPS", "torch")
    assert operators(contextual, torch.device("cpu")) == "torch"
    monkeypatch.setenv("CONTEXTUAL_CNN_OPS", "fastest")
    with pytest.raises(UserError, match="CONTEXTUAL_CNN_OPS=fastest"):
        operators(contextual, torch.device("cpu"))
    assert operators(nn.Conv2d(4, 4, 3), torch.device("cpu")) == ""


def test_ranks_that_differ_are_named(monkeypatch):
    facts = {"configuration": "a", "code": "b", "train images": "c", "val images": "d"}
    check_agreement(facts)

    def gather(numbers):
        other = [numbers[0], numbers[1] + 1, *numbers[2:]]
        return [numbers, numbers, other, other]

    monkeypatch.setattr(agreement, "gather_numbers", gather)
    with pytest.raises(UserError, match=r"\bcode\b.*rank 2\b.*\b1\b.*\b4\b.*rank 0"):
        check_agreement(facts)
