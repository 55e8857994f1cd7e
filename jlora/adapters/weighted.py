"""`weighted`: several adapters of one base made one, by all of PEFT's methods."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.adapters.combine import Recipe, checked_weights, combined
from jlora.adapters.nearest import Factors
from jlora.adapters.places import at_each_place, made_beside
from jlora.adapters.trees import aligned, updates_of
from jlora.nodes.axes import Axes
from jlora.nodes.fields import sizes_of
from jlora.nodes.kernel import Kernel, KernelSpec
from jlora.nodes.makers import Makers
from jlora.nodes.node import is_node
from jlora.targets.paths import checked_key
from jlora.variants.lora import LoraParam, from_start

NAME = "adapters.weighted"


def weighted(
    trees: Sequence[Any],
    weights: Any,
    method: str = "linear",
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    key: jax.Array | None = None,
) -> Any:
    """Makes one adapter of several that stand on one base: PEFT's ``add_weighted_adapter`` as a pure function.

    With ``s_i * A_i @ B_i`` the update of a kernel in tree i, and w_i the tree's weight:

    - ``"cat"`` is ``sum(w_i * s_i * A_i @ B_i)`` exactly, of the sum of the ranks; ``"svd"`` the best approximation of
      that of rank `svd_rank`.
    - ``"linear"`` adds factor to factor, ``(sum of A_i) @ (sum of B_i)``, each times ``sqrt(|w_i * s_i|)``, and A times
      the sign of ``w_i * s_i``. The rank stays. It is rough: the product has each A with each B.
    - ``"magnitude_prune"`` keeps the largest values of each factor first, ``"dare_linear"`` random ones; then as
      ``"linear"``. ``"ties"`` and ``"dare_ties"`` take in each place the mean of those whose sign has the majority.
    - with ``"_svd"`` behind its name such a method does so with whole updates, and takes the best approximation of the
      sum. That builds each update, of the kernel's size.

    Stacked kernels (scanned layers, experts) are combined place by place. A tree that lacks a kernel, or a layer of it,
    adds nothing there. Updates that start from parts of their kernel (PiSSA, OLoRA) count as the plain ones of rank 2r
    that `jlora.to_plain_lora` makes of them. One tree alone is combined too, but not pruned.

    Pure: it runs under `jax.jit`. ``"cat"`` has gradients in the weights everywhere; the methods of factors have none
    at a weight of zero, where their root is infinitely steep, and those with svd where singular values are equal.

    Args:
      trees: wrapped trees on one base, each adapted kernel of which is a `jlora.LoraParam`.
      weights: a number for each tree, negative ones too; they may be traced.
      method: ``"linear"``, ``"cat"``, ``"svd"``, ``"ties"``, ``"ties_svd"``, ``"dare_linear"``, ``"dare_linear_svd"``,
        ``"dare_ties"``, ``"dare_ties_svd"``, ``"magnitude_prune"`` or ``"magnitude_prune_svd"``.
      density: the share of values that a method with pruning keeps, above 0 and at most 1: ``int(density * n)`` of n by
        magnitude, and each by this chance in DARE, which divides them by it. Other methods do without it.
      majority_sign_method: ``"total"`` has the signs weighed by their values, ``"frequency"`` counted.
      svd_rank: of the result of a method with svd; None: the largest rank in the trees. Of a smaller kernel as much as
        it has.
      key: a PRNG key, for DARE: each kernel's comes from its path. None takes ``jax.random.key(0)``.

    Returns:
      A wrapped tree on the base of the first tree, with a `LoraParam` of scale 1 for each kernel that any tree adapts.
      Its dropout, and the type of its factors, are those of the first tree that has the kernel. All other leaves are
      the first tree's.

    Raises:
      ValueError: if a setting is none of these, the ranks of a kernel differ where a method adds factors, or the trees
        are not on bases of the same shapes.
      TypeError: if a tree is not wrapped, or has something else than plain LoRA: DoRA's magnitudes do not add up, and
        leaves trained in full, biases of updates and trained rows have no update to weigh. PEFT drops these silently.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> wrap = lambda seed: jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=1, seed=seed))
      >>> trained = lambda tree: jax.tree.map(lambda x: x + 0.1, tree)  # stands for training
      >>> one, other = trained(wrap(0)), trained(wrap(1))
      >>> mixed = jlora.adapters.weighted([one, other], [0.7, 0.3], method="cat")
      >>> mixed["kernel"].rank
      2

      Task arithmetic is a matter of weights: this takes back what `other` has learnt.

      >>> less = jlora.adapters.weighted([one, other], [1.0, -1.0], method="svd", svd_rank=1)
      >>> less["kernel"].rank, less["kernel"].scale
      (1, 1.0)

    References:
      PEFT, https://huggingface.co/docs/peft/developer_guides/model_merging;
      Ilharco et al., "Editing Models with Task Arithmetic", arXiv:2212.04089;
      Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv:2306.01708;
      Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch" (DARE),
      arXiv:2311.03099.
    """
    recipe = Recipe(method, density, majority_sign_method, svd_rank)
    if isinstance(trees, (list, tuple)):
        recipe.check(NAME, len(trees))
    paths, columns, treedef = aligned(NAME, trees)
    weights = checked_weights(NAME, weights, len(trees))
    root = _root(recipe, key)
    updates = {path: updates_of(NAME, path, column) for path, column in zip(paths, columns, strict=True)}
    rank = svd_rank or max(_rank(node) for nodes in updates.values() for node in nodes.values())
    makers = Makers()
    made = [
        _node(path, column[0], updates[path], weights, recipe, rank, root, makers) if updates[path] else column[0]
        for path, column in zip(paths, columns, strict=True)
    ]
    return treedef.unflatten(made)


def _root(recipe: Recipe, key: Any) -> jax.Array | None:
    if not recipe.is_random:
        return None
    return jax.random.key(0) if key is None else checked_key(f"{NAME}: key", key)


def _rank(node: LoraParam) -> int:
    return node.rank * (2 if node.start else 1)


def _node(
    path: str,
    leaf: Any,
    nodes: Mapping[int, LoraParam],
    weights: jax.Array,
    recipe: Recipe,
    rank: int,
    root: jax.Array | None,
    makers: Makers,
) -> LoraParam:
    """The node of one kernel, its factors placed as the base is; `leaf` is what the first tree has there."""
    first = next(iter(nodes.values()))
    layers = first.layers if len({node.layers for node in nodes.values()}) == 1 else None
    base = leaf.base if is_node(leaf) else leaf
    _check(path, nodes, recipe)
    program = _program(recipe, rank, tuple(nodes), first.axes, layers, first.dropout)
    args = (
        [_factors(node, layers) for node in nodes.values()],
        [float(node.scale) for node in nodes.values()],
        weights[jnp.asarray(tuple(nodes))],
        _keys(path, first, layers, root),
    )
    return dataclasses.replace(made_beside(base, makers, program, *args), base=base)


def _check(path: str, nodes: Mapping[int, LoraParam], recipe: Recipe) -> None:
    ranks = [_rank(node) for node in nodes.values()]
    node = next(iter(nodes.values()))
    ins, outs = (math.prod(sizes_of(node, word)) for word in ("in", "out"))
    pruned = [(ins, outs)] if recipe.is_of_updates else [(ins, ranks[0]), (ranks[0], outs)]
    recipe.check_factors(NAME, path, ranks, pruned)


def _factors(node: LoraParam, layers: tuple[int, ...] | None) -> tuple[jax.Array, jax.Array]:
    """The factors on these layers; where the node adapts others, zeros on those that it lacks, which add nothing."""
    lora_a, lora_b = from_start(node)
    return (lora_a, lora_b) if node.layers == layers else (node.everywhere(lora_a), node.everywhere(lora_b))


def _keys(path: str, node: LoraParam, layers: tuple[int, ...] | None, root: jax.Array | None) -> jax.Array | None:
    """The key of each place of the batch axes."""
    return None if root is None else keys_of(path, tuple(node.shape), node.axes, layers, root)


def keys_of(
    path: str, shape: tuple[int, ...], axes: Axes, layers: tuple[int, ...] | None, root: jax.Array
) -> jax.Array:
    """The keys of a kernel's places, of shape (batch...), by its path: those from which DARE draws."""
    kernel = Kernel(path, shape, axes, "dot", KernelSpec(rank=1, scale=1.0), layers)
    return kernel.keys(jax.random.fold_in(root, zlib.crc32(path.encode())))


@functools.lru_cache(maxsize=256)
def _program(
    recipe: Recipe, rank: int, places: tuple[int, ...], axes: Axes, layers: tuple[int, ...] | None, dropout: float
) -> Callable[..., LoraParam]:
    """One program for all kernels that are alike: it makes a node without its base."""

    @jax.jit
    def program(pairs: Sequence[Factors], scales: Sequence[float], weights: jax.Array, keys: Any) -> LoraParam:
        of_place = lambda pairs, key: combined(pairs, scales, weights, recipe, rank, places, key)
        lora_a, lora_b = at_each_place(of_place, axes, pairs, keys)
        return LoraParam(None, lora_a, lora_b, axes=axes, dropout=dropout, layers=layers)

    return program
