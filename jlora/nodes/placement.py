"""Placement: what stands beside a base lies where the base lies.

An array takes the mesh axes of those of the base's axes that it has: A those of the in axes, B those of the out axes,
both those of the batch axes; its own axes, such as the rank, are whole everywhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.interpret.compat import is_traced
from jlora.interpret.places import entries
from jlora.interpret.stored import placed
from jlora.nodes.fields import axes_of, map_fields
from jlora.nodes.qarray import codes, is_qarray


def sharding_of(x: Any) -> NamedSharding | None:
    """Where an array lies on a mesh; None where that is not said, or said by the program that is being traced."""
    x = codes(x)
    sharding = jax.typeof(x).sharding if is_traced(x) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    return sharding if not is_traced(x) or sharding.mesh.explicit_axes else None


def of_node(node: Any, base: Any) -> Any:
    """The node with the sharding of each array, as its base lies; None beside a base that lies on no mesh."""
    sharding = sharding_of(base)
    if sharding is None:
        return None
    found = node_specs(node, tuple(base.shape), sharding.spec)
    is_spec = lambda x: isinstance(x, PartitionSpec)
    found = jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), found, is_leaf=is_spec)
    return dataclasses.replace(found, base=placed(node.base, sharding)) if is_qarray(node.base) else found


def node_specs(node: Any, shape: tuple[int, ...], spec: PartitionSpec) -> Any:
    """The node with the spec of each array that is there, beside a base of this shape and spec."""
    along = entries(spec, len(shape))

    def of(dims: str, x: Any) -> PartitionSpec | None:
        if x is None:
            return None
        if is_qarray(x):
            return leaf_specs(x, spec)
        axes = axes_of(node, dims, x, shape)
        is_like_base = axes == list(range(len(shape)))
        return spec if is_like_base else PartitionSpec(*(None if axis is None else along[axis] for axis in axes))

    return map_fields(of, node)


def leaf_specs(leaf: Any, spec: PartitionSpec) -> Any:
    """The spec of a leaf; of a quantised one those of its arrays, on the axes of which they have more than one tile."""
    if not is_qarray(leaf):
        return spec
    along = entries(spec, len(leaf.shape))
    some = lambda x: PartitionSpec(*(entry if n > 1 else None for n, entry in zip(x.shape, along, strict=True)))
    return jax.tree.map(lambda x: spec if x is leaf.qvalue else some(x), leaf)
