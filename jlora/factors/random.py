"""Factors that are drawn. Each function makes one kernel's pair; `jlora.wrap` maps it over batch axes."""

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


def orthogonal(key: jax.Array, in_shape: Shape, out_shape: Shape, rank: int, dtype: Any) -> Factors:
    """Both factors normal, on orthogonal halves of the ranks, so that their product is zero; shapes as in `kaiming`.

    Raises:
      ValueError: if the rank is odd.
    """
    if rank % 2:
        raise ValueError(f"wrap: init='orthogonal' splits the rank in two halves; it must be even, found {rank}")
    key_q, key_a, key_b = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
    lora_a = jax.random.normal(key_a, (math.prod(in_shape), rank // 2)) @ q[0::2] / 10
    lora_b = q[1::2].T @ jax.random.normal(key_b, (rank // 2, math.prod(out_shape))) / 10
    return lora_a.reshape(*in_shape, rank).astype(dtype), lora_b.reshape(rank, *out_shape).astype(dtype)


def embedding(key: jax.Array, in_shape: Shape, out_shape: Shape, rank: int, dtype: Any) -> Factors:
    """``lora_a`` zero, ``lora_b`` standard normal: what PEFT gives embedding tables; shapes as in `kaiming`."""
    return jnp.zeros((*in_shape, rank), dtype), jax.random.normal(key, (rank, *out_shape), dtype)


RANDOM: dict[str, Callable[..., Factors]] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}
