"""The processes of a job: how they find each other, and how a signal to one of them stops all."""

import argparse
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax


class PodError(RuntimeError):
    """The job cannot run as it was asked to; the message says why, and how to mend it."""


@dataclass
class Stop:
    """The signal that asks this process to stop; 0: none has come."""

    signal: int = 0


def start(args: argparse.Namespace) -> None:
    """Sets up this process's devices and joins the other processes, before JAX touches a device.

    Without settings JAX itself is asked: it looks for a Cloud TPU pod, GKE, Slurm, Open MPI and Kubernetes.

    Raises:
      PodError: if there is a cluster, or should be one, and it can't be joined.
    """
    if args.virtual_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.virtual_devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.coordinator:
        # One machine may hold several processes here, each with all devices it sees: nothing is to be detected.
        given = {"num_processes": args.processes, "process_id": args.process}
        _join(coordinator_address=args.coordinator, cluster_detection_method="deactivate", **given)
    elif args.distributed == "on":
        _join()
    elif args.distributed == "auto" and not args.virtual_devices:
        _join_if_found()


def _join(**given: Any) -> None:
    try:
        jax.distributed.initialize(**given)
    except Exception as error:
        raise PodError(
            f"the other processes were not found: {error} --distributed on needs an environment that JAX knows (Cloud "
            "TPU, GKE, Slurm, Open MPI, Kubernetes with jax[k8s]); elsewhere give each process --coordinator "
            "HOST:PORT --processes N --process I; --distributed off runs this process by itself"
        ) from error


def _join_if_found() -> None:
    try:
        _join()
    except PodError as error:
        # JAX's answer where it finds no cluster, and none is named.
        if not isinstance(error.__cause__, ValueError) or "JAX_COORDINATOR_ADDRESS" in os.environ:
            raise


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Yields a note of the first Ctrl-C or SIGTERM; the second ends the process, be it compiling.

    An exception out of a running step would lose the arrays donated to it; between two steps nothing is lost.
    """
    stop = Stop()
    # JAX takes SIGTERM for itself when processes join, so this comes after.
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        stop.signal = number
        signal.signal(number, signal.SIG_DFL)
        os.write(2, f"\n{signal.Signals(number).name}: stopping after the step under way\n".encode())

    for number in previous:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
