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
      rank: the rank r.
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
    """A kernel to adapt, and what the spec says of it: `jlora.wrap` hands it to the ``create`` of a variant.

    Args:
      path: of the leaf, such as ``"encoder/query/kernel"``.
      shape: of the leaf.
      axes: which of them are in, out and batch.
      kind: ``"dot"``, ``"embedding"``, ``"conv"`` or ``"ragged_dot"``.
      spec: the settings of its variant, the overrides for this path put in: ``rank``, ``scale``, ``dropout``, ``init``,
        ``dtype`` and ``options``.
      layers: which of the layers stacked on the first batch axis are adapted; None: all.

    Example:
      >>> from jlora.nodes.kernel import KernelSpec
      >>> from jlora.variants import Axes, Kernel
      >>> kernel = Kernel("kernel", (4, 3), Axes((0,), (1,)), "dot", KernelSpec(rank=2, scale=1.0))
      >>> kernel.sizes("batch in rank", rank=kernel.spec.rank)
      (4, 2)
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes
    kind: str
    spec: KernelSpec
    layers: tuple[int, ...] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The static fields of a node with low-rank factors, by name.

        They are ``axes``, ``layers``, ``scale`` and ``dropout``.
        """
        return {**self.place, "scale": self.spec.scale, "dropout": self.spec.dropout}

    @property
    def place(self) -> dict[str, Any]:
        """The static fields of every node, by name.

        They are ``axes`` and ``layers``.
        """
        return {"axes": self.axes, "layers": self.layers}

    @property
    def dtype(self) -> Any:
        """The type of the arrays that train."""
        return self.spec.dtype

    def option(self, name: str) -> Any:
        """A setting of the variant's own.

        Args:
          name: one of the class's ``OPTIONS``.

        Returns:
          What ``LoraSpec(options=...)`` gives it, or its default.

        Raises:
          KeyError: if the class has no such option.

        Example:
          >>> from jlora.nodes.kernel import KernelSpec
          >>> from jlora.variants import Axes, Kernel
          >>> spec = KernelSpec(rank=2, scale=1.0, options={"factor": 8})
          >>> Kernel("kernel", (4, 3), Axes((0,), (1,)), "dot", spec).option("factor")
          8
        """
        return self.spec.options[name]

    def sizes(self, dims: str, **own: int) -> tuple[int, ...]:
        """The shape of a field beside this kernel.

        Args:
          dims: its axes by name, as in `jlora.variants.trained`.
          **own: the sizes of the words that are no axes of the kernel, such as ``rank=2``.

        Returns:
          The shape. Where some layers of a stack are adapted, the first batch axis has these alone.

        Raises:
          TypeError: if a word has no size.

        Example:
          >>> from jlora.nodes.kernel import KernelSpec
          >>> from jlora.variants import Axes, Kernel
          >>> of = KernelSpec(rank=2, scale=1.0)
          >>> kernel = Kernel("kernel", (12, 4, 3), Axes((1,), (2,), (0,)), "dot", of, layers=(0, 1))
          >>> kernel.sizes("batch rank out", rank=2)
          (2, 2, 3)
        """
        if missing := [word for word in dims.split() if word not in GROUPS and word not in own]:
            raise TypeError(
                f"Kernel.sizes({dims!r}) needs the size of {missing[0]}, as in {missing[0]}=kernel.spec.rank"
            )
        return sizes_of(self, dims, own)

    def size(self, word: str) -> int:
        """The number of elements of the ``batch``, ``in`` or ``out`` axes together.

        Args:
          word: ``"batch"``, ``"in"`` or ``"out"``.

        Returns:
          The product of their sizes; 1 where there are none.

        Raises:
          TypeError: if it is another word.

        Example:
          >>> from jlora.nodes.kernel import KernelSpec
          >>> from jlora.variants import Axes, Kernel
          >>> query = Kernel("query", (8, 2, 4), Axes((0,), (1, 2)), "dot", KernelSpec(rank=2, scale=1.0))
          >>> query.size("in"), query.size("out"), query.size("batch")
          (8, 8, 1)
        """
        return math.prod(self.sizes(word))

    def keys(self, key: jax.Array) -> jax.Array:
        """A PRNG key for each place of the batch axes; a layer's is the same whichever layers are adapted.

        Args:
          key: a PRNG key.

        Returns:
          Keys of shape (batch...), those of the adapted layers; `key` itself where there are no batch axes.

        Example:
          >>> import jax
          >>> from jlora.nodes.kernel import KernelSpec
          >>> from jlora.variants import Axes, Kernel
          >>> of = KernelSpec(rank=2, scale=1.0)
          >>> kernel = Kernel("kernel", (12, 4, 3), Axes((1,), (2,), (0,)), "dot", of, layers=(0, 1))
          >>> kernel.keys(jax.random.key(0)).shape
          (2,)
        """
        batch = tuple(self.shape[axis] for axis in self.axes.batch_axis)
        if not batch:
            return key
        keys = jax.random.split(key, batch)
        return keys if self.layers is None else keys[jnp.asarray(self.layers)]

    def normal(self, key: jax.Array, dims: str, std: float = 1.0, **own: int) -> jax.Array:
        """Normal noise for a field beside this kernel, with a key of its own for each place of the batch axes.

        Args:
          key: a PRNG key.
          dims: the field's axes by name, which begin with ``batch``.
          std: the standard deviation.
          **own: as in `sizes`.

        Returns:
          An array of the shape that `sizes` gives, in the kernel's `dtype`.

        Raises:
          TypeError: if a word has no size.

        Example:
          >>> import jax
          >>> from jlora.nodes.kernel import KernelSpec
          >>> from jlora.variants import Axes, Kernel
          >>> kernel = Kernel("kernel", (12, 4, 3), Axes((1,), (2,), (0,)), "dot", KernelSpec(rank=2, scale=1.0))
          >>> kernel.normal(jax.random.key(0), "batch in rank", std=0.02, rank=2).shape
          (12, 4, 2)
        """
        shape = self.sizes(dims, **own)[len(self.axes.batch_axis) :]
        return mapped(self, lambda key: std * jax.random.normal(key, shape, self.dtype), self.keys(key))

    def matrix(self, base: Any) -> jax.Array:
        """The kernel as matrices, with in axes and out axes flattened.

        Args:
          base: the leaf, which may be quantised.

        Returns:
          An array of shape (batch..., in, out) in float32, of the adapted layers.

        Example:
          >>> import jax.numpy as jnp
          >>> from jlora.nodes.kernel import KernelSpec
          >>> from jlora.variants import Axes, Kernel
          >>> query = Kernel("query", (8, 2, 4), Axes((0,), (1, 2)), "dot", KernelSpec(rank=2, scale=1.0))
          >>> query.matrix(jnp.ones((8, 2, 4))).shape
          (8, 8)
        """
        return matrices(self, jnp.asarray(dense(base)))

    def low_rank(self, base: Any, key: jax.Array) -> dict[str, Any]:
        """The factors that the spec's ``init`` makes.

        Args:
          base: the leaf; it is looked at where the factors are parts of it.
          key: a PRNG key.

        Returns:
          By name: ``lora_a`` of shape (batch..., in..., rank), ``lora_b`` of shape (batch..., rank, out...), and
          ``start`` with a copy of both where they are parts of the kernel (PiSSA and its like).

        Raises:
          ValueError: if a function given as ``init`` returns other shapes, or the scale is not positive where it
            divides.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from jlora.nodes.kernel import KernelSpec
          >>> from jlora.variants import Axes, Kernel
          >>> kernel = Kernel("kernel", (4, 3), Axes((0,), (1,)), "dot", KernelSpec(rank=2, scale=1.0))
          >>> factors = kernel.low_rank(jnp.ones((4, 3)), jax.random.key(0))
          >>> factors["lora_a"].shape, factors["lora_b"].shape
          ((4, 2), (2, 3))
        """
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
        """Raises the error of a setting that does not fit this kernel.

        Args:
          setting: its name.
          expected: what would fit.
          found: its value.

        Raises:
          ValueError: always; it names the kernel, and says how to set it for this kernel alone.

        Example:
          >>> from jlora.nodes.kernel import KernelSpec
          >>> from jlora.variants import Axes, Kernel
          >>> kernel = Kernel("kernel", (4, 3), Axes((0,), (1,)), "dot", KernelSpec(rank=2, scale=1.0))
          >>> kernel.refuse("options['size']", "it divides 4", 3)
          Traceback (most recent call last):
          ValueError: wrap: options['size']=3 does not fit kernel of shape (4, 3): it divides 4. Set it for this ...
        """
        raise ValueError(
            f"wrap: {setting}={found!r} does not fit {self.path} of shape {self.shape}: {expected}. Set it for this "
            f"kernel with overrides={{{self.path!r}: {{...}}}}, or exclude it"
        )
