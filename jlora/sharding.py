"""Specs and shardings of a wrapped tree and of an optimizer's state, from those of the plain tree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jlora.interpret.places import entries, names
from jlora.interpret.stored import placed
from jlora.nodes.fields import map_fields
from jlora.nodes.node import is_node, is_unit
from jlora.nodes.placement import leaf_specs, node_specs, of_node, sharding_of
from jlora.nodes.qarray import codes, is_qarray
from jlora.targets.paths import flatten

__all__ = ["specs", "shardings", "of_state"]


def specs(tree: Any, base_specs: Any) -> Any:
    """The partition spec of each leaf of a wrapped tree, from those of the plain tree.

    For a kernel of spec ``P("fsdp", "tensor")`` with one in and one out axis, A has ``P("fsdp", None)`` and B
    ``P(None, "tensor")``. Names need not be those of a mesh: logical ones stay logical.

    Args:
      tree: a wrapped tree, of arrays or of `jax.ShapeDtypeStruct`.
      base_specs: a tree of specs with the paths of the plain tree, as `flax.linen.get_partition_spec` and
        `flax.nnx.get_partition_spec` return it. One may stand for all leaves below its path; None is ``P()``. A
        quantised leaf has that of its codes.

    Returns:
      The structure of `tree` with a `jax.sharding.PartitionSpec` for each leaf.

    Raises:
      ValueError: if a leaf has no spec, a spec has no leaf, a spec has more entries than the leaf has axes, or
        `base_specs` holds something else than specs.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> from jax.sharding import PartitionSpec as P
      >>> tree = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> specs = jlora.sharding.specs(tree, {"kernel": P("fsdp", "tensor")})
      >>> specs["kernel"].lora_a == P("fsdp", None), specs["kernel"].lora_b == P(None, "tensor")
      (True, True)
    """
    given = _by_path(base_specs)
    paths, leaves, treedef = flatten(tree, is_unit)
    keys = [_nearest(path, given) for path in paths]
    _check_paths(paths, keys, given)
    specs = [given[key] for key in keys if key is not None]
    return treedef.unflatten([_spec_of(*each) for each in zip(paths, leaves, specs, strict=True)])


def shardings(tree: Any, mesh: Any = None, base_specs: Any = None) -> Any:
    """The sharding of each leaf of a wrapped tree: for `jax.jit`'s in_shardings and out_shardings, for checkpoints.

    Args:
      tree: a wrapped tree, of arrays or of `jax.ShapeDtypeStruct`.
      mesh: that of the specs.
      base_specs: as in `specs`. Without mesh and specs it is the bases' own placement that counts.

    Returns:
      The structure of `tree` with a `jax.sharding.NamedSharding` for each leaf; None for one that lies on no mesh.

    Raises:
      ValueError: as `specs` does; or if one of `mesh` and `base_specs` is given alone, or a spec names an axis that the
        mesh does not have, or one axis twice.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> tree = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> places = jlora.sharding.shardings(tree, mesh, {"kernel": P("fsdp", "tensor")})
      >>> places["kernel"].lora_b.spec
      P(None, 'tensor')
      >>> jax.device_put(tree, places)["kernel"].lora_b.sharding.spec
      P(None, 'tensor')
    """
    if (mesh is None) != (base_specs is None):
        raise ValueError("sharding.shardings takes mesh and base_specs together, or neither: the bases' own placement")
    if mesh is not None:
        found = specs(tree, base_specs)
        paths, leaves, _ = flatten(found, _is_spec)
        for path, spec in zip(paths, leaves, strict=True):
            _check_names(path, spec, mesh)
        found = jax.tree.map(lambda spec: NamedSharding(mesh, spec), found, is_leaf=_is_spec)
        return jax.tree.map(_fitted, tree, found, is_leaf=is_unit)
    return jax.tree.map(_own, tree, is_leaf=is_unit)


def _fitted(leaf: Any, where: Any) -> Any:
    """The shardings of a leaf; scales that are fewer than the parts of an axis are whole there."""
    if is_qarray(leaf):
        return placed(leaf, where.qvalue)
    if is_node(leaf) and is_qarray(leaf.base):
        return dataclasses.replace(where, base=placed(leaf.base, where.base.qvalue))
    return where


def of_state(state: Any, tree: Any, *, spread: bool = False) -> Any:
    """The sharding of each leaf of an optimizer's state: that of the leaf of the tree that it follows, or whole.

    A moment follows a factor: its path ends as the factor's does, and it has its shape.

    Args:
      state: what the optimizer makes of the tree, abstract or not: ``jax.eval_shape(tx.init, tree)``.
      tree: a wrapped tree, placed or with places.
      spread: split each leaf over the rest of the mesh too, where its sizes allow it. On a mesh of one axis one of each
        pair of factors is whole on every device, and so are its moments; spread, they take a device's part alone, for
        a gather of the factor's update in each step (ZeRO's first stage). Compile the step with
        ``out_shardings=(jlora.sharding.shardings(tree), places, ...)``: else XLA spreads the factors too.

    Returns:
      The structure of `state` with a `jax.sharding.NamedSharding` for each leaf, whole on each device where it follows
      nothing; None where `tree` lies on no mesh.

    Raises:
      TypeError: if nothing in `tree` is wrapped.
      ValueError: if `spread` is asked for on a mesh of explicit axes, where updates and factors must lie alike.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> kernel = jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, P("fsdp", "tensor")))
      >>> tree = jlora.wrap({"kernel": kernel}, jlora.LoraSpec(rank=2))
      >>> tx = jlora.optimizer(optax.adam(1e-3), tree)
      >>> places = jlora.sharding.of_state(jax.eval_shape(tx.init, tree), tree)
      >>> state = jax.jit(tx.init, out_shardings=places)(tree)
      >>> state.inner_states["trainable"].inner_state[0].mu["kernel"].lora_a.sharding.spec
      P('fsdp', None)

    References:
      Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054.
    """
    if not any(is_node(x) for x in jax.tree.leaves(tree, is_leaf=is_node)):
        raise TypeError("sharding.of_state(state, tree) takes a wrapped tree second; no leaf of this one is wrapped")
    leaves = dict(jax.tree_util.tree_leaves_with_path(tree))
    mesh = next((at.mesh for at in map(sharding_of, leaves.values()) if at is not None), None)
    if spread and mesh is not None and mesh.explicit_axes:
        raise ValueError("sharding.of_state: spread is for meshes of automatic axes; these are explicit")
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], x: Any) -> NamedSharding | None:
        followed = (leaves[path[i:]] for i in range(len(path)) if path[i:] in leaves)
        found = next((sharding_of(leaf) for leaf in followed if leaf.shape == x.shape), None) or whole
        return found if found is None or not spread else _spread(found, x.shape)

    return jax.tree_util.tree_map_with_path(place, state)


def _spread(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding with the mesh axes that it does not use, each on the largest axis that it divides."""
    mesh = sharding.mesh
    split = [list(names(entry)) for entry in entries(sharding.spec, len(shape))]
    part = lambda axis: shape[axis] // math.prod(mesh.shape[name] for name in split[axis])
    for name in mesh.axis_names:
        fitting = [axis for axis in range(len(shape)) if part(axis) % mesh.shape[name] == 0]
        if fitting and mesh.shape[name] > 1 and all(name not in taken for taken in split):
            split[max(fitting, key=part)].append(name)
    return NamedSharding(mesh, PartitionSpec(*(tuple(taken) or None for taken in split)))


