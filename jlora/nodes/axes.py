"""The axes of a kernel by their part in it."""

from __future__ import annotations

import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a kernel by their part in it, each a tuple of axis numbers.

    ``LoraSpec(axes=...)`` takes them for kernels whose axes neither `jlora.sites` nor Flax's conventions tell. A single
    number may stand for a tuple of one. Names follow `jax.nn.initializers.variance_scaling`.

    Args:
      in_axis: contracted with the activations (for an embedding table: looked up).
      out_axis: produced.
      batch_axis: stacked kernels, each with factors of its own: scanned layers, experts.

    Example:
      >>> import jlora
      >>> jlora.Axes(in_axis=0, out_axis=(1, 2))  # a query kernel (features, heads, head_dim)
      Axes(in_axis=(0,), out_axis=(1, 2), batch_axis=())
    """

    in_axis: tuple[int, ...]
    out_axis: tuple[int, ...]
    batch_axis: tuple[int, ...] = ()
    lookup: ClassVar[bool | None] = None  # its name tells
    conv: ClassVar[bool] = False  # its name, or its shape, tells

    def __post_init__(self) -> None:
        for name in ("in_axis", "out_axis", "batch_axis"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, int) else tuple(int(axis) for axis in value)
            object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True)
class AxesOfUse(Axes):
    """The axes of a matrix whose name tells another use of it than it has.

    Args:
      lookup: whether it is a table of which rows are looked up, or a linear layer's kernel.
    """

    lookup: bool = True  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class AxesOfConv(Axes):
    """The axes of a convolution's kernel whose name and shape are those of a linear layer of several in axes too."""

    conv: bool = True  # type: ignore[misc]


def of_conv(axes: Axes) -> Axes:
    """The same axes, those of a convolution."""
    return AxesOfConv(axes.in_axis, axes.out_axis, axes.batch_axis)


def of_use(axes: Axes, lookup: bool | None) -> Axes:
    """The same axes with what is known of the use; None: its name tells it."""
    groups = axes.in_axis, axes.out_axis, axes.batch_axis
    return Axes(*groups) if lookup is None else AxesOfUse(*groups, lookup)
