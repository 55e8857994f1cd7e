"""Products in 8 bits, by Qwix, on hardware that has them: the other input is quantised too, row by row."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jlora.nodes.qarray import is_qarray

PLATFORMS = {"int8": ("tpu", "cuda"), "float8_e4m3fn": ("cuda",)}  # that compute such products
TILE = 128  # with smaller ones Qwix computes the numbers first


def faster(eqn: Any, stored: Any, place: int, exact: Callable[..., Any]) -> Callable[..., Any]:
    """A function (`QArray`, x) of a product in 8 bits on such platforms, and of `exact` elsewhere.

    Args:
      eqn: the product.
      stored: its quantised operand.
      place: which of its operands that is.
      exact: the product of the numbers.
    """
    platforms = PLATFORMS.get(jnp.dtype(stored.qvalue.dtype).name, ()) if _is_fit(eqn, stored, place) else ()
    if not platforms:
        return exact

    def in_eight_bits(stored: Any, x: Any) -> Any:
        qwix = sys.modules["qwix"]
        numbers = eqn.params["dimension_numbers"]
        over = numbers[0][1 - place]
        rows = [axis for axis in range(x.ndim) if axis not in over]
        pair = [qwix.quantize(x, stored.qvalue.dtype, channelwise_axes=rows)]
        pair.insert(place, stored)
        return qwix.dot_general(*pair, numbers, preferred_element_type=eqn.outvars[0].aval.dtype)

    return lambda stored, x: lax.platform_dependent(
        stored, x, **dict.fromkeys(platforms, in_eight_bits), default=exact
    )  # fmt: skip


def _is_fit(eqn: Any, stored: Any, place: int) -> bool:
    if eqn.primitive.name != "dot_general" or eqn.params["out_sharding"] is not None or is_qarray(stored.scale):
        return False
    tiles = [n // count for n, count in zip(stored.shape, stored.scale.shape, strict=True)]
    return all(tiles[axis] >= min(TILE, stored.shape[axis]) for axis in eqn.params["dimension_numbers"][0][place])
