"""`batched`: each row of a batch with its own adapter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters.apart import count_of
from jlora.adapters.choose import at
from jlora.adapters.member import is_known
from jlora.adapters.sides import each, pair_of
from jlora.adapters.stacked import StackedParam
from jlora.adapters.where import check_rows, is_none, spread, with_row, without_row
from jlora.apply import FALLBACKS, Settings, applied
from jlora.interpret.compat import is_traced
from jlora.interpret.factored import Factored
from jlora.interpret.laid import laid_out
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.node import AdaptedParam, is_unit
from jlora.targets.named import Names
from jlora.tree import FROZEN, labels

Runner = Callable[..., Callable[..., Any]]  # (function, key of dropout) -> the function on wrapped trees


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RowParam(AdaptedParam):
    """A kernel with several adapters, of which one row of a batch has one.

    Args:
      base: the kernel.
      stacked: the node of all, without its base.
      number: which of them; -1 is none.
      rows: of the batch.
    """

    base: Any = frozen()
    stacked: Any = trained()
    number: Any = frozen()
    rows: int = static(default=1)

    @property
    def dropout(self) -> float:
        return getattr(self.stacked, "dropout", 0.0)

    def effective(self, name: str, key: jax.Array | None) -> Any:
        node: StackedParam = dataclasses.replace(self.stacked, base=self.base)
        value = each(node, name)
        if not isinstance(value, Factored) or not value.pair or value.turns:
            value = at(node, self.number).effective(name, key)
            return value.replace(rows=self.rows) if isinstance(value, Factored) else value
        a, b, scales = pair_of(node, value)
        count = len(node.members)
        # The scale acts on the ranks of the one row, not on the factors of all.
        weights = jax.nn.one_hot(self.number, count) * (value.scale if scales is None else scales)
        weights = jnp.where(is_known(self.number, count), weights, jnp.nan)
        own = [self._own(gain) for gain in value.factors[2:]]
        factors = (a, b, *own, weights.reshape(*[1] * self.ndim, -1))
        key = key if self.dropout else None
        told = {"roles": (*value.roles, "weights"), "scale": 1.0, "key": key, "rows": self.rows}
        return value.replace(base=self.base, factors=factors, **told)

    def _own(self, gains: Any) -> jax.Array:
        """The gain of the row's adapter, of those of all."""
        gains, count = laid_out(gains), len(self.stacked.members)
        own = gains[jnp.clip(self.number, 0, count - 1)]
        return jnp.where(is_known(self.number, count), jnp.where(self.number < 0, 1, own), jnp.nan)


