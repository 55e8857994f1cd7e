"""Rules of the primitives that hold other jaxprs: the walk goes on inside them.

Functions with a derivative of their own (`custom_jvp`, `custom_vjp`) keep it: a weight that enters one is computed
densely, since a rule for f(W) says nothing about f at a factored W.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret import compat
from jlora.interpret.factored import Factored, Tracked, steps
from jlora.interpret.interpreter import Interpreter
from jlora.interpret.laid import Laid, laid_out, sliceable, step
from jlora.interpret.places import entries, names, of_factor
from jlora.interpret.quantised import constrained, settled, sliced, specs_of


def jit(interpreter: Interpreter, eqn: Any, *values: Any) -> list[Any]:
    """A function compiled on its own stays so, and is compiled once."""
    jaxpr = eqn.params["jaxpr"]
    inputs = _constrained(values, eqn.params.get("in_shardings", ()))
    if interpreter.inline:
        outputs = interpreter.run(jaxpr, inputs)
    else:
        outputs = _handed_on(jaxpr, inputs, _jitted(interpreter, jaxpr, eqn.params.get("name", "call")))
    return _constrained(outputs, eqn.params.get("out_shardings", ()))


@functools.lru_cache(maxsize=1024)
def _jitted(interpreter: Interpreter, jaxpr: Any, name: str) -> Callable[..., list[Any]]:
    def call(*values: Any) -> list[Any]:
        return interpreter.run(jaxpr, values)

    call.__name__ = call.__qualname__ = name
    return jax.jit(call)


def _constrained(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    given = [*shardings, *[None] * (len(values) - len(shardings))]
    return [_constrain(v, s) if isinstance(s, jax.sharding.Sharding) else v for v, s in zip(values, given, strict=True)]


def _constrain(value: Any, sharding: Any) -> Any:
    if isinstance(value, Tracked):
        return value.replace(base=constrained(settled(value.base), sharding))
    return lax.with_sharding_constraint(value, sharding)


def remat(interpreter: Interpreter, eqn: Any, *values: Any) -> list[Any]:
    jaxpr = eqn.params["jaxpr"]
    run = lambda *inner: interpreter.run(jaxpr, inner)
    settings = {"prevent_cse": eqn.params["prevent_cse"], "policy": eqn.params["policy"]}
    return _handed_on(jaxpr, values, jax.checkpoint(run, **settings))


def _handed_on(jaxpr: Any, values: Sequence[Any], function: Callable[..., list[Any]]) -> list[Any]:
    """Calls a function on a jaxpr's values; a weight that it returns as it came stays the very same."""
    jaxpr, _ = compat.open_jaxpr(jaxpr)
    place = {var: i for i, var in enumerate(jaxpr.invars)}
    sources = [None if compat.is_literal(var) else place.get(var) for var in jaxpr.outvars]
    outputs = function(*values)
    weights: dict[Any, Tracked] = {i: value for i, value in enumerate(values) if isinstance(value, Tracked)}
    return [weights.get(i, out) for i, out in zip(sources, outputs, strict=True)]


class _Carry:
    """A loop's carry: weights that the body hands on unchanged are constants (`held`), all else moves, dense."""

    def __init__(self, interpreter: Interpreter, eqn: Any, jaxpr: Any, init: Sequence[Any], offset: int) -> None:
        jaxpr, _ = compat.open_jaxpr(jaxpr)
        inside, outside = jaxpr.invars[offset : offset + len(init)], jaxpr.outvars[: len(init)]
        is_held = [isinstance(v, Tracked) and i is o for v, i, o in zip(init, inside, outside, strict=True)]
        self.size = len(init)
        self.held = {i: value for i, value in enumerate(init) if is_held[i]}
        moving = [value for i, value in enumerate(init) if i not in self.held]
        self.moving = interpreter.arrays(moving, eqn, "it is carried through a loop that changes it")

    def moved(self, values: Sequence[Any]) -> list[Any]:
        return [value for i, value in enumerate(values) if i not in self.held]

    def whole(self, moving: Sequence[Any], held: dict[int, Any] | None = None) -> list[Any]:
        rest = iter(moving)
        held = self.held if held is None else held
        return [held[i] if i in held else next(rest) for i in range(self.size)]


