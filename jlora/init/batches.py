"""What starts from data have in common: the nodes that may start anywhere, batches, sums over them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.compat import is_traced
from jlora.nodes.fields import sizes_of
from jlora.nodes.node import is_node
from jlora.targets.paths import flatten, refill


def adapted(name: str, tree: Any) -> tuple[list[str], list[Any], Callable[[list[Any]], Any]]:
    """The nodes with low-rank factors that may start anywhere, by path, and a function that puts others there."""
    paths, leaves, treedef = flatten(tree, is_node)
    for several in (leaf for leaf in leaves if is_node(leaf) and hasattr(leaf, "members")):
        raise ValueError(f"{name}: {several.advice()}")
    places = [i for i, leaf in enumerate(leaves) if is_node(leaf) and hasattr(leaf, "start")]
    if not places:
        kinds = sorted({type(leaf).__name__ for leaf in leaves if is_node(leaf)})
        found = f"it has {', '.join(kinds)}" if kinds else "nothing in it is wrapped"
        raise ValueError(
            f"{name}: the second argument is a tree of jlora.wrap with variant 'lora', 'dora' or 'lora_fa'; {found}"
        )
    return [paths[i] for i in places], [leaves[i] for i in places], refill(treedef, leaves, places)


def some(name: str, batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{name}: batches is an array of shape {batches.shape}; it takes a sequence of batches, [batch]"
        )
    batches = list(batches)
    if not batches:
        raise ValueError(
            f"{name}: batches is empty; it takes one batch or more, each as the function's second argument"
        )
    return batches


def jitted(fn: Callable[..., Any], batches: list[Any]) -> Callable[..., Any]:
    """Compiled once for all batches, if they hold arrays alone."""
    are_arrays = all(isinstance(x, (jax.Array, np.ndarray)) for x in jax.tree.leaves(batches))
    return jax.jit(fn) if are_arrays else fn


def summed(trees: Iterable[Any]) -> Any:
    return functools.reduce(lambda one, other: jax.tree.map(jnp.add, one, other), trees)


def checked(name: str, paths: Sequence[str], found: list[jax.Array], what: str) -> list[jax.Array]:
    """What the batches gave each kernel, if it is finite and not all of it is zero; under `jax.jit` nothing is seen.

    Args:
      what: it is, in words.
    """
    if any(map(is_traced, found)):
        return found
    for path, x in zip(paths, found, strict=True):
        if not bool(jnp.all(jnp.isfinite(x))):
            raise ValueError(
                f"{name}: the {what} of {path} have NaN or infinite values; look at the batches and the base"
            )
    if not any(bool(jnp.any(x != 0)) for x in found):
        raise ValueError(
            f"{name}: the {what} of all adapted kernels are zero: no gradient flows from the function's result to "
            "them. Give a function that uses the parameters that it is given, and returns logits or a loss, not what "
            "argmax or sampling makes of them"
        )
    return found


def size(node: Any, word: str) -> int:
    return math.prod(sizes_of(node, word))
