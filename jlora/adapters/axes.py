"""Where the axis of the adapters is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora.adapters.dims import array_fields, place_of
from jlora.adapters.stacked import StackedParam
from jlora.nodes.node import is_unit


def axes(tree: Any, *, other: int | None = None) -> Any:
    """For each leaf the axis of the adapters: ``in_axes`` and ``out_axes`` of `jax.vmap`.

    `jax.vmap` over them gives each call the wrapped tree of one adapter, which `jlora.apply`, `jlora.merge` take. The
    bases are the same for all calls, so their products are computed at once. The axis is the first, but behind those of
    scanned layers and of experts: a 0 in its place would take these apart.

    Args:
      tree: that `stack` returned, or half of its `jlora.partition`; or a tree that has such ones in, as the state of an
        optimizer has.
      other: for leaves that are no adapters', such as the base's; 0 for those of a state that `jax.vmap` made.

    Returns:
      The structure of `tree` with the number of an axis for each array of the adapters, None for the base beside them,
      and `other` for all other leaves.

    Raises:
      TypeError: if the tree does not hold several adapters.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> trees = [jlora.wrap(params, jlora.LoraSpec(rank=2, seed=seed)) for seed in range(3)]
      >>> stacked = jlora.adapters.stack(trees)
      >>> call = jlora.apply(lambda p, x: x @ p["kernel"])
      >>> jax.vmap(call, in_axes=(jlora.adapters.axes(stacked), 0))(stacked, jnp.ones((3, 5, 4))).shape
      (3, 5, 3)

      In training both halves have their axes, and so has the state:

      >>> trainable, frozen = jlora.partition(stacked)
      >>> of_half, of_base = jlora.adapters.axes(trainable), jlora.adapters.axes(frozen)
      >>> tx = optax.adam(1e-3)
      >>> of_state = jlora.adapters.axes(jax.eval_shape(tx.init, trainable), other=0)
      >>> state = jax.vmap(tx.init, in_axes=(of_half,), out_axes=of_state)(trainable)
      >>> state[0].count.shape
      (3,)
    """
    if not any(isinstance(x, StackedParam) for x in jax.tree.leaves(tree, is_leaf=is_unit)):
        raise TypeError("axes takes a tree of several adapters, as jlora.adapters.stack returns it, or a half of it")
    is_leaf = lambda x: x is None or is_unit(x)
    of = lambda x: _axes(x) if isinstance(x, StackedParam) else None if x is None else other
    return jax.tree.map(of, tree, is_leaf=is_leaf)


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
