"""Which results of a trace are its inputs: what `nnx.scan` and the like hand back of a module as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jlora.interpret import compat

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")


def unchanged(fn: Callable[..., Sequence[Any]], arrays: Sequence[Any]) -> list[bool]:
    """For each result of ``fn(*arrays)``, of as many, whether it is the argument in its place."""
    jaxpr = jax.make_jaxpr(fn)(*arrays).jaxpr
    sources = _sources(jaxpr)
    return [sources(result) is given for result, given in zip(jaxpr.outvars, jaxpr.invars, strict=True)]


def _sources(jaxpr: Any) -> Callable[[Any], Any]:
    """From a variable of a jaxpr to the input that it is, or to itself."""
    made_by = {id(out): (eqn, i) for eqn in jaxpr.eqns for i, out in enumerate(eqn.outvars)}

    def source(variable: Any) -> Any:
        if isinstance(variable, core.Literal) or id(variable) not in made_by:
            return variable
        eqn, i = made_by[id(variable)]
        operand = _operand(eqn, i)
        return variable if operand is None else source(eqn.invars[operand])

    return source


def _operand(eqn: Any, i: int) -> int | None:
    """Which operand of an equation its i-th result is; None if it is computed."""
    name, params = eqn.primitive.name, eqn.params
    if name == "optimization_barrier":
        return i
    if name in _CALLS:
        return _input(params.get("jaxpr") or params.get("call_jaxpr"), i)
    if name == "scan":
        _, init, xs = compat.scan_parts(params, range(len(eqn.invars)))
        place = _input(params["jaxpr"], i)
        return place if place in (init[i : i + 1] if i < len(init) else xs) else None
    if name == "cond":
        places = {_input(branch, i) for branch in params["branches"]}
        place = places.pop() if len(places) == 1 else None
        return None if place is None else place + 1
    if name == "while":
        consts = params["body_nconsts"]
        return params["cond_nconsts"] + consts + i if _input(params["body_jaxpr"], i) == consts + i else None
    return None


def _input(closed: Any, i: int) -> int | None:
    """Which input of a jaxpr its i-th result is."""
    jaxpr = getattr(closed, "jaxpr", closed)
    found = _sources(jaxpr)(jaxpr.outvars[i])
    return next((at for at, variable in enumerate(jaxpr.invars) if variable is found), None)
