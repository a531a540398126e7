"""The losses of golden.json come again: to the last bit on the machine that recorded them, closely on any other.

Closely, until a rounding puts another class on a shortlist, which moves what follows by a per cent. On one processor
that is at step 18 of the run that selects by "reduce"; before, it is within 1e-5.
"""

import json

import pytest

from tests import golden

pytestmark = pytest.mark.run

EXACT = 15  # steps
RECORDED = json.loads(golden.FILE.read_text())


@pytest.mark.parametrize("name", golden.RUNS)
def test_the_losses_have_not_moved(name, image_root, tmp_path):
    expected = RECORDED["losses"][name]
    found = golden.losses(name, image_root, tmp_path / "run")
    assert len(found) == 20
    if golden.machine() == RECORDED["machine"]:
        assert found == expected
    else:  # another processor adds up in another order
        assert found[:EXACT] == pytest.approx(expected[:EXACT], rel=1e-4)
        assert found[EXACT:] == pytest.approx(expected[EXACT:], rel=2e-2)
