"""The pod job in several processes of this machine: they train as one does, and a death of theirs costs no step."""

import json
import signal

import numpy as np
import pytest

from tests.processes import Job

DEVICES, TIMEOUT = 4, 300
FLAGS = "--tiny --mesh fsdp=2,tensor=2 --steps 12 --length 16 --batch 4 --lr 1e-2 --save-every 3".split()
FLAGS += "--dtype float32 --base-dtype float32".split()
pytestmark = pytest.mark.slow


def started(out, count, step=0, number=0):
    """The job in some processes, with as many devices in all; the last process gets a signal after a step."""
    devices, out = DEVICES // count, str(out)
    return Job("tests.examples.pod_process", step, int(number), *FLAGS, "--out", out, count=count, devices=devices)


def run(out, count):
    with started(out, count) as job:
        job.wait(TIMEOUT)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    assert [line["step"] for line in lines(out)] == list(range(1, 13))
    return [line["loss"] for line in lines(out)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process."""
    out = tmp_path_factory.mktemp("alone")
    run(out, 1)
    return losses(out)


def test_four_processes_train_as_one(alone, tmp_path):
    run(tmp_path, 4)
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_sigterm_to_one_process_stops_all_after_one_step_and_one_process_goes_on(alone, tmp_path):
    with started(tmp_path, 2, 4, signal.SIGTERM) as job:
        codes = [process.wait(TIMEOUT) for process in job.processes]
        assert codes == [128 + signal.SIGTERM] * 2, job.printed()
        assert "SIGTERM: step 5 of 12 is saved" in job.printed()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    run(tmp_path, 1)
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)


def test_processes_that_are_killed_cost_no_step(alone, tmp_path):
    """All of them, then one of two; those that go on start from the last checkpoint, and do the steps since again."""
    with started(tmp_path, 1, 5, signal.SIGKILL) as job:
        assert job.processes[0].wait(TIMEOUT) == -signal.SIGKILL, job.printed()
    with started(tmp_path, 2, 8, signal.SIGKILL) as job:
        assert job.processes[1].wait(TIMEOUT) == -signal.SIGKILL, job.printed(1)
    assert len(lines(tmp_path)) >= 7
    run(tmp_path, 2)
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)
