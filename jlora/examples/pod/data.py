"""The batches of a job: the same ones in the same order, whatever the number of processes and wherever it starts."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jlora.examples.pod.mesh import ROWS

PLACE = jax.P(None, ROWS, None)


def shuffled(rows: np.ndarray, seed: int) -> grain.MapDataset:
    """Returns an endless row of rows: all of them in a new order, again and again; each is found by its place."""
    return grain.MapDataset.source(list(rows)).shuffle(seed=seed).repeat()


def batches(
    stream: Any, mesh: Mesh, batch: int, length: int, accumulate: int, first: int, last: int
) -> Iterator[jax.Array]:
    """Yields the batches of the steps from `first` to before `last`, each (accumulate, batch / accumulate, length).

    A step's batch is the stream's next `batch` rows; each process reads those that its devices need, in the background.
    So the stream's state is the number of the step.
    """
    shape, sharding = (accumulate, batch // accumulate, length), NamedSharding(mesh, PLACE)
    columns = own_columns(sharding, shape)
    steps = grain.MapDataset.range(first, last).map(lambda step: local_rows(stream, int(step), shape, columns))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    for local in steps.to_iter_dataset(options):
        yield from_local(local, columns, shape, sharding)


def local_rows(stream: Any, step: int, shape: Sequence[int], columns: np.ndarray) -> np.ndarray:
    """Returns some columns of a step's batch (parts, rows, length): what one process reads."""
    parts, rows, _ = shape
    starts = (step * parts + np.arange(parts)) * rows
    return np.array([[stream[int(start + column)] for column in columns] for start in starts])


def own_columns(sharding: NamedSharding, shape: Sequence[int]) -> np.ndarray:
    """Returns which of a batch's rows lie on devices of this process; two may have the same, split by `tensor`."""
    everything = np.arange(shape[1])
    indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
    return np.unique(np.concatenate([everything[index[1]] for index in indices if index is not None]))


def from_local(local: np.ndarray, columns: np.ndarray, shape: Sequence[int], sharding: NamedSharding) -> jax.Array:
    """Returns the batch of all processes from the columns that this one has read."""
    everything = np.arange(shape[1])
    part = lambda index: local[:, np.searchsorted(columns, everything[index[1]])]
    return jax.make_array_from_callback(tuple(shape), sharding, part)


def in_order(rows: np.ndarray, mesh: Mesh, batch: int) -> Iterator[jax.Array]:
    """Yields all rows once, in batches (1, batch, length); rows of -1 fill up the last."""
    shape, sharding = (1, batch, rows.shape[1]), NamedSharding(mesh, PLACE)
    columns = own_columns(sharding, shape)
    filled = np.pad(rows, ((0, -len(rows) % batch), (0, 0)), constant_values=-1)
    for step in range(len(filled) // batch):
        yield from_local(local_rows(filled, step, shape, columns), columns, shape, sharding)
