"""What a policy of `jax.checkpoint` sees of a product that is a primitive of our own: the product as it was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.extend import core
from jax.interpreters import partial_eval as pe


def seen_as(primitive: core.Primitive, written: Callable[[Any], tuple[Any, Any, dict[str, Any]]]) -> None:
    """Policies decide on a primitive by what was written in its place.

    Args:
      primitive: of one result.
      written: from its equation to the primitive, the operands' types and the parameters that a policy is asked about.
    """

    def rule(saveable: Callable[..., Any], unknown: Any, here: Any, eqn: Any) -> Any:
        missing = [v for v, is_here in zip(eqn.invars, here, strict=True) if isinstance(v, core.Var) and not is_here]
        if any(unknown):
            return None, eqn, [True], [True], missing
        asked, avals, params = written(eqn)
        answer = saveable(asked, *avals, **params)
        if answer is False or type(answer).__name__ == "RecomputeType":
            return eqn, eqn, [False], [True], missing
        return eqn, None, [False], [False], []

    pe.partial_eval_jaxpr_custom_rules[primitive] = rule
