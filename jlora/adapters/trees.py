"""Several trees side by side: what each has at a path, and whether they stand on one base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret.compat import is_traced
from jlora.nodes.checks import check_fit
from jlora.nodes.node import TrainableParam, is_node, is_unit
from jlora.targets.paths import flatten_named
from jlora.tree import has_nodes
from jlora.variants.bias import LoraBiasParam
from jlora.variants.dora import DoraParam
from jlora.variants.lora import LoraParam
from jlora.variants.tokens import TokensParam


def aligned(where: str, trees: Sequence[Any]) -> tuple[list[str], list[tuple[Any, ...]], Any]:
    """The paths of the base that wrapped trees stand on, what each tree has there, and the structure.

    Raises:
      TypeError: if a tree is not wrapped.
      ValueError: if there is none, or their bases differ in a path, a shape or a kernel's axes.
    """
    if not isinstance(trees, (list, tuple)):
        raise TypeError(
            f"{where} takes a list of wrapped trees, found a {type(trees).__name__}; of a tree that holds several "
            "adapters jlora.adapters.unstack(tree) makes one"
        )
    if not trees:
        raise ValueError(f"{where}: expected at least one wrapped tree, found none")
    for number, tree in enumerate(trees):
        if not has_nodes(tree):
            raise TypeError(
                f"{where} takes trees that jlora.wrap or jlora.peft.load returned; no leaf of tree {number} is wrapped"
            )
    flat = [flatten_named(where, tree, is_unit) for tree in trees]
    paths, leaves, treedef = flat[0]
    for number, (others, theirs, structure) in enumerate(flat[1:], 1):
        if others != paths or structure != treedef:
            raise ValueError(
                f"{where}: tree {number} stands on another base than tree 0{_difference(paths, others)}; wrap one base "
                "with each adapter"
            )
        for path, ours, other in zip(paths, leaves, theirs, strict=True):
            _check_alike(where, path, number, ours, other)
    return paths, list(zip(*(leaves for _, leaves, _ in flat), strict=True)), treedef


def _difference(paths: list[str], others: list[str]) -> str:
    only = sorted({*paths} ^ {*others})
    return f": only one has {only[0]}" if only else ""


def _check_alike(where: str, path: str, number: int, ours: Any, other: Any) -> None:
    shapes = [tuple(getattr(x, "shape", ())) for x in (ours, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{where}: trees 0 and {number} stand on different bases: {path} has the shapes {shapes[0]} and {shapes[1]}"
        )
    if any(isinstance(x, TrainableParam) for x in (ours, other)):
        return
    bases = [x.base if is_node(x) else x for x in (ours, other)]
    known = not any(is_traced(x) or not hasattr(x, "__array__") for x in jax.tree.leaves(bases))
    if known and not are_same(*bases):
        raise ValueError(
            f"{where}: {path} has other values in tree {number} than in tree 0: adapters of different bases do not add "
            "up. Wrap one base with each"
        )


def are_same(x: Any, y: Any) -> bool:
    """Whether two leaves are the same array, or equal ones; of values that are traced only the very same are."""
    (xs, structure), (ys, other) = map(jax.tree.flatten, (x, y))
    return structure == other and all(map(_is_same, xs, ys))


def _is_same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if x.shape != y.shape or x.dtype != y.dtype or is_traced(x) or is_traced(y):
        return False
    if any(isinstance(v, jax.ShapeDtypeStruct) for v in (x, y)):
        return isinstance(x, jax.ShapeDtypeStruct) and isinstance(y, jax.ShapeDtypeStruct)
    with jax.ensure_compile_time_eval():  # known numbers, be it inside a trace
        return bool(jnp.array_equal(x, y, equal_nan=jnp.issubdtype(x.dtype, jnp.inexact)))


def updates_of(where: str, path: str, leaves: Sequence[Any]) -> dict[int, LoraParam]:
    """The updates of one kernel, by the number of the tree; none where no tree adapts it.

    Raises:
      TypeError: if a tree has something else there than plain LoRA.
      ValueError: if one is no whole node, or they take the kernel's axes in several ways.
    """
    nodes = {number: leaf for number, leaf in enumerate(leaves) if is_node(leaf)}
    for number, node in nodes.items():
        node.resolved()  # refuses what holds several adapters
        if not isinstance(node, LoraParam):
            raise TypeError(f"{where}: {path} of tree {number} is a {type(node).__name__}: {_reason(node)}")
        check_fit(where, path, node)
    axes = {(n.axes.in_axis, n.axes.out_axis, n.axes.batch_axis): n.axes for n in nodes.values()}
    if len(axes) > 1:
        raise ValueError(
            f"{where}: the trees take the axes of {path} in several ways, {' and '.join(map(str, axes.values()))}; "
            "wrap the base with one spec, or sites"
        )
    return nodes


def _reason(node: Any) -> str:
    if isinstance(node, TrainableParam):
        return (
            "it was trained in full, and no copy of its original is kept, so there is no update to weigh. Put a plain "
            "array in its place, with the value that the result is to have"
        )
    if isinstance(node, (LoraBiasParam, TokensParam)):
        return "only low-rank updates of kernels are combined. Put a plain array in its place, as jlora.merge gives it"
    if isinstance(node, DoraParam):
        return "magnitudes do not add up. jlora.peft.low_rank(tree, rank) gives the nearest plain update, and its error"
    return (
        "expected is plain LoRA, as jlora.to_plain_lora(tree) makes it of low-rank variants, and "
        "jlora.peft.low_rank(tree, rank) of any, with an error"
    )
