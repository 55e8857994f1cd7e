"""An adapter that acts on some tokens only: a mask of one row's tokens, in the middle of the low-rank path."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def refused(name: str) -> ValueError:
    """Of a use in which tokens can't be told apart."""
    return ValueError(
        f"activated: {name} is used in a way that is no plain product with tokens, where an adapter can't be active at "
        "some of them. Leave this kernel out of the adapter"
    )


def acting(h: jax.Array, active: Any, name: str) -> jax.Array:
    """The product with the first factor, (..., rank), with zeros at the tokens at which the adapter does not act.

    The tokens are the one axis, besides the rank, whose size is not 1: so there is one reading, or an error.

    Args:
      h: of one row, inside a `jax.vmap` over the rows.
      active: whether the adapter acts, of as many elements as there are tokens.
      name: of the kernel, for the error.
    """
    wide = [i for i, n in enumerate(h.shape[:-1]) if n != 1]
    if [h.shape[i] for i in wide] != ([active.size] if active.size != 1 else []):
        raise ValueError(
            f"activated: {name} is multiplied with vectors of shape {(*h.shape[:-1],)} for one row; expected is one "
            f"for each of the {active.size} tokens that `active` has, (1, {active.size}). Give `active` for all tokens "
            "of the call; or, if this is no product with tokens, leave the kernel out of the adapter"
        )
    mask = active.reshape([h.shape[i] if i in wide else 1 for i in range(h.ndim)])
    return jnp.where(mask, h, jnp.zeros_like(h))
