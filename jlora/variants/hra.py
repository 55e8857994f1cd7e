"""HRA: the kernel's input goes through a chain of trained Householder reflections."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.interpret.factored import Factored, low_rank
from jlora.interpret.manual import check_whole
from jlora.interpret.products import contract, wide
from jlora.interpret.quantised import made_beside
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, of_layers, sizes_of, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


class _Form(Form):
    """The vectors, and whether they are orthogonalised, which no tensor tells."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        return {**fields, "gram_schmidt": spec.options["gram_schmidt"]}

    def settings_of(self, node: Any) -> dict[str, Any]:
        return {"r": node.hra_u.shape[-1], "apply_GS": node.gram_schmidt}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class HraParam(AdaptedParam):
    """``H_r ... H_1 W`` with ``H_i = I - 2 u_i u_i^T / |u_i|^2``: the in axes are reflected r times, flattened.

    The product is ``W - U T (U^T W)`` with a triangular T of shape (r, r), so that it is computed as a low-rank update;
    ``U^T W`` costs what r tokens cost. With the option ``gram_schmidt``, PEFT's ``apply_GS``, the vectors are
    orthogonalised: ``W - 2 Q Q^T W``. That is never W, so that `jlora.wrap` refuses it; it is for PEFT's files.

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      hra_u: U, of shape (batch..., in..., r), trained. At the start two neighbours are the same, and undo each other; a
        vector of zeros reflects nothing.
      gram_schmidt: whether the vectors are orthogonalised.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="hra", rank=2))["kernel"]
      >>> node.hra_u.shape, bool((node.hra_u[:, 0] == node.hra_u[:, 1]).all())
      ((4, 2), True)

    References:
      Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
      arXiv:2405.17484.
    """

    SETTINGS = ("rank",)
    OPTIONS = {"gram_schmidt": False}
    FORM = _Form(
        "HRA", {"hra_u": "hra_u: in rank"}, {"r": ("rank", 8), "apply_GS": ("options.gram_schmidt", False)},
        bias="hra_only", kinds=("linear", "conv"),
    )  # fmt: skip

    base: Any = frozen()
    hra_u: Any = trained("batch in rank")
    axes: Axes = static()
    gram_schmidt: bool = static(default=False)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> HraParam:
        rank, given = kernel.spec.rank, kernel.option("gram_schmidt")
        if rank % 2:
            kernel.refuse("rank", "it is even: two reflections undo each other at the start", rank)
        if given is not False:
            kernel.refuse("options['gram_schmidt']", "orthogonal reflections never stand for the kernel itself", given)
        half = kernel.normal(key, "batch in rank", kernel.size("in") ** -0.5, rank=rank // 2)
        return cls(base, jnp.repeat(half, 2, axis=-1), **kernel.place)

    @property
    def settings(self) -> dict[str, Any]:
        options = {"options": {"gram_schmidt": True}} if self.gram_schmidt else {}
        return {"rank": self.hra_u.shape[-1], **options}

    def identity(self) -> HraParam:
        return dataclasses.replace(self, hra_u=jnp.zeros_like(self.hra_u))

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        del key
        check_whole(name, "HRA's reflections", self.hra_u)
        axes, sums, rank = self.axes, wide(self.hra_u.dtype), self.hra_u.shape[-1]
        batch, ins, outs = axes.batch_axis, axes.in_axis, axes.out_axis
        u = _unit(self.hra_u.astype(sums), tuple(range(len(batch), len(batch) + len(ins))))
        gram = contract(u, (*batch, *ins, "q"), u, (*batch, *ins, "r"), (*batch, "q", "r"))
        weight = of_layers(self, made_beside(self.base, u)).astype(sums)
        seen = contract(u, (*batch, *ins, "r"), weight, tuple(range(self.ndim)), (*batch, "r", *outs))
        flat = seen.reshape(*gram.shape[:-1], -1)
        solved = self._solved(gram, flat).reshape(*seen.shape)
        assert sizes_of(self, "batch rank out", {"rank": rank}) == solved.shape
        factors = self.laid(u, "batch in rank"), self.laid(solved, "batch rank out")
        return low_rank(self.base, *factors, name=name, scale=-1.0)

    def _solved(self, gram: jax.Array, seen: jax.Array) -> jax.Array:
        """T U^T W, of U^T U and of U^T W; T is the inverse of what two reflections have of each other."""
        eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
        if self.gram_schmidt:
            return 2 * jnp.linalg.solve(
                gram + jnp.where(jnp.diagonal(gram, 0, -2, -1) == 0, 1, 0)[..., None] * eye, seen
            )
        return lax.linalg.triangular_solve(jnp.tril(gram, -1) + eye / 2, seen, left_side=True, lower=True)


def _unit(u: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Vectors of length one; of zeros where they are zero."""
    square = jnp.square(u).sum(axes, keepdims=True)
    return jnp.where(square == 0, 0, u * lax.rsqrt(jnp.where(square == 0, 1, square)))
