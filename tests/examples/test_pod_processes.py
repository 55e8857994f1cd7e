"""The pod job in several processes of this machine: they train as one does, and a death of theirs costs no step."""

import json
import signal

import numpy as np
import pytest

from tests.processes import free_port, launched

DEVICES = 4
FLAGS = "--tiny --mesh fsdp=2,tensor=2 --steps 12 --length 16 --batch 4 --lr 1e-2 --save-every 3"
pytestmark = pytest.mark.slow


# A job that gets a signal right after a step.
SIGNALLED = """
import os, sys
from jlora.examples.pod import __main__ as job, metrics
add = metrics.Recorder.add

def adding(self, done, told):
    told = add(self, done, told)
    if done == int(sys.argv[1]):
        os.kill(os.getpid(), int(sys.argv[2]))
    return told

metrics.Recorder.add = adding
sys.exit(job.main(sys.argv[3:]))
"""


def commands(out, processes, step=0, number=0):
    """The same devices in all, whatever the number of processes; the last of them gets a signal after a step."""
    flags = [*FLAGS.split(), "--dtype", "float32", "--base-dtype", "float32", "--out", str(out)]
    flags += ["--virtual-devices", str(DEVICES // processes)]
    joined = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)]
    ranks = [[*joined, "--process", str(i)] if processes > 1 else [] for i in range(processes)]
    starts = [["-m", "jlora.examples.pod"]] * processes
    if number:
        starts[-1] = ["-c", SIGNALLED, str(step), str(int(number))]
    return [[*start, *flags, *rank] for start, rank in zip(starts, ranks, strict=True)]


def run(out, processes):
    with launched(commands(out, processes), out) as job:
        ended = job.wait()
    assert [process.code for process in ended] == [0] * processes, job.output()


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
    with launched(commands(tmp_path, 2, 4, signal.SIGTERM), tmp_path) as job:
        ended = job.wait()
    assert [process.code for process in ended] == [128 + signal.SIGTERM] * 2, job.output()
    assert "SIGTERM: step 5 of 12 is saved" in ended[0].output
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    run(tmp_path, 1)
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)


def test_processes_that_are_killed_cost_no_step(alone, tmp_path):
    """All of them, then one of two; those that go on start from the last checkpoint, and do the steps since again."""
    with launched(commands(tmp_path, 1, 5, signal.SIGKILL), tmp_path) as job:
        assert job.wait()[0].code == -signal.SIGKILL
    with launched(commands(tmp_path, 2, 8, signal.SIGKILL), tmp_path) as job:
        assert job.wait_for(1) == -signal.SIGKILL, job.output()
    assert len(lines(tmp_path)) >= 7
    run(tmp_path, 2)
    np.testing.assert_allclose(losses(tmp_path), alone, rtol=1e-5)
