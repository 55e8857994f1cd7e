"""Rules of the primitives that consume a weight: products, lookups, convolutions.

Each leaves the base's own equation as the function wrote it and adds the low-rank path: two small products. All of them
end in `factored_product`, the one place that decides how the path is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret import compat
from jlora.interpret.ends import Ends
from jlora.interpret.factored import Factored, Tracked, product, scaled_by, whole
from jlora.interpret.interpreter import DECLINED, Interpreter
from jlora.interpret.lookup import Lookup
from jlora.interpret.manual import varying
from jlora.interpret.products import Labels, cast, computing, contract, placed_as, scaled, swapped
from jlora.interpret.quantised import array_of, bound


def dot_general(interpreter: Interpreter, eqn: Any, lhs: Any, rhs: Any) -> Any:
    """x . W with W on either side, any contracted and batch axes: x . W + s (x . a) . b.

    An output scale or an input transform acts on x or on the result, wherever its axes are.
    """
    if isinstance(lhs, Tracked) and isinstance(rhs, Tracked):
        lhs = interpreter.densify(lhs, eqn, "both operands of the product are adapted: this one is computed densely")
    is_left = isinstance(lhs, Factored)
    weight: Any = lhs if is_left else rhs
    shapes = [value.ndim if isinstance(value, Tracked) else jnp.ndim(value) for value in (lhs, rhs)]
    ls, rs, out = dot_labels(eqn.params["dimension_numbers"], *shapes)
    x: Any = rhs if is_left else lhs
    xs, ws = (rs, ls) if is_left else (ls, rs)
    ends = Ends.of(weight, ws, xs, out)
    if ends is None:
        return DECLINED
    dtype = computing(x.dtype, weight.base.dtype)
    given, x = x, ends.before(x, dtype)
    aside = interpreter.aside(eqn.invars[is_left], x) if weight.pair and x is given else x  # before the base's product
    y = bound(eqn, [weight.base, x] if is_left else [x, weight.base])
    interpreter.factored(weight, eqn, "dot")
    if weight.pair:
        precision = _precision(eqn, dtype)
        settings = {"precision": swapped(precision) if is_left else precision}
        z = factored_product(cast(aside, dtype), xs, weight, ws, out, preferred=_preferred(eqn), **settings)
        y = _added(y, cast(z, y.dtype))
    return ends.after(y)


def _preferred(eqn: Any) -> Any:
    """The type that an equation's own sums have, if that is one to compute in."""
    given = eqn.params["preferred_element_type"]
    return None if given is None else computing(given)


def _precision(eqn: Any, dtype: Any) -> Any:
    """The precision of an equation, for products of this type; an algorithm for other types is none for them."""
    given = eqn.params["precision"]
    is_same = all(atom.aval.dtype == dtype for atom in eqn.invars[:2])
    return given if is_same or isinstance(given, (tuple, lax.Precision)) else None


def _added(y: Any, z: Any) -> Any:
    if y.shape != z.shape:
        return y + z
    return lax.add(y, placed_as(z, y))


def dot_labels(numbers: Any, lhs_ndim: int, rhs_ndim: int) -> tuple[Labels, Labels, Labels]:
    """Einsum labels of a dot_general's operands and of its result."""
    (lhs_over, rhs_over), (lhs_batch, rhs_batch) = numbers
    lhs: list[Any] = [("l", i) for i in range(lhs_ndim)]
    rhs: list[Any] = [("r", i) for i in range(rhs_ndim)]
    for i, j in zip((*lhs_over, *lhs_batch), (*rhs_over, *rhs_batch), strict=True):
        rhs[j] = lhs[i]
    out = [lhs[i] for i in lhs_batch]
    out += [label for i, label in enumerate(lhs) if i not in (*lhs_over, *lhs_batch)]
    out += [label for j, label in enumerate(rhs) if j not in (*rhs_over, *rhs_batch)]
    return tuple(lhs), tuple(rhs), tuple(out)


