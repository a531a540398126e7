"""The losses of golden.json come again: to the last bit on the machines that recorded them, closely on any other."""

import json

import pytest

from tests import golden

pytestmark = pytest.mark.run

RECORDED = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("name", golden.RUNS)
def test_the_losses_have_not_moved(name, image_root, tmp_path):
    own = RECORDED["others"].get(golden.machine())
    expected = (own or RECORDED["losses"])[name]
    found = golden.losses(name, image_root, tmp_path / "run")
    assert len(found) == 20
    if own or golden.machine() == RECORDED["machine"]:
        assert found == expected
    else:  # another processor adds up in another order
        assert found == pytest.approx(expected, rel=1e-3)
