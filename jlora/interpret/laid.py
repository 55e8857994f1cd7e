"""A factor as it is stored, and where its axes lie beside a weight's: laid out only where a rule needs it so.

Laying out costs equations (transposes, reshapes), which cost most of the time that tracing a training step takes. A
product needs none: it names its axes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax import lax

from jlora.interpret.products import transposed

Labels = tuple[Hashable, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Laid:
    """Stands for an array with the axes of a weight and one more behind them.

    Args:
      array: with axes of its own.
      order: for each axis that it stands for, which of the array's it is; None: of size 1.
    """

    array: Any
    order: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(1 if axis is None else self.array.shape[axis] for axis in self.order)

    @property
    def ndim(self) -> int:
        return len(self.order)

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def transposed(self, order: Sequence[int]) -> Laid:
        return Laid(self.array, tuple(self.order[axis] for axis in order))

    def dense(self) -> jax.Array:
        x = transposed(self.array, [axis for axis in self.order if axis is not None])
        return lax.expand_dims(x, [i for i, axis in enumerate(self.order) if axis is None])


def sliceable(x: Any) -> Any:
    """The same so that a slice of its array along the first axis is one of what it stands for, or it has no such axis.

    `step` tells what the slice stands for.
    """
    return x if isinstance(x, Laid) and x.order[0] in (0, None) else laid_out(x)


def step(x: Any) -> Any:
    """What a slice of `sliceable` along its first axis stands for; of one that has no such axis the same at each."""
    if not isinstance(x, Laid):
        return x
    first, *others = x.order
    return Laid(x.array, tuple(axis if axis is None or first is None else axis - 1 for axis in others))


def laid_out(x: Any) -> Any:
    """The array that something stands for."""
    return x.dense() if isinstance(x, Laid) else x


def stored(x: Any) -> Any:
    """The array that is there."""
    return x.array if isinstance(x, Laid) else x


def order_of(x: Any) -> tuple[int | None, ...] | None:
    """Where the axes of the array that is there are; None: as they are laid out."""
    return x.order if isinstance(x, Laid) else None


def labels_of(labels: Labels, order: tuple[int | None, ...] | None) -> Labels:
    """The labels of a stored array's axes, where those that it stands for have these."""
    if order is None:
        return labels
    place = {axis: label for axis, label in zip(order, labels, strict=True) if axis is not None}
    return tuple(place[axis] for axis in range(len(place)))
