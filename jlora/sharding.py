"""Placement: factors lie where their base lies.

A takes the mesh axes of the base's in axes, B those of its out axes, both those of its batch axes; the rank is
replicated. Nothing is gathered: each device makes its own part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.interpret.compat import is_traced
from jlora.spec import Axes

Placement = tuple[Any, Any] | None


def of_factors(base: Any, axes: Axes) -> Placement:
    """The shardings of ``(lora_a, lora_b)`` beside a placed base; None where the base says nothing."""
    sharding = getattr(base, "sharding", None) if not is_traced(base) else jax.typeof(base).sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    spec = (*sharding.spec, *[None] * (len(base.shape) - len(sharding.spec)))
    at = lambda which: [spec[axis] for axis in which]
    place = lambda *parts: NamedSharding(sharding.mesh, PartitionSpec(*parts))
    batch = at(axes.batch_axis)
    return place(*batch, *at(axes.in_axis), None), place(*batch, None, *at(axes.out_axis))


def place(make: Callable[[], Any], placement: Placement, base: Any) -> Any:
    """Calls `make` so that its results come out placed; abstractly where the base is abstract."""
    if isinstance(base, jax.ShapeDtypeStruct):
        shapes = jax.eval_shape(make)
        return tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            for x, s in zip(shapes, placement or (None, None), strict=True)
        )
    if placement is None or is_traced(base):
        return make()
    return jax.jit(make, out_shardings=placement)()
