"""A wrapped tree's adapter, as PyTorch lays it out."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlora.convert import plain
from jlora.nodes.axes import Axes
from jlora.nodes.fields import GROUPS, leaf_fields
from jlora.nodes.form import Form
from jlora.nodes.node import TrainableParam, is_node
from jlora.peft import fielded, layout
from jlora.peft.adapter import EXPERTS, LINEAR, Adapter, Filed, Update
from jlora.peft.layout import Part
from jlora.peft.maps import resolved
from jlora.peft.names import Entry, Slot, leaf_shapes, slots_of
from jlora.peft.parts import parameter_of, torch_array
from jlora.targets.paths import flatten
from jlora.tree import has_nodes, partition
from jlora.variants.bias import GainedBiasParam, LoraBiasParam
from jlora.variants.dora import DoraParam
from jlora.variants.lora import LoraParam, from_start
from jlora.variants.tokens import TokensParam

Named = tuple[str, Slot]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by vLLM and SGLang: one product for all


@dataclasses.dataclass(frozen=True)
class Collected:
    """An adapter, and what else of the tree its settings depend on.

    Args:
      adapter: what was trained.
      known: all of the tree's modules and parameters by PyTorch's names; True where it is a kernel.
      frozen: the values of parameters that lie in a module beside one that trains.
      siblings: the sizes (in, out) of kernels without an update that servers fuse with one that has.
      is_all_known: whether `known` has the whole model, and not the adapter's modules alone.
    """

    adapter: Adapter
    known: Mapping[str, bool]
    frozen: Mapping[str, np.ndarray]
    siblings: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    is_all_known: bool = True


def collect(tree: Any, names: str | Sequence[Entry] | None = None, *, as_lora: bool = False) -> Collected:
    """Takes the adapter out of a wrapped tree; arguments and errors as of `jlora.peft.save`.

    Args:
      tree: the tree.
      names: the map.
      as_lora: whether other variants are written as plain LoRA too, where they are low-rank.
    """
    if not has_nodes(tree):
        raise TypeError("peft.save takes a tree that jlora.wrap or jlora.peft.load returned; no leaf of it is wrapped")
    paths, leaves, _ = flatten(tree, is_node)
    by_path = dict(zip(paths, leaves, strict=True))
    batch = {path: leaf.axes.batch_axis for path, leaf in by_path.items() if is_node(leaf) and hasattr(leaf, "axes")}
    stacked = {path: axes[0] for path, axes in batch.items() if axes}
    slots = slots_of(leaf_shapes(paths, leaves), resolved(names), stacked)
    places: dict[str, list[Named]] = collections.defaultdict(list)
    for name, found in slots.items():
        for slot in found:
            places[slot.path].append((name, slot))
    nodes = {path: leaf for path, leaf in by_path.items() if is_node(leaf)}
    if missing := [path for path in nodes if path not in places]:
        raise ValueError(
            f"peft.save: names has no name for {missing[0]}, which is adapted ({len(missing)} in all); add "
            f'("its.pytorch.name", {missing[0]!r})'
        )
    if names is None:
        _check_native(nodes, places)
    of = lambda kind: {path: node for path, node in nodes.items() if isinstance(node, kind)}
    full = dict(_full(of(TrainableParam), places))
    others = (TrainableParam, LoraBiasParam, GainedBiasParam, TokensParam)
    kernels = {path: node for path, node in nodes.items() if not isinstance(node, others)}
    form = None if as_lora else _form(kernels, places)
    filed = None if form is None else fielded.united(dict(_filed(kernels, places)))
    form = None if filed is None else form
    adapted: dict[str, Any] = dict(_updates(kernels, places)) if filed is None else dict(filed)
    _check_gains(of(GainedBiasParam), adapted, slots, places)
    updates = _with_biases(adapted, dict(_biases(of(LoraBiasParam), places)))
    tokens = dict(_rows(of(TokensParam), places))
    dropout = max((getattr(node, "dropout", 0.0) for node in kernels.values()), default=0.0)
    turned = [_is_conv1d(*place, node) for path, node in kernels.items() for place in places[path]]
    adapter = Adapter(updates, full, tokens, dropout=dropout, conv1d=any(turned), form=form)
    known = {name: _is_kernel(found[0]) for name, found in slots.items()}
    siblings = dict(_siblings({name: kernels[slots[name][0].path] for name in updates}, slots, by_path))
    return Collected(adapter, known, dict(_beside(full, updates, slots, by_path)), siblings)


def _check_native(nodes: Mapping[str, Any], places: Mapping[str, list[Named]]) -> None:
    """Refuses a tree that can't have PyTorch's names, since it stacks kernels that PyTorch has one by one."""
    for path, node in nodes.items():
        if getattr(node, "axes", None) is not None and node.axes.batch_axis and not places[path][0][1].is_native:
            raise ValueError(
                f"peft.save: {path} of shape {tuple(node.shape)} stacks kernels, which PyTorch has one by one; say "
                'their names: names="llama", another of jlora.peft.NAMES, or a list of pairs such as ("model.layers.'
                '{i}.self_attn.q_proj", "layers/attn/query/kernel[{i}]")'
            )


def _is_kernel(slot: Slot) -> bool:
    return len(slot.index) - len(slot.fixed) >= 2 and slot.path.rpartition("/")[2] != "bias"


def _is_conv1d(name: str, slot: Slot, node: Any) -> bool:
    """Whether a weight that lies as PyTorch's is (in, out), as GPT-2's."""
    words = layout.words_of(slot, node.axes)
    return slot.is_native and words == ("in", "out") and layout.kind_of(name, slot.path, words, node.axes) == LINEAR


def _form(nodes: Mapping[str, Any], places: Mapping[str, list[Named]]) -> Form | None:
    """How PEFT's files hold all of the nodes as what they are; None: as plain LoRA of the same function, if at all."""
    forms = {id(node.FORM): node.FORM for node in nodes.values()}
    form = next(iter(forms.values()), None)
    if form is None or len(forms) > 1 or any(node.FORM.method != form.method for node in nodes.values()):
        return None
    slots = [(path, name, slot) for path in nodes for name, slot in places[path]]
    return form if all(fielded.fits(name, slot, nodes[path]) for path, name, slot in slots) else None


