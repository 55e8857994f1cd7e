"""AdaLoRA: the update as a singular value decomposition, whose values are pruned as training goes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.factored import Factored, low_rank
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.form import Form, plain_number
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam, is_node

_MORE = 1e-5  # than the rank, by which PEFT divides


class _Form(Form):
    """PEFT divides by the rank at the start, and a little more; what is left of a pruned kernel keeps that scale."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        return {**fields, "scale": spec.scale * spec.rank / (spec.rank + _MORE)}

    def settings_of(self, node: Any) -> dict[str, Any]:
        rank = node.lora_e.shape[-1]
        alpha = plain_number(node.scale * (rank + _MORE))
        return {"init_r": rank, "target_r": rank, "lora_alpha": alpha, "lora_dropout": node.dropout}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdaLoraParam(AdaptedParam):
    """``W + scale * A diag(e) B``; `jlora.optim.adalora` prunes the values e, `orthogonality` is the regulariser.

    Args:
      base, axes, scale, dropout, layers: as in `jlora.LoraParam`.
      lora_a, lora_b: singular vectors, of shapes (batch..., in..., r) and (batch..., r, out...), trained.
      lora_e: singular values, of shape (batch..., r), trained; zero at the start.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="adalora", rank=2))["kernel"]
      >>> node.lora_a.shape, node.lora_e, node.lora_b.shape
      ((4, 2), Array([0., 0.], dtype=float32), (2, 3))

    References:
      Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.
    """

    SETTINGS = ("rank", "alpha", "scaling", "dropout")
    LINEAR = ("lora_e",)
    FORM = _Form(
        "ADALORA",
        {"lora_A": "lora_a: rank in", "lora_B": "lora_b: out rank", "lora_E": "lora_e: rank one"},
        {"init_r": ("rank", 12), "lora_alpha": ("alpha", 8), "lora_dropout": ("dropout", 0.0)},
        fixed={"total_step": 1, "tinit": 0, "tfinal": 0},
        kinds=("linear", "conv"),
        bias="lora_only",
    )

    base: Any = frozen()
    lora_a: Any = trained("batch in rank")
    lora_e: Any = trained("batch rank")
    lora_b: Any = trained("batch rank out")
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> AdaLoraParam:
        rank, (key_a, key_b) = kernel.spec.rank, jax.random.split(key)
        lora_a = kernel.normal(key_a, "batch in rank", 0.02, rank=rank)
        lora_b = kernel.normal(key_b, "batch rank out", 0.02, rank=rank)
        lora_e = jnp.zeros(kernel.sizes("batch rank", rank=rank), kernel.dtype)
        return cls(base, lora_a, lora_e, lora_b, **kernel.settings)

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        lora_e = jnp.expand_dims(self.lora_e, [len(self.axes.batch_axis) + i for i in range(len(self.axes.in_axis))])
        factors = self.laid(self.lora_a * lora_e, "batch in rank"), self.laid(self.lora_b, "batch rank out")
        key = key if self.dropout else None
        return low_rank(self.base, *factors, key=key, name=name, scale=self.scale, dropout=self.dropout)


def orthogonality(tree: Any) -> jax.Array:
    """AdaLoRA's regulariser: how far the singular vectors of its kernels are from orthonormal ones.

    It is the mean over kernels of ``||A^T A - I||^2 + ||B B^T - I||^2``, to add to a loss with a weight of about 0.5.

    Args:
      tree: a wrapped tree, or the trainable half of it. Nodes of other variants count for nothing.

    Returns:
      A scalar, which has gradients.

    Raises:
      TypeError: if no leaf of the tree is an `AdaLoraParam`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> axes = jlora.Axes((0,), (1,))
      >>> node = jlora.variants.AdaLoraParam(jnp.ones((4, 4)), jnp.eye(4), jnp.ones(4), jnp.eye(4), axes=axes)
      >>> float(jlora.variants.orthogonality({"kernel": node}))
      0.0

    References:
      Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512.
    """
    nodes = [x for x in jax.tree.leaves(tree, is_leaf=is_node) if isinstance(x, AdaLoraParam)]
    if not nodes:
        raise TypeError('orthogonality: no leaf of this tree is an AdaLoraParam; wrap with variant="adalora"')
    return jnp.stack([_defect(node) for node in nodes]).mean()


def _defect(node: AdaLoraParam) -> jax.Array:
    n, rank = len(node.axes.batch_axis), node.lora_e.shape[-1]
    batch = node.lora_e.shape[:-1]
    vectors = node.lora_a.reshape(*batch, -1, rank).mT, node.lora_b.reshape(*batch, rank, -1)
    defects = [jnp.square(v @ v.mT - jnp.eye(rank, dtype=v.dtype)).sum((-1, -2)) for v in vectors]
    return (defects[0] + defects[1]).mean(tuple(range(n)))