def factored_product(
    x: Any, xs: Labels, weight: Factored, ws: Labels, out: Labels, precision: Any, preferred: Any
) -> Any:
    """s (x . a) . b, or s (x . b) . a where b has the contracted axes: broadcastable to the result's shape.

    Computed in the dtype of x; the scale is put on the small middle tensor.
    """
    dtype = x.dtype
    over = {label for label in ws if label not in out}
    pair: Any = weight.pair
    first, second = sorted(pair, key=lambda f: -_extent(weight, f, ws, over))
    ones, twos = (tuple(ws[axis] for axis in weight.owned(f)) for f in (first, second))
    x = dropped(x, weight)
    middle = tuple(label for label in (*xs, *ones) if label in twos or label in out)
    middle = (*dict.fromkeys(middle), "rank")
    h = contract(x, xs, cast(whole(weight, first), dtype), (*ones, "rank"), middle, precision=precision,
                 preferred=_sums(dtype, preferred))  # fmt: skip
    h = cast(scaled(tapped(h, weight), weight.scale), dtype := _sums(dtype, dtype))
    made = tuple(label for label in out if label in middle or label in twos)
    z = contract(h, middle, cast(whole(weight, second), dtype), (*twos, "rank"), made, precision=precision,
                 preferred=preferred)  # fmt: skip
    return z if made == out else lax.expand_dims(z, [axis for axis, label in enumerate(out) if label not in made])


def _sums(dtype: Any, preferred: Any) -> Any:
    """The type of the middle tensor: float16 ends where the input times a, which is no result, may go on."""
    return jnp.float32 if dtype == jnp.float16 else preferred


def _extent(weight: Factored, factor: Any, ws: Labels, over: set[Any]) -> int:
    return math.prod(weight.base.shape[axis] for axis in weight.owned(factor) if ws[axis] in over)


def dropped(x: Any, weight: Factored) -> Any:
    """x with dropout, where it is on: each element is kept with probability 1 - rate and scaled up."""
    if weight.key is None or not weight.dropout:
        return x
    key = weight.key
    for name in sorted(varying(x)):  # each shard draws for its own part of x
        key = jax.random.fold_in(key, lax.axis_index(name))
    keep = jax.random.bernoulli(key, 1 - weight.dropout, x.shape)
    return jnp.where(keep, x / (1 - weight.dropout), jnp.zeros_like(x))


def tapped(h: Any, weight: Factored) -> Any:
    return h if weight.tap is None else weight.tap(h)


def gather(interpreter: Interpreter, eqn: Any, weight: Any, indices: Any) -> Any:
    """Rows looked up: W[i] + s a[i] . b. An index into a batch or an out axis picks among whole weights."""
    if not isinstance(weight, Factored) or isinstance(indices, Tracked):
        return DECLINED
    lookup = Lookup(eqn.params, tuple(weight.base.shape), len(eqn.outvars[0].aval.shape))
    if weight.turns and not (weight.turned_axis is not None and lookup.is_whole(weight.turned_axis)):
        return DECLINED
    rows = bound(eqn, [weight.base, indices])
    factors = tuple(lookup.taken(factor, weight.owned(factor), indices) for factor in weight.factors)
    picked = weight.replace(base=rows, factors=factors, varies=None)
    inside = lookup.is_inside(indices)[..., None] if lookup.may_fill else None
    if not _gives_rows(weight, lookup):
        return picked if inside is None else _unfilled(picked, weight, lookup, inside, indices)
    interpreter.factored(weight, eqn, "embedding")
    rows, gain = array_of(rows), picked.gain
    if pair := picked.pair:
        dtype = computing(rows.dtype)
        a, b = (cast(factor, dtype) for factor in pair)
        update = cast(product(picked, a * picked.scale, b), dtype)
        update = update if inside is None else jnp.where(inside[..., 0], update, 0)
        rows = cast(cast(rows, dtype) + update, rows.dtype)
    if gain is None:
        return rows
    gain = gain if inside is None else jnp.where(inside, gain, 1)
    return scaled_by(rows, tuple(range(rows.ndim)), whole(picked, gain)[..., 0], picked.owned(gain))


