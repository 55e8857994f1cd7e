"""Nodes in the files of others: `flax.serialization` and `jax.export` know them.

Both keep what is no array of a node as one text, which has a version and the fields by name: an older file is read by
a later jlora, and one that differs from what it is read into is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax.export
from flax import serialization

from jlora.checkpoint.about import CLASSES
from jlora.nodes.axes import Axes, of_conv, of_use
from jlora.nodes.fields import leaf_fields
from jlora.nodes.node import AdaptedParam

__all__ = ["register"]

VERSION = 1
_TOLD = "jlora"  # beside a node's arrays in a state dict


def register(cls: type[AdaptedParam]) -> type[AdaptedParam]:
    """Makes `flax.serialization` and `jax.export` know a variant of one's own; those of jlora are known.

    Call it once for each class, after `jax.tree_util.register_dataclass`; it may be used as a decorator.

    Args:
      cls: the class, as `jlora.variants.AdaptedParam` describes it. Its settings are numbers, texts, tuples and `Axes`.

    Returns:
      The class itself.

    Raises:
      ValueError: from JAX or Flax, if the class is registered already.

    Example:
      >>> import dataclasses, flax.serialization, jax, jax.numpy as jnp
      >>> from jlora.serial import register
      >>> from jlora.variants import AdaptedParam, frozen, trained
      >>> @register
      ... @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True, eq=False)
      ... class ShiftParam(AdaptedParam):
      ...     base: jax.Array = frozen()
      ...     shift: jax.Array = trained()
      ...
      ...     def effective(self, name, key):
      ...         return self.base + self.shift
      >>> state = flax.serialization.to_state_dict({"bias": ShiftParam(jnp.ones(3), jnp.zeros(3))})
      >>> state["bias"]["shift"]
      Array([0., 0., 0.], dtype=float32)
    """
    serialization.register_serialization_state(cls, _to_state, _from_state)
    names = _static(cls)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"{cls.__module__.partition('.')[0]}.{cls.__name__}",
        serialize_auxdata=lambda values: _text(cls, dict(zip(names, values, strict=True))).encode(),
        deserialize_auxdata=lambda data: tuple(_settings(cls, data.decode()).values()),
    )
    return cls


def _static(cls: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("static"))


def _text(cls: Any, settings: Mapping[str, Any]) -> str:
    told = {name: _encoded(value) for name, value in settings.items()}
    return json.dumps({"version": VERSION, "class": cls.__name__, "settings": told}, sort_keys=True)


def _encoded(value: Any) -> Any:
    if isinstance(value, Axes):
        return {"axes": dataclasses.asdict(value) | {"lookup": getattr(value, "lookup", None)}}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(x) for x in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"jlora: a setting of a node is a {type(value).__name__}, {value!r}; files hold numbers, texts, tuples and Axes"
    )


def _decoded(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "axes" in value:
        parts = {name: tuple(x) for name, x in value["axes"].items() if name not in ("lookup", "conv")}
        if value["axes"].get("conv"):
            return of_conv(Axes(**parts))
        return of_use(Axes(**parts), value["axes"].get("lookup"))
    return tuple(map(_decoded, value["tuple"]))


def _settings(cls: Any, text: str) -> dict[str, Any]:
    """The settings of a class as a text has them; a field that a later version added has its default."""
    told = json.loads(text)
    if told["version"] > VERSION:
        raise ValueError(
            f"a {cls.__name__} of version {told['version']} was written by a later jlora; this reads {VERSION}"
        )
    if told["class"] != cls.__name__:
        raise ValueError(f"expected a {cls.__name__}, found a {told['class']}")
    found, names = told["settings"], _static(cls)
    if unknown := sorted({*found} - {*names}):
        raise ValueError(f"a {cls.__name__} has no setting {unknown[0]!r}; this jlora has {', '.join(names)}")
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    return {name: _decoded(found[name]) if name in found else defaults[name] for name in names}


def _to_state(node: Any) -> dict[str, Any]:
    arrays = {f.name: serialization.to_state_dict(getattr(node, f.name)) for f in leaf_fields(node)}
    return {_TOLD: _text(type(node), {name: getattr(node, name) for name in _static(type(node))}), **arrays}


def _from_state(node: Any, state: dict[str, Any]) -> Any:
    cls = type(node)
    if not isinstance(state, dict) or _TOLD not in state:
        raise ValueError(
            f"expected the state of a {cls.__name__}, found {type(state).__name__}: a tree that is not wrapped?"
        )
    settings = _settings(cls, state[_TOLD])
    for name, value in settings.items():
        if value != getattr(node, name):
            raise ValueError(
                f"a {cls.__name__} differs in {name}: expected {getattr(node, name)!r}, found {value!r}; wrap the tree "
                "that is read into with the spec of the one that was written"
            )
    fields = [f.name for f in leaf_fields(node)]
    if lacking := [name for name in fields if name not in state]:
        raise ValueError(f"the state of a {cls.__name__} lacks {', '.join(lacking)}")
    read = lambda name: serialization.from_state_dict(getattr(node, name), state[name], name=name)
    return dataclasses.replace(node, **{name: read(name) for name in fields})


@functools.cache
def register_all() -> None:
    """Registers the classes of jlora."""
    for cls in dict.fromkeys(CLASSES):
        register(cls)
