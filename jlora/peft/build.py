"""The nodes of a wrapped tree, each of the parts that an adapter has for a leaf."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora.nodes import placement
from jlora.nodes.axes import Axes, of_conv, of_use
from jlora.nodes.checks import check_made
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel, KernelSpec
from jlora.nodes.node import AdaptedParam, TrainableParam
from jlora.nodes.qarray import codes, dense, is_qarray
from jlora.peft import fielded, layout
from jlora.peft.adapter import CONV, EMBEDDING, LINEAR, Adapter, Filed, Update
from jlora.peft.layout import Part, Sizes, Words
from jlora.peft.orient import Orientation, how_to_say, of_whole
from jlora.peft.stack import Piece, Stack, fixed_axes, padded
from jlora.variants.bias import GainedBiasParam, LoraBiasParam
from jlora.variants.dora import DoraParam, squared_norms
from jlora.variants.lora import LoraParam
from jlora.variants.tokens import TokensParam


class Tree(NamedTuple):
    """The parameters, what is known of them, and the adapter.

    Args:
      leaves: by path.
      axes: of those leaves of which they are known.
      adapter: what is put onto them.
      orientation: which way a matrix lies whose axes are not known.
    """

    leaves: Mapping[str, Any]
    axes: Mapping[str, Axes]
    adapter: Adapter
    orientation: Orientation


def adapted(path: str, pieces: list[Piece], tree: Tree) -> AdaptedParam:
    """The node of a kernel: the factors of its parts, one beside the other on the axes that they are parts of."""
    base, adapter = tree.leaves[path], tree.adapter
    words, fixed = _words(path, pieces, tree), fixed_axes(path, pieces)
    axes = _axes(words, fixed, len(base.shape))
    if isinstance(pieces[0].value, Filed):
        if pieces[0].value.form.turns_bias and (bias := beside(path)) in tree.leaves:
            raise ValueError(f"peft.load: {told_bias(pieces[0].value.form, bias)}")
        return _placed(path, dataclasses.replace(fielded.adapted(path, pieces, words, axes, base.shape), base=base))
    told = layout.kind_of(pieces[0].name, path, words)
    if told != pieces[0].value.kind and EMBEDDING in (told, pieces[0].value.kind):
        axes = of_use(axes, told != EMBEDDING)
    if told != CONV and pieces[0].value.kind == CONV:
        axes = of_conv(axes)
    part = Part(words, pieces[0].slot.sizes(base.shape), pieces[0].slot.layout)
    scale = collections.Counter(piece.value.scale for piece in pieces).most_common(1)[0][0]
    rank = max(piece.value.rank for piece in pieces)
    batch = len(part.of("batch"))

    def factors(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        update, own = piece.value, part._replace(layout=piece.slot.layout)
        lora_b = layout.lora_b(update, piece.slot, own) * np.float32(update.scale / scale)
        return padded(layout.lora_a(update, own), rank, batch + len(part.of("in"))), padded(lora_b, rank, batch)

    stack = Stack.of(path, pieces, fixed, base.shape)
    lora_a, lora_b = map(stack, zip(*map(factors, pieces), strict=True))
    settings = {"axes": axes, "scale": scale, "dropout": adapter.dropout, "layers": stack.layers}
    if not adapter.is_dora:
        node: Any = LoraParam(None, lora_a, lora_b, **settings)
    else:
        own = lambda piece: part._replace(layout=piece.slot.layout)
        magnitude = stack.whole([layout.vector(p.value.magnitude, p.slot, own(p)) for p in pieces])
        node = DoraParam(None, lora_a, lora_b, magnitude, None, **settings)
    if adapter.start is not None:
        _check_alike(path, pieces, adapter.start)
    return _placed(path, onto(node, base, adapter.start))


def with_shared(tree: Tree, pieces: Mapping[str, list[Piece]]) -> Tree:
    """The tree with an adapter that has the tensors that its modules have in common, drawn where the file has none."""
    form, updates = tree.adapter.form, tree.adapter.updates
    if form is None or not form.shared or not updates or next(iter(updates.values())).shared:
        return tree
    sizes = []
    for path, of_leaf in pieces.items():
        part = Part(_words(path, of_leaf, tree), of_leaf[0].slot.sizes(tree.leaves[path].shape))
        sizes.append((math.prod(part.of("in")), math.prod(part.of("out"))))
    shared = form.draw(next(iter(updates.values())).spec, *map(max, zip(*sizes, strict=True)))
    drawn = {name: dataclasses.replace(update, shared=shared) for name, update in updates.items()}
    return tree._replace(adapter=dataclasses.replace(tree.adapter, updates=drawn))


def beside(path: str) -> str:
    """The path of the bias beside a kernel."""
    return f"{path.rpartition('/')[0]}/bias".lstrip("/")


def told_bias(form: Form, bias: str) -> str:
    """Why a kernel with a bias is not one of the files of a method."""
    return f"PEFT's {form.method} changes {bias} with its kernel, which jlora leaves as it is; merge the adapter"


def _words(path: str, pieces: list[Piece], tree: Tree) -> Words:
    """Which axes of the parts of a leaf are in, out and stacked: as traced, as the map says, or by their sizes."""
    (name, slot, update), shape = pieces[0], tree.leaves[path].shape
    is_filed = isinstance(update, Filed)
    sizes = fielded.sizes_of(update) if is_filed else Sizes.of_update(update, slot)
    if path in tree.axes:
        words = layout.words_of(slot, tree.axes[path])
        fits = [words] if layout.is_fitting(words, slot.sizes(shape), sizes) else []
    else:
        fits = layout.fitting(slot, shape, sizes, tree.orientation.in_first(name, slot, update.kind))
    if len(fits) == 1:
        return fits[0]
    shapes = [x.shape for x in (update.tensors.values() if is_filed else (update.a, update.b))]
    factors = f"peft.load: {name} has factors {' and '.join(map(str, shapes))}"
    is_matrix = len(slot.sizes(shape)) == 2
    if not fits:
        is_other = is_matrix and path not in tree.axes and layout.fitting(slot, shape, sizes, None)
        way = f" but the other way round; if it is so, {how_to_say(name)}" if is_other else ""
        raise ValueError(f"{factors}, which do not fit {path} of shape {tuple(shape)}{way}")
    way = f", {how_to_say(name)}" if is_matrix and update.kind == LINEAR else ""
    said = " ".join(fits[0])
    raise ValueError(
        f"{factors}; the sizes of {path}, {tuple(shape)}, do not tell its axes: {_either(fits)}. Give "
        f"sites=jlora.sites(fn, params, *args), or say it in the map: (name, path, jlora.peft.Layout({said!r}))"
        f"{way}"
    )


def _either(fits: Sequence[Words]) -> str:
    return " or ".join(map(" ".join, fits))


def _axes(words: Words, fixed: tuple[int, ...], ndim: int) -> Axes:
    left = [axis for axis in range(ndim) if axis not in fixed]
    of = lambda word: tuple(axis for axis, w in zip(left, words, strict=True) if w == word)
    return Axes(of("in"), of("out"), (*fixed, *of("batch")))


def _check_alike(path: str, pieces: list[Piece], init: str) -> None:
    update = pieces[0].value
    if any((p.value.rank, p.value.scale) != (update.rank, update.scale) for p in pieces):
        raise ValueError(f"peft.load: the parts of {path} differ in rank or scale, which init={init!r} does not allow")


def onto(node: Any, base: Any, start: str | None = None) -> Any:
    """A node put onto a base, with what is computed of that: DoRA's norms, the factors that were taken out of it.

    Args:
      node: without a base, or with an abstract one.
      base: of its shape.
      start: the initialisation, where it has changed the base; None: what the node was made with.
    """
    if not isinstance(node, (LoraParam, DoraParam)):
        return dataclasses.replace(node, base=node.base if isinstance(node, TrainableParam) else base)
    abstractly = isinstance(codes(base), jax.ShapeDtypeStruct)
    run = lambda fn: jax.eval_shape(fn, base) if abstractly else jax.jit(fn)(base)
    if isinstance(node, DoraParam):
        norms = lambda base: squared_norms(dataclasses.replace(node, base=base), base)
        node = dataclasses.replace(node, norm2=run(norms))
    if start is not None:
        node = dataclasses.replace(node, start=run(lambda base: _taken_out(node, base, start)))
    return dataclasses.replace(node, base=base)


def _taken_out(node: Any, base: Any, init: str) -> Any:
    spec = KernelSpec(node.lora_a.shape[-1], float(node.scale), init=init)
    kernel = Kernel("", tuple(base.shape), node.axes, "dot", spec, node.layers)
    return kernel.low_rank(base, jax.random.key(0))["start"]


def _placed(path: str, node: Any) -> AdaptedParam:
    """The node with its arrays on the devices, placed as the base is."""
    base, beside = node.base, dataclasses.replace(node, base=None)
    places = placement.of_node(beside, base)
    nodes = (beside,) if places is None else (beside, places)
    node = dataclasses.replace(jax.tree.map(_on_device, *nodes), base=base)
    check_made(path, node)
    return node


def _on_device(x: Any, place: Any = None) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    return jnp.asarray(x) if place is None else jax.device_put(x, place)


def _as_base(x: np.ndarray, base: Any) -> jax.Array:
    """An array of the base's shape, placed as it is."""
    place = getattr(base, "sharding", None)
    return _on_device(x, place if isinstance(place, jax.sharding.NamedSharding) else None)


