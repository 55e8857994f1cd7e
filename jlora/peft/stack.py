"""The parts of a leaf, put at their places on its stacked axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.peft.names import Slot


class Piece(NamedTuple):
    """The part of a leaf that a module is, and what the adapter has for it."""

    name: str
    slot: Slot
    value: Any


def fixed_axes(path: str, pieces: list[Piece]) -> tuple[int, ...]:
    """The axes on which the parts of a leaf are."""
    found = {p.slot.fixed for p in pieces}
    if len(found) > 1:
        raise ValueError(f"peft.load: the map takes {path} apart in two ways, on axes {' and '.join(map(str, found))}")
    return found.pop()


def padded(x: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """A factor with zeros up to a rank."""
    widths = [(0, rank - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return np.pad(x, widths) if x.shape[axis] < rank else x


@dataclasses.dataclass(frozen=True)
class Stack:
    """Puts arrays at their places on stacked axes, which come first; zero where there is none.

    Args:
      path: of the leaf.
      places: of the arrays.
      sizes: of the stacked axes.
      layers: which places there are on the first of them; None: all.
    """

    path: str
    places: list[tuple[int, ...]]
    sizes: tuple[int, ...]
    layers: tuple[int, ...] | None

    @classmethod
    def of(cls, path: str, pieces: list[Piece], fixed: tuple[int, ...], shape: Sequence[int]) -> Stack:
        places: Any = [tuple(piece.slot.index[axis] for axis in fixed) for piece in pieces]
        sizes = [shape[axis] for axis in fixed]
        there = sorted({place[0] for place in places if place})
        layers = None if not fixed or len(there) == sizes[0] else tuple(there)
        if layers is not None:
            sizes[0] = len(layers)
        return cls(path, places, tuple(sizes), layers)

    def __call__(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        if not self.sizes:
            return arrays[0]
        stacked = np.zeros((*self.sizes, *arrays[0].shape), np.float32)
        for array, (first, *rest) in zip(arrays, self.places, strict=True):
            stacked[(first if self.layers is None else self.layers.index(first), *rest)] = array
        return stacked

    def whole(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The same of arrays that can't be zero."""
        if len({*self.places}) < math.prod(self.sizes):
            raise ValueError(
                f"peft.load: DoRA's magnitudes are there for some parts of {self.path}, and not for others"
            )
        return self(arrays)
