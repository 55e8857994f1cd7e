"""The factors of several adapters side by side: the ranks of all on one axis."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.adapters.axes import axes
from jlora.adapters.dims import place_of
from jlora.adapters.stacked import StackedParam
from jlora.interpret.factored import Factored
from jlora.interpret.laid import Laid, laid_out, order_of, stored
from jlora.variants.dora import DoraParam
from jlora.variants.lora import LoraParam
from jlora.variants.lora_fa import LoraFaParam

PLAIN = (LoraParam, LoraFaParam)  # which are nothing but their factors
AS_STORED = (*PLAIN, DoraParam)  # whose factors are arrays of theirs


def each(node: StackedParam, name: str = "") -> Factored | jax.Array:
    """What each adapter's node stands for: a factored weight without its base, each factor with a first axis more.

    Of plain LoRA the factors are left out, since `pair_of` takes them as they are stored.
    """
    plain: Any = node
    if node.of in PLAIN and not plain.start:
        scale = 1.0 if node.scales else plain.scale
        return Factored(None, (None, None), name=name, scale=scale, dropout=plain.dropout)

    def one(arrays: Any) -> Any:
        value = arrays.effective(name, None)
        return value.replace(base=None) if isinstance(value, Factored) else value

    return jax.vmap(one, in_axes=(axes(node),), axis_size=len(node.members))(node)


class Pair(NamedTuple):
    """The low-rank factors of all adapters, and what each's update is to be multiplied by: an array, or None."""

    a: Any
    b: Any
    scales: jax.Array | None


def pair_of(node: StackedParam, value: Factored) -> Pair:
    """The low-rank factors of all: without a copy where they are arrays of the node.

    Args:
      value: what each stands for.
    """
    arrays: Any = node
    if node.of in AS_STORED and not arrays.start:
        a, b = (_merged(x, place_of(node, "batch rank")) for x in (arrays.lora_a, arrays.lora_b))
        scales = node.scales[0] if node.scales else None
        return Pair(node.laid(a, "batch rank in"), node.laid(b, "batch rank out"), scales)
    a, b = map(_joined, value.factors[:2])
    return Pair(a, b, None)


def _merged(x: jax.Array, axis: int) -> jax.Array:
    """An array with an axis and the one behind it as one."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _joined(factor: Any) -> Any:
    """A factor whose array has a first axis more, with that as part of the rank's."""
    array, order = stored(factor), order_of(factor)
    axis: Any = array.ndim - 2 if order is None else order[-1]
    joined = _merged(jnp.moveaxis(array, 0, axis), axis)
    return joined if order is None else Laid(joined, order)


def in_order(factor: Any, axes: tuple[int, ...], shape: tuple[int, ...], rank_at: int) -> jax.Array:
    """A factor with these axes of a base of this shape, the rank before the one at `rank_at`."""
    x = laid_out(factor)
    x = jnp.broadcast_to(x, (*(n if i in axes else 1 for i, n in enumerate(shape)), x.shape[-1]))
    x = jnp.transpose(x, (*axes, len(shape), *(i for i in range(len(shape)) if i not in axes)))
    x = x.reshape(x.shape[: len(axes) + 1])
    return jnp.moveaxis(x, len(axes), rank_at)
