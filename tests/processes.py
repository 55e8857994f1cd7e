"""Several processes of one JAX program on this machine, as on the hosts of a pod.

The test starts them (`Job`, or `run` to wait for them too), the program calls `join` before it uses JAX.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESS, COUNT, INDEX = "JOB_ADDRESS", "JOB_COUNT", "JOB_INDEX"


def join():
    """Makes this process one of its job: `jax.process_count` and `jax.devices` are those of the whole job then."""
    import jax

    if (count := int(os.environ[COUNT])) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(os.environ[ADDRESS], num_processes=count, process_id=int(os.environ[INDEX]))


class Job:
    """The processes of ``python -m module arguments...``; none is left when its context ends."""

    def __init__(self, module, *arguments, count=1, devices=1):
        """Args: count: of processes; devices: CPU devices of each."""
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [Path(self.folder.name) / str(i) for i in range(count)]
        settings = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
            ADDRESS: f"127.0.0.1:{free_port()}",
            COUNT: str(count),
        }
        command = [sys.executable, "-m", module, *map(str, arguments)]
        start = lambda i, file: subprocess.Popen(
            command, cwd=ROOT, env=os.environ | settings | {INDEX: str(i)}, stdout=file, stderr=subprocess.STDOUT
        )
        self.processes = []
        for i, path in enumerate(self.outputs):
            with path.open("wb") as file:
                self.processes.append(start(i, file))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.folder.cleanup()

    def kill(self):
        """Kills all of them, as they are."""
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def printed(self, index=0):
        """What a process has printed so far."""
        return self.outputs[index].read_text(errors="replace")

    def wait_for(self, text, timeout=120):
        """Waits until the first process has printed a text."""
        end = time.monotonic() + timeout
        while text not in self.printed():
            assert self.processes[0].poll() is None and time.monotonic() < end, self._told(f"no {text!r} was printed")
            time.sleep(0.01)

    def wait(self, timeout=120):
        """Waits for all of them and returns what each has printed."""
        end = time.monotonic() + timeout
        try:
            codes = [process.wait(max(end - time.monotonic(), 0)) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self._told(f"not done after {timeout} s")) from None
        assert not any(codes), self._told(f"exit codes {codes}")
        return [self.printed(i) for i in range(len(self.processes))]

    def _told(self, fault):
        return "\n".join([fault, *(f"--- process {i}:\n{self.printed(i)}" for i in range(len(self.processes)))])


def run(module, *arguments, count=1, devices=1, timeout=120):
    """Runs a job to its end and returns what each process has printed."""
    with Job(module, *arguments, count=count, devices=devices) as job:
        return job.wait(timeout)


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
