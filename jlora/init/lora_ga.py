"""LoRA-GA: A and B from the gradient of each kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.apply import apply
from jlora.factors.spectral import leading
from jlora.init.batches import adapted, checked, jitted, size, some, summed
from jlora.nodes.fields import mapped, matrices
from jlora.nodes.qarray import dense
from jlora.tree import unwrap

Loss = Callable[[Any, Any], Any]


def lora_ga(
    loss: Loss, tree: Any, batches: Iterable[Any], *, gamma: float = 16.0, niter: int = 4, seed: int = 0
) -> Any:
    """A and B from the gradient of each kernel, so that LoRA's first step comes nearest to that of full training.

    Of the gradient's singular vectors, A has the first r of the in side, B the next r of the out side, both times
    ``out ** (1 / 4) / sqrt(gamma)``; the kernel stays whole, since the node stands for ``W + s (A B - A_0 B_0)``.

    Args:
      loss: an unchanged scalar function ``loss(params, batch)``.
      tree: a wrapped tree of LoRA, DoRA or LoRA-FA. What was trained in it is replaced.
      batches: a few batches; their gradients are summed. A gradient of every target is held at once.
      gamma: the smaller, the larger the factors.
      niter: rounds of subspace iteration of the decomposition.
      seed: of its start.

    Returns:
      The tree with those factors; `jlora.to_plain_lora` turns it into plain LoRA of rank 2r.

    Raises:
      ValueError: if there are no batches, nothing has low-rank factors, or a kernel is too small for rank 2r; if no
        gradient reaches any adapted kernel, or some are not finite (under `jax.jit` neither is seen).
      TypeError: if `batches` is an array.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"w": jnp.zeros((4, 3))}, jlora.LoraSpec(targets="w", rank=1))
      >>> loss = lambda p, batch: ((batch[0] @ p["w"] - batch[1]) ** 2).sum()
      >>> batch = jnp.eye(4)[:2], jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
      >>> params = jlora.init.lora_ga(loss, params, [batch], gamma=1.0)
      >>> int(abs(params["w"].lora_a[:, 0]).argmax())  # the input whose error is the largest
      0

    References:
      Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv:2407.05000.
    """
    paths, nodes, put = adapted("lora_ga", tree)
    batches = some("lora_ga", batches)
    for path, node in zip(paths, nodes, strict=True):
        _check_twice(path, node)

    def plain(bases: list[Any], tree: Any, batch: Any) -> jax.Array:
        _, nodes, put = adapted("lora_ga", tree)
        given = [dataclasses.replace(node, base=base) for node, base in zip(nodes, bases, strict=True)]
        return apply(loss, fallback="ignore", freeze=False)(unwrap(put(given)), batch)

    gradient = jitted(jax.grad(plain), batches)
    bases = [dense(node.base) for node in nodes]
    grads = checked("lora_ga", paths, summed(gradient(bases, tree, batch) for batch in batches), "gradients")
    keys = jax.random.split(jax.random.key(seed), len(nodes))
    return put([_from_gradient(*each, gamma, niter) for each in zip(nodes, grads, keys, strict=True)])


def _check_twice(path: str, node: Any) -> None:
    rank, sizes = node.lora_a.shape[-1], (size(node, "in"), size(node, "out"))
    if 2 * rank > min(sizes):
        raise ValueError(
            f"lora_ga: it takes 2 x rank singular vectors, but {path} of shape {tuple(node.shape)} maps {sizes[0]} to "
            f"{sizes[1]}, so it has {min(sizes)}, fewer than 2 x {rank}. Lower its rank with "
            f"overrides={{{path!r}: {{'rank': {min(sizes) // 2}}}}}, or exclude it"
        )


def _from_gradient(node: Any, grad: jax.Array, key: jax.Array, gamma: float, niter: int) -> Any:
    rank = node.lora_a.shape[-1]
    u, _, vt = mapped(node, lambda matrix: leading(matrix, 2 * rank, key, niter), matrices(node, grad))
    scale = size(node, "out") ** 0.25 / gamma**0.5
    lora_a = (scale * u[..., :rank]).reshape(node.lora_a.shape).astype(node.lora_a.dtype)
    lora_b = (scale * vt[..., rank : 2 * rank, :]).reshape(node.lora_b.shape).astype(node.lora_b.dtype)
    return dataclasses.replace(node, lora_a=lora_a, lora_b=lora_b, start=(jnp.copy(lora_a), jnp.copy(lora_b)))
