"""Formats of quantised leaves: how many bits, which tiles; from numbers to codes and scales."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jlora.interpret.compat import is_traced
from jlora.interpret.stored import placed
from jlora.nodes.axes import Axes
from jlora.nodes.makers import placed_plan
from jlora.nodes.placement import sharding_of
from jlora.nodes.qarray import NF4, codes, is_qarray, numbers, tile_of, tiled

DTYPES: dict[str, Any] = {"nf4": "nf4", "int4": jnp.int4, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
LARGEST = {"nf4": 1.0, "int4": 7.5, "int8": 127.5, "fp8": 448.0}  # of a code: an integer's last bucket is whole
SCALES = 256  # that are quantised together, at most
FEWEST = 16  # elements of a tile; with fewer the scales take more than two bits a weight


@dataclasses.dataclass(frozen=True)
class Format:
    """How a leaf is quantised.

    Args:
      dtype: ``"nf4"``, ``"int4"``, ``"int8"`` or ``"fp8"``.
      tile: its elements on each axis that share a scale.
      scales: the scales on each axis that are quantised together, in 8 bits; None: they are not.
    """

    dtype: str
    tile: tuple[int, ...]
    scales: tuple[int, ...] | None = None

    @classmethod
    def of(cls, x: Any) -> Format:
        """That of a quantised leaf."""
        name = next((name for name, qtype in DTYPES.items() if qtype == x.qtype), None)
        if name is None:
            raise ValueError(f"a QArray of type {x.qtype} is of none of the formats {', '.join(DTYPES)}")
        return cls(name, tile_of(x), tile_of(x.scale) if is_qarray(x.scale) else None)

    @classmethod
    def fitting(
        cls, path: str, shape: Sequence[int], axes: Axes, kind: str, dtype: str, tile: int | None, double_quant: bool
    ) -> Format:
        """The format of a kernel: tiles along its contracted axes; of a table along its rows, so that rows are read.

        Raises:
          ValueError: if no tile near to the one that is asked for divides the axes.
        """
        along = axes.out_axis if kind == "embedding" else axes.in_axis
        size = math.prod(shape[axis] for axis in along)
        sizes = _tile(shape, along, tile or size)
        fewest = min(FEWEST, size, tile or size)
        if math.prod(sizes) < fewest:
            raise ValueError(
                f"quantize: {path} of shape {tuple(shape)} has {size} elements along its axes {along}, which have no "
                f"tile of {fewest} to {tile}; exclude it, or give tile={size}"
            )
        counts = [n // part for n, part in zip(shape, sizes, strict=True)]
        rest = [axis for axis in range(len(shape)) if axis not in axes.batch_axis]
        return cls(dtype, sizes, _tile(counts, rest, SCALES) if double_quant else None)


def _tile(shape: Sequence[int], axes: Sequence[int], size: int) -> tuple[int, ...]:
    """The largest tile of at most `size` elements: the last of the axes first, as much of each as divides it."""
    sizes = [1] * len(shape)
    for axis in reversed(axes):
        sizes[axis] = max(d for d in range(1, min(size, shape[axis]) + 1) if shape[axis] % d == 0)
        size //= sizes[axis]
        if sizes[axis] < shape[axis]:
            break
    return tuple(sizes)


def quantised(x: Any, form: Format) -> Any:
    """A leaf as a `QArray`, where it lies; abstract where it is."""
    at = sharding_of(x)
    if at is None and (is_traced(x) or not isinstance(x, jax.ShapeDtypeStruct)):
        return encode(x, form) if is_traced(x) else _encode(form)(x)
    plan = jax.eval_shape(_encode(form), jax.ShapeDtypeStruct(x.shape, x.dtype))
    where = None if at is None else placed(plan, at)
    if isinstance(x, jax.ShapeDtypeStruct):
        return plan if where is None else jax.tree.map(placed_plan, plan, where)
    return _encode(form, _Places(where))(x)


class _Places:
    """A tree of shardings, hashable."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self._key = (jax.tree.structure(tree), tuple(jax.tree.leaves(tree)))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Places) and self._key == other._key


