"""An adapter put onto a tree of parameters."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.interpret.sites import Site
from jlora.nodes.axes import Axes
from jlora.nodes.node import AdaptedParam, is_node, is_unit
from jlora.peft import build
from jlora.peft.adapter import Adapter, Filed
from jlora.peft.attention import apart
from jlora.peft.build import Tree
from jlora.peft.config import Config
from jlora.peft.experts import in_style_of
from jlora.peft.flat import dotted
from jlora.peft.maps import resolved
from jlora.peft.names import HEAD, TABLES, Entry, Shift, Slot, leaf_shapes, shift, slots_of
from jlora.peft.orient import Orientation
from jlora.peft.stack import Piece
from jlora.peft.tables import is_copy, other_tables, told, with_twins
from jlora.peft.tables import resized as resized_table
from jlora.targets.paths import flatten
from jlora.targets.patterns import nearest
from jlora.targets.select import sites_of

Slots = Mapping[str, Sequence[Slot]]


def place(
    adapter: Adapter,
    params: Any,
    names: str | Sequence[Entry] | None = None,
    sites: Mapping[str, Site] | None = None,
    prefix: str | None = None,
    fan_in_fan_out: bool | Sequence[str] | None = None,
) -> Any:
    """Wraps a tree with the adapter's factors; arguments and errors as of `jlora.peft.load`."""
    fit = _fitted("peft.load", adapter, params, names, sites, prefix)
    for table in other_tables(fit.adapter, fit.slots, fit.shapes):
        raise ValueError(told(table, fit.shapes[table.slot.path]))
    _check_complete(fit.adapter, fit.slots, fit.moved)
    _check_rows(fit)
    said = _said(fan_in_fan_out, fit.adapter)
    tree = Tree(fit.leaves, fit.axes, fit.adapter, Orientation(fit.adapter, fit.slots, fit.shapes, said))
    nodes = _nodes(build.with_shared(tree, _pieces(fit.adapter.updates, fit.slots)), fit.slots)
    build.check_bases(tree, _pieces(_by_module(fit.adapter.bases), fit.slots))
    return fit.treedef.unflatten([nodes.get(path, leaf) for path, leaf in fit.leaves.items()])


class _Fit(NamedTuple):
    """An adapter under a tree's names, and the tree."""

    adapter: Adapter
    moved: Shift
    slots: Slots
    leaves: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    axes: Mapping[str, Axes]
    treedef: Any


def _fitted(
    call: str,
    adapter: Adapter,
    params: Any,
    names: str | Sequence[Entry] | None,
    sites: Mapping[str, Site] | None,
    prefix: str | None,
) -> _Fit:
    paths, leaves, treedef = flatten(params, is_unit)
    for path, leaf in zip(paths, leaves, strict=True):
        if is_node(leaf):
            raise TypeError(f"{call}: {path} is wrapped already ({type(leaf).__name__}); jlora.unwrap the tree first")
    by_path = dict(zip(paths, leaves, strict=True))
    axes = {path: site.axes for path, site in (sites_of(sites, by_path) or {}).items() if site.axes is not None}
    stacked = {path: known.batch_axis[0] for path, known in axes.items() if known.batch_axis}
    shapes = leaf_shapes(paths, leaves)
    slots = slots_of(shapes, resolved(names), stacked)
    adapter = dotted(call, adapter, slots, prefix)
    adapter = apart(in_style_of(slots, shapes, adapter), slots)
    moved = shift([name for name in _named(adapter) if name != HEAD], slots, prefix)
    adapter = _untied(_moved(adapter, moved), slots)
    _check_names(adapter, slots, names is not None)
    _check_copies(adapter, slots)
    return _Fit(adapter, moved, slots, by_path, shapes, axes, treedef)


def resize(adapter: Adapter, params: Any, names: str | Sequence[Entry] | None = None, prefix: str | None = None) -> Any:
    """The tree with the adapter's vocabulary; arguments and errors as of `jlora.peft.resize_tables`."""
    fit = _fitted("peft.resize_tables", adapter, params, names, None, prefix)
    leaves, found = dict(fit.leaves), list(other_tables(fit.adapter, fit.slots, fit.shapes))
    for table in with_twins(found, fit.slots, fit.leaves):
        leaves[table.slot.path] = resized_table(leaves[table.slot.path], table)
    return fit.treedef.unflatten(list(leaves.values()))


def _said(given: Any, adapter: Adapter) -> bool | tuple[str, ...] | None:
    """What the caller says of the layout of matrices."""
    if given is None or isinstance(given, bool):
        return given
    names = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    known = [f".{name}" for name in adapter.updates]
    if lone := [n for n in names if not isinstance(n, str) or not any(name.endswith(f".{n}") for name in known)]:
        raise ValueError(
            "peft.load: fan_in_fan_out is True, False, or the names of modules that are (in, out); the adapter has no "
            f"module {lone[0]!r}"
        )
    return names


