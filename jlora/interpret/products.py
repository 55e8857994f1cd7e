"""Products of two arrays by labels of their axes, and the steps around them."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.interpret.places import names

Labels = tuple[Hashable, ...]


def contract(
    x: Any,
    xs: Labels,
    y: Any,
    ys: Labels,
    out: Labels,
    *,
    precision: Any = None,
    preferred: Any = None,
    flat: bool | None = None,
) -> jax.Array:
    """An einsum of two arrays, written as one product of (stacks of) matrices.

    Labels in both arrays and not in `out` are contracted, labels of one array alone that are not in `out` are summed.

    The axes of each side are flattened to one, because CPU's automatic differentiation is twice as slow on products
    with several free axes; under a mesh they are kept, since flattening two sharded axes moves data.

    Args:
      x, y: arrays with an axis for each label of `xs`, `ys`.
      out: the labels of the result, each of which is in `xs` or `ys`.
      precision, preferred: as in `jax.lax.dot_general`.
      flat: whether axes are flattened; None: where there is no mesh.
    """
    x, xs = _sum_out(x, xs, {*ys, *out})
    y, ys = _sum_out(y, ys, {*xs, *out})
    left = tuple(label for label in out if label in xs and label not in ys)
    right = tuple(label for label in out if label in ys and label not in xs)
    if right and left and out.index(right[0]) < out.index(left[0]):
        return contract(y, ys, x, xs, out, precision=swapped(precision), preferred=preferred, flat=flat)
    batch = tuple(label for label in out if label in xs and label in ys)
    summed = tuple(label for label in xs if label not in out)
    sizes = dict(zip((*xs, *ys), (*x.shape, *y.shape), strict=True))
    flat = not (is_meshed(x) or is_meshed(y)) if flat is None else flat
    x, y = _ordered(x, xs, (batch, left, summed), flat), _ordered(y, ys, (batch, summed, right), flat)
    n, k, m = len(batch), 1 if flat else len(summed), 1 if flat else len(left)
    over = (tuple(range(n + m, n + m + k)), tuple(range(n, n + k)))
    stack = (tuple(range(n)), tuple(range(n)))
    made = (*batch, *left, *right)
    place = None if flat else _place(x, (*batch, *left, *summed), y, (*batch, *summed, *right), made)
    z = lax.dot_general(x, y, (over, stack), precision=precision, preferred_element_type=preferred, out_sharding=place)
    return transposed(reshaped(z, [sizes[label] for label in made]), [made.index(label) for label in out])


def _place(x: Any, xs: Labels, y: Any, ys: Labels, made: Labels) -> Any:
    """On a mesh of explicit axes: the labels stay where they are, and what is summed over sharded axes is whole."""
    sharding = next((s for s in (jax.typeof(v).sharding for v in (x, y)) if s.mesh.explicit_axes), None)
    if sharding is None:
        return None
    pairs = [pair for v, labels in ((y, ys), (x, xs)) for pair in zip(labels, jax.typeof(v).sharding.spec, strict=True)]
    places, taken = dict(pairs), set()
    spec = []
    for entry in map(places.get, made):
        spec.append(None if taken & {*names(entry)} else entry)
        taken |= {*names(entry)}
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))


def _sum_out(x: Any, labels: Labels, keep: set[Hashable]) -> tuple[Any, Labels]:
    gone = [i for i, label in enumerate(labels) if label not in keep]
    one = lax.squeeze if all(x.shape[axis] == 1 for axis in gone) else jnp.sum
    return (one(x, gone) if gone else x), tuple(label for label in labels if label in keep)


def _ordered(x: Any, labels: Labels, groups: Sequence[Labels], flat: bool) -> Any:
    x = transposed(x, [labels.index(label) for group in groups for label in group])
    if not flat:
        return x
    n = len(groups[0])
    sizes = iter(x.shape[n:])
    return reshaped(x, [*x.shape[:n], *(math.prod(next(sizes) for _ in group) for group in groups[1:])])


# The steps that change nothing are left out: tracing them costs more than all else here.


@functools.cache
def wide(dtype: Any) -> Any:
    """The type in which sums of values of a type are taken: float32, or a wider one."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


@functools.cache
def computing(*dtypes: Any) -> Any:
    """The type in which values of these types are computed with: of types that only store numbers, float32."""
    inexact = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16]
    return jnp.dtype(functools.reduce(jnp.promote_types, inexact)) if inexact else jnp.dtype(jnp.float32)


def cast(x: Any, dtype: Any) -> Any:
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def transposed(x: Any, order: Sequence[int]) -> Any:
    return x if list(order) == sorted(order) else lax.transpose(x, order)


def reshaped(x: Any, shape: Sequence[int]) -> Any:
    return x if tuple(shape) == tuple(x.shape) else lax.reshape(x, tuple(shape))


def placed_as(x: Any, like: Any) -> Any:
    """x, on a mesh of explicit axes where `like` lies; both have the same axes, but for those of size 1 of x."""
    sharding = jax.typeof(like).sharding
    if not sharding.mesh.explicit_axes:
        return x
    entries = [entry if n > 1 else None for entry, n in zip(sharding.spec, x.shape, strict=True)]
    return jax.sharding.reshard(x, sharding.update(spec=jax.sharding.PartitionSpec(*entries)))


def uncut(x: Any, axis: int, count: int) -> Any:
    """x, on a mesh of explicit axes with an axis whole where its shards would cut one of `count` blocks."""
    sharding = jax.typeof(x).sharding
    entry = sharding.spec[axis] if sharding.mesh.explicit_axes else None
    if not entry or count % math.prod(sharding.mesh.shape[name] for name in names(entry)) == 0:
        return x
    spec = [None if i == axis else entry for i, entry in enumerate(sharding.spec)]
    return jax.sharding.reshard(x, sharding.update(spec=jax.sharding.PartitionSpec(*spec)))


def scaled(x: Any, scale: float) -> Any:
    return x if scale == 1 else lax.mul(x, np.asarray(scale, x.dtype))


def swapped(precision: Any) -> Any:
    """A product's precision for its operands in the other order."""
    return precision[::-1] if isinstance(precision, tuple) else precision


def stand_in(aval: Any) -> jax.ShapeDtypeStruct:
    """What a trace is given for a value of this type."""
    place = None if aval.sharding.mesh.empty else aval.sharding
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=place, manual_axis_type=aval.manual_axis_type)


def is_meshed(x: Any) -> bool:
    return jax.typeof(x).sharding.mesh.size > 1 or jax.sharding.get_abstract_mesh().size > 1
