"""Factors from data: functions of a wrapped tree and a few batches that give the tree with other factors.

Both work under jit and on sharded trees: every large array is a product with, or the gradient of, a placed one. The
gradients are compiled once for all batches; under a jit of one's own they are written out for each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.apply import apply
from jlora.axes import Axes
from jlora.fields import PAIR, frozen, mapped, matrices, sizes_of, static, trained
from jlora.init.spectral import leading
from jlora.interpret.factored import Factored, low_rank
from jlora.nodes import AdaptedParam, is_node
from jlora.paths import flatten, refill
from jlora.qarray import dense
from jlora.tree import unwrap

Loss = Callable[[Any, Any], Any]


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
    _, nodes, put = _adapted("eva", tree)
    batches = some("eva", batches)
    keys = jax.random.split(jax.random.key(seed), len(nodes))
    columns = [_start(node, key) for node, key in zip(nodes, keys, strict=True)]

    products = _products("eva", fn, batches)
    for count in range(passes):
        columns = columns if count == 0 else [_orthonormal(node, x) for node, x in zip(nodes, columns, strict=True)]
        columns = _sum(products(columns, tree, batch) for batch in batches)
    return put([_from_inputs(node, x) for node, x in zip(nodes, columns, strict=True)])


def _products(name: str, fn: Callable[[Any, Any], Any], batches: list[Any]) -> Callable[..., list[jax.Array]]:
    """A function of one matrix V for each kernel, the tree and a batch: X^T X V of each, X being its inputs."""

    def outputs(columns: list[jax.Array], tree: Any, batch: Any) -> jax.Array:
        _, nodes, put = _adapted(name, tree)
        probes = [_InputProbe(node.base, x, node.axes, node.layers) for node, x in zip(nodes, columns, strict=True)]
        return _total(apply(fn, fallback="ignore")(put(probes), batch))

    return _jitted(jax.grad(outputs), batches)


def moments(name: str, fn: Callable[[Any, Any], Any], tree: Any, batches: list[Any]) -> dict[str, jax.Array]:
    """By path, X^T X of each kernel's inputs over all batches, of shape (batch..., in, in): zero if it had none."""
    paths, nodes, _ = _adapted(name, tree)
    products = _products(name, fn, batches)
    whole = [_identity(node) for node in nodes]
    found = _sum(products(whole, tree, batch) for batch in batches)
    return {path: _matrices(node, x) for path, node, x in zip(paths, nodes, found, strict=True)}


def _identity(node: Any) -> jax.Array:
    size, shape = _size(node, "in"), sizes_of(node, "batch")
    return jnp.broadcast_to(jnp.eye(size), (*shape, size, size)).reshape(*shape, *sizes_of(node, "in"), size)


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
    width = min(2 * node.lora_a.shape[-1] + 4, _size(node, "in"))
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


def lora_ga(
    loss: Loss, tree: Any, batches: Iterable[Any], *, gamma: float = 16.0, niter: int = 4, seed: int = 0
) -> Any:
    """A and B from the gradient of each kernel, so that LoRA's first step comes nearest to that of full training.

    Of the gradient's singular vectors, A has the first r of the in side, B the next r of the out side, both times
    ``out ** (1 / 4) / sqrt(gamma)``; the kernel stays whole, since the node stands for ``W + s (A B - A_0 B_0)``.

    Args:
      loss: an unchanged scalar function ``loss(params, batch)``.
      tree: a wrapped tree.
      batches: a few batches; their gradients are summed. A gradient of every target is held at once.
      gamma: the smaller, the larger the factors.
      niter: rounds of subspace iteration of the decomposition.
      seed: of its start.

    Returns:
      The tree with those factors; `jlora.to_plain_lora` turns it into plain LoRA of rank 2r.

    Raises:
      ValueError: if there are no batches, nothing has low-rank factors, or a kernel is too small for rank 2r.

    References:
      Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv:2407.05000.
    """
    paths, nodes, put = _adapted("lora_ga", tree)
    batches = some("lora_ga", batches)
    for path, node in zip(paths, nodes, strict=True):
        _check_twice(path, node)

    def plain(bases: list[Any], tree: Any, batch: Any) -> jax.Array:
        _, nodes, put = _adapted("lora_ga", tree)
        given = [dataclasses.replace(node, base=base) for node, base in zip(nodes, bases, strict=True)]
        return apply(loss, fallback="ignore", freeze=False)(unwrap(put(given)), batch)

    gradient = _jitted(jax.grad(plain), batches)
    bases = [dense(node.base) for node in nodes]
    grads = _sum(gradient(bases, tree, batch) for batch in batches)
    keys = jax.random.split(jax.random.key(seed), len(nodes))
    return put([_from_gradient(*each, gamma, niter) for each in zip(nodes, grads, keys, strict=True)])