def trained_in_full(path: str, pieces: list[Piece], tree: Tree) -> TrainableParam:
    """A leaf trained in full, with the values of its parts; the other parts as they were."""
    base = tree.leaves[path]
    is_all = all(at is None for at in pieces[0].slot.index)
    if isinstance(base, jax.ShapeDtypeStruct) and not is_all:
        raise ValueError(
            f"peft.load: some parts of {path} are trained in full; so the tree must have the values of all"
        )
    whole = np.empty(base.shape, base.dtype) if is_all else np.array(dense(base))
    for piece in pieces:
        whole[piece.slot.place] = of_leaf(piece, piece.value, base).astype(base.dtype)
    return TrainableParam(_as_base(whole, base))


def of_leaf(piece: Piece, array: np.ndarray, base: Any) -> np.ndarray:
    """A whole parameter of PyTorch's as the part of the leaf.

    Raises:
      ValueError: if it does not fit.
    """
    name, slot, _ = piece
    left = slot.sizes(base.shape)
    told = f"peft: {name} of shape {array.shape} does not fit {slot.path} of shape {tuple(base.shape)}"
    if slot.is_native or array.ndim < 2:
        if array.size != math.prod(left) or (slot.is_native and array.shape != left):
            raise ValueError(told)
        return array if slot.is_native else layout.vector(array, slot, Part(("out",) * len(left), left, slot.layout))
    sizes = Sizes.of_weight(name, array.shape, slot.layout)
    fits = layout.fitting(slot, base.shape, sizes, of_whole(name, slot, sizes.kind))
    if len(fits) != 1:
        ways = f", or in several ways: {_either(fits)}" if fits else ""
        raise ValueError(f'{told}{ways}; the map may say how: (name, path, jlora.peft.Layout("in out"))')
    return layout.leaf_weight(array, sizes.kind, Part(fits[0], left, slot.layout))


