"""The nodes of several adapters on one base: for each variant a class with its fields, which have an axis more.

The axis of the adapters stands behind the base's batch axes, so that loops over layers slice it along, and the rank
next to it, so that the ranks of all adapters are one axis without a copy.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.checkpoint.about import CLASSES
from jlora.nodes.axes import Axes
from jlora.nodes.fields import GROUPS, frozen, leaf_fields, static, trained
from jlora.nodes.node import AdaptedParam, TrainableParam, with_linear
from jlora.variants import VARIANTS
from jlora.variants.bias import LoraBiasParam
from jlora.variants.ia3 import Ia3InParam
from jlora.variants.tokens import TokensParam

OWN = ("scale", "dropout", "layers")  # static settings in which adapters may differ
SEVERAL = -1.0  # in the place of a dropout: they have different ones


class Member(NamedTuple):
    """What one of several adapters has of its own.

    Args:
      rank: None where its class has none.
      scale, dropout, layers: None where its class has no such setting.
      parts: of each field that holds a tuple, how many arrays.
    """

    rank: int | None = None
    scale: float | None = None
    dropout: float | None = None
    layers: tuple[int, ...] | None = None
    parts: tuple[int, ...] = ()

    @classmethod
    def of(cls, node: Any) -> Member:
        """That of an adapter's node."""
        own = {name: getattr(node, name, None) for name in OWN}
        parts = tuple(len(x) for f in array_fields(type(node)) if isinstance(x := getattr(node, f.name), tuple))
        return cls(rank_of(node), **own, parts=parts)


