"""PyTorch's ``nn.MultiheadAttention``: PEFT adapts its two kernels together, as one module with another within.

``in_proj_weight`` has the name of the module itself, and ``out_proj`` is below ``base_layer``. Both have one rank and
one alpha. PEFT adds the update of ``out_proj`` twice, in its forward pass as in its merge: ``MultiheadAttention.merge``
of version 0.21 adds it, and calls ``out_proj.merge``. So an adapter was trained, and so it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jlora.peft.adapter import LINEAR, Adapter, Update

INPUTS, OUTPUT, WITHIN = ".in_proj_weight", ".out_proj", ".base_layer.out_proj"


def owner(name: str) -> str:
    """The module whose settings are those of a module of the file."""
    return name.removesuffix(WITHIN)


def apart(adapter: Adapter, known: Iterable[str]) -> Adapter:
    """The adapter with the names of a tree's kernels, of which `known` are the modules."""
    known = {*known}
    of = lambda name: f"{name}{INPUTS}" if name not in known and f"{name}{INPUTS}" in known else name
    named = {of(name).replace(WITHIN, OUTPUT): _times(2, update, name) for name, update in adapter.updates.items()}
    return dataclasses.replace(adapter, updates=named) if [*named] != [*adapter.updates] else adapter


def _times(factor: float, update: Any, name: str) -> Any:
    """The update of an ``out_proj`` within such a module, so many times as large."""
    is_within = name.endswith(WITHIN) and isinstance(update, Update)
    return dataclasses.replace(update, scale=factor * update.scale) if is_within else update


def together(adapter: Adapter, known: Mapping[str, bool]) -> tuple[Adapter, Mapping[str, bool]]:
    """The inverse, for files: the adapter and all modules under PEFT's names.

    A kernel without an update gets one of zeros.
    """
    modules = [name.removesuffix(INPUTS) for name in known if name.endswith(INPUTS)]
    updates, names = dict(adapter.updates), dict(known)
    for module in modules:
        names[module] = names.pop(f"{module}{INPUTS}")
        names.pop(f"{module}{OUTPUT}", None)
        pair = [updates.pop(f"{module}{INPUTS}", None)]
        pair.append(_times(0.5, updates.pop(f"{module}{OUTPUT}", None), f"{module}{WITHIN}"))
        if any(update is not None for update in pair):
            updates[module], updates[f"{module}{WITHIN}"] = _alike(module, pair)
    return (dataclasses.replace(adapter, updates=updates), names) if modules else (adapter, known)


def _alike(module: str, pair: list[Update | None]) -> list[Update]:
    """The two updates with one rank and one scale."""
    found = [update for update in pair if update is not None]
    if any(not isinstance(update, Update) or update.magnitude is not None for update in found):
        raise ValueError(
            f"peft.save: {module} is an nn.MultiheadAttention, which PEFT adapts by plain LoRA alone; merge it"
        )
    rank, scale = max(update.rank for update in found), found[0].scale
    features = found[0].a.shape[-1]
    made = []
    for update, outs in zip(pair, (3 * features, features), strict=True):
        zeros = np.zeros((0, features), np.float32), np.zeros((outs, 0), np.float32)
        a, b = zeros if update is None else (update.a, update.b * np.float32(update.scale / scale))
        missing = rank - len(a)
        made.append(Update(LINEAR, np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing))), scale))
    return made
