"""Experts, one module each or stacked in one parameter: the same weights under two sets of names.

Models' files have a tensor for each expert, ``experts.0.gate_proj`` (Mixtral: ``block_sparse_moe.experts.0.w1``). Since
its version 5 Transformers stacks them: ``mlp.experts.gate_up_proj`` of shape (experts, 2 * width, features), the gate's
outputs first, and ``mlp.experts.down_proj`` of shape (experts, features, width).

References:
  https://huggingface.co/docs/transformers/main/en/weightconverter: how Transformers turns the one into the other.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jlora.peft.adapter import EXPERTS, LINEAR, Adapter, Update
from jlora.peft.config import Config
from jlora.peft.names import Slot

Slots = Mapping[str, Sequence[Slot]]
STACKED = ("gate_up_proj", "down_proj")
ALONE = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_BLOCKS = ("mlp", "block_sparse_moe")  # what holds router and experts of a layer: of Mixtral either
_ROUTER = re.compile(rf"(.*)\.({'|'.join(_BLOCKS)})\.gate")
_STACK = re.compile(rf"(?:(.*)\.)?(\w+)\.experts\.({'|'.join(STACKED)})")
_ONE = re.compile(rf"(?:(.*)\.)?(\w+)\.experts\.(\d+)\.({'|'.join(name for names in ALONE for name in names)})")


class Style(NamedTuple):
    """How a model names its experts.

    Args:
      block: what holds them in a layer.
      names: of an expert's gate, up and down; None: they are stacked.
    """

    block: str
    names: tuple[str, str, str] | None

    @classmethod
    def of(cls, names: Iterable[str]) -> Style | None:
        """The style of the modules that are there; None where they have no such experts, or in several ways."""
        found = {style for name in names if (style := cls._of_name(name))}
        return found.pop() if len(found) == 1 else None

    @classmethod
    def _of_name(cls, name: str) -> Style | None:
        if match := _ONE.fullmatch(name):
            return cls(match[2], next(names for names in ALONE if match[4] in names))
        match = _STACK.fullmatch(name)
        return cls(match[2], None) if match else None


def in_style_of(slots: Slots, shapes: Mapping[str, tuple[int, ...]], adapter: Adapter) -> Adapter:
    """The adapter with its experts named, and stacked or not, as in a tree.

    Args:
      slots: the places of the tree's modules.
      shapes: of its leaves, by path.
      adapter: under the names of its own model.

    Raises:
      ValueError: if its updates can't be stacked, or lack some that its settings name.
    """
    ours, theirs = Style.of(slots), Style.of(adapter.updates)
    if ours is None or ours == theirs:
        return adapter
    updates: dict[str, Update] = {}
    together: dict[str, dict[str, Update]] = collections.defaultdict(dict)
    for name, update in adapter.updates.items():
        if (match := _STACK.fullmatch(name)) and update.kind == EXPERTS:
            updates |= dict(_apart(match, update, ours))
        elif (match := _ONE.fullmatch(name)) and ours.names is None:
            together[_joined(match[1], ours.block, "experts")][f"{match[3]}.{match[4]}"] = update
        else:
            updates[_renamed(name, ours)] = update
    for module, found in together.items():
        stacked = dict(_stacked(module, found, theirs, adapter))
        _check_layout(slots, shapes, stacked)
        updates |= stacked
    return dataclasses.replace(adapter, updates=updates)


def _check_layout(slots: Slots, shapes: Mapping[str, tuple[int, ...]], stacked: Mapping[str, Update]) -> None:
    """Refuses a stack whose outputs are not the gate's and then the up's: some models have them in turn."""
    for name, update in stacked.items():
        for slot in slots.get(name, ()):
            shape = shapes[slot.path]
            if slot.is_native and tuple(shape[-2:]) != (update.b.shape[1], update.a.shape[2]):
                raise ValueError(
                    f"peft.load: the adapter has a module for each expert, but {slot.path} of shape {shape} does not "
                    f"stack them as (experts, {update.b.shape[1]}, {update.a.shape[2]}); say its parts in a map, or "
                    "give the model's own tree"
                )


def _joined(*names: str | None) -> str:
    return ".".join(name for name in names if name)


def _renamed(name: str, ours: Style) -> str:
    """A router's name, or an expert's, in the tree's style."""
    if (match := _ONE.fullmatch(name)) and ours.names is not None:
        own = next(names for names in ALONE if match[4] in names)
        return _joined(match[1], ours.block, "experts", match[3], ours.names[own.index(match[4])])
    match = _ROUTER.fullmatch(name)
    return f"{match[1]}.{ours.block}.gate" if match and ours.block in _BLOCKS else name


def _apart(match: re.Match[str], update: Update, ours: Style) -> Iterator[tuple[str, Update]]:
    """The update of stacked experts as one of each, or under the tree's name."""
    module = _joined(match[1], ours.block, "experts")
    if ours.names is None:
        yield f"{module}.{match[3]}", update
        return
    gate, up, down = ours.names
    parts = (gate, up) if match[3] == STACKED[0] else (down,)
    for i, (a, b) in enumerate(zip(update.a, update.b, strict=True)):
        for name, rows in zip(parts, np.split(b, len(parts)), strict=True):
            yield f"{module}.{i}.{name}", Update(LINEAR, a, rows, update.scale)