def _filed(nodes: Mapping[str, Any], places: Mapping[str, list[Named]]) -> Iterator[tuple[str, Filed]]:
    """The modules of another method than LoRA."""
    for path, node in nodes.items():
        _check_values(path, node)
        for name, slot in places[path]:
            if _is_adapted(node, slot):
                arrays = {field.name: getattr(node, field.name) for field in leaf_fields(node) if field.name != "base"}
                dims = {field.name: field.metadata.get("dims", "") for field in leaf_fields(node)}
                host = {
                    name: _part_of(x, dims[name], slot, node) for name, x in arrays.items() if not isinstance(x, tuple)
                }
                yield name, fielded.filed(name, slot, node, host)


def _part_of(x: Any, dims: str, slot: Slot, node: Any) -> np.ndarray:
    """A field of a node at a slot's place."""
    groups = [getattr(node.axes, f"{word}_axis") if word in GROUPS else (None,) for word in dims.split()]
    return _taken(np.asarray(x, np.float32), groups, slot, node.axes, getattr(node, "layers", None))


def _check_values(path: str, node: Any) -> None:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(partition({path: node})[0])):
        raise ValueError(f"peft.save: the factors of {path} are abstract: there are no values to save")


def _updates(nodes: Mapping[str, Any], places: Mapping[str, list[Named]]) -> Iterator[tuple[str, Update]]:
    parts: dict[str, list[tuple[Slot, Update]]] = collections.defaultdict(list)
    for path, node in nodes.items():
        fields = _fields(path, node)
        for name, slot in places[path]:
            if _is_adapted(node, slot):
                parts[name].append((slot, _update(name, slot, node, fields)))
    for name, found in parts.items():
        yield name, found[0][1] if found[0][0].part is None else _joined(name, found)


