"""Riemannian preconditioning: gradients of A and B whose step on A B does not depend on how A B is factorised."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.interpret.products import contract, wide
from jlora.nodes.fields import leaf_fields
from jlora.nodes.node import is_node
from jlora.optim.placement import in_whole
from jlora.variants.adalora import AdaLoraParam

OTHER = {"lora_a": "lora_b", "lora_b": "lora_a"}
FLOOR = 4  # in units of float32's resolution of a Gram matrix: below 1, those of dependent columns have no root


def precondition(damping: float = 1e-6) -> optax.GradientTransformation:
    """Multiplies the gradients of A by ``(B B^T + damping I)^-1`` and those of B by ``(A^T A + damping I)^-1``.

    This is the gradient in a metric of the product. To first order the step of ``A B`` is the same for ``A G`` and
    ``G^-1 B``. So different sizes of A and B no longer slow training down, and neither do different singular values.
    For each stacked layer or expert it costs two r x r Cholesky factors and four products of rank r, in float32.

    It changes the gradients of every node with the fields ``lora_a``, of shape (batch..., in..., r), and ``lora_b``, of
    shape (batch..., r, out...), whose product is the update. All other leaves pass as they are, and so do AdaLoRA's
    factors, which its regulariser holds orthogonal. Where A is frozen (LoRA-FA) only B's gradient changes. It then
    needs the values of A, so chain it outside: ``optax.chain(precondition(), jlora.optimizer(tx, params))``.

    Args:
      damping: added to the diagonals. It is at least 4 times float32's resolution of the matrix's trace: linearly
        dependent rows of B would give NaN without.

    Returns:
      A transformation of gradients; its `update` needs the parameters. It keeps no state.

    Raises:
      ValueError: if `damping` is not positive and finite; from `init`, if no node of the tree has such factors or a
        frozen A is out of sight; from `update` without parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> axes = jlora.Axes((0,), (1,))
      >>> params = {"kernel": jlora.LoraParam(jnp.ones((2, 2)), jnp.eye(2), 2 * jnp.eye(2), axes=axes)}
      >>> tx = jlora.optimizer(optax.chain(jlora.optim.precondition(), optax.sgd(1.0)), params)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> jnp.round(updates["kernel"].lora_a[0], 3)  # the gradient of A over B B^T, which is 4 I
      Array([-0.25, -0.25], dtype=float32)

    References:
      Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv:2402.02347.
    """
    if not 0 < damping < math.inf:
        raise ValueError(f"precondition: damping must be a positive number, found {damping!r}")

    def init(params: Any) -> optax.EmptyState:
        nodes = [x for x in jax.tree.leaves(params, is_leaf=is_node) if _is_product(x)]
        if not nodes:
            raise ValueError(
                "precondition: no node of this tree has factors lora_a and lora_b whose product is its update; "
                'jlora.wrap makes them with variant="lora", "dora" or "lora_fa"'
            )
        for node in nodes:
            _check_seen(node)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("precondition: it needs the parameters: tx.update(grads, state, params)")
        solved = lambda grads, node: _solved(grads, node, damping) if _is_product(grads) else grads
        return jax.tree.map(solved, updates, params, is_leaf=lambda x: x is None or is_node(x)), state

    return optax.GradientTransformation(init, update)


def _is_product(x: Any) -> bool:
    """Whether a leaf stands for W + A B, and at least one of the factors trains."""
    return is_node(x) and not isinstance(x, AdaLoraParam) and OTHER.keys() <= _names(x) and bool(_trained(x))


def _names(node: Any) -> set[str]:
    return {field.name for field in leaf_fields(node)}


def _trained(node: Any) -> list[str]:
    """Which of the factors train."""
    return [f.name for f in leaf_fields(node) if f.name in OTHER and f.metadata.get("trained")]


def _check_seen(node: Any) -> None:
    for name in OTHER:
        if not hasattr(getattr(node, name), "shape"):
            raise ValueError(
                f"precondition: the {name} of a {type(node).__name__} is frozen, and out of sight here. Give it the "
                "whole tree: optax.chain(jlora.optim.precondition(), jlora.optimizer(tx, params))"
            )


def _solved(grads: Any, node: Any, damping: float) -> Any:
    """The gradients of a node, with those of its factors that train preconditioned by the other factor."""
    _check_seen(node)
    solve = lambda name: _applied(_half_inverse(node, OTHER[name], damping), grads, name)
    return dataclasses.replace(grads, **{name: solve(name) for name in _trained(node)})


def _half_inverse(node: Any, name: str, damping: float) -> jax.Array:
    """``L^-1``, (batch..., r, r), for the Cholesky factor L of a factor's damped Gram matrix."""
    factor, batch = _wide(getattr(node, name)), node.axes.batch_axis
    gram = _contract(factor, _labels(node, name, "r"), factor, _labels(node, name, "q"), (*batch, "r", "q"))
    (half,) = in_whole(lambda gram: [_inverse_root(gram, damping)], [gram])
    return half


def _inverse_root(gram: jax.Array, damping: float) -> jax.Array:
    floor = FLOOR * float(jnp.finfo(gram.dtype).eps) * jnp.trace(gram, axis1=-2, axis2=-1)
    one = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    root = jnp.linalg.cholesky(gram + jnp.maximum(floor, damping)[..., None, None] * one)
    return jax.lax.linalg.triangular_solve(root, jnp.broadcast_to(one, gram.shape), left_side=True, lower=True)


def _applied(half: jax.Array, grads: Any, name: str) -> jax.Array:
    """``L^-T (L^-1 G)`` over the rank of a gradient: only products meet it, so it stays where it is placed."""
    grad, batch = getattr(grads, name), grads.axes.batch_axis
    of_rank = lambda rank: _labels(grads, name, rank)
    once = _contract(half, (*batch, "s", "r"), _wide(grad), of_rank("r"), of_rank("s"))
    return _contract(half, (*batch, "s", "q"), once, of_rank("s"), of_rank("q")).astype(grad.dtype)


def _labels(node: Any, name: str, rank: str) -> tuple[Any, ...]:
    axes = node.axes
    if name == "lora_a":
        return (*axes.batch_axis, *axes.in_axis, rank)
    return (*axes.batch_axis, rank, *axes.out_axis)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(wide(x.dtype))


_contract = functools.partial(contract, precision=jax.lax.Precision.HIGHEST)