def _stacked(
    module: str, found: Mapping[str, Update], theirs: Style | None, adapter: Adapter
) -> Iterator[tuple[str, Update]]:
    """The updates of a layer's experts as those of two parameters."""
    assert theirs is not None and theirs.names is not None
    if any(u.kind != LINEAR or u.magnitude is not None or u.bias is not None for u in found.values()):
        raise ValueError(
            f"peft.load: the tree stacks the experts of {module}, on which DoRA and biases of updates are not "
            "possible; give the model's own tree, with a weight for each expert"
        )
    count = 1 + max(int(name.partition(".")[0]) for name in found)
    gate, up, down = theirs.names
    for leaf, parts in zip(STACKED, ((gate, up), (down,)), strict=True):
        if any(name.rpartition(".")[2] in parts for name in found):
            yield f"{module}.{leaf}", _of_stack(module, found, count, parts, adapter)


def _of_stack(module: str, found: Mapping[str, Update], count: int, parts: tuple[str, ...], adapter: Adapter) -> Update:
    """One update of all experts: block by block where its parts have factors of their own, zero where there is none."""
    mine = {name: update for name, update in found.items() if name.rpartition(".")[2] in parts}
    one = next(iter(mine.values()))
    scale, rank = one.scale, max(update.rank for update in mine.values())
    ins, outs = one.a.shape[1], {name.rpartition(".")[2]: update.b.shape[0] for name, update in mine.items()}
    height = next(iter(outs.values()))
    a = np.zeros((count, rank * len(parts), ins), np.float32)
    b = np.zeros((count, height * len(parts), rank * len(parts)), np.float32)
    config = Config(adapter.config)
    for i in range(count):
        for at, part in enumerate(parts):
            update = mine.get(f"{i}.{part}")
            if update is None:
                if config.is_target(_joined(module, str(i), part)):
                    raise ValueError(
                        f"peft.load: the adapter's settings name {part} of expert {i} in {module}, but its file has "
                        "nothing of it: it is not whole"
                    )
                continue
            if update.a.shape[1] != ins or update.b.shape[0] != height:
                raise ValueError(f"peft.load: the adapter's experts of {module} differ in size; they can't be stacked")
            rows, columns = slice(at * height, (at + 1) * height), slice(at * rank, at * rank + update.rank)
            a[i, columns] = update.a
            b[i, rows, columns] = update.b.astype(np.float32) * np.float32(update.scale / scale)
    return Update(EXPERTS, a, b, scale)


def found_in(names: Container[str], get: Callable[[str], np.ndarray], parameter: str) -> np.ndarray | None:
    """A parameter that a model's file has in the other style; None where it has not.

    Args:
      names: of the file's tensors.
      get: a function of such a name that returns the array.
      parameter: by its own name.
    """
    if match := _STACK.fullmatch(parameter):
        for block in (match[2], *_BLOCKS):
            for own in ALONE:
                stem = _joined(match[1], block, "experts")
                if f"{stem}.0.{own[0]}.weight" in names:
                    return _gathered(names, get, stem, own[:2] if match[3] == STACKED[0] else own[2:])
    module = parameter.removesuffix(".weight")
    if (match := _ONE.fullmatch(module)) and module != parameter:
        own = next(found for found in ALONE if match[4] in found)
        for block in (match[2], *_BLOCKS):
            stem = _joined(match[1], block, "experts")
            if all(f"{stem}.{leaf}" in names for leaf in STACKED):
                return _taken(get, stem, int(match[3]), own.index(match[4]))
        for block in _BLOCKS:
            for other in ALONE:
                name = _joined(match[1], block, "experts", match[3], other[own.index(match[4])]) + ".weight"
                if name in names:
                    return get(name)
    if match := _ROUTER.fullmatch(module):
        return next((get(n) for block in _BLOCKS if (n := f"{match[1]}.{block}.gate.weight") in names), None)
    return None


def _gathered(names: Container[str], get: Callable[[str], np.ndarray], stem: str, parts: tuple[str, ...]) -> np.ndarray:
    count = 0
    while f"{stem}.{count}.{parts[0]}.weight" in names:
        count += 1
    return np.stack([np.concatenate([get(f"{stem}.{i}.{part}.weight") for part in parts]) for i in range(count)])


def _taken(get: Callable[[str], np.ndarray], stem: str, expert: int, which: int) -> np.ndarray | None:
    """An expert's gate (0), up (1) or down (2) of a stack that lies as Transformers' does."""
    gate_up, down = (get(f"{stem}.{leaf}") for leaf in STACKED)
    is_so = gate_up.ndim == down.ndim == 3 and gate_up.shape[1:] == (2 * down.shape[2], down.shape[1])
    if not is_so or expert >= len(down):
        return None
    return down[expert] if which == 2 else np.split(gate_up[expert], 2)[which]
