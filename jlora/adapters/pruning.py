"""What makes updates sparse, and what makes them agree: functions of one array, or of several that are stacked.

References:
  Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708.
  Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch" (DARE),
  arXiv:2311.03099.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def count_kept(shape: Sequence[int], density: float) -> int:
    """How many values pruning by magnitude keeps."""
    return int(density * math.prod(shape))


def largest(x: jax.Array, density: float) -> jax.Array:
    """Keeps the values of largest magnitude, and puts zeros in the places of the others.

    Args:
      x: an array of n values.
      density: the share that is kept: ``int(density * n)`` values, of equal ones the first.

    Example:
      >>> import jax.numpy as jnp
      >>> largest(jnp.array([[1.0, -4.0], [3.0, 2.0]]), 0.5).tolist()
      [[0.0, -4.0], [3.0, 0.0]]
    """
    _, places = lax.top_k(jnp.abs(x.ravel()), count_kept(x.shape, density))
    is_kept = jnp.zeros(x.size, bool).at[places].set(True)
    return jnp.where(is_kept.reshape(x.shape), x, 0)


def drawn(key: jax.Array, shape: Sequence[int], density: float) -> jax.Array:
    """Which values DARE keeps: each by itself, with this probability."""
    return jax.random.bernoulli(key, density, tuple(shape))


def dropped(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """Keeps a random share of the values, divided by that share: the mean over all keys is x.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> sorted({*dropped(jnp.ones(100), 0.5, jax.random.key(0)).tolist()})
      [0.0, 2.0]
    """
    return jnp.where(drawn(key, x.shape, density), x / density, 0)


def agreeing(stacked: jax.Array, majority_sign_method: str) -> jax.Array:
    """Which values have the sign that most have in their place; where there is no majority, that is plus.

    Args:
      stacked: of shape (updates, ...).
      majority_sign_method: ``"total"`` weighs the signs by their values, ``"frequency"`` counts them.

    Returns:
      Booleans of the same shape; False for zeros.
    """
    sign = jnp.sign(stacked)
    votes = (stacked if majority_sign_method == "total" else sign).sum(0)
    return sign == jnp.where(votes >= 0, 1, -1)


def disjoint_mean(stacked: jax.Array, is_counted: jax.Array) -> jax.Array:
    """In each place the mean of those values that are counted; zero where none is.

    Args:
      stacked: of shape (updates, ...).
      is_counted: booleans of that shape.
    """
    return jnp.where(is_counted, stacked, 0).sum(0) / jnp.maximum(is_counted.sum(0), 1)
