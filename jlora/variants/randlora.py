"""RandLoRA: a sum of many frozen random products, of which the scales train: an update of full rank."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.factored import Factored, low_rank
from jlora.interpret.manual import check_whole
from jlora.interpret.quantised import codes_of
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, sizes_of, static, trained
from jlora.nodes.form import Form, beginning
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.variants.dense import size_of


class _Form(Form):
    """The bases are those of PEFT's largest module; each takes the first of them."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        if not {"bases_a", "bases_b"} <= {*fields}:
            raise ValueError("peft.load: the file lacks RandLoRA's bases; save it in PEFT with save_projection=True")
        count, bases = fields["randlora_lambda"].shape[1], fields["bases_b"]
        if bases.shape[1] < count or fields["bases_a"].shape[0] != spec.rank:
            raise ValueError(f"peft.load: RandLoRA's bases are {bases.shape}, but {count} of rank {spec.rank} are used")
        return {**fields, "bases_b": bases[:, :count]}

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        return None, None

    def joined(
        self, shared: Sequence[Mapping[str, np.ndarray]], sizes: Sequence[tuple[int, int]]
    ) -> Mapping[str, np.ndarray]:
        """PEFT's sizes are those of a module with the most inputs and the most outputs that any has."""
        ends, rank = [max(of) for of in zip(*sizes, strict=True)], len(shared[0]["randlora_A"])
        shapes = {"randlora_A": (rank, 1, min(ends)), "randlora_B": (max(ends), -(-min(ends) // rank), rank)}
        made = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        for name, x in ((name, of[name]) for of in shared for name in made):
            beginning(made[name], x)[...] = beginning(x, made[name])
        return made

    def settings_of(self, node: Any) -> dict[str, Any]:
        alpha = super().settings_of(node)["randlora_alpha"]
        return {"r": node.bases_a.shape[0], "randlora_alpha": alpha, "randlora_dropout": node.dropout}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RandLoraParam(AdaptedParam):
    """``W + scale * sum_n B_n diag(d_n) A diag(g_n)``, with as many n as the smaller size of the kernel has of r.

    A and the B_n are frozen and the same for all kernels: each takes the first of what it needs. The update has full
    rank. It is computed through its factors, whose size is the kernel's: a step takes up to four times that of the
    frozen kernel. Of a kernel with more inputs than outputs it is A that lies at the outputs. The sum pairs the entries
    of d with those of B as PEFT does, which counts by r first for one and by n first for the other.

    Args:
      base, axes, scale, dropout, layers: as in `jlora.LoraParam`.
      bases_a: A, of shape (r, smaller), frozen.
      bases_b: all B_n, of shape (larger, n, r), frozen.
      randlora_lambda: d, of shape (batch..., r, n), trained; zero at the start.
      randlora_gamma: g, of shape (batch..., n, smaller), trained; one over its larger size at the start.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 6))}, jlora.LoraSpec(variant="randlora", rank=2))["kernel"]
      >>> node.bases_a.shape, node.bases_b.shape, node.randlora_lambda.shape, node.randlora_gamma.shape
      ((2, 4), (6, 2, 2), (2, 2), (2, 4))

    References:
      Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv:2502.00987.
    """

    KINDS = ("dot",)
    SETTINGS = ("rank", "alpha", "scaling", "dropout")
    OPTIONS = {"seed": 0}
    LINEAR = ("randlora_lambda",)
    FORM = _Form(
        "RANDLORA",
        {
            "randlora_lambda": "randlora_lambda: lines bases", "randlora_gamma": "randlora_gamma: bases least",
        },
        {"r": ("rank", 32), "randlora_alpha": ("alpha", 640), "randlora_dropout": ("dropout", 0.0)},
        fixed={"save_projection": True},
        shared={"randlora_A": "bases_a: lines one least", "randlora_B": "bases_b: most bases lines"},
        orders_outputs=True, bias="randlora_only",
    )  # fmt: skip

    base: Any = frozen()
    bases_a: Any = frozen("lines least")
    bases_b: Any = frozen("most bases lines")
    randlora_lambda: Any = trained("batch lines bases")
    randlora_gamma: Any = trained("batch bases least")
    axes: Axes = static()
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> RandLoraParam:
        del key
        rank, seed, (most, least) = kernel.spec.rank, kernel.option("seed"), sorted(size_of(kernel), reverse=True)
        if type(seed) is not int:
            kernel.refuse("options['seed']", "it is an integer", seed)
        count, keys = -(-least // rank), jax.random.split(jax.random.key(seed))
        rows = lambda key, n: jax.vmap(lambda i: _row(jax.random.fold_in(key, i), rank))(jnp.arange(n))
        a = rows(keys[0], least).T.astype(kernel.dtype)
        b = jax.vmap(lambda i: rows(jax.random.fold_in(keys[1], i), count))(jnp.arange(most)).astype(kernel.dtype)
        sizes = {"lines": rank, "bases": count, "least": least}
        scales = jnp.zeros(kernel.sizes("batch lines bases", **sizes), kernel.dtype)
        gamma = jnp.full(kernel.sizes("batch bases least", **sizes), 1 / max(count, least), kernel.dtype)
        return cls(base, a, b, scales, gamma, **kernel.settings)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"rank": self.bases_a.shape[0]}

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        check_whole(name, "RandLoRA's bases", codes_of(self.base))
        (outs, ins), batch = size_of(self), self.randlora_lambda.shape[:-2]
        small = self.randlora_lambda[..., None] * self.bases_a[:, None] * self.randlora_gamma[..., None, :, :]
        small, large = small.reshape(*batch, -1, small.shape[-1]), self.bases_b.reshape(len(self.bases_b), -1)
        ranks = (large.shape[-1],)
        shaped = lambda x, before, word, after: x.reshape(*before, *sizes_of(self, word), *after)
        if ins <= outs:
            a = self.laid(shaped(small.mT, batch, "in", ranks), "batch in rank")
            b = self.laid(shaped(large.T, ranks, "out", ()), "rank out")
        else:
            a = self.laid(shaped(large, (), "in", ranks), "in rank")
            b = self.laid(shaped(small, (*batch, *ranks), "out", ()), "batch rank out")
        assert math.prod(ranks) >= min(ins, outs)
        key = key if self.dropout else None
        return low_rank(self.base, a, b, key=key, name=name, scale=self.scale, dropout=self.dropout)


def _row(key: jax.Array, rank: int) -> jax.Array:
    """Uniform noise of variance one."""
    return jax.random.uniform(key, (rank,), minval=-1.0) * 3**0.5
