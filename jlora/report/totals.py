"""Parameters and bytes, of a tree and of what trains in it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from jlora.nodes.qarray import is_qarray, nbits
from jlora.tree import TRAINABLE, labels


class Totals(NamedTuple):
    """Of what trains and of all.

    Args:
      trained, parameters: counts.
      trained_bytes, all_bytes: sizes, in bytes.
      quantised: how many leaves are.
      bits: that one of their weights takes.
    """

    trained: int
    parameters: int
    trained_bytes: float
    all_bytes: float
    quantised: int
    bits: float

    @property
    def percent(self) -> float:
        return 100 * self.trained / max(self.parameters, 1)

    @property
    def lines(self) -> tuple[str, ...]:
        line = (
            f"trainable {self.trained:,} of {short(self.parameters)}, {self.percent:.2f}%; "
            f"{in_bytes(self.trained_bytes)} of {in_bytes(self.all_bytes)}"
        )
        return (line, self.bases) if self.quantised else (line,)

    @property
    def bases(self) -> str:
        return (
            f"quantised: {self.quantised} {'leaf' if self.quantised == 1 else 'leaves'}, {self.bits:.2f} bits a weight"
        )


def totals(tree: Any) -> Totals:
    """Sums up a wrapped tree."""
    arrays = [x for x in jax.tree.leaves(tree, is_leaf=is_qarray) if hasattr(x, "dtype")]
    trained = [x for x, mark in zip(*map(jax.tree.leaves, (tree, labels(tree))), strict=True) if mark == TRAINABLE]
    quantised = [x for x in arrays if is_qarray(x)]
    count = lambda part: sum(map(size, part))
    bits = lambda part: sum(map(nbits, part))
    each = bits(quantised) / max(count(quantised), 1)
    return Totals(count(trained), count(arrays), bits(trained) / 8, bits(arrays) / 8, len(quantised), each)


def size(x: Any) -> int:
    return math.prod(x.shape)


def short(n: float, giga: str = "B") -> str:
    """A count: of parameters, whose thousand millions are B, or of FLOPs, whose are G."""
    for unit, part in (("T", 1e12), (giga, 1e9), ("M", 1e6)):
        if n >= part:
            return f"{n / part:.1f}{unit}"
    return f"{int(n):,}"


def in_bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
