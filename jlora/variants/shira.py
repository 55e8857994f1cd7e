"""SHiRA: a few entries of the kernel train."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.products import wide
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, mapped, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.variants.dense import drawn, scattered, size_of, whole_size, with_matrix


class _Form(Form):
    """The values, and their places as whole numbers."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        places = fields["shira_places"]
        if (places != np.rint(places)).any() or places.shape != (2, len(fields["shira_weight"])):
            raise ValueError(f"peft.load: SHiRA's {places.shape} are no places of {len(fields['shira_weight'])} values")
        return fields

    def node(self, cls: Any, fields: Mapping[str, Any], kernel: Any) -> Any:
        most = np.array(size_of(kernel))[:, None]
        if (fields["shira_places"] < 0).any() or (fields["shira_places"] >= most).any():
            raise ValueError(
                f"peft.load: SHiRA has values for places that {kernel.path} has not, {most[:, 0].tolist()}"
            )
        return super().node(cls, fields, kernel)

    def write(self, fields: dict[str, np.ndarray], node: Any) -> dict[str, np.ndarray]:
        return {**fields, "shira_places": fields["shira_places"].astype(np.int32)}

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        return None, None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ShiraParam(AdaptedParam):
    """``W + S`` with a sparse S: r * (in + out) entries at places that are drawn once, as many numbers as LoRA has.

    A step computes the kernel and its whole gradient, at the cost of a merged kernel. With the option ``seed`` the
    places are those that PEFT draws with this ``random_seed``, the same for all layers.

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      shira_weight: the entries, of shape (batch..., r * (in + out)), trained; zero at the start.
      shira_places: for each the number of the output and of the input, axes flattened, of shape (batch..., 2,
        r * (in + out)): whole numbers in float32, since `jax.grad` takes no tree with integers.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((8, 8))}, jlora.LoraSpec(variant="shira", rank=2))["kernel"]
      >>> node.shira_weight.shape, node.shira_places.shape
      ((32,), (2, 32))

    References:
      Bhardwaj et al., "Sparse High Rank Adapters", arXiv:2406.13175.
    """

    KINDS = ("dot",)
    SETTINGS = ("rank",)
    OPTIONS = {"seed": None}
    LINEAR = ("shira_weight",)
    FORM = _Form(
        "SHIRA", {"shira_weight": "shira_weight: places", "shira_indices": "shira_places: pair places"},
        {"r": ("rank", 32)}, orders_outputs=True, integers=("shira_indices",),
    )  # fmt: skip

    base: Any = frozen()
    shira_weight: Any = trained("batch places")
    shira_places: Any = frozen("batch pair places")
    axes: Axes = static()
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> ShiraParam:
        shape, rank, seed = size_of(kernel), kernel.spec.rank, kernel.option("seed")
        count, most = rank * sum(shape), shape[0] * shape[1]
        if count > most:
            kernel.refuse("rank", f"the kernel has {most} entries, of which {count} would train", rank)
        if seed is not None and type(seed) is not int:
            kernel.refuse("options['seed']", "it is an integer, or None", seed)
        if seed is None:
            draw = lambda key: jnp.sort(jax.random.choice(key, most, (count,), replace=False))
            places = mapped(kernel, lambda key: jnp.stack(jnp.divmod(draw(key), shape[1])), kernel.keys(key))
        else:
            found = drawn(seed, shape, count)
            places = found[:, np.lexsort(found[::-1])]
        sizes = kernel.sizes("batch pair places", pair=2, places=count)
        weight = jnp.zeros(kernel.sizes("batch places", places=count), kernel.dtype)
        return cls(base, weight, jnp.broadcast_to(jnp.asarray(places, jnp.float32), sizes), **kernel.place)

    @property
    def settings(self) -> dict[str, Any]:
        return {"rank": self.shira_weight.shape[-1] // sum(size_of(self))}

    def effective(self, name: str, key: jax.Array | None) -> jax.Array:
        del key
        shape = whole_size(self, name, "SHiRA's places")
        values = self.shira_weight.astype(wide(self.shira_weight.dtype))
        return with_matrix(self, scattered(values, self.shira_places.astype(jnp.int32), shape))