def _fields(path: str, node: Any) -> dict[str, Any]:
    """The arrays of a node as those of plain LoRA or DoRA, and its scale."""
    _check_values(path, node)
    if not isinstance(node, (LoraParam, DoraParam)):
        node = plain("peft.save", path, node)
    lora_a, lora_b = from_start(node)
    values = {"a": lora_a, "b": lora_b, "magnitude": getattr(node, "magnitude", None)}
    host = {name: np.asarray(x, np.float32) for name, x in values.items() if x is not None}
    return host | {"scale": float(node.scale), "layers": node.layers}


def _is_adapted(node: Any, slot: Slot) -> bool:
    layers = getattr(node, "layers", None)
    return layers is None or slot.index[node.axes.batch_axis[0]] in (None, *layers)


def _update(name: str, slot: Slot, node: Any, fields: Mapping[str, Any]) -> Update:
    words = layout.words_of(slot, node.axes)
    part = Part(words, slot.sizes(node.shape), slot.layout)
    kind, axes = layout.kind_of(name, slot.path, words, node.axes), node.axes
    take = lambda x, groups: _taken(x, groups, slot, axes, fields["layers"])
    a = layout.torch_a(take(fields["a"], (axes.batch_axis, axes.in_axis)), kind, part)
    b = layout.torch_b(take(fields["b"], (axes.batch_axis, (None,), axes.out_axis)), part)
    magnitude = fields.get("magnitude")
    if magnitude is not None:
        own = take(magnitude, (axes.batch_axis, axes.out_axis))
        magnitude = layout.torch_outputs(own, part).reshape(-1)
        if kind == EXPERTS:
            raise ValueError(f"peft.save: {name} is a stack of experts with DoRA, which PEFT has not; merge it")
    return Update(kind, a, b, fields["scale"], magnitude)


def _taken(x: np.ndarray, groups: Sequence[tuple[int | None, ...]], slot: Slot, axes: Axes, layers: Any) -> np.ndarray:
    """An array beside the leaf at the slot's places on those of its axes that it has."""
    places: list[Any] = []
    for axis in (axis for group in groups for axis in group):
        at = None if axis is None else slot.index[axis]
        is_layer = layers is not None and axes.batch_axis[:1] == (axis,)
        places.append(slice(None) if at is None else layers.index(at) if is_layer and layers else at)
    return x[tuple(places)]


def _joined(name: str, found: list[tuple[Slot, Update]]) -> Update:
    """Several updates of parts of one module's outputs as one: of the sum of their ranks, where their A differ."""
    ordered = {slot.part[0]: update for slot, update in found if slot.part is not None}
    first = found[0][1]
    if first.magnitude is not None:
        raise ValueError(
            f"peft.save: {name} is one module in PyTorch but {len(found)} leaves with DoRA here; merge them"
        )
    count = found[0][0].part[1] if found[0][0].part else 1
    is_shared = len(ordered) == count and all(np.array_equal(u.a, first.a) for u in ordered.values())
    scaled = {at: u.b * np.float32(u.scale / first.scale) for at, u in ordered.items()}
    if is_shared:
        return dataclasses.replace(first, b=np.concatenate([scaled[at] for at in range(count)], axis=-2))
    axis = first.a.ndim - 2 if first.kind == EXPERTS else 0
    rows = []
    for at in range(count):
        blocks = [b if at == own else np.zeros_like(b) for own, b in sorted(scaled.items())]
        rows.append(np.concatenate(blocks, axis=-1))
    a = np.concatenate([u.a for _, u in sorted(ordered.items())], axis=axis)
    return dataclasses.replace(first, a=a, b=np.concatenate(rows, axis=-2))


def _full(nodes: Mapping[str, Any], places: Mapping[str, list[Named]]) -> Iterator[tuple[str, np.ndarray]]:
    for path, node in nodes.items():
        for name, slot in places[path]:
            yield parameter_of(name, slot), torch_array(name, slot, node.base)


