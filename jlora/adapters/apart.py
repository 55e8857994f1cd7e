"""One of several adapters as it was, with its own ranks, layers and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.adapters.dims import array_fields, axis_of, layers_of, total_layers
from jlora.adapters.member import member
from jlora.adapters.stacked import OWN, Member, StackedParam, has_members
from jlora.nodes.fields import map_fields
from jlora.nodes.node import TrainableParam


def count_of(call: str, leaves: Sequence[Any]) -> int:
    """How many adapters a tree of these leaves holds.

    Raises:
      TypeError: if it holds one, or none.
    """
    counts = {len(leaf.members) for leaf in leaves if isinstance(leaf, StackedParam) and has_members(leaf)}
    if len(counts) != 1:
        raise TypeError(f"{call} takes a tree of several adapters, as jlora.adapters.stack returns it")
    return counts.pop()


def own(leaf: Any, number: int) -> Any:
    """The leaf of one adapter, as it was."""
    if not isinstance(leaf, StackedParam):
        return leaf
    if leaf.members[number] is None:
        return leaf.base
    told = Member(*leaf.members[number])  # type: ignore[misc]
    if leaf.of is TrainableParam:
        return TrainableParam(leaf.value[number])  # type: ignore[attr-defined]
    node: Any = member(leaf, lambda x, axis: lax.index_in_dim(x, number, axis, keepdims=False), is_own=True)
    statics = {name: getattr(told, name) for name in OWN if hasattr(node, name)}
    layers = layers_of(node)
    kept = [layers.index(layer) for layer in (told.layers or total_layers(node))]
    cut: Any = map_fields(lambda dims, x: _cut(node, dims, x, told.rank, kept), dataclasses.replace(node, base=None))
    parts = iter(told.parts)
    values = {f.name: getattr(cut, f.name) for f in array_fields(leaf.of)}
    values = {name: x[: next(parts)] if isinstance(x, tuple) else x for name, x in values.items()}
    types = iter(told.types)
    values = jax.tree.map(lambda x: x.astype(next(types)), values)
    return dataclasses.replace(node, base=leaf.base, **values, **statics)


def _cut(node: Any, dims: str, x: Any, rank: int | None, layers: Sequence[int]) -> Any:
    """An array without the ranks and layers that were filled up."""
    axis = axis_of(node, dims, "rank") if dims else None
    if axis is not None:
        x = lax.slice_in_dim(x, 0, rank, axis=axis)
    is_less = dims.startswith("batch") and node.axes.batch_axis and [*layers] != [*range(len(x))]
    return x[jnp.asarray(layers)] if is_less else x
