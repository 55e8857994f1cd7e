"""Functions of a wrapped tree. It describes itself: nodes adapt or train, every other leaf is frozen."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.nodes import qarray
from jlora.nodes.checks import check_fit, check_whole
from jlora.nodes.fields import leaf_fields
from jlora.nodes.fold import folded, told_once
from jlora.nodes.node import TrainableParam, is_node, is_unit
from jlora.targets.named import Names, named
from jlora.targets.paths import flatten

TRAINABLE, FROZEN = "trainable", "frozen"


def merge(tree: Any, *, dtype: Any = None, everything: bool = False, donate: bool = False) -> Any:
    """Folds the adapters into their kernels and returns a plain tree.

    ``W + scale * A @ B`` is added in float32 and rounded once, in one program for all kernels that are alike.

    Args:
      tree: a wrapped tree.
      dtype: the type of the merged kernels. Quantised leaves become dense arrays of this type. None: each kernel keeps
        its own type, and quantised leaves without an adapter stay quantised.
      everything: whether plain floating leaves, and those trained in full, are cast to `dtype` too. The whole model
        then has one type, which a scan needs if its carry has the type of the base.
      donate: whether the merged kernels reuse the memory of the bases. No second copy of the model is made then. The
        bases of `tree`, and the same arrays in the plain tree, are deleted. Kernels that change their type are copied,
        and so are arrays that are in the tree more than once. Under jit it changes nothing: `jax.jit` has
        `donate_argnums`.

    Returns:
      The tree that was wrapped, with the kernels merged; leaves trained in full have their trained values.

    Raises:
      TypeError: if nothing in the tree is wrapped.
      ValueError: if `dtype` is no floating type, or `everything` has none, an adapter stands on a quantised base and no
        `dtype` is given, or the tree is one half of `partition`.

    Warns:
      MergePrecisionWarning: if the merged kernel has fewer than 32 bits and rounding to it takes more than half of an
        adapter (of its Frobenius norm), or a sum is not finite in it. It is seen only where values are known, so not
        under jit. There is one warning for all kernels; `jlora.merge_error` has the figures of each.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> jlora.merge(params)["kernel"].shape
      (4, 3)
    """
    if dtype is not None and not _is_floating(dtype):
        raise ValueError(
            f"merge: dtype must be a floating type, found {getattr(dtype, '__name__', dtype)}; into the formats of "
            "quantised bases jlora.quant.requantize(tree) merges"
        )
    if everything and dtype is None:
        raise ValueError("merge: everything=True casts to dtype, and none is given, as in dtype=jnp.bfloat16")
    paths, leaves, treedef = flatten(_wrapped("merge", tree), is_unit)
    counts = collections.Counter(map(id, jax.tree.leaves(tree)))
    is_own = lambda leaf: donate and is_node(leaf) and counts[id(leaf.base)] == 1
    whole = (lambda x: _cast(x, dtype)) if everything else lambda x: x
    pairs = zip(paths, leaves, strict=True)
    with told_once():
        return treedef.unflatten([whole(_merged(leaf, path, dtype, is_own(leaf))) for path, leaf in pairs])


def _cast(x: Any, dtype: Any) -> Any:
    if not jnp.issubdtype(getattr(x, "dtype", None) or np.int32, jnp.floating):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding)
    return jnp.asarray(x).astype(dtype)


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def _merged(leaf: Any, path: str, dtype: Any, donate: bool) -> Any:
    if not is_node(leaf) and (dtype is None or not qarray.is_qarray(leaf)):
        return leaf
    if is_node(leaf):
        leaf = leaf.resolved()
        check_fit("merge", path, leaf)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf)):
        merged = jax.eval_shape(lambda node: _merged(node, path, dtype, False), leaf)
        place = getattr(qarray.codes(leaf.base if is_node(leaf) else leaf), "sharding", None)
        return jax.ShapeDtypeStruct(merged.shape, merged.dtype, sharding=place)
    if qarray.is_qarray(leaf):
        return qarray.dense(leaf, dtype)
    if dtype is None and qarray.is_qarray(leaf.base):
        raise _no_type(path, leaf)
    return folded(path, leaf, dtype, donate)


def _no_type(path: str, node: Any) -> ValueError:
    return ValueError(
        f"merge: the base of {path} is quantised, to {qarray.nbits(node.base) / math.prod(node.shape):.1f} bits a "
        "weight, too few for a small update: rounding would take most of it. Give the type of a dense result, as "
        "in jlora.merge(tree, dtype=jnp.bfloat16), or quantise the sum again and see what is lost, by "
        "jlora.quant.requantize(tree)"
    )


def unwrap(tree: Any) -> Any:
    """Drops the adapters: every base and frozen leaf as it was, bit for bit.

    A leaf that is trained in full keeps its trained value, since no copy of its original is kept.

    Args:
      tree: a wrapped tree, of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      The tree that was wrapped, with each base in the place of its node. No array is copied.

    Raises:
      TypeError: if nothing in the tree is wrapped.
      ValueError: if a base is missing, as in the trainable half of `partition`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> wrapped = jlora.wrap(params, jlora.LoraSpec(rank=2))
      >>> jlora.unwrap(wrapped)["kernel"] is params["kernel"]
      True
    """
    paths, leaves, treedef = flatten(_wrapped("unwrap", tree), is_node)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_node(leaf) and qarray.is_hole(leaf.base):
            check_whole("unwrap", path, leaf)
    return treedef.unflatten([leaf.base if is_node(leaf) else leaf for leaf in leaves])


def partition(tree: Any, *, train: Names = ()) -> tuple[Any, Any]:
    """Splits a wrapped tree into ``(trainable, frozen)``: its own structure twice, None where the other has a leaf.

    Args:
      tree: a wrapped tree, which may have plain leaves beside.
      train: patterns of plain leaves that train too, as in ``LoraSpec(train=...)``: see `jlora.value_and_grad`.

    Returns:
      Two trees of the same structure. A leaf that trains is in the first, any other leaf is in the second. Both are
      pytrees, so each can be an argument of a compiled function. `combine` puts them together again.

    Raises:
      TypeError: if nothing in the tree is wrapped.
      ValueError: if a pattern of `train` matches no plain leaf, or one that is adapted, or one that is not floating.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, jlora.LoraSpec(rank=2))
      >>> trainable, frozen = jlora.partition(params)
      >>> [x.shape for x in jax.tree.leaves(trainable)]
      [(4, 2), (2, 3)]
    """
    keep = lambda wanted: lambda leaf, label: leaf if label == wanted else None
    marks = labels(_wrapped("partition", tree), train=train)
    return jax.tree.map(keep(TRAINABLE), tree, marks), jax.tree.map(keep(FROZEN), tree, marks)


def combine(trainable: Any, frozen: Any) -> Any:
    """Puts the two halves of a wrapped tree together again: the inverse of `partition`.

    Args:
      trainable: the first half that `partition` returned, with other values perhaps, as after a step of training.
      frozen: the second half.

    Returns:
      The whole wrapped tree, each leaf from the half that has it.

    Raises:
      ValueError: if a leaf is in both trees, or the trees differ in structure.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> trainable, frozen = jlora.partition(params)
      >>> trainable["kernel"].base is None, jlora.combine(trainable, frozen)["kernel"].base.shape
      (True, (4, 3))
    """
    paths, nodes, treedef = flatten(trainable, _is_part)
    others, rest, other_treedef = flatten(frozen, _is_part)
    if treedef != other_treedef:
        raise ValueError(
            f"combine: the trees differ{_difference(paths, others)}; it takes both halves of one partition "
            "(where NNX holds one in variables, give nnx.as_pure of it)"
        )
    joined = [_joined(path, a, b) for path, a, b in zip(paths, nodes, rest, strict=True)]
    return treedef.unflatten(joined)


def _is_part(x: Any) -> bool:
    return x is None or is_node(x)


def _difference(paths: list[str], others: list[str]) -> str:
    only = sorted({*paths} ^ {*others})
    return f" at {only[0]}" if only else ""


def _joined(path: str, a: Any, b: Any) -> Any:
    if not (is_node(a) or is_node(b)):
        return _either(path, a, b)
    if _structure(a) != _structure(b):
        raise ValueError(
            f"combine: {path} differs: {_told(a)} in the one tree, {_told(b)} in the other. These are not halves of "
            "one partition: wrap the base with the spec that the trained half had, and partition that"
        )
    return jax.tree.map(lambda x, y: _either(path, x, y), a, b, is_leaf=lambda x: x is None)


def _structure(x: Any) -> Any:
    """A node's structure, whichever of its arrays are there."""
    return jax.tree.structure(x, is_leaf=lambda x: not (is_node(x) or isinstance(x, tuple)))


