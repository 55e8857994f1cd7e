"""Updates without small factors: the kernel is computed with them, at the cost of a merged one."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.factors.mersenne import Generator
from jlora.interpret.manual import check_whole
from jlora.interpret.products import wide
from jlora.interpret.quantised import array_of, codes_of
from jlora.nodes.fields import sizes_of


def added(node: Any, delta: jax.Array) -> jax.Array:
    """The kernel of a node with an update of shape (batch..., in..., out...), of the adapted layers."""
    base = array_of(node.base)
    beside = node.beside(delta[..., None], "batch in out one")[..., 0]
    return (base.astype(wide(base.dtype)) + beside).astype(base.dtype)


def size_of(node: Any) -> tuple[int, int]:
    """The numbers of outputs and of inputs of a node or of a kernel."""
    outs, ins = (math.prod(sizes_of(node, word)) for word in ("out", "in"))
    return outs, ins


def whole_size(node: Any, name: str, what: str) -> tuple[int, int]:
    """The same, for what has its places in the whole kernel: a shard is refused."""
    check_whole(name, what, codes_of(node.base))
    return size_of(node)


def with_matrix(node: Any, delta: jax.Array) -> jax.Array:
    """The kernel of a node with an update of shape (batch..., outputs, inputs)."""
    return added(node, delta.mT.reshape(*delta.shape[:-2], *sizes_of(node, "in"), *sizes_of(node, "out")))


def scattered(values: jax.Array, places: Any, shape: tuple[int, int]) -> jax.Array:
    """Matrices (batch..., outputs, inputs) of zeros but for values (batch..., n), which are added at (batch..., 2, n).

    Places outside are left out.
    """
    one = lambda values, places: jnp.zeros(shape, values.dtype).at[places[0], places[1]].add(values, mode="drop")
    flat = values.reshape(-1, values.shape[-1])
    each = jnp.broadcast_to(places, (*values.shape[:-1], *places.shape[-2:])).reshape(len(flat), *places.shape[-2:])
    return jax.vmap(one)(flat, each).reshape(*values.shape[:-1], *shape)


@functools.lru_cache(maxsize=64)
def drawn(seed: int, shape: tuple[int, int], count: int) -> np.ndarray:
    """Places of a matrix, (2, count), that differ: those that PyTorch draws, by ``torch.randperm``, with this seed.

    Example:
      >>> drawn(777, (2, 3), 3)
      array([[1, 0, 0],
             [2, 0, 1]])
    """
    first = Generator(seed).permutation(math.prod(shape), count)
    return np.stack(np.divmod(first, shape[1]))
