"""Runs a program in several processes of one JAX job on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code and all that it printed."""

    code: int
    output: str


class Processes:
    """Processes that run; what they print goes to a file each."""

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"process_{i}.log" for i in range(len(commands))]
        self.running = [_start(command, log) for command, log in zip(commands, self.logs, strict=True)]

    def wait_for(self, process: int, timeout: float = 240) -> int:
        """Returns the exit code of one of them, once it has ended."""
        return self.running[process].wait(timeout)

    def wait(self, timeout: float = 240) -> list[Ended]:
        """Returns how each ended; kills what still runs after the timeout."""
        end = time.monotonic() + timeout
        try:
            codes = [process.wait(max(0, end - time.monotonic())) for process in self.running]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None
        return [Ended(code, log.read_text(errors="replace")) for code, log in zip(codes, self.logs, strict=True)]

    def output(self) -> str:
        """Returns the end of what each printed."""
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)

    def kill(self) -> None:
        """Kills those that still run."""
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


@contextmanager
def launched(commands: Sequence[Sequence[str]], folder: Path) -> Iterator[Processes]:
    """Yields one process for each command of Python's arguments; in the end none is left."""
    processes = Processes(commands, folder)
    try:
        yield processes
    finally:
        processes.kill()


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _start(command: Sequence[str], log: Path) -> subprocess.Popen:
    drop = ("XLA_FLAGS", "JAX_", "SLURM_", "OMPI_")
    env = {name: x for name, x in os.environ.items() if not name.startswith(drop)}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        return subprocess.Popen([sys.executable, *command], env=env, cwd=log.parent, stdout=out, stderr=out)
