"""The table of predictions: whole, in the listing's order, whoever computed which part in which batches."""

import csv

import numpy as np
import pytest
import torch

from contextual_cnn.data.sampler import evaluation_batches
from contextual_cnn.data.sources.source import ImageFiles
from contextual_cnn.distributed import World
from contextual_cnn.errors import UserError
from contextual_cnn.runs.own_files import check_writable
from contextual_cnn.tasks.image_classification.predictions import Predictions, PredictionTable, write_predictions

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 20])
def test_the_ranks_tables_add_up_to_the_one_of_a_single_pass(ranks):
    logits = torch.randn(17, 12)
    parts = []
    for rank in range(ranks):
        table = PredictionTable(17, 12, World(rank, ranks, rank, CPU))
        for indices in evaluation_batches(17, 4, rank, ranks):
            table.add(torch.zeros(len(indices)), logits[indices])
        parts.append(table.gather())
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    for i in range(17):
        best = sorted(range(12), key=lambda c: -logits[i, c].item())[:5]
        assert sum(part.classes[i] for part in parts).tolist() == best
        found = sum(part.probabilities[i] for part in parts)
        assert found.tolist() == pytest.approx(probabilities[i, best].tolist(), rel=1e-5)


def test_dropped_classes_have_no_probability_and_a_nan_is_not_hidden():
    table = PredictionTable(3, 2, World(0, 1, 0, CPU))
    inf, nan = torch.inf, torch.nan
    table.add(torch.zeros(3), torch.tensor([[-inf, 1.0, 1.0], [-inf, -inf, -inf], [nan, 1.0, 2.0]]))
    probabilities = table.gather().probabilities
    assert probabilities[0].tolist() == [0.5, 0.5]
    assert probabilities[1].tolist() == [0.0, 0.0]
    assert probabilities[2].isnan().all()


def test_an_image_that_cannot_be_used_has_no_prediction(tmp_path):
    table = PredictionTable(2, 2, World(0, 1, 0, CPU))
    table.add(torch.tensor([-1, 0]), torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
    predictions = table.gather()
    assert predictions.classes.tolist() == [[-1, -1], [0, 1]]
    assert predictions.probabilities[0].tolist() == [0.0, 0.0]
    write_predictions(
        tmp_path / "p.csv", predictions, ImageFiles(tmp_path, ("a", "b"), ("x.jpg", "y.jpg"), np.array([0, 0]))
    )
    assert (tmp_path / "p.csv").read_text().splitlines()[1] == "x.jpg,a,,0.000000,,0.000000"


def test_the_csv_survives_awkward_names(tmp_path):
    paths = ('val/a/with, comma "and" quotes.jpg', "val/b/\udcff.jpg")
    source = ImageFiles(tmp_path, ("a", "=b"), paths, np.array([0, 1]))
    predictions = Predictions(torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]]))
    file = tmp_path / "predictions.csv"
    write_predictions(file, predictions, source)
    with file.open(newline="", encoding="utf-8") as lines:
        assert list(csv.reader(lines)) == [
            ["name", "target", "class1", "probability1", "class2", "probability2"],
            [paths[0], "a", "a", "0.750000", "'=b", "0.250000"],
            [r"val/b/\xff.jpg", "'=b", "a", "0.500000", "'=b", "0.500000"],
        ]


def test_where_it_cannot_be_written_is_said_before_and_after(tmp_path):
    check_writable(tmp_path / "new.csv", "predictions")
    with pytest.raises(UserError, match="it is a folder"):
        check_writable(tmp_path, "predictions")
    nowhere = tmp_path / "nowhere" / "new.csv"
    with pytest.raises(UserError, match="there is no folder"):
        check_writable(nowhere, "predictions")
    empty = Predictions(torch.zeros(0, 5, dtype=torch.long), torch.zeros(0, 5))
    with pytest.raises(UserError, match="cannot be written"):
        write_predictions(nowhere, empty, ImageFiles(tmp_path, ("a",), (), np.zeros(0, dtype=np.int64)))
