"""`stack`: adapters on one base as one wrapped tree; `unstack`: each as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters.apart import count_of, own
from jlora.adapters.stacked import OWN, Member, StackedParam, stacked_class
from jlora.adapters.together import of_nodes
from jlora.adapters.trees import are_same
from jlora.nodes.checks import check_whole
from jlora.nodes.node import TrainableParam, is_node, is_unit
from jlora.targets.paths import flatten_named

Named = Mapping[str, Any]


def stack(trees: Sequence[Any], *, base: Any = None) -> Any:
    """Several adapters on one base as one wrapped tree, whose factors have an axis of the adapters.

    Ranks, scales and targets may differ: ranks are filled up with zeros, and an adapter that lacks a kernel changes
    nothing there. The axis stands first, or behind the batch axes of a kernel that has some (scanned layers, experts);
    `jlora.adapters.axes` tells it. Each costs what the largest rank costs. Planned trees, of `jax.ShapeDtypeStruct`,
    give a plan.

    With n adapters of rank up to r, A is (batch..., n, r, in...) and B is (batch..., n, r, out...).

    Args:
      trees: wrapped trees, whose bases must be equal. None, or the plain tree, is the base without an adapter.
      base: the plain tree. It is needed where a leaf is trained in full by all of them, since none keeps its original:
        without it adapter -1, the base, has NaN there.

    Returns:
      A wrapped tree for `select`, `mix`, `batched`, `unstack`; also for `jlora.optimizer`, `jlora.partition` and other
      functions of trees.

    Raises:
      TypeError: if none of the trees is wrapped, or `trees` is no list or tuple.
      ValueError: if the trees are on different bases, or their adapters of one kernel are of different kinds, axes, or
        settings other than rank, scale, dropout and layers; if one is half of a tree, or holds several adapters
        already.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> trees = [jlora.wrap(params, jlora.LoraSpec(rank=r, seed=r)) for r in (1, 2)]
      >>> stacked = jlora.adapters.stack([*trees, None])
      >>> stacked["kernel"].lora_a.shape, stacked["kernel"].lora_b.shape
      ((3, 2, 4), (3, 2, 3))
      >>> jlora.adapters.select(stacked, 0)["kernel"].rank
      1
    """
    if not isinstance(trees, (list, tuple)):
        raise TypeError(f"stack takes a list of trees, found a {type(trees).__name__}")
    given = [tree for tree in trees if tree is not None]
    named = [flatten_named("stack", tree, is_unit) for tree in given]
    _check_trees(trees, named)
    plain = {} if base is None else dict(zip(*flatten_named("stack", base, is_unit)[:2], strict=True))
    paths, _, treedef = named[0]
    found = iter([dict(zip(paths, leaves, strict=True)) for paths, leaves, _ in named])
    members = [{} if tree is None else next(found) for tree in trees]
    return treedef.unflatten([_stacked(path, [m.get(path) for m in members], plain.get(path)) for path in paths])


def _check_trees(trees: Sequence[Any], named: Sequence[Any]) -> None:
    if not any(is_node(leaf) for _, leaves, _ in named for leaf in leaves):
        raise TypeError("stack takes trees that jlora.wrap returned; no leaf of these is wrapped")
    first = named[0][0]
    for number, (paths, leaves, _) in zip((i for i, t in enumerate(trees) if t is not None), named, strict=True):
        if paths != first:
            at = next(iter(sorted({*paths} ^ {*first})), first[0])
            raise ValueError(f"stack: trees {number} and 0 have different leaves, as at {at}; they need one base")
        for path, leaf in zip(paths, leaves, strict=True):
            if isinstance(leaf, StackedParam):
                raise ValueError(f"stack: {path} of tree {number} holds several adapters; unstack that tree first")
            if is_node(leaf):
                check_whole("stack", path, leaf)


def _stacked(path: str, leaves: Sequence[Any], plain: Any) -> Any:
    """The leaf that stands for all: None is one of the base itself."""
    nodes = {i: leaf for i, leaf in enumerate(leaves) if is_node(leaf)}
    bases = {i: leaf for i, leaf in enumerate(leaves) if leaf is not None and i not in nodes}
    in_full = all(isinstance(node, TrainableParam) for node in nodes.values())
    bases |= {} if in_full else {i: node.base for i, node in nodes.items()}
    bases |= {} if plain is None else {-1: plain}
    _check_same(path, bases)
    if not nodes:
        return next(iter(bases.values()))
    _check_alike(path, nodes)
    if in_full:
        if not bases and len(nodes) < len(leaves):
            raise ValueError(
                f"stack: {path} is trained in full by all trees, and none keeps what it was, so that None has no value "
                "there; give the plain tree in its place, or as base="
            )
        return _of_values(nodes, next(iter(bases.values()), None), len(leaves))
    base = bases[min(nodes)]
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(list(nodes.values()))):
        return _planned(path, nodes, len(leaves), base)
    return of_nodes(path, nodes, len(leaves), base)


def _planned(path: str, nodes: Mapping[int, Any], count: int, base: Any) -> Any:
    """The node of several adapters that are planned, without values."""
    beside = lambda node, base: dataclasses.replace(node, base=base)

    def bare(arrays: Mapping[int, Any]) -> Any:
        whole = {i: beside(node, base) for i, node in arrays.items()}
        return beside(of_nodes(path, whole, count, base), None)

    return beside(jax.eval_shape(bare, {i: beside(node, None) for i, node in nodes.items()}), base)


def _check_same(path: str, bases: Mapping[int, Any]) -> None:
    """Refuses bases that are not one."""
    (first, base), *others = bases.items() if bases else [(0, None)]
    for i, other in others:
        if not are_same(base, other):
            raise ValueError(
                f"stack: {path} is not the same in {_tree(first)} and {_tree(i)}: they stand on different bases, or "
                "copies that are traced and can't be compared (give all trees the very same arrays then, as by "
                "jlora.combine(half, frozen))"
            )


def _tree(number: int) -> str:
    return "base" if number < 0 else f"tree {number}"


def _check_alike(path: str, nodes: Mapping[int, Any]) -> None:
    """Refuses adapters of one kernel that have not one form."""
    (first, node), *others = nodes.items()
    for i, other in others:
        if type(node) is not type(other):
            kinds = f"{type(node).__name__} in tree {first} and {type(other).__name__} in tree {i}"
            raise ValueError(
                f"stack: {path} has {kinds}; adapters of one kernel are of one kind. Stack each "
                "kind by itself, or make plain LoRA of them: jlora.to_plain_lora(tree), or jlora.peft.low_rank(tree, "
                "rank)"
            )
        for name, x, y in _statics(node, other):
            if x != y:
                raise ValueError(
                    f"stack: {path} has {name}={x!r} in tree {first} and {y!r} in tree {i}; adapters of one kernel may "
                    "differ in rank, scale, dropout and layers only"
                )


def _statics(node: Any, other: Any) -> list[tuple[str, Any, Any]]:
    names = [f.name for f in dataclasses.fields(node) if f.metadata.get("static") and f.name not in OWN]
    return [(name, getattr(node, name), getattr(other, name)) for name in names]


def _of_values(nodes: Mapping[int, Any], base: Any, count: int) -> Any:
    """The node of a leaf that is trained in full by some."""
    some = next(iter(nodes.values())).base
    if base is None:
        base = some if isinstance(some, jax.ShapeDtypeStruct) else jnp.full_like(some, jnp.nan)
    values = [nodes[i].base if i in nodes else base for i in range(count)]
    is_planned = any(isinstance(x, jax.ShapeDtypeStruct) for x in values)
    value = jax.eval_shape(lambda *xs: jnp.stack(xs), *values) if is_planned else jnp.stack(values)
    return stacked_class(TrainableParam)(
        base=base,
        value=value,
        present=_flags([i in nodes for i in range(count)]),
        members=tuple(Member() if i in nodes else None for i in range(count)),
    )


def _flags(there: Any) -> tuple[Any, ...]:
    there = np.asarray(there)
    return () if there.all() else (jnp.asarray(there, jnp.float32),)


def unstack(stacked: Any) -> list[Any]:
    """Takes a tree of several adapters apart: the wrapped trees that `stack` was given.

    Args:
      stacked: a tree that `stack` returned, of n adapters.

    Returns:
      A list of n wrapped trees, each with its own rank, scale and targets; the plain tree for one that was the base.

    Raises:
      TypeError: if the tree does not hold several adapters.
      ValueError: if it is one half of `jlora.partition`.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> trees = [jlora.wrap(params, jlora.LoraSpec(rank=r, seed=r)) for r in (1, 2)]
      >>> [tree["kernel"].rank for tree in jlora.adapters.unstack(jlora.adapters.stack(trees))]
      [1, 2]
    """
    paths, leaves, treedef = flatten_named("unstack", stacked, is_unit)
    count = count_of("unstack", leaves)
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, StackedParam):
            check_whole("unstack", path, leaf)
    return [treedef.unflatten([own(leaf, i) for leaf in leaves]) for i in range(count)]
