"""Updates without small factors: the kernel is computed with them, at the cost of a merged one."""

from __future__ import annotations

from typing import Any

import jax

from jlora.interpret.products import wide
from jlora.interpret.quantised import array_of


def added(node: Any, delta: jax.Array) -> jax.Array:
    """The kernel of a node with an update of shape (batch..., in..., out...), of the adapted layers."""
    base = array_of(node.base)
    beside = node.beside(delta[..., None], "batch in out one")[..., 0]
    return (base.astype(wide(base.dtype)) + beside).astype(base.dtype)
