"""What is said of a node, so that it can be made anew: class, settings, and its arrays by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jlora.checkpoint.told import Told
from jlora.nodes import placement
from jlora.nodes.axes import Axes, of_conv, of_use
from jlora.nodes.fields import leaf_fields
from jlora.nodes.node import AdaptedParam, TrainableParam
from jlora.variants import VARIANTS
from jlora.variants.bias import GainedBiasParam, LoraBiasParam
from jlora.variants.ia3 import Ia3InParam
from jlora.variants.tokens import TokensParam

# Those of jlora; `jlora.adapters` adds its own.
CLASSES: list[type[AdaptedParam]] = [
    *VARIANTS.values(), Ia3InParam, TrainableParam, LoraBiasParam, GainedBiasParam, TokensParam
]  # fmt: skip


def about(node: AdaptedParam) -> dict[str, Any]:
    """A node without the values of its arrays, as JSON."""
    static = {name: getattr(node, name) for name in _static(type(node))}
    return {
        "class": type(node).__name__,
        "arrays": {name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in arrays(node).items()},
        "settings": {name: dataclasses.asdict(x) if isinstance(x, Axes) else x for name, x in static.items()},
    }


def _static(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]


def arrays(node: AdaptedParam) -> dict[str, Any]:
    """The arrays of a node that are saved, those of a tuple one by one."""
    found: dict[str, Any] = {}
    for f in saved_fields(node):
        value = getattr(node, f.name)
        parts = value if isinstance(value, tuple) else (value,)
        found |= {f"{f.name}.{i}" if isinstance(value, tuple) else f.name: x for i, x in enumerate(parts)}
    return found


def saved_fields(node: Any) -> list[dataclasses.Field]:
    """The fields that are saved: all that hold arrays but a frozen base."""
    return [f for f in leaf_fields(node) if f.name != "base" or f.metadata["trained"]]


def check(told: Told) -> None:
    """Refuses what says nothing of a node, whichever its class is."""
    parts = told.parts(("class", "arrays", "settings"))
    parts["class"].word()
    parts["settings"].entries()
    for x in parts["arrays"].entries().values():
        array(x)


def array(told: Told, optional: Sequence[str] = ()) -> jax.ShapeDtypeStruct:
    """The shape and the type of an array."""
    parts = told.form(optional)
    return jax.ShapeDtypeStruct(parts["shape"].shape(), parts["dtype"].dtype())


def empty(path: str, told: Told, variants: Sequence[type[AdaptedParam]]) -> Any:
    """The node without its arrays.

    Raises:
      ValueError: if its class is neither jlora's nor among `variants`, or a setting is none of that class.
    """
    name = told.at("class")
    cls: Any = {cls.__name__: cls for cls in (*CLASSES, *variants)}.get(name.word())
    if cls is None:
        raise ValueError(
            f"{name.file}: {path} is a {name.value} (at nodes.{path}.class), which jlora does not have; give the "
            f"class, as in load(directory, params, variants=[{name.value}])"
        )
    read = _READERS | (_OWN if cls in CLASSES else {})
    defaults = {f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    names = _static(cls)
    # which checkpoints of an older jlora lack
    newer = [name for name in names if cls in CLASSES and name in defaults and name not in _READERS]
    given = told.at("settings").parts([name for name in names if name not in newer], newer)
    settings = {name: read.get(name, _any)(x) for name, x in given.items()}
    holes = {f.name: None for f in leaf_fields(cls)}
    return cls(**holes, **settings)


def _axes(told: Told) -> Axes:
    parts = told.parts(("in_axis", "out_axis", "batch_axis"), ("lookup", "conv"))
    if (conv := parts.pop("conv", None)) is not None:
        if conv.value is not True:
            raise conv.refused("true")
        return of_conv(Axes(**{name: x.wholes() for name, x in parts.items() if name != "lookup"}))
    lookup = parts.pop("lookup", None)
    if lookup is not None and not isinstance(lookup.value, bool | None):
        raise lookup.refused("true, false or null")
    return of_use(Axes(**{name: x.wholes() for name, x in parts.items()}), lookup and lookup.value)


def _layers(told: Told) -> tuple[int, ...] | None:
    return None if told.value is None else _distinct(told)


def _distinct(told: Told) -> tuple[int, ...]:
    numbers = told.wholes()
    if len({*numbers}) < len(numbers):
        raise told.refused("numbers that differ")
    return numbers


def _dropout(told: Told) -> float:
    if not 0 <= told.number() < 1:
        raise told.refused("a rate in [0, 1)")
    return told.value


def _size(told: Told) -> int:
    if type(told.value) is not int or told.value < 1:
        raise told.refused("a whole number from 1 on")
    return told.value


def _any(told: Told) -> Any:
    is_axes = isinstance(told.value, dict) and {"in_axis", "out_axis"} <= {*told.value}
    return _axes(told) if is_axes else told.setting()


_READERS = {"axes": _axes, "layers": _layers, "scale": Told.number, "dropout": _dropout}
_OWN = {"size": _size, "tokens": _distinct}  # of jlora's classes; another's may call something else so


def targets(node: Any, base: Any, told: Told) -> dict[str, Any]:
    """The arrays to be had: each to lie beside the base."""
    shapes = {name: array(x) for name, x in told.at("arrays").entries().items()}
    placed = placement.of_node(filled(node, None, shapes), base)
    if placed is None:
        return shapes
    places = arrays(placed)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in shapes.items()}


def filled(node: Any, base: Any, values: Mapping[str, Any]) -> Any:
    """The node with its arrays and its base."""
    given: dict[str, Any] = {"base": base}
    for name in (f.name for f in saved_fields(node)):
        parts = [values[key] for key in tuple_names(name, len(values)) if key in values]
        given[name] = values[name] if name in values else tuple(parts)
    return dataclasses.replace(node, **given)


def tuple_names(name: str, count: int) -> list[str]:
    """The names of the arrays of a field that holds a tuple."""
    return [f"{name}.{i}" for i in range(count)]