class StackedParam(AdaptedParam):
    """A kernel with the factors of several adapters; `jlora.adapters.stack` makes it, of a class for each variant.

    Attributes:
      of: the variant.
      members: for each adapter what it has of its own; None for one that has nothing here.
      scales: of the adapters, an array of shape (adapters,), or () where they are all the same.
      present: 1 for adapters that have something here and 0 for others, of shape (batch..., adapters); () where all
        have.
    """

    of: ClassVar[type[AdaptedParam]]

    members: tuple[Member | None, ...]
    scales: tuple[Any, ...]
    present: tuple[Any, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Those that all have in common; the largest rank."""
        there = [Member(*member) for member in self.members if member is not None]
        ranks = [member.rank for member in there if member.rank is not None]
        scales = {member.scale for member in there}
        found = {"rank": max(ranks) if ranks else None, "scaling": scales.pop() if len(scales) == 1 else None}
        return {name: x for name, x in found.items() if x is not None}

    def resolved(self) -> AdaptedParam:
        """The node of the one adapter that is left where `jax.vmap` takes the others away."""
        if has_members(self):
            raise ValueError(
                f"this tree holds {len(self.members)} adapters on one base (jlora.adapters.stack): take one with "
                "jlora.adapters.select(tree, i), their sum with mix(tree, weights), one for each row of a batch with "
                "batched(fn)(tree, ids, x), or one for each call of jax.vmap over jlora.adapters.axes(tree)"
            )
        return member(self, lambda x, _: x)

    def effective(self, name: str, key: jax.Array | None) -> Any:
        return self.resolved().effective(name, key)


def has_members(node: StackedParam) -> bool:
    """Whether the axis of the adapters is there.

    Raises:
      ValueError: if some arrays have it, and some have not.
    """
    found = {_has_members(node, dims, x) for dims, x in _arrays(node) if x is not None}
    if len(found) > 1:
        raise ValueError(
            "some arrays of this adapter are stacked and some are not: jax.vmap took one half of the tree apart and "
            "not the other. Give both their axes, as in jax.vmap(step, in_axes=(jlora.adapters.axes(trainable), "
            "jlora.adapters.axes(frozen), 0))"
        )
    return found == {True}


def _has_members(node: StackedParam, dims: str, x: Any) -> bool:
    return len(x.shape) == (len(_labels(node, dims)) if dims else len(node.shape) + 1)


def _arrays(node: StackedParam) -> list[tuple[str, Any]]:
    """The arrays that have the axis, with their dims."""
    fields = array_fields(type(node))
    return [pair for f in fields for pair in zip(*_parts(f, getattr(node, f.name)), strict=False)]


def _parts(field: dataclasses.Field, value: Any) -> tuple[Sequence[str], Sequence[Any]]:
    dims = field.metadata["dims"]
    return (dims, value) if isinstance(value, tuple) else ((dims,), (value,))


@functools.cache
def stacked_class(cls: type[AdaptedParam]) -> Any:
    """The class of the nodes of several adapters of a variant."""
    own = [(f.name, Any, _with_members(f)) for f in dataclasses.fields(cls) if f.name != "base"]  # type: ignore[arg-type]
    has = lambda name: any(name == field for field, *_ in own)
    shared: dict[str, Any] = {} if has("axes") else {"axes": getattr(cls, "axes", Axes((), ()))}
    shared |= {} if has("layers") else {"layers": None}
    fields = [
        ("base", Any, frozen()),
        *([("value", Any, trained())] if cls is TrainableParam else []),
        *own,
        ("scales", tuple[Any, ...], frozen(("adapters",), default=())),
        ("present", tuple[Any, ...], frozen(("batch adapters",), default=())),
        ("members", tuple[Member | None, ...], static(default=())),
    ]
    space = {"of": cls, "__doc__": StackedParam.__doc__, "KINDS": cls.KINDS, **shared}
    name = f"Stacked{cls.__name__}"
    made = dataclasses.make_dataclass(
        name, fields, bases=(StackedParam,), namespace=space, frozen=True, eq=False, kw_only=True
    )
    made.__module__ = __name__
    setattr(sys.modules[__name__], name, made)  # where pickle looks for it
    return jax.tree_util.register_dataclass(made)


def _with_members(field: dataclasses.Field) -> Any:
    """The field of a variant as that of several adapters."""
    dims = field.metadata.get("dims", "")
    given = {"metadata": field.metadata | {"dims": jax.tree.map(stacked_dims, dims)}}
    return dataclasses.field(
        **given, **({"default": field.default} if field.default is not dataclasses.MISSING else {})
    )


def stacked_dims(dims: str) -> str:
    """The axes of a field of several adapters; of one that is like the base none are told, the adapters come first."""
    words = dims.split()
    first = [word for word in words if word == "batch"]
    last = sorted((word for word in words if word != "batch"), key=lambda word: word != "rank")
    return " ".join([*first, "adapters", *last]) if words else ""


def _labels(node: Any, dims: str) -> list[Any]:
    """A label for each axis of a field."""
    axes = lambda word: getattr(node.axes, f"{word}_axis") if word in GROUPS else (0,)
    return [(word, i) for word in dims.split() for i in range(len(axes(word)))]


def place_of(node: Any, dims: str) -> int:
    """Where the axis of the adapters is in a field of several, of these dims or of a variant's."""
    words = dims.split()
    return _labels(node, dims if "adapters" in words else stacked_dims(dims)).index(("adapters", 0)) if words else 0


def stored_order(node: Any, dims: str) -> list[int]:
    """The axes of a variant's field in the order in which several are stacked; empty: as they are."""
    labels = _labels(node, dims)
    return [labels.index(label) for label in _labels(node, stacked_dims(dims)) if label != ("adapters", 0)]


def array_fields(cls: Any) -> list[dataclasses.Field]:
    """The fields of a variant that hold arrays of an adapter."""
    return [f for f in dataclasses.fields(cls) if f.name != "base" and not f.metadata.get("static")]


def axis_of(node: Any, dims: str, word: str) -> int | None:
    """Which axis of a variant's field has this name; None: it has none."""
    labels = _labels(node, dims)
    return labels.index((word, 0)) if (word, 0) in labels else None


def rank_of(node: Any) -> int | None:
    """The size of the axis called rank, of a variant's node; None: it has none."""
    parts = [pair for f in array_fields(type(node)) for pair in zip(*_parts(f, getattr(node, f.name)), strict=False)]
    return next((x.shape[axis] for dims, x in parts if (axis := axis_of(node, dims, "rank")) is not None), None)


def total_layers(node: Any) -> tuple[int, ...]:
    """The layers that are stacked on the first batch axis of a base; one where there is none."""
    batch = getattr(getattr(node, "axes", None), "batch_axis", ())
    return tuple(range(node.shape[batch[0]] if batch else 1))


def layers_of(node: Any) -> tuple[int, ...]:
    layers = getattr(node, "layers", None)
    return total_layers(node) if layers is None else layers


def member(node: Any, pick: Callable[[Any, int], Any], number: Any = None, *, is_own: bool = False) -> AdaptedParam:
    """One of several adapters, with as many ranks and layers as all have.

    Args:
      node: of several adapters; or of one, where the axis is gone.
      pick: (array, axis) -> the array without this axis.
      number: which adapter, to be traced: -1 is none of them, and one that is not there gives NaN. None: the one left.
      is_own: leave its arrays as they are, without what it has of its own.
    """
    on = _present(node, pick, number)
    if node.of is TrainableParam:
        return TrainableParam(_bad(_where(on, pick(node.value, 0), node.base), number, len(node.members)))
    arrays = {f.name: _picked(node, f, pick) for f in array_fields(node.of)}
    statics = {f.name: getattr(node, f.name) for f in dataclasses.fields(node.of) if f.metadata.get("static")}
    made: Any = node.of(node.base, **arrays, **statics)  # type: ignore[call-arg]
    if is_own:
        return made
    if node.scales:
        made = times(dataclasses.replace(made, scale=1.0), pick(node.scales[0], 0))
    if on is not None:
        made = _neutral_unless(on, made)
    return _finite_if_there(made, number, len(node.members))


def _present(node: Any, pick: Callable[[Any, int], Any], number: Any) -> Any:
    """Whether the adapter has something here, of shape (batch...) or (); None: it has."""
    there = pick(node.present[0], place_of(node, "batch adapters")) > 0 if node.present else None
    if number is None:
        return there
    return number >= 0 if there is None else there & (number >= 0)


def _picked(node: Any, field: dataclasses.Field, pick: Callable[[Any, int], Any]) -> Any:
    """A field of a variant of one adapter, of the field of several."""

    def one(dims: str, x: Any) -> Any:
        x = pick(x, place_of(node, dims))
        order = stored_order(node, dims)
        return lax.transpose(x, [order.index(i) for i in range(len(order))]) if order != sorted(order) else x

    value, dims = getattr(node, field.name), field.metadata["dims"]
    return tuple(map(one, dims, value)) if isinstance(value, tuple) else one(dims, value)


def times(node: Any, by: Any) -> Any:
    """A variant's node whose update is so many times as large: its fields of `LINEAR` are multiplied."""
    if not type(node).LINEAR:
        raise ValueError(
            f"{type(node).__name__} does not say in which fields its update is linear (LINEAR), so that adapters of "
            "different scales can't be chosen by a number that is traced: give them one scale"
        )
    return with_linear(node, lambda x: (x * by).astype(x.dtype))


def _neutral_unless(on: Any, node: Any) -> Any:
    """The node where the adapter is there, and one that changes nothing elsewhere."""
    other = node.identity()
    pick = lambda x, y: x if x is y else _where(on, x, y)
    bare = lambda node: dataclasses.replace(node, base=None)
    return dataclasses.replace(jax.tree.map(pick, bare(node), bare(other)), base=node.base)


def _where(on: Any, x: Any, y: Any) -> Any:
    """x or y, by a mask of their first axes."""
    return x if on is None else jnp.where(on.reshape(*on.shape, *[1] * (x.ndim - on.ndim)), x, y)


def _finite_if_there(node: Any, number: Any, count: int) -> Any:
    if number is None:
        return node
    fields = [f.name for f in leaf_fields(node) if f.metadata["trained"]]
    return dataclasses.replace(node, **{name: _bad(getattr(node, name), number, count) for name in fields})


def _bad(x: Any, number: Any, count: int) -> Any:
    """x, or NaN if there is no adapter of this number."""
    return x if number is None else jnp.where((number >= -1) & (number < count), x, jnp.nan)


CLASSES.extend(map(stacked_class, (*VARIANTS.values(), Ia3InParam, LoraBiasParam, TokensParam, TrainableParam)))
