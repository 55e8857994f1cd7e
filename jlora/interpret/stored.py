"""Views that the arrays of a quantised weight can follow: each rule gives a `QArray`, or None where they can't.

On every axis an array has the weight's size, or a count of tiles that divides it. So a view of the weight is nearly the
same view of each array, unless it cuts a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora.interpret import compat
from jlora.interpret.lookup import Lookup
from jlora.interpret.manual import same_everywhere, varying
from jlora.interpret.places import entries, names


def mapped(stored: Any, change: Callable[[Any], Any]) -> list[Any] | None:
    """A `QArray` of which each array is changed; None if one of them can't be."""
    leaves, treedef = jax.tree.flatten(stored)
    changed = [change(x) for x in leaves]
    return None if any(x is None for x in changed) else [treedef.unflatten(changed)]


def each(eqn: Any, stored: Any) -> list[Any] | None:
    """The same of every array: transposed, copied, without axes of size 1, handed on to other devices."""
    return mapped(stored, lambda x: compat.bind(eqn, [x]))


def slice_(eqn: Any, stored: Any) -> list[Any] | None:
    params = eqn.params
    return _sliced(stored, params["start_indices"], params["limit_indices"], params["strides"] or (1,) * stored.ndim)


def _sliced(stored: Any, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int]) -> list[Any] | None:
    def change(x: Any) -> Any:
        cuts = [_cut(*at) for at in zip(stored.shape, x.shape, starts, limits, strides, strict=True)]
        return None if None in cuts else lax.slice(x, *zip(*cuts, strict=True))  # type: ignore[arg-type]

    return mapped(stored, change)


