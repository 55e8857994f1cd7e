"""A trace of a user's function, whose errors name that function and the leaves of its tree."""

from __future__ import annotations

import collections
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

PARAMS = inspect.Signature([inspect.Parameter("params", inspect.Parameter.POSITIONAL_ONLY)])


def traced(
    name: str, on_bases: Callable[[list[Any]], Any], fn: Callable[..., Any], paths: Sequence[str], bases: Sequence[Any]
) -> Any:
    """The jaxpr of a function of the leaves at some paths, which calls a user's: errors tell of that one."""
    keys = paths if len({*paths}) == len(paths) else range(len(paths))

    @functools.wraps(fn, updated=())
    def of_params(params: dict[Any, Any]) -> Any:
        return on_bases(list(params.values()))

    of_params.__signature__ = PARAMS  # type: ignore[attr-defined]
    try:
        return jax.make_jaxpr(of_params)(collections.OrderedDict(zip(keys, bases, strict=True)))
    except jax.errors.JAXTypeError as error:
        error.add_note(
            f"{name} traces the function, as jax.jit does: its weights, and what is computed with them, have no values "
            "in it. Choose by them with jax.lax.cond or jnp.where, and use NumPy outside"
        )
        raise
