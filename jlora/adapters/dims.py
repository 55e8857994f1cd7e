"""The axes of a variant's fields, alone and with one more for the adapters.

The axis of the adapters stands behind the base's batch axes, so that loops over layers slice it along, and the rank
next to it, so that the ranks of all adapters are one axis without a copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jlora.nodes.fields import GROUPS


def stacked_dims(dims: str) -> str:
    """The axes of a field of several adapters; of one that is like the base none are told, the adapters come first."""
    words = dims.split()
    first = [word for word in words if word == "batch"]
    last = sorted((word for word in words if word != "batch"), key=lambda word: word != "rank")
    return " ".join([*first, "adapters", *last]) if words else ""


def labels_of(node: Any, dims: str) -> list[Any]:
    """A label for each axis of a field."""
    axes = lambda word: getattr(node.axes, f"{word}_axis") if word in GROUPS else (0,)
    return [(word, i) for word in dims.split() for i in range(len(axes(word)))]


def place_of(node: Any, dims: str) -> int:
    """Where the axis of the adapters is in a field of several, of these dims or of a variant's."""
    words = dims.split()
    return labels_of(node, dims if "adapters" in words else stacked_dims(dims)).index(("adapters", 0)) if words else 0


def stored_order(node: Any, dims: str) -> list[int]:
    """The axes of a variant's field in the order in which several are stacked; empty: as they are."""
    labels = labels_of(node, dims)
    return [labels.index(label) for label in labels_of(node, stacked_dims(dims)) if label != ("adapters", 0)]


def axis_of(node: Any, dims: str, word: str) -> int | None:
    """Which axis of a variant's field has this name; None: it has none."""
    labels = labels_of(node, dims)
    return labels.index((word, 0)) if (word, 0) in labels else None


def array_fields(cls: Any) -> list[dataclasses.Field]:
    """The fields of a variant that hold arrays of an adapter."""
    return [f for f in dataclasses.fields(cls) if f.name != "base" and not f.metadata.get("static")]


def parts_of(field: dataclasses.Field, value: Any) -> tuple[Sequence[str], Sequence[Any]]:
    dims = field.metadata["dims"]
    return (dims, value) if isinstance(value, tuple) else ((dims,), (value,))


def rank_of(node: Any) -> int | None:
    """The size of the axis called rank, of a variant's node; None: it has none."""
    parts = [pair for f in array_fields(type(node)) for pair in zip(*parts_of(f, getattr(node, f.name)), strict=False)]
    return next((x.shape[axis] for dims, x in parts if (axis := axis_of(node, dims, "rank")) is not None), None)


def total_layers(node: Any) -> tuple[int, ...]:
    """The layers that are stacked on the first batch axis of a base; one where there is none."""
    batch = getattr(getattr(node, "axes", None), "batch_axis", ())
    return tuple(range(node.shape[batch[0]] if batch else 1))


def layers_of(node: Any) -> tuple[int, ...]:
    layers = getattr(node, "layers", None)
    return total_layers(node) if layers is None else layers
