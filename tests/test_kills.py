"""Writers that are killed at any of their calls: the last whole state loads, and the next call leaves nothing over."""

import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.parametrize(
    "kind",
    [
        "save",
        "first-save",
        "model",
        "same-model",
        "delete",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("merge", "merge-over")),
    ],
)
def test_a_killed_writer_leaves_the_last_whole_state(kind):
    done = subprocess.run([sys.executable, "-m", "tests.kills", kind], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kind}: killed" in done.stdout
