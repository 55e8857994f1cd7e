"""VeRA: all kernels share two frozen random matrices; vectors are trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.factors.mersenne import Generator
from jlora.interpret.factored import Factored, low_rank
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.form import Form, beginning
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


class VeraForm(Form):
    """A file without the projections has their seed, from which PyTorch draws them."""

    def alike(
        self, own: Mapping[str, np.ndarray], shared: Mapping[str, np.ndarray], whole: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray] | None:
        """Where A is larger than the file's, as that of a kernel with fewer inputs is, d becomes as much larger."""
        a, d = next(name for name in shared if name.endswith("_A")), next(name for name in own if name.endswith("_d"))
        ours, theirs = shared[a], beginning(whole[a], shared[a])
        ratio = np.linalg.norm(ours) / np.linalg.norm(theirs)
        if ours.shape != theirs.shape or not np.allclose(ours, ratio * theirs, rtol=1e-5, atol=0):
            return None
        return super().alike({**own, d: own[d] * np.float32(ratio)}, {**shared, a: theirs}, whole)

    def draw(self, spec: Any, ins: int, outs: int) -> dict[str, np.ndarray]:
        generator = Generator(spec.options["projection_seed"])
        return {"vera_A": kaiming(generator, spec.rank, ins), "vera_B": kaiming(generator, outs, spec.rank)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class VeraParam(AdaptedParam):
    """``W + A diag(d) B diag(b)`` with A and B frozen and the same for all kernels (their first rows and columns).

    Args:
      base, axes, dropout, layers: as in `jlora.LoraParam`.
      vera_a: A, of shape (in..., r), frozen: uniform (Kaiming's), row i from i and the seed only.
      vera_b: B, of shape (r, out...), frozen, likewise its columns.
      lambda_d: d, of shape (batch..., r), trained.
      lambda_b: b, of shape (batch..., out...), trained; zero at the start.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(variant="vera", rank=2))["kernel"]
      >>> node.vera_a.shape, node.vera_b.shape, node.lambda_d, node.lambda_b.shape
      ((4, 2), (2, 3), Array([0.1, 0.1], dtype=float32), (3,))

    References:
      Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454.
    """

    SETTINGS = ("rank", "dropout")
    OPTIONS = {"d_initial": 0.1, "projection_seed": 0}
    LINEAR = ("lambda_b",)
    FORM = VeraForm(
        "VERA",
        {"vera_lambda_b": "lambda_b: out", "vera_lambda_d": "lambda_d: rank"},
        {"r": ("rank", 256), "vera_dropout": ("dropout", 0.0)},
        fixed={"save_projection": True},
        shared={"vera_A": "vera_a: rank in", "vera_B": "vera_b: out rank"},
        bias="vera_only",
    )

    base: Any = frozen()
    vera_a: Any = frozen("in rank")
    vera_b: Any = frozen("rank out")
    lambda_d: Any = trained("batch rank")
    lambda_b: Any = trained("batch out")
    axes: Axes = static()
    dropout: float = static(default=0.0)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> VeraParam:
        del key
        return cls(base, *started(kernel, kernel.spec.rank), dropout=kernel.spec.dropout, **kernel.place)

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"rank": self.vera_a.shape[-1]}

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        return between(self, self.vera_a, self.lambda_d, self.vera_b, name, key)


def started(kernel: Kernel, width: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A of so many columns, B of the rank, d of as many numbers as A has columns, and b: as they start."""
    seed, initial, rank, dtype = *map(kernel.option, ("projection_seed", "d_initial")), kernel.spec.rank, kernel.dtype
    if type(seed) is not int:
        kernel.refuse("options['projection_seed']", "it is an integer", seed)
    if not isinstance(initial, (int, float)):
        kernel.refuse("options['d_initial']", "it is a number", initial)
    keys = jax.random.split(jax.random.key(seed))
    a, b = rows_of(keys[0], kernel.size("in"), width), rows_of(keys[1], kernel.size("out"), rank).T
    return (
        (a * (6 / kernel.size("in")) ** 0.5).astype(dtype).reshape(kernel.sizes("in n", n=width)),
        (b * (6 / rank) ** 0.5).astype(dtype).reshape(kernel.sizes("n out", n=rank)),
        jnp.full(kernel.sizes("batch n", n=width), initial, dtype),
        jnp.zeros(kernel.sizes("batch out"), dtype),
    )


def between(node: Any, a: jax.Array, d: jax.Array, b: jax.Array, name: str, key: jax.Array | None) -> Factored:
    """A diag(d) B diag(b) beside the base of a node, which has b and the dropout."""
    n = len(node.axes.batch_axis)
    scales = jnp.expand_dims(d, [n + 1 + i for i in range(len(node.axes.out_axis))])
    scaled = b * scales * jnp.expand_dims(node.lambda_b, n)
    factors = node.laid(a, "in rank"), node.laid(scaled, "batch rank out")
    return low_rank(node.base, *factors, key=key if node.dropout else None, name=name, dropout=node.dropout)


def kaiming(generator: Generator, rows: int, columns: int) -> np.ndarray:
    """``torch.nn.init.kaiming_uniform_`` of a matrix."""
    bound = (6 / columns) ** 0.5
    return generator.uniform((rows, columns), -bound, bound)


def rows_of(key: jax.Array, count: int, rank: int) -> jax.Array:
    """`count` rows of uniform noise, each from its own key."""
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (rank,), minval=-1.0))(jnp.arange(count))
