"""The value between variants and primitives: a weight that is known as a base and factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Labels = tuple[Hashable, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """A weight, seen through views, with small arrays that follow it.

    Each factor has the axes of `base` and one more, the rank, behind them. On each axis of the base a factor either has
    the axis whole (it *owns* it) or has size 1. So every view of the base is the same view of the factors.
    """

    base: Any
    factors: tuple[Any, ...]
    lenient: ClassVar[bool] = False  # whether a factor may come to own an axis that it had in part

    @property
    def ndim(self) -> int:
        return len(self.base.shape)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    def view(self, base: Any, change: Callable[[Any], Any]) -> Self:
        return self.replace(base=base, factors=tuple(change(factor) for factor in self.factors))

    def owned(self, factor: Any) -> tuple[int, ...]:
        """The axes on which a factor is whole; an axis of size 1 is nobody's."""
        return tuple(i for i, n in enumerate(self.base.shape) if n != 1 and factor.shape[i] == n)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Factored(Tracked):
    """Stands for ``base + scale * sum_r a * b``, the product broadcast over the axes and summed over the rank.

    Args:
      base: the weight, of shape (axes...).
      factors: a and b, each of shape (axes or 1..., r). An axis that a owns alone is an in axis, one that b owns alone
        an out axis, one that both own a batch axis.
      key: the PRNG key of the dropout on the low-rank path, or None where it is off.
      name: path of the leaf that it came from.
      scale, dropout: s, and the dropout's rate.
    """

    key: Any = None
    name: str = dataclasses.field(default="", metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def dense(self, dtype: Any = None) -> jax.Array:
        """The weight itself: added in float32 (or wider), rounded once, to `dtype` or to the base's."""
        wide = jnp.float32 if jnp.finfo(self.base.dtype).bits < 32 else self.base.dtype
        a, b = (factor.astype(wide) for factor in self.factors)
        delta = product(self, a, b, precision=lax.Precision.HIGHEST) * self.scale
        return (self.base.astype(wide) + delta).astype(dtype or self.base.dtype)


def product(weight: Factored, a: Any, b: Any, *, precision: Any = None) -> jax.Array:
    """Sum over the rank of ``a * b``, broadcastable to the shape of the weight."""
    labels = tuple(range(weight.ndim))
    mine, theirs = weight.owned(a), weight.owned(b)
    out = tuple(sorted({*mine, *theirs}))
    dense = contract(whole(weight, a), (*mine, "r"), whole(weight, b), (*theirs, "r"), out, precision=precision)
    return lax.expand_dims(dense, [axis for axis in labels if axis not in out])


def whole(weight: Tracked, factor: Any) -> Any:
    """A factor without the axes of size 1 that it does not own."""
    owned = weight.owned(factor)
    return reshaped(factor, [*(factor.shape[axis] for axis in owned), factor.shape[-1]])


def contract(
    x: Any, xs: Labels, y: Any, ys: Labels, out: Labels, *, precision: Any = None, preferred: Any = None
) -> jax.Array:
    """An einsum of two arrays, written as one product of (stacks of) matrices.

    Labels in both arrays and not in `out` are contracted, labels of one array alone that are not in `out` are summed.

    The axes of each side are flattened to one, because CPU's automatic differentiation is twice as slow on products
    with several free axes; under a mesh they are kept, since flattening two sharded axes moves data.

    Args:
      x, y: arrays with an axis for each label of `xs`, `ys`.
      out: the labels of the result, each of which is in `xs` or `ys`.
      precision, preferred: as in `jax.lax.dot_general`.
    """
    x, xs = _sum_out(x, xs, {*ys, *out})
    y, ys = _sum_out(y, ys, {*xs, *out})
    left = tuple(label for label in out if label in xs and label not in ys)
    right = tuple(label for label in out if label in ys and label not in xs)
    if right and left and out.index(right[0]) < out.index(left[0]):
        return contract(y, ys, x, xs, out, precision=swapped(precision), preferred=preferred)
    batch = tuple(label for label in out if label in xs and label in ys)
    summed = tuple(label for label in xs if label not in out)
    sizes = dict(zip((*xs, *ys), (*x.shape, *y.shape), strict=True))
    flat = not (_is_meshed(x) or _is_meshed(y))
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
    for axes in map(places.get, made):
        names = {*axes} if isinstance(axes, tuple) else {axes} - {None}
        spec.append(None if names & taken else axes)
        taken |= names
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))


def _sum_out(x: Any, labels: Labels, keep: set[Hashable]) -> tuple[Any, Labels]:
    gone = [i for i, label in enumerate(labels) if label not in keep]
    return (x.sum(gone) if gone else x), tuple(label for label in labels if label in keep)


def _ordered(x: Any, labels: Labels, groups: Sequence[Labels], flat: bool) -> Any:
    x = transposed(x, [labels.index(label) for group in groups for label in group])
    if not flat:
        return x
    n = len(groups[0])
    sizes = iter(x.shape[n:])
    return reshaped(x, [*x.shape[:n], *(math.prod(next(sizes) for _ in group) for group in groups[1:])])


# The steps that change nothing are left out: tracing them costs more than all else here.


def cast(x: Any, dtype: Any) -> Any:
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def transposed(x: Any, order: Sequence[int]) -> Any:
    return x if list(order) == sorted(order) else lax.transpose(x, order)


def reshaped(x: Any, shape: Sequence[int]) -> Any:
    return x if tuple(shape) == tuple(x.shape) else lax.reshape(x, tuple(shape))


def scaled(x: Any, scale: float) -> Any:
    return x if scale == 1 else lax.mul(x, np.asarray(scale, x.dtype))


def swapped(precision: Any) -> Any:
    """A product's precision for its operands in the other order."""
    return precision[::-1] if isinstance(precision, tuple) else precision


def _is_meshed(x: Any) -> bool:
    return jax.typeof(x).sharding.mesh.size > 1 or jax.sharding.get_abstract_mesh().size > 1