def _cut(n: int, count: int, start: int, limit: int, stride: int) -> tuple[int, int, int] | None:
    """The slice of `count` tiles that is one of n elements; None if it cuts a tile."""
    if count == n:
        return start, limit, stride
    if (start, limit, stride) == (0, n, 1):
        return 0, count, 1
    tile = n // count
    return (start // tile, limit // tile, 1) if stride == 1 and start % tile == limit % tile == 0 else None


def split(eqn: Any, stored: Any) -> list[Any] | None:
    axis, shape, start, pieces = eqn.params["axis"], list(stored.shape), 0, []
    for size in eqn.params["sizes"]:
        starts, limits = [0] * len(shape), list(shape)
        starts[axis], limits[axis] = start, start + size
        piece = _sliced(stored, starts, limits, [1] * len(shape))
        if piece is None:
            return None
        pieces += piece
        start += size
    return pieces


def unstack(eqn: Any, stored: Any) -> list[Any] | None:
    axis = eqn.params["axis"]
    n = stored.shape[axis]
    pick = lambda i: lambda x: lax.index_in_dim(x, i, axis, keepdims=False) if x.shape[axis] == n else None
    pieces = [mapped(stored, pick(i)) for i in range(n)]
    return [x for piece in pieces if piece is not None for x in piece] if None not in pieces else None


def dynamic_slice(eqn: Any, stored: Any, *starts: Any) -> list[Any] | None:
    sizes = eqn.params["slice_sizes"]

    def change(x: Any) -> Any:
        axes = list(zip(sizes, stored.shape, x.shape, strict=True))
        if any(size != n != count for size, n, count in axes):
            return None
        moves = [count == n for _, n, count in axes]
        begin = [start if moving else jnp.zeros_like(start) for start, moving in zip(starts, moves, strict=True)]
        return lax.dynamic_slice(x, begin, [size if count == n else count for size, n, count in axes])

    return mapped(stored, change)


def gather(eqn: Any, stored: Any, indices: Any) -> list[Any] | None:
    """Rows, or whole weights of a stack: all of the axes that are tiled is taken."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    lookup = Lookup(params, tuple(stored.shape), len(eqn.outvars[0].aval.shape))
    if lookup.may_fill and not (params["fill_value"] is None or np.isnan(params["fill_value"])):
        return None  # no code and scale give any number, but a scale that is none gives none
    found, scale = lookup.moving, _innermost(stored)

    def change(x: Any) -> Any:
        axes = list(zip(params["slice_sizes"], stored.shape, x.shape, strict=True))
        if any(n != count and (i in found or size != n) for i, (size, n, count) in enumerate(axes)):
            return None
        sizes = tuple(size if count == n else count for size, n, count in axes)
        settings = {name: params[name] for name in ("mode", "unique_indices", "indices_are_sorted")}
        fill = None if x is scale else 0
        return lax.gather(x, indices, numbers, sizes, fill_value=fill, **settings)

    return mapped(stored, change)


def _innermost(stored: Any) -> Any:
    """The array of scales, or of the scales of quantised scales."""
    return _innermost(stored.scale) if hasattr(stored.scale, "qvalue") else stored.scale


def broadcast(eqn: Any, stored: Any, *more: Any) -> list[Any] | None:
    """New axes of size 1; an axis that is repeated is one of the numbers alone."""
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if more or math.prod(shape) != math.prod(stored.shape):
        return None

    def change(x: Any) -> Any:
        sizes = dict(zip(places, x.shape, strict=True))
        return lax.broadcast_in_dim(x, [sizes.get(i, 1) for i in range(len(shape))], places)

    return mapped(stored, change)


def reshape(eqn: Any, stored: Any) -> list[Any] | None:
    if eqn.params.get("dimensions") is not None or 0 in stored.shape:
        return None
    old, new = stored.shape, eqn.params["new_sizes"]
    groups = regrouped(old, new)

    def change(x: Any) -> Any:
        parts = [_counts([(old[i], x.shape[i]) for i in olds], [new[i] for i in news]) for olds, news in groups]
        return None if None in parts else x.reshape([count for part in parts for count in part or ()])

    return mapped(stored, change)


def _counts(olds: Sequence[tuple[int, int]], news: Sequence[int]) -> list[int] | None:
    """The tiles on new axes for (size, tiles) on old ones, if a tile is a run of elements before and after."""
    tiled = [i for i, (n, count) in enumerate(olds) if count != n]
    if tiled and any(count != 1 for _, count in olds[tiled[0] + 1 :]):
        return None
    left, counts = math.prod(count for _, count in olds), []
    for n in news:
        count = min(n, left)
        if (left if count == n else n) % count:
            return None
        counts.append(count)
        left //= count
    return counts


def regrouped(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cuts both shapes into the shortest runs of axes that hold the same elements."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        olds, news = [], []
        while not (olds or news) or math.prod(old[n] for n in olds) != math.prod(new[n] for n in news):
            if j >= len(new) or (i < len(old) and math.prod(old[n] for n in olds) <= math.prod(new[n] for n in news)):
                olds.append(i)
                i += 1
            else:
                news.append(j)
                j += 1
        groups.append((olds, news))
    return groups


def reshard(eqn: Any, stored: Any) -> list[Any]:
    return [jax.tree.map(jax.sharding.reshard, stored, placed(stored, eqn.outvars[0].aval.sharding))]


def sharding_constraint(eqn: Any, stored: Any) -> list[Any]:
    return [constrained(stored, eqn.params["sharding"])]


def constrained(stored: Any, sharding: Any) -> Any:
    """A `QArray` whose codes are to lie so, and its scales with them."""
    if not isinstance(sharding, NamedSharding):
        return stored
    return jax.tree.map(lax.with_sharding_constraint, stored, placed(stored, sharding))


def placed(stored: Any, sharding: NamedSharding) -> Any:
    """The shardings of a `QArray`'s arrays where its codes have this one: the others have the entries that fit."""
    along = entries(sharding.spec, len(stored.shape))
    parts = lambda entry: math.prod(sharding.mesh.shape[name] for name in names(entry))

    def place(x: Any) -> NamedSharding:
        fitting = (entry if n % parts(entry) == 0 else None for n, entry in zip(x.shape, along, strict=True))
        return sharding.update(spec=PartitionSpec(*fitting))

    return jax.tree.map(place, stored)


def all_gather(eqn: Any, stored: Any) -> list[Any] | None:
    """Put together from shards; scales that are the same on all shards of an axis stay."""
    axis, over = eqn.params["all_gather_dimension"], {*names(eqn.params["axis_name"])}

    def change(x: Any) -> Any:
        if not eqn.params["tiled"]:
            return lax.expand_dims(x, [axis]) if same_everywhere(x, stored.qvalue, over) else compat.bind(eqn, [x])
        if x.shape[axis] == 1 < stored.shape[axis] and not varying(x) & over:
            return x if varying(stored.qvalue) else None
        return compat.bind(eqn, [x])

    return mapped(stored, change)


def ppermute(eqn: Any, stored: Any) -> list[Any] | None:
    """Handed on to other devices; scales that all of them have stay."""
    over = {*names(eqn.params["axis_name"])}
    return mapped(stored, lambda x: x if same_everywhere(x, stored.qvalue, over) else compat.bind(eqn, [x]))


def joined(eqn: Any, *pieces: Any) -> list[Any] | None:
    """Weights of one format side by side, or stacked: so are their arrays, where all have the same tiles."""
    tiles = lambda q: [tuple(n // count for n, count in zip(q.shape, x.shape, strict=True)) for x in jax.tree.leaves(q)]
    formats = {(jax.tree.structure(piece), str(tiles(piece))) for piece in pieces}
    return [jax.tree.map(lambda *xs: compat.bind(eqn, xs), *pieces)] if len(formats) == 1 else None


STORED: dict[str, Callable[..., list[Any] | None]] = {
    **dict.fromkeys(("copy", "copy_p", "name", "pvary", "pcast", "transpose", "squeeze"), each),
    "slice": slice_,
    "split": split,
    "unstack": unstack,
    "dynamic_slice": dynamic_slice,
    "gather": gather,
    "broadcast_in_dim": broadcast,
    "reshape": reshape,
    "reshard": reshard,
    "sharding_constraint": sharding_constraint,
    "all_gather": all_gather,
    "ppermute": ppermute,
    "concatenate": joined,
    "stack": joined,
}
