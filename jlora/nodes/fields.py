"""The fields of a node: which train, and which axes of the base they have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

GROUPS = ("batch", "in", "out")
PAIR = ("batch in rank", "batch rank out")


def trained(dims: str | tuple[str, ...] = "", *, optional: bool = False, **kwargs: Any) -> Any:
    """Declares a field of a node that trains, in a class of one's own.

    Args:
      dims: its axes by name, as in ``"batch in rank"``. ``batch``, ``in`` and ``out`` are those of the base, the batch
        ones first; any other word is an axis of its own. By them it is placed on a mesh, checked, and put beside the
        base. A field that holds a tuple of arrays, or an empty one, has a tuple of such texts.
      optional: whether it may hold ``()`` in the place of an array.
      **kwargs: of `dataclasses.field`, such as ``default``.

    Returns:
      A field of a dataclass.

    Example:
      >>> from jlora.variants import trained
      >>> trained("batch in rank").metadata["dims"]
      'batch in rank'
    """
    return dataclasses.field(metadata={"trained": True, "dims": dims, "optional": optional}, **kwargs)


def frozen(dims: str | tuple[str, ...] = "", **kwargs: Any) -> Any:
    """Declares a field of a node that stays as it is, in a class of one's own.

    Args:
      dims: its axes by name, as in `trained`; nothing for the base, whose axes they are.
      **kwargs: of `dataclasses.field`, such as ``default``.

    Returns:
      A field of a dataclass.

    Example:
      >>> from jlora.variants import frozen
      >>> frozen("rank out").metadata["trained"]
      False
    """
    return dataclasses.field(metadata={"trained": False, "dims": dims}, **kwargs)


def static(**kwargs: Any) -> Any:
    """Declares a field of a node that is part of the tree's structure, not a leaf: a setting.

    Its value must be hashable and comparable, since `jax.jit` compiles anew where it differs.

    Args:
      **kwargs: of `dataclasses.field`, such as ``default``.

    Returns:
      A field of a dataclass.

    Example:
      >>> from jlora.variants import static
      >>> static(default=1.0).default
      1.0
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


def sizes_of(node: Any, dims: str, known: Mapping[str, int] = MappingProxyType({})) -> tuple[int, ...]:
    """The shape of a field of a node, or of a kernel's: `known` has the sizes of its own words."""
    sizes = lambda word: [node.shape[axis] for axis in getattr(node.axes, f"{word}_axis")]
    groups = [sizes(word) if word in GROUPS else [known[word]] for word in dims.split()]
    if dims.startswith("batch") and getattr(node, "layers", None) is not None:
        groups[0][0] = len(node.layers)
    return tuple(size for group in groups for size in group)


def axes_of(node: Any, dims: str, x: Any, shape: tuple[int, ...]) -> list[int | None]:
    """Which axis of a base of this shape each axis of a node's array is; None: one of its own, or in part.

    An array that tells no dims is like the base if it has its shape, and has nothing of it otherwise.
    """
    if not dims:
        return list(range(len(shape))) if tuple(x.shape) == shape else [None] * len(x.shape)
    groups = [getattr(node.axes, f"{word}_axis") if word in GROUPS else (None,) for word in dims.split()]
    axes = [axis for group in groups for axis in group]
    return [None, *axes[1:]] if dims.startswith("batch") and node.layers is not None else axes


def of_layers(node: Any, x: jax.Array) -> jax.Array:
    """A node's or a kernel's base, or an array of its shape, with the adapted layers alone."""
    layers = getattr(node, "layers", None)
    return x if layers is None else jnp.take(x, jnp.asarray(layers), axis=node.axes.batch_axis[0])


def matrices(node: Any, x: jax.Array) -> jax.Array:
    """The same as matrices (batch..., in, out), with in axes and out axes flattened, in float32."""
    axes = node.axes
    ordered = jnp.transpose(of_layers(node, x), (*axes.batch_axis, *axes.in_axis, *axes.out_axis))
    sizes = [math.prod(sizes_of(node, word)) for word in ("in", "out")]
    return ordered.astype(jnp.float32).reshape(*sizes_of(node, "batch"), *sizes)


def mapped(node: Any, fn: Callable[..., Any], *stacked: Any) -> Any:
    """Calls a function of one kernel's arrays for each place of the batch axes, on which they are stacked first."""
    for _ in node.axes.batch_axis:
        fn = jax.vmap(fn)
    return fn(*stacked)


def map_fields(fn: Callable[[str, Any], Any], node: Any) -> Any:
    """The node with ``fn(dims, array)`` for each of its arrays."""

    def mapped(dims: Any, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(fn(d, x) for d, x in zip(dims, value, strict=bool(value)))
        return fn(dims, value)

    given = {f.name: mapped(f.metadata.get("dims", ""), getattr(node, f.name)) for f in leaf_fields(node)}
    return dataclasses.replace(node, **given)


def own_sizes(node: Any, dims: str, x: Any) -> dict[str, int]:
    """The sizes of the words of `dims` that are no axes of the base, as x has them."""
    words = [w for word in dims.split() for w in ([word] * len(getattr(node.axes, f"{word}_axis", (0,))))]
    return {word: size for word, size in zip(words, x.shape, strict=False) if word not in GROUPS}


def leaf_fields(node: Any) -> list[dataclasses.Field]:
    """The fields of a node that hold arrays."""
    return [field for field in dataclasses.fields(node) if not field.metadata.get("static")]  # type: ignore[arg-type]
