"""What a partition spec says of each axis, and of the factors beside a weight."""

from __future__ import annotations

from typing import Any

from jax.sharding import PartitionSpec


def entries(spec: Any, ndim: int) -> tuple[Any, ...]:
    """The entry of each axis of an array; a spec may leave out the last ones."""
    return (*spec, *[None] * (ndim - len(spec)))


def names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def of_factor(weight: Any, factor: Any, spec: Any) -> PartitionSpec:
    """The spec of a factor beside a weight of this spec: that of the axes that it owns; the rank is whole."""
    owned = weight.owned(factor)
    along = (entry if axis in owned else None for axis, entry in enumerate(entries(spec, weight.ndim)))
    return PartitionSpec(*along, None)
