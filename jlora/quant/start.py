"""Bases and factors that start together, so that their sum is nearer to the kernel than its quantised form alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora.factors.spectral import pissa
from jlora.init.batches import some
from jlora.init.eva import moments
from jlora.nodes import placement
from jlora.nodes.fields import mapped, matrices, sizes_of
from jlora.nodes.node import is_node, is_unit
from jlora.nodes.qarray import codes, dense, is_qarray
from jlora.quant.formats import Format, encode
from jlora.targets.paths import flatten
from jlora.targets.patterns import nearest
from jlora.variants.lora import LoraParam

AT_ONCE = 2**28  # numbers of X^T X that are held, in float32
DAMPING = 0.01  # of the mean square of the inputs, as GPTQ adds it
LENGTH = 3**-0.5  # of a column of A, as it is on the average with init="kaiming"


def loftq(tree: Any, params: Any, *, iterations: int = 1, niter: int | None = None) -> Any:
    """The best factors for what quantising has lost: A and B of ``W - Q``, then Q of ``W - s A B``, and so on.

    For the start of training: the factors are new, whatever they were. More than one iteration changes the base too,
    and the adapter then fits this base alone: keep it (`jlora.unwrap`), or make it again by the same calls, which give
    the same bits.

    Args:
      tree: a wrapped tree whose adapted bases are quantised.
      params: the plain tree before it was quantised.
      iterations: how often A and B are computed; the base of the first is that of `tree`.
      niter: rounds of subspace iteration in place of an exact decomposition, as of ``init="pissa_niter_16"``; use it
        for kernels of thousands of inputs, of which the exact one takes minutes each.

    Returns:
      The tree with other factors and, with more than one iteration, other bases of the same formats.

    Raises:
      ValueError: if no node is a `LoraParam` on a quantised base, `params` lacks the leaf of one, or `iterations` is no
        positive integer.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> tree = jlora.wrap(jlora.quant.quantize(params, "nf4"), jlora.LoraSpec(rank=8))
      >>> error = lambda tree: jnp.linalg.norm(jlora.merge(tree, dtype=jnp.float32)["kernel"] - params["kernel"])
      >>> bool(error(jlora.quant.loftq(tree, params)) < 0.8 * error(tree))
      True

    References:
      Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv:2310.08659.
    """
    again = _times("loftq", iterations) - 1
    return _started(tree, _kernels("loftq", tree, params), "F" + again * "QF", niter)


def qpissa(tree: Any, params: Any, *, iterations: int = 1, niter: int | None = None) -> Any:
    """The principal part of each kernel in A and B, which train, and the rest, which has a smaller range, quantised.

    It changes the base, so that the adapter fits this base alone: keep the base (`jlora.unwrap`), or make it again by
    the same calls, which give the same bits.

    Args:
      tree: a wrapped tree whose adapted bases are quantised.
      params: the plain tree before it was quantised.
      iterations: 1 computes A and B of W, and the base of ``W - s A B``; each further one computes A and B again of
        ``W - Q``, and the base again.
      niter: rounds of subspace iteration in place of an exact decomposition, as of `loftq`.

    Returns:
      The tree with other factors, and with other bases of the same formats.

    Raises:
      ValueError: if no node is a `LoraParam` on a quantised base, `params` lacks the leaf of one, or `iterations` is no
        positive integer.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> tree = jlora.wrap(jlora.quant.quantize(params, "nf4"), jlora.LoraSpec(rank=8))
      >>> error = lambda tree: jnp.linalg.norm(jlora.merge(tree, dtype=jnp.float32)["kernel"] - params["kernel"])
      >>> bool(error(jlora.quant.qpissa(tree, params)) < error(tree))
      True

    References:
      Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv:2404.02948, section 4.
    """
    again = _times("qpissa", iterations) - 1
    return _started(tree, _kernels("qpissa", tree, params), "PQ" + again * "FQ", niter)


def qera(
    fn: Callable[[Any, Any], Any], tree: Any, params: Any, batches: Iterable[Any], *, niter: int | None = None
) -> Any:
    """As `loftq`, but the best factors for what quantising has changed of each layer's outputs on a few batches.

    `loftq` makes ``W - Q - s A B`` small; this makes ``X (W - Q - s A B)`` small, X being the inputs of the kernel over
    all batches in the plain model. The base stays as it is. A's columns are orthogonal and as long as LoRA's are at the
    start, so that learning rates for LoRA fit. For a kernel without inputs, such as an embedding table, W - Q counts.

    Args:
      fn: an unchanged function ``fn(params, batch)``, such as a model's; its results need not be a loss, but gradients
        must be able to flow to them.
      tree, params: as of `loftq`.
      batches: a few batches, each given to `fn` as it is, with more rows (tokens) in all than the widest kernel has
        inputs.
      niter: as of `loftq`.

    Returns:
      The tree with other factors. X^T X is kept for kernels whose own sum up to 2**28 numbers (1 GiB), or for a larger
      one alone; each such group takes a pass over the batches.

    Raises:
      ValueError: as `loftq`, and if there are no batches.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
      >>> x = jax.random.normal(jax.random.key(1), (256, 64)) * jnp.geomspace(0.1, 10, 64)  # some matter more
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> tree = jlora.wrap(jlora.quant.quantize(params, "nf4"), jlora.LoraSpec(rank=8))
      >>> error = lambda tree: jnp.linalg.norm(jlora.apply(fn)(tree, x) - fn(params, x))
      >>> better = jlora.quant.qera(fn, tree, params, [x])
      >>> bool(error(better) < 0.8 * error(jlora.quant.loftq(tree, params)))
      True

    References:
      Zhang et al., "QERA: an Analytical Framework for Quantization Error Reconstruction", arXiv:2410.06040, theorem 1.
    """
    batches, kernels = some("qera", batches), _kernels("qera", tree, params)
    nodes = dict(zip(*flatten(tree, is_unit)[:2], strict=True))
    paths, leaves, treedef = flatten(params, is_unit)
    for group in _groups({path: nodes[path] for path in kernels}):
        probed = [
            dataclasses.replace(nodes[path], base=leaf) if path in group else leaf
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        inputs = moments("qera", fn, treedef.unflatten(probed), batches)
        tree = _started(tree, {path: kernels[path] for path in group}, "F", niter, inputs)
    return tree


def _groups(nodes: Mapping[str, Any]) -> Iterator[set[str]]:
    """Paths of nodes whose X^T X are held at once."""
    group, held = set[str](), 0
    for path, node in nodes.items():
        size = math.prod(sizes_of(node, "batch")) * math.prod(sizes_of(node, "in")) ** 2
        if group and held + size > AT_ONCE:
            yield group
            group, held = set(), 0
        group, held = group | {path}, held + size
    yield group


def _times(name: str, iterations: Any) -> int:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"{name}: iterations must be 1 or more, found {iterations!r}")
    return iterations


def _started(
    tree: Any, kernels: Mapping[str, Any], steps: str, niter: int | None, inputs: Mapping[str, jax.Array] | None = None
) -> Any:
    """The tree with other factors, and bases if the steps make them, where it has these kernels, by path."""
    paths, leaves, treedef = flatten(tree, is_unit)

    def started(path: str, leaf: Any) -> Any:
        if path not in kernels:
            return leaf
        node = dataclasses.replace(leaf, start=())
        made = _together(node, kernels[path], (inputs or {}).get(path), Format.of(leaf.base), steps, niter)
        places = placement.of_node(made, leaf.base)
        return made if places is None else jax.device_put(made, places)

    return treedef.unflatten([started(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def _kernels(name: str, tree: Any, params: Any) -> dict[str, Any]:
    """By path, the plain kernel of each adapter on a quantised base."""
    named = list(zip(*flatten(tree, is_unit)[:2], strict=True))
    plain = dict(zip(*flatten(params, is_unit)[:2], strict=True))
    if not any(_is_on_codes(leaf) for _, leaf in named):
        nodes = [leaf for _, leaf in named if is_node(leaf)]
        found = {f"{type(x).__name__} on a {'quantised' if is_qarray(x.base) else 'dense'} base" for x in nodes}
        raise ValueError(
            f"{name} takes the tree first, jlora.wrap(jlora.quant.quantize(params), spec) with variant 'lora', then "
            f"params; the first has {', '.join(sorted(found)) or 'nothing that is wrapped'}"
        )
    for path, leaf in named:
        if _is_on_codes(leaf):
            _check(name, path, leaf, plain)
    return {path: plain[path] for path, leaf in named if _is_on_codes(leaf)}


def _is_on_codes(leaf: Any) -> bool:
    return isinstance(leaf, LoraParam) and is_qarray(leaf.base)


def _check(name: str, path: str, node: Any, plain: Mapping[str, Any]) -> None:
    leaf = plain.get(path)
    if any(isinstance(codes(x), jax.ShapeDtypeStruct) for x in (node.base, leaf)):
        raise ValueError(f"{name}: {path} is a plan, without values; fill it first, by jlora.quant.fill")
    if leaf is None or is_unit(leaf) or tuple(leaf.shape) != tuple(node.shape):
        near = f"is missing (nearest: {', '.join(nearest(path, plain))})"
        found = near if leaf is None else f"is a {type(leaf).__name__} of shape {tuple(leaf.shape)}"
        raise ValueError(
            f"{name}: params must have the kernel {path} of shape {tuple(node.shape)} as it was before it was "
            f"quantised, but there it {found}"
        )


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _together(node: Any, kernel: jax.Array, inputs: Any, form: Format, steps: str, niter: int | None) -> Any:
    """The node after steps in turn: P, factors for the kernel; F, for what the base leaves; Q, a base for the rest."""
    exact, base = kernel.astype(jnp.float32), node.base
    node = dataclasses.replace(node, **{name: jnp.zeros_like(getattr(node, name)) for name in ("lora_a", "lora_b")})
    weighing = None if inputs is None else mapped(node, _root, inputs)
    for step in steps:
        if step == "Q":
            base = encode((exact - _update(node, exact)).astype(kernel.dtype), form)
        else:
            node = _factored(node, exact if step == "P" else exact - dense(base, jnp.float32), weighing, niter)
    return dataclasses.replace(node, base=base)


def _update(node: Any, like: jax.Array) -> jax.Array:
    """s A B, of the shape of the kernel."""
    return dataclasses.replace(node, base=jnp.zeros_like(like)).effective("", None).dense()


def _root(inputs: jax.Array) -> jax.Array:
    """An upper triangular U with ``U^T U`` = X^T X, a hundredth of its mean diagonal added; the identity for no X."""
    size = len(inputs)
    added = DAMPING * jnp.trace(inputs) / size * jnp.eye(size)
    return jnp.linalg.cholesky(jnp.where(jnp.any(inputs != 0), inputs + added, jnp.eye(size))).T


def _factored(node: Any, kernel: jax.Array, weighing: Any, niter: int | None) -> Any:
    """The node with the best factors for a kernel, its error weighed from the left."""
    node = dataclasses.replace(node, base=kernel)
    split = lambda matrix: pissa(matrix, node.rank, node.scale, jax.random.key(0), niter)

    def weighed(matrix: jax.Array, root: jax.Array) -> tuple[jax.Array, jax.Array]:
        lora_a, lora_b = split(root @ matrix)
        q, rest = jnp.linalg.qr(jax.scipy.linalg.solve_triangular(root, lora_a))
        return LENGTH * q, rest @ lora_b / LENGTH

    parts = (matrices(node, kernel),) if weighing is None else (matrices(node, kernel), weighing)
    lora_a, lora_b = mapped(node, split if weighing is None else weighed, *parts)
    shaped = lambda x, old: x.reshape(old.shape).astype(old.dtype)
    return dataclasses.replace(node, lora_a=shaped(lora_a, node.lora_a), lora_b=shaped(lora_b, node.lora_b))