def _named(adapter: Adapter) -> list[str]:
    return [*adapter.updates, *map(_module, adapter.full), *adapter.tokens]


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _by_module(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {_module(name): array for name, array in arrays.items()}


def _moved(adapter: Adapter, moved: Shift) -> Adapter:
    """The adapter under the tree's names."""
    name_of = lambda name: name if _module(name) == HEAD else moved(name)
    move = lambda values: {name_of(name): value for name, value in values.items()}
    fields = ("updates", "full", "tokens", "bases")
    return dataclasses.replace(adapter, **{field: move(getattr(adapter, field)) for field in fields})


def _untied(adapter: Adapter, slots: Slots) -> Adapter:
    """Without the head of a model whose table is its head, where the adapter has the same for both."""
    table = next((name for name in slots if name.rpartition(".")[2] in TABLES), "")
    if HEAD in slots or not table:
        return adapter
    adapter = _with_copies_of(table, adapter)
    if HEAD not in _named(adapter):
        _check_both_uses(table, adapter)
        return adapter
    head, own = adapter.updates.get(HEAD), adapter.updates.get(table)
    is_same = head and own and np.array_equal(head.a, own.b.T) and np.array_equal(head.b, own.a.T)
    whole = [adapter.full.get(f"{name}.weight") for name in (HEAD, table)]
    is_saved_twice = whole[0] is not None and whole[1] is not None and np.array_equal(whole[0], whole[1])
    if not is_same and not is_saved_twice:
        other = "another update for that" if table in _named(adapter) else "none for that"
        raise ValueError(
            f"peft.load: the adapter changes {HEAD}, of which the tree has none: its table {table} is the head too, "
            f"and the adapter has {other}. Give the tree a head of its own, {HEAD}/weight: a copy of it"
        )
    rest = lambda values: {name: value for name, value in values.items() if _module(name) != HEAD}
    fields = ("updates", "full", "bases")
    return dataclasses.replace(adapter, **{field: rest(getattr(adapter, field)) for field in fields})


def _with_copies_of(table: str, adapter: Adapter) -> Adapter:
    """The adapter with its copy of the head's base as one of the table's, which it must be."""
    bases = dict(adapter.bases)
    head, own = bases.pop(f"{HEAD}.weight", None), bases.get(f"{table}.weight")
    if head is not None and own is not None and not np.array_equal(head, own):
        raise ValueError(
            f"peft.load: the adapter's file has copies of {HEAD} and of {table} that differ, but the tree has one for "
            f"both. Give the tree a head of its own, {HEAD}/weight"
        )
    return dataclasses.replace(adapter, bases=bases if head is None else bases | {f"{table}.weight": head})


def _check_both_uses(table: str, adapter: Adapter) -> None:
    """Refuses the update of a language model's table alone, where the tree has its head in the same leaf."""
    is_changed = table in adapter.updates or f"{table}.weight" in adapter.full
    is_tied = bool(adapter.config.get("ensure_weight_tying"))
    if is_changed and adapter.config.get("task_type") == "CAUSAL_LM" and not is_tied:
        raise ValueError(
            f"peft.load: the adapter changes {table} as a table and leaves the head, {HEAD}, as it was; in the tree "
            f"one leaf is both. Give the tree a head of its own, {HEAD}/weight: a copy of the table"
        )


def _check_copies(adapter: Adapter, slots: Slots) -> None:
    """Refuses whole tensors that are no copies of a leaf: in PEFT they would overwrite the base."""
    if missing := [name for name in adapter.bases if _module(name) not in slots]:
        saved = repr(adapter.config.get("modules_to_save"))[:200]
        raise ValueError(
            f"peft.load: the adapter's file has a whole tensor {missing[0]}, which would overwrite the base; its "
            f"settings name no such module (modules_to_save={saved}), and the tree has none of that name"
        )


def _check_names(adapter: Adapter, slots: Slots, has_map: bool) -> None:
    if missing := [name for name in _named(adapter) if name not in slots]:
        near = nearest(missing[0].replace(".", "/"), [name.replace(".", "/") + "/weight" for name in slots])
        shown = ", ".join(dict.fromkeys(name.removesuffix("/weight").replace("/", ".") for name in near))
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = (
            "Either the tree is of another model, or the map's entry for it has a path that is no leaf's"
            if has_map
            else "Either it is of another model, or it has other names than PyTorch's: give names=..., a list of pairs "
            'such as ("model.layers.{i}.self_attn.q_proj", "layers_{i}/attn/query/kernel"), or one of jlora.peft.NAMES'
        )
        layers = _layers_there(missing[0], slots)
        raise ValueError(
            f"peft.load: the adapter has {missing[0]}{others}, which the tree does not have. {layers}Nearest: {shown}. "
            f"{hint}"
        )


def _layers_there(name: str, slots: Slots) -> str:
    """The layers that a tree has of such a module, where it has such in others."""
    for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
        head, tail = name[: number.start()], name[number.end() :]
        middles = [other[len(head) : -len(tail)] for other in slots if other.startswith(head) and other.endswith(tail)]
        if there := sorted(int(middle) for middle in middles if middle.isdecimal()):
            return f"Its {head}N{tail} are those of N = {there[0]} to {there[-1]}. "
    return ""


def _check_complete(adapter: Adapter, slots: Slots, moved: Shift) -> None:
    """Refuses an adapter that lacks something that its settings name."""
    config = Config(adapter.config)
    done = {*_named(adapter)}
    if config.data.get("trainable_token_indices") and not adapter.tokens:
        raise ValueError(
            "peft.load: the adapter's settings name rows of a table, but its file has none: it is not whole"
        )
    for name, places in slots.items():
        if not name.startswith(moved.ours):
            continue  # of another model beside the one that is adapted
        theirs, is_bias = moved.back(name), name.endswith(".bias")
        is_kernel = len(places[0].index) - len(places[0].fixed) >= 2 and not is_bias
        is_whole = config.is_saved(theirs if is_bias else f"{theirs}.weight")
        is_table = is_kernel and config.has_tables and bool(config.tokens(theirs))
        is_adapted = is_kernel and not config.has_open_targets and config.is_target(theirs)
        beside = config.spec.bias == "all" or (
            config.spec.bias == "lora_only" and name.removesuffix(".bias") in adapter.updates
        )
        if (is_whole or is_table or is_adapted or (is_bias and beside)) and name not in done:
            raise ValueError(
                f"peft.load: the adapter's settings name {theirs}, but its file has nothing of it: it is not "
                f"whole, or the tree is of a model with more layers{_part_hint(adapter, name)}"
            )


def _part_hint(adapter: Adapter, missing: str) -> str:
    """What to try where an adapter is of one part of the tree, and what it lacks is of another."""
    heads = {name.partition(".")[0] for name in _named(adapter)}
    is_other = len(heads) == 1 and not missing.startswith(f"{next(iter(heads))}.")
    return f"; if it is of a part of the model alone, prefix={next(iter(heads))!r} says so" if is_other else ""


def _check_rows(fit: _Fit) -> None:
    """Refuses trained rows of a table whose copy is the head: in PEFT they are the head's too, if it is tied."""
    tables = [name for name in fit.adapter.tokens if name.rpartition(".")[2] in TABLES]
    if HEAD in fit.slots and HEAD not in _named(fit.adapter) and tables:
        table, head = ((name, fit.slots[name][0]) for name in (tables[0], HEAD))
        if is_copy(table, head, fit.leaves):
            raise ValueError(
                f"peft.load: the adapter trains rows of {tables[0]}, of which the tree's {HEAD} is a copy: in a "
                f"model whose head is its table PEFT trains them for both. Leave {HEAD} out of the tree; then one leaf "
                "is both"
            )


def _nodes(tree: Tree, slots: Slots) -> dict[str, AdaptedParam]:
    adapter = tree.adapter
    biases = {f"{name}.bias": update for name, update in adapter.updates.items() if update.bias is not None}
    if missing := [name for name in biases if name not in slots]:
        raise ValueError(
            f"peft.load: the adapter's update has a bias {missing[0]}, but the tree has none there to add it to; add "
            "one of zeros"
        )
    kinds: tuple[tuple[Callable[..., AdaptedParam], Mapping[str, Any]], ...] = (
        (build.adapted, adapter.updates),
        (build.with_bias, biases),
        (build.with_gain, _gains(adapter, slots)),
        (build.trained_in_full, _by_module(adapter.full)),
        (build.with_rows, adapter.tokens),
    )
    nodes: dict[str, AdaptedParam] = {}
    for make, values in kinds:
        for path, pieces in _pieces(values, slots).items():
            if path in nodes:
                raise ValueError(
                    f"peft.load: the adapter has two things for {path}: a {type(nodes[path]).__name__}, and more"
                )
            nodes[path] = make(path, pieces, tree)
    return nodes


def _gains(adapter: Adapter, slots: Slots) -> dict[str, np.ndarray]:
    """What the biases beside modules of another method than LoRA are multiplied by, by their names."""
    filed = {name: update for name, update in adapter.updates.items() if isinstance(update, Filed)}
    found = {f"{name}.bias": update.form.gain_of_bias(update.tensors) for name, update in filed.items()}
    return {name: gain for name, gain in found.items() if gain is not None and name in slots}


def _pieces(values: Mapping[str, Any], slots: Slots) -> dict[str, list[Piece]]:
    """What the adapter has for each leaf, by the parts of it."""
    found: dict[str, list[Piece]] = collections.defaultdict(list)
    for name, value in values.items():
        for slot in slots[name]:
            found[slot.path].append(Piece(name, slot, value))
    return found
