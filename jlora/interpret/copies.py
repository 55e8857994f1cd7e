"""Copies of what several products read, so that their low-rank paths have an input of their own."""

from __future__ import annotations

import collections
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.interpret import compat

CAST = "convert_element_type"


class Copies:
    """One copy of each value that several products of a jaxpr read, as it is or cast; a cast one is cast likewise."""

    def __init__(self, jaxpr: Any) -> None:
        casts = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == CAST and not compat.is_literal(eqn.invars[0])]
        self._source = {eqn.outvars[0]: eqn.invars[0] for eqn in casts}
        products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
        inputs = [atom for eqn in products for atom in eqn.invars if not compat.is_literal(atom)]
        self._readers = collections.Counter(map(self._origin, inputs))
        self._made: dict[Any, Any] = {}

    def _origin(self, var: Any) -> Any:
        while var in self._source:
            var = self._source[var]
        return var

    def of(self, atom: Any, x: Any) -> Any:
        """The copy of a value; the value itself if one product alone reads it, or it is known."""
        if compat.is_literal(atom) or not compat.is_traced(x) or self._readers[self._origin(atom)] < 2:
            return x
        if atom not in self._made:
            source = self._made.get(self._source.get(atom))
            self._made[atom] = jnp.copy(x) if source is None else lax.convert_element_type(source, x.dtype)
        return self._made[atom]
