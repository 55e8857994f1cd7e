"""The base that an adapter belongs to: its leaves' shapes and types, and of some of their elements a hash."""

from __future__ import annotations

import collections
import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.checkpoint.told import Told
from jlora.interpret.places import entries, names
from jlora.nodes.node import TrainableParam, is_node
from jlora.nodes.qarray import codes, is_qarray

OPTIONAL = ("quantised", "sample")  # entries that not each leaf has
SAMPLES = 16  # elements of each leaf that tell one base from another


def told(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is said of a base: nothing of the values of what trains, or is abstract.

    Args:
      leaves: by path: arrays, nodes, each maybe of `jax.ShapeDtypeStruct`.
    """
    bases = {path: x.base if is_node(x) else x for path, x in leaves.items() if hasattr(x, "shape")}
    known = {path: x for path, x in bases.items() if not isinstance(leaves[path], TrainableParam)}
    arrays = {path: codes(x) for path, x in known.items()}
    samples = sampled({path: x for path, x in arrays.items() if not isinstance(x, jax.ShapeDtypeStruct)})
    shape = lambda x: {"shape": list(x.shape), "dtype": jnp.dtype(x.dtype).name} | _quantised(x)
    return {path: shape(x) | ({"sample": samples[path]} if path in samples else {}) for path, x in bases.items()}


def _quantised(x: Any) -> dict[str, str]:
    return {"quantised": str(x.qvalue.dtype if x.qtype != "nf4" else "nf4")} if is_qarray(x) else {}


def read(told: Told) -> dict[str, Any]:
    """What `told` has said, each entry of the kind that it should be."""
    for leaf in told.entries().values():
        parts = leaf.form(OPTIONAL)
        if "quantised" in parts:
            parts["quantised"].word()
        if "sample" in parts and not re.fullmatch("[0-9a-f]{16}", parts["sample"].text()):
            raise parts["sample"].refused("16 hexadecimal digits")
    return told.value


def check(directory: Any, theirs: Mapping[str, Any], leaves: Mapping[str, Any], values_too: bool) -> None:
    """Refuses a base of other leaves, shapes or values than was told.

    Raises:
      ValueError: saying which leaf differs.
    """
    ours = {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "shape")}
    for path in sorted({*theirs} | {*ours}):
        expected = tuple(theirs[path]["shape"]) if path in theirs else None
        found = tuple(ours[path].shape) if path in ours else None
        if expected != found:
            raise ValueError(
                f"checkpoint.load: the tree is not the one that {directory} was trained on: {path} has shape {found} "
                f"here and {expected} there (None: it is not there). Give the tree that was wrapped, not one around it"
            )
    if not values_too:
        return
    form = lambda told: told.get("quantised", "dense")
    for path, leaf in ours.items():
        if form(_quantised(leaf)) != form(theirs[path]) and "sample" in theirs[path]:
            raise ValueError(
                f"checkpoint.load: {path} is {form(_quantised(leaf))} here, and {form(theirs[path])} in the base that "
                f"{directory} was trained on; quantise it alike, or take the other base with check_base=False"
            )
    expected = {path: x["sample"] for path, x in theirs.items() if "sample" in x}
    arrays = {path: codes(x) for path, x in ours.items() if path in expected}
    known = {path: x for path, x in arrays.items() if not isinstance(x, jax.ShapeDtypeStruct)}
    found = sampled(known)
    told = {path: (theirs[path]["dtype"], expected[path]) for path in known}
    if differing := [path for path in known if (ours[path].dtype.name, found[path]) != told[path]]:
        raise ValueError(
            f"checkpoint.load: {differing[0]} has other values, or another type, than in the base that {directory} was "
            f"trained on ({len(differing)} of {len(known)} leaves differ); check_base=False takes it all the same. "
            "Bases that jlora.quant.loftq or qpissa has changed are made again by the same calls"
        )


def sampled(arrays: Mapping[str, Any]) -> dict[str, str]:
    """A hash of some elements of each array, the same wherever and however it lies.

    The arrays of a mesh are sampled by one program: each device looks up what it has, and some bytes of each array
    are summed over the mesh.
    """
    groups: dict[Any, dict[str, Any]] = collections.defaultdict(dict)
    for path, x in arrays.items():
        groups[_group(x)][path] = x
    found = {path: data for group, xs in groups.items() for path, data in zip(xs, _bytes(group, xs), strict=True)}
    return {path: hashlib.sha256(found[path].tobytes()).hexdigest()[:16] for path in arrays}


def _group(x: Any) -> Any:
    """What arrays that one program can read have in common; None: they are not on devices."""
    if not isinstance(x, jax.Array):
        return None
    at = x.sharding
    return at.mesh if isinstance(at, NamedSharding) and not at.mesh.empty else frozenset(at.device_set)


def _bytes(group: Any, arrays: Mapping[str, Any]) -> Sequence[np.ndarray]:
    given = list(arrays.values())
    if group is None:
        return [np.ascontiguousarray(x[_places(x.shape)]) for x in given]
    if isinstance(group, frozenset):
        return jax.device_get(_of_devices(given))
    shapes = tuple(tuple(x.shape) for x in given)
    whole = jax.device_get(_of_mesh(group, tuple(x.sharding.spec for x in given), shapes)(given))
    sizes = [x.dtype.itemsize * min(x.size, SAMPLES) for x in given]
    return np.split(whole, np.cumsum(sizes)[:-1])


def _places(shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The sampled elements' indices, axis by axis."""
    size = math.prod(shape)
    flat = np.unique(np.linspace(0, size - 1, min(size, SAMPLES)).astype(np.int64)) if size else np.zeros(0, np.int64)
    return tuple(np.unravel_index(flat, shape)) if shape else ()


@jax.jit
def _of_devices(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [_raw(x[_places(x.shape)]).reshape(-1) for x in arrays]


@functools.lru_cache(maxsize=64)
def _of_mesh(mesh: Any, specs: tuple[PartitionSpec, ...], shapes: tuple[tuple[int, ...], ...]) -> Any:
    def local(parts: Sequence[jax.Array]) -> jax.Array:
        here = functools.cache(functools.partial(_here, mesh))  # many leaves are alike: a program ten times smaller
        places = [here(*given) for given in zip(specs, shapes, [part.shape for part in parts], strict=True)]
        raw = [_raw(part.at[at].get(mode="promise_in_bounds")) for part, (_, at) in zip(parts, places, strict=True)]
        is_mine = [_spread(mask, x.shape) for x, (mask, _) in zip(raw, places, strict=True)]
        joined = lambda xs: jnp.concatenate([x.reshape(-1) for x in xs])
        mine = jnp.where(joined(is_mine), joined(raw), 0).astype(jnp.uint32)
        return lax.psum(mine, mesh.axis_names).astype(jnp.uint8)  # one exchange for all arrays

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(), check_vma=False))


def _here(
    mesh: Any, spec: PartitionSpec, shape: tuple[int, ...], part: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Which of the sampled elements this device has and no other device tells, and their indices in its part."""
    axes = [names(entry) for entry in entries(spec, len(shape))]
    is_first = [lax.axis_index(name) == 0 for name in mesh.axis_names if all(name not in along for along in axes)]
    is_mine, at = functools.reduce(jnp.logical_and, is_first, jnp.array(True)), []
    for place, along, size in zip(_places(shape), axes, part, strict=True):
        offset = place - (lax.axis_index(along) if along else 0) * size
        is_mine = is_mine & (offset >= 0) & (offset < size)
        at.append(jnp.clip(offset, 0, max(size - 1, 0)))
    return is_mine, tuple(at)


def _spread(mask: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)), shape)


def _raw(x: jax.Array) -> jax.Array:
    """The bytes of an array, on an axis more."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        return x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    bits = jnp.finfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).bits
    return lax.bitcast_convert_type(x, f"uint{min(bits, 8)}").astype(jnp.uint8)
