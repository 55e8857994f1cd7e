"""Adapters that every server reads: plain LoRA of one rank, whose scale is 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora.nodes.fields import mapped, matrices, sizes_of
from jlora.nodes.node import is_node
from jlora.peft.adapter import EMBEDDING, LINEAR, Adapter, Update
from jlora.peft.collect import Collected
from jlora.peft.write import tied_table, within
from jlora.targets.paths import flatten
from jlora.tree import merge
from jlora.variants.lora import LoraParam

MERGED = "Write the merged model, jlora.peft.to_safetensors(tree, directory) or jlora merge"
NEAREST = "; or the nearest plain update, jlora.peft.low_rank(tree, rank), which tells its error"
DORA = "DoRA's magnitudes"
ITSELF = "; or save without portable=True, for PEFT itself"


def portable(collected: Collected) -> Collected:
    """The adapter with every scale folded into B and zeros up to the largest rank, in all layers of a kind.

    What servers fuse with an adapted kernel has zeros too: SGLang takes none of q, k and v without the others.

    Raises:
      ValueError: if it has what such files can't say.
    """
    adapter = collected.adapter
    _check(adapter, collected.known)
    rank = max(update.rank for update in adapter.updates.values())
    updates = {name: _folded(update, rank) for name, update in adapter.updates.items()}
    updates |= {name: _nothing(rank, *sizes) for name, sizes in collected.siblings.items()}
    twins = {within(name): update for name, update in updates.items()}
    missing = [name for name, is_kernel in collected.known.items() if is_kernel and name not in updates]
    zeros = {name: _zeros(twins[within(name)]) for name in missing if within(name) in twins and within(name) != name}
    return dataclasses.replace(
        collected, adapter=dataclasses.replace(adapter, updates=updates | zeros, dropout=0.0, conv1d=None), frozen={}
    )


def _check(adapter: Adapter, known: Mapping[str, bool]) -> None:
    if adapter.form is not None:
        raise ValueError(
            f"peft.save: portable=True writes plain LoRA, which vLLM, SGLang and llama.cpp read; this adapter has the "
            f"form of {adapter.form.method}. Load it onto its base, and save the tree with portable=True"
        )
    faults: dict[str, Any] = {
        DORA: [name for name, update in adapter.updates.items() if update.magnitude is not None],
        "biases of updates": [name for name, update in adapter.updates.items() if update.bias is not None],
        "updates of convolutions or stacked experts": [
            name for name, update in adapter.updates.items() if update.kind not in (LINEAR, EMBEDDING)
        ],
        "leaves trained in full": [*adapter.full],
        "trained rows of tables": [*adapter.tokens],
        "an update of a table that is the head too": [t for t in [tied_table(known)] if t in adapter.updates],
    }
    for what, names in faults.items():
        if names:
            nearest = NEAREST if what == DORA else ""
            raise ValueError(
                f"peft.save: portable=True writes plain LoRA, which vLLM, SGLang and llama.cpp read; this adapter has "
                f"{what}, at {names[0]}. {MERGED}{nearest}{ITSELF}"
            )
    if not adapter.updates:
        raise ValueError("peft.save: the tree has no low-rank updates")


def _folded(update: Update, rank: int) -> Update:
    pad = rank - update.rank
    a = np.pad(update.a.astype(np.float32), ((0, pad), (0, 0)))
    b = np.pad(update.b.astype(np.float32) * np.float32(update.scale), ((0, 0), (0, pad)))
    return dataclasses.replace(update, a=a, b=b, scale=1.0)


def _zeros(update: Update) -> Update:
    return dataclasses.replace(update, a=np.zeros_like(update.a), b=np.zeros_like(update.b))


def _nothing(rank: int, ins: int, outs: int) -> Update:
    return Update(LINEAR, np.zeros((rank, ins), np.float32), np.zeros((outs, rank), np.float32), 1.0)


def low_rank(tree: Any, rank: int) -> tuple[Any, dict[str, float]]:
    """The nearest plain LoRA of a rank to what a wrapped tree stands for, by the singular values of each update.

    It is for DoRA, OFT, IA3 and their like, or for an adapter whose rank a server does not take. Each update is built,
    of the kernel's size.

    Args:
      tree: a wrapped tree, with values.
      rank: of the new factors; of a smaller kernel as much as it has.

    Returns:
      The tree with a `jlora.LoraParam` of scale 1 for each adapted kernel, and for the path of each the error: the norm
      of what is lost over the norm of the update, 0 to 1.

    Raises:
      ValueError: if the rank is no positive integer, the tree is one half of `jlora.partition`, or it holds several
        adapters.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = jlora.wrap({"kernel": jnp.eye(4)}, jlora.LoraSpec(rank=2, variant="dora"))
      >>> plain, errors = jlora.peft.low_rank(params, rank=2)
      >>> errors
      {'kernel': 0.0}
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"peft.low_rank: rank must be a positive integer, found {rank!r}")
    paths, leaves, treedef = flatten(tree, is_node)
    errors: dict[str, float] = {}

    def made(path: str, leaf: Any) -> Any:
        if not is_node(leaf) or not hasattr(leaf, "axes") or not hasattr(leaf, "layers"):
            return leaf
        node, error = _nearest(path, leaf, rank)
        errors[path] = error
        return node

    return treedef.unflatten([made(path, leaf) for path, leaf in zip(paths, leaves, strict=True)]), errors


def _nearest(path: str, node: Any, rank: int) -> tuple[LoraParam, float]:
    merged = merge({path: node}, dtype=jnp.float32)[path]
    delta = matrices(node, merged - jnp.asarray(node.base, jnp.float32))
    rank = min(rank, *delta.shape[-2:])
    u, s, vt = mapped(node, lambda matrix: jnp.linalg.svd(matrix, full_matrices=False), delta)
    root = jnp.sqrt(s[..., :rank])
    of = lambda word: sizes_of(node, word)
    lora_a = (u[..., :rank] * root[..., None, :]).reshape(*of("batch"), *of("in"), rank)
    lora_b = (root[..., None] * vt[..., :rank, :]).reshape(*of("batch"), rank, *of("out"))
    whole, lost = jnp.linalg.norm(s.ravel()), jnp.linalg.norm(s[..., rank:].ravel())
    error = float(jnp.where(whole > 0, lost / jnp.where(whole > 0, whole, 1), 0.0))
    return LoraParam(node.base, lora_a, lora_b, axes=node.axes, layers=node.layers), error
