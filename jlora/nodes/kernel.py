"""What a variant is told of the kernel that it adapts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.factors.random import RANDOM, embedding
from jlora.factors.spectral import spectral
from jlora.nodes.axes import Axes
from jlora.nodes.fields import GROUPS, mapped, matrices, sizes_of
from jlora.nodes.qarray import dense


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """What a spec says of one kernel.

    Args:
      rank: r.
      scale: the factor s of the update.
      dropout: rate of the dropout on the low-rank path's input.
      init: a name, or a function, as of `jlora.LoraSpec`.
      dtype: of the trained arrays.
      options: all settings of the variant's own, those that were not given with their defaults.
    """

    rank: int
    scale: float
    dropout: float = 0.0
    init: str | Callable = "kaiming"
    dtype: Any = jnp.dtype(jnp.float32)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel to adapt, and what the spec says of it.

    Args:
      path: of the leaf.
      shape: of the leaf.
      axes: which of them are in, out and batch.
      kind: ``"dot"``, ``"embedding"``, ``"conv"`` or ``"ragged_dot"``.
      spec: the settings of its variant, the overrides for this path put in.
      layers: which of the layers stacked on the first batch axis are adapted; None: all.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    kind: str
    spec: KernelSpec
    layers: tuple[int, ...] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The static fields of a node with low-rank factors."""
        return {**self.place, "scale": self.spec.scale, "dropout": self.spec.dropout}

    @property
    def place(self) -> dict[str, Any]:
        """The static fields of every node."""
        return {"axes": self.axes, "layers": self.layers}

    @property
    def dtype(self) -> Any:
        """Of the trained arrays."""
        return self.spec.dtype

    def option(self, name: str) -> Any:
        """A setting of the variant's own."""
        return self.spec.options[name]

    def sizes(self, dims: str, **own: int) -> tuple[int, ...]:
        """The shape of a field; `own` has the sizes of the words that are no axes of the kernel."""
        if missing := [word for word in dims.split() if word not in GROUPS and word not in own]:
            raise TypeError(
                f"Kernel.sizes({dims!r}) needs the size of {missing[0]}, as in {missing[0]}=kernel.spec.rank"
            )
        return sizes_of(self, dims, own)

    def size(self, word: str) -> int:
        """The number of elements of the ``batch``, ``in`` or ``out`` axes."""
        return math.prod(self.sizes(word))

    def keys(self, key: jax.Array) -> jax.Array:
        """A key for each place of the batch axes, of shape (batch...): a layer's is the same whichever are adapted."""
        batch = tuple(self.shape[axis] for axis in self.axes.batch_axis)
        if not batch:
            return key
        keys = jax.random.split(key, batch)
        return keys if self.layers is None else keys[jnp.asarray(self.layers)]

    def normal(self, key: jax.Array, dims: str, std: float = 1.0, **own: int) -> jax.Array:
        """Normal noise of shape `dims`, which begins with ``batch``."""
        shape = self.sizes(dims, **own)[len(self.axes.batch_axis) :]
        return mapped(self, lambda key: std * jax.random.normal(key, shape, self.dtype), self.keys(key))

    def matrix(self, base: Any) -> jax.Array:
        """The kernel as matrices: of shape (batch..., in, out), with in axes and out axes flattened, in float32."""
        return matrices(self, jnp.asarray(dense(base)))

    def low_rank(self, base: Any, key: jax.Array) -> dict[str, Any]:
        """The factors that the spec's `init` makes: lora_a and lora_b, and start where they are parts of W."""
        if make := spectral(self.spec.init):
            if self.spec.scale <= 0:
                self.refuse(
                    "scaling", f"init={self.spec.init!r} divides by the scale, which must be positive", self.spec.scale
                )
            pair = lambda matrix, key: self._shaped(*make(matrix, self.spec.rank, self.spec.scale, key))
            lora_a, lora_b = mapped(self, pair, self.matrix(base), self.keys(key))
            return {"lora_a": lora_a, "lora_b": lora_b, "start": (jnp.copy(lora_a), jnp.copy(lora_b))}
        lora_a, lora_b = mapped(self, self._drawn, self.keys(key))
        return {"lora_a": lora_a, "lora_b": lora_b}

    def _drawn(self, key: jax.Array) -> tuple[Any, Any]:
        init = self.spec.init
        make = init if callable(init) else embedding if self.kind == "embedding" else RANDOM[init]
        ins, outs, rank = self.sizes("in"), self.sizes("out"), self.spec.rank
        lora_a, lora_b = make(key, ins, outs, rank, self.dtype)
        if lora_a.shape != (*ins, rank) or lora_b.shape != (rank, *outs):
            raise ValueError(
                f"wrap: init must return factors of shapes {(*ins, rank)} and {(rank, *outs)}, "
                f"found {lora_a.shape} and {lora_b.shape}"
            )
        return lora_a, lora_b

    def _shaped(self, lora_a: jax.Array, lora_b: jax.Array) -> tuple[jax.Array, jax.Array]:
        rank = self.spec.rank
        lora_a, lora_b = lora_a.reshape(*self.sizes("in"), rank), lora_b.reshape(rank, *self.sizes("out"))
        return lora_a.astype(self.dtype), lora_b.astype(self.dtype)

    def refuse(self, setting: str, expected: str, found: Any) -> None:
        """Raises the error of a setting that does not fit this kernel."""
        raise ValueError(
            f"wrap: {setting}={found!r} does not fit {self.path} of shape {self.shape}: {expected}. Set it for this "
            f"kernel with overrides={{{self.path!r}: {{...}}}}, or exclude it"
        )
