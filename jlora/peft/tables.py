"""Tables of a vocabulary: where an adapter has more tokens than a tree, and the tree with as many.

References:
  https://huggingface.co/docs/transformers/main_classes/model, ``resize_token_embeddings``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.nodes.qarray import is_qarray
from jlora.peft.adapter import Adapter
from jlora.peft.build import of_leaf
from jlora.peft.layout import is_embedding
from jlora.peft.names import HEAD, TABLES, Slot
from jlora.peft.orient import last_of, leaf_of
from jlora.peft.stack import Piece
from jlora.targets.conventions import OUTPUT_LAYERS

Slots = Mapping[str, Sequence[Slot]]


class Table(NamedTuple):
    """A table of a vocabulary, of whose rows the adapter and the tree have other numbers.

    Args:
      name: of the module.
      slot: its place in the tree.
      axis: of the leaf's part, along which the rows are.
      rows: how many the adapter has; of one that names rows alone at least so many.
      whole: the adapter's copy of all rows, as PyTorch has it; None where it has none.
      trained: the rows whose values the adapter has.
    """

    name: str
    slot: Slot
    axis: int
    rows: int
    whole: np.ndarray | None
    trained: tuple[int, ...] = ()


def other_tables(adapter: Adapter, slots: Slots, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Table]:
    """The tables of other vocabularies: their rows are as long as the tree's, but not as many."""
    modules = {*adapter.updates, *adapter.tokens, *(n.removesuffix(".weight") for n in (*adapter.full, *adapter.bases))}
    for name in sorted(modules & {*slots}):
        if not is_embedding(name) and last_of(name) not in OUTPUT_LAYERS:
            continue
        slot = slots[name][0]
        sizes, (shape, is_least) = slot.sizes(shapes[slot.path]), _shape(adapter, name)
        if len(sizes) != 2 or len(shape) != 2 or slot.part is not None:
            continue
        axis = _axis(name, slot)
        rows, features = sizes[axis], sizes[1 - axis]
        if features == shape[1] and (rows < shape[0] if is_least else rows != shape[0]):
            whole = adapter.bases.get(f"{name}.weight", adapter.full.get(f"{name}.weight"))
            yield Table(name, slot, axis, shape[0], whole, adapter.tokens.get(name, ((), None))[0])


def _shape(adapter: Adapter, name: str) -> tuple[tuple[int, ...], bool]:
    """The rows and columns of a table by what the adapter has of it, and whether the rows are the least only."""
    for arrays in (adapter.full, adapter.bases):
        if f"{name}.weight" in arrays:
            return arrays[f"{name}.weight"].shape, False
    if name in adapter.tokens:
        ids, rows = adapter.tokens[name]
        return (max(ids, default=-1) + 1, rows.shape[1]), True
    update = adapter.updates[name]
    sizes = update.b.shape[-2], update.a.shape[-1]
    return (sizes if last_of(name) in OUTPUT_LAYERS else sizes[::-1]), False


def _axis(name: str, slot: Slot) -> int:
    """The axis along which the rows of a table are."""
    if slot.layout.dims is not None:
        return slot.layout.dims.split().index("in" if is_embedding(name) else "out")
    return 1 if leaf_of(slot) == "kernel" else 0


def with_twins(found: Sequence[Table], slots: Slots, leaves: Mapping[str, Any]) -> Iterator[Table]:
    """The tables, and heads and tables of the same vocabulary that are copies of one of them in the tree.

    Raises:
      ValueError: if there is one more of that vocabulary, of which the adapter has nothing.
    """
    yield from found
    rows_of = lambda name, slot: slot.sizes(leaves[slot.path].shape)[_axis(name, slot)]
    before = {rows_of(table.name, table.slot) for table in found}
    for name, places in slots.items():
        is_one = last_of(name) in (HEAD, *TABLES) and len(places[0].sizes(leaves[places[0].path].shape)) == 2
        if not is_one or name in {table.name for table in found} or rows_of(name, places[0]) not in before:
            continue
        twin = next(
            (t for t in found if t.whole is not None and is_copy((t.name, t.slot), (name, places[0]), leaves)), None
        )
        if twin is None:
            raise ValueError(
                f"peft.resize_tables: the adapter has {found[0].rows} rows of {found[0].name}, but no values of "
                f"{name}, which has as many: resize the model as it was before the adapter was trained, with the same "
                "values"
            )
        yield twin._replace(name=name, slot=places[0], axis=_axis(name, places[0]))


def is_copy(one: tuple[str, Slot], other: tuple[str, Slot], leaves: Mapping[str, Any]) -> bool:
    """Whether two tables of a tree have the same rows: the name and the place of each."""
    pair = [leaves[slot.path] for _, slot in (one, other)]
    if any(isinstance(x, jax.ShapeDtypeStruct) or is_qarray(x) or len(x.shape) != 2 for x in pair):
        return False
    first, second = (
        np.asarray(x) if _axis(*at) == 0 else np.asarray(x).T for x, at in zip(pair, (one, other), strict=True)
    )
    return np.array_equal(first, second)


def told(table: Table, shape: Sequence[int]) -> str:
    """For messages: how the two differ, and the way."""
    at_least = "at least " if table.trained and table.whole is None else ""
    return (
        f"peft.load: the adapter has {at_least}{table.rows} rows of {table.name}, but {table.slot.path} of shape "
        f"{tuple(shape)} has {table.slot.sizes(shape)[table.axis]}: it was trained with another vocabulary. Give the "
        "tree as many: jlora.peft.resize_tables(params, directory)"
    )


def resized(leaf: Any, table: Table) -> Any:
    """A leaf with as many rows as the adapter has: the new ones are the adapter's.

    Raises:
      ValueError: if the adapter does not have their values.
    """
    sizes = table.slot.sizes(leaf.shape)
    old, axis = sizes[table.axis], table.axis
    if table.slot.fixed:
        raise ValueError(f"peft.resize_tables: {table.slot.path} holds more than {table.name}; resize it as a whole")
    new = jax.ShapeDtypeStruct((*sizes[:axis], table.rows, *sizes[axis + 1 :]), leaf.dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return new
    if table.rows < old:
        return leaf[tuple(slice(table.rows if i == axis else None) for i in range(len(sizes)))]
    if table.whole is not None:
        whole = of_leaf(Piece(table.name, table.slot, None), table.whole, new)
        added = np.split(whole, [old], axis)[1]
    elif {*range(old, table.rows)} <= {*table.trained}:
        added = np.zeros((*sizes[:axis], table.rows - old, *sizes[axis + 1 :]))  # which the trained rows replace
    else:
        raise ValueError(
            f"peft.resize_tables: the adapter has no values of rows {old} to {table.rows - 1} of {table.name}; resize "
            "the model as it was before the adapter was trained, with the same values"
        )
    if isinstance(leaf, np.ndarray):
        return np.concatenate([leaf, added.astype(leaf.dtype)], axis)
    return jnp.concatenate([leaf, jnp.asarray(added, leaf.dtype)], axis)
