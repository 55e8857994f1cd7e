"""A run that is killed at any moment goes on from its last whole step, which is what was saved."""

import random
import time

import pytest

from tests.checkpoint.support import APIS
from tests.processes import Job


def numbers(printed, word):
    """Of whole lines: the kill may have cut the last one."""
    lines = printed.splitlines(keepends=True)
    return [int(line.split()[1]) for line in lines if line.startswith(word) and line.endswith("\n")]


@pytest.mark.slow
@pytest.mark.parametrize("api", APIS)
def test_a_run_that_is_killed_goes_on(api, tmp_path):
    rng, last = random.Random(0), -1
    for _ in range(3):
        with Job("tests.checkpoint.pod", "endless", tmp_path, api, devices=4) as job:
            job.wait_for(f"saved {last + 4}\n")
            time.sleep(rng.uniform(0, 0.3))
            job.kill()
            loaded, saved = (numbers(job.printed(), word) for word in ("loaded", "saved"))
        assert last - 1 <= loaded[0] <= last + 1  # the step that was being written is whole, or it is not there
        last = saved[-1]
