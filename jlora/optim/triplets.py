"""Triplets of AdaLoRA kernels (a singular value, its column of A, its row of B): how much each matters, which stay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.products import wide
from jlora.nodes.node import is_node
from jlora.optim.placement import in_whole
from jlora.variants.adalora import AdaLoraParam

FACTORS = ("lora_a", "lora_e", "lora_b")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many triplets are kept after each update."""

    target_rank: int
    start: int
    end: int
    interval: int

    def budget(self, step: jax.Array, triplets: int, kernels: int) -> jax.Array:
        """Falls with the cube of the time that is left, from all triplets to `target_rank` for each of the kernels."""
        target = self.target_rank * kernels
        left = jnp.clip((self.end - step) / (self.end - self.start), 0, 1)
        # rounded down; the nudge lets float32 find the whole numbers
        return target + jnp.floor((triplets - target) * left**3 * (1 + 1e-6)).astype(jnp.int32)

    def prunes(self, step: jax.Array) -> jax.Array:
        """Whether the budget is enforced after this update."""
        return (step > self.start) & ((step % self.interval == 0) | (step >= self.end))


def map_nodes(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """The tree with ``fn(node, ...)`` in place of each AdaLoRA node and None for every other leaf."""
    made = lambda x, *others: fn(x, *others) if isinstance(x, AdaLoraParam) else None
    return jax.tree.map(made, tree, *rest, is_leaf=is_part)


def is_part(x: Any) -> bool:
    return x is None or is_node(x)


def weights(fn: Callable[..., jax.Array], node: Any, *others: Any) -> Any:
    """The node with ``fn`` of each of its factors, and without its base."""
    made = {name: fn(*(getattr(x, name) for x in (node, *others))) for name in FACTORS}
    return dataclasses.replace(node, base=None, **made)


def sensitivity_of(node: Any, updates: Any, grads: Any) -> Any:
    """``|w * g|``: how much the loss would change without the weight, to first order."""

    def change(weight: jax.Array, update: jax.Array, grad: jax.Array) -> jax.Array:
        sums = wide(weight.dtype)
        return jnp.abs((weight.astype(sums) + update.astype(sums)) * grad.astype(sums))

    return weights(change, node, updates, grads)


def running_mean(beta: jax.Array, mean: Any, now: Any) -> Any:
    """A step of a running mean."""
    return jax.tree.map(lambda m, x: (beta * m + (1 - beta) * x).astype(m.dtype), mean, now)


def importance(sensitivity: Any, uncertainty: Any) -> jax.Array:
    """The score of each triplet, of shape (batch..., r)."""
    score = weights(jnp.multiply, sensitivity, uncertainty)
    n = score.lora_e.ndim - 1
    columns = score.lora_a.mean(range(n, score.lora_a.ndim - 1))
    return score.lora_e + columns + score.lora_b.mean(range(n + 1, score.lora_b.ndim))


def chosen(scores: Any, schedule: Schedule, step: jax.Array) -> Any:
    """Which triplets are among the best of all kernels: exactly as many as the budget has."""
    leaves, treedef = jax.tree.flatten(scores)
    kernels = sum(math.prod(x.shape[:-1]) for x in leaves)
    budget = schedule.budget(step, sum(x.size for x in leaves), kernels)
    return treedef.unflatten(in_whole(lambda *leaves: _largest(leaves, budget), leaves))


def _largest(arrays: Sequence[jax.Array], number: jax.Array) -> list[jax.Array]:
    """Where the largest numbers of all arrays together are; of equal ones the first."""
    flat = jnp.concatenate([x.ravel() for x in arrays])
    is_large = jnp.zeros(flat.size, bool).at[jnp.argsort(-flat)].set(jnp.arange(flat.size) < number)
    parts = jnp.split(is_large, np.cumsum([x.size for x in arrays])[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, arrays, strict=True)]


def pruned(updates: Any, params: Any, keep: Any, due: jax.Array) -> Any:
    """The updates, with that which makes ``lora_e`` zero where it is not kept."""

    def pruned(node: Any, update: Any, kept: Any) -> Any:
        if not isinstance(node, AdaLoraParam):
            return update
        sums = wide(update.lora_e.dtype)
        to_zero, step = -node.lora_e.astype(sums), update.lora_e.astype(sums)
        return dataclasses.replace(update, lora_e=jnp.where(due & ~kept, to_zero, step))

    return jax.tree.map(pruned, params, updates, keep, is_leaf=is_part)
