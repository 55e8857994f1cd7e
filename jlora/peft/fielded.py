"""Modules in the files of other methods than LoRA, as the nodes of a tree, and back, field by field: by `Form`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora.nodes.axes import Axes
from jlora.nodes.fields import leaf_fields
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.peft import layout
from jlora.peft.adapter import CONV, Filed
from jlora.peft.layout import Part, Sizes, Words
from jlora.peft.names import Slot
from jlora.peft.stack import Piece, Stack, fixed_axes


def sizes_of(filed: Filed) -> Sizes:
    """What a module maps to what, as far as its tensors tell."""
    ins, outs = filed.form.sizes(filed.tensors)
    return Sizes(filed.kind, ins, outs)


def adapted(path: str, pieces: list[Piece], words: Words, axes: Axes, shape: Sequence[int]) -> Any:
    """The node of a kernel without its base: the fields of its parts, stacked where the leaf stacks them."""
    first: Filed = pieces[0].value
    kind = layout.kind_of(pieces[0].name, path, words)
    _check(path, pieces, kind)
    stack = Stack.of(path, pieces, fixed_axes(path, pieces), shape)
    made = [_fields(piece, Part(words, piece.slot.sizes(shape), piece.slot.layout), kind) for piece in pieces]
    assert first.spec is not None
    kernel = Kernel(path, tuple(shape), axes, "conv" if kind == CONV else "dot", first.spec, stack.layers)
    dims = _dims(first.node)
    fields = {}
    for name, value in made[0].items():
        values: list[Any] = [of.get(name) for of in made]
        if not isinstance(value, np.ndarray):
            fields[name] = _agreed(path, name, values)
        elif dims.get(name, "batch").startswith("batch"):
            fields[name] = stack.whole(values)
        else:
            fields[name] = _agreed(path, name, values)
    return first.form.node(first.node, fields, kernel)


def _agreed(path: str, name: str, values: Sequence[Any]) -> Any:
    same = np.array_equal if isinstance(values[0], np.ndarray) else (lambda one, other: one == other)
    if not all(same(value, values[0]) for value in values):
        raise ValueError(
            f"peft.load: the layers of {path} differ in {name}, of which a stack of them has one; unroll them"
        )
    return values[0]


def _check(path: str, pieces: list[Piece], kind: str) -> None:
    form, node = pieces[0].value.form, pieces[0].value.node
    for piece in pieces:
        if piece.value.node is not node:
            raise ValueError(f"peft.load: {path} has layers of two variants; unroll them")
        if piece.slot.part is not None:
            raise ValueError(
                f"peft.load: {piece.name} is one module in PyTorch and several leaves here, which {form.method} can't "
                "be divided over; give the tree one leaf for it, or merge the adapter in PEFT"
            )
        if form.orders_outputs and piece.slot.layout.rope:
            raise ValueError(
                f"peft.load: the outputs of {path} have another order than PyTorch's, which {form.method} depends on; "
                "merge the adapter in PEFT, or give a tree with PyTorch's names"
            )
    if kind not in form.kinds:
        raise ValueError(f"peft.load: {pieces[0].name} is of the kind {kind}, of which {form.method} is not read")


def _dims(node: type) -> dict[str, Any]:
    return {field.name: field.metadata.get("dims", "") for field in leaf_fields(node)}


def _fields(piece: Piece, part: Part, kind: str) -> dict[str, Any]:
    """The fields of one module, with the kernel's own axes, and its static ones."""
    filed: Filed = piece.value
    form, node = filed.form, filed.node
    assert filed.spec is not None
    sizes = {"in": math.prod(part.of("in")), "out": math.prod(part.of("out"))}
    sizes |= {"least": min(sizes.values()), "most": max(sizes.values())}
    named = {}
    for tensor, x in {**filed.tensors, **filed.shared}.items():
        name, words = form.field(tensor)
        if tensor in form.shared:
            x = x[tuple(slice(sizes[word]) if word in sizes else slice(None) for word in words)]
        named[name] = _ordered(x.astype(np.float32), words, _words_of(node, name, words))
    made = form.read(named, filed.spec)
    dims = _dims(node)
    own = lambda name, x: x if not dims.get(name) else apart(x, _words_of(node, name, ()), part, kind)
    fields = {name: own(name, x) if isinstance(x, np.ndarray) else x for name, x in made.items()}
    linear = next((name for name in node.LINEAR if name in fields), None)
    if linear is not None and part.factor != 1:
        fields[linear] = fields[linear] * np.float32(part.factor)
    return fields


def _words_of(node: type, name: str, words: Sequence[str]) -> tuple[str, ...]:
    """The words of a field of one module; where the file has others, those of the file."""
    dims = _dims(node).get(name)
    own, filed = tuple(w for w in (dims or "").split() if w != "batch"), tuple(w for w in words if w != "one")
    return own if dims and (not filed or {*own} == {*filed}) else filed


