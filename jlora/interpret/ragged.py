"""Ragged products under `jax.vmap` with one weight for all: JAX has no rule for it.

The tokens of all rows are put in the order of their groups, which gives one ragged product, and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret import compat
from jlora.interpret.interpreter import Interpreter
from jlora.interpret.quantised import array_of


def by_rows(eqn: Any, values: Sequence[Any], **changes: Any) -> Any:
    """A ragged product (x, weight, group sizes) inside a `jax.vmap` over rows; it can't be differentiated inside."""
    bind = lambda *values: compat.bind(eqn, list(values), **changes)
    if not _is_plain(eqn):
        return bind(*map(array_of, values))
    product = jax.custom_batching.custom_vmap(bind)

    @product.def_vmap
    def of_rows(size: int, is_batched: Any, x: Any, weight: Any, sizes: Any) -> tuple[jax.Array, bool]:
        spread = lambda v, is_one: v if is_one else jnp.broadcast_to(v, (size, *v.shape))
        x, sizes = spread(x, is_batched[0]), spread(sizes, is_batched[2])
        if is_batched[1]:
            return jax.vmap(bind)(x, weight, sizes), True
        order = _by_group(x.shape[1], sizes)
        together = x.reshape(-1, x.shape[-1])[order]
        made = by_rows(eqn, [together, weight, sizes.sum(0)], **changes)
        return jnp.zeros_like(made).at[order].set(made).reshape(*x.shape[:2], -1), True

    return product(*map(array_of, values))


def _is_plain(eqn: Any) -> bool:
    """Whether each row of x, a matrix, is multiplied with the matrix of its group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (over, _), (batch, _) = numbers.dot_dimension_numbers
    return not batch and tuple(over) == (1,) and len(numbers.rhs_group_dimensions) == 1 == eqn.invars[0].aval.ndim - 1


def _by_group(tokens: int, sizes: Any) -> jax.Array:
    """The places of all tokens of all rows in the order of their groups; those of no group are last."""
    ends = jnp.cumsum(sizes, axis=1)
    group = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(tokens), side="right"))(ends)
    return jnp.argsort(group.reshape(-1), stable=True)


def ragged_dot(interpreter: Interpreter, eqn: Any, *values: Any) -> Any:
    """The rule of a ragged product that no adapted weight reaches."""
    del interpreter
    return by_rows(eqn, values)


BY_ROWS = {"ragged_dot_general": ragged_dot}
