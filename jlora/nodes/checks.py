"""What is refused of a node or of its class: at once, and by the name of what is wrong."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from jlora.interpret.factored import Factored
from jlora.nodes.fields import GROUPS, leaf_fields, map_fields, own_sizes, sizes_of
from jlora.nodes.node import AdaptedParam
from jlora.nodes.qarray import is_hole, is_whole


def check_whole(where: str, path: str, node: AdaptedParam) -> None:
    """Refuses a node that lacks some of its arrays."""
    if any(is_hole(x) for f in leaf_fields(node) for x in jax.tree.leaves(getattr(node, f.name), is_leaf=is_whole)):
        if path.startswith("lora_params/"):
            raise ValueError(
                f"{where} takes a tree, and this is an adapted NNX model: jlora.nnx.tree(model) is its tree, and "
                "jlora.nnx.merge(model) and unwrap(model) give plain models"
            )
        raise ValueError(
            f"{where}: {path} lacks some of its arrays, as in one half of jlora.partition; jlora.combine the two first"
        )


def check_fit(where: str, path: str, node: AdaptedParam) -> None:
    """Refuses a node that is not whole, or whose factors are not those of its base."""
    leaves, structure = jax.tree.flatten(node)
    if _is_fit(structure, tuple(getattr(x, "shape", None) for x in leaves)):
        return
    check_whole(where, path, node)
    found, expected = _sizes(node)
    if found != expected:
        raise ValueError(
            f"{where}: the factors of {path} have shapes {found}, but beside its base of shape {tuple(node.shape)} "
            f"they have {expected}: these are of another kernel, or stacked and not under jax.vmap"
        )


@functools.lru_cache(maxsize=4096)
def _is_fit(structure: Any, shapes: tuple[Any, ...]) -> bool:
    """Whether `check_fit` has nothing against a node of this structure: of many layers one is looked at."""
    if None in shapes:
        return False
    node = structure.unflatten([jax.ShapeDtypeStruct(shape, bool) for shape in shapes])
    try:
        check_whole("", "", node)
        found, expected = _sizes(node)
    except (ValueError, TypeError):
        return False
    return found == expected


def _sizes(node: AdaptedParam) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The shapes of a node's arrays, as they are and as they are to be."""
    fields: list[tuple[str, Any]] = []
    map_fields(lambda dims, x: fields.append((dims, x)) if dims else None, node)
    known = {word: size for dims, x in fields for word, size in own_sizes(node, dims, x).items()}
    return tuple(tuple(x.shape) for _, x in fields), tuple(sizes_of(node, dims, known) for dims, _ in fields)


def check_variant(cls: type) -> None:
    """Refuses a class that is no whole variant: before it is used, not when its arrays are missing somewhere."""
    is_mine = lambda field: "trained" in field.metadata or "static" in field.metadata
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    faults = [f"its field {name} is declared with none of trained, frozen and static"
              for name, field in fields.items() if not is_mine(field)]  # fmt: skip
    faults += [f"it has no field {name}" for name in ("base", "axes", "layers") if name not in fields]
    if cls.create.__func__ is AdaptedParam.create.__func__:  # type: ignore[attr-defined]
        faults.append("it has no classmethod create(cls, base, kernel, key)")
    if not any(field.metadata.get("trained") for field in fields.values()):
        faults.append("none of its fields is trained")
    if faults:
        raise ValueError(f"LoraSpec: variant {cls.__name__} is no variant yet: {'; '.join(faults)}")


def check_made(path: str, node: Any) -> None:
    """Refuses a node whose class is no pytree, or whose arrays have other shapes than their fields say."""
    if jax.tree.structure(node) == jax.tree.structure(0):
        raise TypeError(
            f"wrap: {type(node).__name__} is no pytree; put @jax.tree_util.register_dataclass above its @dataclass"
        )
    for field in leaf_fields(node):
        value, dims = getattr(node, field.name), field.metadata.get("dims", "")
        pairs: Any = zip(value, dims, strict=True) if isinstance(value, tuple) and value else [(value, dims)]
        for x, words in pairs:
            if words and hasattr(x, "shape") and not _fits(node, words, x):
                raise ValueError(
                    f"wrap: {type(node).__name__}.create made {field.name} of shape {tuple(x.shape)} for {path} of "
                    f"shape {tuple(node.shape)}, whose {node.axes} does not fit its dims {words!r}"
                )


def _fits(node: Any, dims: str, x: Any) -> bool:
    known = own_sizes(node, dims, x)
    return {*dims.split()} - {*GROUPS} <= {*known} and sizes_of(node, dims, known) == tuple(x.shape)


def check_value(path: str, node: AdaptedParam, value: Any) -> None:
    """Refuses what `effective` returned, if its factors do not stand beside the base."""
    if not isinstance(value, Factored):
        if getattr(value, "shape", None) != node.shape:
            raise TypeError(
                f"apply: {type(node).__name__}.effective returned {value!r} for {path}; it returns a Factored weight, "
                f"or an array of shape {tuple(node.shape)}"
            )
        return
    for factor, role in zip(value.factors, value.roles, strict=True):
        sizes = zip(factor.shape, node.shape, strict=False)
        if factor.ndim != node.ndim + 1 or any(n not in (1, size) for n, size in sizes):
            raise ValueError(
                f"apply: the factor {role!r} that {type(node).__name__}.effective gives {path} has shape "
                f"{tuple(factor.shape)}; beside a base of shape {tuple(node.shape)} it has these sizes or 1, and one "
                "axis more. self.beside(array, dims) puts it there"
            )
