"""Whether gradients, state and parameters belong together, and an error that says where they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora.nodes.node import is_node
from jlora.targets.paths import flatten
from jlora.tree import TRAINABLE, labels


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Unchanged:
    """The update of a frozen leaf: what it is added to comes back as it was.

    Not even zero may be added: that would turn -0.0 into 0.0 and flush subnormals. It holds no array, so it costs
    nothing, and other transformations pass it by.
    """

    __array_ufunc__ = None

    def __radd__(self, leaf: Any) -> Any:
        if jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key):
            _check_cast(leaf)
        return leaf


def _check_cast(key: Any) -> None:
    """`optax.apply_updates` casts every leaf to its own type; JAX casts a key while it traces alone."""
    try:
        key.astype(key.dtype)
    except NotImplementedError:
        raise TypeError(
            f"optax.apply_updates: the tree has a random key ({key.dtype}) among its frozen leaves, which JAX casts "
            "only under jit. Compile the step, or this call alone: jax.jit(optax.apply_updates)(params, updates)"
        ) from None


def is_hole(x: Any) -> bool:
    """Whether there is no gradient, or no leaf, in a place of a tree."""
    return x is None or isinstance(x, (Unchanged, optax.MaskedNode))


def shapes_of(tree: Any) -> Any:
    """The tree with the shapes of what trains, and a scalar for each frozen leaf, whatever it is."""
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    shape = lambda mark, x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) if mark == TRAINABLE else scalar
    return jax.tree.map(shape, labels(tree), tree)


def check_gradients(where: str, grads: Any, tree: Any, of: str, *, shapes: bool = True) -> None:
    """Refuses gradients whose structure is not the tree's, holes aside, or that do not fit what trains.

    Args:
      where: the function's name, for the error.
      grads: the gradients.
      tree: what they should be gradients of.
      of: what the tree is, in words.
      shapes: whether the shapes of what trains are compared too.
    """
    found, treedef = jax.tree.flatten(grads, is_leaf=is_hole)
    leaves, expected = jax.tree.flatten(tree, is_leaf=is_hole)
    marks = jax.tree.leaves(labels(tree), is_leaf=is_hole)
    fits = lambda mark, x, leaf: mark != TRAINABLE or _has_shape(x, leaf, shapes)
    if treedef == expected and all(map(fits, marks, found, leaves)):
        return
    path, wanted, got = _difference(grads, tree, shapes)
    raise ValueError(
        f"{where}: the gradients do not fit {of}{f' at {path}' if path else ''}: expected {wanted}, found {got}. "
        "Take them by jlora.grad(loss)(params), from the parameters that tx.init and tx.update get"
    )


def _has_shape(x: Any, leaf: Any, shapes: bool) -> bool:
    return not is_hole(x) and (not shapes or jnp.shape(x) == jnp.shape(leaf))


def _difference(found: Any, expected: Any, shapes: bool) -> tuple[str, str, str]:
    """The first path where two trees differ, and what is there in the one and in the other."""
    is_part = lambda x: is_hole(x) or is_node(x)
    (paths, leaves, _), (others, rest, _) = flatten(expected, is_part), flatten(found, is_part)
    wanted, got = dict(zip(paths, leaves, strict=True)), dict(zip(others, rest, strict=True))
    for path in dict.fromkeys([*paths, *others]):
        if path not in wanted or path not in got:
            return path, _kind(wanted[path]) if path in wanted else "no leaf", _kind(got.get(path))
        told = _differing(wanted[path], got[path], shapes)
        if told:
            return f"{path}{told[0]}", *told[1:]
    return "", f"a tree of {type(expected).__name__}", f"one of {type(found).__name__} with other containers"


def _differing(wanted: Any, got: Any, shapes: bool) -> tuple[str, str, str] | None:
    """The field where two leaves differ, and how; None where they fit."""
    if not (is_node(wanted) and is_node(got) and type(wanted) is type(got)):
        return ("", _kind(wanted), _kind(got)) if is_node(wanted) or is_node(got) else None
    return _differing_arrays(wanted, got, shapes) or _differing_settings(wanted, got)


def _differing_arrays(wanted: Any, got: Any, shapes: bool) -> tuple[str, str, str] | None:
    of_node = lambda x: flatten(x, is_hole)[:2]
    (paths, leaves), (others, rest), (_, marks) = of_node(wanted), of_node(got), of_node(labels(wanted))
    if paths != others:
        path = min({*paths} ^ {*others})
        return (f"/{path}", "an array", "none") if path in paths else (f"/{path}", "no array", "one")
    for path, x, y, mark in zip(paths, leaves, rest, marks, strict=True):
        if mark == TRAINABLE and not _has_shape(y, x, shapes):
            return f"/{path}", _kind(x), _kind(y)
    return None


def _differing_settings(wanted: Any, got: Any) -> tuple[str, str, str] | None:
    for name in (field.name for field in dataclasses.fields(wanted) if field.metadata.get("static")):
        x, y = getattr(wanted, name), getattr(got, name)
        if x != y:
            return "", f"{name}={x!r}", f"{name}={y!r}"
    return None


def _kind(x: Any) -> str:
    if is_node(x):
        return f"a {type(x).__name__}"
    return "nothing" if is_hole(x) else f"an array of shape {tuple(jnp.shape(x))}"


def check_state(state: Any, init: Callable[[Any], Any], tree: Any) -> None:
    """Refuses a state that is not of the structure and the shapes that `init` gives for a tree."""
    is_place = lambda x: x is None or isinstance(x, optax.MaskedNode)
    (paths, leaves, treedef), (others, rest, other) = (
        flatten(x, is_place) for x in (jax.eval_shape(init, shapes_of(tree)), state)
    )
    kind = lambda x: type(x).__name__ if is_place(x) or not hasattr(x, "shape") else f"shape {tuple(x.shape)}"
    wanted, got = (dict(zip(names, map(kind, x), strict=True)) for names, x in ((paths, leaves), (others, rest)))
    differing = [path for path in [*paths, *others] if wanted.get(path) != got.get(path)]
    if treedef == other and not differing:
        return
    path = differing[0] if differing else ""
    raise ValueError(
        f"optimizer: the state does not fit the parameters{f' at {path}' if path else ''}: expected "
        f"{wanted.get(path, 'none')}, found {got.get(path, 'none')}. It must come from the `init` of this "
        "transformation for this very tree (or this half of it); pass the parameters as well: "
        "tx.update(grads, state, params)"
    )


def same_shapes(x: Any, y: Any) -> bool:
    """Whether the arrays of two trees have the same shapes, in order."""
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(x)] == [jnp.shape(leaf) for leaf in jax.tree.leaves(y)]
