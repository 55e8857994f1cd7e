"""LoRA itself: two low-rank factors beside a frozen kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret.factored import Factored, low_rank
from jlora.nodes.axes import Axes
from jlora.nodes.fields import PAIR, frozen, static, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoraParam(AdaptedParam):
    """A kernel W with low-rank factors: stands for ``W + scale * A @ B``.

    Where the factors start from parts of W (PiSSA, OLoRA and their like) it stands for
    ``W + scale * (A @ B - A_0 @ B_0)``: W itself stays whole.

    Args:
      base: W, frozen.
      lora_a: A, of shape (batch..., in..., r), trained.
      lora_b: B, of shape (batch..., r, out...), trained.
      axes: which axes of W are in, out and batch.
      scale: the scale s.
      dropout: rate of the dropout on A's input.
      layers: which of the layers stacked on the first batch axis are adapted; None: all. The factors have these alone.
      start: (A_0, B_0), frozen, or () where their product is zero.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2, alpha=4))["kernel"]
      >>> type(node).__name__, node.lora_a.shape, node.lora_b.shape, node.scale
      ('LoraParam', (4, 2), (2, 3), 2.0)

    References:
      Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
    """

    LINEAR = ("lora_b", "start.1")

    base: Any = frozen()
    lora_a: Any = trained("batch in rank")
    lora_b: Any = trained("batch rank out")
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)
    start: tuple[Any, ...] = frozen(PAIR, default=())

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> LoraParam:
        return cls(base, **kernel.low_rank(base, key), **kernel.settings)

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.lora_a.shape[-1]

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        return low_rank_of(self, name, key)


def low_rank_of(node: Any, name: str, key: jax.Array | None) -> Factored:
    """The low-rank factors of a node that has the fields of a `LoraParam`, beside its base."""
    lora_a, lora_b = from_start(node)
    factors = node.laid(lora_a, "batch in rank"), node.laid(lora_b, "batch rank out")
    key = key if node.dropout else None
    return low_rank(node.base, *factors, key=key, name=name, scale=node.scale, dropout=node.dropout)


def from_start(node: Any) -> tuple[jax.Array, jax.Array]:
    """The factors of A B - A_0 B_0 as (A - A_0) B + A_0 (B - B_0): small numbers, and zero at the start."""
    if not node.start:
        return node.lora_a, node.lora_b
    start_a, start_b = node.start
    lora_a = jnp.concatenate([node.lora_a - start_a, start_a], axis=-1)
    return lora_a, jnp.concatenate([node.lora_b, node.lora_b - start_b], axis=len(node.axes.batch_axis))
