"""Room for adapters that come and go: a tree of several that are not there yet, and one put in its place."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.adapters.dims import array_fields, place_of
from jlora.adapters.stack import stack
from jlora.adapters.stacked import Member, StackedParam
from jlora.interpret.sites import Site
from jlora.nodes import placement
from jlora.nodes.node import TrainableParam, is_node, is_unit
from jlora.spec import LoraSpec
from jlora.targets.paths import flatten_named, refill
from jlora.wrap import wrap


def of_rank(spec: LoraSpec, rank: int, base: Any, sites: Mapping[str, Site] | None) -> LoraSpec:
    """The spec with a rank, or less for kernels that have no room for it."""
    spec = dataclasses.replace(spec, rank=1, dropout=0.0)
    paths, leaves, _ = flatten_named("Pool", jax.eval_shape(lambda base: wrap(base, spec, sites=sites), base), is_unit)
    adapted = {path: node for path, node in zip(paths, leaves, strict=True) if is_node(node) and hasattr(node, "axes")}
    size = lambda node, axes: math.prod(node.shape[axis] for axis in axes)
    most = {path: min(size(x, x.axes.in_axis), size(x, x.axes.out_axis)) for path, x in adapted.items()}
    less = {f"re:{re.escape(path)}": {"rank": n} for path, n in most.items() if n < rank}
    return dataclasses.replace(spec, rank=rank, overrides={**spec.overrides, **less})


def blank(tree: Any) -> Any:
    """The wrapped tree with zeros in all that trains in its adapters."""

    def emptied(node: Any) -> Any:
        if not is_node(node) or isinstance(node, TrainableParam):
            return node
        fields = [f for f in array_fields(type(node)) if f.metadata["trained"]]
        zeros = {f.name: jax.tree.map(jnp.zeros_like, getattr(node, f.name)) for f in fields}
        return dataclasses.replace(node, **zeros, **({"start": ()} if getattr(node, "start", ()) else {}))

    return jax.tree.map(emptied, tree, is_leaf=is_unit)


def with_room(tree: Any, base: Any, capacity: int) -> Any:
    """The tree of so many adapters that are not there yet, each array placed as the base is."""

    def room(node: Any) -> Any:
        if not isinstance(node, StackedParam):
            return node
        told: Any = node
        flags = jnp.zeros((*_batch(node), capacity), jnp.float32)
        scales = (jnp.ones(capacity, jnp.float32),) if hasattr(node, "scale") else ()
        made = dataclasses.replace(told, scales=scales, present=(flags,), members=(Member(),) * capacity)
        where = placement.of_node(made, made.base)
        return made if where is None else jax.device_put(made, where)

    return jax.tree.map(room, stack([tree] * capacity, base=base), is_leaf=is_unit)


def _batch(node: Any) -> tuple[int, ...]:
    return tuple(node.shape[axis] for axis in node.axes.batch_axis)


class Arrays(NamedTuple):
    """What of an adapter goes into a node of several: its fields, its scale, and where it is there."""

    fields: dict[str, Any]
    scale: Any
    present: Any


def second(node: Any) -> Arrays:
    """The arrays of the second of two adapters."""
    pick = lambda dims, x: lax.index_in_dim(x, 1, place_of(node, dims), keepdims=False)
    fields = {f.name: _parts(pick, f.metadata["dims"], getattr(node, f.name)) for f in _own(node)}
    scale = None if node.members[1] is None else Member(*node.members[1]).scale
    present = pick("batch adapters", node.present[0]) if node.present else np.ones(_batch(node), np.float32)
    return Arrays(fields, np.float32(1.0 if scale is None else scale), present)


def inserted(tree: Any, slot: int, adapter: list[Any]) -> Any:
    """The tree with an adapter in one place, its bases the very same."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_unit)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, StackedParam)]
    bare = [dataclasses.replace(leaves[i], base=()) for i in places]
    made = zip(places, _insert(bare, slot, adapter), strict=True)
    return refill(treedef, leaves, places)([dataclasses.replace(node, base=leaves[i].base) for i, node in made])


@jax.jit
def _insert(nodes: list[Any], slot: Any, adapter: list[Arrays]) -> list[Any]:
    """The nodes with an adapter in one place: new arrays, one program for all places."""

    def insert(node: Any, arrays: Arrays) -> Any:
        at = lambda dims, x, y: lax.dynamic_update_index_in_dim(x, y.astype(x.dtype), slot, place_of(node, dims))
        fields = {
            f.name: _parts(at, f.metadata["dims"], getattr(node, f.name), arrays.fields[f.name]) for f in _own(node)
        }
        scales = tuple(at("adapters", x, arrays.scale) for x in node.scales)
        present = tuple(at("batch adapters", x, arrays.present) for x in node.present)
        return dataclasses.replace(node, **fields, scales=scales, present=present)

    return list(map(insert, nodes, adapter))


def _own(node: Any) -> list[dataclasses.Field]:
    """The fields of its variant."""
    return [f for f in array_fields(type(node)) if f.name not in ("scales", "present")]


def _parts(fn: Callable[..., Any], dims: Any, value: Any, *others: Any) -> Any:
    """A function of a field's dims and array, of each array where it holds a tuple."""
    return tuple(map(fn, dims, value, *others)) if isinstance(value, tuple) else fn(dims, value, *others)
