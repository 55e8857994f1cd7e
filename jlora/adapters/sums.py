"""Weighted sums of adapters' updates, as the node of one adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.dims import place_of
from jlora.adapters.sides import each, in_order, pair_of
from jlora.adapters.stacked import SEVERAL
from jlora.interpret.factored import Factored
from jlora.nodes.node import AdaptedParam, TrainableParam
from jlora.variants.bias import LoraBiasParam
from jlora.variants.dora import DoraParam
from jlora.variants.ia3 import Ia3InParam, Ia3Param
from jlora.variants.lora import LoraParam


def summed(path: str, node: Any, weights: jax.Array) -> AdaptedParam:
    """The node whose update is the sum of those of all adapters, each times its weight, of shape (adapters,)."""
    if node.of is TrainableParam:
        return TrainableParam(_values(node, weights))
    if node.of is LoraBiasParam:
        return LoraBiasParam(node.base, _bias(node, weights), scale=1.0)
    if node.of in (Ia3Param, Ia3InParam):
        return _gain(node, weights)
    value = each(node)
    if isinstance(value, Factored) and value.roles == ("a", "b"):
        return LoraParam(node.base, *_pair(node, value, weights), **_settings(node, value.scale))
    if node.of is DoraParam:
        return _directions(node, value, weights)
    raise ValueError(
        f"mix: {path} has adapters of {node.of.__name__}, whose updates have no sum of that form or of low rank; "
        "select takes one of them, and jlora.merge gives plain trees that can be averaged"
    )


def _settings(node: Any, scale: float) -> dict[str, Any]:
    dropout = max(getattr(node, "dropout", 0.0), 0.0) if getattr(node, "dropout", 0.0) != SEVERAL else 0.0
    return {"axes": node.axes, "scale": scale, "dropout": dropout, "layers": node.layers}


def _values(node: Any, weights: jax.Array) -> jax.Array:
    """base + sum w (value - base) of a leaf trained in full; the base counts for nothing where weights sum to one."""
    rest = 1 - weights.sum()
    sums = jnp.tensordot(weights, node.value.astype(weights.dtype), 1)
    base = jnp.where(rest == 0, 0, rest * jnp.where(rest == 0, 0, node.base.astype(weights.dtype)))
    return (sums + base).astype(node.base.dtype)


def _bias(node: Any, weights: jax.Array) -> jax.Array:
    weights = weights * (node.scales[0] if node.scales else node.scale)
    return jnp.tensordot(weights, node.lora_bias.astype(weights.dtype), 1).astype(node.lora_bias.dtype)


def _gain(node: Any, weights: jax.Array) -> Any:
    """1 + sum w (l - 1)"""
    gains = jnp.moveaxis(node.ia3_l, place_of(node, "batch adapters"), 0)
    if node.present:
        gains = _where_present(node, gains)
    sums = 1 + jnp.tensordot(weights, gains.astype(weights.dtype) - 1, 1)
    return node.of(node.base, sums.astype(node.ia3_l.dtype), node.axes, node.layers)


def _where_present(node: Any, gains: jax.Array) -> jax.Array:
    there = jnp.moveaxis(node.present[0], -1, 0) > 0
    return jnp.where(there.reshape(*there.shape, *[1] * (gains.ndim - there.ndim)), gains, 1)


def _pair(node: Any, value: Factored, weights: jax.Array, gains: Any = None) -> tuple[jax.Array, jax.Array]:
    """The factors of all, those of B times the weights and the gains of each, of the layers that are adapted."""
    axes, shape = node.axes, tuple(node.shape)
    batch, n = axes.batch_axis, len(axes.batch_axis)
    a, b, scales = pair_of(node, value)
    a = in_order(a, (*batch, *axes.in_axis), shape, n + len(axes.in_axis))
    b = in_order(b, (*batch, *axes.out_axis), shape, n)
    weights = (weights if scales is None else weights * scales).reshape(*[1] * n, -1, *[1] * len(axes.out_axis))
    by = jnp.repeat(weights if gains is None else weights * gains, b.shape[n] // len(node.members), axis=n)
    return _some_layers(node, a), _some_layers(node, (b * by).astype(b.dtype))


def _some_layers(node: Any, x: jax.Array) -> jax.Array:
    return x if node.layers is None else jnp.take(x, jnp.asarray(node.layers), axis=0)


def _directions(node: Any, value: Any, weights: jax.Array) -> DoraParam:
    """Sums of g_k (W + s_k A_k B_k) - W as G (W + A B): G = 1 + sum w_k (g_k - 1), B_k times w_k s_k g_k / G."""
    n, shape, axes = len(node.axes.batch_axis), tuple(node.shape), node.axes
    place = (*axes.batch_axis, *axes.out_axis)
    gains = jax.vmap(lambda gain: in_order(gain, place, shape, n), out_axes=n)(value.factors[2])
    gains = gains.reshape(*gains.shape[: n + 1], *gains.shape[n + 2 :])  # (batch..., adapters, out...)
    by = weights.reshape(-1, *[1] * len(axes.out_axis))
    whole = 1 + (by * (gains - 1)).sum(n)
    safe = jnp.where(whole == 0, jnp.finfo(whole.dtype).tiny, whole)  # of a column that is zero B is zero as well
    a, b = _pair(node, value, weights, gains / jnp.expand_dims(safe, n))
    norm2 = jnp.take(node.norm2, 0, axis=n)
    settings = _settings(node, value.scale)
    bare = DoraParam(node.base, a, b, norm2, norm2, **settings)
    magnitude = _some_layers(node, whole) * bare.norm()
    return dataclasses.replace(bare, magnitude=magnitude.astype(node.magnitude.dtype))
