"""LoKr: the Kronecker product of a small matrix and a low-rank one, kept factored."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret.factored import Factored, low_rank
from jlora.interpret.manual import check_size
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, sizes_of, static, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LokrParam(AdaptedParam):
    """``W + scale * C (x) (A B)``, the Kronecker product with a small C of shape (p, q), axes flattened.

    It is computed as one low-rank product of rank ``r * min(p, q)``. p and q are the largest divisors of the kernel's
    sizes up to the option ``factor``, or up to their roots if it is -1.

    Args:
      base, axes, scale, dropout, layers: as in `jlora.LoraParam`.
      lokr_c: C, of shape (batch..., p, q), trained; zero at the start.
      lokr_a: A, of shape (batch..., in / p, r), trained.
      lokr_b: B, of shape (batch..., r, out / q), trained.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> spec = jlora.LoraSpec(variant="lokr", rank=2, options={"factor": 4})
      >>> node = jlora.wrap({"kernel": jnp.ones((8, 12))}, spec)["kernel"]
      >>> node.lokr_c.shape, node.lokr_a.shape, node.lokr_b.shape
      ((4, 4), (2, 2), (2, 3))

    References:
      Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
      arXiv:2309.14859.
    """

    SETTINGS = ("rank", "alpha", "scaling", "dropout")
    OPTIONS = {"factor": 8}
    LINEAR = ("lokr_c",)

    base: Any = frozen()
    lokr_c: Any = trained("batch p q")
    lokr_a: Any = trained("batch within rank")
    lokr_b: Any = trained("batch rank beyond")
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> LokrParam:
        rank, (key_a, key_b) = kernel.spec.rank, jax.random.split(key)
        factor = kernel.option("factor")
        if not isinstance(factor, int) or (factor < 1 and factor != -1):
            kernel.refuse("options['factor']", "it is an integer of at least 1, or -1", factor)
        p, q = (_divisor(kernel.size(word), factor) for word in ("in", "out"))
        within, beyond = kernel.size("in") // p, kernel.size("out") // q
        return cls(
            base,
            jnp.zeros(kernel.sizes("batch p q", p=p, q=q), kernel.dtype),
            kernel.normal(key_a, "batch within rank", within**-0.5, within=within, rank=rank),
            kernel.normal(key_b, "batch rank beyond", rank**-0.5, rank=rank, beyond=beyond),
            **kernel.settings,
        )

    @property
    def settings(self) -> dict[str, Any]:
        factor = max(self.lokr_c.shape[-2:])
        return super().settings | {"rank": self.lokr_a.shape[-1], "options": {"factor": factor}}

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        p, q = self.lokr_c.shape[-2:]
        left, right = (jnp.eye(p, dtype=self.lokr_c.dtype), self.lokr_c) if p <= q else (self.lokr_c, jnp.eye(q))
        a = jnp.einsum(
            "...ij,...kr->...ikjr", jnp.broadcast_to(left, (*self.lokr_c.shape[:-2], p, min(p, q))), self.lokr_a
        )
        b = jnp.einsum(
            "...jo,...rk->...jrok", jnp.broadcast_to(right, (*self.lokr_c.shape[:-2], min(p, q), q)), self.lokr_b
        )
        batch, rank = self.lokr_c.shape[:-2], min(p, q) * self.lokr_a.shape[-1]
        shape = lambda axes: [self.shape[axis] for axis in axes]
        sizes = {"in": p * self.lokr_a.shape[-2], "out": q * self.lokr_b.shape[-1]}
        for word, size in sizes.items():
            check_size(name, "the Kronecker product", size, math.prod(sizes_of(self, word)))
        a = a.reshape(*batch, *shape(self.axes.in_axis), rank)
        b = b.reshape(*batch, rank, *shape(self.axes.out_axis))
        factors = self.beside(a, "batch in rank"), self.beside(b, "batch rank out")
        key = key if self.dropout else None
        return low_rank(self.base, *factors, key=key, name=name, scale=self.scale, dropout=self.dropout)


def _divisor(size: int, factor: int) -> int:
    """The largest divisor of `size` up to the factor, or up to the root of the size if that is -1."""
    limit = math.isqrt(size) if factor == -1 else factor
    return max(n for n in range(1, min(limit, size) + 1) if size % n == 0)
