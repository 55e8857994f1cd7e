"""Rules of the primitives that move a weight over devices: its factors go along on the axes that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding

from jlora.interpret import compat
from jlora.interpret.factored import Tracked
from jlora.interpret.interpreter import DECLINED, Interpreter
from jlora.interpret.manual import manual_axes, same_everywhere, varying
from jlora.interpret.places import names, of_factor
from jlora.interpret.quantised import bound, codes_of


def reshard(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    """Moved on a mesh of explicit axes: each factor goes along on the axes that it has."""
    base = bound(eqn, [weight.base])
    moved = lambda factor: _moved(weight, factor, jax.typeof(codes_of(base)).sharding, jax.sharding.reshard)
    return weight.view(base, moved)


def sharding_constraint(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    """The same on a mesh whose axes are not explicit."""
    base, sharding = bound(eqn, [weight.base]), eqn.params["sharding"]
    if not isinstance(sharding, NamedSharding):
        return weight.replace(base=base)
    return weight.view(base, lambda factor: _moved(weight, factor, sharding, lax.with_sharding_constraint))


def _moved(weight: Tracked, factor: Any, sharding: NamedSharding, move: Callable[..., Any]) -> Any:
    return move(factor, sharding.update(spec=of_factor(weight, factor, sharding.spec)))


def all_gather(_: Interpreter, eqn: Any, weight: Any) -> Any:
    """Put together from the shards of a mesh axis: so are the factors that are split along it."""
    axis, over = eqn.params["all_gather_dimension"], {*names(eqn.params["axis_name"])}
    tiled, is_single = eqn.params["tiled"], not eqn.params["tiled"] or weight.base.shape[axis] == 1

    def gathered(i: int, factor: Any) -> Any:
        differs = _differs(weight, i, over)
        if differs is None and not is_single and over <= manual_axes():
            differs = axis in weight.owned(factor)  # as jlora.sharding.specs splits it: along its own axes alone
        if not is_single and axis in weight.owned(factor):  # the same on all devices it is of each one's part
            is_apart = differs is False and not weight.lenient
            return None if is_apart else compat.bind(eqn, [factor])
        if tiled and (differs is None or (differs and not is_single)):
            return None  # each device's part of the kernel may have a factor of its own
        if differs is False:
            return factor if tiled else lax.expand_dims(factor, [axis])
        return compat.bind(eqn, [factor])

    factors = [gathered(i, factor) for i, factor in enumerate(weight.factors)]
    if any(factor is None for factor in factors):
        return DECLINED
    moved = weight.replace(base=bound(eqn, [weight.base]), factors=tuple(factors))
    if getattr(weight, "varies", None) is None:
        return moved
    return moved.replace(varies=tuple(frozenset(along - over) for along in weight.varies))


def _differs(weight: Any, i: int, over: set[str]) -> bool | None:
    """Whether a factor differs from shard to shard; None where nothing tells."""
    if (known := getattr(weight, "varies", None)) is not None:
        return bool(known[i] & over)
    if weight.lenient or varying(codes_of(weight.base)):
        return bool(varying(weight.factors[i]) & over)
    return False if weight.roles[i] == "mark" else None


def ppermute(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    """Handed on to other devices, with those of its factors that differ from one to the other."""
    over = {*names(eqn.params["axis_name"])}
    is_same = lambda factor: same_everywhere(factor, codes_of(weight.base), over)
    handed = lambda factor: factor if is_same(factor) else compat.bind(eqn, [factor])
    return weight.view(bound(eqn, [weight.base]), handed)


MOVES = {
    "reshard": reshard,
    "sharding_constraint": sharding_constraint,
    "all_gather": all_gather,
    "ppermute": ppermute,
}
