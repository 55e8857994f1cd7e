"""IA3: the kernel's outputs, or its inputs, are scaled by a trained vector."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.factored import Factored, gained, plain
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


class _Form(Form):
    """A module of ``feedforward_modules`` scales its inputs. The vector lies along an axis of the weight's."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        x = fields["ia3_l"]
        if x.ndim > 2 and spec.options["on"] == "in":
            raise ValueError(
                "peft.load: IA3 of a convolution's inputs (feedforward_modules) has one number for a channel, "
                "whatever the place in the window, which is not read; merge the adapter in PEFT"
            )
        return {"ia3_l": x.reshape(-1)}

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        shape = tensors["ia3_l"].shape
        return (shape[1], None) if len(shape) == 2 and shape[0] == 1 < shape[1] else (None, math.prod(shape))

    def gain_of_bias(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray | None:
        ins, _ = self.sizes(tensors)
        return tensors["ia3_l"].reshape(-1) if ins is None else None

    def class_of(self, cls: Any, spec: Any) -> Any:
        return Ia3InParam if spec.options["on"] == "in" else cls

    def write(self, fields: dict[str, np.ndarray], node: Any) -> dict[str, np.ndarray]:
        ends = [1] * (len(node.axes.in_axis) - 1)  # of a convolution
        is_column = isinstance(node, Ia3Param) and not ends
        return {"ia3_l": fields["ia3_l"].reshape([-1, 1] if is_column else [1, -1, *ends])}

    def settings_of(self, node: Any) -> dict[str, Any]:
        return {"feedforward_modules": isinstance(node, Ia3InParam)}


_FORM = _Form("IA3", {"ia3_l": "ia3_l"}, listed=("feedforward_modules",), kinds=("linear", "conv"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Ia3Param(AdaptedParam):
    """``W * l`` with a trained vector over the out axes.

    A bias beside the kernel is not scaled, as PEFT's output scaling does. With the option ``on="in"`` (PEFT's
    ``feedforward_modules``) it is an `Ia3InParam`; `overrides` set it by kernel.

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      ia3_l: l, of shape (batch..., out...), trained; one at the start.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="ia3"))["kernel"]
      >>> node.ia3_l
      Array([1., 1., 1.], dtype=float32)

    References:
      Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
      arXiv:2205.05638.
    """

    SETTINGS = ()
    OPTIONS = {"on": "out"}
    FORM = _FORM

    base: Any = frozen()
    ia3_l: Any = trained("batch out")
    axes: Axes = static()
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> Any:
        del key
        on = kernel.option("on")
        if on not in ("out", "in"):
            kernel.refuse("options['on']", "it is 'out' or 'in'", on)
        ones = jnp.ones(kernel.sizes(f"batch {on}"), kernel.dtype)
        return (cls if on == "out" else Ia3InParam)(base, ones, **kernel.place)

    def identity(self) -> Ia3Param:
        return dataclasses.replace(self, ia3_l=jnp.ones_like(self.ia3_l))

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        del key
        return gained(plain(self.base, name=name), self.beside(self.ia3_l, "batch out", fill=1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Ia3InParam(AdaptedParam):
    """``W * l`` with a trained vector over the in axes, of shape (batch..., in...); made by `Ia3Param`."""

    FORM = _FORM

    base: Any = frozen()
    ia3_l: Any = trained("batch in")
    axes: Axes = static()
    layers: tuple[int, ...] | None = static(default=None)

    @property
    def settings(self) -> dict[str, Any]:
        return {"variant": Ia3Param, "options": {"on": "in"}}

    def identity(self) -> Ia3InParam:
        return dataclasses.replace(self, ia3_l=jnp.ones_like(self.ia3_l))

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        del key
        return gained(plain(self.base, name=name), self.beside(self.ia3_l, "batch in", fill=1))
