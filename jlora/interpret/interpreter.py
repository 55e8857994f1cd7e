"""The walk over a jaxpr's equations.

Equations that no tracked weight reaches are evaluated as JAX would. The others go to the rule of their primitive; one
that has none, or whose rule declines, gets the weight computed densely: slower, never wrong, never without a word.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret import compat
from jlora.interpret.active import refused
from jlora.interpret.factored import Tracked
from jlora.interpret.frame import Frame

Rule = Callable[..., Any]
DECLINED = NotImplemented
AS_STORED = frozenset(
    {"dot_general", "convert_element_type", "copy", "copy_p", "name", "transpose", "jit", "pjit", "scan"}
) | {*compat.REMAT}  # primitives whose rules take factors as they are stored

# Those that look at a weight another way, or hand it on: a weight that was merged ahead stays so.
KEEP_MERGED = AS_STORED | frozenset(
    "squeeze reshape broadcast_in_dim slice dynamic_slice split unstack stop_gradient optimization_barrier scan while"
    " cond closed_call core_call shard_map reshard sharding_constraint".split()
)


class _Walk(threading.local):
    """Where the walks of one thread are: an interpreter is shared by all threads that trace."""

    def __init__(self) -> None:
        self.around: list[Any] = []  # the equations whose jaxprs are being walked, outermost first
        self.frames: list[Frame] = []  # of these jaxprs


class Interpreter:
    """Evaluates jaxprs on values some of which are `Tracked`.

    Args:
      rules: for each primitive's name, a function (interpreter, equation, *values) -> value or list of values, or
        `DECLINED`.
      dense: (interpreter, weight, equation or None, reason) -> array: computes a weight that a use needs densely. The
        equation is None where the weight is a result of the function.
      told: (interpreter, weight, equation, kind, group, strategy): told of each use that was computed through the
        factors, with the names of all weights of which the input was multiplied by the first factors at once.
      inline: whether functions that were compiled on their own are walked in place, so that each use is told anew.
      always: rules of primitives that no tracked weight reaches, where JAX's own are not to be taken.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        dense: Callable[..., Any],
        told: Callable[..., None] = lambda *_: None,
        inline: bool = False,
        always: Mapping[str, Rule] = MappingProxyType({}),
    ) -> None:
        self.rules = rules
        self.always = always
        self.inline = inline
        self._dense = dense
        self._told = told
        self._walk = _Walk()

    def densify(self, weight: Any, eqn: Any, reason: str) -> Any:
        return self._dense(self, weight, eqn, reason)

    def factored(
        self, weight: Any, eqn: Any, kind: str, group: tuple[str, ...] = (), strategy: str = "factored"
    ) -> None:
        if kind != "dot" and getattr(weight, "active", None) is not None:
            raise refused(weight.name)
        self._told(self, weight, eqn, kind, group, strategy)

    @property
    def frame(self) -> Frame:
        return self._walk.frames[-1]

    def thin(self, atom: Any, x: Any) -> Any:
        """The value of an equation's input, of size 1 on the axes along which it was made by repeating another."""
        found = None if compat.is_literal(atom) else self.frame.thin.get(atom)
        return x if found is None else jnp.reshape(*found)

    def ahead(self, atom: Any) -> Any:
        """The value of an equation's input; of a view of a weight also before its turn; None if it has none yet."""
        if compat.is_literal(atom):
            return atom.val
        if atom not in self.frame.env and (made := self.frame.maker(atom)):
            index, eqn = made
            if isinstance(self.ahead(eqn.invars[0]), Tracked):
                self._evaluate(index, eqn)
        return self.frame.env.get(atom)

    def place(self, eqn: Any) -> tuple[int, ...]:
        """Tells a use of this walk from all others."""
        return tuple(map(id, (*self._walk.around, eqn)))

    def source(self, eqn: Any) -> str:
        """The user's line that made an equation, or the nearest one around it."""
        lines = (compat.source_line(inner) for inner in (eqn, *reversed(self._walk.around)) if inner is not None)
        return next(filter(None, lines), "")

    def run(self, jaxpr: Any, values: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr; results that are views of a weight stay `Tracked`."""
        jaxpr, consts = compat.open_jaxpr(jaxpr)
        self._walk.frames.append(Frame(jaxpr, [*consts, *values]))
        try:
            return self._walked(self.frame)
        finally:
            self._walk.frames.pop()

    def _walked(self, frame: Frame) -> list[Any]:
        last_use = _last_uses(frame.jaxpr)
        with contextlib.ExitStack() as scopes:
            scope = ""
            for index, eqn in enumerate(frame.jaxpr.eqns):
                if (name := compat.name_stack(eqn)) != scope:
                    scope = name
                    scopes.close()
                    scopes.enter_context(jax.named_scope(name) if name else contextlib.nullcontext())
                frame.index = index
                if index not in frame.done:
                    self._evaluate(index, eqn)
                for var in last_use.get(index, ()):
                    frame.drop(var)
        return [frame.value(atom) for atom in frame.jaxpr.outvars]

    def _evaluate(self, index: int, eqn: Any) -> None:
        frame = self.frame
        inputs = [_seen(frame.value(atom), index, eqn.primitive.name) for atom in eqn.invars]
        with compat.context(eqn):
            outputs = self._step(eqn, inputs)
        frame.env.update(zip(eqn.outvars, outputs, strict=True))
        frame.done.add(index)

    def arrays(self, values: Sequence[Any], eqn: Any, reason: str) -> list[Any]:
        """The values with every tracked weight among them computed densely."""
        return [self.densify(v, eqn, reason) if isinstance(v, Tracked) else v for v in values]

    def _step(self, eqn: Any, inputs: list[Any]) -> Sequence[Any]:
        frame, name = self.frame, eqn.primitive.name
        tracked = [i for i, value in enumerate(inputs) if isinstance(value, Tracked)]
        outputs = DECLINED
        if rule := (self.rules if tracked else self.always).get(name):
            self._walk.around.append(eqn)
            try:
                outputs = rule(self, eqn, *inputs)
            finally:
                self._walk.around.pop()
        if outputs is DECLINED:
            for i in tracked:
                atom = eqn.invars[i]
                if atom not in frame.dense:
                    frame.dense[atom] = self.densify(inputs[i], eqn, f"{name} has no factored rule here")
                inputs[i] = frame.dense[atom]
            outputs = compat.bind(eqn, inputs)
        if not tracked:
            frame.note(eqn, inputs)
        return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _seen(value: Any, index: int, name: str) -> Any:
    """A value as a rule sees it: factors are arrays for most, and each equation has a dropout key of its own.

    The key is the same whenever the jaxpr runs again.
    """
    if not isinstance(value, Tracked):
        return value
    key = getattr(value, "key", None)
    value = value if key is None else value.replace(key=jax.random.fold_in(key, index))
    value = value if name in KEEP_MERGED else value.unmerged() if name == "gather" else value.alone()
    return value if name in AS_STORED else value.laid_out()


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
