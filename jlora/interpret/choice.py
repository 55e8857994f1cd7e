"""A weight with the factors of several adapters side by side, and weights that say which of them act.

Each row of a batch has weights of its own, under `jax.vmap`: its own adapter's is the scale, the others' are zero. Two
ways lead to the same product: all ranks at once, of which those of other adapters are dropped (a mask), or the factors
of the one that acts (gathered).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret.laid import Laid, order_of, stored

FLOPS_A_BYTE = 16  # of adapters in float32: above it, arithmetic takes longer than reading the factors
COPIES = 3  # gathered factors are read, written, and read again


def takes_masks(members: int, rows: int, tokens: float) -> bool:
    """Whether all ranks at once cost less than gathered factors, for so many adapters, rows, and tokens a row.

    In units of one adapter's bytes: all of them are read once and multiplied with every token, or each row's own are
    copied and multiplied with its tokens.
    """
    masks = members * (1 + rows * tokens / (2 * FLOPS_A_BYTE))
    gathered = rows * (COPIES + tokens / (2 * FLOPS_A_BYTE))
    return masks <= gathered


def masked(h: jax.Array, weights: Any) -> jax.Array:
    """The product with the first factors of all adapters, (..., members * rank), times each one's weight.

    Where that is zero the result is, be the product infinite.
    """
    by = jnp.repeat(weights.reshape(-1), h.shape[-1] // weights.size).astype(h.dtype)
    return jnp.where(by == 0, jnp.zeros_like(h), h * by)


def gathered(factor: Any, weights: Any, *, is_weighted: bool) -> Any:
    """The factor of the adapter that acts, of all side by side on the axis of the rank; times its weight, or not."""
    array, order = stored(factor), order_of(factor)
    axis = array.ndim - 1 if order is None else order[-1]
    weights = weights.reshape(-1)
    at: Any = axis
    each = array.reshape(*array.shape[:at], weights.size, -1, *array.shape[at + 1 :])
    one = _summed(each, weights, at, is_weighted) if _is_explicit(each) else _taken(each, weights, at, is_weighted)
    return one if order is None else Laid(one, order)


def _taken(each: jax.Array, weights: jax.Array, axis: int, is_weighted: bool) -> jax.Array:
    number = jnp.argmax(weights != 0)
    one = lax.dynamic_index_in_dim(each, number, axis, keepdims=False)
    by = weights[number].astype(one.dtype)
    return jnp.where(by == 0, jnp.zeros_like(one), one * by) if is_weighted else one


def _is_explicit(x: jax.Array) -> bool:
    return any(mesh.explicit_axes for mesh in (jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()))


def _summed(each: jax.Array, weights: jax.Array, axis: int, is_weighted: bool) -> jax.Array:
    """The same as a product: on a mesh of explicit axes a gather must be told where its result lies."""
    weights = (weights if is_weighted else weights != 0).astype(each.dtype)
    return lax.dot_general(weights, each, (((0,), (axis,)), ((), ())), precision=lax.Precision.HIGHEST)
