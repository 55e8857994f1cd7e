"""What of a wrapped tree is adapted, and what trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jlora.nodes.checks import check_whole
from jlora.nodes.node import TrainableParam, is_node, is_unit
from jlora.nodes.qarray import is_qarray
from jlora.report.groups import grouped, name_of, some_of, title
from jlora.report.html import Row, page, trained_gauges
from jlora.report.text import Table, with_counts
from jlora.report.totals import Totals, size, totals
from jlora.targets.paths import flatten
from jlora.tree import TRAINABLE, labels

FULL = "in full"


class Leaf(NamedTuple):
    """A leaf of the tree.

    Args:
      path, shape, dtype: of the leaf; the type is the codes' where it is quantised.
      adapter: the variant, `FULL`, or nothing where it is frozen.
      rank, scale: None where the variant has none.
      trained, parameters: how many numbers train, and are there.
      note: its dropout, and the layers of a stack that are adapted.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    adapter: str
    rank: int | None
    scale: float | None
    trained: int
    parameters: int
    note: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Table):
    """The table of `summary`: a row for each leaf that is adapted or trained in full.

    Args:
      totals: parameters and bytes.
      leaves: every leaf, frozen ones too, as a notebook shows them.
    """

    totals: Totals | None = None
    leaves: tuple[Leaf, ...] = ()

    def _text(self) -> tuple[Sequence[Sequence[str]], Sequence[str]]:
        """Leaves that are alike but for numbers in their paths are one row, with what trains in all of them."""
        wrapped = [leaf for leaf in self.leaves if leaf.adapter]
        found: Any = grouped((name_of(leaf.path), 1, leaf._replace(path="", parameters=0)) for leaf in wrapped)
        rows = [_cells(leaf._replace(path=title(name), trained=count * leaf.trained)) for name, count, leaf in found]
        return with_counts(self.header, rows, [n for _, n, _ in found]), ["", *(leaf.note for *_, leaf in found)]

    def _repr_html_(self) -> str:
        gauges = trained_gauges(self.totals) if self.totals else []
        return page([(leaf.path, _row(leaf)) for leaf in self.leaves], gauges)


def summary(tree: Any) -> Summary:
    """What of a wrapped tree is adapted and what trains: shapes, ranks, parameters, percent, bytes.

    Percent are of all that the tree holds, the adapters among it, as PEFT counts. Bytes are those of the arrays, with
    1 KiB = 1024 B.

    Prints as text of eighty columns, where layers that are alike share a row; in a notebook it shows as a tree that
    folds, of all leaves. `rows` has every wrapped leaf.

    Args:
      tree: a wrapped tree, of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
      A `Summary`, which prints as a table. `totals` has the sums as numbers, `leaves` every leaf of the tree.

    Raises:
      ValueError: if a node lacks arrays, as in one half of `jlora.partition`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)}}
      >>> jlora.summary(jlora.wrap(params, jlora.LoraSpec(rank=2)))
      path          shape     adapter  rank  scale  trainable
      dense/kernel  (64, 32)  lora     2     8      192
      trainable 192 of 2,272, 8.45%; 768 B of 8.9 KiB

      >>> params = {f"layer_{i}": params for i in range(12)}
      >>> jlora.summary(jlora.wrap(params, jlora.LoraSpec(rank=2)))
      path                        count  shape     adapter  rank  scale  trainable
      layer_{0..11}/dense/kernel  12x    (64, 32)  lora     2     8      2,304
      trainable 2,304 of 27,264, 8.45%; 9.0 KiB of 106.5 KiB
    """
    paths, leaves, _ = flatten(tree, is_unit)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_node(leaf):
            check_whole("summary", path, leaf)
    told = [_leaf(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if hasattr(leaf, "shape")]
    sums = totals(tree)
    header = ("path", "shape", "adapter", "rank", "scale", "trainable")
    return Summary(header, tuple(_cells(leaf) for leaf in told if leaf.adapter), sums.lines, sums, tuple(told))


def _leaf(path: str, leaf: Any) -> Leaf:
    shape = tuple(leaf.shape)
    if not is_node(leaf):
        return Leaf(path, shape, _type(leaf), "", None, None, 0, size(leaf))
    kind = FULL if isinstance(leaf, TrainableParam) else _kind(leaf)
    rank, scale = (leaf.settings.get(name) for name in ("rank", "scaling"))
    trained = jax.tree.leaves(jax.tree.map(lambda x, m: size(x) if m == TRAINABLE else 0, leaf, labels(leaf)))
    count = sum(size(x) for x in jax.tree.leaves(leaf, is_leaf=is_qarray))
    return Leaf(path, shape, _type(leaf.base), kind, rank, scale, sum(trained), count, _note(leaf))


def _kind(node: Any) -> str:
    """The variant, and of how many adapters (`jlora.adapters.stack`)."""
    of = getattr(node, "of", type(node))
    kind = FULL if of is TrainableParam else of.__name__.removesuffix("Param").lower()
    return f"{len(node.members)}x {kind}" if of is not type(node) else kind


def _note(node: Any) -> str:
    layers = getattr(node, "layers", None)
    dropout = f"dropout {node.dropout:g}" if getattr(node, "dropout", 0) > 0 else ""
    some = f"layers {some_of(layers)} of {node.shape[node.axes.batch_axis[0]]}" if layers is not None else ""
    return "; ".join(filter(None, (_members(node), dropout, some)))


def _members(node: Any) -> str:
    """What adapters that stand together have of their own."""
    members = getattr(node, "members", ())
    told = lambda name, x: None if x is None else getattr(x, name)
    ranks, scales = ([told(name, x) for x in members] for name in ("rank", "scale"))
    listed = lambda xs: ", ".join("none" if x is None else f"{x:g}" for x in xs)
    rank = f"ranks {listed(ranks)}, filled up to one with zeros, which count" if len({*ranks}) > 1 else ""
    return "; ".join(filter(None, (rank, f"scales {listed(scales)}" if len({*scales}) > 1 else "")))


def _type(leaf: Any) -> str:
    return str(leaf.qtype if is_qarray(leaf) else leaf.dtype)


def _cells(leaf: Leaf) -> tuple[str, ...]:
    scale = "" if leaf.scale is None else f"{leaf.scale:g}"
    rank = "" if leaf.rank is None else str(leaf.rank)
    return leaf.path, str(leaf.shape), leaf.adapter, rank, scale, f"{leaf.trained:,}"


def _row(leaf: Leaf) -> Row:
    _, shape, kind, rank, scale, _ = _cells(leaf)
    facts = [shape, leaf.dtype, *(f"{name} {value}" for name, value in (("rank", rank), ("scale", scale)) if value)]
    mark = ("full" if kind == FULL else "adapted") if kind else ""
    facts += [leaf.note] if leaf.note else []
    return Row(mark, kind or "frozen", tuple(facts), leaf.trained, leaf.parameters)
