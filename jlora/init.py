"""Initial values of the factors. Each function makes one kernel's pair; `jlora.wrap` maps it over batch axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]
Factors = tuple[jax.Array, jax.Array]


def kaiming(key: jax.Array, in_shape: Shape, out_shape: Shape, rank: int, dtype: Any) -> Factors:
    """``lora_a`` uniform in +-1/sqrt(in), ``lora_b`` zero: PEFT's default (kaiming_uniform with a = sqrt 5).

    Args:
      key: a PRNG key.
      in_shape, out_shape: the kernel's in and out axes.
      rank: r.
      dtype: of the factors.

    Returns:
      lora_a of shape (*in_shape, r) and lora_b of shape (r, *out_shape).
    """
    bound = 1 / math.sqrt(math.prod(in_shape))
    lora_a = jax.random.uniform(key, (*in_shape, rank), dtype, -bound, bound)
    return lora_a, jnp.zeros((rank, *out_shape), dtype)


def gaussian(key: jax.Array, in_shape: Shape, out_shape: Shape, rank: int, dtype: Any) -> Factors:
    """``lora_a`` normal with standard deviation 1/r, ``lora_b`` zero; shapes as in `kaiming`."""
    lora_a = jax.random.normal(key, (*in_shape, rank), dtype) / rank
    return lora_a, jnp.zeros((rank, *out_shape), dtype)


def embedding(key: jax.Array, in_shape: Shape, out_shape: Shape, rank: int, dtype: Any) -> Factors:
    """``lora_a`` zero, ``lora_b`` standard normal: what PEFT gives embedding tables; shapes as in `kaiming`."""
    return jnp.zeros((*in_shape, rank), dtype), jax.random.normal(key, (rank, *out_shape), dtype)


INITS: dict[str, Callable[..., Factors]] = {"kaiming": kaiming, "gaussian": gaussian}
