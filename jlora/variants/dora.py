"""DoRA: a kernel's magnitude and its direction are trained apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret.factored import Factored, gained
from jlora.interpret.manual import split_axes, summed
from jlora.interpret.products import contract, wide
from jlora.interpret.quantised import made_beside
from jlora.nodes.axes import Axes
from jlora.nodes.fields import PAIR, frozen, matrices, of_layers, sizes_of, static, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.nodes.qarray import dense
from jlora.variants.lora import from_start, low_rank_of

TINY = 1e-30  # under a norm's square: a column of zeros stays one
SMALL = 1e-6  # of ||W||^2: below it the sum of its three terms is rounding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DoraParam(AdaptedParam):
    """``m / ||V|| * V`` with ``V = W + scale * A @ B``, the norm over the in axes and without a gradient of its own.

    The norm is computed from ``||W||^2`` and the factors: V is never built. A magnitude of exactly zero has no
    gradient.

    Args:
      base, lora_a, lora_b, axes, scale, dropout, layers, start: as in `jlora.LoraParam`.
      magnitude: m, of shape (batch..., out...), trained; it starts as ||W||.
      norm2: ||W||^2, of shape (batch..., out...).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="dora", rank=2))["kernel"]
      >>> node.lora_a.shape, node.lora_b.shape, node.magnitude
      ((4, 2), (2, 3), Array([2., 2., 2.], dtype=float32))

    References:
      Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv:2402.09353, sections 4.1 and 4.3.
    """

    LINEAR = ("lora_b", "start.1")

    base: Any = frozen()
    lora_a: Any = trained("batch in rank")
    lora_b: Any = trained("batch rank out")
    magnitude: Any = trained("batch out")
    norm2: Any = frozen("batch out")
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)
    start: tuple[Any, ...] = frozen(PAIR, default=())

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> DoraParam:
        norm2 = squared_norms(kernel, base)
        magnitude = jnp.sqrt(norm2).astype(kernel.dtype)
        return cls(base, **kernel.low_rank(base, key), magnitude=magnitude, norm2=norm2, **kernel.settings)

    def identity(self) -> DoraParam:
        return dataclasses.replace(super().identity(), magnitude=jnp.sqrt(self.norm2).astype(self.magnitude.dtype))

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        norm = self.norm()
        gain = self.beside(self.magnitude.astype(norm.dtype) / norm, "batch out", fill=1)
        return gained(low_rank_of(self, name, key), gain, keeps_result=True)

    def norm(self) -> jax.Array:
        """The norm ||V|| over the in axes, without a gradient.

        Returns:
          An array of shape (batch..., out...) in float32 or wider.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="dora", rank=2))["kernel"]
          >>> node.norm()
          Array([2., 2., 2.], dtype=float32)
        """
        return lax.stop_gradient(jnp.sqrt(jnp.maximum(self._norm2(), SMALL * self.norm2 + TINY)))

    def _norm2(self) -> jax.Array:
        """||W||^2 + 2 s sum(W^T A * B^T) + s^2 sum(B * (A^T A) B), of shape (batch..., out...)."""
        sums = wide(self.lora_a.dtype)
        lora_a, lora_b = (lax.stop_gradient(factor).astype(sums) for factor in from_start(self))
        weight = lax.stop_gradient(of_layers(self, made_beside(self.base, lora_b))).astype(sums)
        batch, ins, outs = self.axes.batch_axis, self.axes.in_axis, self.axes.out_axis
        a, b, made = (*batch, *ins, "r"), (*batch, "r", *outs), (*batch, "r", *outs)
        cross = contract(weight, tuple(range(self.ndim)), lora_a, a, made)
        gram = contract(lora_a, (*batch, *ins, "q"), lora_a, a, (*batch, "r", "q"))
        square = contract(gram, (*batch, "q", "r"), lora_b, b, (*batch, "q", *outs))
        total = (2 * self.scale * cross + self.scale**2 * square) * lora_b
        return self.norm2 + summed(total.sum(len(batch)), split_axes(lora_b, lora_a, "DoRA's norm"))


def squared_norms(node: Any, base: Any) -> jax.Array:
    """||W||^2 over the in axes of a node's or a kernel's base, of shape (batch..., out...)."""
    return jnp.square(matrices(node, jnp.asarray(dense(base)))).sum(-2).reshape(sizes_of(node, "batch out"))
