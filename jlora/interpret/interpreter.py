"""The walk over a jaxpr's equations.

Equations that no tracked weight reaches are evaluated as JAX would. The others go to the rule of their primitive; one
that has none, or whose rule declines, gets the weight computed densely: slower, never wrong, never without a word.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret import compat
from jlora.interpret.copies import CAST, Copies
from jlora.interpret.factored import Tracked

Rule = Callable[..., Any]
DECLINED = NotImplemented


class _Walk(threading.local):
    """Where the walks of one thread are: an interpreter is shared by all threads that trace."""

    def __init__(self) -> None:
        self.around: list[Any] = []  # the equations whose jaxprs are being walked, outermost first
        self.copies: list[Copies] = []  # of the inputs of products, in each jaxpr that is being walked
        self.thin: list[dict[Any, Any]] = []  # what arrays were before they were repeated, likewise


class Interpreter:
    """Evaluates jaxprs on values some of which are `Tracked`.

    Args:
      rules: for each primitive's name, a function (interpreter, equation, *values) -> value or list of values, or
        `DECLINED`.
      dense: (interpreter, weight, equation or None, reason) -> array: computes a weight that a use needs densely. The
        equation is None where the weight is a result of the function.
      told: (interpreter, weight, equation, kind): told of each use that was computed through the factors.
      inline: whether functions that were compiled on their own are walked in place, so that each use is told anew.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        dense: Callable[..., Any],
        told: Callable[..., None] = lambda *_: None,
        inline: bool = False,
    ) -> None:
        self.rules = rules
        self.inline = inline
        self._dense = dense
        self._told = told
        self._walk = _Walk()

    def densify(self, weight: Any, eqn: Any, reason: str) -> Any:
        return self._dense(self, weight, eqn, reason)

    def factored(self, weight: Any, eqn: Any, kind: str) -> None:
        self._told(self, weight, eqn, kind)

    def aside(self, atom: Any, x: Any) -> Any:
        """The value of a product's input for its low-rank path: a copy, if several products read it.

        So what flows back from their low-rank paths is summed by itself. Else it stands between what flows back from
        the bases' products, and on a mesh XLA sums these over devices one by one in place of once.
        """
        return self._walk.copies[-1].of(atom, x)

    def thin(self, atom: Any, x: Any) -> Any:
        """The value of an equation's input, of size 1 on the axes along which it was made by repeating another."""
        found = None if compat.is_literal(atom) else self._walk.thin[-1].get(atom)
        return x if found is None else jnp.reshape(*found)

    def place(self, eqn: Any) -> tuple[int, ...]:
        """Tells a use of this walk from all others."""
        return tuple(map(id, (*self._walk.around, eqn)))

    def source(self, eqn: Any) -> str:
        """The user's line that made an equation, or the nearest one around it."""
        lines = (compat.source_line(inner) for inner in (eqn, *reversed(self._walk.around)) if inner is not None)
        return next(filter(None, lines), "")

    def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr; results that are views of a weight stay `Tracked`."""
        self._walk.copies.append(Copies(compat.open_jaxpr(jaxpr)[0]))
        self._walk.thin.append({})
        try:
            return self._walked(jaxpr, values)
        finally:
            self._walk.copies.pop()
            self._walk.thin.pop()

    def _walked(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        jaxpr, consts = compat.open_jaxpr(jaxpr)
        env = dict(zip(compat.invars(jaxpr), [*consts, *values], strict=True))
        dense: dict[Any, Any] = {}
        last_use = _last_uses(jaxpr)
        with contextlib.ExitStack() as scopes:
            scope = ""
            for index, eqn in enumerate(jaxpr.eqns):
                if (name := compat.name_stack(eqn)) != scope:
                    scope = name
                    scopes.close()
                    scopes.enter_context(jax.named_scope(name) if name else contextlib.nullcontext())
                inputs = [atom.val if compat.is_literal(atom) else env[atom] for atom in eqn.invars]
                with compat.context(eqn):
                    outputs = self._step(index, eqn, inputs, dense)
                env.update(zip(eqn.outvars, outputs, strict=True))
                for var in last_use.get(index, ()):
                    env.pop(var, None)
                    dense.pop(var, None)
                    self._walk.thin[-1].pop(var, None)
        return [atom.val if compat.is_literal(atom) else env[atom] for atom in jaxpr.outvars]

    def arrays(self, values: Sequence[Any], eqn: Any, reason: str) -> list[Any]:
        """The values with every tracked weight among them computed densely."""
        return [self.densify(v, eqn, reason) if isinstance(v, Tracked) else v for v in values]

    def _step(self, index: int, eqn: Any, inputs: list[Any], dense: dict[Any, Any]) -> Sequence[Any]:
        tracked = [i for i, value in enumerate(inputs) if isinstance(value, Tracked)]
        outputs = DECLINED
        if tracked and (rule := self.rules.get(eqn.primitive.name)):
            self._walk.around.append(eqn)
            try:
                outputs = rule(self, eqn, *(_fresh(value, index) for value in inputs))
            finally:
                self._walk.around.pop()
        if outputs is DECLINED:
            for i in tracked:
                atom = eqn.invars[i]
                if atom not in dense:
                    dense[atom] = self.densify(inputs[i], eqn, f"{eqn.primitive.name} has no factored rule here")
                inputs[i] = dense[atom]
            outputs = compat.bind(eqn, inputs)
        if eqn.primitive.name == "broadcast_in_dim" and not tracked and len(inputs) == 1:
            self._walk.thin[-1][eqn.outvars[0]] = inputs[0], _before(eqn)
        if eqn.primitive.name == CAST and not tracked:
            self._walk.copies[-1].of(eqn.invars[0], inputs[0])  # while it is there
        return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _before(eqn: Any) -> list[int]:
    """The shape of what an equation repeats along axes, of size 1 on these."""
    places = eqn.params["broadcast_dimensions"]
    sizes = dict(zip(places, eqn.invars[0].aval.shape, strict=True))
    return [sizes.get(axis, 1) for axis in range(len(eqn.params["shape"]))]


def _fresh(value: Any, index: int) -> Any:
    """Gives each equation a dropout key of its own, the same whenever the jaxpr runs again."""
    key = getattr(value, "key", None) if isinstance(value, Tracked) else None
    return value if key is None else value.replace(key=jax.random.fold_in(key, index))


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """For each equation, the variables that nothing after it reads."""
    seen = {atom for atom in jaxpr.outvars if not compat.is_literal(atom)}
    last: dict[int, list[Any]] = {}
    for index in range(len(jaxpr.eqns) - 1, -1, -1):
        for atom in jaxpr.eqns[index].invars:
            if not compat.is_literal(atom) and atom not in seen:
                seen.add(atom)
                last.setdefault(index, []).append(atom)
    return last