def _by_path(base_specs: Any) -> dict[str, PartitionSpec]:
    is_spec = lambda x: x is None or isinstance(x, (PartitionSpec, Sharding)) or is_qarray(x)
    paths, leaves, _ = flatten(base_specs, is_spec)
    return {path: _as_spec(path, codes(leaf)) for path, leaf in zip(paths, leaves, strict=True)}


def _as_spec(path: str, leaf: Any) -> PartitionSpec:
    if leaf is None:
        return PartitionSpec()
    if isinstance(leaf, NamedSharding):
        return leaf.spec
    if not isinstance(leaf, PartitionSpec):
        raise ValueError(f"sharding.specs: base_specs has {leaf!r} at {path!r}; it takes PartitionSpecs")
    return leaf


def _nearest(path: str, given: Mapping[str, PartitionSpec]) -> str | None:
    """The path that has the spec of a path: itself, or the nearest one above it."""
    parts = path.split("/")
    above = ("/".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next((key for key in above if key in given), None)


def _check_paths(paths: list[str], keys: list[str | None], given: Mapping[str, PartitionSpec]) -> None:
    missing = [path for path, key in zip(paths, keys, strict=True) if key is None]
    if unused := sorted({*given} - {*keys}):
        lacks = f", and has nothing for {missing[0]}" if missing else ""
        raise ValueError(
            f"sharding.specs: base_specs has {unused[0]!r}, but the tree has no such leaf{lacks}; its leaves are "
            f"{', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}. Give the specs of the tree that was wrapped"
        )
    if missing:
        raise ValueError(
            f"sharding.specs: base_specs has nothing for {missing[0]}; give it a PartitionSpec, or None for P()"
        )


def _check_names(path: str, spec: PartitionSpec, mesh: Any) -> None:
    found = [name for entry in spec for name in names(entry)]
    if unknown := [name for name in found if name not in mesh.axis_names]:
        raise ValueError(
            f"sharding.shardings: {spec} of {path} names {unknown[0]!r}, which is no axis of the mesh "
            f"({', '.join(map(str, mesh.axis_names))}). Logical names become a mesh's by "
            "flax.linen.logical_to_mesh(jlora.sharding.specs(tree, base_specs), rules)"
        )
    if len({*found}) < len(found):
        raise ValueError(f"sharding.shardings: {spec} of {path} names an axis of the mesh twice")


def _spec_of(path: str, leaf: Any, spec: PartitionSpec) -> Any:
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"sharding.specs: {spec} has {len(spec)} entries, but {path} of shape {tuple(leaf.shape)} has "
            f"{len(leaf.shape)} axes"
        )
    return node_specs(leaf, tuple(leaf.shape), spec) if is_node(leaf) else leaf_specs(leaf, spec)


def _own(leaf: Any) -> Any:
    if is_qarray(leaf):
        at = sharding_of(leaf)
        return jax.tree.map(lambda _: None, leaf) if at is None else placed(leaf, at)
    if not is_node(leaf):
        return sharding_of(leaf)
    found = of_node(leaf, leaf.base)
    return map_fields(lambda *_: None, leaf) if found is None else found


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)
