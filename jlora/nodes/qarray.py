"""Quantised leaves: Qwix's `QArray`, told from other leaves and turned into numbers without importing Qwix.

A `QArray` has the codes (``qvalue``) and a ``scale`` for each tile of them. Every array of it has the axes of the
weight, and on each axis the weight's size or a divisor of it. A scale that is a `QArray` itself is quantised once more.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The sixteen quantiles of a normal distribution, scaled to [-1, 1]: arXiv:2305.14314, appendix E.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def is_qarray(x: Any) -> bool:
    """Whether `x` is a quantised leaf."""
    qwix = sys.modules.get("qwix")  # where it is not imported there is none
    return qwix is not None and isinstance(x, qwix.QArray)


def is_hole(x: Any) -> bool:
    """Whether a leaf is missing, as in one half of `jlora.partition`."""
    return codes(x) is None


def is_whole(x: Any) -> bool:
    """Whether `x` is looked at as one by `is_hole`."""
    return x is None or is_qarray(x)


def codes(x: Any) -> Any:
    """The array that tells where a leaf lies and whether it is known: a quantised one's codes, another one itself."""
    return x.qvalue if is_qarray(x) else x


def abstract(x: Any) -> Any:
    """The shape and the type that functions see of a quantised leaf; another leaf itself."""
    return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) if is_qarray(x) else x


def dense(x: Any, dtype: Any = None) -> Any:
    """A leaf's numbers: those of a quantised one are computed in float32, and rounded once to its type or `dtype`."""
    if not is_qarray(x):
        return x
    return numbers(x, jnp.float64 if x.dtype == jnp.float64 else jnp.float32).astype(dtype or x.dtype)


def part(x: Any, place: Any) -> Any:
    """A leaf's numbers at a place; of a quantised leaf no others are computed where its tiles allow it."""
    if not is_qarray(x):
        return x[place]
    picked = [n for n, at in zip(x.shape, place, strict=False) if at != slice(None)]
    counts = lambda array: [n for n, at in zip(array.shape, place, strict=False) if at != slice(None)]
    is_apart = all(counts(array) == picked for array in jax.tree.leaves(x))
    return dense(jax.tree.map(lambda array: array[place], x)) if is_apart else dense(x)[place]


def numbers(x: Any, dtype: Any) -> jax.Array:
    """The numbers of a `QArray`, computed in a type: (codes - zero point) * scale."""
    values = nf4_values(x.qvalue, dtype) if x.qtype == "nf4" else x.qvalue.astype(dtype)
    if x.zero_point is not None:
        values = tiled(jnp.subtract, values, x.zero_point.astype(dtype))
    return tiled(jnp.multiply, values, numbers(x.scale, dtype) if is_qarray(x.scale) else x.scale.astype(dtype))


def nf4_values(codes: jax.Array, dtype: Any) -> jax.Array:
    """The values of nf4 codes: looked up, or on a TPU, which looks up slowly and fuses no lookup, chosen bit by bit."""
    choose, look_up = (functools.partial(make, dtype=dtype) for make in (chosen, looked_up))
    return lax.platform_dependent(codes, tpu=choose, default=look_up)


def looked_up(codes: jax.Array, dtype: Any) -> jax.Array:
    at = jax.typeof(codes).sharding
    place = at if at.mesh.explicit_axes else None
    return jnp.asarray(NF4, dtype).at[codes.astype(jnp.uint32)].get(mode="promise_in_bounds", out_sharding=place)


def chosen(codes: jax.Array, dtype: Any) -> jax.Array:
    values: list[Any] = [jnp.asarray(value, dtype) for value in NF4]
    for bit in range(4):
        is_set = (codes.astype(jnp.uint8) & (1 << bit)) != 0
        values = [jnp.where(is_set, one, zero) for zero, one in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def tiled(operation: Any, x: jax.Array, scale: jax.Array) -> jax.Array:
    """An operation on each element of x and the element of its tile: sizes of `scale` divide those of x."""
    whole, parts = split_tiles(x.shape, scale.shape)
    return operation(x.reshape(whole), scale.reshape(parts)).reshape(x.shape)


def split_tiles(shape: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """The shapes with an axis of tiles and one within for each axis that is tiled: of the array, of the scales."""
    whole, parts = [], []
    for n, count in zip(shape, counts, strict=True):
        is_tiled = 1 < count < n
        whole += [count, n // count] if is_tiled else [n]
        parts += [count, 1] if is_tiled else [count]
    return whole, parts


def tile_of(x: Any) -> tuple[int, ...]:
    """The size of a tile of a `QArray` on each axis."""
    return tuple(n // count for n, count in zip(x.shape, x.scale.shape, strict=True))


def nbits(x: Any) -> int:
    """The bits that an array, or a quantised leaf, takes."""
    if is_qarray(x):
        return sum(map(nbits, jax.tree.leaves(x)))
    info = jnp.iinfo if jnp.issubdtype(x.dtype, jnp.integer) else jnp.finfo
    is_number = jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)
    return int(np.prod(x.shape, dtype=np.int64)) * (info(x.dtype).bits if is_number else 8 * x.dtype.itemsize)


def tied(x: Any, to: Any) -> Any:
    """A tree of arrays that XLA does not read before `to` is there: so it can neither hoist nor share what follows."""
    return lax.optimization_barrier((x, lax.stop_gradient(to)))[0]
