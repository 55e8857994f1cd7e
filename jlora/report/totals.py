"""Counts and bytes of a tree, and of what trains in it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jlora.qarray import is_qarray, nbits
from jlora.tree import TRAINABLE, labels


@dataclasses.dataclass(frozen=True)
class Totals:
    """Parameters and bits, of what trains and of all; bits a weight of what is quantised."""

    trained: int
    all: int
    trained_bits: int
    all_bits: int
    quantised: tuple[int, float] | None

    @classmethod
    def of(cls, tree: Any) -> Totals:
        arrays = [x for x in jax.tree.leaves(tree, is_leaf=is_qarray) if hasattr(x, "dtype")]
        trained = [x for x, mark in zip(*map(jax.tree.leaves, (tree, labels(tree))), strict=True) if mark == TRAINABLE]
        codes = [x for x in arrays if is_qarray(x)]
        bits = sum(map(nbits, codes)) / max(sum(map(size, codes)), 1)
        sums = [sum(map(measure, part)) for measure in (size, nbits) for part in (trained, arrays)]
        return cls(*sums, quantised=(len(codes), bits) if codes else None)

    @property
    def percent(self) -> float:
        return 100 * self.trained / max(self.all, 1)

    def lines(self) -> tuple[str, ...]:
        line = (
            f"trainable {self.trained:,} of {short(self.all)}, {self.percent:.2f}%; "
            f"{in_bytes(self.trained_bits / 8)} of {in_bytes(self.all_bits / 8)}"
        )
        if self.quantised is None:
            return (line,)
        count, bits = self.quantised
        return line, f"quantised: {count} {'leaf' if count == 1 else 'leaves'}, {bits:.2f} bits a weight"


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
