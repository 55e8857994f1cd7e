"""One of several adapters, by a number that may be traced: with as many ranks and layers as all have."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.adapters.dims import array_fields, place_of, stored_order
from jlora.nodes.fields import leaf_fields
from jlora.nodes.node import AdaptedParam, TrainableParam, with_linear


def member(node: Any, pick: Callable[[Any, int], Any], number: Any = None, *, is_own: bool = False) -> AdaptedParam:
    """One of several adapters, with as many ranks and layers as all have.

    Args:
      node: of several adapters; or of one, where the axis is gone.
      pick: (array, axis) -> the array without this axis.
      number: which adapter, to be traced: -1 is none of them, and one that is not there gives NaN. None: the one left.
      is_own: leave its arrays as they are, without what it has of its own.
    """
    on = _present(node, pick, number)
    if node.of is TrainableParam:
        return TrainableParam(_bad(_where(on, pick(node.value, 0), node.base), number, len(node.members)))
    arrays = {f.name: _picked(node, f, pick) for f in array_fields(node.of)}
    statics = {f.name: getattr(node, f.name) for f in dataclasses.fields(node.of) if f.metadata.get("static")}
    made: Any = node.of(node.base, **arrays, **statics)  # type: ignore[call-arg]
    if is_own:
        return made
    if node.scales:
        made = times(dataclasses.replace(made, scale=1.0), pick(node.scales[0], 0))
    if on is not None:
        made = _neutral_unless(on, made)
    return _finite_if_there(made, number, len(node.members))


def _present(node: Any, pick: Callable[[Any, int], Any], number: Any) -> Any:
    """Whether the adapter has something here, of shape (batch...) or (); None: it has."""
    there = pick(node.present[0], place_of(node, "batch adapters")) > 0 if node.present else None
    if number is None:
        return there
    return number >= 0 if there is None else there & (number >= 0)


def _picked(node: Any, field: dataclasses.Field, pick: Callable[[Any, int], Any]) -> Any:
    """A field of a variant of one adapter, of the field of several."""

    def one(dims: str, x: Any) -> Any:
        x = pick(x, place_of(node, dims))
        order = stored_order(node, dims)
        return lax.transpose(x, [order.index(i) for i in range(len(order))]) if order != sorted(order) else x

    value, dims = getattr(node, field.name), field.metadata["dims"]
    return tuple(map(one, dims, value)) if isinstance(value, tuple) else one(dims, value)


def times(node: Any, by: Any) -> Any:
    """A variant's node whose update is so many times as large: its fields of `LINEAR` are multiplied."""
    if not type(node).LINEAR:
        raise ValueError(
            f"{type(node).__name__} does not say in which fields its update is linear (LINEAR), so that adapters of "
            "different scales can't be chosen by a number that is traced: give them one scale"
        )
    return with_linear(node, lambda x: (x * by).astype(x.dtype))


def _neutral_unless(on: Any, node: Any) -> Any:
    """The node where the adapter is there, and one that changes nothing elsewhere."""
    other = node.identity()
    pick = lambda x, y: x if x is y else _where(on, x, y)
    bare = lambda node: dataclasses.replace(node, base=None)
    return dataclasses.replace(jax.tree.map(pick, bare(node), bare(other)), base=node.base)


def _where(on: Any, x: Any, y: Any) -> Any:
    """x or y, by a mask of their first axes."""
    return x if on is None else jnp.where(on.reshape(*on.shape, *[1] * (x.ndim - on.ndim)), x, y)


def _finite_if_there(node: Any, number: Any, count: int) -> Any:
    if number is None:
        return node
    fields = [f.name for f in leaf_fields(node) if f.metadata["trained"]]
    return dataclasses.replace(node, **{name: _bad(getattr(node, name), number, count) for name in fields})


def _bad(x: Any, number: Any, count: int) -> Any:
    """x, or NaN if there is no adapter of this number."""
    return x if number is None else jax.tree.map(lambda x: jnp.where(is_known(number, count), x, jnp.nan), x)


def is_known(number: Any, count: int) -> Any:
    """Whether there is an adapter of a number, or it is the base's."""
    return (number >= -1) & (number < count)
