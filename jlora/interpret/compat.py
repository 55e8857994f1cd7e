"""All that differs between the JAX versions that jlora supports, and what it reads of a jaxpr."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.core
import numpy as np
from jax.extend import core

_JLORA = Path(__file__).parents[1]
_LIBRARIES = (*(str(Path(str(module.__file__)).parent) for module in (jax, flax)), str(_JLORA))
_EXAMPLES = str(_JLORA / "examples")

INLINE: Any = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True  # an enum since JAX 0.11
REMAT = ("remat2", "checkpoint", "remat")


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr and its constants, be it closed (one class with the open ones since JAX 0.12) or not."""
    consts = getattr(jaxpr, "consts", ())
    return (jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr), consts


def invars(jaxpr: Any) -> list[Any]:
    """The variables of an open jaxpr, those of its constants first."""
    return list(jaxpr.all_invars) if hasattr(jaxpr, "all_invars") else [*jaxpr.constvars, *jaxpr.invars]


def bind(eqn: Any, values: Sequence[Any], **changes: Any) -> Any:
    """Evaluates an equation as JAX would, or one that differs in some of its parameters."""
    params = eqn.primitive.get_bind_params(eqn.params | changes)
    arrays = [value for value in values if isinstance(value, jax.Array)]
    if not any(map(is_traced, arrays)) or eqn.primitive.multiple_results or not jax.sharding.get_abstract_mesh().empty:
        return eqn.primitive.bind(*values, **params)
    try:
        known = tuple(None if isinstance(value, jax.Array) else _constant(value) for value in values)
        call = _call(eqn.primitive, tuple(sorted(params.items(), key=operator.itemgetter(0))), known)
    except TypeError:  # a parameter that can't be hashed
        return eqn.primitive.bind(*values, **params)
    return call(*arrays)


@functools.lru_cache(maxsize=4096)
def _call(primitive: Any, params: tuple[tuple[str, Any], ...], known: tuple[Any, ...]) -> Callable[..., Any]:
    """An equation as a function that is traced, and whose derivative is, once for all that are alike.

    As `jax.numpy` does, which makes the trace of a gradient half as long as that of bare equations.
    """

    def evaluated(*arrays: Any) -> Any:
        rest = iter(arrays)
        return primitive.bind(*(next(rest) if value is None else value.item for value in known), **dict(params))

    return jax.jit(evaluated, inline=INLINE)


class _Constant(NamedTuple):
    """A number of a program, told from others by its type and its bits."""

    kind: type
    dtype: Any
    bits: bytes
    item: Any


def _constant(value: Any) -> _Constant:
    number = np.asarray(value)
    if number.shape:
        raise TypeError("only single numbers can be hashed")
    return _Constant(type(value), number.dtype, number.tobytes(), value)


def scan_parts(params: dict[str, Any], values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Splits a scan's operands into constants, carry and stacked inputs."""
    if "ft_in" in params:  # since JAX 0.11
        consts, init, xs = (list(group.vals) for group in params["ft_in"].update(values).unpack())
        return consts, init, xs
    n, k = params["num_consts"], params["num_carry"]
    return list(values[:n]), list(values[n : n + k]), list(values[n + k :])


def context(eqn: Any) -> AbstractContextManager:
    """The context (mesh, compute type, ...) under which an equation was traced."""
    return eqn.ctx.manager


def name_stack(eqn: Any) -> str:
    """The names under which an equation was traced, for profiles: ``Encoder/layer_0``."""
    return str(eqn.source_info.name_stack)


def source_line(eqn: Any) -> str:
    """``file.py:12 (function)`` of the user's code that made an equation; empty where it is not known."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in traceback.frames if traceback else ():
        inside = frame.file_name.startswith(_LIBRARIES) and not frame.file_name.startswith(_EXAMPLES)
        if not inside and not frame.file_name.startswith("<"):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return ""


def is_traced(x: Any) -> bool:
    """Whether a value is known only abstractly now."""
    return isinstance(x, jax.core.Tracer)


def is_literal(atom: Any) -> bool:
    return isinstance(atom, core.Literal)
