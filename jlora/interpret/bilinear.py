"""One primitive for products of the low-rank path, which AD keeps whole: it saves their inputs as they are.

Written as plain equations a product of flattened matrices leaves flattened copies of its inputs for the backward pass,
and policies of `jax.checkpoint` that save products save its result, of the layer's width. As one primitive it leaves
its inputs alone, and no policy sees it. Its derivatives are products of the same kind, so any order and mode works.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jlora.interpret import compat
from jlora.interpret.manual import alike
from jlora.interpret.products import stand_in

Bilinear = Callable[..., jax.Array]  # hashable: equal ones are traced once

_product = core.Primitive("low_rank_product")


def bilinear(
    fn: Bilinear, x: Any, y: Any, *rest: Any, seen: Bilinear | None = None, again: Callable[..., Any] | None = None
) -> jax.Array:
    """``fn(x, y, *rest)`` for a function that is linear in x and in y.

    Args:
      fn: the function; equal ones (by ``==``) compute the same.
      x, y: arrays.
      rest: arrays without derivatives.
      seen: the same function, in equations that policies of `jax.checkpoint` are to see; None: they see none.
      again: a function of the result and y that gives x, so that the result is kept for the gradient of y; None: x is.
    """
    return _called(fn, seen, again)(*alike(x, y), *rest)


@functools.lru_cache(maxsize=4096)
def _called(fn: Bilinear, seen: Any, again: Any) -> Bilinear:
    """A call whose derivative is traced once for all that are alike."""
    return jax.jit(functools.partial(_bind, fn, seen, again), inline=compat.INLINE)


def _bind(fn: Bilinear, seen: Any, again: Any, *operands: Any) -> jax.Array:
    return _product.bind(*operands, fn=fn, seen=seen, again=again, jaxpr=_jaxpr(fn, *map(jax.typeof, operands)))


@dataclasses.dataclass(frozen=True)
class _Transposed:
    """The function of a bilinear one's cotangent, in the place of one of its inputs, and of the other input."""

    fn: Bilinear
    place: int
    aval: Any

    def __call__(self, *operands: Any) -> Any:
        of_one = lambda x: self.fn(*operands[: self.place], x, *operands[self.place + 1 :])
        return jax.linear_transpose(of_one, stand_in(self.aval))(operands[self.place])[0]


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A bilinear function of arrays with one more axis each, where they have it."""

    fn: Bilinear
    axes: tuple[int | None, ...]

    def __call__(self, *operands: Any) -> Any:
        return jax.vmap(self.fn, self.axes)(*operands)


@functools.lru_cache(maxsize=4096)
def _jaxpr(fn: Bilinear, *avals: Any) -> Any:
    return jax.make_jaxpr(fn)(*map(stand_in, avals))


@functools.lru_cache(maxsize=4096)
def _compiled(jaxpr: Any) -> Bilinear:
    return jax.jit(_evaluated(jaxpr))


def _evaluated(jaxpr: Any) -> Bilinear:
    return lambda *operands: core.jaxpr_as_fun(jaxpr)(*operands)[0]


def _jvp(primals: Any, tangents: Any, *, fn: Bilinear, seen: Any, again: Any, **_: Any) -> Any:
    (x, y, *rest), (dx, dy, *__) = primals, tangents
    z = _bind(fn, None, again, x, y, *rest) if seen is None else seen(x, y, *rest)
    parts = [] if isinstance(dx, ad.Zero) else [_bind(fn, seen, None, dx, y, *rest)]
    if not isinstance(dy, ad.Zero):
        parts.append(_bind(fn, seen, None, x, dy, *rest) if again is None else _recovered(fn, again)(z, y, dy, *rest))
    return z, functools.reduce(jax.numpy.add, parts) if parts else ad.Zero(jax.typeof(z).to_tangent_aval())


@functools.lru_cache(maxsize=4096)
def _recovered(fn: Bilinear, again: Any) -> Bilinear:
    return jax.checkpoint(lambda z, y, dy, *rest: fn(again(z, y), dy, *rest), prevent_cse=False)


def _transpose(cotangent: Any, *operands: Any, fn: Bilinear, **_: Any) -> Any:
    found: list[Any] = [None] * len(operands)
    if not isinstance(cotangent, ad.Zero):
        place = next(i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
        moved = [cotangent if i == place else x for i, x in enumerate(operands)]
        found[place] = _bind(_transposed(fn, place, operands[place].aval), None, None, *moved)
    return found


def _transposed(fn: Bilinear, place: int, aval: Any) -> Bilinear:
    return fn.fn if isinstance(fn, _Transposed) and fn.place == place else _Transposed(fn, place, aval)


def _batched(operands: Any, axes: Any, *, fn: Bilinear, seen: Any, again: Any, **_: Any) -> Any:
    mapped: Any = lambda fn, axes: None if fn is None else _Mapped(fn, tuple(axes))
    return _bind(mapped(fn, axes), mapped(seen, axes), mapped(again, (0, axes[1])), *operands), 0


_product.def_impl(lambda *operands, jaxpr, **_: _compiled(jaxpr)(*operands))
_product.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals[0])
ad.primitive_jvps[_product] = _jvp
ad.primitive_transposes[_product] = _transpose
batching.primitive_batchers[_product] = _batched
mlir.register_lowering(
    _product,
    mlir.lower_fun(lambda *operands, jaxpr, **_: _evaluated(jaxpr)(*operands), multiple_results=False),
)
