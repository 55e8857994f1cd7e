"""Parts of a tree's leaves as PyTorch's parameters."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.nodes import qarray
from jlora.nodes.axes import Axes
from jlora.nodes.fields import map_fields
from jlora.nodes.node import is_node
from jlora.peft import layout
from jlora.peft.adapter import CONV, EMBEDDING
from jlora.peft.layout import Part, Words
from jlora.peft.names import Slot
from jlora.tree import merge


def parameter_of(name: str, slot: Slot) -> str:
    """A parameter's own name, where its module's stands for its weight."""
    if slot.is_native:
        return slot.path.removeprefix("params/").replace("/", ".")
    is_own = slot.layout.is_parameter or "batch" in (slot.layout.dims or "") or name.rpartition(".")[2] == "bias"
    return name if is_own else f"{name}.weight"


def torch_array(name: str, slot: Slot, leaf: Any, axes: Axes | None = None) -> np.ndarray:
    """A part of a plain leaf as PyTorch's parameter.

    Raises:
      ValueError: if its axes are not known.
    """
    return _as_torch(name, slot, np.asarray(qarray.part(leaf, slot.place) if slot.index else qarray.dense(leaf)), axes)


def merged_part(name: str, slot: Slot, leaf: Any, axes: Axes | None = None) -> np.ndarray:
    """A part of a leaf, plain or adapted, as PyTorch's parameter, its adapter merged; no other part is computed."""
    axes = getattr(leaf, "axes", axes)
    if not is_node(leaf):
        return torch_array(name, slot, leaf, axes)
    if slot.fixed and axes is not None and hasattr(leaf, "layers") and {*slot.fixed} <= {*axes.batch_axis}:
        return _as_torch(name, slot, np.asarray(_merged_slice(slot, leaf)), axes)
    leaf = dataclasses.replace(leaf, base=qarray.dense(leaf.base))
    whole = merge({slot.path: leaf})[slot.path]
    return _as_torch(name, slot, np.asarray(whole[slot.place] if slot.fixed else whole), axes)


def _merged_slice(slot: Slot, node: Any) -> Any:
    """Some places on the stacked axes of a node, merged."""
    first = slot.index[node.axes.batch_axis[0]]
    if node.layers is not None and first not in (None, *node.layers):
        return qarray.part(node.base, slot.place)
    at: dict[int, Any] = {axis: slot.index[axis] for axis in slot.fixed}
    if node.layers is not None and first is not None:
        at[node.axes.batch_axis[0]] = node.layers.index(first)
    of_batch = tuple(slice(None) if axis not in at else at[axis] for axis in node.axes.batch_axis)
    cut = lambda dims, x: x[of_batch] if dims.startswith("batch") else x
    left = [axis for axis in range(len(node.shape)) if axis not in slot.fixed]
    moved = lambda group: tuple(left.index(axis) for axis in group if axis in left)
    axes = Axes(moved(node.axes.in_axis), moved(node.axes.out_axis), moved(node.axes.batch_axis))
    layers = node.layers if first is None else None
    part: Any = map_fields(cut, dataclasses.replace(node, base=None))
    part = dataclasses.replace(part, base=jnp.asarray(qarray.part(node.base, slot.place)), axes=axes, layers=layers)
    return merge({slot.path: part})[slot.path]


def _as_torch(name: str, slot: Slot, x: np.ndarray, axes: Axes | None) -> np.ndarray:
    if slot.is_native:
        return x
    words = _words(name, slot, x.ndim, axes)
    part = Part(words, x.shape, slot.layout)
    if {*words} <= {"out"}:
        return layout.torch_outputs(x, part).reshape(-1).astype(x.dtype)
    return layout.torch_weight(x, layout.kind_of(name, slot.path, words, axes), part).astype(x.dtype)


def _words(name: str, slot: Slot, ndim: int, axes: Axes | None) -> Words:
    """Which axes of a part are in and out: as the node or the map says, or by Flax's conventions."""
    if ndim < 2 or slot.path.rpartition("/")[2] == "bias":
        return ("out",) * ndim
    if axes is not None:
        return layout.words_of(slot, axes)
    if slot.layout.dims is not None:
        return tuple(slot.layout.dims.split())
    if ndim in (2, 4):
        return ("in",) * (ndim - 1) + ("out",)
    raise ValueError(
        f"peft: the axes of {slot.path}, {name} in PyTorch, are not known: give sites=jlora.sites(fn, params, *args), "
        'or a third to its entry in the map, such as jlora.peft.Layout("in out out")'
    )


def shape_of(name: str, slot: Slot, leaf: Any, axes: Axes | None = None) -> tuple[int, ...]:
    """The shape of a part of a leaf as PyTorch's parameter."""
    sizes = slot.sizes(leaf.shape)
    if slot.is_native:
        return sizes
    words = _words(name, slot, len(sizes), getattr(leaf, "axes", axes))
    part = Part(words, sizes, slot.layout)
    ins, outs = part.of("in"), part.of("out")
    if {*words} <= {"out"}:
        return (math.prod(sizes),)
    kind = layout.kind_of(name, slot.path, words, getattr(leaf, "axes", axes))
    if kind == CONV:
        return (*outs, *((ins[-1], *ins[:-1]) if part.is_channel_last else ins))
    flat = (math.prod(ins), math.prod(outs))
    return (*part.of("batch"), *(flat if kind == EMBEDDING or part.is_conv1d else flat[::-1]))