def scan(interpreter: Interpreter, eqn: Any, *values: Any) -> list[Any]:
    """Weights come in as constants or stacked; a stacked one is sliced with its factors."""
    params = eqn.params
    jaxpr, length = params["jaxpr"], params["length"]
    consts, init, xs = compat.scan_parts(params, values)
    whole = lambda x: interpreter.densify(x, eqn, "the loop takes the axis apart on which it is rotated")
    xs = [whole(x) if _is_rotated(x) else x for x in xs]
    carry = _Carry(interpreter, eqn, jaxpr, init, offset=len(consts))
    stacked = [_Stacked(x, length) if isinstance(x, Tracked) else x for x in xs]
    slices = [x.slices if isinstance(x, _Stacked) else x for x in stacked]
    returned: dict[int, Tracked] = {}  # stacked results that are stacked inputs
    keys = [_split(value, length) for value in consts], {i: _split(v, length) for i, v in carry.held.items()}

    def body(moving: list[Any], inputs: Any) -> tuple[list[Any], list[Any]]:
        parts, (const_keys, held_keys) = inputs
        now = [_with_key(v, k) for v, k in zip(consts, const_keys, strict=True)]
        state = carry.whole(moving, {i: _with_key(v, held_keys[i]) for i, v in carry.held.items()})
        inner = [x.whole(part) if isinstance(x, _Stacked) else part for x, part in zip(stacked, parts, strict=True)]
        outputs = interpreter.run(jaxpr, [*now, *state, *inner])
        after, made = carry.moved(outputs[: carry.size]), outputs[carry.size :]
        returned.update({i: xs[k] for i, value in enumerate(made) if (k := _place(value, inner)) is not None})
        made = [value for i, value in enumerate(made) if i not in returned]
        changed = interpreter.arrays([*after, *made], eqn, "the body of a scan returns it")
        return changed[: len(moving)], changed[len(moving) :]

    settings = {"length": length, "reverse": params["reverse"], "unroll": params["unroll"]}
    final, ys = lax.scan(body, carry.moving, (slices, keys), **settings)
    made = iter(ys)
    count = len(eqn.outvars) - carry.size
    return [*carry.whole(final), *(returned[i] if i in returned else next(made) for i in range(count))]


def _is_rotated(value: Any) -> bool:
    """Whether a weight has an input transform on its first axis, or where views have taken that apart."""
    return isinstance(value, Factored) and bool(value.turns) and value.turned_axis in (0, None)


def _place(value: Any, stacked: Sequence[Any]) -> int | None:
    """Which of a scan's stacked weights a value is, unchanged."""
    is_same = lambda other: isinstance(value, Tracked) and isinstance(other, Tracked) and value.base is other.base
    return next((i for i, other in enumerate(stacked) if is_same(other)), None)


class _Stacked:
    """A weight that a scan slices along its first axis, as it does the factors that own it; others are constants."""

    def __init__(self, weight: Tracked, length: int) -> None:
        base, self.base_of = sliced(weight.base, length)
        factors = tuple(map(sliceable, weight.factors))
        has_first = lambda factor: not isinstance(factor, Laid) or factor.order[0] is not None
        is_sliced = [has_first(factor) and (length == 1 or 0 in weight.owned(factor)) for factor in factors]
        pairs = list(zip(factors, is_sliced, strict=True))
        at_each = lambda factor: (
            step(factor) if isinstance(factor, Laid) and not has_first(factor) else laid_out(factor)[0]
        )
        self.fixed = [None if sliced else at_each(factor) for factor, sliced in pairs]
        moving = weight.replace(base=base, factors=tuple(factor if sliced else None for factor, sliced in pairs))
        self.slices = _with_key(moving, _split(weight, length))

    def whole(self, part: Tracked) -> Tracked:
        pairs = zip(part.factors, self.fixed, strict=True)
        return part.replace(
            base=self.base_of(part.base),
            factors=tuple(step(moving) if fixed is None else fixed for moving, fixed in pairs),
        )


def _key(value: Any) -> Any:
    return getattr(value, "key", None) if isinstance(value, Tracked) else None


def _split(value: Any, length: int) -> Any:
    """A dropout key for each step of a loop; None where dropout is off."""
    return None if _key(value) is None else jax.random.split(_key(value), length)


def _with_key(value: Any, key: Any) -> Any:
    return value if key is None else value.replace(key=key)


def _nth(value: Any, count: Any) -> Any:
    return value if _key(value) is None else value.replace(key=jax.random.fold_in(_key(value), count))


