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
    """LoRA's usual start: ``lora_a`` uniform in +-1/sqrt(in), ``lora_b`` zero.

    It is PEFT's default (kaiming_uniform with a = sqrt 5), and that of ``LoraSpec(init="kaiming")``.

    Args:
      key: a PRNG key.
      in_shape, out_shape: the sizes of the kernel's in axes and of its out axes.
      rank: the rank r.
      dtype: of the factors.

    Returns:
      lora_a of shape (*in_shape, r) and lora_b of shape (r, *out_shape).

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> lora_a, lora_b = jlora.init.kaiming(jax.random.key(0), (4,), (2, 3), 2, jnp.float32)
      >>> lora_a.shape, lora_b.shape, bool(abs(lora_a).max() <= 0.5)
      ((4, 2), (2, 2, 3), True)

    References:
      He et al., "Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification",
      arXiv:1502.01852.
    """
    bound = 1 / math.sqrt(math.prod(in_shape))
    lora_a = jax.random.uniform(key, (*in_shape, rank), dtype, -bound, bound)
    return lora_a, jnp.zeros((rank, *out_shape), dtype)


def gaussian(key: jax.Array, in_shape: Shape, out_shape: Shape, rank: int, dtype: Any) -> Factors:
    """``lora_a`` normal with standard deviation 1/r, ``lora_b`` zero: ``LoraSpec(init="gaussian")``.

    Args:
      key: a PRNG key.
      in_shape, out_shape: the sizes of the kernel's in axes and of its out axes.
      rank: the rank r.
      dtype: of the factors.

    Returns:
      lora_a of shape (*in_shape, r) and lora_b of shape (r, *out_shape).

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> lora_a, lora_b = jlora.init.gaussian(jax.random.key(0), (1000,), (3,), 4, jnp.float32)
      >>> f"{lora_a.std():.2f}", float(lora_b.sum())
      ('0.25', 0.0)
    """
    lora_a = jax.random.normal(key, (*in_shape, rank), dtype) / rank
    return lora_a, jnp.zeros((rank, *out_shape), dtype)


def orthogonal(key: jax.Array, in_shape: Shape, out_shape: Shape, rank: int, dtype: Any) -> Factors:
    """Both factors normal, on orthogonal halves of the ranks, so that their product is zero.

    ``LoraSpec(init="orthogonal")`` names it. Neither factor is zero, so both have gradients from the first step on.

    Args:
      key: a PRNG key.
      in_shape, out_shape: the sizes of the kernel's in axes and of its out axes.
      rank: the rank r, an even number.
      dtype: of the factors.

    Returns:
      lora_a of shape (*in_shape, r) and lora_b of shape (r, *out_shape).

    Raises:
      ValueError: if the rank is odd.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> lora_a, lora_b = jlora.init.orthogonal(jax.random.key(0), (4,), (3,), 2, jnp.float32)
      >>> bool(abs(lora_b).max() > 0), bool(abs(lora_a @ lora_b).max() < 1e-6)
      (True, True)
    """
    if rank % 2:
        raise ValueError(f"wrap: init='orthogonal' splits the rank in two halves; it must be even, found {rank}")
    key_q, key_a, key_b = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
    lora_a = jax.random.normal(key_a, (math.prod(in_shape), rank // 2)) @ q[0::2] / 10
    lora_b = q[1::2].T @ jax.random.normal(key_b, (rank // 2, math.prod(out_shape))) / 10
    return lora_a.reshape(*in_shape, rank).astype(dtype), lora_b.reshape(rank, *out_shape).astype(dtype)


def embedding(key: jax.Array, in_shape: Shape, out_shape: Shape, rank: int, dtype: Any) -> Factors:
    """``lora_a`` zero, ``lora_b`` standard normal: what PEFT gives embedding tables.

    `jlora.wrap` takes it for every embedding table whose ``init`` is a name of `jlora.init.RANDOM`.

    Args:
      key: a PRNG key.
      in_shape, out_shape: the sizes of the table's in axes (tokens) and of its out axes (features).
      rank: the rank r.
      dtype: of the factors.

    Returns:
      lora_a of shape (*in_shape, r) and lora_b of shape (r, *out_shape).

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> lora_a, lora_b = jlora.init.embedding(jax.random.key(0), (10,), (4,), 2, jnp.float32)
      >>> float(lora_a.sum()), lora_b.shape
      (0.0, (2, 4))
    """
    return jnp.zeros((*in_shape, rank), dtype), jax.random.normal(key, (rank, *out_shape), dtype)


#: The functions that draw factors, by the names that ``LoraSpec(init=...)`` takes. Each maps
#: ``(key, in_shape, out_shape, rank, dtype)`` to ``(lora_a, lora_b)``.
RANDOM: dict[str, Callable[..., Factors]] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}
