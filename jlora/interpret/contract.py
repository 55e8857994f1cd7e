"""Rules of the primitives that consume a weight: products, lookups, convolutions.

Each leaves the base's own equation as the function wrote it and adds the low-rank path: two small products. All of them
end in `factored_product`, the one place that decides how the path is computed.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret import compat
from jlora.interpret.ends import Ends
from jlora.interpret.factored import Factored, Tracked, product, scaled_by, whole
from jlora.interpret.interpreter import DECLINED, Interpreter
from jlora.interpret.manual import varying
from jlora.interpret.products import Labels, cast, contract, placed_as, scaled, swapped
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
    x, xs, ws = (rhs, rs, ls) if is_left else (lhs, ls, rs)
    ends = Ends.of(weight, ws, xs, out)
    if ends is None:
        return DECLINED
    given, x = x, ends.before(x)
    aside = interpreter.aside(eqn.invars[is_left], x) if weight.pair and x is given else x  # before the base's product
    y = bound(eqn, [weight.base, x] if is_left else [x, weight.base])
    interpreter.factored(weight, eqn, "dot")
    if weight.pair:
        precision = eqn.params["precision"]
        settings = {"precision": swapped(precision) if is_left else precision}
        z = factored_product(aside, xs, weight, ws, out, preferred=eqn.params["preferred_element_type"], **settings)
        y = _added(y, cast(z, y.dtype))
    return ends.after(y)


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

    Computed in the dtype of the activations; the scale is put on the small middle tensor.
    """
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else weight.base.dtype
    over = {label for label in ws if label not in out}
    pair: Any = weight.pair
    first, second = sorted(pair, key=lambda f: -_extent(weight, f, ws, over))
    ones, twos = (tuple(ws[axis] for axis in weight.owned(f)) for f in (first, second))
    x = dropped(cast(x, dtype), weight)
    middle = tuple(label for label in (*xs, *ones) if label in twos or label in out)
    middle = (*dict.fromkeys(middle), "rank")
    h = contract(x, xs, cast(whole(weight, first), dtype), (*ones, "rank"), middle, precision=precision,
                 preferred=preferred)  # fmt: skip
    h = cast(scaled(tapped(h, weight), weight.scale), dtype)
    made = tuple(label for label in out if label in middle or label in twos)
    z = contract(h, middle, cast(whole(weight, second), dtype), (*twos, "rank"), made, precision=precision,
                 preferred=preferred)  # fmt: skip
    return z if made == out else lax.expand_dims(z, [axis for axis, label in enumerate(out) if label not in made])


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
    numbers = eqn.params["dimension_numbers"]
    looked_up, stacked = set(numbers.start_index_map), set(numbers.operand_batching_dims)
    owned = [set(weight.owned(factor)) for factor in weight.factors]
    touched = [looked_up <= mine and stacked <= mine for mine in owned]
    if any(looked_up & mine and not touch for mine, touch in zip(owned, touched, strict=True)) or weight.turns:
        return DECLINED
    rows = bound(eqn, [weight.base, indices])
    take = lambda factor, touch: (_taken if touch else _spread)(eqn.params, weight, factor, indices, rows.ndim)
    picked = weight.replace(base=rows, factors=tuple(map(take, weight.factors, touched)))
    if not weight.roles:
        return picked
    # A gain alone scales whole rows, or columns; one that has both is that of the weights among which this chooses.
    is_lookup = touched[0] and not touched[1] if weight.pair else not touched[0] or owned[0] <= looked_up
    if not is_lookup:
        return picked
    interpreter.factored(weight, eqn, "embedding")
    rows = array_of(rows)
    if pair := picked.pair:
        a, b = (factor.astype(rows.dtype) for factor in pair)
        rows = rows + product(picked, a * weight.scale, b).astype(rows.dtype)
    labels = tuple(range(rows.ndim))
    if weight.gain is None:
        return rows
    return scaled_by(rows, labels, whole(picked, picked.gain)[..., 0], picked.owned(picked.gain))


