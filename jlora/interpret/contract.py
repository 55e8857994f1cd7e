"""Rules of the primitives that consume a weight: products, lookups, convolutions.

Each leaves the base's own equation as the function wrote it and adds the low-rank path: two small products, the second
of which policies of `jax.checkpoint` do not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.interpret import compat
from jlora.interpret.bilinear import bilinear
from jlora.interpret.ends import Ends
from jlora.interpret.factored import Factored, Stride, Tracked, product, whole
from jlora.interpret.gain import scaled_by
from jlora.interpret.groups import dot_of, middle_of, precision_of, preferred_of
from jlora.interpret.interpreter import DECLINED, Interpreter
from jlora.interpret.laid import stored
from jlora.interpret.lookup import Lookup
from jlora.interpret.lowrank import Contraction, LowRank, dropped, sums_of, tapped
from jlora.interpret.merged import Product, merged_product
from jlora.interpret.products import cast, computing, is_meshed, placed_as, scaled
from jlora.interpret.quantised import array_of, bound
from jlora.interpret.ragged import by_rows


def dot_general(interpreter: Interpreter, eqn: Any, lhs: Any, rhs: Any) -> Any:
    """x . W with W on either side, any contracted and batch axes: x . W + s (x . a) . b.

    An output scale or an input transform acts on x or on the result, wherever its axes are.
    """
    if isinstance(lhs, Tracked) and isinstance(rhs, Tracked):
        lhs = interpreter.densify(lhs, eqn, "both operands of the product are adapted: this one is computed densely")
    is_left = isinstance(lhs, Factored)
    weight: Any = lhs if is_left else rhs
    x: Any = rhs if is_left else lhs
    dot = dot_of(eqn, weight, is_left, x) if isinstance(weight, Factored) else None
    if dot is None:
        return DECLINED
    given, x = x, dot.ends.before(x, computing(x.dtype, weight.base.dtype))
    if dot.path and weight.merged is not None:
        interpreter.factored(weight, eqn, "dot", strategy="merged")
        return dot.ends.after(_merged(eqn, weight, is_left, x, dot.path))
    aside = interpreter.frame.copy(eqn.invars[is_left], x) if dot.path and x is given else x
    y = bound(eqn, [weight.base, x] if is_left else [x, weight.base])
    h, group = middle_of(interpreter, eqn, is_left, aside, dot) if dot.path else (None, ())
    interpreter.factored(weight, eqn, "dot", group, _how(weight, dot.path))
    return dot.ends.after(_added(y, dot.path.result(h, y.dtype)) if dot.path else y)


def _how(weight: Factored, path: LowRank | None) -> str:
    """The strategy by which a product is computed."""
    if not weight.rows:
        return "factored"
    return "masks" if path and path.weight.weights is not None else "gathered"


def _merged(eqn: Any, weight: Factored, is_left: bool, x: Any, path: LowRank) -> Any:
    """x . M of a weight that was merged ahead: M in the type that the base has here."""
    params = tuple(sorted(eqn.primitive.get_bind_params(eqn.params).items()))
    form = Product(eqn.primitive, params, is_left, path.forms)
    pair: Any = weight.pair
    return merged_product(form, x, cast(weight.merged, weight.base.dtype), *map(stored, pair))


def _added(y: Any, z: Any) -> Any:
    if y.shape != z.shape:
        return y + z
    return lax.add(y, placed_as(z, y))


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
    interpreter.factored(weight, eqn, "embedding", strategy="gathered" if weight.rows else "factored")
    picked = picked.chosen()
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

    def unfilled(factor: Any, given: Any, role: str, stride: Stride | None) -> Any:
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
    interpreter.factored(weight, eqn, "conv", strategy="gathered" if weight.rows else "factored")
    if weight.pair:
        y = y + _conv_low_rank(eqn, x, weight, features, places[features], y.dtype)
    return ends.after(y)


def _is_conv_pair(weight: Factored, features: int) -> bool:
    a, b = weight.pair  # type: ignore[misc]
    others = {axis for axis, n in enumerate(weight.base.shape) if n != 1} - {features}
    return set(weight.owned(a)) == others and set(weight.owned(b)) <= {features}


def _conv_low_rank(eqn: Any, x: Any, weight: Factored, features: int, axis: int, result: Any) -> Any:
    dtype = computing(x.dtype, weight.base.dtype)
    a, b = weight.pair  # type: ignore[misc]
    settings = {"precision": precision_of(eqn, dtype), "preferred": preferred_of(eqn)}
    inner = settings | {"preferred": sums_of(dtype, settings["preferred"])}
    h = _bind(eqn, [dropped(cast(x, dtype), weight), _rank_at(cast(a, dtype), features)], **inner)
    h, b = cast(tapped(h, weight), sums_of(dtype, dtype)), b.reshape(-1, b.shape[-1])
    labels = tuple(range(h.ndim))
    out = tuple("out" if label == axis else label for label in labels)
    form = Contraction(
        labels, ("out", axis), out, h.dtype, result, scale=weight.scale, flat=not is_meshed(x), **settings
    )
    return bilinear(form, h, b)


def _bind(eqn: Any, values: Sequence[Any], *, precision: Any, preferred: Any, by: Any = compat.bind) -> Any:
    return by(eqn, values, precision=precision, preferred_element_type=preferred)


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
    bind = by_rows if weight.rows else compat.bind
    by_group = lambda rows, factor, axis: _ragged(eqn, cast(rows, dtype), factor, axis, groups[0], group_sizes, bind)
    if weight.gain is not None and own[-1] == {*over}:
        x = _scaled_rows(cast(x, dtype), weight, groups[0], group_sizes)
    y = (by_rows if weight.rows else bound)(eqn, [x, weight.base, group_sizes])
    interpreter.factored(weight, eqn, "ragged_dot", strategy="gathered" if weight.rows else "factored")
    if pair := weight.pair:
        h = tapped(by_group(dropped(cast(x, dtype), weight), pair[0], out), weight)
        y = y + cast(by_group(scaled(h, weight.scale), pair[1], over[0]), y.dtype)
    return y if weight.gain is None or own[-1] == {*over} else _scaled_rows(y, weight, groups[0], group_sizes)


def _ragged(eqn: Any, rows: Any, factor: Any, axis: int, group: int, group_sizes: Any, bind: Any) -> Any:
    """A product of rows with a factor whose rank takes the place of `axis`; all groups may share it."""
    factor = cast(_rank_at(factor, axis), rows.dtype)
    settings = {"precision": precision_of(eqn, rows.dtype), "preferred": preferred_of(eqn)}
    if factor.shape[group] == group_sizes.shape[0]:
        return _bind(eqn, [rows, factor, group_sizes], by=bind, **settings)
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
