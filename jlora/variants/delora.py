"""DeLoRA: a low-rank update whose ranks have length one, and a trained strength."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret.factored import Factored, low_rank
from jlora.interpret.manual import split_axes, summed
from jlora.interpret.products import wide
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, matrices, sizes_of, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.nodes.qarray import dense

_LEAST = 1e-4  # of a length by which PEFT divides


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DeloraParam(AdaptedParam):
    """``W + n * (lambda / r) * sum_i a_i b_i / (|a_i| |b_i|)`` with n the norms of W's rows, over the out axes.

    The strength lambda bounds the update, whatever A and B are: it trains too.

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      delora_a: A, of shape (batch..., in..., r), trained.
      delora_b: B, of shape (batch..., r, out...), trained; zero at the start.
      delora_lambda: of shape (batch..., 1), trained; the option ``strength`` at the start.
      norms: n, of shape (batch..., in...).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((3, 4))}, jlora.LoraSpec(variant="delora", rank=2))["kernel"]
      >>> node.delora_a.shape, node.delora_b.shape, node.delora_lambda, node.norms
      ((3, 2), (2, 4), Array([15.], dtype=float32), Array([2., 2., 2.], dtype=float32))

    References:
      Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation", arXiv:2503.18225.
    """

    SETTINGS = ("rank",)
    OPTIONS = {"strength": 15}
    FORM = Form(
        "DELORA",
        {
            "delora_A": "delora_a: rows in", "delora_B": "delora_b: out rows",
            "delora_lambda": "delora_lambda: strength", "delora_w_norm": "norms: in",
        },
        {"r": ("rank", 8), "delora_lambda": ("options.strength", 15)},
        {"r": "rank_pattern"},
        bias="delora_only",
    )  # fmt: skip
    LINEAR = ("delora_lambda",)

    base: Any = frozen()
    delora_a: Any = trained("batch in rows")
    delora_b: Any = trained("batch rows out")
    delora_lambda: Any = trained("batch strength")
    norms: Any = frozen("batch in")
    axes: Axes = static()
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> DeloraParam:
        rank, strength = kernel.spec.rank, kernel.option("strength")
        if not isinstance(strength, (int, float)) or isinstance(strength, bool):
            kernel.refuse("options['strength']", "it is a number", strength)
        a = kernel.normal(key, "batch in rows", (3 * kernel.size("in")) ** -0.5, rows=rank)
        b = jnp.zeros(kernel.sizes("batch rows out", rows=rank), kernel.dtype)
        norms = jnp.linalg.norm(matrices(kernel, jnp.asarray(dense(base))), axis=-1).reshape(kernel.sizes("batch in"))
        strengths = jnp.full(kernel.sizes("batch strength", strength=1), strength, kernel.dtype)
        return cls(base, a, b, strengths, norms.astype(kernel.dtype), **kernel.place)

    @property
    def settings(self) -> dict[str, Any]:
        return {"rank": self.delora_a.shape[-1]}

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        del key
        n, sums, rank = len(self.axes.batch_axis), wide(self.delora_a.dtype), self.delora_a.shape[-1]
        ins, outs = ([n + i for i in range(len(axes))] for axes in (self.axes.in_axis, self.axes.out_axis))
        a, b = self.delora_a.astype(sums), self.delora_b.astype(sums)
        split = lambda x: split_axes(self.delora_lambda, x, "DeLoRA's norms")
        lengths = _length(a, ins, split(a)) * _length(b, [i + 1 for i in outs], split(b))
        of_ranks = self.delora_lambda.astype(sums) / rank / lengths
        assert of_ranks.shape == sizes_of(self, "batch rank", {"rank": rank})
        a = a * jnp.expand_dims(of_ranks, ins) * self.norms.astype(sums)[..., None]
        return low_rank(self.base, self.laid(a, "batch in rank"), self.laid(b, "batch rank out"), name=name)


def _length(x: jax.Array, axes: list[int], split: tuple[str, ...]) -> jax.Array:
    """The norm over some axes, at least `_LEAST`; without a gradient where it is less."""
    square = summed(jnp.square(x).sum(tuple(axes)), split)
    return jnp.sqrt(jnp.where(square > _LEAST**2, square, _LEAST**2))