def _gives_rows(weight: Factored, lookup: Lookup) -> bool:
    """Whether a lookup is one in a table: all in axes are looked up. Else it chooses among weights, or views one."""
    if not weight.roles or weight.turns or not lookup.picked:
        return False
    first, *others = (set(weight.owned(factor)) for factor in weight.factors)
    moving = lookup.moving - lookup.stacked
    if weight.pair:
        return first <= lookup.picked | lookup.stacked and not moving & others[0]
    # A gain alone scales whole rows, or columns; one that has both is that of the weights among which this chooses.
    return not moving & first or first <= lookup.picked


def _unfilled(picked: Factored, weight: Factored, lookup: Lookup, inside: Any, indices: Any) -> Factored:
    """The weights looked up; what is out of bounds is the function's own value, and nothing adapts it.

    What flows back from there is nothing to the factors either, be it no number.
    """

    def unfilled(factor: Any, given: Any, role: str, stride: int | None) -> Any:
        if role == "gain":
            return jnp.where(inside, factor, 1)
        if role == "turn":
            still = weight.no_turn(factor.shape[-1], stride or 1)
            return jnp.where(inside, factor, lookup.taken(still, (weight.turned_axis or 0,), indices))
        is_dropped = role == "mark" or {*lookup.numbers.start_index_map} <= {*weight.owned(given)}
        return factor if is_dropped else jnp.where(inside, factor, 0)

    strides = iter(weight.strides)
    steps = [next(strides) if role == "turn" else None for role in weight.roles]
    return picked.replace(factors=tuple(map(unfilled, picked.factors, weight.factors, weight.roles, steps)))


def conv(interpreter: Interpreter, eqn: Any, x: Any, weight: Any) -> Any:
    """A convolution with a, then a 1x1 product with b: the rank takes the place of the output features."""
    if isinstance(x, Tracked) or not isinstance(weight, Factored):
        return DECLINED
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    features, channels = numbers.rhs_spec[:2]
    places = {features: numbers.out_spec[1], channels: numbers.lhs_spec[1]}  # of the kernel's axes in y and x
    ws = tuple(("out" if axis == features else "in" if axis == channels else axis) for axis in range(weight.ndim))
    xs, out = (tuple(name if i == place else ("n", i) for i in range(x.ndim))
               for name, place in (("in", places[channels]), ("out", places[features])))  # fmt: skip
    is_plain = params["feature_group_count"] == params["batch_group_count"] == 1
    ends = Ends.of(weight, ws, xs, out)
    if ends is not None and ends.acts_on_x and computing(x.dtype) != x.dtype:
        return DECLINED  # both operands of a convolution have one type
    if not is_plain or ends is None or not (weight.pair is None or _is_conv_pair(weight, features)):
        return DECLINED
    x = ends.before(x, computing(x.dtype, weight.base.dtype))
    y = bound(eqn, [x, weight.base])
    interpreter.factored(weight, eqn, "conv")
    if weight.pair:
        y = y + _conv_low_rank(eqn, x, weight, features, places[features]).astype(y.dtype)
    return ends.after(y)


def _is_conv_pair(weight: Factored, features: int) -> bool:
    a, b = weight.pair  # type: ignore[misc]
    others = {axis for axis, n in enumerate(weight.base.shape) if n != 1} - {features}
    return set(weight.owned(a)) == others and set(weight.owned(b)) <= {features}


def _conv_low_rank(eqn: Any, x: Any, weight: Factored, features: int, axis: int) -> Any:
    dtype = computing(x.dtype, weight.base.dtype)
    a, b = (cast(factor, dtype) for factor in weight.pair)  # type: ignore[union-attr]
    settings = {"precision": _precision(eqn, dtype), "preferred": _preferred(eqn)}
    inner = settings | {"preferred": _sums(dtype, settings["preferred"])}
    h = _bind(eqn, [dropped(cast(x, dtype), weight), _rank_at(a, features)], **inner)
    h, b = (cast(v, _sums(dtype, dtype)) for v in (scaled(tapped(h, weight), weight.scale), b))
    labels = tuple(range(h.ndim))
    out = tuple("out" if label == axis else label for label in labels)
    return contract(h, labels, b.reshape(-1, b.shape[-1]), ("out", axis), out, **settings)


