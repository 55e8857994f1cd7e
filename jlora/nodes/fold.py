"""What a node stands for, computed and checked in one program, compiled once for all nodes that are alike."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret.compat import is_traced
from jlora.interpret.factored import Factored
from jlora.nodes import qarray
from jlora.nodes.node import TrainableParam


class MergePrecisionWarning(UserWarning):
    """The merged kernel's type does not hold the adapter: rounding took most of it, or sums became infinite."""


class Loss(NamedTuple):
    """What a type of fewer than 32 bits does not hold of a merged kernel.

    Args:
      update, lost: the squared norms of the update, and of what rounding takes from it.
      outside: how many weights are not finite in it, of those whose base is.
      largest: of the weights, if it does not reach some.
    """

    update: Any
    lost: Any
    outside: Any
    largest: Any


def folded(path: str, node: Any, dtype: Any, donate: bool) -> Any:
    """The leaf that a node stands for, in `dtype` or its base's; warns of what that type does not hold.

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
    if loss is not None:
        _warn(path, merged.dtype, Loss(*map(float, loss)))
    return merged


@functools.lru_cache(maxsize=256)
def _program(donate: bool, dtype: Any, place: Any) -> Callable[..., Any]:
    fold = lambda base, rest: _fold(base, rest, dtype)
    return jax.jit(fold, donate_argnums=(0,) if donate else (), out_shardings=None if place is None else (place, None))


def _place(base: Any) -> Any:
    """Where what is merged lies: where the base lies, if that is on a mesh."""
    place = getattr(qarray.codes(base), "sharding", None)
    return place if isinstance(place, jax.sharding.NamedSharding) else None


def _fold(base: Any, rest: Any, dtype: Any) -> tuple[jax.Array, Loss | None]:
    if qarray.is_qarray(base):
        base = qarray.dense(base, jnp.float32)
    value = dataclasses.replace(rest, base=base).effective("", None)
    if not isinstance(value, Factored):
        return value, None
    merged = value.dense(dtype)
    return merged, _loss(value, merged) if jnp.finfo(merged.dtype).bits < 32 else None


def _loss(value: Factored, merged: jax.Array) -> Loss:
    base, exact = value.base.astype(jnp.float32), value.dense(jnp.float32)
    # XLA leaves out a rounding that is undone at once, unless something stands between.
    made = lax.optimization_barrier(merged)
    rounded = value.base if value.base.dtype == merged.dtype else lax.optimization_barrier(base.astype(merged.dtype))
    square = lambda x: jnp.sum(x * x)
    lost = square(made.astype(jnp.float32) - rounded.astype(jnp.float32) - (exact - base))
    nothing = lambda: (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))
    # One weight that the type does not reach makes the sum infinite or NaN: without one, nothing more is read.
    return Loss(square(exact - base), lost, *lax.cond(jnp.isfinite(lost), nothing, lambda: _outside(value, merged)))


def _outside(value: Factored, merged: jax.Array) -> tuple[jax.Array, jax.Array]:
    exact = value.dense(jnp.float32)
    finite = jnp.isfinite(exact)
    outside = jnp.sum(~jnp.isfinite(merged) & jnp.isfinite(value.base.astype(jnp.float32)), dtype=jnp.int32)
    return outside, jnp.max(jnp.where(finite, jnp.abs(exact), 0))


def _warn(path: str, dtype: Any, loss: Loss) -> None:
    if loss.outside:
        become = "infinite" if jnp.isinf(jnp.asarray(jnp.inf, dtype)) else "NaN"
        told = (
            f"merge: {loss.outside:.0f} weights of {path} are {become} in {dtype.name}: the largest is "
            f"{loss.largest:.4g}, and that type ends at {float(jnp.finfo(dtype).max):.4g}; "
            "merge(tree, dtype=jnp.bfloat16) or float32 holds it"
        )
    elif loss.lost > loss.update / 4 > 0:
        told = (
            f"merge: rounding {path} to {dtype.name} loses {min((loss.lost / loss.update) ** 0.5, 1):.0%} of its "
            "adapter (the update is below the type's resolution); merge(tree, dtype=jnp.float32) keeps it"
        )
    else:
        return
    warnings.warn(told, MergePrecisionWarning, stacklevel=4)
