"""EVA: A from the inputs of each kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.apply import apply
from jlora.init.batches import adapted, checked, jitted, size, some, summed
from jlora.init.ranks import largest, ratio, shared_out
from jlora.interpret.factored import Factored, low_rank
from jlora.nodes.axes import Axes
from jlora.nodes.fields import PAIR, frozen, sizes_of, static, trained
from jlora.nodes.node import AdaptedParam


def eva(
    fn: Callable[[Any, Any], Any],
    tree: Any,
    batches: Iterable[Any],
    *,
    passes: int = 4,
    seed: int = 0,
    rho: float = 1.0,
) -> Any:
    """A from the inputs of each kernel: their leading right singular vectors over all batches; B is zero.

    The vectors are found by subspace iteration: each pass over the batches multiplies a small matrix by X^T X, X being
    the inputs of a kernel, which is one forward and backward pass of `fn`. Neither X nor X^T X is kept. Embedding
    tables, which have no inputs, keep their factors.

    Args:
      fn: an unchanged function ``fn(params, batch)``, such as a model's; its results need not be a loss, but gradients
        must be able to flow to them.
      tree: a wrapped tree of LoRA, DoRA or LoRA-FA. What was trained in it is replaced.
      batches: a few batches, each given to `fn` as it is.
      passes: over the batches.
      seed: of the start of the iteration.
      rho: how far ranks may move. 1 leaves them as they are. Above, all kernels' ranks together are shared out anew.
        Each direction explains a share of the variance of its kernel's inputs; the directions of all kernels are sorted
        by it, and the first ones get the ranks. No rank grows to more than rho times what it was. A kernel that gets
        none is left without an adapter. Scales stay what they were; PEFT changes alpha for that, and its default of rho
        is 2. Kernels in one stack get one rank, by the mean of their shares. Kernels with the same inputs may differ by
        one, where the ranks end. It takes one pass more.

    Returns:
      The tree with lora_a of orthonormal columns, the inputs' directions of most variance first, and lora_b zero.

    Raises:
      ValueError: if there are no batches, or nothing has low-rank factors; if no input reaches any adapted kernel, or
        some are not finite (under `jax.jit` neither is seen); if passes or rho is no number of at least 1, or rho is
        more than 1 under `jax.jit`, where shapes can't depend on data.
      TypeError: if `batches` is an array.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"w": jnp.ones((4, 3))}, jlora.LoraSpec(targets="w", rank=1))
      >>> x = jnp.array([[0.0, 2.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]])
      >>> params = jlora.init.eva(lambda p, x: x @ p["w"], params, [x])
      >>> jnp.abs(params["w"].lora_a[:, 0])
      Array([0., 1., 0., 0.], dtype=float32)

      Ranks that follow the data: the inputs of ``v`` lie in one direction, those of ``w`` in all.

      >>> params = jlora.wrap({"v": jnp.ones((4, 3)), "w": jnp.ones((4, 3))}, jlora.LoraSpec(targets="*", rank=2))
      >>> line, plane = jnp.zeros((9, 4)).at[:, 1].set(1.0), jax.random.normal(jax.random.key(0), (9, 4))
      >>> fn = lambda p, x: (x[0] @ p["v"], x[1] @ p["w"])
      >>> params = jlora.init.eva(fn, params, [(line, plane)], rho=2)
      >>> params["v"].rank, params["w"].rank
      (1, 3)

    References:
      Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
      arXiv:2410.07170.
    """
    paths, nodes, put = adapted("eva", tree)
    batches, rho = some("eva", batches), ratio(rho, nodes)
    if type(passes) is not int or passes < 1:
        raise ValueError(f"eva: passes must be an integer of at least 1, found {passes!r}")
    keys = jax.random.split(jax.random.key(seed), len(nodes))
    most = [largest(node, rho, min(size(node, "in"), size(node, "out"))) for node in nodes]
    columns = [_start(*each) for each in zip(nodes, most, keys, strict=True)]

    products = _products("eva", fn, batches)
    once = lambda columns: summed(products(columns, tree, batch) for batch in batches)
    found = checked("eva", paths, once(columns), "inputs")
    for _ in range(passes - 1):
        columns = [_orthonormal(node, x) for node, x in zip(nodes, found, strict=True)]
        found = once(columns)
    if rho == 1:
        return put([_from_inputs(node, x) for node, x in zip(nodes, found, strict=True)])
    return put(_redistributed(nodes, found, most, once, jax.random.key(seed)))


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


Once = Callable[[list[jax.Array]], list[jax.Array]]


def _redistributed(nodes: list[Any], found: list[jax.Array], most: list[int], once: Once, key: jax.Array) -> list[Any]:
    """The nodes with ranks shared out anew, and the leading directions of `found`; bases, where a rank is zero."""
    shares = [share[:limit] for share, limit in zip(_explained(nodes, found, once, key), most, strict=True)]
    places = [i for i, share in enumerate(shares) if share.sum() > 0]  # the others saw no input
    ranks = shared_out([nodes[i] for i in places], [shares[i] for i in places])
    started = [_from_inputs(nodes[i], found[i], rank) for i, rank in zip(places, ranks, strict=True)]
    return [dict(zip(places, started, strict=True)).get(i, node) for i, node in enumerate(nodes)]


def _explained(nodes: list[Any], found: list[jax.Array], once: Once, key: jax.Array) -> list[np.ndarray]:
    """What each found direction explains of the variance of a kernel's inputs, largest first: the mean over a stack.

    The whole variance, the trace of X^T X, is that in the found directions, and an estimate of the rest from random
    directions beside them. `once` multiplies by X^T X.

    References:
      Meyer et al., "Hutch++: Optimal Stochastic Trace Estimation", arXiv:2010.09649.
    """
    inside = [_orthonormal(node, x) for node, x in zip(nodes, found, strict=True)]
    outside = [_beside(*each) for each in zip(nodes, inside, jax.random.split(key, len(nodes)), strict=True)]
    products = zip(nodes, inside, once(inside), outside, once(outside), strict=True)
    return [_shares(*(_matrices(node, x) for x in matrices)) for node, *matrices in products]


def _shares(q: jax.Array, of_q: jax.Array, z: jax.Array, of_z: jax.Array) -> np.ndarray:
    """As `_explained`, for one node: of Q and Z, and of X^T X times these."""
    variances = jnp.linalg.eigvalsh(jnp.swapaxes(q, -1, -2) @ of_q)[..., ::-1]
    whole = variances.sum(-1) + (z * of_z).sum((-2, -1)) / z.shape[-1]
    shares = jnp.where(whole > 0, 1 / jnp.where(whole > 0, whole, 1), 0)[..., None] * variances
    return np.asarray(shares.reshape(-1, shares.shape[-1]).mean(0))


def _beside(node: Any, basis: jax.Array, key: jax.Array) -> jax.Array:
    """Random directions of entries +1 and -1, less what of them lies in the span of some orthonormal columns."""
    q = _matrices(node, basis)
    signs = jax.random.rademacher(key, q.shape, q.dtype)
    return (signs - q @ (jnp.swapaxes(q, -1, -2) @ signs)).reshape(basis.shape)


def _start(node: Any, rank: int, key: jax.Array) -> jax.Array:
    width = min(2 * rank + 4, size(node, "in"))
    return _orthonormal(node, jax.random.normal(key, sizes_of(node, PAIR[0], {"rank": width})))


def _orthonormal(node: Any, x: jax.Array) -> jax.Array:
    return jnp.linalg.qr(_matrices(node, x))[0].reshape(x.shape)


def _from_inputs(node: Any, products: jax.Array, rank: int | None = None) -> Any:
    """The node with A the leading directions, if it saw any input; of another rank, if one is given: 0 is the base."""
    if rank == 0:
        return node.base
    if rank is not None:
        factors = {"lora_a": (PAIR[0], node.lora_a.dtype), "lora_b": (PAIR[1], node.lora_b.dtype)}
        zeros = {
            name: jnp.zeros(sizes_of(node, axes, {"rank": rank}), dtype) for name, (axes, dtype) in factors.items()
        }
        node = dataclasses.replace(node, **zeros, start=())
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
