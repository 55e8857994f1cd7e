"""What a gather does to the axes of its operand: read in one place for those that follow a weight through it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

FILL = lax.GatherScatterMode.FILL_OR_DROP


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A gather's axes, however it was written.

    An axis that is taken whole is not looked up, though the gather may have an index for it, which is zero.

    Args:
      params: those of the equation.
      shape: the operand's.
      ndim: the result's number of axes.
    """

    params: dict[str, Any]
    shape: tuple[int, ...]
    ndim: int

    @property
    def numbers(self) -> Any:
        return self.params["dimension_numbers"]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.params["slice_sizes"])

    @property
    def picked(self) -> set[int]:
        """The axes of which the indices pick one place."""
        return {axis for axis in self._indexed if self.sizes[axis] == 1}

    @property
    def cut(self) -> set[int]:
        """The axes of which a part is taken that is more than one place."""
        return {axis for axis, (size, n) in enumerate(zip(self.sizes, self.shape, strict=True)) if 1 < size < n}

    @property
    def stacked(self) -> set[int]:
        """The axes that go along with one of the indices."""
        return {*self.numbers.operand_batching_dims}

    @property
    def moving(self) -> set[int]:
        """The axes of which what is taken depends on the indices."""
        return {axis for axis in self._indexed if self.sizes[axis] < self.shape[axis]} | self.stacked

    @property
    def _indexed(self) -> set[int]:
        return {axis for axis in self.numbers.start_index_map if self.shape[axis] == 1 or not self.is_whole(axis)}

    def is_whole(self, axis: int) -> bool:
        return self.sizes[axis] == self.shape[axis]

    @property
    def places(self) -> dict[int, int]:
        """Where the operand's axes are in the result, but for those that are picked and gone."""
        numbers = self.numbers
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = [axis for axis in range(len(self.shape)) if axis not in gone]
        of_indices = self._of_indices
        stacked = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        return dict(zip(kept, numbers.offset_dims, strict=True)) | {axis: of_indices[i] for axis, i in stacked}

    @property
    def _of_indices(self) -> list[int]:
        return [place for place in range(self.ndim) if place not in self.numbers.offset_dims]

    @property
    def may_fill(self) -> bool:
        """Whether indices out of bounds give a value of their own."""
        return self.params["mode"] == FILL

    def is_inside(self, indices: Any) -> Any:
        """Which of the indices are in bounds, of the result's number of axes, of size 1 where they have none."""
        last = [self.shape[axis] - self.sizes[axis] for axis in self.numbers.start_index_map]
        indices = indices.astype(jnp.promote_types(indices.dtype, jnp.int32))  # which holds the last one
        is_inside = jnp.all((indices >= 0) & (indices <= jnp.asarray(last, indices.dtype)), axis=-1)
        sizes = dict.fromkeys(range(self.ndim), 1) | dict(zip(self._of_indices, is_inside.shape, strict=True))
        return is_inside.reshape([sizes[place] for place in range(self.ndim)])

    def taken(self, x: Any, owned: tuple[int, ...], indices: Any) -> Any:
        """The same lookup of an array that has the operand's axes in `owned`, size 1 on the others, and one more.

        What is out of bounds is zero, under `may_fill`.
        """
        if not self.moving & {*owned}:
            return self._spread(x, owned)
        numbers, params = self.numbers, self.params
        columns = [k for k, axis in enumerate(numbers.start_index_map) if axis in owned]
        stacked = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        both = [(axis, i) for axis, i in stacked if axis in owned]
        left = [axis for axis in numbers.operand_batching_dims if axis not in owned]
        sizes = [n if axis in owned else 1 for axis, n in enumerate(self.sizes)]
        return lax.gather(
            x,
            indices if len(columns) == indices.shape[-1] else indices[..., columns],
            numbers._replace(
                offset_dims=(*numbers.offset_dims, self.ndim),
                collapsed_slice_dims=tuple(sorted((*numbers.collapsed_slice_dims, *left))),
                start_index_map=tuple(numbers.start_index_map[k] for k in columns),
                operand_batching_dims=tuple(axis for axis, _ in both),
                start_indices_batching_dims=tuple(i for _, i in both),
            ),
            (*sizes, x.shape[-1]),
            mode=params["mode"],
            fill_value=0,
            unique_indices=params["unique_indices"] and self.moving <= {*owned},
            indices_are_sorted=params["indices_are_sorted"] and self.moving <= {*owned},
        )

    def _spread(self, x: Any, owned: tuple[int, ...]) -> Any:
        """An array that the indices do not touch, its axes where the result has them."""
        limits = [self.sizes[axis] if axis in owned else 1 for axis in range(len(self.shape))]
        x = lax.slice_in_dim(x, 0, x.shape[-1], axis=-1) if limits == [*x.shape[:-1]] else _cut(x, limits)
        where = {axis: place for axis, place in self.places.items() if axis not in self.stacked}
        order = sorted(where, key=where.__getitem__)
        gone = [axis for axis in range(len(self.shape)) if axis not in where]
        ordered = lax.transpose(x, (*order, *gone, len(self.shape)))
        sizes = dict.fromkeys(range(self.ndim), 1) | {where[axis]: x.shape[axis] for axis in order}
        return ordered.reshape(*sizes.values(), x.shape[-1])


def _cut(x: Any, limits: list[int]) -> Any:
    return lax.slice(x, [0] * x.ndim, [*limits, x.shape[-1]])
