"""MiSS: the rows of a kernel, in runs of r, share one update of r rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.factored import Factored, low_rank
from jlora.interpret.manual import check_size, check_whole, spread
from jlora.interpret.quantised import codes_of
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, sizes_of, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


class _Form(Form):
    """M, or with PEFT's ``init_weights="mini"`` its first columns, of which the others are copies."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        block, mini = fields["miss_block"], spec.options["mini"]
        if mini is None:
            return {"miss_block": block}
        if block.shape[1] != mini:
            raise ValueError(f"peft.load: MiSS has a block of {block.shape}, but mini_r is {mini}")
        return {"miss_mini": block}

    def write(self, fields: dict[str, np.ndarray], node: Any) -> dict[str, np.ndarray]:
        return {"miss_block": next(iter(fields.values()))}

    def sizes(self, tensors: Any) -> tuple[int | None, int | None]:
        return None, None  # the block's columns are the outputs, or fewer

    def settings_of(self, node: Any) -> dict[str, Any]:
        form = {"init_weights": True} if node.mini is None else {"init_weights": "mini", "mini_r": node.mini}
        return {"r": node.block.shape[-2], "miss_dropout": node.dropout, **form}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MissParam(AdaptedParam):
    """``W + M'``, where row i of M' is row ``i mod r`` of a trained M of r rows; in axes flattened.

    It is computed as a low-rank update whose A is r rows of the identity again and again: the FLOPs are those of LoRA.
    With the option ``mini`` n, M has n columns, which the outputs repeat, as PEFT's ``init_weights="mini"``.

    Args:
      base, axes, dropout, layers: as in `jlora.LoraParam`.
      miss_block: M, of shape (batch..., r, out...), trained; zero at the start. With ``mini`` ().
      miss_mini: with ``mini`` M, of shape (batch..., r, n), trained; otherwise ().

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="miss", rank=2))["kernel"]
      >>> node.miss_block.shape
      (2, 3)

    References:
      Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure",
      arXiv:2409.15371.
    """

    SETTINGS = ("rank", "dropout")
    OPTIONS = {"mini": None}
    LINEAR = ("miss_block", "miss_mini")
    FORM = _Form(
        "MISS", {"miss_block": "miss_block: shards out"}, {"r": ("rank", 64), "miss_dropout": ("dropout", 0.0)},
        bias="MiSS_only", orders_outputs=True,
    )  # fmt: skip

    base: Any = frozen()
    axes: Axes = static()
    miss_block: Any = trained("batch shards out", default=())
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)
    miss_mini: Any = trained("batch shards columns", default=())

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> MissParam:
        del key
        rank, mini, given = kernel.spec.rank, kernel.option("mini"), {"dropout": kernel.spec.dropout, **kernel.place}
        if rank > kernel.size("in"):
            kernel.refuse("rank", f"it is at most the number of inputs, {kernel.size('in')}", rank)
        if mini is None:
            return cls(base, miss_block=jnp.zeros(kernel.sizes("batch shards out", shards=rank), kernel.dtype), **given)
        if type(mini) is not int or mini < 1 or kernel.size("out") % mini:
            kernel.refuse("options['mini']", f"it divides the number of outputs, {kernel.size('out')}", mini)
        zeros = jnp.zeros(kernel.sizes("batch shards columns", shards=rank, columns=mini), kernel.dtype)
        return cls(base, miss_mini=zeros, **given)

    @property
    def mini(self) -> int | None:
        """n; None: M has a column for each output."""
        return None if isinstance(self.miss_mini, tuple) else self.miss_mini.shape[-1]

    @property
    def block(self) -> Any:
        """M as it is stored."""
        return self.miss_block if self.mini is None else self.miss_mini

    @property
    def settings(self) -> dict[str, Any]:
        rank = self.block.shape[len(self.axes.batch_axis)]
        return super().settings | {"rank": rank} | ({} if self.mini is None else {"options": {"mini": self.mini}})

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        block, n = self.block, len(self.axes.batch_axis)
        rank, ins, outs = block.shape[n], sizes_of(self, "in"), sizes_of(self, "out")
        if self.mini is not None:
            check_size(name, "MiSS's block", int(np.prod(outs)) // self.mini * self.mini, int(np.prod(outs)))
            block = jnp.tile(block, int(np.prod(outs)) // self.mini).reshape(*block.shape[: n + 1], *outs)
        if np.prod(ins) % rank:  # then the rows of a shard do not tell which of M's they have
            check_whole(name, "MiSS's rows", codes_of(self.base))
        shared = jnp.asarray(np.eye(rank)[np.arange(np.prod(ins)) % rank].reshape(*ins, rank), block.dtype)
        shared = spread(shared, codes_of(self.base), block)
        factors = self.laid(shared, "in rank"), self.laid(block, "batch rank out")
        return low_rank(self.base, *factors, key=key if self.dropout else None, name=name, dropout=self.dropout)
