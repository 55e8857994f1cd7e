"""Small arrays that are worked on in whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec


def in_whole(fn: Callable[..., Sequence[jax.Array]], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """``fn(*arrays)``, as many arrays of the same shapes, on a mesh of explicit axes too.

    There sorts and factorisations take no sharded axes: every device gets the arrays whole, and the results go where
    the arrays were.
    """
    places = [jax.typeof(x).sharding for x in arrays]
    whole = [_put(x, NamedSharding(place.mesh, PartitionSpec())) for x, place in zip(arrays, places, strict=True)]
    return [_put(x, place) for x, place in zip(fn(*whole), places, strict=True)]


def _put(x: jax.Array, place: NamedSharding) -> jax.Array:
    return jax.sharding.reshard(x, place) if place.mesh.explicit_axes else x
