"""RoAd: pairs of the kernel's outputs are rotated and scaled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.factored import Factored, plain, turned_by
from jlora.interpret.manual import check_size
from jlora.interpret.products import wide
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam

_KINDS = {"road_1": 1, "road_2": 2, "road_4": 4}  # angles for a pair


class _Form(Form):
    """The angles and the scales, pair by pair. PEFT turns the bias beside the kernel too, which is refused."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        angles = fields["road_theta"].shape
        if fields["road_alpha"].shape != angles:
            raise ValueError(f"peft.load: RoAd has {angles} angles, and {fields['road_alpha'].shape} scales")
        return {**fields, "group_size": spec.options["group_size"], "kind": spec.options["kind"]}

    def node(self, cls: Any, fields: Mapping[str, Any], kernel: Any) -> Any:
        _check(kernel, fields["group_size"])
        found, angles = fields["road_theta"].shape[-1], kernel.size("out") // 2 * _KINDS[kernel.option("kind")]
        if found != angles:
            raise ValueError(f"peft.load: {kernel.path} has {found} angles of RoAd; by the settings there are {angles}")
        return super().node(cls, fields, kernel)

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        return None, None

    def settings_of(self, node: Any) -> dict[str, Any]:
        return {"variant": node.kind, "group_size": node.group_size}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RoadParam(AdaptedParam):
    """``W R`` with R made of scaled rotations of pairs of outputs, ``alpha [[cos t, -sin t], [sin t, cos t]]``.

    The last of the out axes is parted into groups of ``group_size``, by default the largest up to 64 that fits, and the
    first half of each is paired with the second. By the option ``kind`` a pair has one angle and one scale
    (``"road_1"``), each of its outputs has its own (``"road_2"``), or each entry of R has (``"road_4"``).

    A bias beside the kernel is as it was. PEFT turns it too: its files are taken where there is none.

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      road_theta: the angles, of shape (batch..., out / 2 times 1, 2 or 4), trained; zero at the start.
      road_alpha: the scales, of the same shape, trained; one at the start.
      group_size, kind: the options.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> spec = jlora.LoraSpec(variant="road", options={"group_size": 4})
      >>> node = jlora.wrap({"kernel": jnp.ones((3, 8))}, spec)["kernel"]
      >>> node.road_theta.shape, node.road_alpha
      ((4,), Array([1., 1., 1., 1.], dtype=float32))

    References:
      Liao and Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability",
      arXiv:2409.00119.
    """

    KINDS = ("dot", "conv")
    SETTINGS = ()
    OPTIONS = {"kind": "road_1", "group_size": None}
    FORM = _Form(
        "ROAD", {"road_theta": "road_theta: angles", "road_alpha": "road_alpha: angles"},
        {"variant": ("options.kind", "road_1"), "group_size": ("options.group_size", 64)},
        orders_outputs=True, turns_bias=True,
    )  # fmt: skip

    base: Any = frozen()
    road_theta: Any = trained("batch angles")
    road_alpha: Any = trained("batch angles")
    axes: Axes = static()
    group_size: int = static()
    kind: str = static(default="road_1")
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> RoadParam:
        del key
        kind, given, last = kernel.option("kind"), kernel.option("group_size"), kernel.shape[kernel.axes.out_axis[-1]]
        if kind not in _KINDS:
            kernel.refuse("options['kind']", f"it is one of {', '.join(_KINDS)}", kind)
        size: Any = max((n for n in range(2, 65, 2) if last % n == 0), default=None) if given is None else given
        _check(kernel, size)
        ones = jnp.ones(kernel.sizes("batch angles", angles=kernel.size("out") // 2 * _KINDS[kind]), kernel.dtype)
        return cls(base, jnp.zeros_like(ones), ones, group_size=size, kind=kind, **kernel.place)

    @property
    def settings(self) -> dict[str, Any]:
        return {"options": {"kind": self.kind, "group_size": self.group_size}}

    def identity(self) -> RoadParam:
        theta, alpha = jnp.zeros_like(self.road_theta), jnp.ones_like(self.road_alpha)
        return dataclasses.replace(self, road_theta=theta, road_alpha=alpha)

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        del key
        batch, outs, half = self.axes.batch_axis, self.axes.out_axis, self.group_size // 2
        sizes = [self.shape[axis] for axis in (*batch, *outs)]
        count = math.prod(sizes[len(batch) :])
        check_size(name, "RoAd", self.road_theta.shape[-1], count // 2 * _KINDS[self.kind])
        theta, alpha = (
            _entries(self.everywhere(x, fill).astype(wide(x.dtype)), count, half)
            for x, fill in ((self.road_theta, 0), (self.road_alpha, 1))
        )
        # Of an output in the first half of its group the pair's other enters with a minus.
        own, other = alpha[0] * jnp.cos(theta[0]), alpha[1] * jnp.sin(theta[1])
        first = jnp.stack([own[..., 0, :], -other[..., 0, :]], -1)
        second = jnp.stack([other[..., 1, :], own[..., 1, :]], -1)
        rows = jnp.stack([first, second], -3).reshape(*sizes, 2)
        return turned_by(plain(self.base, name=name), outs[-1], [self.placed(rows, (*batch, *outs, "size"))], [half])


def _entries(x: jax.Array, count: int, half: int) -> tuple[jax.Array, jax.Array]:
    """For each output, (..., groups, 2, half), what its own entry of R has and what the other's has."""
    stack, groups, each = x.shape[:-1], count // (2 * half), 2 * x.shape[-1] // count
    if each == 4:
        both = x.reshape(*stack, groups, 2, 2, half)
        return both[..., 0, :, :], both[..., 1, :, :]
    of_each = jnp.broadcast_to(x.reshape(*stack, groups, each, half), (*stack, groups, 2, half))
    return of_each, of_each


def _check(kernel: Kernel, size: Any) -> None:
    """Refuses groups that do not part the last of the out axes."""
    last = kernel.shape[kernel.axes.out_axis[-1]]
    if type(size) is not int or size < 2 or size % 2 or last % size:
        kernel.refuse("options['group_size']", f"it is even, and divides the last out axis, {last}", size)