def _taken(params: dict[str, Any], weight: Factored, factor: Any, indices: Any, ndim: int) -> Any:
    """The rows of a factor that has the axes that are looked up."""
    numbers = params["dimension_numbers"]
    owned = weight.owned(factor)
    sizes = [n if axis in owned else 1 for axis, n in enumerate(params["slice_sizes"])]
    rank_last = numbers._replace(offset_dims=(*numbers.offset_dims, ndim))
    return lax.gather(
        factor, indices, rank_last, (*sizes, factor.shape[-1]), mode=params["mode"], fill_value=0,
        unique_indices=params["unique_indices"], indices_are_sorted=params["indices_are_sorted"],
    )  # fmt: skip


def _spread(params: dict[str, Any], weight: Factored, factor: Any, _: Any, ndim: int) -> Any:
    """A factor that the lookup does not touch, its axes where the result has them."""
    numbers = params["dimension_numbers"]
    offsets, stacked = numbers.offset_dims, numbers.operand_batching_dims
    kept = [axis for axis in range(weight.ndim) if axis not in (*numbers.collapsed_slice_dims, *stacked)]
    places = [place for place in range(ndim) if place not in offsets]  # those of the axes of the indices
    where = dict(zip(kept, offsets, strict=True))
    where |= {axis: places[i] for axis, i in zip(stacked, numbers.start_indices_batching_dims, strict=True)}
    order = sorted(where, key=where.__getitem__)
    gone = [axis for axis in range(weight.ndim) if axis not in where]
    ordered = lax.transpose(factor, (*order, *gone, weight.ndim))
    sizes = dict.fromkeys(range(ndim), 1) | {where[axis]: factor.shape[axis] for axis in order}
    return ordered.reshape(*sizes.values(), factor.shape[-1])


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
    if not is_plain or ends is None or not (weight.pair is None or _is_conv_pair(weight, features)):
        return DECLINED
    x = ends.before(x)
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
    a, b = weight.pair  # type: ignore[misc]
    h = compat.bind(eqn, [dropped(x, weight), _rank_at(a, features).astype(x.dtype)])
    h = cast(scaled(tapped(h, weight), weight.scale), x.dtype)
    b = b.reshape(-1, b.shape[-1]).astype(x.dtype)
    labels = tuple(range(h.ndim))
    out = tuple("out" if label == axis else label for label in labels)
    return contract(h, labels, b, ("out", axis), out, precision=eqn.params["precision"],
                    preferred=eqn.params["preferred_element_type"])  # fmt: skip


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
    by_group = lambda rows, factor, axis: _ragged(eqn, rows, factor, axis, groups[0], group_sizes)
    if weight.gain is not None and own[-1] == {*over}:
        x = _scaled_rows(x, weight, groups[0], group_sizes)
    y = bound(eqn, [x, weight.base, group_sizes])
    interpreter.factored(weight, eqn, "ragged_dot")
    if pair := weight.pair:
        h = tapped(by_group(dropped(x, weight), pair[0], out), weight)
        h = cast(scaled(h, weight.scale), x.dtype)
        y = y + by_group(h, pair[1], over[0]).astype(y.dtype)
    return y if weight.gain is None or own[-1] == {*over} else _scaled_rows(y, weight, groups[0], group_sizes)


def _ragged(eqn: Any, rows: Any, factor: Any, axis: int, group: int, group_sizes: Any) -> Any:
    """A product of rows with a factor whose rank takes the place of `axis`; all groups may share it."""
    factor = cast(_rank_at(factor, axis), rows.dtype)
    if factor.shape[group] == group_sizes.shape[0]:
        return compat.bind(eqn, [rows, factor, group_sizes])
    order = [group, *eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][1]]
    matrix = lax.transpose(factor, [*order, *({0, 1, 2} - {*order})])[0]
    return lax.dot(rows, matrix, precision=eqn.params["precision"],
                   preferred_element_type=eqn.params["preferred_element_type"])  # fmt: skip


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