def _biases(nodes: Mapping[str, Any], places: Mapping[str, list[Named]]) -> Iterator[tuple[str, tuple[Any, float]]]:
    for path, node in nodes.items():
        for name, slot in places[path]:
            yield name.removesuffix(".bias"), (torch_array(name, slot, node.lora_bias), float(node.scale))


def _with_biases(updates: dict[str, Update], biases: Mapping[str, tuple[np.ndarray, float]]) -> dict[str, Update]:
    """The updates with their own biases: where one has such, all have."""
    if not biases:
        return updates
    if lone := sorted({*biases} - {*updates}):
        raise ValueError(f"peft.save: {lone[0]} has a bias of an update, but no update; wrap both with one spec")
    zero = lambda update: (np.zeros(update.b.shape[-2], np.float32), update.scale)
    of = {name: biases.get(name, zero(update)) for name, update in updates.items()}
    scaled = lambda name, update: (of[name][0] * np.float32(of[name][1] / update.scale)).reshape(-1)
    return {name: dataclasses.replace(u, bias=scaled(name, u)) for name, u in updates.items()}


def _check_gains(
    nodes: Mapping[str, Any],
    updates: Mapping[str, Any],
    slots: Mapping[str, Sequence[Slot]],
    places: Mapping[str, list[Named]],
) -> None:
    """Refuses a scaled bias whose gains are not those of the kernel beside it, of which PEFT has one vector."""
    gains = {name: torch_array(name, slot, node.gain) for path, node in nodes.items() for name, slot in places[path]}
    for name, update in updates.items():
        wanted = update.form.gain_of_bias(update.tensors) if isinstance(update, Filed) else None
        found = gains.pop(f"{name}.bias", None)
        if wanted is None or (found is None and f"{name}.bias" not in slots):
            continue
        if found is None or not np.array_equal(np.asarray(found, np.float32).reshape(-1), wanted):
            raise ValueError(
                f"peft.save: {name} has a bias with other gains than its kernel, and PEFT's {update.form.method} "
                "has one vector for both; merge it"
            )
    if gains:
        raise ValueError(f"peft.save: {next(iter(gains))} is scaled, and no kernel beside it; merge it")


def _rows(nodes: Mapping[str, Any], places: Mapping[str, list[Named]]) -> Iterator[tuple[str, Any]]:
    for path, node in nodes.items():
        for name, slot in places[path]:
            factor = Part(("in", "out"), tuple(node.shape), slot.layout).factor
            yield name, (node.tokens, np.asarray(node.rows, np.float32) / np.float32(factor))


def _beside(
    full: Mapping[str, Any], updates: Mapping[str, Any], slots: Mapping[str, Sequence[Slot]], leaves: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """The other parameters of modules of which one trains."""
    modules = {name.rpartition(".")[0] for name in full} - {*updates}
    for module in modules:
        for name in (module, f"{module}.bias"):
            for slot in slots.get(name, ()):
                leaf = leaves[slot.path]
                parameter = parameter_of(name, slot)
                if parameter not in full and not is_node(leaf) and not isinstance(leaf, jax.ShapeDtypeStruct):
                    yield parameter, torch_array(name, slot, leaf)


def _siblings(
    nodes: Mapping[str, Any], slots: Mapping[str, Sequence[Slot]], leaves: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """The kernels that are fused with adapted ones, where the tree has all of them; their axes are those of the one."""
    for name, node in nodes.items():
        module, _, last = name.rpartition(".")
        for group in (group for group in FUSED if last in group):
            others = [f"{module}.{other}" for other in group]
            words = layout.words_of(slots[name][0], node.axes)
            if not all(other in slots and len(slots[other]) == 1 for other in others):
                continue
            for other in {*others} - {*nodes}:
                slot = slots[other][0]
                part = Part(words, slot.sizes(leaves[slot.path].shape), slot.layout)
                if len(part.sizes) == len(words):
                    yield other, (math.prod(part.of("in")), math.prod(part.of("out")))
