"""Rules of arithmetic with weights: times a number or a vector, and summed with each other."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jlora.interpret import compat
from jlora.interpret.factored import Factored, Tracked
from jlora.interpret.interpreter import DECLINED, Interpreter
from jlora.interpret.products import cast, computing
from jlora.interpret.quantised import array_of, bound


def times(interpreter: Interpreter, eqn: Any, x: Any, y: Any) -> Any:
    """A weight times, or over, a number; or a vector along axes that one of its factors has."""
    weight, by, atom = (x, y, eqn.invars[1]) if isinstance(x, Tracked) else (y, x, eqn.invars[0])
    divides = eqn.primitive.name == "div"
    if isinstance(by, Tracked) or (divides and weight is y):
        return DECLINED
    change = _scaling(weight, interpreter.thin(atom, by), divides)
    if change is None:
        return DECLINED
    scaled = weight.replace(base=bound(eqn, [v.base if isinstance(v, Tracked) else v for v in (x, y)]), factors=change)
    is_same = not isinstance(weight, Factored) or compat.is_literal(atom)
    return scaled if is_same else scaled.replace(varies=None)


def _scaling(weight: Tracked, by: Any, divides: bool) -> tuple[Any, ...] | None:
    """The factors of a weight times an array of its axes, those on which it is the same of size 1; None if none."""
    by = by if hasattr(by, "dtype") else jnp.asarray(by, weight.base.dtype)
    along = {axis for axis, n in enumerate(by.shape) if n != 1}
    if isinstance(weight, Factored):
        if weight.turns and (weight.turned_axis is None or weight.turned_axis in along):
            return None
        if not weight.pair:
            return weight.factors
    elif along:  # under observation: it stays what it is, if it is no array of activations that it meets
        return weight.factors if along < {axis for axis, n in enumerate(weight.base.shape) if n != 1} else None
    place = next((i for i, factor in enumerate(weight.factors[:2]) if along <= {*weight.owned(factor)}), None)
    if place is None:
        return None
    by = by[..., None] if by.ndim else by
    by = cast(by, computing(by.dtype, weight.factors[place].dtype))
    scaled = weight.factors[place] / by if divides else weight.factors[place] * by
    return (*weight.factors[:place], scaled, *weight.factors[place + 1 :])


def negate(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    base = bound(eqn, [weight.base])
    if isinstance(weight, Factored) and not weight.pair:
        return weight.replace(base=base)
    return weight.replace(base=base, factors=(-weight.factors[0], *weight.factors[1:]))


def plus(_: Interpreter, eqn: Any, x: Any, y: Any) -> Any:
    """Sums and differences: of two weights one whose rank is the sum of theirs, of a weight and an array one of it."""
    if not all(_is_low_rank(v) for v in (x, y) if isinstance(v, Tracked)):
        return DECLINED
    made = tuple(eqn.outvars[0].aval.shape)
    if any(tuple(v.base.shape) != made for v in (x, y) if isinstance(v, Tracked)):
        return DECLINED
    if not (isinstance(x, Tracked) and isinstance(y, Tracked)) and _is_repeated(x if isinstance(x, Tracked) else y):
        return DECLINED
    base = bound(eqn, [array_of(v.base) if isinstance(v, Tracked) else v for v in (x, y)])
    sign = -1 if eqn.primitive.name == "sub" else 1
    if not isinstance(y, Tracked):
        return x.replace(base=base)
    y = _with_scale(y, sign)
    return y.replace(base=base) if not isinstance(x, Tracked) else _summed(base, _with_scale(x, 1), y)


def _is_low_rank(weight: Tracked) -> bool:
    return isinstance(weight, Factored) and weight.roles in ((), ("a", "b")) and weight.tap is None


def _is_repeated(weight: Any) -> bool:
    """Whether a weight is the same all along an axis, as where it meets a batch of activations."""
    owned = {axis for factor in weight.factors for axis in weight.owned(factor)}
    return any(n != 1 and axis not in owned for axis, n in enumerate(weight.base.shape))


def _with_scale(weight: Any, sign: int) -> Any:
    """The same weight, or the negative one, with its scale in a factor."""
    if not weight.pair:
        return weight
    a, b = weight.pair
    return weight.replace(factors=(a * (sign * weight.scale), b), scale=1.0)


def _summed(base: Any, x: Any, y: Any) -> Any:
    if not (x.pair and y.pair):
        return (x if x.pair else y).replace(base=base)
    if x.dropout != y.dropout:
        return DECLINED
    a, b = x.pair
    straight, turned = y.pair, y.pair[::-1]
    fits = lambda pair: all(p.shape[:-1] == q.shape[:-1] for p, q in zip((a, b), pair, strict=True))
    pair = straight if fits(straight) else turned
    if not fits(pair):
        return DECLINED
    factors = tuple(jnp.concatenate(both, axis=-1) for both in zip((a, b), pair, strict=True))
    return x.replace(base=base, factors=factors, name="+".join(dict.fromkeys((x.name, y.name))), varies=None)


ARITHMETIC = {
    "mul": times,
    "div": times,
    "neg": negate,
    "add": plus,
    "add_any": plus,
    "sub": plus,
}
