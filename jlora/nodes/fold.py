"""What a node stands for, computed and checked in one program, compiled once for all nodes that are alike."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret.compat import is_traced
from jlora.interpret.factored import Factored
from jlora.interpret.products import wide
from jlora.nodes import qarray
from jlora.nodes.node import TrainableParam


class MergePrecisionWarning(UserWarning):
    """The merged kernel's type does not hold the adapter: rounding took most of it, or sums became infinite.

    `jlora.merge` and `jlora.fold_and_restart` warn of it, and the command ``jlora merge``. A kernel of 16 bits has
    about two or three decimal digits. An update that is smaller than half of the last digit is lost.

    To mend it, merge into a wider type: ``jlora.merge(tree, dtype=jnp.float32, everything=True)``; or do not merge, and
    run the wrapped tree by `jlora.apply`. `jlora.merge_error` tells how much of each kernel's update is lost.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, warnings
      >>> params = jlora.wrap({"kernel": jnp.ones((64, 32), jnp.bfloat16)}, jlora.LoraSpec(rank=2))
      >>> trained = jax.tree.map(lambda x: x + 1e-4 if x.dtype == jnp.float32 else x, params)  # a small update
      >>> with warnings.catch_warnings(record=True) as told:
      ...     warnings.simplefilter("always")
      ...     merged = jlora.merge(trained)
      >>> told[0].category.__name__
      'MergePrecisionWarning'
    """


class Loss(NamedTuple):
    """What a type does not hold of a merged kernel.

    Args:
      update, lost: the squared norms of the update, and of what rounding takes from it.
      outside: how many weights are not finite in it, of those whose base is.
      largest: of the weights, if it does not reach some.
    """

    update: Any
    lost: Any
    outside: Any
    largest: Any

    @property
    def share(self) -> float:
        """Of the update that rounding takes, by Frobenius norms: 1 where it takes as much as there is, or more."""
        if self.outside:
            return math.inf
        return min(float(self.lost / self.update) ** 0.5, 1.0) if self.update else 0.0


class _Told(threading.local):
    """The losses of the merges that run in a thread, until they are told."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Any, Loss]] | None = None


_TOLD = _Told()


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Within it merges warn of nothing; at its end there is one warning of each kind for all of them."""
    if _TOLD.found is not None:
        yield
        return
    _TOLD.found = {}
    try:
        yield
        found = _TOLD.found
    finally:
        _TOLD.found = None
    _warn({path: (dtype, Loss(*map(float, loss))) for path, (dtype, loss) in found.items()})


def folded(path: str, node: Any, dtype: Any, donate: bool) -> Any:
    """The leaf that a node stands for, in `dtype` or its base's; what that type does not hold is told at the end.

    Args:
      donate: whether the base's buffer may become the result's.
    """
    if isinstance(node, TrainableParam):
        return node.base
    rest = dataclasses.replace(node, base=None)
    if any(map(is_traced, jax.tree.leaves(node))):
        return _fold(node.base, rest, dtype)[0]
    fits = donate and not qarray.is_qarray(node.base) and dtype in (None, node.dtype)
    merged, loss = _program(fits, dtype, _place(node.base))(node.base, rest)
    if loss is not None and _TOLD.found is not None:
        _TOLD.found[path] = (merged.dtype, loss)
    return merged


def loss_of(node: Any, dtype: Any) -> tuple[Any, Loss]:
    """The type of a node's merged kernel, and what it does not hold: measured for types of 32 bits too."""
    measured = _program(False, dtype, _place(node.base), is_measured=True)
    merged, loss = measured(node.base, dataclasses.replace(node, base=None))
    return merged.dtype, Loss(*map(float, loss or (0, 0, 0, 0)))


@functools.lru_cache(maxsize=256)
def _program(donate: bool, dtype: Any, place: Any, is_measured: bool = False) -> Callable[..., Any]:
    fold = lambda base, rest: _fold(base, rest, dtype, is_measured)
    return jax.jit(fold, donate_argnums=(0,) if donate else (), out_shardings=None if place is None else (place, None))


def _place(base: Any) -> Any:
    """Where what is merged lies: where the base lies, if that is on a mesh."""
    place = getattr(qarray.codes(base), "sharding", None)
    return place if isinstance(place, jax.sharding.NamedSharding) else None


def _fold(base: Any, rest: Any, dtype: Any, is_measured: bool = False) -> tuple[jax.Array, Loss | None]:
    if qarray.is_qarray(base):
        base = qarray.dense(base, jnp.float32)
    value = dataclasses.replace(rest, base=base).effective("", None)
    if isinstance(value, Factored):
        merged = value.dense(dtype)
        return merged, _loss(value, merged) if is_measured or jnp.finfo(merged.dtype).bits < 32 else None
    if getattr(rest, "axes", None) is None:  # no kernel
        return value, None
    exact = dataclasses.replace(rest, base=base.astype(wide(base.dtype))).effective("", None)
    merged = exact.astype(dtype or base.dtype)
    return merged, _loss_of(base, exact, merged) if is_measured or jnp.finfo(merged.dtype).bits < 32 else None


