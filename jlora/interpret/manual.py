"""Inside `jax.shard_map`: what a device's shard of a weight does not tell of the whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def manual_axes() -> frozenset[str]:
    """The mesh axes of the `jax.shard_map` around."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def varying(x: Any) -> frozenset[str]:
    """The mesh axes along which an array differs; empty where `jax.shard_map` does not keep account of it."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def alike(x: Any, y: Any) -> tuple[Any, Any]:
    """Both arrays, varying along the mesh axes along which one of them does."""
    if not manual_axes():
        return x, y
    along = varying(x), varying(y)
    if along[0] == along[1]:
        return x, y
    spread = lambda v, axes: lax.pcast(v, tuple(sorted(axes)), to="varying") if axes else v
    return spread(x, along[1] - along[0]), spread(y, along[0] - along[1])


def same_everywhere(x: Any, beside: Any, over: set[str]) -> bool:
    """Whether an array is known to be the same along mesh axes along which the one beside it may differ."""
    return bool(varying(beside)) and not varying(x) & over


def split_axes(whole: Any, of: Any, what: str) -> tuple[str, ...]:
    """The mesh axes along which `of` is split and `whole` is not.

    Raises:
      ValueError: inside ``jax.shard_map(..., check_vma=False)``, which keeps no account of it.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and not varying(lax.axis_index(manual[0])):
        raise ValueError(
            f"apply: {what} needs to know how the kernel is split over the mesh, which jax.shard_map(..., "
            "check_vma=False) does not tell. Leave check_vma on, or put jlora.apply around the shard_map"
        )
    return tuple(sorted(varying(of) - varying(whole)))


def summed(x: Any, axes: tuple[str, ...]) -> Any:
    """The sum of a value over the shards."""
    return lax.psum(x, axes) if axes else x


def spread(x: Any, like: Any, but: Any) -> Any:
    """An array that all shards have, as one that differs along the mesh axes along which `like` does and `but` not."""
    axes = varying(like) - varying(but)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def check_whole(name: str, what: str, x: Any) -> None:
    """Refuses an array beside a kernel that is split over the mesh, where all of it is needed."""
    if split_axes(jnp.zeros(()), x, what):
        raise ValueError(
            f"apply: {what} of {name} need all of an array that is split over the mesh here. Inside jax.shard_map a "
            "device sees its shard alone: put jlora.apply around the shard_map, or split this kernel along other axes"
        )


def check_size(name: str, what: str, expected: int, found: int) -> None:
    """Refuses a kernel whose size is not that of the arrays beside it."""
    if expected != found:
        raise ValueError(
            f"apply: {what} of {name} is for {expected} elements, but the kernel has {found} here. Inside "
            "jax.shard_map a device sees its shard alone: put jlora.apply around the shard_map, or split this kernel "
            "along other axes"
        )
