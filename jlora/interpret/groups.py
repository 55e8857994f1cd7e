"""Products that share their input: one x . [a1 a2 ...] for all, and so one product back to x and one to the factors."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax

from jlora.interpret.ends import Ends
from jlora.interpret.factored import Factored
from jlora.interpret.interpreter import Interpreter
from jlora.interpret.lowrank import Contraction, LowRank, into, low_rank_path
from jlora.interpret.manual import varying
from jlora.interpret.products import Labels, computing, swapped, transposed


class Dot(NamedTuple):
    """A product of an input and a weight: what acts at its ends, and how it goes through the factors, if any."""

    ends: Ends
    path: LowRank | None


def dot_of(eqn: Any, weight: Factored, is_left: bool, x: Any) -> Dot | None:
    """A dot_general whose left, or right, operand is a weight; None if that can't go through its factors."""
    xs, ws, out = labels_of(eqn.params["dimension_numbers"], is_left, x.ndim, weight.ndim)
    weight = weight.chosen(_tokens(x, xs, ws, out))
    ends = Ends.of(weight, ws, xs, out)
    if ends is None:
        return None
    return Dot(ends, _path(eqn, weight, is_left, x, xs, ws, out) if weight.pair else None)


def _tokens(x: Any, xs: Labels, ws: Labels, out: Labels) -> float:
    """How many vectors each matrix of a weight is multiplied with."""
    return math.prod(n for label, n in zip(xs, x.shape, strict=True) if label in out and label not in ws)


def _path(eqn: Any, weight: Factored, is_left: bool, x: Any, xs: Labels, ws: Labels, out: Labels) -> LowRank:
    dtype = computing(x.dtype, weight.base.dtype)
    if weight.weights is not None:  # all that are stored are read: a copy of them in another type would cost more
        dtype = computing(dtype, *(factor.dtype for factor in weight.pair or ()))
    precision = precision_of(eqn, dtype)
    precision = swapped(precision) if is_left else precision
    result = eqn.outvars[0].aval.dtype
    return low_rank_path(x, xs, weight, ws, out, dtype, result, precision, preferred_of(eqn))


@functools.lru_cache(maxsize=4096)
def labels_of(numbers: Any, is_left: bool, x_ndim: int, weight_ndim: int) -> tuple[Labels, Labels, Labels]:
    """Einsum labels of a product's input, of its weight, which is the left or the right operand, and of the result."""
    over, batch = ((pair[is_left], pair[not is_left]) for pair in numbers)
    xs: Labels = tuple(("x", i) for i in range(x_ndim))
    places = dict(zip((*over[1], *batch[1]), (*over[0], *batch[0]), strict=True))
    ws: Labels = tuple(("x", places[j]) if j in places else ("w", j) for j in range(weight_ndim))
    free = [[label for label in own if label not in other] for own, other in ((xs, ws), (ws, xs))]
    return xs, ws, (*(("x", i) for i in batch[0]), *free[is_left], *free[not is_left])


def preferred_of(eqn: Any) -> Any:
    """The type that an equation's own sums have, if that is one to compute in."""
    given = eqn.params["preferred_element_type"]
    return None if given is None else computing(given)


def precision_of(eqn: Any, dtype: Any) -> Any:
    """The precision of an equation, for products of this type; an algorithm for other types is none for them."""
    given = eqn.params["precision"]
    is_same = all(atom.aval.dtype == dtype for atom in eqn.invars[:2])
    return given if is_same or isinstance(given, (tuple, lax.Precision)) else None


def middle_of(interpreter: Interpreter, eqn: Any, is_left: bool, x: Any, dot: Dot) -> tuple[Any, tuple[str, ...]]:
    """x . a of a product, computed with those of others where it can be; and the names of all these weights."""
    middles = interpreter.frame.middles
    if id(eqn) in middles:
        return middles.pop(id(eqn))
    path: Any = dot.path
    members = _members(interpreter, eqn, is_left, x, dot)
    if len(members) < 2:
        return path.middle(x), ()
    joint = lax.concatenate([member.factor for member in members], members[0].factor.ndim - 1)
    h = into(members[0].form, x, joint)
    parts = lax.split(h, [member.factor.shape[-1] for member in members], h.ndim - 1)
    names = tuple(dict.fromkeys(member.name for member in members))
    middles.update({id(member.eqn): (part, names) for member, part in zip(members, parts, strict=True)})
    return middles.pop(id(eqn))


class _Member(NamedTuple):
    """A product of a group, and its first factor, whose axes are those of the form's `ys`."""

    eqn: Any
    name: str
    form: Contraction
    factor: Any


def _members(interpreter: Interpreter, eqn: Any, is_left: bool, x: Any, dot: Dot) -> list[_Member]:
    """A product and those after it that can share x . a with it."""
    others = [reader for reader in interpreter.frame.readers(eqn, is_left) if reader.index > interpreter.frame.index]
    members = [_member(eqn, x, dot)] if others else []
    for _, other, is_left in others:
        weight = interpreter.ahead(other.invars[not is_left])
        found = dot_of(other, weight, is_left, x) if isinstance(weight, Factored) and other.ctx == eqn.ctx else None
        members.append(_member(other, x, found) if found else None)
    if not members or members[0] is None:
        return []
    return [member for member in members if member is not None and _alike(member, members[0])]


def _member(eqn: Any, x: Any, dot: Dot) -> _Member | None:
    """None for a product that reads another input than x, or whose first factor has other axes than x and it share."""
    path = dot.path
    if path is None or dot.ends.acts_on_x or path.weight.key is not None or path.weight.tap is not None:
        return None
    if path.weight.weights is not None:  # side by side they are large: put beside others they would be copied
        return None
    factor, form = path.first, path.forms.into
    labels = form.ys
    gone = [i for i, label in enumerate(labels) if label not in form.xs and label != "rank"]
    order = [label for label in form.xs if label in dot.ends.ws]
    if any(factor.shape[i] != 1 for i in gone) or {*order, "rank"} != {*labels} - {labels[i] for i in gone}:
        return None
    factor = lax.squeeze(factor, gone) if gone else factor
    left = [label for i, label in enumerate(labels) if i not in gone]
    factor = transposed(factor, [left.index(label) for label in (*order, "rank")])
    return _Member(eqn, path.weight.name, dataclasses.replace(form, ys=(*order, "rank")), factor)


def _alike(a: _Member, b: _Member) -> bool:
    """Whether two factors can be put side by side with nothing moved."""
    lies: Any = lambda v: (
        jax.typeof(v).sharding.spec if jax.typeof(v).sharding.mesh.explicit_axes else None,
        varying(v),
    )
    return a.form == b.form and a.factor.dtype == b.factor.dtype and lies(a.factor) == lies(b.factor)