def batched(
    fn: Callable[..., Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    rng: jax.Array | None = None,
    fallback: str = "warn",
    train: Names = (),
) -> Callable[..., Any]:
    """Makes an unchanged function run on a batch of which each row has its own adapter.

    The base's products are computed once, for all rows. Each row's adapter comes from the factors of all, of which the
    other ranks are dropped where tokens are few (as in decoding), or from its own, gathered, where they are many;
    `jlora.explain` tells which.

    Args:
      fn: as for `jlora.apply`. It sees batches of one row: an array of shape (rows, ...) comes as (1, ...).
      in_axes: of the arguments behind the ids, the axis of the rows, as in `jax.vmap`: one for all, or a tuple with
        one for each, which may be a tree; None for what all rows share.
      out_axes: of the results, likewise.
      rng, fallback, train: as in `jlora.apply`; each row has dropout of its own.

    Returns:
      A function of (stacked, ids, *args): a tree of `stack`, or a larger one that has it in, such as ``{"params":
      stacked}``; the numbers of the adapters, of shape (rows,), -1 for the base; and the arguments of `fn`. The ids may
      be traced: a number of no adapter gives NaN then. To use under `jax.jit`.

    Raises:
      ValueError: if `fallback` is none of the three; when called, if an id is no adapter's, or the rows are not as many
        as the ids, or `fn` does not return batches of one row.
      TypeError: when called, if the tree does not hold several adapters, the ids are no whole numbers, or there are
        keyword arguments.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> trees = [jlora.wrap(params, jlora.LoraSpec(rank=2, seed=seed)) for seed in range(2)]
      >>> stacked = jlora.adapters.stack(trees)
      >>> run = jax.jit(jlora.adapters.batched(lambda p, x: x @ p["kernel"]))
      >>> run(stacked, jnp.array([1, 0, -1, 1]), jnp.ones((4, 5, 4))).shape
      (4, 5, 3)

      A cache whose rows are on its second axis goes in and out: ``batched(fn, in_axes=(0, 1), out_axes=(0, 1))``.
    """
    if fallback not in FALLBACKS:
        raise ValueError(f"batched: fallback must be one of {FALLBACKS}, found {fallback!r}")
    return Batched(fn, in_axes, out_axes, rng, train, functools.partial(by_row, fallback))


def by_row(fallback: str, fn: Callable[..., Any], rng: Any) -> Callable[..., Any]:
    return applied(fn, fallback, Settings(rng, freeze=False), by_rows=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Batched:
    """What `batched` returns.

    Args:
      run: (function, key of the dropout) -> the function on wrapped trees, as `jlora.apply` makes it.
    """

    fn: Callable[..., Any]
    in_axes: Any
    out_axes: Any
    rng: Any
    train: Names
    run: Runner

    name: ClassVar[str] = "batched"

    def __call__(self, stacked: Any, ids: Any, *args: Any, **kwargs: Any) -> Any:
        self._no_keywords(kwargs)
        ids = _checked(ids, count_of("batched", jax.tree.leaves(stacked, is_leaf=is_unit)))
        tree = stopped(stacked, self.train)
        own = lambda number: jax.tree.map(lambda leaf: _of_row(leaf, number, len(ids)), tree, is_leaf=is_unit)
        return self._by_row(own, ids, args)

    def _no_keywords(self, given: dict[str, Any]) -> None:
        if given:
            name = next(iter(given))
            raise TypeError(
                f"{self.name} takes no keyword arguments, found {name}; give it to the function, as in "
                f"{self.name}(lambda params, x: fn(params, x, {name}=...))"
            )

    def run_by(self, runner: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Batched:
        """The same with another way to run the function on wrapped trees, with dropout as that has it."""
        return dataclasses.replace(self, rng=None, run=lambda fn, _: runner(fn))

    def on_base(self, tree: Any, ids: Any, *args: Any) -> Any:
        """The function on the base alone, plain, for each row."""
        plain = dataclasses.replace(self, rng=None, run=lambda fn, _: fn)
        return plain._by_row(lambda _: tree, ids, args)

    def _by_row(self, own: Callable[[Any], Any], ids: Any, args: tuple[Any, ...]) -> Any:
        """The function of each row's tree and arguments."""
        axes = self._axes_of(args)
        check_rows(self.name, args, axes, len(ids))
        keys = None if self.rng is None else jax.random.split(self.rng, len(ids))

        def row(number: Any, key: Any, *args: Any) -> Any:
            one = jax.tree.map(with_row, axes, args, is_leaf=is_none)
            return without_row(self.name, self.run(self.fn, key)(own(number), *one), self.out_axes)

        in_axes = (0, None if keys is None else 0, *axes)
        return jax.vmap(row, in_axes=in_axes, out_axes=self.out_axes)(ids, keys, *args)

    def _axes_of(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """For each array of the arguments the axis of the rows; None where it has none."""
        given = tuple(self.in_axes) if isinstance(self.in_axes, (tuple, list)) else (self.in_axes,) * len(args)
        if len(given) != len(args):
            raise ValueError(
                f"{self.name}: in_axes has {len(given)} entries, one for each argument behind the first two; found "
                f"{len(args)} such arguments"
            )
        return tuple(spread(self.name, "in_axes", axes, arg) for axes, arg in zip(given, args, strict=True))


def _of_row(leaf: Any, number: Any, rows: int) -> Any:
    if not isinstance(leaf, StackedParam):
        return leaf
    return RowParam(leaf.base, dataclasses.replace(leaf, base=()), number, rows)  # type: ignore[type-var]


def _checked(ids: Any, count: int) -> jax.Array:
    """The ids as an array of whole numbers."""
    ids = ids if is_traced(ids) else np.asarray(ids)
    if ids.dtype.kind in "UO":
        raise TypeError(
            f"batched: ids are the numbers of adapters, found {ids.tolist()[:3]}; a jlora.adapters.Pool knows them by "
            "name: tree, ids = pool.take(names)"
        )
    ids = jnp.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"batched: ids are whole numbers of shape (rows,), one for each row, found {ids.dtype} of shape {ids.shape}"
        )
    if not is_traced(ids) and (outside := [int(i) for i in np.asarray(ids) if not -1 <= i < count]):
        raise ValueError(f"batched: ids are of 0 to {count - 1}, and -1 for the base; found {outside[0]}")
    return ids


def stopped(tree: Any, train: Names) -> Any:
    """The tree with what is frozen behind `jax.lax.stop_gradient`."""
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    stop = lambda x, mark: jax.lax.stop_gradient(x) if mark == FROZEN and is_traced(x) and is_float(x) else x
    return jax.tree.map(stop, tree, labels(tree, train=train))
