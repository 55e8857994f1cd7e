"""Rules of the primitives that put weights side by side: stacked, or fused into one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret.factored import Factored, Tracked
from jlora.interpret.interpreter import DECLINED, Interpreter
from jlora.interpret.quantised import array_of, bound


def concatenate(_: Interpreter, eqn: Any, *pieces: Any) -> Any:
    """Weights side by side: stacked along a new or a batch axis, or fused as blocks over the ranks."""
    axis = eqn.params["dimension"]
    return _joined(eqn, [p.base if isinstance(p, Tracked) else p for p in pieces], pieces, axis)


def stack(_: Interpreter, eqn: Any, *pieces: Any) -> Any:
    """Weights along a new axis, a primitive of its own since JAX 0.11."""
    axis = eqn.params["axis"]
    bases = [p.base if isinstance(p, Tracked) else p for p in pieces]
    return _joined(eqn, bases, [_widened(piece, axis) for piece in pieces], axis)


def _widened(piece: Any, axis: int) -> Any:
    if not isinstance(piece, Tracked):
        return _expanded(piece, axis)
    return piece.view(_expanded(piece.base, axis), lambda f: jnp.expand_dims(f, axis))


def _expanded(base: Any, axis: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*base.shape[:axis], 1, *base.shape[axis:]), base.dtype)


def _joined(eqn: Any, bases: Sequence[Any], pieces: Sequence[Any], axis: int) -> Any:
    adapted: list[Any] = [piece for piece in pieces if isinstance(piece, Tracked) and piece.factors]
    if not all(isinstance(piece, Factored) and piece.roles == ("a", "b") and not piece.tap for piece in adapted):
        return DECLINED
    if not adapted or len({piece.dropout for piece in adapted}) > 1:
        return DECLINED
    owners = {_owners(piece, axis) for piece in adapted}
    blocks = len(owners) == 1 and len(min(owners)) == 1
    if not blocks and not all(p.base.shape[axis] == 1 or len(_owners(p, axis)) == len(p.factors) for p in adapted):
        return DECLINED
    (owner,) = min(owners) if blocks else (None,)
    plain = lambda piece: _without_update(piece, adapted[0], axis, owner)
    scaled = [_scaled(piece) if any(piece is other for other in adapted) else plain(piece) for piece in pieces]
    groups = list(zip(*scaled, strict=True))
    if not all(_fit(group, {axis, group[0].ndim - 1} if blocks else {axis}) for group in groups):
        return DECLINED
    along = [-1 if blocks and i != owner else axis for i in range(len(groups))]
    padded = [_blocks(group) if i == owner else group for i, group in enumerate(groups)]
    return adapted[0].replace(
        base=bound(eqn, [array_of(base) for base in bases] if len(adapted) < len(pieces) else bases),
        factors=tuple(jnp.concatenate(group, n) for group, n in zip(padded, along, strict=True)),
        name="+".join(dict.fromkeys(piece.name for piece in adapted)),
        scale=1.0,
        varies=None,
    )


def _scaled(piece: Factored) -> tuple[Any, ...]:
    return piece.factors[0] * piece.scale, *piece.factors[1:]


def _without_update(piece: Any, like: Factored, axis: int, owner: int | None) -> tuple[Any, ...]:
    """Factors of nothing for a piece that is not adapted: of no rank beside blocks, else of zeros."""
    n = piece.shape[axis] if not isinstance(piece, Tracked) else piece.base.shape[axis]

    def zeros(i: int, factor: Any) -> Any:
        sizes = list(factor.shape)
        sizes[axis] = n if owner in (None, i) else 1
        sizes[-1] = sizes[-1] if owner is None else 0
        return jnp.zeros(sizes, factor.dtype)

    return tuple(zeros(i, factor) for i, factor in enumerate(like.factors))


def _owners(piece: Tracked, axis: int) -> tuple[int, ...]:
    return tuple(i for i, factor in enumerate(piece.factors) if axis in piece.owned(factor))


def _fit(factors: Sequence[Any], free: set[int]) -> bool:
    """Whether the shapes agree but on the `free` axes."""
    return len({tuple(n for i, n in enumerate(factor.shape) if i not in free) for factor in factors}) == 1


def _blocks(factors: Sequence[Any]) -> list[Any]:
    """Each factor in its own columns of the rank, zeros elsewhere."""
    ranks = [factor.shape[-1] for factor in factors]
    places = [(sum(ranks[:i]), sum(ranks[i + 1 :])) for i in range(len(ranks))]
    pad = lambda factor, place: jnp.pad(factor, [(0, 0)] * (factor.ndim - 1) + [place])
    return [pad(factor, place) for factor, place in zip(factors, places, strict=True)]


JOINS = {"concatenate": concatenate, "stack": stack}
