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
      ValueError: if a layer is not there, `name` is nobody's, or the numbers in the paths are of several lists.
    """
    paths = set(paths)
    if layers is None:
        return paths
    _check_name(paths, layers, name)
    numbers = {path: layer_of(path, name) for path in paths}
    there = {n for n in numbers.values() if n is not None}
    if missing := sorted({*layers} - there) if there else []:
        path = next(path for path, n in sorted(numbers.items()) if n is not None)
        raise ValueError(
            f"wrap: layers={list(layers)} names {missing}, but targets are in layers {sorted(there)}, by the numbers "
            f"in their paths, such as {path}. Where it stacks the layers that are meant, layers_name="
            f"{_numbered(path)!r} says so"
        )
    return {path for path, n in numbers.items() if n is None or n in layers}


def _check_name(paths: set[str], layers: Sequence[int], name: Name) -> None:
    """Refuses a name that no target has, and where none is given numbers that are of lists of several names."""
    lists = {path: next(iter(_lists(path.split("/")[:-1])), None) for path in sorted(paths)}
    if name is None:
        found: dict[str, str] = {}
        for path, of in lists.items():
            if of is not None:
                found.setdefault(of[0].rpartition(".")[2], path)
        if len(found) > 1:
            told = ", ".join(f"{of!r} as in {path}" for of, path in found.items())
            raise ValueError(
                f"wrap: layers={list(layers)}: the numbers in the targets' paths are those of several lists, {told}; "
                f"say which has the layers, as in layers_name={next(iter(found))!r}"
            )
        return
    names = [name] if isinstance(name, str) else name
    if not any(_has(path, wanted) for path in paths for wanted in names):
        raise ValueError(
            f"wrap: layers_name={name!r} is neither a list of layers in the path of a target nor a module that stacks "
            f"them; paths are such as {sorted(paths)[:3]}"
        )


def _has(path: str, name: str) -> bool:
    """Whether a path goes through a list of this name, or a module."""
    parts = path.split("/")
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(f".{of}".endswith(f".{name}") for of in [*modules, *(of for of, _ in _lists(parts[:-1]))])


def _numbered(path: str) -> str:
    """The part of a path that has the number of a list."""
    parts = path.split("/")
    return next(part for part in parts[:-1] if _NUMBERED.fullmatch(part))


def layered(paths: Iterable[str], layers: Sequence[int] | None, name: Name, stacked: set[str]) -> list[str]:
    """The targets that have layers: by the number in their path, or as one of the `stacked`.

    Raises:
      ValueError: if none has, or what is stacked has a number in its path too and nothing tells which is the layer.
    """
    paths = list(paths)
    if layers is None:
        return paths
    _check_readings(paths, layers, name, stacked)
    kept = [path for path in paths if path in stacked or layer_of(path, name) is not None]
    if not kept:
        raise ValueError(
            f"wrap: layers={list(layers)}, but no target has a layer's number in its path or a stacked axis, such as "
            f"{sorted(paths)[:3]}; stacked layers are known from sites=jlora.sites(fn, params, *args) or axes={{...}}"
        )
    return kept


def _check_readings(paths: Sequence[str], layers: Sequence[int], name: Name, stacked: set[str]) -> None:
    """Refuses numbers in the paths of stacks, unless another target of the same list stacks none, as beside experts."""
    list_of = lambda path: next((of for of, _ in _lists(path.split("/")[:-1])), None)
    certain = {list_of(path) for path in paths if path not in stacked}
    for path in sorted(stacked & {*paths}):
        if name is None and list_of(path) is not None and list_of(path) not in certain:
            raise ValueError(
                f"wrap: layers={list(layers)} has two readings for {path}, which has a number in its path and stacks "
                f"kernels: layers_name={_numbered(path)!r} means those, layers_name={list_of(path)!r} the number "
                "in the path"
            )


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
