"""The best factors of a rank, by the singular values: A has orthonormal columns, B the singular values.

So every direction goes on training, those too in which there is no update yet.

References:
  Eckart and Young, "The approximation of one matrix by another of lower rank", Psychometrika 1 (1936).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Factors = tuple[jax.Array, jax.Array]


def nearest(matrix: jax.Array, rank: int) -> tuple[Factors, jax.Array]:
    """The best approximation of a matrix.

    Args:
      matrix: of shape (in, out).
      rank: r, at most the smaller size.

    Returns:
      (A, B), of shapes (in, r) and (r, out), and the squared norm of what is left.
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank], s[:rank, None] * vt[:rank]), jnp.square(s[rank:]).sum()


def truncated(a: jax.Array, b: jax.Array, rank: int) -> Factors:
    """The best approximation of ``A @ B``, which is never built: the singular values are those of a small core.

    Args:
      a: of shape (in, q).
      b: of shape (q, out).
      rank: r; where it is larger than the rank of the product can be, the factors end in zeros.

    Returns:
      Factors of shapes (in, r) and (r, out).

    Example:
      >>> import jax.numpy as jnp
      >>> a, b = truncated(jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.eye(2), 1)
      >>> jnp.abs(a @ b).tolist()
      [[0.0, 0.0], [0.0, 3.0]]
    """
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(b.T)
    u, s, vt = jnp.linalg.svd(r_a @ r_b.T, full_matrices=False)
    more = max(rank - len(s), 0)
    lora_a, lora_b = q_a @ u[:, :rank], s[:rank, None] * vt[:rank] @ q_b.T
    return jnp.pad(lora_a, ((0, 0), (0, more))), jnp.pad(lora_b, ((0, more), (0, 0)))