def with_bias(path: str, pieces: list[Piece], tree: Tree) -> LoraBiasParam:
    """A bias with that of the update beside it."""
    base, scale = tree.leaves[path], pieces[0].value.scale
    whole = np.zeros(base.shape, np.float32)
    for piece in pieces:
        update: Update = piece.value
        assert update.bias is not None
        whole[piece.slot.place] = of_leaf(piece, update.bias, base) * np.float32(update.scale / scale)
    return LoraBiasParam(base, _as_base(whole, base), scale)


def with_gain(path: str, pieces: list[Piece], tree: Tree) -> GainedBiasParam:
    """A bias that is scaled as the outputs of the kernel beside it."""
    base = tree.leaves[path]
    whole = np.ones(base.shape, np.float32)
    for piece in pieces:
        whole[piece.slot.place] = of_leaf(piece, piece.value.astype(np.float32), base)
    return GainedBiasParam(base, _as_base(whole, base))


def with_rows(path: str, pieces: list[Piece], tree: Tree) -> TokensParam:
    """A table of which some rows are trained."""
    base, (name, slot, (tokens, rows)) = tree.leaves[path], pieces[0]
    if is_qarray(base):
        raise ValueError(f"peft.load: the adapter trains rows of {name}, but {path} is quantised; leave it dense")
    if len(pieces) > 1 or len(base.shape) != 2 or rows.shape[1] != base.shape[1] or max(tokens) >= base.shape[0]:
        raise ValueError(
            f"peft.load: the adapter has rows {min(tokens)} to {max(tokens)} of {name}, of shape {rows.shape}, which "
            f"do not fit {path} of shape {tuple(base.shape)}"
        )
    factor = Part(("in", "out"), tuple(base.shape), slot.layout).factor
    return TokensParam(base, jnp.asarray(rows.astype(np.float32) * np.float32(factor)), tokens)


def check_bases(tree: Tree, tables: Mapping[str, list[Piece]]) -> None:
    """Refuses an adapter whose own copy of a leaf is another than the tree's: it was trained on another model."""
    for path, pieces in tables.items():
        base = tree.leaves[path]
        for piece in pieces:
            theirs = of_leaf(piece, piece.value, base).astype(np.float32)
            if isinstance(base, jax.ShapeDtypeStruct) or is_qarray(base):
                continue
            ours = np.asarray(base[piece.slot.place], np.float32)
            if not np.abs(ours - theirs).max() <= 0.01 * np.abs(ours).max():  # nor where it is NaN
                raise ValueError(
                    f"peft.load: the adapter's file has a copy of {piece.name} that differs from {path}, which would "
                    "overwrite the base: the adapter was trained on another base, or it is trained and "
                    "modules_to_save does not name it. The base is never overwritten; load the adapter onto that model"
                )
