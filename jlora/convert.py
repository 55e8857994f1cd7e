"""From one wrapped tree to another: plain LoRA of any low-rank variant, and ReLoRA's restarts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora.interpret.factored import Factored
from jlora.nodes.checks import check_fit
from jlora.nodes.kernel import Kernel
from jlora.nodes.makers import Makers
from jlora.nodes.node import AdaptedParam, TrainableParam, is_node
from jlora.nodes.qarray import is_qarray
from jlora.spec import LoraSpec
from jlora.targets.paths import flatten
from jlora.targets.plan import Adapted
from jlora.tree import merge, partition
from jlora.variants.bias import GainedBiasParam, LoraBiasParam
from jlora.variants.lora import LoraParam
from jlora.variants.tokens import TokensParam
from jlora.wrap import adapt


def to_plain_lora(tree: Any) -> Any:
    """Turns every low-rank update into that of a `jlora.LoraParam` on the same base: what every other tool reads.

    Factors that started from parts of the kernel (PiSSA, OLoRA, MiLoRA, LoRA-GA) become plain ones of rank 2r; LoHa's,
    LoKr's, VeRA's and AdaLoRA's the two that they are computed with. The function that the tree stands for is the same.

    Args:
      tree: a wrapped tree.

    Returns:
      The tree with a `LoraParam` without a start for each of them; leaves trained in full, biases and rows of tables
      stay.

    Raises:
      ValueError: if a node is no low-rank update of its base (DoRA, IA3, OFT), or lacks some of its arrays, as in one
        half of `jlora.partition`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> spec = jlora.LoraSpec(rank=1, alpha=1, init="pissa")
      >>> params = jlora.wrap({"kernel": jnp.arange(12.0).reshape(4, 3)}, spec)
      >>> jlora.to_plain_lora(params)["kernel"].rank
      2
    """
    paths, leaves, treedef = flatten(tree, is_node)
    others = (TrainableParam, LoraBiasParam, GainedBiasParam, TokensParam)
    is_update = lambda leaf: is_node(leaf) and not isinstance(leaf, others)
    made = [plain("to_plain_lora", path, x) if is_update(x) else x for path, x in zip(paths, leaves, strict=True)]
    return treedef.unflatten(made)


def plain(where: str, path: str, node: Any) -> LoraParam:
    """A node that is a low-rank update of its base, as that of `LoraParam`; errors name `where`."""
    check_fit(where, path, node)
    if isinstance(node, LoraParam) and not node.start:
        return node
    weight = node.effective(path, None)
    if not isinstance(weight, Factored) or weight.roles != ("a", "b"):
        raise ValueError(
            f"{where}: {path} is a {type(node).__name__}, which is no low-rank update of its base; jlora.merge "
            "gives the kernel itself"
        )
    a, b = weight.laid_out().factors
    axes = node.axes
    lora_a = _taken(a, (*axes.batch_axis, *axes.in_axis), node)
    lora_b = jnp.moveaxis(_taken(b, (*axes.batch_axis, *axes.out_axis), node), -1, len(axes.batch_axis))
    return LoraParam(node.base, lora_a, lora_b, axes=axes, scale=weight.scale, dropout=weight.dropout)


def _taken(factor: jax.Array, order: tuple[int, ...], node: AdaptedParam) -> jax.Array:
    """The named axes of a factor that stands beside the base, whole, and the rank."""
    shape = [node.shape[axis] if axis in order else 1 for axis in range(node.ndim)]
    gone = [axis for axis in range(node.ndim) if axis not in order]
    whole = jnp.broadcast_to(factor, (*shape, factor.shape[-1]))
    return lax.transpose(whole, (*order, *gone, node.ndim)).reshape(*(node.shape[axis] for axis in order), -1)


def fold_and_restart(tree: Any, *, key: jax.Array | None = None) -> Any:
    """Merges every adapter into its base and starts it anew, as ReLoRA does: the rank of the sum of all updates grows.

    Pure, and runs under jit. The optimizer's state is best started anew too: ``state = tx.init(params)``.

    Args:
      tree: a wrapped tree.
      key: of the new factors; None takes one from the adapters' own values, so that each restart has another.

    Returns:
      A tree of the same structure that stands for the same function; leaves trained in full and rows of tables stay.

    Raises:
      ValueError: if a base is quantised.
      TypeError: if nothing in the tree is wrapped.

    Warns:
      MergePrecisionWarning: as `jlora.merge`, if the base's type is too coarse for an update.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
      >>> params = jlora.fold_and_restart(params)
      >>> float(abs(params["kernel"].lora_b).max())
      0.0

    References:
      Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv:2307.05695.
    """
    for path, leaf in zip(*flatten(tree, is_node)[:2], strict=True):
        if is_node(leaf) and is_qarray(leaf.base):
            raise ValueError(
                f"fold_and_restart: the base of {path} is quantised, and each restart would round it again; "
                "jlora.quant.requantize(tree) tells what that loses, and jlora.wrap starts anew on its result"
            )
    merged = jax.tree.leaves(merge(tree))
    paths, leaves, treedef = flatten(tree, is_node)
    key = _own_key(tree) if key is None else key
    makers = Makers()
    return treedef.unflatten([_again(*each, key, makers) for each in zip(paths, leaves, merged, strict=True)])


def _own_key(tree: Any) -> jax.Array:
    trained = jax.tree.leaves(partition(tree)[0])
    bits = [lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).sum() for x in trained]
    return jax.random.fold_in(jax.random.key(0), sum(bits[1:], bits[0]))


def _again(path: str, node: Any, merged: Any, key: jax.Array, makers: Makers) -> Any:
    if isinstance(node, LoraBiasParam):
        return dataclasses.replace(node, base=merged, lora_bias=jnp.zeros_like(node.lora_bias))
    if isinstance(node, GainedBiasParam):
        return dataclasses.replace(node, base=merged, gain=jnp.ones_like(node.gain))
    if isinstance(node, TokensParam):
        return dataclasses.replace(node, base=merged)
    if not is_node(node) or isinstance(node, TrainableParam):
        return merged if not is_node(node) else node
    spec = LoraSpec(**{"variant": type(node), "dtype": _dtype(node)} | node.settings)  # type: ignore[arg-type]
    kernel = Kernel(path, tuple(node.shape), node.axes, "dot", spec.kernel, getattr(node, "layers", None))
    return adapt(merged, Adapted(spec.node, kernel), key, makers)


def _dtype(node: AdaptedParam) -> Any:
    return jax.tree.leaves(partition({"kernel": node})[0])[0].dtype