def _check_twice(path: str, node: Any) -> None:
    rank, sizes = node.lora_a.shape[-1], (_size(node, "in"), _size(node, "out"))
    if 2 * rank > min(sizes):
        raise ValueError(
            f"lora_ga: it takes 2 x rank singular vectors, but {path} of shape {tuple(node.shape)} maps {sizes[0]} to "
            f"{sizes[1]}, so it has {min(sizes)}, fewer than 2 x {rank}. Lower its rank with "
            f"overrides={{{path!r}: {{'rank': {min(sizes) // 2}}}}}, or exclude it"
        )


def _from_gradient(node: Any, grad: jax.Array, key: jax.Array, gamma: float, niter: int) -> Any:
    rank = node.lora_a.shape[-1]
    u, _, vt = mapped(node, lambda matrix: leading(matrix, 2 * rank, key, niter), matrices(node, grad))
    scale = _size(node, "out") ** 0.25 / gamma**0.5
    lora_a = (scale * u[..., :rank]).reshape(node.lora_a.shape).astype(node.lora_a.dtype)
    lora_b = (scale * vt[..., rank : 2 * rank, :]).reshape(node.lora_b.shape).astype(node.lora_b.dtype)
    return dataclasses.replace(node, lora_a=lora_a, lora_b=lora_b, start=(jnp.copy(lora_a), jnp.copy(lora_b)))


def _adapted(name: str, tree: Any) -> tuple[list[str], list[Any], Callable[[list[Any]], Any]]:
    """The nodes with low-rank factors that may start anywhere, by path, and a function that puts others there."""
    paths, leaves, treedef = flatten(tree, is_node)
    places = [i for i, leaf in enumerate(leaves) if is_node(leaf) and hasattr(leaf, "start")]
    if not places:
        kinds = sorted({type(leaf).__name__ for leaf in leaves if is_node(leaf)})
        found = f"it has {', '.join(kinds)}" if kinds else "nothing in it is wrapped"
        raise ValueError(
            f"{name}: the second argument is a tree of jlora.wrap with variant 'lora', 'dora' or 'lora_fa'; {found}"
        )
    return [paths[i] for i in places], [leaves[i] for i in places], refill(treedef, leaves, places)


def some(name: str, batches: Iterable[Any]) -> list[Any]:
    if isinstance(batches, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{name}: batches is an array of shape {batches.shape}; it takes a sequence of batches, [batch]"
        )
    batches = list(batches)
    if not batches:
        raise ValueError(
            f"{name}: batches is empty; it takes one batch or more, each as the function's second argument"
        )
    return batches


def _jitted(fn: Callable[..., Any], batches: list[Any]) -> Callable[..., Any]:
    """Compiled once for all batches, if they hold arrays alone."""
    are_arrays = all(isinstance(x, (jax.Array, np.ndarray)) for x in jax.tree.leaves(batches))
    return jax.jit(fn) if are_arrays else fn


def _total(outputs: Any) -> jax.Array:
    """A scalar that every result flows into."""
    floats = [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)]
    return sum((x.astype(jnp.float32).sum() for x in floats), jnp.zeros(()))


def _sum(trees: Iterable[Any]) -> Any:
    return functools.reduce(lambda one, other: jax.tree.map(jnp.add, one, other), trees)


def _matrices(node: Any, x: jax.Array) -> jax.Array:
    """An array (batch..., in..., k) as matrices (batch..., in, k)."""
    return x.reshape(*x.shape[: len(node.axes.batch_axis)], -1, x.shape[-1])


def _size(node: Any, word: str) -> int:
    return math.prod(sizes_of(node, word))
