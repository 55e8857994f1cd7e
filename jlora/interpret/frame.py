"""One jaxpr that is being walked: what its variables hold, and which of its products read the same input."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jlora.interpret import compat

CAST = "convert_element_type"
NAMES = frozenset({"name", "copy", "copy_p"})  # equations whose result is their input
VIEWS = frozenset({CAST, "reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "rev"})  # of one input


class Reader(NamedTuple):
    """A product, its place among the equations, and on which side it has the input that was asked for."""

    index: int
    eqn: Any
    is_left: bool


class Frame:
    """The state of a walk over one jaxpr.

    Args:
      jaxpr: an open jaxpr.
      values: of its variables.

    Attributes:
      env: what the variables hold now.
      index: the place of the equation whose turn it is.
      done: the places of the equations that were evaluated, some of them ahead of their turn.
      dense: what weights are densely, where something needed it.
      thin: for variables that were made by repeating an array, that array and its shape with size 1 there.
      middles: for products, their input times the first factor, where another product has computed it for them.
    """

    def __init__(self, jaxpr: Any, values: Sequence[Any]) -> None:
        self.jaxpr = jaxpr
        self.env = dict(zip(compat.invars(jaxpr), values, strict=True))
        self.index = 0
        self.done: set[int] = set()
        self.dense: dict[Any, Any] = {}
        self.thin: dict[Any, Any] = {}
        self.middles: dict[int, Any] = {}
        self._numbers = _numbers(jaxpr.eqns)
        self._sources = {e.outvars[0]: e.invars[0] for e in jaxpr.eqns if _is_of_one(e, {CAST})}
        self._makers = {e.outvars[0]: (i, e) for i, e in enumerate(jaxpr.eqns) if _is_of_one(e, VIEWS | NAMES)}
        self._readers = _readers(jaxpr.eqns, self._numbers)
        inputs = [atom for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general" for atom in eqn.invars]
        self._counts = collections.Counter(self._origin(atom) for atom in inputs if not compat.is_literal(atom))
        self._copies: dict[Any, Any] = {}

    def value(self, atom: Any) -> Any:
        return atom.val if compat.is_literal(atom) else self.env[atom]

    def drop(self, var: Any) -> None:
        """Forgets a variable that nothing reads any more."""
        for held in (self.env, self.dense, self.thin):
            held.pop(var, None)

    def note(self, eqn: Any, inputs: Sequence[Any]) -> None:
        """Keeps what an equation tells of its result: what it repeated, a copy of what it cast while that is there."""
        name = eqn.primitive.name
        if name == "broadcast_in_dim" and len(inputs) == 1:
            self.thin[eqn.outvars[0]] = inputs[0], _before(eqn)
        if name == CAST:
            self.copy(eqn.invars[0], inputs[0])

    def readers(self, eqn: Any, is_left: bool) -> Iterable[Reader]:
        """The products of which one operand is the same value as this one's, contracted over the same axes."""
        return self._readers[_reading(eqn, is_left, self._numbers)]

    def maker(self, var: Any) -> tuple[int, Any] | None:
        """The equation that views another variable as this one, and its place."""
        return self._makers.get(var)

    def copy(self, atom: Any, x: Any) -> Any:
        """A copy of a value that several products read, one for all; the value itself if one reads it, or it is known.

        So what flows back from their low-rank paths is summed by itself. Else it stands between what flows back from
        the bases' products, and on a mesh XLA sums these over devices one by one in place of once. A copy of what was
        cast is the copy, cast likewise.
        """
        if compat.is_literal(atom) or not compat.is_traced(x) or self._counts[self._origin(atom)] < 2:
            return x
        if atom not in self._copies:
            source = self._copies.get(self._sources.get(atom))
            self._copies[atom] = jnp.copy(x) if source is None else lax.convert_element_type(source, x.dtype)
        return self._copies[atom]

    def _origin(self, var: Any) -> Any:
        while var in self._sources:
            var = self._sources[var]
        return var


def _before(eqn: Any) -> list[int]:
    """The shape of what an equation repeats along axes, of size 1 on these."""
    places = eqn.params["broadcast_dimensions"]
    sizes = dict(zip(places, eqn.invars[0].aval.shape, strict=True))
    return [sizes.get(axis, 1) for axis in range(len(eqn.params["shape"]))]


def _is_of_one(eqn: Any, names: Iterable[str]) -> bool:
    return eqn.primitive.name in names and len(eqn.invars) == 1 and not compat.is_literal(eqn.invars[0])


def _numbers(eqns: Sequence[Any]) -> dict[Any, Any]:
    """For each variable that is a view of another, the first variable that is the same view of the same value."""
    numbers: dict[Any, Any] = {}
    seen: dict[Any, Any] = {}
    for eqn in eqns:
        if _is_of_one(eqn, NAMES):
            numbers[eqn.outvars[0]] = numbers.get(eqn.invars[0], eqn.invars[0])
        elif _is_of_one(eqn, VIEWS):
            source = numbers.get(eqn.invars[0], eqn.invars[0])
            view = eqn.primitive.name, source, *(eqn.params[name] for name in sorted(eqn.params))
            numbers[eqn.outvars[0]] = seen.setdefault(view, eqn.outvars[0])
    return numbers


def _readers(eqns: Sequence[Any], numbers: dict[Any, Any]) -> dict[Any, list[Reader]]:
    readers = collections.defaultdict(list)
    for index, eqn in enumerate(eqns):
        if eqn.primitive.name == "dot_general":
            for is_left in (False, True):
                if not compat.is_literal(eqn.invars[is_left]):
                    readers[_reading(eqn, is_left, numbers)].append(Reader(index, eqn, is_left))
    return readers


def _reading(eqn: Any, is_left: bool, numbers: dict[Any, Any]) -> Any:
    """What a product reads beside a weight that is its left operand, or its right one."""
    atom = eqn.invars[is_left]
    over, batch = (pair[is_left] for pair in eqn.params["dimension_numbers"])
    return numbers.get(atom, atom), frozenset(over), frozenset(batch)
