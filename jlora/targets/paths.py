"""Names of leaves.

A leaf's path is its keys joined by ``/``: ``encoder/layer_0/query/kernel``. The ``value`` that NNX variables and
linen's metadata boxes put behind every leaf is not part of it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

IsLeaf = Callable[[Any], bool]


def flatten(tree: Any, is_leaf: IsLeaf | None = None) -> tuple[list[str], list[Any], Any]:
    """Returns the paths, the leaves and the structure of `tree`."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    siblings = collections.Counter(
        keys[:-1] for keys in {keys[:n] for keys, _ in pairs for n in range(1, len(keys) + 1)}
    )
    named = [path_of(keys, is_box=siblings[keys[:-1]] == 1) for keys, _ in pairs]
    return named, [leaf for _, leaf in pairs], treedef


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree (concrete or abstract), and a function that puts others in their places.

    NumPy's integers stay where they are, since functions use them as static values.
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
    return [leaves[i] for i in places], refill(treedef, leaves, places)


def refill(treedef: Any, leaves: list[Any], places: list[int]) -> Callable[[list[Any]], Any]:
    """A function that rebuilds a tree with other values in some places of its leaves."""

    def rebuild(values: list[Any]) -> Any:
        filled = dict(zip(places, values, strict=True))
        return treedef.unflatten([filled.get(i, leaf) for i, leaf in enumerate(leaves)])

    return rebuild


def checked_key(name: str, key: Any) -> Any:
    """The PRNG key, if it is one.

    Raises:
      TypeError: if it is not.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32):
        raise TypeError(f"{name} must be a PRNG key, such as jax.random.key(0), found {key!r}")
    return key


def _is_array(leaf: Any) -> bool:
    is_numpy = isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.inexact)
    return is_numpy or isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct))


def path_of(keys: tuple[Any, ...], is_box: bool = True) -> str:
    """Joins JAX's key path into ``a/b/kernel``; `is_box` says that what has a last ``.value`` has nothing else."""
    if is_box and len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in keys)


def module_of(path: str) -> str:
    """The path of the module that holds a leaf: all but the last name."""
    return path.rpartition("/")[0]
