"""LoHa: the elementwise product of two low-rank updates, kept factored."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret.factored import Factored, low_rank
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LohaParam(AdaptedParam):
    """``W + scale * (A_1 B_1) * (A_2 B_2)``, an update of rank r^2 from four factors of rank r.

    It is computed as one low-rank product, whose factors are the products of the columns of A_1 and A_2 and of the rows
    of B_1 and B_2: the FLOPs are those of LoRA with rank r^2.

    Args:
      base, axes, scale, dropout, layers: as in `jlora.LoraParam`.
      loha_a1, loha_a2: A_1, A_2, of shape (batch..., in..., r), trained; A_2 is zero at the start.
      loha_b1, loha_b2: B_1, B_2, of shape (batch..., r, out...), trained.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="loha", rank=2))["kernel"]
      >>> node.loha_a1.shape, node.loha_b1.shape, float(abs(node.loha_a2).sum())
      ((4, 2), (2, 3), 0.0)

    References:
      Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
      arXiv:2108.06098.
    """

    SETTINGS = ("rank", "alpha", "scaling", "dropout")
    LINEAR = ("loha_b1",)
    FORM = Form(
        "LOHA",
        {
            "hada_w1_a": "loha_b1: out rank", "hada_w1_b": "loha_a1: rank in",
            "hada_w2_a": "loha_b2: out rank", "hada_w2_b": "loha_a2: rank in",
        },
        {"r": ("rank", 8), "alpha": ("alpha", 8)},
        {"r": "rank_pattern", "alpha": "alpha_pattern"},
        kinds=("linear", "conv"),
    )  # fmt: skip

    base: Any = frozen()
    loha_a1: Any = trained("batch in rank")
    loha_b1: Any = trained("batch rank out")
    loha_a2: Any = trained("batch in rank")
    loha_b2: Any = trained("batch rank out")
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> LohaParam:
        rank, keys = kernel.spec.rank, jax.random.split(key, 3)
        return cls(
            base,
            kernel.normal(keys[0], "batch in rank", 0.1, rank=rank),
            kernel.normal(keys[1], "batch rank out", rank=rank),
            jnp.zeros(kernel.sizes("batch in rank", rank=rank), kernel.dtype),
            kernel.normal(keys[2], "batch rank out", rank=rank),
            **kernel.settings,
        )

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"rank": self.loha_a1.shape[-1]}

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        n = len(self.axes.batch_axis)
        a = _pairs(self.loha_a1, self.loha_a2, self.loha_a1.ndim - 1)
        b = _pairs(self.loha_b1, self.loha_b2, n)
        factors = self.beside(a, "batch in rank"), self.beside(b, "batch rank out")
        key = key if self.dropout else None
        return low_rank(self.base, *factors, key=key, name=name, scale=self.scale, dropout=self.dropout)


def _pairs(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """All products of an entry of x with one of y along an axis, in its place."""
    both = jnp.expand_dims(x, axis + 1) * jnp.expand_dims(y, axis)
    return both.reshape(*x.shape[:axis], x.shape[axis] * y.shape[axis], *x.shape[axis + 1 :])
