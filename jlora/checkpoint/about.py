"""What is said of a node, so that it can be made anew: class, settings, and its arrays by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.nodes import placement
from jlora.nodes.axes import Axes
from jlora.nodes.fields import leaf_fields
from jlora.nodes.node import AdaptedParam, TrainableParam
from jlora.variants import VARIANTS
from jlora.variants.bias import LoraBiasParam
from jlora.variants.tokens import TokensParam

_CLASSES = (*VARIANTS.values(), TrainableParam, LoraBiasParam, TokensParam)


def about(node: AdaptedParam) -> dict[str, Any]:
    """A node without the values of its arrays, as JSON."""
    static = {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.metadata.get("static")}  # type: ignore[arg-type]
    return {
        "class": type(node).__name__,
        "arrays": {name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in arrays(node).items()},
        "settings": {name: _told(x) if isinstance(x, Axes) else x for name, x in static.items()},
    }


def _told(axes: Axes) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(axes).items() if value is not None}


def arrays(node: AdaptedParam) -> dict[str, Any]:
    """The arrays of a node that are saved, those of a tuple one by one."""
    found: dict[str, Any] = {}
    for name in _fields(node):
        value = getattr(node, name)
        parts = value if isinstance(value, tuple) else (value,)
        found |= {f"{name}.{i}" if isinstance(value, tuple) else name: x for i, x in enumerate(parts)}
    return found


def _fields(node: AdaptedParam) -> list[str]:
    """The fields that are saved: all but a frozen base."""
    return [f.name for f in leaf_fields(node) if f.name != "base" or f.metadata["trained"]]


def empty(path: str, told: Mapping[str, Any], variants: Sequence[type[AdaptedParam]]) -> Any:
    """The node without its arrays.

    Raises:
      ValueError: if its class is neither jlora's nor among `variants`.
    """
    cls: Any = {cls.__name__: cls for cls in (*_CLASSES, *variants)}.get(told["class"])
    if cls is None:
        raise ValueError(
            f"checkpoint.load: {path} is a {told['class']}, which jlora does not have; give the class, as in "
            f"load(directory, params, variants=[{told['class']}])"
        )
    fixed = lambda x: tuple(x) if isinstance(x, list) else Axes(**x) if isinstance(x, dict) else x
    holes = {f.name: None for f in dataclasses.fields(cls) if not f.metadata.get("static")}
    return cls(**holes, **{name: fixed(value) for name, value in told["settings"].items()})


def targets(node: Any, base: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays to be had: each to lie beside the base."""
    shapes = {name: jax.ShapeDtypeStruct(x["shape"], jnp.dtype(x["dtype"])) for name, x in told["arrays"].items()}
    placed = placement.of_node(filled(node, None, shapes), base)
    if placed is None:
        return shapes
    places = arrays(placed)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in shapes.items()}


def filled(node: Any, base: Any, values: Mapping[str, Any]) -> Any:
    """The node with its arrays and its base."""
    given: dict[str, Any] = {"base": base}
    for name in _fields(node):
        parts = [values[key] for key in sorted(values) if key.startswith(f"{name}.")]
        given[name] = values[name] if name in values else tuple(parts)
    return dataclasses.replace(node, **given)
