"""GraLoRA: the kernel is parted into k x k blocks, each with a low-rank update of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.factored import Factored, low_rank
from jlora.interpret.manual import check_size
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, sizes_of, static, trained
from jlora.nodes.form import Form, plain_number
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


class _Form(Form):
    """The ranks of a block of inputs, k times as many, are on one axis in the file; so are those of the outputs."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        a, b, k = fields.get("gralora_a"), fields.get("gralora_b"), spec.options["k"]
        if a is None or b is None or ("hybrid_a" in fields) != ("hybrid_b" in fields):
            raise ValueError(f"peft.load: of GraLoRA's factors there are {sorted(fields)}; they come in pairs")
        if not (len(a) == len(b) == k and a.shape[2] == b.shape[1] == spec.rank):
            raise ValueError(f"peft.load: GraLoRA has factors {a.shape} and {b.shape}; k is {k} and r is {spec.rank}")
        a, b = a.reshape(*a.shape[:2], k, -1), b.reshape(k, k, -1, b.shape[2])
        return {**fields, "gralora_a": a, "gralora_b": b}

    def write(self, fields: dict[str, np.ndarray], node: Any) -> dict[str, np.ndarray]:
        a, b = fields["gralora_a"], fields["gralora_b"]
        return {**fields, "gralora_a": a.reshape(*a.shape[:2], -1), "gralora_b": b.reshape(len(b), -1, b.shape[3])}

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        a, b = (tensors[name].shape if name in tensors else None for name in ("gralora_A", "gralora_B"))
        return a and a[0] * a[1], b and b[0] * b[2]

    def settings_of(self, node: Any) -> dict[str, Any]:
        rank, hybrid, k = node.ranks
        alpha = plain_number(node.scale * (rank + hybrid))
        return {"r": rank, "hybrid_r": hybrid, "alpha": alpha, "gralora_k": k, "gralora_dropout": node.dropout}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GraloraParam(AdaptedParam):
    """``W + scale * (G + A B)``, where each of the k x k blocks of G has a rank of r / k; axes flattened.

    It is computed as one low-rank product, of rank k r and the rank ``hybrid`` of A B, which may be 0. PEFT's alpha is
    divided by r + ``hybrid``; `jlora.LoraSpec` divides by r, unless ``scaling`` is the scale itself.

    Args:
      base, axes, scale, dropout, layers: as in `jlora.LoraParam`.
      gralora_a: of shape (batch..., k, in / k, k, r / k), trained: for each block of inputs a factor with each of
        outputs.
      gralora_b: of shape (batch..., k, k, r / k, out / k), trained: for each block of outputs one with each of inputs;
        zero at the start.
      hybrid_a, hybrid_b: A and B, of shapes (batch..., in..., hybrid) and (batch..., hybrid, out...), trained; B is
        zero at the start. Or ().

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((8, 12))}, jlora.LoraSpec(variant="gralora", rank=2))["kernel"]
      >>> node.gralora_a.shape, node.gralora_b.shape
      ((2, 4, 2, 1), (2, 2, 1, 6))

    References:
      Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", arXiv:2505.20355.
    """

    SETTINGS = ("rank", "alpha", "scaling", "dropout")
    OPTIONS = {"k": 2, "hybrid": 0}
    LINEAR = ("gralora_b", "hybrid_b")
    FORM = _Form(
        "GRALORA",
        {
            "gralora_A": "gralora_a: block inside ranks", "gralora_B": "gralora_b: part ranks outside",
            "gralora_A_general.weight": "hybrid_a: hybrid in", "gralora_B_general.weight": "hybrid_b: out hybrid",
        },
        {
            "r": ("rank", 32), "alpha": ("alpha", 64), "gralora_dropout": ("dropout", 0.0),
            "gralora_k": ("options.k", 2), "hybrid_r": ("options.hybrid", 0),
        },
        optional=True, orders_outputs=True, bias="gralora_only",
    )  # fmt: skip

    base: Any = frozen()
    gralora_a: Any = trained("batch block inside part share")
    gralora_b: Any = trained("batch part block share outside")
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)
    hybrid_a: Any = trained("batch in hybrid", default=())
    hybrid_b: Any = trained("batch hybrid out", default=())

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> GraloraParam:
        k, hybrid, rank = kernel.option("k"), kernel.option("hybrid"), kernel.spec.rank
        common = math.gcd(kernel.size("in"), kernel.size("out"), rank)
        if type(k) is not int or k < 1 or common % k:
            kernel.refuse("options['k']", f"it divides {common}, as inputs, outputs and the rank do", k)
        if type(hybrid) is not int or hybrid < 0:
            kernel.refuse("options['hybrid']", "it is a rank, or 0", hybrid)
        ins, own = kernel.size("in"), {"block": k, "part": k, "share": rank // k}
        keys = jax.random.split(key)
        a = kernel.normal(keys[0], "batch block inside part share", (3 * ins // k) ** -0.5, inside=ins // k, **own)
        b = jnp.zeros(kernel.sizes("batch part block share outside", outside=kernel.size("out") // k, **own), a.dtype)
        if not hybrid:
            return cls(base, a, b, **kernel.settings)
        hybrid_a = kernel.normal(keys[1], "batch in hybrid", (3 * ins) ** -0.5, hybrid=hybrid)
        hybrid_b = jnp.zeros(kernel.sizes("batch hybrid out", hybrid=hybrid), a.dtype)
        return cls(base, a, b, **kernel.settings, hybrid_a=hybrid_a, hybrid_b=hybrid_b)

    @property
    def ranks(self) -> tuple[int, int, int]:
        """r, the rank of A B, and k."""
        k, hybrid = self.gralora_a.shape[-2], self.hybrid_a
        return k * self.gralora_a.shape[-1], 0 if isinstance(hybrid, tuple) else hybrid.shape[-1], k

    @property
    def settings(self) -> dict[str, Any]:
        rank, hybrid, k = self.ranks
        return super().settings | {"rank": rank, "options": {"k": k, "hybrid": hybrid}}

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        *batch, k, inside, _, rank = self.gralora_a.shape
        ins, outs, ranks = sizes_of(self, "in"), sizes_of(self, "out"), k * k * rank
        check_size(name, "GraLoRA's blocks", k * k * inside * self.gralora_b.shape[-1], math.prod((*ins, *outs)))
        # Each pair of a block of inputs and one of outputs has ranks of its own, which are zero elsewhere.
        eye = jnp.eye(k, dtype=self.gralora_a.dtype)
        a = jnp.einsum("...niks,nm->...nimks", self.gralora_a, eye).reshape(*batch, *ins, ranks)
        b = jnp.einsum("...knso,kl->...nkslo", self.gralora_b, eye).reshape(*batch, ranks, *outs)
        if self.ranks[1]:
            a = jnp.concatenate([a, self.hybrid_a], -1)
            b = jnp.concatenate([b, self.hybrid_b], len(batch))
        factors = self.laid(a, "batch in rank"), self.laid(b, "batch rank out")
        key = key if self.dropout else None
        return low_rank(self.base, *factors, key=key, name=name, scale=self.scale, dropout=self.dropout)
