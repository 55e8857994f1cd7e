"""A quantised weight as the interpreter sees it: views move its codes and scales, a product makes its numbers.

The numbers are made where they are used: once in the forward pass, tied to the product's other input, and again in the
backward pass, tied to its cotangent. Else XLA would make them once, ahead of all, and keep them in between.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jlora.interpret import compat, eightbits, stored
from jlora.interpret.linear import linear
from jlora.interpret.places import entries
from jlora.nodes import qarray

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantised:
    """A quantised weight, seen through views.

    Args:
      stored: a `QArray`, moved by the views that codes and scales can follow.
      layer: which of a scanned stack's layers, by loop: the stack stays whole, and is indexed where numbers are made.
        Sliced by the loop it would be converted ahead of it, where XLA has no slices of so few bits.
      dtypes: the types to which the numbers are cast first, one after the other.
      views: functions of the numbers: the views, and casts between them, that only they can follow.
      seen: the shape and the type that the views give; None: those of the codes.
      native: whether products in 8 bits are computed so by hardware that has them.
    """

    stored: Any
    layer: tuple[jax.Array, ...] = ()
    dtypes: tuple[Any, ...] = dataclasses.field(default=(), metadata={"static": True})
    views: tuple[Callable[[Any], Any], ...] = dataclasses.field(default=(), metadata={"static": True})
    seen: tuple[tuple[int, ...], Any] | None = dataclasses.field(default=None, metadata={"static": True})
    native: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape[len(self.layer) :]) if self.seen is None else self.seen[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        if self.seen is not None:
            return self.seen[1]
        return self.dtypes[-1] if self.dtypes else self.stored.dtype

    def replace(self, **changes: Any) -> Quantised:
        return dataclasses.replace(self, **changes)

    def dense(self) -> jax.Array:
        x = qarray.dense(self.indexed().stored)
        for dtype in self.dtypes:
            x = lax.convert_element_type(x, dtype)
        return functools.reduce(lambda x, view: view(x), self.views, x)

    def abstract(self) -> jax.ShapeDtypeStruct:
        """What a trace is given in its place."""
        codes = jax.typeof(self.indexed().stored.qvalue)
        place = None if codes.sharding.mesh.empty else codes.sharding
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=place, manual_axis_type=codes.manual_axis_type)

    def indexed(self) -> Quantised:
        """The weight with its layer taken out of the stack."""
        sizes = self.stored.shape[: len(self.layer)]

        def pick(x: Any) -> Any:
            for n, i in zip(sizes, self.layer, strict=True):
                at = i if x.shape[0] == n else i // (n // x.shape[0])  # where layers share a scale
                x = lax.dynamic_index_in_dim(x, at, 0, keepdims=False)
            return x

        return self.replace(stored=jax.tree.map(pick, self.stored), layer=())

    def settled(self) -> Any:
        """The weight itself, if codes and scales followed all views; its numbers otherwise."""
        return self.dense() if self.views else self.indexed()


def array_of(x: Any) -> Any:
    """The numbers of a weight, quantised or not."""
    return x.dense() if isinstance(x, Quantised) else x


def made_beside(x: Any, to: Any) -> Any:
    """The numbers of a weight, made where `to` is used if it is quantised."""
    return qarray.tied(x, to).dense() if isinstance(x, Quantised) else x


def shape_of(x: Any) -> Any:
    """What stands for a weight in a trace: a quantised one's shape and type."""
    return x.abstract() if isinstance(x, Quantised) else x


def codes_of(x: Any) -> Any:
    """The array that tells where a weight lies."""
    return x.indexed().stored.qvalue if isinstance(x, Quantised) else x


def settled(x: Any) -> Any:
    """A weight whose arrays lie as functions see it, for what splits arrays: scans, shards, constraints."""
    return x.settled() if isinstance(x, Quantised) else x


def sliced(x: Any, length: int) -> tuple[Any, Callable[[Any], Any]]:
    """What a loop slices of a stacked weight, and the function from a slice to a step's weight."""
    x = x.dense() if isinstance(x, Quantised) and x.views else x
    if not isinstance(x, Quantised):
        return x, lambda part: part
    return jnp.arange(length), lambda i: x.replace(layer=(*x.layer, i))


