"""Arrays made where they belong: beside a base, on its devices, wherever that is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret.compat import is_traced
from jlora.nodes import placement
from jlora.nodes.fields import axes_of, map_fields
from jlora.nodes.qarray import codes


class Makers:
    """Makes the arrays of nodes where they belong; alike kernels share one compiled function, or one plan."""

    def __init__(self) -> None:
        self._known: list[tuple[Any, Callable[..., Any]]] = []

    def __call__(self, kind: Any, make: Callable[..., Any], base: Any, *args: Any) -> Any:
        """``make(base, *args)``: the arrays of its node come out placed, and abstract where the base is.

        Args:
          kind: equal for functions that do the same to bases of one shape and type.
          make: returns a node without its base. It sees no sharded axes, so it may sort and factorise.
        """
        is_abstract = isinstance(codes(base), jax.ShapeDtypeStruct)
        at = is_abstract, is_traced(codes(base)), placement.sharding_of(base)
        kind = (kind, tuple(base.shape), jnp.dtype(base.dtype), *at)
        made = next((made for known, made in self._known if known == kind), None)
        if made is None:
            made = _maker(make, base, *args)
            self._known.append((kind, made))
        return made(base, *args)


def _maker(make: Callable[..., Any], base: Any, *args: Any) -> Callable[..., Any]:
    """The function that makes a node beside such a base."""
    at = placement.sharding_of(base)
    is_abstract = isinstance(codes(base), jax.ShapeDtypeStruct)
    if at is None and not is_abstract:
        return (lambda base, *args: _alike(make(base, *args), codes(base))) if is_traced(codes(base)) else make
    node = jax.eval_shape(make, jax.ShapeDtypeStruct(base.shape, base.dtype), *args)
    where = placement.of_node(node, base)
    if is_abstract:
        plan = node if where is None else jax.tree.map(placed_plan, node, where)
        return lambda *_: plan
    if at is not None and at.mesh.explicit_axes:
        make = jax.sharding.auto_axes(make, out_sharding=where)
    return jax.jit(make, out_shardings=where)


def placed_plan(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    """A plan with a place."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def _alike(node: Any, base: Any) -> Any:
    """The node, its arrays tied to a base that is being traced, so that XLA places them as it places the base."""
    return map_fields(lambda dims, x: x if x is None else _tied(x, axes_of(node, dims, x, base.shape), base), node)


def _tied(x: Any, axes: list[int | None], base: Any) -> Any:
    """x itself, chosen by a comparison that has the base's axes: sharding propagates through it.

    The barriers hide from XLA that both choices are the same, and which one is made.
    """
    mine = [axis for axis in axes if axis is not None]
    if not mine:
        return x
    others = [axis for axis in range(base.ndim) if axis not in mine]
    thin = lax.transpose(base, [*mine, *others])
    for axis in range(len(mine), base.ndim):
        thin = lax.slice_in_dim(thin, 0, 1, axis=axis)
    thin = lax.squeeze(thin, range(len(mine), base.ndim))
    at = [i for i, axis in enumerate(axes) if axis is not None]
    is_same = thin == lax.optimization_barrier(thin)
    return lax.select_n(lax.broadcast_in_dim(is_same, x.shape, at), lax.optimization_barrier(x), x)
