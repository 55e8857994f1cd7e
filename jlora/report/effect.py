"""Which of a tree's trainable nodes have no effect on what a function returns, or get no gradient from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval as pe

from jlora.nodes.node import is_node
from jlora.targets.paths import flatten
from jlora.tree import combine, partition

NOT_USED = "the function does not use it"
NOT_REACHED = "its use does not reach the result"
NO_GRADIENT = "no gradient of the result comes back to it (a stop_gradient, or integers, stand between)"


def without_effect(fn: Callable[[Any, Any], list[Any]], tree: Any, rest: Any, used: Sequence[str]) -> dict[str, str]:
    """The paths of nodes that train in vain, each with the reason.

    Args:
      fn: a function of a wrapped tree and the rest of the arguments, to a list of arrays.
      tree: the wrapped tree, of arrays or of their shapes.
      rest: the other arguments.
      used: the paths of the adapters of which the function has a use.
    """
    trainable, frozen = partition(tree)
    paths, nodes, _ = flatten(trainable, lambda x: x is None or is_node(x))
    places = _places({path: node for path, node in zip(paths, nodes, strict=True) if is_node(node)})
    leaves, treedef = jax.tree.flatten(trainable)
    of = lambda leaves, frozen, rest: fn(combine(treedef.unflatten(leaves), frozen), rest)
    reaching, graded = _reaching(of, leaves, frozen, rest), _graded(of, leaves, frozen, rest)

    def reason(path: str, at: Sequence[int]) -> str | None:
        if not any(reaching[i] for i in at):
            return NOT_REACHED if path in used else NOT_USED
        return NO_GRADIENT if graded is not None and not any(graded[i] for i in at) else None

    return {path: why for path, at in places.items() if at and (why := reason(path, at))}


def _places(nodes: Mapping[str, Any]) -> dict[str, range]:
    """Where each node's leaves stand among those of all."""
    found, start = {}, 0
    for path, node in nodes.items():
        count = len(jax.tree.leaves(node))
        found[path], start = range(start, start + count), start + count
    return found


def _reaching(of: Callable[..., Any], leaves: Sequence[Any], *rest: Any) -> list[bool]:
    """Which leaves the results depend on."""
    jaxpr = jax.make_jaxpr(of)(leaves, *rest).jaxpr
    return list(pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1][: len(leaves)])


def _graded(of: Callable[..., Any], leaves: Sequence[Any], *rest: Any) -> list[bool] | None:
    """Which leaves have a gradient that is not zero whatever the values; None where that can't be told."""
    floating = lambda outputs: [x for x in outputs if jnp.issubdtype(x.dtype, jnp.inexact)]
    results = jax.eval_shape(lambda *args: floating(of(*args)), leaves, *rest)
    if not results:
        return None

    def gradients(cotangents: Any, leaves: Any, *rest: Any) -> Any:
        return jax.vjp(lambda leaves: floating(of(leaves, *rest)), leaves)[1](cotangents)[0]

    try:
        jaxpr = jax.make_jaxpr(gradients)(results, leaves, *rest).jaxpr
    except (TypeError, ValueError, NotImplementedError):  # a while loop, a callback: no reverse mode
        return None
    depending = {id(variable) for variable in jaxpr.invars[: len(results)]}
    for eqn in jaxpr.eqns:
        if any(id(x) in depending for x in eqn.invars if isinstance(x, core.Var)):
            depending |= {id(x) for x in eqn.outvars}
    return [id(x) in depending for x in jaxpr.outvars]
