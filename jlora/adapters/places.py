"""The factors of a kernel as matrices, place by place of its batch axes, and laid beside its base again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.nearest import Factors
from jlora.nodes.axes import Axes
from jlora.nodes.makers import Makers
from jlora.nodes.qarray import codes


def at_each_place(fn: Callable[..., Factors], axes: Axes, pairs: Sequence[Factors], *others: Any) -> Factors:
    """Calls ``fn([(A, B), ...], *others)`` for each place of the batch axes.

    Args:
      fn: takes A of shape (in, r) and B of shape (r, out), in float32 or wider, and returns one such pair.
      axes: of the kernel.
      pairs: factors of shapes (batch..., in..., r) and (batch..., r, out...).
      *others: arrays of shape (batch..., ...), or None.

    Returns:
      Factors of such shapes, and of the types of the first.
    """
    count = len(axes.batch_axis)
    for _ in range(count):
        fn = jax.vmap(fn)
    a, b = fn([_matrices(pair, count) for pair in pairs], *others)
    first_a, first_b = pairs[0]
    lora_a = a.reshape(*first_a.shape[:-1], a.shape[-1])
    lora_b = b.reshape(*b.shape[: count + 1], *first_b.shape[count + 1 :])
    return lora_a.astype(first_a.dtype), lora_b.astype(first_b.dtype)


def _matrices(pair: Factors, count: int) -> Factors:
    a, b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in pair)
    return a.reshape(*a.shape[:count], -1, a.shape[-1]), b.reshape(*b.shape[: count + 1], -1)


def made_beside(base: Any, makers: Makers, program: Callable[..., Any], *args: Any) -> Any:
    """``program(*args)``, a node without its base, whose arrays come out where the base lies.

    Beside an abstract base it is a plan where factors are abstract too.
    """
    is_plan = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(args))
    if isinstance(codes(base), jax.ShapeDtypeStruct) and not is_plan:
        return program(*args)
    return makers(program, lambda _, *args: program(*args), base, *args)
