"""CorDA: A and B from the kernel, weighed by the inputs that it sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.init.batches import adapted, checked, some
from jlora.init.eva import moments
from jlora.nodes.fields import mapped, matrices
from jlora.nodes.qarray import dense

MODES = ("ipm", "kpm")


def corda(
    fn: Callable[[Any, Any], Any], tree: Any, batches: Iterable[Any], *, mode: str = "ipm", damp: float = 0.01
) -> Any:
    """A and B from the kernel W and the covariance C = X^T X of its inputs X: ``s A B`` is a part of W of rank r.

    C W = U S V is decomposed, so that W = C^-1 U S V, and A = C^-1 U_r sqrt(S_r / s), B = sqrt(S_r / s) V_r. With the
    largest singular values, these are the parts of W that the batches use most; with the smallest, the least. The
    kernel stays whole, since the node stands for ``W + s (A B - A_0 B_0)``.

    Args:
      fn: an unchanged function ``fn(params, batch)``, such as a model's; its results need not be a loss, but gradients
        must be able to flow to them.
      tree: a wrapped tree of LoRA, DoRA or LoRA-FA. What was trained in it is replaced.
      batches: a few batches, each given to `fn` as it is. A kernel's inputs should be many more rows than it has
        inputs: PEFT advises 256 samples of 2,048 tokens for 4,096 inputs.
      mode: ``"ipm"`` (instruction-previewed) takes the largest singular values, for batches of the task to learn;
        ``"kpm"`` (knowledge-preserved) the smallest, for batches of what is not to be forgotten.
      damp: added to the diagonal of C, times its mean. C is scaled to a mean of 1 on its diagonal.

    Returns:
      The tree with those factors; `jlora.to_plain_lora` turns it into plain LoRA of rank 2r. Kernels that saw no inputs
      keep their factors. A matrix (in, in) is held for each kernel at once.

    Raises:
      ValueError: if there are no batches, nothing has low-rank factors, `mode` is none of the two, or damp isn't
        positive; if no input reaches any adapted kernel, or some are not finite (under `jax.jit` neither is seen).
      TypeError: if `batches` is an array.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"w": jnp.eye(3)}, jlora.LoraSpec(targets="w", rank=1))
      >>> x = jax.random.normal(jax.random.key(0), (64, 3)) * jnp.array([1.0, 3.0, 0.1])
      >>> params = jlora.init.corda(lambda p, x: x @ p["w"], params, [x])
      >>> int(abs(params["w"].lora_a[:, 0]).argmax())  # the input of most variance
      1

    References:
      Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
      Parameter-Efficient Fine-tuning", arXiv:2406.05223.
    """
    if mode not in MODES:
        raise ValueError(f"corda: mode must be one of {', '.join(map(repr, MODES))}, found {mode!r}")
    if not damp > 0:
        raise ValueError(f"corda: damp must be positive, found {damp!r}: without it a covariance may have no inverse")
    paths, nodes, put = adapted("corda", tree)
    found = moments("corda", fn, tree, some("corda", batches))
    inputs = checked("corda", paths, [found[path] for path in paths], "inputs")
    return put([_from_parts(node, x, mode, damp) for node, x in zip(nodes, inputs, strict=True)])


def _parts(matrix: jax.Array, moment: jax.Array, rank: int, scale: float, mode: str, damp: float) -> tuple[Any, Any]:
    """The factors of a kernel (in, out) with moments (in, in) of its inputs."""
    mean = jnp.trace(moment) / len(moment)
    covariance = moment / jnp.where(mean > 0, mean, 1) + damp * jnp.eye(len(moment))
    u, s, vt = jnp.linalg.svd(covariance @ matrix, full_matrices=False)
    chosen = slice(rank) if mode == "ipm" else slice(len(s) - rank, None)
    root = jnp.sqrt(s[chosen] / scale)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(covariance), True), u[:, chosen])
    return inverse * root, root[:, None] * vt[chosen]


def _from_parts(node: Any, moment: jax.Array, mode: str, damp: float) -> Any:
    """The node with a part of its kernel as factors, if it saw any input."""
    rank = node.lora_a.shape[-1]
    parts = lambda matrix, moment: _parts(matrix, moment, rank, node.scale, mode, damp)
    found = mapped(node, parts, matrices(node, dense(node.base)), moment)
    old = node.lora_a, node.lora_b
    new = [x.reshape(like.shape).astype(like.dtype) for x, like in zip(found, old, strict=True)]
    started = node.start or (node.lora_a, jnp.zeros_like(node.lora_b))
    pick = lambda ours, theirs: jnp.where(jnp.any(moment != 0), ours, theirs)
    lora_a, lora_b = map(pick, new, old)
    return dataclasses.replace(node, lora_a=lora_a, lora_b=lora_b, start=tuple(map(pick, new, started)))
