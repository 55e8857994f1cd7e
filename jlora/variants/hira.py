"""HiRA: the kernel is multiplied, element by element, by a low-rank matrix around one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret.products import contract, wide
from jlora.interpret.quantised import array_of
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HiraParam(AdaptedParam):
    """``W * (1 + A B)``, element by element: an update of high rank from two small factors.

    Through its factors the update would cost r products with W. So a step computes the kernel and its whole gradient,
    at the cost of a merged kernel, and there is no dropout.

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      hira_a: A, of shape (batch..., in..., r), trained.
      hira_b: B, of shape (batch..., r, out...), trained; zero at the start.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="hira", rank=2))["kernel"]
      >>> node.hira_a.shape, node.hira_b.shape
      ((4, 2), (2, 3))

    References:
      Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025,
      https://openreview.net/forum?id=TwJrTz9cRS.
    """

    KINDS = ("dot", "conv", "ragged_dot")
    SETTINGS = ("rank",)
    FORM = Form(
        "HIRA", {"hira_A": "hira_a: rank in", "hira_B": "hira_b: out rank"}, {"r": ("rank", 32)}, {"r": "rank_pattern"}
    )

    base: Any = frozen()
    hira_a: Any = trained("batch in rank")
    hira_b: Any = trained("batch rank out")
    axes: Axes = static()
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> HiraParam:
        rank = kernel.spec.rank
        a = kernel.normal(key, "batch in rank", (3 * kernel.size("in")) ** -0.5, rank=rank)
        return cls(base, a, jnp.zeros(kernel.sizes("batch rank out", rank=rank), kernel.dtype), **kernel.place)

    @property
    def settings(self) -> dict[str, Any]:
        return {"rank": self.hira_a.shape[-1]}

    def identity(self) -> HiraParam:
        return dataclasses.replace(self, hira_b=jnp.zeros_like(self.hira_b))

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del name, key
        batch, ins, outs = self.axes.batch_axis, self.axes.in_axis, self.axes.out_axis
        base, sums = array_of(self.base), wide(self.base.dtype)
        a, b = (self.everywhere(x).astype(sums) for x in (self.hira_a, self.hira_b))
        product = contract(a, (*batch, *ins, "r"), b, (*batch, "r", *outs), tuple(range(self.ndim)))
        return (base.astype(sums) * (1 + product)).astype(base.dtype)