def _bind(eqn: Any, values: Sequence[Any], *, precision: Any, preferred: Any) -> Any:
    return compat.bind(eqn, values, precision=precision, preferred_element_type=preferred)


def _rank_at(factor: Any, axis: int) -> Any:
    """The rank axis, put where `axis` (of size 1) was."""
    return jnp.moveaxis(lax.squeeze(factor, [axis]), -1, axis)


def ragged_dot(interpreter: Interpreter, eqn: Any, x: Any, weight: Any, group_sizes: Any) -> Any:
    """Experts of different numbers of rows: a ragged product with a, then one with b."""
    if isinstance(x, Tracked) or not isinstance(weight, Factored):
        return DECLINED
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_over, over), (batch, _) = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    is_plain = not batch and len(groups) == len(over) == 1 and tuple(x_over) == (1,) and not weight.turns
    (out,) = {0, 1, 2} - {*over, *groups} if is_plain else (0,)
    own = [{*weight.owned(factor)} - {*groups} for factor in weight.factors]
    fits = own[:2] == [{*over}, {out}] if weight.pair else True
    if not is_plain or not fits or (weight.gain is not None and len(own[-1]) > 1):
        return DECLINED
    dtype = computing(x.dtype, weight.base.dtype)
    by_group = lambda rows, factor, axis: _ragged(eqn, cast(rows, dtype), factor, axis, groups[0], group_sizes)
    if weight.gain is not None and own[-1] == {*over}:
        x = _scaled_rows(cast(x, dtype), weight, groups[0], group_sizes)
    y = bound(eqn, [x, weight.base, group_sizes])
    interpreter.factored(weight, eqn, "ragged_dot")
    if pair := weight.pair:
        h = tapped(by_group(dropped(cast(x, dtype), weight), pair[0], out), weight)
        y = y + cast(by_group(scaled(h, weight.scale), pair[1], over[0]), y.dtype)
    return y if weight.gain is None or own[-1] == {*over} else _scaled_rows(y, weight, groups[0], group_sizes)


def _ragged(eqn: Any, rows: Any, factor: Any, axis: int, group: int, group_sizes: Any) -> Any:
    """A product of rows with a factor whose rank takes the place of `axis`; all groups may share it."""
    factor = cast(_rank_at(factor, axis), rows.dtype)
    settings = {"precision": _precision(eqn, rows.dtype), "preferred": _preferred(eqn)}
    if factor.shape[group] == group_sizes.shape[0]:
        return _bind(eqn, [rows, factor, group_sizes], **settings)
    order = [group, *eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][1]]
    matrix = lax.transpose(factor, [*order, *({0, 1, 2} - {*order})])[0]
    made = lax.dot(rows, matrix, precision=settings["precision"], preferred_element_type=settings["preferred"])
    is_of_a_group = jnp.arange(len(rows)) < jnp.sum(group_sizes)  # the rows behind are nothing
    return jnp.where(is_of_a_group[:, None], made, 0)


def _scaled_rows(x: Any, weight: Factored, group: int, group_sizes: Any) -> Any:
    """Each row times the gain of its expert."""
    gain = jnp.moveaxis(weight.gain, group, 0)
    gain = gain.reshape(gain.shape[0], -1)
    if gain.shape[0] > 1:
        gain = jnp.repeat(gain, group_sizes, axis=0, total_repeat_length=x.shape[0])
    return scaled_by(x, (0, 1), jnp.broadcast_to(gain, x.shape), (0, 1))


CONTRACTIONS = {
    "dot_general": dot_general,
    "gather": gather,
    "conv_general_dilated": conv,
    "ragged_dot_general": ragged_dot,
}
