"""One primitive for a product with a frozen weight: linear in its other input, whatever it does to the weight.

A barrier ties the weight's numbers to the other input, x. To JAX they then depend on x, and a product of two things
that depend on x can't be transposed. As one primitive the product keeps its rules: its derivative and its transpose are
those of the product without the barrier, for numbers that are made once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jlora.interpret.policies import seen_as
from jlora.interpret.products import stand_in

_linear = core.Primitive("frozen_product")


def linear(
    written: Any, forward: Callable[..., Any], product: Callable[..., Any], weight: Any, x: Any, *rest: Any
) -> jax.Array:
    """``forward(weight, x, *rest)``, whose derivative in x is that of `product`.

    Args:
      written: the equation that it stands for, with the weight itself, for policies of `jax.checkpoint`.
      forward: the function of (weight, x, *rest) that is computed.
      product: the same function, linear in x, for its derivatives.
      weight: a tree of arrays; it is frozen, as `rest` is.
    """
    arrays, structure = jax.tree.flatten(weight)
    whole = lambda function: _Flat(function, structure, len(arrays))
    functions = {"forward": whole(forward), "product": whole(product)}
    return _linear.bind(*arrays, x, *rest, **functions, place=len(arrays), written=written)


class _Flat:
    """A function of a weight's arrays, x and the rest."""

    def __init__(self, function: Callable[..., Any], structure: Any, n: int):
        self.function, self.structure, self.n = function, structure, n

    def __call__(self, *operands: Any) -> Any:
        return self.function(jax.tree.unflatten(self.structure, operands[: self.n]), *operands[self.n :])


def _written(eqn: Any) -> tuple[Any, Any, dict[str, Any]]:
    written = eqn.params["written"]
    return written.primitive, [v.aval for v in written.invars], written.params


def _shape(*avals: Any, product: Callable[..., Any], **_: Any) -> Any:
    return jax.make_jaxpr(product)(*map(stand_in, avals)).out_avals[0]


def _of_x(product: Callable[..., Any], operands: Any, place: int) -> Callable[[Any], Any]:
    """The function of x alone; what it needs of the weight is made for it, at its time."""
    again = jax.checkpoint(product)
    return lambda x: again(*operands[:place], x, *operands[place + 1 :])


def _jvp(primals: Any, tangents: Any, **params: Any) -> Any:
    y, tangent = _linear.bind(*primals, **params), tangents[params["place"]]
    if isinstance(tangent, ad.Zero):
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    return y, _of_x(params["product"], primals, params["place"])(tangent)


def _transpose(cotangent: Any, *operands: Any, product: Callable[..., Any], place: int, **_: Any) -> Any:
    found: list[Any] = [None] * len(operands)
    if not isinstance(cotangent, ad.Zero):
        x = stand_in(operands[place].aval)
        found[place] = jax.linear_transpose(_of_x(product, operands, place), x)(cotangent)[0]
    return found


def _batched(operands: Any, axes: Any, **params: Any) -> Any:
    mapped = {name: jax.vmap(params[name], in_axes=tuple(axes)) for name in ("forward", "product")}
    return _linear.bind(*operands, **(params | mapped)), 0


_linear.def_impl(lambda *operands, forward, **_: forward(*operands))
_linear.def_abstract_eval(_shape)
ad.primitive_jvps[_linear] = _jvp
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _batched
seen_as(_linear, _written)
mlir.register_lowering(
    _linear, mlir.lower_fun(lambda *operands, forward, **_: forward(*operands), multiple_results=False)
)
