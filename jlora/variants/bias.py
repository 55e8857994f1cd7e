"""Biases beside adapted kernels: one that is trained as a difference, and one that is scaled as the kernel is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora.interpret.products import wide
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoraBiasParam(AdaptedParam):
    """``bias + scale * lora_bias``: PEFT's ``lora_bias``, the bias of B, with the scale of the kernel beside it.

    Args:
      base: the layer's bias, frozen.
      lora_bias: of its shape, trained; zero at the start.
      scale: that of the kernel's update.
    """

    LINEAR = ("lora_bias",)

    base: Any = frozen()
    lora_bias: Any = trained()
    scale: float = static(default=1.0)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array | None = None) -> LoraBiasParam:
        del key
        return cls(base, jnp.zeros(base.shape, kernel.dtype), kernel.spec.scale)

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del name, key
        sums = wide(self.base.dtype)
        return (self.base.astype(sums) + self.scale * self.lora_bias.astype(sums)).astype(self.base.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class GainedBiasParam(AdaptedParam):
    """``bias * gain``: the bias beside a kernel whose outputs are scaled, as PEFT's IA3 scales the two together.

    Here the two gains train apart; `jlora.peft.save` writes such an adapter as long as they are the same.

    Args:
      base: the layer's bias, frozen.
      gain: of its shape, trained.
    """

    base: Any = frozen()
    gain: Any = trained()

    def identity(self) -> GainedBiasParam:
        return dataclasses.replace(self, gain=jnp.ones_like(self.gain))

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del name, key
        sums = wide(self.base.dtype)
        return (self.base.astype(sums) * self.gain.astype(sums)).astype(self.base.dtype)