def _told(x: Any) -> str:
    """A node without its arrays: its kind, axes, scale."""
    if not is_node(x):
        return "nothing" if x is None else "a plain leaf"
    facts = [f"{f.name}={getattr(x, f.name)!r}" for f in dataclasses.fields(x) if f.metadata.get("static")]
    parts = [f"{f.name}={'(...)' if getattr(x, f.name) else '()'}" for f in leaf_fields(x) if _is_tuple(x, f)]
    return f"{type(x).__name__}({', '.join(facts + parts)})"


def _is_tuple(node: Any, field: dataclasses.Field) -> bool:
    return isinstance(getattr(node, field.name), tuple)


def _either(path: str, a: Any, b: Any) -> Any:
    if a is not None and b is not None:
        raise ValueError(f"combine: {path} is in both trees; it takes the two that jlora.partition returned")
    return b if a is None else a


def labels(tree: Any, *, train: Names = ()) -> Any:
    """A tree of the same structure with ``"trainable"`` or ``"frozen"`` for each leaf, for `optax.multi_transform`.

    `jlora.optimizer` calls it by itself. It is for optimizers that are put together by hand.

    Args:
      tree: a wrapped tree.
      train: patterns of plain leaves that train too: see `jlora.value_and_grad`.

    Returns:
      The structure of `tree` with a string for each leaf. In a tree without adapters every leaf is ``"frozen"``.

    Raises:
      ValueError: if a pattern of `train` matches no plain leaf, or one that is adapted, or one that is not floating.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> marks = jlora.labels(params)
      >>> marks["kernel"].base, marks["kernel"].lora_a
      ('frozen', 'trainable')
    """
    whole, names = with_named(tree, train)
    marks = label_fields(whole, lambda field: TRAINABLE if field.metadata.get("trained") else FROZEN)
    return without_named(marks, names)


