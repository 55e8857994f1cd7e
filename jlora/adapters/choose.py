"""One adapter of several, or their weighted sum, as a wrapped tree."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.adapters.apart import count_of, own
from jlora.adapters.member import member
from jlora.adapters.stacked import StackedParam
from jlora.adapters.sums import summed
from jlora.interpret.compat import is_traced
from jlora.nodes.node import is_unit
from jlora.targets.paths import flatten


def select(stacked: Any, i: Any) -> Any:
    """One of several adapters, as the wrapped tree that it was.

    Args:
      stacked: a tree that `stack` returned.
      i: its number, from 0 on; -1 is the base itself. It may be traced, batched by `jax.vmap`: the result has then as
        many ranks as the largest of them has, with zeros for the others; a number of no adapter gives NaN.

    Returns:
      A wrapped tree; the plain one for -1, or where that adapter was the base.

    Raises:
      IndexError: if there is no such adapter.
      TypeError: if the tree does not hold several adapters, or i is no whole number.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> trees = [jlora.wrap(params, jlora.LoraSpec(rank=2, seed=seed)) for seed in range(3)]
      >>> stacked = jlora.adapters.stack(trees)
      >>> one = jax.jit(jlora.adapters.select)(stacked, 2)
      >>> bool((one["kernel"].lora_a == trees[2]["kernel"].lora_a).all())
      True
    """
    leaves, treedef = jax.tree.flatten(stacked, is_leaf=is_unit)
    count = count_of("select", leaves)
    if is_traced(i):
        return treedef.unflatten([_traced(leaf, i) for leaf in leaves])
    try:
        number = operator.index(i)
    except TypeError:
        raise TypeError(f"select: i is the number of an adapter, found {i!r}") from None
    if not -1 <= number < count:
        raise IndexError(f"select: this tree holds adapters 0 to {count - 1}, and -1 is the base; found {number}")
    pick = lambda leaf: own(leaf, number) if number >= 0 else _base(leaf)
    return treedef.unflatten(list(map(pick, leaves)))


def _base(leaf: Any) -> Any:
    return leaf.base if isinstance(leaf, StackedParam) else leaf


def _traced(leaf: Any, number: Any) -> Any:
    return at(leaf, number) if isinstance(leaf, StackedParam) else leaf


def at(node: StackedParam, number: Any) -> Any:
    """The node of one adapter, of a number that is traced."""
    inside = jnp.clip(number, 0, len(node.members) - 1)
    return member(node, lambda x, axis: lax.dynamic_index_in_dim(x, inside, axis, keepdims=False), number)


def mix(stacked: Any, weights: Any) -> Any:
    """The sum of several adapters' updates, each times its weight, as a wrapped tree: it is exact.

    LoRA, LoRA-FA, AdaLoRA, VeRA, LoHa and LoKr give `jlora.LoraParam` nodes with the ranks of all side by side; IA3
    gives one of its kind, DoRA likewise; so do leaves trained in full and biases. OFT has no sums.

    Args:
      stacked: a tree that `stack` returned, of n adapters.
      weights: of shape (n,); they may be negative, traced, batched by `jax.vmap`, differentiated. One-hot ones select.

    Returns:
      A wrapped tree with one adapter for each kernel that any of the n adapts.

    Raises:
      TypeError: if the tree does not hold several adapters.
      ValueError: if the weights are not n, or an adapter is none that can be summed.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> trees = [jlora.wrap(params, jlora.LoraSpec(rank=2, seed=seed)) for seed in range(3)]
      >>> stacked = jlora.adapters.stack(trees)
      >>> mean = jlora.adapters.mix(stacked, jnp.full(3, 1 / 3))
      >>> mean["kernel"].rank
      6

      A mixture of its own for each row:

      >>> call = jlora.apply(lambda p, x: x @ p["kernel"])
      >>> of_row = lambda weights, x: call(jlora.adapters.mix(stacked, weights), x)
      >>> jax.vmap(of_row)(jnp.ones((5, 3)) / 3, jnp.ones((5, 4))).shape
      (5, 3)
    """
    paths, leaves, treedef = flatten(stacked, is_unit)
    count = count_of("mix", leaves)
    weights = jnp.asarray(weights)
    if weights.shape != (count,):
        raise ValueError(f"mix: weights have shape {weights.shape}; this tree holds {count} adapters, so ({count},)")
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    pairs = zip(paths, leaves, strict=True)
    return treedef.unflatten([summed(p, x, weights) if isinstance(x, StackedParam) else x for p, x in pairs])