def _ordered(x: np.ndarray, words: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """A tensor of the file with its axes in the order of a field; one without words is as it is."""
    if not words:
        return x
    x = x.reshape([n for n, word in zip(x.shape, words, strict=True) if word != "one"])
    kept = [word for word in words if word != "one"]
    return x.transpose([kept.index(word) for word in wanted])


def apart(x: np.ndarray, words: Sequence[str], part: Part, kind: str) -> np.ndarray:
    """A field of one module with an axis for each word, with the kernel's axes in the place of ``in`` and ``out``."""
    for at in reversed(range(len(words))):
        if words[at] == "out":
            split = np.moveaxis(x, at, -1)
            split = layout.outputs(split.reshape(*split.shape[:-1], *part.of("out")), _unscaled(part))
            x = np.moveaxis(split, range(-len(part.of("out")), 0), range(at, at + len(part.of("out"))))
        elif words[at] == "in":
            x = _split_inputs(x, at, part, kind)
    return x


def together(x: np.ndarray, words: Sequence[str], part: Part, kind: str) -> np.ndarray:
    """The inverse of `apart`."""
    for at, word in enumerate(words):
        count = len(part.of(word)) if word in ("in", "out") else 1
        if word == "out":
            moved = np.moveaxis(x, range(at, at + count), range(-count, 0))
            flat = layout.torch_outputs(moved, _unscaled(part)).reshape(*moved.shape[: moved.ndim - count], -1)
            x = np.moveaxis(flat, -1, at)
        elif word == "in":
            x = _join_inputs(x, at, part, kind)
    return x


def _unscaled(part: Part) -> Part:
    return part._replace(layout=dataclasses.replace(part.layout, scale=1.0))


def _split_inputs(x: np.ndarray, at: int, part: Part, kind: str) -> np.ndarray:
    ins = part.of("in")
    if kind != CONV or not part.is_channel_last:
        return x.reshape(*x.shape[:at], *ins, *x.shape[at + 1 :])
    x = x.reshape(*x.shape[:at], ins[-1], *ins[:-1], *x.shape[at + 1 :])
    return np.moveaxis(x, at, at + len(ins) - 1)


def _join_inputs(x: np.ndarray, at: int, part: Part, kind: str) -> np.ndarray:
    count = len(part.of("in"))
    if kind == CONV and part.is_channel_last:
        x = np.moveaxis(x, at + count - 1, at)
    return x.reshape(*x.shape[:at], -1, *x.shape[at + count :])


def fits(name: str, slot: Slot, node: Any) -> bool:
    """Whether PEFT's files can hold a module of a node as what it is."""
    form: Form = node.FORM
    kind = layout.kind_of(name, slot.path, layout.words_of(slot, node.axes), node.axes)
    is_ordered = form.orders_outputs and bool(slot.layout.rope)
    has_dropout = any(what == "dropout" for what, _ in form.settings.values()) or not getattr(node, "dropout", 0.0)
    return kind in form.kinds and slot.part is None and not is_ordered and has_dropout


def filed(name: str, slot: Slot, node: Any, arrays: Mapping[str, np.ndarray]) -> Filed:
    """A node's module as its files hold it; `arrays` are its fields at the module's place."""
    form: Form = node.FORM
    words = layout.words_of(slot, node.axes)
    part, kind = Part(words, slot.sizes(node.shape), slot.layout), layout.kind_of(name, slot.path, words, node.axes)
    made = {field: together(x, _words_of(type(node), field, ()), part, kind) for field, x in arrays.items()}
    linear = next((field for field in node.LINEAR if field in made), None)
    if linear is not None and part.factor != 1:
        made[linear] = made[linear] / np.float32(part.factor)
    fields = form.write(made, node)
    tensors, shared = ({t: _placed(fields, node, form, t) for t in names} for names in (form.tensors, form.shared))
    there = lambda found: {t: x for t, x in found.items() if x is not None}
    return Filed(
        there(tensors),
        type(node),
        None,
        form.settings_of(node),
        there(shared),
        (math.prod(part.of("out")), math.prod(part.of("in"))),
    )


def united(filed: Mapping[str, Filed]) -> Mapping[str, Filed] | None:
    """Modules with the shared tensors that their file has; None: they have no such in common."""
    form = next((of.form for of in filed.values()), None)
    if form is None or not form.shared:
        return filed
    whole = form.joined([of.shared for of in filed.values()], [of.sizes for of in filed.values()])
    own = {name: form.alike(of.tensors, of.shared, whole) for name, of in filed.items()}
    made = {name: dataclasses.replace(filed[name], tensors=x, shared=whole) for name, x in own.items() if x is not None}
    return made if len(made) == len(filed) else None


def _placed(fields: Mapping[str, Any], node: Any, form: Form, tensor: str) -> np.ndarray | None:
    name, words = form.field(tensor)
    if name not in fields:
        return None
    if not words:
        return np.ascontiguousarray(fields[name])
    own = _words_of(type(node), name, words)
    x = fields[name].transpose([own.index(word) for word in words if word != "one"])
    for at, word in enumerate(words):
        x = np.expand_dims(x, at) if word == "one" else x
    return np.ascontiguousarray(x)
