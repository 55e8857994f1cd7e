"""The value between variants and primitives: a weight that is known as a base and what adapts it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.interpret.active import refused
from jlora.interpret.choice import gathered, takes_masks
from jlora.interpret.laid import laid_out
from jlora.interpret.products import Labels, cast, contract, placed_as, reshaped, uncut, wide
from jlora.interpret.quantised import array_of

Stride = int | tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """A weight, seen through views, with small arrays that follow it.

    Each factor has the axes of `base` and one more behind them, the rank. On each axis of the base a factor either has
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

    def laid_out(self) -> Self:
        """The same with factors that are arrays, for rules that look at them."""
        return self.replace(factors=tuple(map(laid_out, self.factors)))

    def view(self, base: Any, change: Callable[[Any], Any]) -> Self:
        return self.replace(base=base, factors=tuple(change(factor) for factor in self.factors))

    def unmerged(self) -> Self:
        """The same without what was merged ahead."""
        return self

    def alone(self) -> Self:
        """The same with one pair of factors, and nothing that was merged ahead."""
        return self

    def owned(self, factor: Any) -> tuple[int, ...]:
        """The axes on which a factor is whole; an axis of size 1 is nobody's."""
        return tuple(i for i, n in enumerate(self.base.shape) if n != 1 and factor.shape[i] == n)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Factored(Tracked):
    """Stands for ``R (g * (base + scale * sum_r a * b))``: low-rank factors, an output scale, an input transform.

    It is what `jlora.variants.AdaptedParam.effective` returns. `low_rank`, `plain`, `gained` and `turned_by` make one;
    its constructor is not for a variant. Each factor has a role:

    * ``"a"``, ``"b"``: of shape (axes or 1..., r), multiplied with each other and summed over the rank. An axis that a
      owns alone is an in axis, one that b owns alone an out axis, one that both own a batch axis.
    * ``"gain"``: g, of shape (axes or 1..., 1).
    * ``"turn"``: a block-diagonal R on one axis of n elements, of shape (axes or 1..., size of a block): row i of R
      within its block. R is the product of all of them.
    * ``"mark"``: owns the axis that is turned.
    * ``"merged"``: ``base + scale * sum_r a * b``, of shape (axes..., 1), for products that take it as it is.
    * ``"active"``: whether the factors act at each token of a row, of shape (1..., tokens).
    * ``"weights"``: of several adapters that a and b have side by side, of shape (1..., adapters): one of them is not
      zero, or none.

    Args:
      base: the weight, of shape (axes...).
      factors: as above, in the order of `roles`.
      key: the PRNG key of the dropout on the low-rank path, or None where it is off.
      name: path of the leaf that it came from.
      scale, dropout: s, and the dropout's rate.
      roles: of the factors.
      strides: for each turn, the distance between the elements of one block; or (stride, run), where a block is made of
        runs of so many elements side by side, and their distance is so many runs.
      tap: a function that the product with a passes through on its way to b, or None.
      keeps_result: as in `gained`.
      rows: of a batch, each with an adapter of its own, inside a `jax.vmap` over them; 0: there is none.
      varies: for each factor, the mesh axes along which it differs inside `jax.shard_map`; None: not known, but where
        JAX keeps account of it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlora.variants import low_rank
      >>> weight = low_rank(jnp.ones((4, 3)), jnp.ones((4, 1, 2)), jnp.ones((1, 3, 2)), scale=0.5)
      >>> weight.roles, weight.dense()[0]
      (('a', 'b'), Array([2., 2., 2.], dtype=float32))
    """

    key: Any = None
    name: str = dataclasses.field(default="", metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    roles: tuple[str, ...] = dataclasses.field(default=("a", "b"), metadata={"static": True})
    strides: tuple[Stride, ...] = dataclasses.field(default=(), metadata={"static": True})
    tap: Callable[[Any], Any] | None = dataclasses.field(default=None, metadata={"static": True})
    keeps_result: bool = dataclasses.field(default=False, metadata={"static": True})
    rows: int = dataclasses.field(default=0, metadata={"static": True})
    varies: tuple[frozenset[str], ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def pair(self) -> tuple[Any, Any] | None:
        """The low-rank factors (a, b), if it has them."""
        return self.factors[:2] if self.roles[:2] == ("a", "b") else None

    @property
    def gain(self) -> Any:
        """The output scale, of shape (axes or 1..., 1); None: it has none."""
        return next((f for f, role in zip(self.factors, self.roles, strict=True) if role == "gain"), None)

    @property
    def turns(self) -> list[tuple[Any, Stride]]:
        """The input transforms, each with its stride."""
        rows = [f for f, role in zip(self.factors, self.roles, strict=True) if role == "turn"]
        return list(zip(rows, self.strides, strict=True))

    @property
    def turned_axis(self) -> int | None:
        """The axis that is turned; None if there is none, or a view has taken it apart."""
        marks = [f for f, role in zip(self.factors, self.roles, strict=True) if role == "mark"]
        axes = self.owned(marks[0]) if marks else ()
        return axes[0] if len(axes) == 1 else None

    @property
    def merged(self) -> Any:
        """What was merged ahead, of the shape of the base; None: nothing was."""
        found = self._of("merged")
        return None if found is None else laid_out(found)[..., 0]

    @property
    def weights(self) -> Any:
        """Of the adapters that it has side by side, of shape (1..., adapters); None: it has one."""
        return self._of("weights")

    @property
    def active(self) -> Any:
        """Whether the factors act at each token of a row, of shape (1..., tokens); None: they do at all."""
        return self._of("active")

    def _of(self, role: str) -> Any:
        return next((f for f, other in zip(self.factors, self.roles, strict=True) if other == role), None)

    def _without(self, gone: str) -> Factored:
        if gone not in self.roles:
            return self
        kept = [i for i, role in enumerate(self.roles) if role != gone]
        pick = lambda values: None if values is None else tuple(values[i] for i in kept)
        return self.replace(factors=pick(self.factors), roles=pick(self.roles), varies=pick(self.varies))

    def unmerged(self) -> Factored:
        return self._without("merged")

    def anywhere(self) -> Factored:
        """The same with factors that act at all tokens."""
        return self._without("active")

    def merged_ahead(self) -> Factored:
        """The same, merged: where dropout is off, and there is something to merge."""
        is_more = self.weights is not None or self.active is not None
        if self.pair is None or self.key is not None or self.tap is not None or is_more:
            return self
        alone = self.replace(factors=self.pair, roles=("a", "b"), strides=())
        whole = lax.stop_gradient(alone.dense())
        return self.replace(factors=(*self.factors, whole[..., None]), roles=(*self.roles, "merged"))

    def dense(self, dtype: Any = None) -> jax.Array:
        """The weight itself: computed in float32 (or wider), rounded once, to `dtype` or to the base's."""
        return self.laid_out().alone()._dense(dtype)

    def _dense(self, dtype: Any) -> jax.Array:
        if self.active is not None:
            raise refused(self.name)
        dtype, sums = dtype or self.base.dtype, wide(self.base.dtype)
        weight = array_of(self.base).astype(sums)
        if self.pair:
            a, b = (factor.astype(sums) for factor in self.pair)
            weight = weight + product(self, a, b, precision=lax.Precision.HIGHEST) * self.scale
        if self.gain is not None:
            weight = weight * lax.squeeze(self.gain.astype(sums), [self.ndim])
        labels = tuple(range(self.ndim))
        for rows, stride in reversed(self.turns):
            of_rows, at = self.owned(rows), self.turned_axis
            moved = whole(self, rows.astype(sums) - self.no_turn(rows.shape[-1], stride).astype(sums))
            # As a change of the weight it lies where the weight lies, wherever XLA computes it.
            weight = weight + turned(weight, labels, moved, of_rows, at, stride, transpose=True)
        return weight.astype(dtype)

    def chosen(self, tokens: float | None = None) -> Factored:
        """The same with the factors of the adapter that acts, of several that it has side by side.

        Args:
          tokens: of each row, in a product that can drop the ranks of the others: it stays as it is where that costs
            less.
        """
        weights = self.weights
        if weights is None or (tokens is not None and takes_masks(weights.shape[-1], self.rows, tokens)):
            return self
        a, b = (gathered(f, laid_out(weights), is_weighted=not i) for i, f in enumerate(self.factors[:2]))
        return self.replace(factors=(a, b, *self.factors[2:]))._without("weights")

    def alone(self) -> Factored:
        return self.unmerged().chosen()

    def no_turn(self, size: int, stride: Stride) -> jax.Array:
        """The rows of a turn that turns nothing: those of the identity."""
        axis = self.turned_axis or 0
        n, (step, run) = self.base.shape[axis], steps(stride)
        places = np.arange(n)
        rows = np.eye(size, dtype=np.float32)[places // (step * run) % (size // run) * run + places % run]
        return jnp.asarray(rows.reshape([n if i == axis else 1 for i in range(self.ndim)] + [size]))


def low_rank(base: Any, a: Any, b: Any, **settings: Any) -> Factored:
    """A weight with a low-rank update: ``base + scale * sum_r a * b``.

    Args:
      base: the weight, of shape (axes...).
      a: of shape (in axes and batch axes of the base, 1 for the others, and the rank behind them).
      b: likewise with the out axes; `jlora.variants.AdaptedParam.beside` puts an array of a node so.
      **settings: fields of `Factored`: ``name``, ``scale``, ``key``, ``dropout``.

    Returns:
      A `Factored`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlora.variants import low_rank
      >>> low_rank(jnp.zeros((4, 3)), jnp.ones((4, 1, 2)), jnp.ones((1, 3, 2))).dense()[0]
      Array([2., 2., 2.], dtype=float32)
    """
    return Factored(base, (a, b), **settings)


def gained(weight: Factored, gain: Any, *, keeps_result: bool = False) -> Factored:
    """The weight with each output times a number.

    Args:
      weight: what `low_rank` or `plain` made.
      gain: of shape (axes or 1..., 1), as ``node.beside(gain, "batch out", fill=1)`` is.
      keeps_result: whether products keep their result for the gain's gradient, and not what they scale. It takes less
        memory, since what reads the result keeps it too; a gain of exactly zero has no gradient then.

    Returns:
      A `Factored` with the gain.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlora.variants import gained, plain
      >>> gained(plain(jnp.ones((4, 3))), jnp.array([[[1.0], [2.0], [3.0]]])).dense()[0]
      Array([1., 2., 3.], dtype=float32)
    """
    return weight.replace(factors=(*weight.factors, gain), roles=(*weight.roles, "gain"), keeps_result=keeps_result)


def turned_by(weight: Factored, axis: int, turns: Sequence[Any], strides: Sequence[Stride]) -> Factored:
    """The weight with its inputs turned: multiplied from the in side by a product of block-diagonal matrices.

    Args:
      weight: what `low_rank` or `plain` made.
      axis: which of its axes is turned, of n elements.
      turns: the matrices R, each of shape (axes or 1..., size of a block): for each element of the axis the row of R
        within its block.
      strides: for each of them the distance between the elements of one block: 1 for blocks of neighbours.

    Returns:
      A `Factored` with the transform.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlora.variants import plain, turned_by
      >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]]).reshape(2, 1, 2)  # one block of size 2
      >>> turned_by(plain(jnp.array([[1.0], [5.0]])), 0, [swap], [1]).dense()[:, 0]
      Array([5., 1.], dtype=float32)
    """
    mark = jnp.zeros([n if i == axis else 1 for i, n in enumerate(weight.base.shape)] + [1])
    roles = (*weight.roles, *["turn"] * len(turns), "mark")
    return weight.replace(factors=(*weight.factors, *turns, mark), roles=roles, strides=tuple(strides))


def plain(base: Any, **settings: Any) -> Factored:
    """A weight that is its base alone, for `gained` and `turned_by`.

    Args:
      base: the weight, of shape (axes...).
      **settings: fields of `Factored`, such as ``name``.

    Returns:
      A `Factored` without factors.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlora.variants import plain
      >>> plain(jnp.ones((4, 3))).dense().shape
      (4, 3)
    """
    return Factored(base, (), roles=(), **settings)


def product(weight: Factored, a: Any, b: Any, *, precision: Any = None) -> jax.Array:
    """Sum over the rank of ``a * b``, broadcastable to the shape of the weight."""
    labels = tuple(range(weight.ndim))
    mine, theirs = weight.owned(a), weight.owned(b)
    out = tuple(sorted({*mine, *theirs}))
    dense = contract(whole(weight, a), (*mine, "r"), whole(weight, b), (*theirs, "r"), out, precision=precision)
    return lax.expand_dims(dense, [axis for axis in labels if axis not in out])


def whole(weight: Tracked, factor: Any) -> Any:
    """A factor without the axes of size 1 that it does not own."""
    owned, factor = weight.owned(factor), laid_out(factor)
    return reshaped(factor, [*(factor.shape[axis] for axis in owned), factor.shape[-1]])


def steps(stride: Stride) -> tuple[int, int]:
    """The distance between the runs of one block, in runs, and the elements of a run."""
    return stride if isinstance(stride, tuple) else (stride, 1)


def turned(x: Any, xs: Labels, rows: Any, rs: Labels, at: Any, stride: Stride, *, transpose: bool = False) -> Any:
    """``sum_i x_i R_ij`` on the axis labelled `at`, or ``sum_j R_ij x_j`` if `transpose`, with a block-diagonal R.

    The axis of n elements is seen as (n / (size * stride), size / run, stride, run); a block mixes the elements of the
    second and of the last.

    Args:
      x: with an axis for each label of `xs`.
      rows: an axis for each label of `rs`, all of which are in `xs`, and the size of a block.
    """
    size, given, (step, run) = rows.shape[-1], x, steps(stride)
    place = xs.index(at)
    x = uncut(x, place, x.shape[place] // (size * step))
    ends = ("", "'") if run > 1 else ("",)  # of the names of what a block mixes: runs, and elements within one

    def split(array: Any, labels: Labels, within: str) -> tuple[Any, Labels]:
        blocks = lambda n: (n // (size * step), size // run, step, run)[: 2 + len(ends)]
        names = ("block", within, "step", f"{within}'")[: 2 + len(ends)]
        parts = [(blocks(n), names) if label == at else ((n,), (label,))
                 for n, label in zip(array.shape, labels, strict=False)]  # fmt: skip
        shape = [n for part, _ in parts for n in part] + list(array.shape[len(labels) :])
        return array.reshape(shape), tuple(label for _, names in parts for label in names)

    before, after = ("column", "row") if transpose else ("row", "column")
    seen, labels = split(x, xs, before)
    rows = uncut(rows, rs.index(at), rows.shape[rs.index(at)] // (size * step))
    rows, row_labels = split(cast(rows, x.dtype), rs, "row")
    rows = rows.reshape(*rows.shape[:-1], *((size // run, run) if run > 1 else (size,)))
    renamed = {f"{before}{end}": f"{after}{end}" for end in ends}
    out = tuple(renamed.get(label, label) if isinstance(label, str) else label for label in labels)
    columns = tuple(f"column{end}" for end in ends)
    return placed_as(contract(seen, labels, rows, (*row_labels, *columns), out).reshape(x.shape), given)
