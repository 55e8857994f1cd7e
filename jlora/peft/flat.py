"""Names of modules with underscores for dots, as kohya's scripts have them: which modules of a tree they are."""

from __future__ import annotations

import collections
import dataclasses
import difflib
from collections.abc import Iterable

from jlora.peft.adapter import Adapter
from jlora.peft.names import beginning


@dataclasses.dataclass(frozen=True)
class FlatAdapter(Adapter):
    """An adapter whose modules go by names with underscores for dots.

    Such a name has several readings, of which a tree, or a model's file, tells the one: see `dotted`.
    """


def dotted(call: str, adapter: Adapter, known: Iterable[str], prefix: str | None = None) -> Adapter:
    """An adapter under names with dots; one that has such is returned as it is.

    Args:
      call: for messages.
      adapter: what a file holds.
      known: the names of a tree's modules.
      prefix: what these have before the adapter's.

    Raises:
      ValueError: if a name is that of no module, or of several.
    """
    if not isinstance(adapter, FlatAdapter):
        return adapter
    ours = beginning(prefix)
    modules = [name for name in known if not name.endswith(".bias")]
    by_flat: dict[str, list[str]] = collections.defaultdict(list)
    for name in modules:
        if name.startswith(ours):
            by_flat[_flat(name[len(ours) :])].append(name[len(ours) :])
    for name in adapter.updates:
        if len(by_flat.get(name, ())) != 1:
            raise ValueError(_told(call, name, by_flat, modules))
    updates = {by_flat[name][0]: update for name, update in adapter.updates.items()}
    return Adapter(updates, dropout=adapter.dropout, config=adapter.config)


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _told(call: str, name: str, by_flat: dict[str, list[str]], modules: Iterable[str]) -> str:
    """Why a name is not read: it has several readings, or none."""
    if found := by_flat.get(name):
        return (
            f"{call}: the adapter has {name}, with underscores for dots, which may be {' or '.join(sorted(found))}: "
            "the tree has all of these. Rename those that are not meant, or give the tree without them"
        )
    below = sorted({other.removesuffix(end) for other in modules for end in _ends(other) if _flat(end[1:]) == name})
    if below:
        return (
            f"{call}: the adapter's {name} is not a name of the tree, but is one below {' and below '.join(below[:4])}."
            f" Say which is meant: prefix={below[0]!r}"
        )
    near = [by_flat[flat][0] for flat in difflib.get_close_matches(name, by_flat, n=3)]
    return (
        f"{call}: the adapter has {name}, with underscores for dots, which is no module of the tree. Nearest: "
        f"{', '.join(near) or 'none'}. Either it is of another model, or of another component of it, or the tree has "
        "other names than PyTorch's: give names=..., a list of pairs of names"
    )


def _ends(name: str) -> Iterable[str]:
    """The ends of a dotted name, each with the dot before it."""
    return (name[at:] for at, letter in enumerate(name) if letter == ".")