def _loss_of(base: jax.Array, exact: jax.Array, merged: jax.Array) -> Loss:
    """As `_loss`, of a kernel that is computed as it is."""
    made, rounded = (lax.optimization_barrier(x).astype(exact.dtype) for x in (merged, base.astype(merged.dtype)))
    update, square = exact - base.astype(exact.dtype), lambda x: jnp.sum(x * x)
    outside = jnp.sum(~jnp.isfinite(merged) & jnp.isfinite(base), dtype=jnp.int32)
    largest = jnp.max(jnp.where(jnp.isfinite(exact), jnp.abs(exact), 0))
    return Loss(square(update), square(made - rounded - update), outside, largest)


def _loss(value: Factored, merged: jax.Array) -> Loss:
    base, exact = value.base.astype(jnp.float32), value.dense(jnp.float32)
    # XLA leaves out a rounding that is undone at once, unless something stands between.
    made = lax.optimization_barrier(merged)
    rounded = value.base if value.base.dtype == merged.dtype else lax.optimization_barrier(base.astype(merged.dtype))
    square = lambda x: jnp.sum(x * x)
    update = exact - base
    if jnp.finfo(merged.dtype).bits >= 32 and value.pair and len(value.factors) == 2:  # of the sum in float32 itself
        update = value.replace(base=jnp.zeros_like(base)).dense(jnp.float32)
        kept = made.astype(jnp.float32) - base
        lost = square(update - kept - (base - (made.astype(jnp.float32) - kept)))
    else:
        lost = square(made.astype(jnp.float32) - rounded.astype(jnp.float32) - update)
    nothing = lambda: (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))
    # One weight that the type does not reach makes the sum infinite or NaN: without one, nothing more is read.
    return Loss(square(update), lost, *lax.cond(jnp.isfinite(lost), nothing, lambda: _outside(value, merged)))


def _outside(value: Factored, merged: jax.Array) -> tuple[jax.Array, jax.Array]:
    exact = value.dense(jnp.float32)
    finite = jnp.isfinite(exact)
    outside = jnp.sum(~jnp.isfinite(merged) & jnp.isfinite(value.base.astype(jnp.float32)), dtype=jnp.int32)
    return outside, jnp.max(jnp.where(finite, jnp.abs(exact), 0))


def _warn(found: Mapping[str, tuple[Any, Loss]]) -> None:
    outside = {path: x for path, x in found.items() if x[1].outside}
    lost = {path: x for path, x in found.items() if not x[1].outside and x[1].lost > x[1].update / 4 > 0}
    for told in (*_of_each_type(outside, _told_outside), *_of_each_type(lost, _told_lost)):
        warnings.warn(told, MergePrecisionWarning, stacklevel=5)


def _of_each_type(found: Mapping[str, tuple[Any, Loss]], told: Callable[..., str]) -> list[str]:
    types = dict.fromkeys(dtype for dtype, _ in found.values())
    return [told(kind, {path: loss for path, (dtype, loss) in found.items() if dtype == kind}) for kind in types]


def _told_outside(dtype: Any, found: Mapping[str, Loss]) -> str:
    become = "infinite" if jnp.isinf(jnp.asarray(jnp.inf, dtype)) else "NaN"
    return (
        f"merge: {sum(loss.outside for loss in found.values()):.0f} weights of {_some(found)} are {become} in "
        f"{dtype.name}: the largest is {max(loss.largest for loss in found.values()):.4g}, and that type ends at "
        f"{float(jnp.finfo(dtype).max):.4g}; {_ADVICE.format('jnp.bfloat16')} or float32 holds it"
    )


def _told_lost(dtype: Any, found: Mapping[str, Loss]) -> str:
    shares = sorted({f"{loss.share:.0%}" for loss in found.values()}, key=lambda text: int(text[:-1]))
    much = shares[0] if len(shares) == 1 else f"{shares[0]} to {shares[-1]}"
    which = "its adapter (the update is" if len(found) == 1 else "their adapters (the updates are"
    return (
        f"merge: rounding {_some(found)} to {dtype.name} loses {much} of {which} below the type's resolution); "
        f"{_ADVICE.format('jnp.float32')} keeps it, in a model that is whole in that type, and jlora.merge_error(tree) "
        "has the figures"
    )


_ADVICE = "merge(tree, dtype={}, everything=True)"


def _some(paths: Collection[str]) -> str:
    first, *others = paths
    return f"{first} and {len(others)} more" if others else first
