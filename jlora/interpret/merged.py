"""Products with a merged weight, M = W + s a b, whose gradients go to a and b through the rank: none is dense."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jlora.interpret.bilinear import bilinear
from jlora.interpret.lowrank import Forms, into
from jlora.interpret.policies import seen_as
from jlora.interpret.products import stand_in

_product = core.Primitive("merged_product")


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of an input and a merged weight, as a function wrote it.

    Args:
      primitive, params: of the equation.
      is_left: whether the weight is its left operand.
      forms: how the input goes through the factors.
    """

    primitive: Any
    params: tuple[tuple[str, Any], ...]
    is_left: bool
    forms: Forms

    def __call__(self, x: Any, weight: Any) -> jax.Array:
        return self.primitive.bind(*((weight, x) if self.is_left else (x, weight)), **dict(self.params))

    def through(self, x: Any, a: Any, b: Any) -> jax.Array:
        """s (x . a) . b"""
        first, second = (b, a) if self.forms.is_swapped else (a, b)
        return bilinear(self.forms.out, into(self.forms.into, x, first), second)


@dataclasses.dataclass(frozen=True)
class _Transposed:
    """From a product's cotangent to that of its input."""

    of: Any
    aval: Any

    def __call__(self, cotangent: Any, weight: Any) -> Any:
        return jax.linear_transpose(lambda x: self.of(x, weight), stand_in(self.aval))(cotangent)[0]

    def through(self, cotangent: Any, a: Any, b: Any) -> Any:
        return jax.linear_transpose(lambda x: self.of.through(x, a, b), stand_in(self.aval))(cotangent)[0]


@dataclasses.dataclass(frozen=True)
class _Mapped:
    """A product of arrays with one more axis each, where they have it: x, the weight, a and b."""

    of: Any
    axes: tuple[int | None, ...]

    def __call__(self, x: Any, weight: Any) -> Any:
        return jax.vmap(self.of, self.axes[:2])(x, weight)

    def through(self, x: Any, a: Any, b: Any) -> Any:
        return jax.vmap(self.of.through, (self.axes[0], *self.axes[2:]))(x, a, b)


def merged_product(form: Any, x: Any, weight: Any, a: Any, b: Any) -> jax.Array:
    """``form(x, weight)``, whose derivative in a and b is that of ``form.through(x, a, b)``; the weight has none."""
    return _bind(form, x, weight, a, b)


def _bind(form: Any, *operands: Any) -> jax.Array:
    return _product.bind(*operands, form=form, jaxpr=_jaxpr(form, *map(jax.typeof, operands[:2])))


@functools.lru_cache(maxsize=4096)
def _jaxpr(form: Any, *avals: Any) -> Any:
    return jax.make_jaxpr(form)(*map(stand_in, avals))


def _evaluated(x: Any, weight: Any, *_: Any, jaxpr: Any, **__: Any) -> jax.Array:
    return core.jaxpr_as_fun(jaxpr)(x, weight)[0]


def _jvp(primals: Any, tangents: Any, *, form: Any, **_: Any) -> Any:
    (x, weight, a, b), (dx, _weight, da, db) = primals, tangents
    y = _bind(form, *primals)
    parts = [] if isinstance(dx, ad.Zero) else [_bind(form, dx, weight, a, b)]
    parts += [] if isinstance(da, ad.Zero) else [form.through(x, da, b)]
    parts += [] if isinstance(db, ad.Zero) else [form.through(x, a, db)]
    return y, functools.reduce(jax.numpy.add, parts) if parts else ad.Zero(jax.typeof(y).to_tangent_aval())


def _transpose(cotangent: Any, x: Any, *others: Any, form: Any, **_: Any) -> Any:
    if isinstance(cotangent, ad.Zero):
        return [None] * 4
    back = form.of if isinstance(form, _Transposed) else _Transposed(form, x.aval)
    return [_bind(back, cotangent, *others), None, None, None]


def _batched(operands: Any, axes: Any, *, form: Any, **_: Any) -> Any:
    return _bind(_Mapped(form, tuple(axes)), *operands), 0


def _written(eqn: Any) -> tuple[Any, Any, dict[str, Any]]:
    form = eqn.params["form"]
    while not isinstance(form, Product):
        form = form.of
    return form.primitive, [v.aval for v in eqn.invars[:2]], dict(form.params)


_product.def_impl(_evaluated)
_product.def_abstract_eval(lambda *_, jaxpr, **__: jaxpr.out_avals[0])
ad.primitive_jvps[_product] = _jvp
ad.primitive_transposes[_product] = _transpose
batching.primitive_batchers[_product] = _batched
seen_as(_product, _written)
mlir.register_lowering(_product, mlir.lower_fun(_evaluated, multiple_results=False))
