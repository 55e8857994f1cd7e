"""C3A: the update is made of circulant blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.manual import check_size
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, sizes_of, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.variants.dense import added


class _Form(Form):
    """The first entries of the blocks, by outputs and inputs."""

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        outer, inner, size = tensors["c3a_kernel"].shape
        return inner * size, outer * size

    def settings_of(self, node: Any) -> dict[str, Any]:
        return {"block_size": node.c3a_kernel.shape[-1], "init_weights": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class C3aParam(AdaptedParam):
    """``W + C / in`` with a block-circulant C: ``C[i, o] = c[(i - o) mod b]`` within each block, axes flattened.

    An update of full rank from ``in * out / b`` numbers. It has no small factors: a step computes the kernel and its
    whole gradient, at the cost of a merged kernel. ``block_size`` b is by default the largest up to 256 that divides
    inputs and outputs. It starts as zero; PEFT draws it unless ``init_weights`` is true.

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      c3a_kernel: c, of shape (batch..., out / b, in / b, b), trained; zero at the start.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> spec = jlora.LoraSpec(variant="c3a", options={"block_size": 2})
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 6))}, spec)["kernel"]
      >>> node.c3a_kernel.shape
      (3, 2, 2)

    References:
      Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv:2407.19342.
    """

    KINDS = ("dot",)
    SETTINGS = ()
    OPTIONS = {"block_size": None}
    LINEAR = ("c3a_kernel",)
    FORM = _Form(
        "C3A", {"c3a_kernel": "c3a_kernel: outer inner size"}, {"block_size": ("options.block_size", 256)},
        {"block_size": "block_size_pattern"}, orders_outputs=True, bias="c3a_only",
    )  # fmt: skip

    base: Any = frozen()
    c3a_kernel: Any = trained("batch outer inner size")
    axes: Axes = static()
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> C3aParam:
        del key
        common, size = math.gcd(kernel.size("in"), kernel.size("out")), kernel.option("block_size")
        size = max(n for n in range(1, 257) if common % n == 0) if size is None else size
        if type(size) is not int or size < 1 or common % size:
            kernel.refuse("options['block_size']", f"it divides {common}, as inputs and outputs do", size)
        counts = {"outer": kernel.size("out") // size, "inner": kernel.size("in") // size, "size": size}
        return cls(base, jnp.zeros(kernel.sizes("batch outer inner size", **counts), kernel.dtype), **kernel.place)

    @property
    def settings(self) -> dict[str, Any]:
        return {"options": {"block_size": self.c3a_kernel.shape[-1]}}

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del key
        *batch, outer, inner, size = self.c3a_kernel.shape
        ins, outs = sizes_of(self, "in"), sizes_of(self, "out")
        check_size(name, "the circulant blocks", outer * inner * size**2, math.prod((*ins, *outs)))
        place = np.arange(size)
        blocks = self.c3a_kernel[..., (place[:, None] - place) % size] / math.prod(ins)
        whole = jnp.moveaxis(blocks, -4, -2)  # the inputs of a block behind its own place, and its outputs
        return added(self, whole.reshape(*batch, *ins, *outs))
