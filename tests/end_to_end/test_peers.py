"""docs/peers.md names nothing that is not there."""

import re

import pytest
import yaml

from tests.helpers.documentation import ROOT, is_test

NAMES = re.findall(r"`([^`]+)`", (ROOT / "docs" / "peers.md").read_text())
KEYS = {
    f"{path.parent.name}.{key}"
    for path in (ROOT / "conf").glob("*/*.yaml")
    for key in (yaml.safe_load(path.read_text()) or {})
}


@pytest.mark.parametrize(
    ("pattern", "exists", "least"),
    [
        (r"tests/\S+::\S+", is_test, 60),
        (r"(scripts/)?\S+\.(py|sh|sbatch)", lambda name: (ROOT / name).is_file(), 10),
        (r"(augment|checkpoint|data|model|optimizer|schedule|trainer)\.\w+", lambda name: name in KEYS, 15),
    ],
    ids=["tests", "scripts", "keys"],
)
def test_what_is_named_exists(pattern, exists, least):
    names = {name for name in NAMES if re.fullmatch(pattern, name)}
    assert [name for name in sorted(names) if not exists(name)] == []
    assert len(names) >= least
