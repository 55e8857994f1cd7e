"""What of a wrapped tree is adapted, and what trains."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jlora.checks import check_whole
from jlora.nodes import is_node, is_unit
from jlora.paths import flatten
from jlora.qarray import is_qarray
from jlora.report.html import Item, page
from jlora.report.text import Table
from jlora.report.totals import Totals, size
from jlora.tree import TRAINABLE, labels


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Table):
    """The table of `summary`: a row for each wrapped leaf; in a notebook a foldable tree of all leaves."""

    items: tuple[Item, ...] = ()
    percent: float = 0.0

    def _repr_html_(self) -> str:
        return page(self.items, self.footer, self.percent)


def summary(tree: Any) -> Summary:
    """What of a wrapped tree is adapted and what trains: shapes, ranks, parameters, percent, bytes.

    Prints as text of at most 80 columns; the last expression of a notebook's cell shows as a tree that folds.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
      >>> jlora.summary(jlora.wrap(params, jlora.LoraSpec(rank=2)))
      path          shape     adapter  rank  scale  trainable
      dense/kernel  (64, 32)  lora     2     8      192
      trainable 192 of 2,272, 8.45%; 768 B of 8.9 KiB
    """
    paths, leaves, _ = flatten(tree, is_unit)
    named = list(zip(paths, leaves, strict=True))
    for path, leaf in named:
        if is_node(leaf):
            check_whole("summary", path, leaf)
    rows = {path: _row(path, leaf) for path, leaf in named if is_node(leaf)}
    items = [_item(path, leaf, rows.get(path)) for path, leaf in named if hasattr(leaf, "shape")]
    totals = Totals.of(tree)
    header = ("path", "shape", "adapter", "rank", "scale", "trainable")
    return Summary(header, tuple(rows.values()), totals.lines(), tuple(items), totals.percent)


def _row(path: str, node: Any) -> tuple[str, ...]:
    settings = node.settings
    rank, scale = str(settings.get("rank", "")), f"{settings['scaling']:g}" if "scaling" in settings else ""
    return path, str(tuple(node.shape)), _kind(node), rank, scale, f"{_trained(node):,}"


def _item(path: str, leaf: Any, row: tuple[str, ...] | None) -> Item:
    """A leaf of the page; of a wrapped one with what its row says."""
    whole = sum(size(x) for x in jax.tree.leaves(leaf, is_leaf=is_qarray))
    if row is None:
        return Item(path, "", "", (str(tuple(leaf.shape)), _type(leaf)), all=whole)
    _, shape, kind, rank, scale, trained = row
    facts = (shape, _type(leaf.base), rank and f"rank {rank}", scale and f"scale {scale}", f"{trained} train")
    return Item(path, "whole" if kind == "in full" else "adapted", kind, facts, _trained(leaf), whole)


def _kind(node: Any) -> str:
    return type(node).__name__.removesuffix("Param").lower().replace("trainable", "in full")


def _type(leaf: Any) -> str:
    return str(leaf.qtype) if is_qarray(leaf) else str(leaf.dtype)


def _trained(node: Any) -> int:
    return sum(jax.tree.leaves(jax.tree.map(lambda x, m: size(x) if m == TRAINABLE else 0, node, labels(node))))
