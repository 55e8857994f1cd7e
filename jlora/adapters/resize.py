"""`resize`: a wrapped tree whose updates have another rank."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.combine import check_rank
from jlora.adapters.nearest import truncated
from jlora.adapters.places import at_each_place, made_beside
from jlora.nodes.axes import Axes
from jlora.nodes.checks import check_fit
from jlora.nodes.fields import sizes_of
from jlora.nodes.kernel import Kernel, KernelSpec
from jlora.nodes.makers import Makers
from jlora.nodes.node import TrainableParam, is_node, is_unit
from jlora.targets.paths import flatten_named
from jlora.tree import has_nodes
from jlora.variants.bias import LoraBiasParam
from jlora.variants.dora import DoraParam
from jlora.variants.lora import LoraParam, from_start
from jlora.variants.tokens import TokensParam

NAME = "adapters.resize"


def resize(tree: Any, rank: int) -> Any:
    """Gives each low-rank update another rank: a lower one by singular values, a higher one without a change.

    A lower rank gives the best approximation of ``A @ B``: what is decomposed is a small core, and no matrix of the
    kernel's size is built. A has orthonormal columns then, and B the singular values. At a higher rank the old factors
    stay, bit for bit. Beside them stand new columns of A, as `jlora.wrap` draws them by the leaf's path, and rows of
    zeros in B: the function is the same, and all of the new rank trains.

    The scale stays as it is, so that alpha, which PEFT's files have in its place, is ``scale * rank`` from now on.
    Of DoRA the update within the norm is resized, and the magnitudes stay. An update that starts from parts of its
    kernel (PiSSA, OLoRA) is a plain one of rank 2r first. Pure: it runs under `jax.jit`.

    Args:
      tree: a wrapped tree.
      rank: of all updates; of a smaller kernel as much as it has.

    Returns:
      The tree with updates of that rank; leaves trained in full, biases and rows of tables stay.

    Raises:
      ValueError: if the rank is no positive integer, or the tree is one half of `jlora.partition` or holds several
        adapters.
      TypeError: if nothing in the tree is wrapped, or a node is neither LoRA nor DoRA.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((8, 6))}, jlora.LoraSpec(rank=4))
      >>> small, large = (jlora.adapters.resize(params, rank) for rank in (2, 5))
      >>> small["kernel"].lora_a.shape, large["kernel"].lora_b.shape
      ((8, 2), (5, 6))
    """
    check_rank(NAME, "rank", rank)
    if not has_nodes(tree):
        raise TypeError(f"{NAME} takes a tree that jlora.wrap or jlora.peft.load returned; no leaf of it is wrapped")
    paths, leaves, treedef = flatten_named(NAME, tree, is_unit)
    makers = Makers()
    return treedef.unflatten([_resized(*each, int(rank), makers) for each in zip(paths, leaves, strict=True)])


def _resized(path: str, leaf: Any, rank: int, makers: Makers) -> Any:
    if not is_node(leaf) or isinstance(leaf, (TrainableParam, LoraBiasParam, TokensParam)):
        return leaf
    leaf.resolved()  # refuses what holds several adapters
    if not isinstance(leaf, (LoraParam, DoraParam)):
        raise TypeError(
            f"{NAME}: {path} is a {type(leaf).__name__}, not LoRA or DoRA; jlora.to_plain_lora(tree) makes LoRA of "
            "other low-rank variants"
        )
    check_fit(NAME, path, leaf)
    rank = min(rank, *(math.prod(sizes_of(leaf, word)) for word in ("in", "out")))
    lora_a, lora_b = from_start(leaf)
    if rank == lora_a.shape[-1]:
        return dataclasses.replace(leaf, lora_a=lora_a, lora_b=lora_b, start=())
    made = _of_rank(path, leaf, lora_a, lora_b, rank, makers)
    return dataclasses.replace(leaf, lora_a=made.lora_a, lora_b=made.lora_b, start=())


def _of_rank(path: str, node: Any, a: jax.Array, b: jax.Array, rank: int, makers: Makers) -> LoraParam:
    if rank < a.shape[-1]:
        return made_beside(node.base, makers, _lower(node.axes, node.layers, rank), a, b)
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
    return made_beside(node.base, makers, _higher(node.axes, node.layers, rank, tuple(node.shape)), a, b, key)


@functools.lru_cache(maxsize=256)
def _lower(axes: Axes, layers: tuple[int, ...] | None, rank: int) -> Callable[..., LoraParam]:
    """One program for all kernels that are alike: it makes a node without its base."""

    @jax.jit
    def program(a: jax.Array, b: jax.Array) -> LoraParam:
        lora_a, lora_b = at_each_place(lambda pairs: truncated(pairs[0][0], pairs[0][1], rank), axes, [(a, b)])
        return LoraParam(None, lora_a, lora_b, axes=axes, layers=layers)

    return program


@functools.lru_cache(maxsize=256)
def _higher(axes: Axes, layers: tuple[int, ...] | None, rank: int, shape: tuple[int, ...]) -> Callable[..., LoraParam]:
    """As `_lower`; the new columns of A are drawn from a key, and the new rows of B are zeros."""

    @jax.jit
    def program(a: jax.Array, b: jax.Array, key: jax.Array) -> LoraParam:
        spec = KernelSpec(rank - a.shape[-1], scale=1.0, dtype=a.dtype)
        more = Kernel("", shape, axes, "dot", spec, layers).low_rank(None, key)
        lora_a = jnp.concatenate([a, more["lora_a"]], -1)
        lora_b = jnp.concatenate([b, more["lora_b"].astype(b.dtype)], len(axes.batch_axis))
        return LoraParam(None, lora_a, lora_b, axes=axes, layers=layers)

    return program