def with_named(tree: Any, train: Names) -> tuple[Any, frozenset[str]]:
    """The tree with the plain leaves that `train` names as nodes that train in full, and their paths."""
    if isinstance(train, tuple) and not train:
        return tree, frozenset()
    paths, leaves, _ = flatten(tree, is_unit)
    pairs = list(zip(paths, leaves, strict=True))
    plain, adapted = ({path: x for path, x in pairs if is_node(x) == kind} for kind in (False, True))
    names = frozenset(named(train, plain, adapted))
    return as_named(tree, names), names


def as_named(tree: Any, names: frozenset[str]) -> Any:
    """The tree with nodes that train in full at these paths."""
    if not names:
        return tree
    paths, leaves, treedef = flatten(tree, _is_part)
    return treedef.unflatten([TrainableParam(x) if path in names else x for path, x in zip(paths, leaves, strict=True)])


def without_named(tree: Any, names: frozenset[str]) -> Any:
    """The inverse of `as_named`."""
    if not names:
        return tree
    paths, leaves, treedef = flatten(tree, _is_part)
    return treedef.unflatten([x.base if path in names else x for path, x in zip(paths, leaves, strict=True)])


def label_fields(tree: Any, label: Callable[[dataclasses.Field], str]) -> Any:
    """Labels each leaf of a node by its field, and the leaves outside of nodes ``"frozen"``."""

    def mark(x: Any) -> Any:
        if not is_node(x):
            return FROZEN
        marks = {f.name: jax.tree.map(lambda _, f=f: label(f), getattr(x, f.name)) for f in leaf_fields(x)}
        return dataclasses.replace(x, **marks)

    return jax.tree.map(mark, tree, is_leaf=is_node)


def has_nodes(tree: Any) -> bool:
    """Whether anything in a tree is wrapped."""
    return any(is_node(x) for x in jax.tree.leaves(tree, is_leaf=is_node))


def _wrapped(name: str, tree: Any) -> Any:
    if not has_nodes(tree):
        twice = " (merged twice?)" if name == "merge" else ""
        if any(map(qarray.is_qarray, jax.tree.leaves(tree, is_leaf=qarray.is_qarray))):
            twice = ", though some are quantised; jlora.quant.dequantize gives their numbers"
        raise TypeError(f"{name} takes a tree that jlora.wrap returned; no leaf of this one is wrapped{twice}")
    return tree
