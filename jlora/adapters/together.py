"""The arrays of several adapters of one kernel as one: with zeros for ranks and layers that others have more."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.adapters.dims import array_fields, axis_of, layers_of, place_of, rank_of, stored_order, total_layers
from jlora.adapters.stacked import SEVERAL, Member, stacked_class


def of_nodes(path: str, nodes: Mapping[int, Any], count: int, base: Any) -> Any:
    """The node of a kernel that is adapted by some."""
    some: Any = next(iter(nodes.values()))
    layers = {i: layers_of(node) for i, node in nodes.items()}
    every = tuple(sorted({*itertools.chain(*layers.values())}))
    ranks = [rank for node in nodes.values() if (rank := rank_of(node)) is not None]
    within = _Within(path, nodes, layers, every, max(ranks, default=0), count)
    arrays = {f.name: within.field(f) for f in array_fields(type(some))}
    statics = {f.name: getattr(some, f.name) for f in dataclasses.fields(some) if f.metadata.get("static")}
    scales = {i: getattr(node, "scale", None) for i, node in nodes.items()}
    rates = {getattr(node, "dropout", None) for node in nodes.values()}
    statics |= {"dropout": SEVERAL} if len(rates) > 1 else {}
    statics |= {"layers": None if every == total_layers(some) else every} if "layers" in statics else {}
    return stacked_class(type(some))(
        base=base,
        **arrays,
        **statics,
        scales=_scales(scales, count),
        present=within.present(),
        members=tuple(Member.of(nodes[i]) if i in nodes else None for i in range(count)),
    )  # type: ignore[call-arg]


def _scales(scales: Mapping[int, Any], count: int) -> tuple[Any, ...]:
    """An array of them where they differ."""
    values = {*scales.values()}
    return () if len(values) == 1 else (jnp.asarray([scales.get(i, 1.0) for i in range(count)], jnp.float32),)


class _Within(NamedTuple):
    """The adapters of one kernel, by number.

    Args:
      layers: which each has, and `every` one that some have.
      rank: the largest.
      count: of the adapters, those that have nothing here among them.
    """

    path: str
    nodes: Mapping[int, Any]
    layers: Mapping[int, tuple[int, ...]]
    every: tuple[int, ...]
    rank: int
    count: int

    def field(self, f: dataclasses.Field) -> Any:
        """A field of all, with the axis of the adapters."""
        values = {i: getattr(node, f.name) for i, node in self.nodes.items()}
        trains, dims = f.metadata["trained"], f.metadata.get("dims", "")
        absent = [isinstance(value, tuple) and not value for value in values.values()]
        if not isinstance(dims, tuple) and all(absent):
            return ()
        if not isinstance(dims, tuple) and any(absent):
            raise ValueError(
                f"stack: of {self.path} some adapters have {f.name}, and others have none: give all the same options"
            )
        if not isinstance(dims, tuple):
            return self.part(f.name, dims, trains, values)
        of_part = lambda n: {i: value[n] for i, value in values.items() if len(value) > n}
        return tuple(self.part(f.name, dims[n], trains, of_part(n)) for n in range(max(map(len, values.values()))))

    def part(self, name: str, dims: str, trains: bool, given: Mapping[int, Any]) -> Any:
        """An array of all: zeros where an adapter has none, or what is frozen beside the base."""
        arrays = {i: self._of_rank(dims, x) for i, x in given.items()}
        if dims.startswith("batch"):
            arrays = {i: self._of_every_layer(i, arrays, trains) for i in arrays}
        shapes = {x.shape for x in arrays.values()}
        if len(shapes) > 1:
            raise ValueError(
                f"stack: {name} of {self.path} has shapes {sorted(x.shape for x in given.values())}, which differ in "
                "more than the rank; such adapters can't be stacked"
            )
        first = next(iter(arrays.values()))
        blank = jnp.zeros_like(first) if trains else first
        order = stored_order(self._some, dims) or list(range(first.ndim))
        moved = [lax.transpose(arrays.get(i, blank), order) for i in range(self.count)]
        return jnp.stack(moved, place_of(self._some, dims))

    @property
    def _some(self) -> Any:
        return next(iter(self.nodes.values()))

    def _of_rank(self, dims: str, x: Any) -> Any:
        """An array with zeros for the ranks that others have more."""
        axis = axis_of(self._some, dims, "rank")
        missing = 0 if axis is None else self.rank - x.shape[axis]
        if not missing:
            return x
        if not type(self._some).LINEAR:
            ranks = sorted({rank_of(node) or 0 for node in self.nodes.values()})
            raise ValueError(
                f"stack: adapters of {self.path} have ranks {ranks}, and "
                f"{type(self._some).__name__} does not say that ranks of zeros add nothing (LINEAR): give all one rank"
            )
        return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

    def _of_every_layer(self, i: int, arrays: Mapping[int, Any], trains: bool) -> Any:
        """An array with the layers that others have more: zeros, or what is frozen there."""
        if self.layers[i] == self.every:
            return arrays[i]
        of = lambda j, layer: arrays[j][self.layers[j].index(layer)]
        having = lambda layer: next(j for j in arrays if layer in self.layers[j])
        blank = jnp.zeros_like(arrays[i][0])
        spare = lambda layer: blank if trains else of(having(layer), layer)
        return jnp.stack([of(i, layer) if layer in self.layers[i] else spare(layer) for layer in self.every])

    def present(self) -> tuple[Any, ...]:
        """Which adapters have something here, by place of the batch axes; nothing if all have."""
        there = np.array([[layer in self.layers.get(i, ()) for i in range(self.count)] for layer in self.every])
        if there.all():
            return ()
        batch = getattr(getattr(self._some, "axes", None), "batch_axis", ())
        sizes = [len(self.every), *(self._some.shape[axis] for axis in batch[1:])] if batch else []
        there = there.reshape(-1, *[1] * max(len(batch) - 1, 0), self.count) if batch else there[0]
        return (jnp.asarray(np.broadcast_to(there, (*sizes, self.count)), jnp.float32),)
