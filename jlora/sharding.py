"""Placement: what stands beside a base lies where the base lies.

An array takes the mesh axes of those of the base's axes that it has: A those of the in axes, B those of the out axes,
both those of the batch axes; its own axes, such as the rank, are whole everywhere. Nothing is gathered: each device
makes its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.fields import GROUPS, map_fields
from jlora.interpret.compat import is_traced


def of_node(node: Any, base: Any) -> Any:
    """The node with the sharding of each array beside a placed base; None where the base says nothing."""
    sharding = _sharding(base)
    if sharding is None:
        return None
    spec = (*sharding.spec, *[None] * (len(base.shape) - len(sharding.spec)))
    place = lambda dims: NamedSharding(sharding.mesh, PartitionSpec(*_parts(node, dims, spec)))
    return map_fields(lambda dims, x: None if x is None else place(dims), node)


def _sharding(base: Any) -> NamedSharding | None:
    """Where a base lies; None where that is not said, or said by the program that is being traced."""
    sharding = None if is_traced(base) else getattr(base, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def _parts(node: Any, dims: str, spec: tuple[Any, ...]) -> list[Any]:
    of = lambda word: [spec[axis] for axis in getattr(node.axes, f"{word}_axis")] if word in GROUPS else [None]
    parts = [part for word in dims.split() for part in of(word)]
    if dims.startswith("batch") and node.layers is not None:
        parts[0] = None  # some of the layers: their number need not be a multiple of the mesh's
    return parts


def placed(make: Callable[..., Any], base: Any, key: jax.Array) -> Any:
    """Calls ``make(base, key)``: the arrays of its node come out placed, and abstract where the base is."""
    is_abstract = isinstance(base, jax.ShapeDtypeStruct)
    if not is_abstract and _sharding(base) is None:
        return make(base, key)
    shapes = jax.eval_shape(make, base, key)
    shardings = of_node(shapes, base)
    if not is_abstract:
        return jax.jit(make, out_shardings=shardings)(base, key)
    if shardings is None:
        return shapes
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
