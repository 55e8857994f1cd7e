"""The axes of a kernel by their part in it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a kernel by their part in it, each a tuple of axis numbers.

    Names follow `jax.nn.initializers.variance_scaling`.

    Args:
      in_axis: contracted with the activations (for an embedding table: looked up).
      out_axis: produced.
      batch_axis: stacked kernels, each with factors of its own: scanned layers, experts.

    Example:
      >>> Axes((0,), (1, 2))  # a query kernel (features, heads, head_dim)
      Axes(in_axis=(0,), out_axis=(1, 2), batch_axis=())
    """

    in_axis: tuple[int, ...]
    out_axis: tuple[int, ...]
    batch_axis: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            value = (value,) if isinstance(value, int) else tuple(int(axis) for axis in value)
            object.__setattr__(self, field.name, value)