def constrained(x: Any, sharding: Any) -> Any:
    """A weight that is to lie so on the mesh."""
    if not isinstance(x, Quantised):
        return lax.with_sharding_constraint(x, sharding)
    return x.replace(stored=stored.constrained(x.stored, sharding))


def specs_of(x: Any, spec: Any) -> Any:
    """The specs of a weight's arrays where it has this one: scales are split as the codes, but for single ones."""
    if not isinstance(x, Quantised):
        return spec
    along = entries(spec, x.ndim)
    part = lambda array: PartitionSpec(*(e if n > 1 else None for n, e in zip(array.shape, along, strict=True)))
    return x.replace(stored=jax.tree.map(part, x.stored))


def bound(eqn: Any, values: Sequence[Any]) -> Any:
    """Evaluates an equation as JAX would; a weight that is quantised stays so where it is only viewed."""
    places = [i for i, value in enumerate(values) if isinstance(value, Quantised)]
    if not places:
        return compat.bind(eqn, values)
    if len(places) == 1 and eqn.primitive.name in PRODUCTS:
        return _product(eqn, list(values), places[0])
    is_late = any(values[i].layer for i in places)  # of a stack that is whole the numbers are viewed
    rules = (_view, _stored_view) if is_late else (_stored_view, _view)
    made = next((made for rule in rules if (made := rule(eqn, values, places)) is not None), None)
    return compat.bind(eqn, [array_of(value) for value in values]) if made is None else made


def _product(eqn: Any, values: list[Any], place: int) -> Any:
    """A product, linear in its other input: the numbers are made for it, and for its derivative once more."""
    weight = values.pop(place)
    x, *rest = values

    def product(weight: Any, x: Any, *rest: Any) -> Any:
        inputs = [x, *rest]
        inputs.insert(place, weight.dense())
        return compat.bind(eqn, inputs)

    def forward(weight: Any, x: Any, *rest: Any) -> Any:
        weight = qarray.tied(weight, x)
        if not weight.native or weight.views or rest:
            return product(weight, x, *rest)
        exact = lambda stored, x: product(weight.replace(stored=stored, layer=()), x)
        codes = weight.indexed().stored
        return eightbits.faster(eqn, codes, place, exact)(codes, x)

    is_frozen = not jnp.issubdtype(x.dtype, jnp.inexact)
    return forward(weight, x, *rest) if is_frozen else linear(eqn, forward, product, weight, x, *rest)


def _stored_view(eqn: Any, values: Sequence[Any], places: list[int]) -> Any:
    """A view, or views, that codes and scales follow; None where they can't."""
    rule, is_join = stored.STORED.get(eqn.primitive.name), len(places) == len(values)
    if rule is None or not (is_join or places == [0]):
        return None
    weights = [values[i].indexed() for i in places]
    weight = weights[0]
    if any(w.views or w.dtypes != weight.dtypes for w in weights):
        return None
    made = rule(eqn, *(w.stored for w in weights), *values[len(places) :])
    if made is None:
        return None
    return (
        [weight.replace(stored=x) for x in made] if eqn.primitive.multiple_results else weight.replace(stored=made[0])
    )


def _view(eqn: Any, values: Sequence[Any], places: list[int]) -> Quantised | None:
    """A view that only the numbers follow; None where it needs other arrays."""
    weight = values[places[0]]
    if eqn.primitive.name == "convert_element_type" and not weight.views:
        return weight.replace(dtypes=(*weight.dtypes, eqn.params["new_dtype"]))
    others = tuple(value for i, value in enumerate(values) if i not in places)
    if len(places) > 1 or eqn.primitive.multiple_results or any(isinstance(x, jax.Array) for x in others):
        return None
    view = functools.partial(_again, eqn, others, places[0])
    made = eqn.outvars[0].aval
    return weight.replace(views=(*weight.views, view), seen=(tuple(made.shape), made.dtype))


def _again(eqn: Any, others: tuple[Any, ...], place: int, x: Any) -> Any:
    return compat.bind(eqn, [*others[:place], x, *others[place:]])
