"""Whether what is said of a node fits together, the base beside it, and the arrays that are stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora.checkpoint import backend
from jlora.checkpoint.about import CLASSES, array, saved_fields, tuple_names
from jlora.checkpoint.told import Told
from jlora.nodes.axes import Axes
from jlora.nodes.fields import GROUPS, own_sizes, sizes_of

_FLAT = "float32"


def check_names(told: Told, node: Any) -> None:
    """Refuses arrays that a node of this class does not have, and a class whose arrays are not there."""
    there = told.at("arrays")
    names = [name for field in saved_fields(node) for name in _names(field, there, type(node))]
    there.parts(names)


def _names(field: Any, there: Told, cls: type) -> Sequence[str]:
    """The arrays of a field: those of a tuple are all there or none is; so is one of a class that is not jlora's.

    One that by default is not there may lack.
    """
    dims = field.metadata.get("dims", "")
    names = tuple_names(field.name, len(dims)) if isinstance(dims, tuple) else [field.name]
    may_lack = isinstance(dims, tuple) or field.metadata.get("optional") or cls not in CLASSES or field.default == ()
    return names if not may_lack or any(name in there.value for name in names) else ()


def check_stored(directory: Any, item: str, nodes: Told) -> None:
    """Refuses arrays that are not those that are stored, in their names, shapes and types.

    Raises:
      DamagedError: if one differs.
    """
    stored = backend.read_shapes(directory, item)
    told = {path: node.at("arrays").entries() for path, node in nodes.entries().items()}
    for path in sorted({*told} | {*stored}):
        if path not in told:
            raise nodes.at(path).refused(f"a node, since {directory / item} has its arrays", backend.DamagedError)
        for name in sorted({*told[path]} | {*stored.get(path, {})}):
            x, (shape, dtype) = nodes.at(path).at("arrays").at(name), stored.get(path, {}).get(name, (None, None))
            if shape is None:
                raise x.refused(f"no such array, since {directory / item} has none", backend.DamagedError)
            if name not in told[path] or array(x) != jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)):
                expected = f"the shape {[*shape]} and the dtype {dtype}, which {directory / item} has"
                raise x.refused(expected, backend.DamagedError)


def check_fit(told: Told, node: Any, shape: Sequence[int]) -> None:
    """Refuses axes, layers and arrays that do not stand beside a base of this shape.

    All arrays may have axes more before their own, and the base too: those of `jax.vmap`.
    """
    kernel = _kernel_shape(told, node, tuple(shape))
    if kernel is None:
        return
    beside = dataclasses.replace(node, base=jax.ShapeDtypeStruct(kernel, _FLAT))
    _check_layers(told, beside)
    more = tuple(shape)[: len(shape) - len(kernel)]
    leads, known = {more} if more else set(), {}
    for dims, x in _arrays(told, node):
        lead, own = _split(x, beside, dims)
        leads.add(lead)
        known = own_sizes(beside, dims, own) | known
        expected = sizes_of(beside, dims, known)
        if own.shape != expected or len(leads) > 1:
            raise x.refused(f"by its settings the shape {[*more, *expected]}, beside a base of shape {[*shape]}")
    if type(node) in CLASSES:
        _check_own(told, beside, known)


def _kernel_shape(told: Told, node: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of the base that the node's settings speak of; None: they speak of none."""
    axes = getattr(node, "axes", None)
    if not isinstance(axes, Axes):
        _check_like_base(told, node, shape)
        return None
    every = (*axes.in_axis, *axes.out_axis, *axes.batch_axis)
    if sorted(every) != [*range(len(every))] or len(every) > len(shape) or not axes.in_axis or not axes.out_axis:
        at = told.at("settings").at("axes") if "axes" in told.at("settings").value else told.at("class")
        raise at.refused(
            f"axes of a base of shape {[*shape]} (each in one group, by its number from 0, in_axis and out_axis with "
            "one at least)"
        )
    return shape[len(shape) - len(every) :]


def _check_like_base(told: Told, node: Any, shape: tuple[int, ...]) -> None:
    """Refuses an array that stands for the base, or is added to it, and has another shape."""
    for field in saved_fields(node):
        if field.name == "base" or type(node) in CLASSES:
            x = told.at("arrays").at(field.name)
            own = array(x).shape
            if own != shape and (field.name == "base" or own[len(own) - len(shape) :] != shape):
                raise x.refused(f"an array of shape {[*shape]}, that of the base")


def _check_layers(told: Told, node: Any) -> None:
    layers, batch = getattr(node, "layers", None), node.axes.batch_axis
    if layers is None:
        return
    at = told.at("settings").at("layers")
    if not batch:
        raise at.refused("null, since axes.batch_axis has none")
    if any(layer >= node.shape[batch[0]] for layer in layers):
        raise at.refused(f"numbers below {node.shape[batch[0]]}, the layers of the base")


def _arrays(told: Told, node: Any) -> Iterator[tuple[str, Told]]:
    """The arrays whose axes are known, with their names."""
    there = told.at("arrays").entries()
    for field in saved_fields(node):
        dims = field.metadata.get("dims", "")
        names = tuple_names(field.name, len(dims)) if isinstance(dims, tuple) else [field.name]
        pairs = zip(dims if isinstance(dims, tuple) else (dims,), names, strict=True)
        yield from ((words, there[name]) for words, name in pairs if words and name in there)


def _split(x: Told, node: Any, dims: str) -> tuple[tuple[int, ...], jax.ShapeDtypeStruct]:
    """The sizes of an array's axes before its own, and the array without them."""
    size = lambda word: len(getattr(node.axes, f"{word}_axis")) if word in GROUPS else 1
    count, shape = sum(map(size, dims.split())), array(x).shape
    if len(shape) < count:
        raise x.refused(f"an array of {count} axes ({dims})")
    return shape[: len(shape) - count], jax.ShapeDtypeStruct(shape[len(shape) - count :], _FLAT)


def _check_own(told: Told, node: Any, known: Mapping[str, int]) -> None:
    """Refuses settings of jlora's own classes that the sizes of their arrays contradict."""
    settings, arrays = told.at("settings"), told.at("arrays")
    product = lambda word: math.prod(sizes_of(node, word))
    if "entries" in known and node.size * (node.size - 1) != 2 * known["entries"]:
        raise settings.at("size").refused(f"the size of blocks of {known['entries']} entries above the diagonal")
    if "tokens" in known and (len(node.tokens) != known["tokens"] or max(node.tokens, default=0) >= node.shape[0]):
        raise settings.at("tokens").refused(f"{known['tokens']} numbers below {node.shape[0]}")
    for name, word, one, other in (("lokr_a", "in", "p", "within"), ("lokr_b", "out", "q", "beyond")):
        if other in known and known[one] * known[other] != product(word):
            raise arrays.at(name).refused(f"sizes that with {one}={known[one]} of lokr_c give {product(word)}")