def while_(interpreter: Interpreter, eqn: Any, *values: Any) -> list[Any]:
    """Weights come in as constants; the steps are counted, so that each has dropout of its own.

    Under `jax.vmap` the predicate may be one of several loops: those that have ended stay as they are.
    """
    params = eqn.params
    n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    tests, consts, jaxpr = values[:n], values[n:m], params["body_jaxpr"]
    carry = _Carry(interpreter, eqn, jaxpr, values[m:], offset=m - n)

    def go_on(moving: Any) -> Any:
        return interpreter.run(params["cond_jaxpr"], [*tests, *carry.whole(moving)])[0]

    def body(state: Any) -> Any:
        moving, count = state
        now = [_nth(value, count) for value in (*consts, *carry.whole(moving))]
        outputs = carry.moved(interpreter.run(jaxpr, now))
        outputs = interpreter.arrays(outputs, eqn, "the body of a loop returns it")
        going = go_on(moving) if _is_batched(params["cond_jaxpr"]) else None
        return [_chosen(going, new, old) for new, old in zip(outputs, moving, strict=True)], count + 1

    start = (carry.moving, jnp.zeros((), jnp.int32))
    final, _ = lax.while_loop(lambda state: jnp.any(go_on(state[0])), body, start)
    return carry.whole(final)


def _is_batched(predicate: Any) -> bool:
    jaxpr, _ = compat.open_jaxpr(predicate)
    return bool(jaxpr.outvars[0].aval.shape)


def _chosen(going: Any, new: Any, old: Any) -> Any:
    """The new value, of those of several loops that go on."""
    if going is None:
        return new
    return lax.select(lax.broadcast_in_dim(going, new.shape, range(going.ndim)), new, old)


def cond(interpreter: Interpreter, eqn: Any, index: Any, *values: Any) -> list[Any]:
    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        return lambda *inner: interpreter.arrays(interpreter.run(jaxpr, inner), eqn, "a branch returns it")

    return lax.switch(index, [branch(jaxpr) for jaxpr in eqn.params["branches"]], *values)


def shard_map(interpreter: Interpreter, eqn: Any, *values: Any) -> list[Any]:
    """Factors are split along the mesh axes of the base's axes that they own; the rank is whole everywhere."""
    params = eqn.params
    whole = lambda v: interpreter.densify(v, eqn, "the shards cut the blocks of its rotation")
    values = tuple(
        whole(v) if _cuts(v, s, params["mesh"]) else _settled(v)
        for v, s in zip(values, params["in_specs"], strict=True)
    )
    values = tuple(_accounted(v, s) for v, s in zip(values, params["in_specs"], strict=True))
    in_specs = tuple(_split_spec(v, s) for v, s in zip(values, params["in_specs"], strict=True))

    def body(*inner: Any) -> list[Any]:
        return interpreter.arrays(interpreter.run(params["jaxpr"], inner), eqn, "the mapped function returns it")

    settings = {"check_vma": params["check_vma"], "axis_names": params["newly_manual_axes"]}
    out_specs = list(params["out_specs"])
    return jax.shard_map(body, mesh=params["mesh"], in_specs=in_specs, out_specs=out_specs, **settings)(*values)


def _cuts(value: Any, spec: Any, mesh: Any) -> bool:
    """Whether a shard would hold a part of a block of an input transform."""
    if not isinstance(value, Factored) or not value.turns or value.turned_axis is None:
        return False
    along = names(entries(spec, value.ndim)[value.turned_axis])
    shard = value.base.shape[value.turned_axis] // math.prod(mesh.shape[name] for name in along)
    return bool(along) and any(shard % (rows.shape[-1] * steps(stride)[0]) for rows, stride in value.turns)


def _accounted(value: Any, spec: Any) -> Any:
    """A weight that is told along which mesh axes each of its factors is split."""
    if not isinstance(value, Factored):
        return value
    along = lambda factor: frozenset(name for entry in of_factor(value, factor, spec) for name in names(entry))
    return value.replace(varies=tuple(map(along, value.factors)))


def _settled(value: Any) -> Any:
    return value.replace(base=settled(value.base)) if isinstance(value, Tracked) else value


def _split_spec(value: Any, spec: Any) -> Any:
    if not isinstance(value, Tracked):
        return spec
    base = specs_of(value.base, spec)
    split = value.replace(base=base, factors=tuple(of_factor(value, factor, spec) for factor in value.factors))
    return split if _key(value) is None else split.replace(key=jax.P())


def call(interpreter: Interpreter, eqn: Any, *values: Any) -> list[Any]:
    return interpreter.run(eqn.params["call_jaxpr"], values)


CONTROL = {
    "jit": jit,
    "pjit": jit,
    "closed_call": call,
    "core_call": call,
    "scan": scan,
    "while": while_,
    "cond": cond,
    "shard_map": shard_map,
    **dict.fromkeys(compat.REMAT, remat),
}
