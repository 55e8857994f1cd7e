"""LoRA-FA: A stays as it was drawn, so that the kernel's input need not be kept for its gradient."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora.interpret.factored import Factored
from jlora.nodes.axes import Axes
from jlora.nodes.fields import PAIR, frozen, static, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.variants.lora import low_rank_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoraFaParam(AdaptedParam):
    """``W + scale * A @ B`` with A frozen, as it was drawn: B alone trains.

    Of a layer's input the backward pass then needs ``x @ A`` alone, of r numbers a token: less memory than LoRA takes.

    Args:
      base, axes, scale, dropout, layers, start: as in `jlora.LoraParam`.
      lora_a: A, of shape (batch..., in..., r), frozen.
      lora_b: B, of shape (batch..., r, out...), trained.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="lora_fa", rank=2))
      >>> [x.shape for x in jax.tree.leaves(jlora.partition(params)[0])]  # what trains
      [(2, 3)]

    References:
      Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
      arXiv:2308.03303.
    """

    LINEAR = ("lora_b", "start.1")

    base: Any = frozen()
    lora_a: Any = frozen("batch in rank")
    lora_b: Any = trained("batch rank out")
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)
    start: tuple[Any, ...] = frozen(PAIR, default=())

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> LoraFaParam:
        drawn = dataclasses.replace(kernel, kind="dot")  # an embedding's A would start, and stay, zero
        return cls(base, **drawn.low_rank(base, key), **kernel.settings)

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        if not self.start:
            return low_rank_of(self, name, key)
        moved = dataclasses.replace(self, lora_b=self.lora_b - self.start[1], start=())  # A is A_0 still
        return low_rank_of(moved, name, key)
