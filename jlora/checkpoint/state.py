"""The state that is saved beside an adapter: any pytree of arrays, most often an optimizer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jlora import sharding
from jlora.checkpoint import backend

STATE = "state"


def contents_of(state: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of a state by name, and what is said of them.

    Raises:
      TypeError: if a leaf is no array of numbers.
    """
    arrays = {jax.tree_util.keystr(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(state)}
    return arrays, {name: _told(name, x) for name, x in arrays.items()}


def _told(name: str, x: Any) -> dict[str, Any]:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"Checkpoints: state{name} is no array but {x!r}; what is no array goes into extra=, as JSON")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(f"Checkpoints: state{name} is a random key; put jax.random.key_data(key) in its place")
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def restored(directory: Any, state: Any, told: Mapping[str, Any], tree: Any) -> Any:
    """A saved state in the structure of the one given, each array placed.

    Args:
      directory: of the step.
      state: concrete or abstract; None: it is not read.
      told: of its arrays, by `contents_of`.
      tree: the wrapped tree of the step, beside which lies what has no sharding.
    """
    if state is None:
        return None
    pairs, treedef = jax.tree_util.tree_flatten_with_path(state)
    _check(directory, contents_of(state)[1], told)
    beside = treedef.flatten_up_to(sharding.of_state(state, tree))
    targets = {jax.tree_util.keystr(keys): _target(x, place) for (keys, x), place in zip(pairs, beside, strict=True)}
    values = backend.read_arrays(directory, STATE, targets) if targets else {}
    return treedef.unflatten([values[jax.tree_util.keystr(keys)] for keys, _ in pairs])


def _check(directory: Any, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name in sorted({*ours} | {*theirs}):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"Checkpoints.load: the state is not the one that {directory} has: state{name} is {_text(ours, name)} "
                f"here and {_text(theirs, name)} there. Give what the same optimizer makes of the same tree"
            )


def _text(told: Mapping[str, Any], name: str) -> str:
    return f"{told[name]['dtype']}{told[name]['shape']}" if name in told else "missing"


def _target(leaf: Any, beside: NamedSharding | None) -> Any:
    """What is to be read for a leaf: as it is, or with the place of what it belongs to."""
    if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_place(leaf, beside))


def _place(leaf: Any, beside: NamedSharding | None) -> Any:
    at = leaf.sharding
    if isinstance(leaf, jax.Array):
        return at if leaf.committed or len(at.device_set) > 1 else None
    return at if isinstance(at, NamedSharding) and isinstance(at.mesh, Mesh) else beside
