"""Which kernel gets which rank, by what each direction of its inputs explains: EVA's redistribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora.interpret.compat import is_traced
from jlora.nodes.fields import sizes_of


def ratio(rho: Any, nodes: Sequence[Any]) -> float:
    """The setting, if ranks can be chosen by it."""
    if not isinstance(rho, (int, float)) or isinstance(rho, bool) or not 1 <= rho < math.inf:
        raise ValueError(f"eva: rho must be a number of at least 1, found {rho!r}; 1 leaves all ranks as they are")
    if rho > 1 and any(is_traced(node.lora_a) for node in nodes):
        raise ValueError(
            f"eva: rho={rho} chooses ranks by the data, and ranks are shapes, which a compiled function cannot choose. "
            "Call eva outside jax.jit, or leave rho at 1"
        )
    return float(rho)


def largest(node: Any, rho: float, width: int) -> int:
    """The largest rank that a kernel may get, of kernels that have so many inputs or outputs at least."""
    return min(round(node.lora_a.shape[-1] * rho), width)


def shared_out(nodes: Sequence[Any], explained: Sequence[np.ndarray]) -> list[int]:
    """The rank of each node: the directions that explain the most get the ranks that all nodes have together.

    Args:
      nodes: each stands for one kernel, or for as many as its batch axes have.
      explained: of each node, what each of its directions explains of the variance of its kernel's inputs, as a share,
        largest first; as many as the rank may at most be.
    """
    kernels = [math.prod(sizes_of(node, "batch")) for node in nodes]
    left = sum(node.lora_a.shape[-1] * count for node, count in zip(nodes, kernels, strict=True))
    ranks = [0] * len(nodes)
    directions = [(-float(share), place) for place, shares in enumerate(explained) for share in shares]
    for _, place in sorted(directions, key=lambda pair: pair[0]):
        if kernels[place] <= left:
            ranks[place] += 1
            left -= kernels[place]
    return ranks
