"""Names of leaves.

A leaf's path is its keys joined by ``/``: ``encoder/layer_0/query/kernel``. The ``value`` that NNX variables and
linen's metadata boxes put behind every leaf is not part of it.
"""

from __future__ import annotations

import collections
import math
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


def flatten_named(name: str, tree: Any, is_leaf: IsLeaf | None = None) -> tuple[list[str], list[Any], Any]:
    """As `flatten`, for functions that tell leaves by their paths.

    Raises:
      ValueError: if two leaves have the same path.
    """
    paths, leaves, treedef = flatten(tree, is_leaf)
    if len({*paths}) < len(paths):
        path = next(path for path, count in collections.Counter(paths).items() if count > 1)
        keys = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]
        places = " and ".join(jax.tree_util.keystr(k) for k, other in zip(keys, paths, strict=True) if other == path)
        raise ValueError(f"{name}: {places} have the same path, {path}, so that no name tells them apart; rename one")
    return paths, leaves, treedef


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


def in_order_of(tree: Any, like: Any) -> Any:
    """The tree with the keys of its dicts in the order that they have in one of the same structure.

    JAX puts them in order by name whenever it builds a tree.
    """
    if tree is like or jax.tree_util.all_leaves([tree]):
        return tree
    one_level = lambda x: lambda y: y is not x
    parts, treedef = jax.tree.flatten(tree, is_leaf=one_level(tree))
    others = jax.tree.leaves(like, is_leaf=one_level(like))
    if len(parts) != len(others):
        return tree
    ordered = treedef.unflatten(list(map(in_order_of, parts, others)))
    if type(like) is not type(ordered) or type(like) not in (dict, collections.defaultdict):
        return ordered
    items = {key: ordered[key] for key in like}
    return items if type(like) is dict else collections.defaultdict(ordered.default_factory, items)


def checked_key(name: str, key: Any) -> Any:
    """The PRNG key, if it is one.

    Raises:
      TypeError: if it is not, or several.
    """
    dtype, shape = getattr(key, "dtype", None), tuple(getattr(key, "shape", ()))
    if dtype is None or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == np.uint32):
        raise TypeError(f"{name} must be a PRNG key, such as jax.random.key(0), found {key!r}")
    one = () if dtype != np.uint32 else jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    if shape != one:
        several = shape[len(shape) - len(one) :] == one and len(shape) > len(one)
        count = math.prod(shape[: len(shape) - len(one)])
        found = f"{count} of them; jax.vmap takes several" if several else f"{dtype} of shape {shape}"
        raise TypeError(f"{name} must be one PRNG key, such as jax.random.key(0), found {found}")
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
