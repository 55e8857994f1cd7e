"""Rules of the primitives that move a weight over devices: its factors go along on the axes that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding

from jlora.interpret import compat
from jlora.interpret.factored import Tracked
from jlora.interpret.interpreter import Interpreter
from jlora.interpret.manual import same_everywhere, varying
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


def all_gather(_: Interpreter, eqn: Any, weight: Tracked) -> Tracked:
    """Put together from the shards of a mesh axis: so are the factors that are split along it."""
    axis, over = eqn.params["all_gather_dimension"], {*names(eqn.params["axis_name"])}

    def gathered(factor: Any) -> Any:
        if eqn.params["tiled"]:
            return compat.bind(eqn, [factor]) if _is_split(weight, factor, axis, over) else factor
        is_same = same_everywhere(factor, codes_of(weight.base), over)
        return lax.expand_dims(factor, [axis]) if is_same else compat.bind(eqn, [factor])

    return weight.view(bound(eqn, [weight.base]), gathered)


def _is_split(weight: Tracked, factor: Any, axis: int, over: set[str]) -> bool:
    """Whether a factor has an axis of the base, of which this is a shard; one of size 1 is told by its varying."""
    if weight.base.shape[axis] != 1:
        return axis in weight.owned(factor)
    return bool(varying(factor) & over) or not varying(codes_of(weight.base))


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