@functools.lru_cache(maxsize=256)
def _encode(form: Format, places: _Places | None = None) -> Any:
    """`encode`, compiled; its results placed."""
    make = functools.partial(encode, form=form)
    if places is None:
        return jax.jit(make)
    if jax.tree.leaves(places.tree)[0].mesh.explicit_axes:
        make = jax.sharding.auto_axes(make, out_sharding=places.tree)
    return jax.jit(make, out_shardings=places.tree)


def encode(x: jax.Array, form: Format) -> Any:
    """Codes and scales: each tile is divided by its scale, its largest absolute value over the largest code.

    Computed in float32; the scales have the type of x, and it is those, rounded or quantised, that the codes are for.
    """
    qwix = package()
    x = jnp.asarray(x)
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    largest = _largest(exact, form.tile) / LARGEST[form.dtype]
    scale: Any = jnp.where(largest == 0, 1, largest).astype(x.dtype)
    if form.scales is not None:
        scale = _scales(largest, form.scales, x.dtype, qwix)
    steps = numbers(scale, exact.dtype) if is_qarray(scale) else scale.astype(exact.dtype)
    ratio = tiled(jnp.divide, exact, jnp.where(steps == 0, 1, steps))
    return qwix.QArray(_codes(ratio, form.dtype), scale, None, DTYPES[form.dtype])


def _largest(x: jax.Array, tile: Sequence[int]) -> jax.Array:
    """The largest absolute value of each tile."""
    split = [part for n, size in zip(x.shape, tile, strict=True) for part in (n // size, size)]
    return jnp.abs(x.reshape(split)).max(tuple(range(1, len(split), 2)))


def _scales(scale: jax.Array, tile: Sequence[int], dtype: Any, qwix: Any) -> Any:
    """Scales, which are positive, in 8 bits without a sign."""
    step = _largest(scale, tile) / 255
    step = jnp.where(step == 0, 1, step).astype(dtype)
    ratio = tiled(jnp.divide, scale, step.astype(scale.dtype))
    return qwix.QArray(jnp.clip(jnp.round(ratio), 0, 255).astype(jnp.uint8), step, None, jnp.uint8)


def _codes(ratio: jax.Array, dtype: str) -> jax.Array:
    if dtype == "nf4":  # the number of midpoints below: the nearest of the sixteen values
        return sum((ratio > middle).astype(jnp.int32) for middle in (NF4[1:] + NF4[:-1]) / 2).astype(jnp.uint4)  # type: ignore[union-attr]
    if dtype == "fp8":
        return jnp.clip(ratio, -LARGEST[dtype], LARGEST[dtype]).astype(DTYPES[dtype])
    info = jnp.iinfo(DTYPES[dtype])
    return jnp.clip(jnp.round(ratio), info.min, info.max).astype(DTYPES[dtype])


def package() -> Any:
    """Qwix, which has the class of quantised leaves.

    Raises:
      ModuleNotFoundError: if it is not installed.
    """
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "jlora.quant keeps quantised leaves as Qwix's QArray, and qwix is not installed: pip install 'jlora[quant]'"
        ) from error
    _register(qwix.QArray)
    return qwix


@functools.cache
def _register(cls: Any) -> None:
    """Makes `jax.export` know Qwix's arrays, unless another has."""
    with contextlib.suppress(ValueError):
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name="qwix.QArray",
            serialize_auxdata=lambda values: json.dumps(list(map(_name_of_type, values))).encode(),
            deserialize_auxdata=lambda data: tuple(map(_type_of_name, json.loads(data))),
        )


def _name_of_type(dtype: Any) -> str:
    return dtype if isinstance(dtype, str) else f"dtype:{jnp.dtype(dtype).name}"


def _type_of_name(name: str) -> Any:
    return getattr(jnp, name.removeprefix("dtype:")) if name.startswith("dtype:") else name


def read_as(dense: Any, plan: Any) -> Any:
    """A leaf that was read as numbers, as the plan of a quantised one says: to its format, placed as its codes."""
    where = getattr(codes(plan), "sharding", None)
    at = np.asarray(dense, plan.dtype) if where is None else jax.device_put(np.asarray(dense, plan.dtype), where)
    return quantised(at, Format.of(plan))
