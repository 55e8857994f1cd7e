"""Rules of the primitives that look at a weight another way: the factors are looked at the same way.

Each rule binds the equation on the base as it was written and changes the factors, whose axes are the base's (or of
size 1) with the rank behind them. A rule that can't keep the form declines, and the weight is computed densely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.interpret.arithmetic import ARITHMETIC
from jlora.interpret.factored import Factored, Tracked
from jlora.interpret.interpreter import DECLINED, Interpreter
from jlora.interpret.joins import JOINS
from jlora.interpret.laid import Laid
from jlora.interpret.moves import MOVES
from jlora.interpret.products import computing
from jlora.interpret.quantised import bound
from jlora.interpret.stored import regrouped


def same(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    """Copies, names: the base alone is told."""
    return weight.replace(base=bound(eqn, [weight.base]))


def cast(_: Interpreter, eqn: Any, weight: Tracked) -> Any:
    """The base's type alone: factors keep theirs. The real part of a complex weight is no such view.

    Nor is one that only stores numbers: base and sum are rounded otherwise, and one may overflow where the other does
    not.
    """
    dtype, is_complex = eqn.params["new_dtype"], jnp.issubdtype(weight.base.dtype, jnp.complexfloating)
    is_stored = isinstance(weight, Factored) and bool(weight.roles) and computing(dtype) != dtype
    if is_stored or not jnp.issubdtype(dtype, jnp.inexact):
        return DECLINED
    if is_complex and not jnp.issubdtype(dtype, jnp.complexfloating):
        return DECLINED
    return weight.replace(base=bound(eqn, [weight.base]))


def stop_gradient(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    return weight.view(bound(eqn, [weight.base]), lax.stop_gradient)


def barrier(_: Interpreter, __: Any, *values: Any) -> list[Any]:
    bases = lax.optimization_barrier([v.base if isinstance(v, Tracked) else v for v in values])
    return [v.replace(base=b) if isinstance(v, Tracked) else b for v, b in zip(values, bases, strict=True)]


def transpose(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    order = (*eqn.params["permutation"], weight.ndim)
    turn = lambda f: f.transposed(order) if isinstance(f, Laid) else lax.transpose(f, order)
    return weight.view(bound(eqn, [weight.base]), turn)


def squeeze(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    return weight.view(bound(eqn, [weight.base]), lambda f: lax.squeeze(f, eqn.params["dimensions"]))


def rev(_: Interpreter, eqn: Any, weight: Tracked) -> Any:
    if isinstance(weight, Factored) and weight.turned_axis in eqn.params["dimensions"]:
        return DECLINED
    return weight.view(bound(eqn, [weight.base]), lambda f: lax.rev(f, eqn.params["dimensions"]))


def broadcast(_: Interpreter, eqn: Any, weight: Tracked, *more: Any) -> Any:
    """New axes, and axes of size 1 that are repeated, stay of size 1 in the factors."""
    if more:
        return DECLINED
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]

    def change(factor: Any) -> Any:
        sizes = [1] * len(shape)
        for axis, place in enumerate(places):
            sizes[place] = factor.shape[axis]
        return factor.reshape(*sizes, factor.shape[-1])

    return weight.view(bound(eqn, [weight.base]), change)


def reshape(_: Interpreter, eqn: Any, weight: Tracked) -> Any:
    """Axes may be merged or split where a factor has all of them or none."""
    if eqn.params.get("dimensions") is not None or 0 in weight.base.shape:
        return DECLINED
    groups = regrouped(weight.base.shape, eqn.params["new_sizes"])
    factors = [_reshaped(weight, factor, groups, eqn.params["new_sizes"]) for factor in weight.factors]
    if any(factor is None for factor in factors):
        return DECLINED
    return weight.replace(base=bound(eqn, [weight.base]), factors=tuple(factors))


def _reshaped(weight: Tracked, factor: Any, groups: Sequence[Any], new: Sequence[int]) -> Any:
    old, sizes = weight.base.shape, []
    for olds, news in groups:
        wide = [n for n in olds if old[n] != 1]
        owned = [n for n in wide if n in weight.owned(factor)]
        if owned and len(owned) < len(wide):
            repeated = [n for n in wide if not any(n in weight.owned(other) for other in weight.factors)]
            if len(owned) + len(repeated) < len(wide) and not weight.lenient:
                return None
            whole = [old[n] if n in wide else size for n, size in enumerate(factor.shape)]
            factor = jnp.broadcast_to(factor, whole)
        sizes += [new[n] if owned else 1 for n in news]
    return factor.reshape(*sizes, factor.shape[-1])


def slice_(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * weight.ndim

    def change(factor: Any) -> Any:
        owned = weight.owned(factor)
        pick = lambda values, other: [v if i in owned else other for i, v in enumerate(values)]
        rank = factor.shape[-1]
        return lax.slice(factor, [*pick(starts, 0), 0], [*pick(limits, 1), rank], [*pick(strides, 1), 1])

    return weight.view(bound(eqn, [weight.base]), change)


def dynamic_slice(_: Interpreter, eqn: Any, weight: Any, *starts: Any) -> Any:
    if not isinstance(weight, Tracked):
        return DECLINED

    def change(factor: Any) -> Any:
        owned = weight.owned(factor)
        zero = jnp.zeros((), starts[0].dtype if hasattr(starts[0], "dtype") else jnp.int32)
        begin = [jnp.asarray(s, zero.dtype) if i in owned else zero for i, s in enumerate(starts)]
        sizes = [n if i in owned else 1 for i, n in enumerate(eqn.params["slice_sizes"])]
        return lax.dynamic_slice(factor, [*begin, zero], [*sizes, factor.shape[-1]])

    cut = weight.view(bound(eqn, [weight.base, *starts]), change)
    return cut.replace(varies=None) if isinstance(cut, Factored) else cut


def unstack(_: Interpreter, eqn: Any, weight: Tracked) -> list[Tracked]:
    axis = eqn.params["axis"]

    def pick(factor: Any, i: int) -> Any:
        return lax.index_in_dim(factor, i if axis in weight.owned(factor) else 0, axis, keepdims=False)

    bases = bound(eqn, [weight.base])
    return [weight.replace(base=b, factors=tuple(pick(f, i) for f in weight.factors)) for i, b in enumerate(bases)]


def tile(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    """A factor that owns an axis is repeated along it; one that does not stays of size 1."""

    def change(factor: Any) -> Any:
        owned = weight.owned(factor)
        return jnp.tile(factor, [*(n if i in owned else 1 for i, n in enumerate(eqn.params["reps"])), 1])

    return weight.view(bound(eqn, [weight.base]), change)


def split(_: Interpreter, eqn: Any, weight: Tracked) -> list[Tracked]:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    bases = bound(eqn, [weight.base])
    pieces = [lax.split(f, sizes, axis) if axis in weight.owned(f) else [f] * len(sizes) for f in weight.factors]
    return [weight.replace(base=b, factors=tuple(piece[i] for piece in pieces)) for i, b in enumerate(bases)]


def _whole_turns(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that declines where it would cut the axis of an input transform."""

    def guarded(interpreter: Interpreter, eqn: Any, weight: Any, *values: Any) -> Any:
        outputs = rule(interpreter, eqn, weight, *values)
        if outputs is DECLINED or not (isinstance(weight, Factored) and weight.turns):
            return outputs
        seen = outputs if isinstance(outputs, list) else [outputs]
        return outputs if all(_turned_size(view) == _turned_size(weight) for view in seen) else DECLINED

    return guarded


def _turned_size(weight: Factored) -> int | None:
    return None if weight.turned_axis is None else weight.base.shape[weight.turned_axis]


VIEWS = {
    **MOVES,
    **ARITHMETIC,
    **JOINS,
    "convert_element_type": cast,
    "reduce_precision": same,
    "copy": same,
    "copy_p": same,
    "name": same,
    "pvary": same,
    "pcast": same,
    "mesh_cast": same,
    "stop_gradient": stop_gradient,
    "optimization_barrier": barrier,
    "transpose": transpose,
    "squeeze": squeeze,
    "rev": rev,
    "broadcast_in_dim": broadcast,
    "reshape": _whole_turns(reshape),
    "slice": _whole_turns(slice_),
    "dynamic_slice": _whole_turns(dynamic_slice),
    "split": _whole_turns(split),
    "tile": _whole_turns(tile),
    "unstack": _whole_turns(unstack),
}
