"""A training loop over a classifier with adapters: batches, the compiled step, the record, a soft Ctrl-C."""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from tqdm import tqdm

import jlora

BATCH = 32
Data = dict[str, np.ndarray]  # of a classifier: ids and mask (n, length), labels (n,)


@dataclass
class History:
    """Loss and accuracy of every training batch, and the held-out accuracies as (step, accuracy).

    Accuracies are fractions. `subset` holds those measured in training on part of the held-out sentences.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    subset: list[tuple[int, float]] = field(default_factory=list)


def train(
    model: nn.Module, params: Any, data: Data, args: argparse.Namespace, stop: threading.Event, measure: Callable
) -> tuple[Any, History]:
    """Returns the trained parameters and the record of training; the arrays in `params` are donated.

    Args:
      model: the classifier.
      params: its wrapped parameters.
      data: the training set.
      args: the settings: steps, lr, seed.
      stop: ends training after the step in which it is set.
      measure: parameters to held-out accuracy, called about five times on the way.
    """
    adamw = optax.adamw(learning_rate(args.lr, args.steps))
    tx = jlora.optimizer(optax.chain(optax.clip_by_global_norm(1.0), adamw), params)
    step, state, history = train_step(model, tx), tx.init(params), History()
    bar = tqdm(batches(data, args.steps, args.seed), "training", args.steps, unit="step")
    for number, batch in enumerate(bar, 1):
        params, state, loss, correct = step(params, state, batch)
        history.loss.append(float(loss))
        history.accuracy.append(float(correct))
        bar.set_postfix(loss=f"{running_mean(history.loss)[-1]:.3f}", acc=f"{running_mean(history.accuracy)[-1]:.1%}")
        if stop.is_set():
            break
        if number % -(-args.steps // 6) == 0 and number < args.steps:
            history.subset.append((number, measure(params)))
    return params, history


def train_step(model: nn.Module, tx: optax.GradientTransformation) -> Callable:
    """Returns the compiled step: (params, state, batch) to (params, state, loss, accuracy)."""

    def loss_and_accuracy(params: Any, batch: Data) -> tuple[jax.Array, jax.Array]:
        logits = jlora.apply(model.apply)({"params": params}, batch["ids"], batch["mask"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()
        return loss, (logits.argmax(-1) == batch["labels"]).mean()

    def step(params: Any, state: Any, batch: Data) -> tuple:
        (loss, correct), grads = jlora.value_and_grad(loss_and_accuracy, has_aux=True)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, correct

    return jax.jit(step, donate_argnums=(0, 1))


def learning_rate(peak: float, steps: int) -> optax.Schedule:
    """Returns a warm-up over the first twentieth of the steps, then a cosine to zero."""
    warmup = max(1, steps // 20)
    return optax.warmup_cosine_decay_schedule(peak / 10, peak, warmup, max(steps, warmup + 1))


def batches(data: Data, steps: int, seed: int, size: int = BATCH) -> Iterator[Data]:
    """Yields `steps` batches of `size` rows, in a new order each epoch, whose last rows, if too few, are left out."""
    rng, rows = np.random.default_rng(seed), np.empty(0, int)
    for _ in range(steps):
        if len(rows) < size:
            rows = rng.permutation(len(next(iter(data.values()))))
        batch, rows = rows[:size], rows[size:]
        yield {name: values[batch] for name, values in data.items()}


def in_batches(fn: Callable, params: Any, data: Data, label: str | None = None) -> np.ndarray:
    """Returns `fn` of all rows; the last batch is filled up with rows from the start, so that `fn` compiles once."""
    n = len(data["ids"])
    rows = np.arange(-(-n // BATCH) * BATCH).reshape(-1, BATCH) % n
    bar = tqdm(rows, label, unit="batch", disable=label is None)
    # np.asarray waits for each batch, so that the bar tells the truth.
    return np.concatenate([np.asarray(fn({"params": params}, data["ids"][row], data["mask"][row])) for row in bar])[:n]


def accuracy(fn: Callable, params: Any, data: Data, label: str | None = None) -> float:
    """Returns the fraction of rows where the largest logit is the label's."""
    return float((in_batches(fn, params, data, label).argmax(-1) == data["labels"]).mean())


def exit_code(job: Callable[[], int | None], *expected: type[Exception]) -> int:
    """Returns a job's exit code: its own, 1 after an expected error, which is printed, 130 after a Ctrl-C."""
    try:
        return job() or 0
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@contextmanager
def interrupt_flag() -> Iterator[threading.Event]:
    """Yields an event that the first Ctrl-C sets; the second interrupts as usual.

    An exception out of a running step would lose the arrays donated to it; between two steps nothing is lost.
    """
    stop = threading.Event()

    def on_interrupt(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def running_mean(values: list[float], window: int = 15) -> np.ndarray:
    """Returns the mean of each value and those up to `window - 1` before it."""
    total = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / np.maximum(ends - starts, 1)


def count(low: int, high: int = 2**31) -> Callable[[str], int]:
    """Returns a reader of whole numbers from `low` to `high` for argparse."""

    def read(text: str) -> int:
        if not low <= int(text) <= high:
            raise ValueError
        return int(text)

    read.__name__ = f"whole number from {low}" + (f" to {high}" if high < 2**31 else "")
    return read
