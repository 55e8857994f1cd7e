"""pVeRA: VeRA whose inner activations have a variance, which PEFT samples in training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jlora.factors.mersenne import Generator
from jlora.interpret.factored import Factored
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam
from jlora.variants.vera import VeraForm, between, kaiming, started


class _Form(VeraForm):
    """The vectors of the means and of the variances are one in the file, and so are the columns of A."""

    def draw(self, spec: Any, ins: int, outs: int) -> dict[str, np.ndarray]:
        generator = Generator(spec.options["projection_seed"])
        return {"pvera_A": kaiming(generator, 2 * spec.rank, ins), "pvera_B": kaiming(generator, outs, spec.rank)}

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        if not {"pvera_a", "pvera_b"} <= {*fields}:
            raise ValueError("peft.load: the file lacks pVeRA's A and B; save it in PEFT with save_projection=True")
        shapes = fields["pvera_a"].shape[1], fields["lambda_d"].shape[0], 2 * fields["pvera_b"].shape[0]
        if {*shapes} != {2 * spec.rank}:
            raise ValueError(f"peft.load: pVeRA has ranks {shapes}, twice each; by its settings r is {spec.rank}")
        return fields


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PveraParam(AdaptedParam):
    """``W + A diag(d) B diag(b)`` of the first half of A and d: pVeRA at inference, where PEFT takes the means.

    In PEFT's training the other half gives variances, and ``x A diag(d)`` is sampled; that is no kernel, so that it is
    not done here: training moves the means alone, as VeRA does, and the variances stay in PEFT's files as they were.

    Args:
      base, axes, dropout, layers: as in `jlora.LoraParam`.
      pvera_a: A, of shape (in..., 2 r), frozen, as in `VeraParam`.
      pvera_b: B, of shape (r, out...), frozen, likewise.
      lambda_d: d, of shape (batch..., 2 r), trained.
      lambda_b: b, of shape (batch..., out...), trained; zero at the start.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="pvera", rank=2))["kernel"]
      >>> node.pvera_a.shape, node.pvera_b.shape, node.lambda_d.shape
      ((4, 4), (2, 3), (4,))

    References:
      Fillioux et al., "pVeRA: Probabilistic Vector-Based Random Matrix Adaptation", arXiv:2512.07703.
    """

    SETTINGS = ("rank", "dropout")
    OPTIONS = {"d_initial": 0.1, "projection_seed": 0}
    LINEAR = ("lambda_b",)
    FORM = _Form(
        "PVERA",
        {"pvera_lambda_b": "lambda_b: out", "pvera_lambda_d": "lambda_d: both"},
        {"r": ("rank", 256), "pvera_dropout": ("dropout", 0.0)},
        fixed={"save_projection": True},
        shared={"pvera_A": "pvera_a: both in", "pvera_B": "pvera_b: out half"},
        bias="pvera_only",
    )

    base: Any = frozen()
    pvera_a: Any = frozen("in both")
    pvera_b: Any = frozen("half out")
    lambda_d: Any = trained("batch both")
    lambda_b: Any = trained("batch out")
    axes: Axes = static()
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> PveraParam:
        del key
        return cls(base, *started(kernel, 2 * kernel.spec.rank), dropout=kernel.spec.dropout, **kernel.place)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"rank": self.lambda_d.shape[-1] // 2}

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        rank = self.lambda_d.shape[-1] // 2
        return between(self, self.pvera_a[..., :rank], self.lambda_d[..., :rank], self.pvera_b, name, key)
