"""The nodes of several adapters on one base: for each variant a class with its fields, which have an axis more."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jlora.adapters.dims import array_fields, labels_of, parts_of, rank_of, stacked_dims
from jlora.adapters.member import member
from jlora.checkpoint.about import CLASSES
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.node import AdaptedParam, TrainableParam
from jlora.variants import VARIANTS
from jlora.variants.bias import GainedBiasParam, LoraBiasParam
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
      types: of its arrays, by name, in the order of the fields.
    """

    rank: int | None = None
    scale: float | None = None
    dropout: float | None = None
    layers: tuple[int, ...] | None = None
    parts: tuple[int, ...] = ()
    types: tuple[str, ...] = ()

    @classmethod
    def of(cls, node: Any) -> Member:
        """That of an adapter's node."""
        own = {name: getattr(node, name, None) for name in OWN}
        values = [getattr(node, f.name) for f in array_fields(type(node))]
        parts = tuple(len(value) for value in values if isinstance(value, tuple))
        types = tuple(jnp.dtype(x.dtype).name for x in jax.tree.leaves(values))
        return cls(rank_of(node), **own, parts=parts, types=types)


class StackedParam(AdaptedParam):
    """A kernel with the factors of several adapters; `jlora.adapters.stack` makes it, of a class for each variant.

    Attributes:
      of: the variant.
      members: for each adapter what it has of its own; None for one that has nothing here.
      scales: of the adapters, an array of shape (adapters,), or () where they are all the same.
      present: 1 for adapters that have something here and 0 for others, of shape (batch..., adapters); () where all
        have.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> trees = [jlora.wrap(params, jlora.LoraSpec(rank=2, seed=seed)) for seed in range(3)]
      >>> node = jlora.adapters.stack(trees)["kernel"]
      >>> isinstance(node, jlora.adapters.StackedParam), node.of.__name__, len(node.members)
      (True, 'LoraParam', 3)
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
            raise ValueError(self.advice())
        return member(self, lambda x, _: x)

    def advice(self) -> str:
        return (
            f"this tree holds {len(self.members)} adapters on one base (jlora.adapters.stack): take one with "
            "jlora.adapters.select(tree, i), their sum with mix(tree, weights), one for each row of a batch with "
            "batched(fn)(tree, ids, x), or one for each call of jax.vmap over jlora.adapters.axes(tree)"
        )

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
    whole = len(labels_of(node, dims)) if dims else len(node.shape) + 1
    if len(x.shape) not in (whole, whole - 1) or not _is_batch(node, dims, x.shape, len(x.shape) == whole):
        raise ValueError(
            f"an array of this tree of several adapters has shape {tuple(x.shape)} here, beside a base of shape "
            f"{tuple(node.shape)}: jax.vmap took another axis than that of the adapters, which stands behind those of "
            "scanned layers and experts. Give it in_axes=jlora.adapters.axes(tree), and out_axes likewise"
        )
    return len(x.shape) == whole


def _is_batch(node: Any, dims: str, shape: tuple[int, ...], is_whole: bool) -> bool:
    """Whether an array has the base's batch axes first."""
    if not dims.startswith("batch"):
        return True
    sizes = [node.shape[axis] for axis in node.axes.batch_axis]
    sizes[:1] = [len(node.layers)] if sizes and node.layers is not None else sizes[:1]
    return list(shape[: len(sizes)]) == sizes and (not is_whole or shape[len(sizes)] == len(node.members))


def _arrays(node: StackedParam) -> list[tuple[str, Any]]:
    """The arrays that have the axis, with their dims."""
    fields = array_fields(type(node))
    return [pair for f in fields for pair in zip(*parts_of(f, getattr(node, f.name)), strict=False)]


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


CLASSES.extend(
    map(stacked_class, (*VARIANTS.values(), Ia3InParam, LoraBiasParam, GainedBiasParam, TokensParam, TrainableParam))
)
