"""Which axis of a matrix is the inputs': what names, sizes, biases and the file tell, and where they tell nothing.

A leaf ``weight`` is (out, in) as PyTorch's linear layers have it, a ``kernel`` (in, out) as Flax's. Transformers'
``Conv1D`` is the other way round in both, and so are modules of its names here and there. A file does not say which
layer is one: its ``fan_in_fan_out`` is that of the last module that PEFT met.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

from jlora.peft.adapter import EMBEDDING, EXPERTS, LINEAR, Adapter, Filed
from jlora.peft.names import Slot

# The modules of Transformers' GPT-2 and its like that are a `Conv1D`; other models have linear layers of these names.
CONV1D = ("c_attn", "q_attn", "c_proj", "c_fc")
_WIDENING = ("c_attn", "c_fc")  # of these the outputs are more than the inputs
Slots = Mapping[str, Sequence[Slot]]


def last_of(name: str) -> str:
    """The last of a module's names."""
    return name.rpartition(".")[2]


def leaf_of(slot: Slot) -> str:
    """The leaf's own name."""
    return last_of(slot.path.rpartition("/")[2])


def by_leaf(slot: Slot, kind: str) -> bool | None:
    """Whether a leaf of this name has the inputs of such a module first; None where the sizes must tell."""
    if kind == EXPERTS:
        return None
    return kind == EMBEDDING or leaf_of(slot) not in ("weight", "embedding")


def of_whole(name: str, slot: Slot, kind: str) -> bool | None:
    """The same for a weight that is there as PyTorch has it, where a `Conv1D`'s can't be told from another's."""
    return None if last_of(name) in CONV1D and not slot.layout.conv1d else by_leaf(slot, kind)


class Orientation:
    """Tells of matrices whether their inputs are the first axis.

    Args:
      adapter: whose updates tell the sizes of what they adapt.
      slots: the places of all modules in the tree.
      shapes: of its leaves, by path.
      said: what the caller says: of all matrices, or the ends of the names of those that are (in, out).
    """

    def __init__(
        self,
        adapter: Adapter,
        slots: Slots,
        shapes: Mapping[str, tuple[int, ...]],
        said: bool | Sequence[str] | None = None,
    ):
        self._adapter, self._slots, self._shapes, self._said = adapter, slots, shapes, said
        # PEFT may have met a module of which no name here tells
        self._is_open = bool(adapter.conv1d) and not any(last_of(name) in CONV1D for name in adapter.updates)

    def in_first(self, name: str, slot: Slot, kind: str) -> bool | None:
        """Whether a module's matrix is (in, out); None where nothing tells, so that its sizes must."""
        if kind == EXPERTS:
            return self._of_experts(name)
        is_kernel = by_leaf(slot, kind)
        if kind != LINEAR or leaf_of(slot) == "embedding":
            return is_kernel
        if (said := self._of_caller(name)) is not None:
            return said
        if (own := self._by_tree(name)) is not None:
            return own
        if last_of(name) in CONV1D:
            is_agreed = bool(self._adapter.conv1d) and not is_kernel
            return True if (found := self._by_others(name)) is None and is_agreed else found
        return self._by_others(name) if self._is_open and not is_kernel else is_kernel

    def _of_caller(self, name: str) -> bool | None:
        if self._said is None or isinstance(self._said, bool):
            return self._said
        return True if any(f".{name}".endswith(f".{end}") for end in self._said) else None

    def _by_others(self, name: str) -> bool | None:
        """What the nearest others of its family tell, of one voice: the tree's own sizes, else the adapter's."""
        parts = name.split(".")
        for votes in (self._tree_votes, self._update_votes):
            for n in range(len(parts), -1, -1):
                if found := votes.get((_family(name), ".".join(parts[:n]))):
                    return next(iter(found)) if len(found) == 1 else None
        return None

    @functools.cached_property
    def _tree_votes(self) -> dict[tuple[str, str], set[bool]]:
        return self._counted(self._by_tree)

    @functools.cached_property
    def _update_votes(self) -> dict[tuple[str, str], set[bool]]:
        return self._counted(self._by_update)

    def _counted(self, vote: Callable[[str], bool | None]) -> dict[tuple[str, str], set[bool]]:
        """What matrices tell, by their family and by each beginning of their names."""
        votes: dict[tuple[str, str], set[bool]] = collections.defaultdict(set)
        for name in self._slots:
            if (found := vote(name)) is not None:
                for head in itertools.accumulate(name.split(".")[:-1], "{}.{}".format, initial=""):
                    votes[_family(name), head.lstrip(".")].add(found)
        return votes

    def _sizes(self, name: str) -> tuple[int, ...] | None:
        """The two sizes of a matrix, where they differ."""
        slot = self._slots[name][0]
        sizes = slot.sizes(self._shapes[slot.path])
        is_matrix = len(sizes) == 2 and sizes[0] != sizes[1] and leaf_of(slot) in ("weight", "kernel")
        return sizes if is_matrix else None

    def _by_tree(self, name: str) -> bool | None:
        """By the size of the bias beside, or by what such a module does."""
        if (sizes := self._sizes(name)) is None:
            return None
        biases = {slot.sizes(self._shapes[slot.path]) for slot in self._slots.get(f"{name}.bias", ())}
        if len(biases) == 1 and (bias := biases.pop()) in [(n,) for n in sizes]:
            return bias == sizes[1:]
        return sizes[1] > sizes[0] if last_of(name) in _WIDENING else None

    def _by_update(self, name: str) -> bool | None:
        """By the sizes of its factors."""
        sizes, update = self._sizes(name), self._adapter.updates.get(name)
        if sizes is None or update is None or update.kind != LINEAR:
            return None
        if isinstance(update, Filed):
            known = [n for n in update.form.sizes(update.tensors) if n is not None]
            return known == list(sizes) if len(known) == 2 else None
        return (update.a.shape[-1], update.b.shape[-2] // (self._slots[name][0].part or (0, 1))[1]) == sizes

    def _of_experts(self, name: str) -> bool | None:
        """As experts beside that are not square."""
        group = name.rpartition(".")[0]
        for other, update in self._adapter.updates.items():
            if other.rpartition(".")[0] == group and update.kind == EXPERTS and other in self._slots:
                slot = self._slots[other][0]
                sizes = slot.sizes(self._shapes[slot.path])
                if len(sizes) == 3 and sizes[-1] != sizes[-2]:
                    return sizes[-2] == update.a.shape[-1]
        return None


def _family(name: str) -> str:
    """Whose layout a module shares: all `Conv1D`'s, or those of its own name."""
    return "" if last_of(name) in CONV1D else last_of(name)


def how_to_say(name: str) -> str:
    """For messages: what tells which way a matrix lies."""
    return f"fan_in_fan_out=({last_of(name)!r},) says that it is (in, out), fan_in_fan_out=False that none is"
