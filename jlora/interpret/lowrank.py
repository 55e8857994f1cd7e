"""The low-rank path of a product: x . a . b for the input of x . W, and one x . [a ...] for products that share x."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret.active import acting
from jlora.interpret.bilinear import bilinear
from jlora.interpret.choice import masked
from jlora.interpret.factored import Factored
from jlora.interpret.laid import labels_of, laid_out, order_of, stored
from jlora.interpret.manual import varying
from jlora.interpret.products import Labels, cast, contract, is_meshed, scaled


@dataclasses.dataclass(frozen=True, repr=False)
class Contraction:
    """A product of two arrays by labels, as in `contract`: of types, with a scale and with dropout of the first.

    Args:
      xs, ys, out: labels of the operands and of the result.
      dtype: in which the operands are multiplied.
      result: the type of the result.
      precision, preferred, flat: as in `contract`.
      scale: a number that the second array, a factor, is multiplied by.
      dropout: the rate; what is kept is told by the bits of a third array.
    """

    xs: Labels
    ys: Labels
    out: Labels
    dtype: Any
    result: Any
    precision: Any = None
    preferred: Any = None
    flat: bool = True
    scale: float = 1.0
    dropout: float = 0.0

    def __call__(self, x: Any, y: Any, *bits: Any) -> jax.Array:
        x = _kept(cast(x, self.dtype), bits[0], self.dropout) if bits else x
        y = cast(scaled(y, self.scale), self.dtype)
        settings = {"precision": self.precision, "preferred": self.preferred, "flat": self.flat}
        return cast(contract(cast(x, self.dtype), self.xs, y, self.ys, self.out, **settings), self.result)

    def __repr__(self) -> str:
        return f"{self.xs} . {self.ys} -> {self.out}"


class Forms(NamedTuple):
    """What products of alike shapes have in common.

    Args:
      is_swapped: whether b is the first factor.
      into, out: the product with the first, which gives (..., rank), and the one with the second.
      gaps: the axes of the whole product that these do not have.
    """

    is_swapped: bool
    into: Contraction
    out: Contraction
    gaps: tuple[int, ...]


class LowRank(NamedTuple):
    """How one product goes through its factors: its weight, the factors in their order, as they are stored."""

    weight: Factored
    first: Any
    second: Any
    forms: Forms

    def middle(self, x: Any) -> jax.Array:
        """x . a, with dropout where it is on."""
        return into(self.forms.into, x, self.first, *_bits(x, self.weight))

    def result(self, h: Any, dtype: Any) -> jax.Array:
        """s h . b, broadcastable to the product; no policy of `jax.checkpoint` sees it: it saves the whole product."""
        _, _, form, gaps = self.forms
        form = form if form.result == dtype else dataclasses.replace(form, result=dtype)
        z = bilinear(form, _acting(tapped(h, self.weight), self.weight), self.second)
        return lax.expand_dims(z, gaps) if gaps else z


def into(form: Contraction, x: Any, factor: Any, *bits: Any) -> jax.Array:
    """The product with the first factor: small, so that policies of `jax.checkpoint` may save it."""
    return bilinear(form, x, factor, *bits, seen=_as_written(form))


@functools.lru_cache(maxsize=4096)
def _as_written(form: Contraction) -> Contraction:
    return dataclasses.replace(form, flat=False)


def low_rank_path(
    x: Any, xs: Labels, weight: Factored, ws: Labels, out: Labels, dtype: Any, result: Any, *given: Any
) -> LowRank:
    """s (x . a) . b, or s (x . b) . a where b has the contracted axes.

    Args:
      x: the input or its type; `xs`, `ws`, `out` are the labels of its axes, the weight's and the product's.
      dtype, result: the types in which the path computes, and of what it gives.
      given: precision and preferred type of the product, as in `jax.lax.dot_general`.
    """
    pair: Any = weight.pair
    flat = not any(map(is_meshed, (x, *map(stored, pair))))
    rate = weight.dropout if weight.key is not None else 0.0
    places = tuple((tuple(factor.shape), order_of(factor)) for factor in pair)
    forms = _forms(xs, ws, out, tuple(weight.base.shape), places, dtype, result, *given, weight.scale, rate, flat)
    first, second = pair[::-1] if forms.is_swapped else pair
    return LowRank(weight, stored(first), stored(second), forms)


@functools.lru_cache(maxsize=4096)
def _forms(
    xs: Labels,
    ws: Labels,
    out: Labels,
    shape: tuple[int, ...],
    places: tuple[Any, ...],
    dtype: Any,
    result: Any,
    precision: Any,
    preferred: Any,
    scale: float,
    rate: float,
    flat: bool,
) -> Forms:
    owned = [{i for i, n in enumerate(shape) if n != 1 and factor[i] == n} for factor, _ in places]
    extents = [math.prod(shape[i] for i in axes if ws[i] not in out) for axes in owned]
    is_swapped = extents[1] > extents[0]
    first, second = (1, 0) if is_swapped else (0, 1)
    ones, twos = ({ws[axis] for axis in owned[i]} for i in (first, second))
    stays = lambda label: (label in xs or label in ones) and (label in twos or label in out)
    middle = (*dict.fromkeys(filter(stays, (*xs, *ws))), "rank")
    made = tuple(label for label in out if label in middle or label in twos)
    labels = [labels_of((*(n if j in own else ("one", j) for j, n in enumerate(ws)), "rank"), order)
              for (_, order), own in zip(places, owned, strict=True)]  # fmt: skip
    sums = sums_of(dtype, dtype)
    inner = Contraction(xs, labels[first], middle, dtype, sums, precision, sums_of(dtype, preferred), flat, 1.0, rate)
    outer = Contraction(middle, labels[second], made, sums, result, precision, preferred, flat, scale)
    return Forms(is_swapped, inner, outer, tuple(axis for axis, label in enumerate(out) if label not in made))


def sums_of(dtype: Any, preferred: Any) -> Any:
    """The type of the middle tensor: float16 ends where the input times a, which is no result, may go on."""
    return jnp.float32 if dtype == jnp.float16 else preferred


def tapped(h: Any, weight: Factored) -> Any:
    return h if weight.tap is None else weight.tap(h)


def _acting(h: Any, weight: Factored) -> Any:
    """The middle tensor of the adapters that act, of those side by side, at the tokens at which they do."""
    h = h if weight.weights is None else masked(h, laid_out(weight.weights))
    return h if weight.active is None else acting(h, laid_out(weight.active), weight.name)


# Dropout: what is kept is drawn once, and stays for the backward pass as one bit an element.


def dropped(x: Any, weight: Factored) -> Any:
    """x with dropout, where it is on: each element is kept with probability 1 - rate and scaled up."""
    again = jax.checkpoint(lambda x, bits: _kept(x, bits, weight.dropout))
    return again(x, *bits) if (bits := _bits(x, weight)) else x


def _bits(x: Any, weight: Factored) -> tuple[Any, ...]:
    if weight.key is None or not weight.dropout:
        return ()
    key = weight.key
    for name in sorted(varying(x)):  # each shard draws for its own part of x
        key = jax.random.fold_in(key, lax.axis_index(name))
    keep = jax.random.bernoulli(key, 1 - weight.dropout, x.shape)
    return (keep if is_meshed(x) or not x.ndim else jnp.packbits(keep, axis=-1),)


def _kept(x: Any, bits: Any, rate: float) -> Any:
    keep = bits if bits.dtype == bool else jnp.unpackbits(bits, axis=-1, count=x.shape[-1]).astype(bool)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
