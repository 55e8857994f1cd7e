"""Output scales: activations times a vector, of which the backward pass keeps what is there anyway."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret.bilinear import bilinear
from jlora.interpret.products import Labels, cast, placed_as, transposed, wide


def scaled_by(x: Any, xs: Labels, gain: Any, gs: Labels, keeps_result: bool = False) -> jax.Array:
    """x times a gain without its axis of rank, whose labels are among those of x; in float32 or wider.

    Args:
      keeps_result: whether the result is kept for the gain's gradient, as it is for what reads it anyway, and not x:
        that is the result over the gain. A gain of exactly zero has no gradient then.
    """
    again = _Over(xs, gs) if keeps_result else None
    return bilinear(_Times(xs, gs), x, cast(gain, wide(x.dtype)), again=again)


@dataclasses.dataclass(frozen=True)
class _Times:
    """x times a vector."""

    xs: Labels
    gs: Labels

    def __call__(self, x: Any, gain: Any) -> jax.Array:
        return cast(cast(x, gain.dtype) * _along(x, self.xs, gain, self.gs), x.dtype)


@dataclasses.dataclass(frozen=True)
class _Over:
    """x over a vector; zero where that is zero."""

    xs: Labels
    gs: Labels

    def __call__(self, x: Any, gain: Any) -> jax.Array:
        inverse = jnp.where(gain == 0, jnp.zeros_like(gain), 1 / jnp.where(gain == 0, jnp.ones_like(gain), gain))
        return cast(cast(x, gain.dtype) * _along(x, self.xs, inverse, self.gs), x.dtype)


def _along(x: Any, xs: Labels, gain: Any, gs: Labels) -> jax.Array:
    order = sorted(range(len(gs)), key=lambda i: xs.index(gs[i]))
    gain = lax.expand_dims(transposed(gain, order), [i for i, label in enumerate(xs) if label not in gs])
    return placed_as(gain, x)
