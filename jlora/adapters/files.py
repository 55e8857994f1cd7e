"""Several adapters' files made one, without the base: as `jlora.adapters.weighted` combines trees, module by module."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.adapters.combine import Recipe, combined
from jlora.peft.adapter import CONV, EXPERTS, Adapter, Update


def blended(adapters: Mapping[str, Adapter], weights: jax.Array, recipe: Recipe, key: jax.Array | None) -> Adapter:
    """One adapter of several: plain LoRA of scale 1, in float32.

    Args:
      adapters: by where they come from, for messages.
      weights: one for each, of shape (adapters,).
      recipe: the method and its settings, checked.
      key: for DARE: each module's comes from its name.

    Returns:
      An adapter with an update for each module that any has; its dropout is that of the first.

    Raises:
      ValueError: if an adapter has what does not add up, modules differ in shape, or the method can't combine them.
    """
    for where, adapter in adapters.items():
        _check_plain(where, adapter)
    names = sorted({name for adapter in adapters.values() for name in adapter.updates})
    every = [update for adapter in adapters.values() for update in adapter.updates.values()]
    rank = recipe.svd_rank or max(update.rank for update in every)
    updates = {name: _update(name, adapters, weights, recipe, rank, key) for name in names}
    first = next(iter(adapters.values()))
    return Adapter(updates, dropout=first.dropout, conv1d=_conv1d(adapters))


def _check_plain(where: str, adapter: Adapter) -> None:
    """Refuses an adapter that is more than low-rank updates of a base as it was."""
    updates = adapter.updates.items()
    faults = {
        "DoRA's magnitudes, which do not add up": [name for name, update in updates if update.magnitude is not None],
        "biases of updates": [name for name, update in updates if update.bias is not None],
        "parameters trained in full, of which no update is known": [*adapter.full],
        "trained rows of tables, of which no update is known": [*adapter.tokens],
    }
    for what, names in faults.items():
        if names:
            raise ValueError(
                f"{where} has {what}, at {names[0]}: only low-rank updates are combined. Merge it into its base: jlora "
                "merge"
            )
    if adapter.form is not None:
        raise ValueError(
            f"{where} is of {adapter.form.method}: files of plain LoRA are combined. Load it onto its base, and "
            "combine the trees with jlora.adapters.weighted"
        )
    if adapter.start is not None:
        raise ValueError(
            f"{where} started from {adapter.start} and belongs to a base that this changed. Load it onto the base and "
            "save what it is there: jlora.peft.save(directory, jlora.peft.load(...))"
        )
    if not adapter.updates:
        raise ValueError(f"{where} has no low-rank updates, so there is nothing to combine")


def _conv1d(adapters: Mapping[str, Adapter]) -> bool | None:
    said = {adapter.conv1d for adapter in adapters.values()} - {None}
    if len(said) > 1:
        raise ValueError(
            f"{' and '.join(adapters)} differ in fan_in_fan_out, whether weights are (in, out): they are not of one "
            "model"
        )
    return said.pop() if said else None


def _update(
    name: str,
    adapters: Mapping[str, Adapter],
    weights: jax.Array,
    recipe: Recipe,
    rank: int,
    key: jax.Array | None,
) -> Update:
    """The update of one module."""
    found = {i: adapter.updates[name] for i, adapter in enumerate(adapters.values()) if name in adapter.updates}
    first = next(iter(found.values()))
    _check_alike(name, [*adapters], found)
    ranks = [update.rank for update in found.values()]
    (ins, _), (_, outs) = (shape[-2:] for shape in (x.shape for x in _matrices(first)))
    pruned = [(ins, outs)] if recipe.is_of_updates else [(ins, ranks[0]), (ranks[0], outs)]
    recipe.check_factors(f"--method {recipe.method}", name, ranks, pruned)
    is_stacked = first.kind == EXPERTS
    pairs = [_matrices(update) for update in found.values()]
    scales = [float(update.scale) for update in found.values()]
    keys = None if key is None else keys_of(name, len(first.a) if is_stacked else None, key)
    program = _program(recipe, rank, tuple(found), is_stacked)
    a, b = program(pairs, scales, weights[jnp.asarray(tuple(found))], keys)
    return _laid(first, np.asarray(a), np.asarray(b))


def _check_alike(name: str, sources: Sequence[str], found: Mapping[int, Update]) -> None:
    of = lambda update: (update.kind, update.a.shape[: update.kind == EXPERTS], _sizes(update))
    told = {i: of(update) for i, update in found.items()}
    (first, expected), *others = told.items()
    for i, other in others:
        if other != expected:
            raise ValueError(
                f"{name} is {_told(found[first])} in {sources[first]} and {_told(found[i])} in {sources[i]}: they are "
                "of different models"
            )


def _sizes(update: Update) -> tuple[int, ...]:
    return (*update.a.shape[1 + (update.kind == EXPERTS) :], update.b.shape[-2])


def _told(update: Update) -> str:
    ins = update.a.shape[1 + (update.kind == EXPERTS) :]
    return f"{update.kind} {' x '.join(map(str, ins))} -> {update.b.shape[-2]}"


def keys_of(name: str, experts: int | None, root: jax.Array) -> jax.Array:
    """The key of a module, or of each of its experts, by its name: those from which DARE draws."""
    key = jax.random.fold_in(root, zlib.crc32(name.encode()))
    return key if experts is None else jax.random.split(key, experts)


def _matrices(update: Update) -> tuple[np.ndarray, np.ndarray]:
    """A as (experts..., in, r) and B as (experts..., r, out), in float32."""
    a = update.a.reshape(update.rank, -1) if update.kind == CONV else update.a
    return a.swapaxes(-1, -2).astype(np.float32), update.b.swapaxes(-1, -2).astype(np.float32)


@functools.lru_cache(maxsize=256)
def _program(recipe: Recipe, rank: int, places: tuple[int, ...], is_stacked: bool) -> Callable[..., Any]:
    """One program for all modules that are alike."""

    @jax.jit
    def program(pairs: Any, scales: Any, weights: jax.Array, keys: Any) -> Any:
        fn = lambda pairs, key: combined(pairs, scales, weights, recipe, rank, places, key)
        return (jax.vmap(fn) if is_stacked else fn)(pairs, keys)

    return program


def _laid(like: Update, a: np.ndarray, b: np.ndarray) -> Update:
    """The factors as PyTorch lays them out."""
    a, b = a.swapaxes(-1, -2), np.ascontiguousarray(b.swapaxes(-1, -2))
    if like.kind == CONV:
        a = a.reshape(-1, *like.a.shape[1:])
    return Update(like.kind, np.ascontiguousarray(a), b, 1.0)
