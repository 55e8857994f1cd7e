"""Factors that are parts of the kernel. Each function takes one kernel as a matrix W of shape (in, out) in float32.

The kernel itself stays whole; a node stands for ``W + s (A B - A_0 B_0)``, so that training starts from W.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp

Factors = tuple[jax.Array, jax.Array]
_NITER = re.compile(r"pissa_niter_(\d{1,3})")


def pissa(matrix: jax.Array, rank: int, scale: float, key: jax.Array, niter: int | None = None) -> Factors:
    """The principal part of W = U S V: A = U_r sqrt(S_r / s), B = sqrt(S_r / s) V_r.

    Args:
      matrix: W, of shape (in, out).
      rank: the rank r.
      scale: the scale s.
      key: for the random start of the approximate decomposition.
      niter: rounds of subspace iteration, as in `leading`; None decomposes exactly.

    Returns:
      A of shape (in, r), B of shape (r, out), with s A B the best approximation of W of rank r.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> lora_a, lora_b = jlora.init.pissa(jnp.diag(jnp.array([1.0, 4.0])), 1, 1.0, jax.random.key(0))
      >>> jnp.round(abs(lora_a @ lora_b), 3)
      Array([[0., 0.],
             [0., 4.]], dtype=float32)

    References:
      Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv:2404.02948.
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False) if niter is None else leading(matrix, rank, key, niter)
    root = jnp.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def milora(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """The minor part of W: as `pissa`, of the r smallest singular values.

    Args:
      matrix: W, of shape (in, out).
      rank: the rank r.
      scale: the scale s.
      key: not used; all functions of this kind take one.

    Returns:
      A of shape (in, r), B of shape (r, out), with s A B the part of W of the r smallest singular values.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> lora_a, lora_b = jlora.init.milora(jnp.diag(jnp.array([1.0, 4.0])), 1, 1.0, jax.random.key(0))
      >>> jnp.round(abs(lora_a @ lora_b), 3)
      Array([[1., 0.],
             [0., 0.]], dtype=float32)

    References:
      Wang et al., "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning",
      arXiv:2406.09044.
    """
    del key
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(s[-rank:] / scale)
    return u[:, -rank:] * root, root[:, None] * vt[-rank:]


def olora(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """From the decomposition W^T = Q R: B = Q_r^T with orthonormal rows, A = R_r^T.

    Args:
      matrix: W, of shape (in, out).
      rank: the rank r.
      scale: not used.
      key: not used; all functions of this kind take one.

    Returns:
      A of shape (in, r), B of shape (r, out) with orthonormal rows.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> lora_a, lora_b = jlora.init.olora(jnp.arange(12.0).reshape(4, 3), 2, 1.0, jax.random.key(0))
      >>> bool(jnp.allclose(lora_b @ lora_b.T, jnp.eye(2), atol=1e-5))
      True

    References:
      Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", arXiv:2406.01775.
    """
    del scale, key
    q, r = jnp.linalg.qr(matrix.T)
    return r[:rank].T, q[:, :rank].T


def leading(matrix: jax.Array, rank: int, key: jax.Array, niter: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values and vectors (U, S, V), by subspace iteration: products and thin decompositions only.

    Returns:
      U of shape (in, k), S of (k,), V of (k, out), with k a little above the rank, where there are as many.

    References:
      Halko et al., "Finding Structure with Randomness", arXiv:0909.4061.
    """
    width = min(rank + max(rank, 8), *matrix.shape)
    q, _ = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], width)))
    for _ in range(niter):
        p, _ = jnp.linalg.qr(matrix.T @ q)
        q, _ = jnp.linalg.qr(matrix @ p)
    u, s, vt = jnp.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, vt


#: The functions that take factors from the kernel, by the names that ``LoraSpec(init=...)`` takes. Each maps
#: ``(matrix, rank, scale, key)`` to ``(A, B)``; `spectral` knows ``pissa_niter_N`` too.
SPECTRAL: dict[str, Callable[..., Factors]] = {"pissa": pissa, "olora": olora, "milora": milora}


def spectral(name: object) -> Callable[..., Factors] | None:
    """The function of a name that ``LoraSpec(init=...)`` takes, where that takes factors from the kernel.

    Args:
      name: one of `SPECTRAL`, or ``pissa_niter_N``: `pissa` with N rounds of subspace iteration.

    Returns:
      A function ``(matrix, rank, scale, key) -> (A, B)``; None for any other name, and for what is no string.

    Example:
      >>> import jlora
      >>> jlora.init.spectral("olora") is jlora.init.olora, jlora.init.spectral("kaiming")
      (True, None)
      >>> jlora.init.spectral("pissa_niter_16").keywords
      {'niter': 16}
    """
    if not isinstance(name, str):
        return None
    if match := _NITER.fullmatch(name):
        return functools.partial(pissa, niter=int(match[1]))
    return SPECTRAL.get(name)
