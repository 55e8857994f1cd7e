"""Training from the last checkpoint to the end, or to a signal."""

import argparse
import signal
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

import jlora
from jlora.examples.pod import data
from jlora.examples.pod.mesh import AXES
from jlora.examples.pod.metrics import Recorder, flops_per_token
from jlora.examples.pod.processes import PodError, Stop
from jlora.examples.pod.step import abstract_state, first_state, optimizer, train_step
from jlora.examples.smollm2 import SmolLM2
from jlora.examples.training import learning_rate

# What a job must have in common with the one that it goes on with. The rest may change: mesh, processes, `accumulate`.
SETTINGS = ("tiny", "steps", "batch", "length", "lr", "rank", "seed", "dtype", "base_dtype")


@dataclass
class Trained:
    """Where training ended.

    Args:
      params: the wrapped parameters.
      step: the steps that are done.
      signal: the signal that ended it; 0: none.
    """

    params: Any
    step: int
    signal: int


def train(model: SmolLM2, params: Any, rows: np.ndarray, args: argparse.Namespace, mesh: Mesh, stop: Stop) -> Trained:
    """Trains adapters, from the last checkpoint in `args.checkpoints` if there is one.

    Args:
      model: the model.
      params: its parameters, placed and wrapped; they are donated.
      rows: the training set, windows of tokens.
      args: the job's settings.
      mesh: where all lies.
      stop: the signal to this process.
    """
    schedule = learning_rate(args.lr, args.steps)
    tx = optimizer(params, schedule)
    with jlora.checkpoint.Checkpoints(args.checkpoints, keep_last=2) as checkpoints:
        first, params, state = resumed(checkpoints, params, tx, args)
        if first and jax.process_index() == 0:
            print(f"going on from step {first} of {args.steps}, {checkpoints.directory / str(first)}", flush=True)
        step, flops = train_step(model, tx, schedule, params, state), flops_per_token(model, params, args.length)
        stream, sizes = data.shuffled(rows, args.seed), (args.batch, args.length, args.accumulate)
        batches = data.batches(stream, mesh, *sizes, first, args.steps)
        file, tokens = args.out / "metrics.jsonl", args.batch * args.length
        with closing(Recorder(file, first, args.steps, tokens, flops)) as recorder:
            for done, ids in enumerate(batches, first + 1):
                batch = {"ids": ids, "step": np.int32(done - 1), "stop": flags(stop, mesh)}
                params, state, told = step(params, state, batch)
                told = recorder.add(done, told)
                caught = told["stop"] or alone(stop)
                if done % args.save_every == 0 or done == args.steps or caught:
                    save(checkpoints, done, params, state, told["loss"], args)
                    recorder.restart()
                if caught and done < args.steps:
                    return Trained(params, done, caught)
    return Trained(params, args.steps, 0)


def resumed(checkpoints: Any, params: Any, tx: optax.GradientTransformation, args: argparse.Namespace) -> Any:
    """Returns the steps that are done, parameters and optimizer's state: the last checkpoint's, or the first ones.

    Raises:
      PodError: if the checkpoint is that of a job with other settings.
    """
    if checkpoints.latest is None:
        return 0, params, first_state(tx, params)
    base = jlora.unwrap(params)
    settings = checkpoints.extra()["settings"]
    if differing := [name for name in SETTINGS if settings[name] != getattr(args, name)]:
        told = ", ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in differing)
        raise PodError(
            f"{args.checkpoints} holds a job with {told}: give these settings, or another --out and --checkpoints"
        )
    return checkpoints.load(base, state=abstract_state(tx, params))[:3]


def save(checkpoints: Any, step: int, params: Any, state: Any, loss: float, args: argparse.Namespace) -> None:
    """Starts to write a checkpoint; training goes on meanwhile."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    checkpoints.save(step, params, state=state, extra={"settings": settings}, metrics={"loss": loss})


def flags(stop: Stop, mesh: Mesh) -> jax.Array:
    """Returns the signals of all processes: on each device that of its process."""
    sharding = NamedSharding(mesh, jax.P(AXES))
    return jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.array([stop.signal], np.int32))


def alone(stop: Stop) -> int:
    """Returns the signal of a process without others, which need not wait for the next step to agree on it."""
    return stop.signal if jax.process_count() == 1 else 0


def name_of(number: int) -> str:
    """Returns a signal's name."""
    return signal.Signals(number).name
