"""Bases and factors that start together, so that their sum is nearer to the kernel than its quantised form alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora import sharding
from jlora.fields import mapped, matrices
from jlora.init.spectral import pissa
from jlora.nodes import LoraParam, is_node, is_unit
from jlora.paths import flatten, nearest
from jlora.qarray import codes, dense, is_qarray
from jlora.quant.formats import Format, encode


def loftq(tree: Any, params: Any, *, iterations: int = 1, niter: int | None = None) -> Any:
    """The best factors for what quantising has lost: A and B of ``W - Q``, then Q of ``W - s A B``, and so on.

    For the start of training: the factors are new, whatever they were. More than one iteration changes the base too,
    and the adapter then fits this base alone: keep it (`jlora.unwrap`), or make it again by the same calls, which give
    the same bits.

    Args:
      tree: a wrapped tree whose adapted bases are quantised.
      params: the plain tree before it was quantised.
      iterations: how often A and B are computed; the base of the first is W quantised, as it is in `tree`.
      niter: rounds of subspace iteration in place of an exact decomposition, as of ``init="pissa_niter_16"``; use it
        for kernels of thousands of inputs, of which the exact one takes minutes each.

    Returns:
      The tree with other factors and, with more than one iteration, other bases of the same formats.

    Raises:
      ValueError: if no node is a `LoraParam` on a quantised base, or `params` lacks the leaf of one.

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
    return _started("loftq", "QF", tree, params, iterations, niter)


def qpissa(tree: Any, params: Any, *, iterations: int = 1, niter: int | None = None) -> Any:
    """The principal part of each kernel in A and B, which train, and the rest, which has a smaller range, quantised.

    It changes the base, so that the adapter fits this base alone, as in `loftq`.
    Arguments and errors are those of `loftq`; with more iterations A and B are computed again of ``W - Q``, and the
    base again of ``W - s A B``.

    References:
      Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv:2404.02948, section 4.
    """
    return _started("qpissa", "FQ", tree, params, iterations, niter)


def _started(name: str, steps: str, tree: Any, params: Any, iterations: int, niter: int | None) -> Any:
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"{name}: iterations must be 1 or more, found {iterations!r}")
    paths, leaves, treedef = flatten(tree, is_unit)
    plain = dict(zip(*flatten(params, is_unit)[:2], strict=True))
    if not any(map(_is_on_codes, leaves)):
        nodes = [leaf for leaf in leaves if is_node(leaf)]
        found = {f"{type(x).__name__} on a {'quantised' if is_qarray(x.base) else 'dense'} base" for x in nodes}
        raise ValueError(
            f"{name} takes the tree first, jlora.wrap(jlora.quant.quantize(params), spec) with variant 'lora', then "
            f"params; the first has {', '.join(sorted(found)) or 'nothing that is wrapped'}"
        )

    def started(path: str, leaf: Any) -> Any:
        if not _is_on_codes(leaf):
            return leaf
        _check(name, path, leaf, plain)
        node = dataclasses.replace(leaf, base=None, start=())
        made = _together(node, plain[path], Format.of(leaf.base), steps * iterations, niter)
        places = sharding.of_node(made, leaf.base)
        return made if places is None else jax.device_put(made, places)

    return treedef.unflatten([started(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


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


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _together(node: Any, kernel: jax.Array, form: Format, steps: str, niter: int | None) -> Any:
    """The node after these steps in turn: F, factors for what the base leaves; Q, a base for what they leave."""
    exact, base = kernel.astype(jnp.float32), None
    node = dataclasses.replace(node, **{name: jnp.zeros_like(getattr(node, name)) for name in ("lora_a", "lora_b")})
    for step in steps:
        if step == "Q":
            base = encode((exact - _update(node, exact)).astype(kernel.dtype), form)
        else:
            node = _factored(node, exact if base is None else exact - dense(base, jnp.float32), niter)
    return dataclasses.replace(node, base=base)


def _update(node: Any, like: jax.Array) -> jax.Array:
    """s A B, of the shape of the kernel."""
    return dataclasses.replace(node, base=jnp.zeros_like(like)).effective("", None).dense()


def _factored(node: Any, kernel: jax.Array, niter: int | None) -> Any:
    """The node with the best factors for a kernel."""
    node = dataclasses.replace(node, base=kernel)
    split = lambda matrix: pissa(matrix, node.rank, node.scale, jax.random.key(0), niter)
    lora_a, lora_b = mapped(node, split, matrices(node, kernel))
    shaped = lambda x, old: x.reshape(old.shape).astype(old.dtype)
    return dataclasses.replace(node, lora_a=shaped(lora_a, node.lora_a), lora_b=shaped(lora_b, node.lora_b))
