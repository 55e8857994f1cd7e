"""EVA: A from the inputs of each kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.apply import apply
from jlora.init.batches import adapted, jitted, size, some, summed
from jlora.interpret.factored import Factored, low_rank
from jlora.nodes.axes import Axes
from jlora.nodes.fields import PAIR, frozen, sizes_of, static, trained
from jlora.nodes.node import AdaptedParam


def eva(fn: Callable[[Any, Any], Any], tree: Any, batches: Iterable[Any], *, passes: int = 4, seed: int = 0) -> Any:
    """A from the inputs of each kernel: their leading right singular vectors over all batches; B is zero.

    The vectors are found by subspace iteration: each pass over the batches multiplies a small matrix by X^T X, X being
    the inputs of a kernel, which is one forward and backward pass of `fn`. Neither X nor X^T X is kept. Embedding
    tables, which have no inputs, keep their factors.

    Args:
      fn: an unchanged function ``fn(params, batch)``, such as a model's; its results need not be a loss, but gradients
        must be able to flow to them.
      tree: a wrapped tree.
      batches: a few batches, each given to `fn` as it is.
      passes: over the batches.
      seed: of the start of the iteration.

    Returns:
      The tree with lora_a of orthonormal columns, the inputs' directions of most variance first, and lora_b zero.

    Raises:
      ValueError: if there are no batches, or nothing has low-rank factors.
      TypeError: if `batches` is an array.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"w": jnp.ones((4, 3))}, jlora.LoraSpec(targets="w", rank=1))
      >>> x = jnp.array([[0.0, 2.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]])
      >>> params = jlora.init.eva(lambda p, x: x @ p["w"], params, [x])
      >>> jnp.abs(params["w"].lora_a[:, 0])
      Array([0., 1., 0., 0.], dtype=float32)

    References:
      Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
      arXiv:2410.07170.
    """
    _, nodes, put = adapted("eva", tree)
    batches = some("eva", batches)
    keys = jax.random.split(jax.random.key(seed), len(nodes))
    columns = [_start(node, key) for node, key in zip(nodes, keys, strict=True)]

    products = _products("eva", fn, batches)
    for count in range(passes):
        columns = columns if count == 0 else [_orthonormal(node, x) for node, x in zip(nodes, columns, strict=True)]
        columns = summed(products(columns, tree, batch) for batch in batches)
    return put([_from_inputs(node, x) for node, x in zip(nodes, columns, strict=True)])


def _products(name: str, fn: Callable[[Any, Any], Any], batches: list[Any]) -> Callable[..., list[jax.Array]]:
    """A function of one matrix V for each kernel, the tree and a batch: X^T X V of each, X being its inputs."""

    def outputs(columns: list[jax.Array], tree: Any, batch: Any) -> jax.Array:
        _, nodes, put = adapted(name, tree)
        probes = [_InputProbe(node.base, x, node.axes, node.layers) for node, x in zip(nodes, columns, strict=True)]
        return _total(apply(fn, fallback="ignore")(put(probes), batch))

    return jitted(jax.grad(outputs), batches)


def moments(name: str, fn: Callable[[Any, Any], Any], tree: Any, batches: list[Any]) -> dict[str, jax.Array]:
    """By path, X^T X of each kernel's inputs over all batches, of shape (batch..., in, in): zero if it had none."""
    paths, nodes, _ = adapted(name, tree)
    products = _products(name, fn, batches)
    whole = [_identity(node) for node in nodes]
    found = summed(products(whole, tree, batch) for batch in batches)
    return {path: _matrices(node, x) for path, node, x in zip(paths, nodes, found, strict=True)}


def _identity(node: Any) -> jax.Array:
    n, shape = size(node, "in"), sizes_of(node, "batch")
    return jnp.broadcast_to(jnp.eye(n), (*shape, n, n)).reshape(*shape, *sizes_of(node, "in"), n)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _InputProbe(AdaptedParam):
    """A kernel that is multiplied as ever, and a matrix V whose gradient is X^T X V."""

    base: Any = frozen()
    probe: Any = trained("batch in rank")
    axes: Axes = static()
    layers: tuple[int, ...] | None = static(default=None)

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        del key
        rank = self.probe.shape[-1]
        zero = jnp.zeros(sizes_of(self, PAIR[1], {"rank": rank}), self.probe.dtype)
        factors = self.beside(self.probe, PAIR[0]), self.beside(zero, PAIR[1])
        return low_rank(self.base, *factors, name=name, tap=_its_own_gradient)


@jax.custom_vjp
def _its_own_gradient(h: jax.Array) -> jax.Array:
    """The identity, whose gradient is its value: that of x @ V with respect to V is then x^T x V."""
    return h


_its_own_gradient.defvjp(lambda h: (h, h), lambda h, _: (h,))


def _start(node: Any, key: jax.Array) -> jax.Array:
    width = min(2 * node.lora_a.shape[-1] + 4, size(node, "in"))
    return _orthonormal(node, jax.random.normal(key, sizes_of(node, PAIR[0], {"rank": width})))


def _orthonormal(node: Any, x: jax.Array) -> jax.Array:
    return jnp.linalg.qr(_matrices(node, x))[0].reshape(x.shape)


def _from_inputs(node: Any, products: jax.Array) -> Any:
    """The node with A the leading directions, if it saw any input."""
    rank, seen = node.lora_a.shape[-1], jnp.any(products != 0)
    u, _, _ = jnp.linalg.svd(_matrices(node, products), full_matrices=False)
    lora_a = u[..., :rank].reshape(node.lora_a.shape).astype(node.lora_a.dtype)
    lora_a, lora_b = jnp.where(seen, lora_a, node.lora_a), jnp.where(seen, 0, node.lora_b)
    return dataclasses.replace(node, lora_a=lora_a, lora_b=lora_b, start=())


def _total(outputs: Any) -> jax.Array:
    """A scalar that every result flows into."""
    floats = [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)]
    return sum((x.astype(jnp.float32).sum() for x in floats), jnp.zeros(()))


def _matrices(node: Any, x: jax.Array) -> jax.Array:
    """An array (batch..., in..., k) as matrices (batch..., in, k)."""
    return x.reshape(*x.shape[: len(node.axes.batch_axis)], -1, x.shape[-1])
