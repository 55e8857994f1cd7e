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
      lookup: whether it is a table of which rows are looked up, where its name tells otherwise; None: as it tells.

    Example:
      >>> Axes((0,), (1, 2))  # a query kernel (features, heads, head_dim)
      Axes(in_axis=(0,), out_axis=(1, 2), batch_axis=())
    """

    in_axis: tuple[int, ...]
    out_axis: tuple[int, ...]
    batch_axis: tuple[int, ...] = ()
    lookup: bool | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("in_axis", "out_axis", "batch_axis"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, int) else tuple(int(axis) for axis in value)
            object.__setattr__(self, name, value)
