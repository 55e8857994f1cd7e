"""Where the axis of the adapters is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora.adapters.dims import array_fields, place_of
from jlora.adapters.stacked import StackedParam
from jlora.nodes.node import is_unit


def axes(tree: Any) -> Any:
    """For each leaf the axis of the adapters, None where it has none: ``in_axes`` and ``out_axes`` of `jax.vmap`.

    `jax.vmap` over them gives each call the wrapped tree of one adapter, which `jlora.apply`, `jlora.merge` take. The
    bases are the same for all calls, so their products are computed at once. The axis is the first, but behind those of
    scanned layers and of experts: a 0 in its place would take these apart.

    Args:
      tree: that `stack` returned, or half of its `jlora.partition`.

    Raises:
      TypeError: if the tree does not hold several adapters.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> trees = [jlora.wrap(params, jlora.LoraSpec(rank=2, seed=seed)) for seed in range(3)]
      >>> stacked = jlora.adapters.stack(trees)
      >>> call = jlora.apply(lambda p, x: x @ p["kernel"])
      >>> jax.vmap(call, in_axes=(jlora.adapters.axes(stacked), 0))(stacked, jnp.ones((3, 5, 4))).shape
      (3, 5, 3)
    """
    if not any(isinstance(x, StackedParam) for x in jax.tree.leaves(tree, is_leaf=is_unit)):
        raise TypeError("axes takes a tree of several adapters, as jlora.adapters.stack returns it, or a half of it")
    is_none = lambda x: x is None or is_unit(x)
    return jax.tree.map(lambda x: _axes(x) if isinstance(x, StackedParam) else None, tree, is_leaf=is_none)


def _axes(node: Any) -> Any:
    places: dict[str, Any] = {f.name: _places(node, f) for f in array_fields(type(node))}
    return dataclasses.replace(node, base=None, **places)


def _places(node: StackedParam, field: dataclasses.Field) -> Any:
    value, dims = getattr(node, field.name), field.metadata["dims"]
    if isinstance(value, tuple):
        return tuple(_place(node, d, x) for d, x in zip(dims, value, strict=False))
    return _place(node, dims, value)


def _place(node: StackedParam, dims: str, x: Any) -> Any:
    return jax.tree.map(lambda _: place_of(node, dims), x)
