"""Which layer a leaf belongs to, and which layers a spec adapts.

A leaf of an unrolled model has its layer's number in its path; one of stacked layers has them on its first batch axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_NUMBERED = re.compile(r"(?:(.*?)[_.-]?)(\d+)")


Name = str | Sequence[str] | None


def layer_of(path: str, name: Name = None) -> int | None:
    """The number of the layer that a leaf belongs to: the first in its path, as in ``layers/3`` or ``block_3``.

    Args:
      path: of the leaf.
      name: of the list of layers, where another number comes before: ``"layers"`` for ``stage_0/layers_3``, or
        ``"encoder.layer"`` with what is before it. Of several names the first that the path has.

    Example:
      >>> layer_of("encoder/layer_3/query/kernel"), layer_of("h/7/attn/kernel"), layer_of("head/kernel")
      (3, 7, None)
      >>> layer_of("encoder/layer/3/decoder/layer/1/kernel", "decoder.layer")
      1
    """
    lists = list(_lists(path.split("/")[:-1]))
    if name is None:
        return lists[0][1] if lists else None
    names = [name] if isinstance(name, str) else name
    return next((n for wanted in names for of, n in lists if f".{of}".endswith(f".{wanted}")), None)


def _lists(parts: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The lists that a path goes through, by their dotted names, and the place in each."""
    for i, part in enumerate(parts):
        if match := _NUMBERED.fullmatch(part):
            yield ".".join([*parts[:i], *([match[1]] if match[1] else [])]), int(match[2])


def in_layers(paths: Iterable[str], layers: Sequence[int] | None, name: Name) -> set[str]:
    """The targets without those of other layers than the chosen; what has no layer's number stays.

    Raises:
      ValueError: if a layer is not there.
    """
    paths = set(paths)
    if layers is None:
        return paths
    numbers = {path: layer_of(path, name) for path in paths}
    there = {n for n in numbers.values() if n is not None}
    if missing := sorted({*layers} - there) if there else []:
        raise ValueError(f"wrap: layers={list(layers)} names {missing}, but targets are in layers {sorted(there)}")
    return {path for path, n in numbers.items() if n is None or n in layers}


def layered(paths: Iterable[str], layers: Sequence[int] | None, name: Name, stacked: set[str]) -> list[str]:
    """The targets that have layers: by the number in their path, or as one of the `stacked`.

    Raises:
      ValueError: if none has.
    """
    paths = list(paths)
    if layers is None:
        return paths
    kept = [path for path in paths if path in stacked or layer_of(path, name) is not None]
    if not kept:
        raise ValueError(
            f"wrap: layers={list(layers)}, but no target has a layer's number in its path or a stacked axis, such as "
            f"{sorted(paths)[:3]}; stacked layers are known from sites=jlora.sites(fn, params, *args) or axes={{...}}"
        )
    return kept


def chosen_slices(path: str, layers: Sequence[int] | None, name: Name, count: int) -> tuple[int, ...] | None:
    """Which of `count` stacked layers are adapted: None for all, also where the path has the layer's number.

    Raises:
      ValueError: if a layer is not there.
    """
    if layers is None or layer_of(path, name) is not None:
        return None
    if outside := [n for n in layers if not 0 <= n < count]:
        raise ValueError(f"wrap: layers={list(layers)} names {outside}, but {path} stacks {count} layers")
    return None if len(layers) == count else tuple(layers)
