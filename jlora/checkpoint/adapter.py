"""An adapter in a directory: what `wrap` and training added to a tree, without the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jlora.checkpoint import backend, base
from jlora.checkpoint.about import about, arrays, empty, filled, targets
from jlora.checkpoint.processes import agreed
from jlora.nodes.checks import check_whole
from jlora.nodes.node import AdaptedParam, is_node, is_unit
from jlora.targets.paths import flatten
from jlora.tree import has_nodes

ADAPTER, ABOUT, FORMAT = "adapter", "about", 1


def save(directory: str | Path, tree: Any, *, overwrite: bool = False) -> None:
    """Writes the adapter of a wrapped tree: its factors and settings and a fingerprint of the base, not the base.

    Where several processes run, each calls it.

    Args:
      directory: to be made; it appears whole or not at all.
      tree: a wrapped tree.
      overwrite: replace what is there, which is deleted first; steps of a run are better kept by `Checkpoints`.

    Raises:
      FileExistsError: if the directory is there and is not to be replaced.
      TypeError: if nothing in the tree is wrapped.
      ValueError: if the tree is one half of `jlora.partition`.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> tree = jlora.wrap(params, jlora.LoraSpec(rank=2))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.checkpoint.save(f"{directory}/step_100", tree)
      ...     again = jlora.checkpoint.load(f"{directory}/step_100", params)
      >>> again["kernel"].lora_a.shape
      (4, 2)
    """
    at = backend.path_of(directory)
    values, told = contents("checkpoint.save", tree)
    if fault := agreed(lambda: _fault(at, overwrite)):
        raise FileExistsError(fault)
    backend.write(at, {ADAPTER: values}, {ABOUT: told}, overwrite)()


def contents(call: str, tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is saved of a wrapped tree: the arrays of its nodes, and what is said of them and of the base."""
    if not has_nodes(tree):
        raise TypeError(f"{call} takes a tree that jlora.wrap returned; no leaf of this one is wrapped")
    paths, leaves, _ = flatten(tree, is_unit)
    by_path = dict(zip(paths, leaves, strict=True))
    nodes = {path: leaf for path, leaf in by_path.items() if is_node(leaf)}
    for path, node in nodes.items():
        check_whole(call, path, node)
    said = {"format": FORMAT, "nodes": {path: about(node) for path, node in nodes.items()}, "base": base.told(by_path)}
    return {path: arrays(node) for path, node in nodes.items()}, said


def _fault(directory: Any, overwrite: bool) -> str | None:
    """Why a directory can't be written; None if it can."""
    if not directory.exists():
        return None
    if not overwrite:
        return f"{directory} is there already; give another directory, or overwrite=True"
    if any(directory.iterdir()) and not (directory / ABOUT).is_dir():
        return f"{directory} is there and is no adapter that overwrite=True would replace; move it away"
    return None


def load(
    directory: str | Path, params: Any, *, variants: Sequence[type[AdaptedParam]] = (), check_base: bool = True
) -> Any:
    """Puts a saved adapter next to the base: placed as it is, on whatever mesh that is, of whatever processes.

    Args:
      directory: that `save` has written, or a step of a run: ``run/100``.
      params: the base, plain: the tree that was wrapped.
      variants: classes of one's own that the adapter has.
      check_base: refuse a base with other values than the adapter was trained on.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      TypeError: if the tree is wrapped already.
      ValueError: if the base is another (in its leaves, their shapes, or their values), or the files are damaged.
    """
    at = backend.path_of(directory)
    told = describe(directory)
    paths, leaves, treedef = flatten(params, is_unit)
    if wrapped := [path for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)]:
        raise TypeError(f"checkpoint.load: {wrapped[0]} is wrapped already; jlora.unwrap the tree first")
    by_path = dict(zip(paths, leaves, strict=True))
    base.check(at, told["base"], by_path, check_base)
    made = _nodes(at, told["nodes"], by_path, variants)
    return treedef.unflatten([made.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def load_abstract(directory: str | Path, *, variants: Sequence[type[AdaptedParam]] = ()) -> dict[str, Any]:
    """A saved adapter without its base: its nodes, and the other leaves' shapes, by path."""
    told = describe(directory)
    bases = {path: jax.ShapeDtypeStruct(x["shape"], jnp.dtype(x["dtype"])) for path, x in told["base"].items()}
    return bases | _nodes(backend.path_of(directory), told["nodes"], bases, variants)


def _nodes(
    directory: Any, told: Mapping[str, Any], bases: Mapping[str, Any], variants: Sequence[type[AdaptedParam]]
) -> dict[str, Any]:
    holes = {path: empty(path, node, variants) for path, node in told.items()}
    asked = {path: targets(hole, bases[path], told[path]) for path, hole in holes.items()}
    values = backend.read_arrays(directory, ADAPTER, asked)
    return {path: filled(hole, bases[path], values[path]) for path, hole in holes.items()}


def describe(directory: str | Path) -> dict[str, Any]:
    """What a saved adapter is: its ``nodes``, each with class, settings and arrays, and the leaves of its ``base``.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if it is damaged, or of another format.
    """
    at = backend.path_of(directory)
    if not backend.is_finished(at) or not (at / ABOUT).is_dir() or not (at / ADAPTER).is_dir():
        steps = sorted(int(x.name) for x in at.iterdir() if x.name.isdecimal()) if at.is_dir() else []
        hint = (
            f": it is a run; load one of its steps, as in {at / str(steps[-1])}, or all by Checkpoints" if steps else ""
        )
        raise FileNotFoundError(f"{at} is no adapter that jlora.checkpoint.save has written{hint}")
    told = backend.read_json(at, ABOUT)
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        found = told.get("format") if isinstance(told, dict) else None
        raise ValueError(f"{at} has format {found}; this version of jlora reads {FORMAT}")
    return told
