"""scripts/dev/scale.py on small listings."""

import json

import pytest

from tests.conftest import run_command


@pytest.mark.run
def test_a_node_holds_a_listing_once(tmp_path):
    output = tmp_path / "scale.json"
    command = ["scripts/dev/scale.py", "--images", "50000", "--only", "listing", "report by class"]
    done = run_command(*command, "--folder", str(tmp_path), "--output", str(output))
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    results = json.loads(output.read_text())
    assert {key: found for line in printed for key, found in line.items()} == results["measured"]
    assert results["images"] == results["measured"]["listing, a list file"]["images"] == 50_000
    node = results["measured"]["listing, 8 processes of a node, a list file"]
    assert 1.5 < node["shared_mib"] < 4  # 43 bytes an image, once, and not eight times
    assert "report by class, 21841 classes" in results["measured"]
