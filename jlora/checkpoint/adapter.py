"""An adapter in a directory: what `wrap` and training added to a tree, without the base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jlora.checkpoint import backend, base
from jlora.checkpoint.about import about, array, arrays, check, empty, filled, targets
from jlora.checkpoint.fit import check_fit, check_names, check_stored
from jlora.checkpoint.processes import agreed
from jlora.checkpoint.told import Told
from jlora.nodes.checks import check_whole
from jlora.nodes.node import AdaptedParam, is_node, is_unit
from jlora.targets.paths import flatten
from jlora.tree import has_nodes

ADAPTER, FORMAT = "adapter", 1

#: The name of the part of a checkpoint, a directory in it, whose JSON says what it holds: that which `describe` reads.
ABOUT = "about"


def save(directory: str | Path, tree: Any, *, overwrite: bool = False) -> None:
    """Writes the adapter of a wrapped tree: its factors and settings and a fingerprint of the base, not the base.

    Where several processes run, each calls it.

    Args:
      directory: to be made; it appears whole or not at all.
      tree: a wrapped tree.
      overwrite: whether an adapter that is there is replaced. It is deleted first, so a program that is killed in
        between leaves neither. For the steps of a run use `Checkpoints`, which deletes an old step after the new one.

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
    _check_loads(call, nodes, said["nodes"])
    return {path: arrays(node) for path, node in nodes.items()}, said


def _check_loads(call: str, nodes: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Refuses what `load` would refuse, while the arrays are still there."""
    told = Told(call, json.loads(json.dumps(said)), ("nodes",)).entries()
    for path, node in nodes.items():
        _hole(path, told[path], node, [type(node)])


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

    Returns:
      The wrapped tree that was saved, on the base that is given.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      TypeError: if the tree is wrapped already.
      ValueError: if the base is another (in its leaves, their shapes, or their values), the adapter has a class that
        neither jlora nor `variants` has, or the files are damaged.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.checkpoint.save(f"{directory}/adapter", jlora.wrap(params, jlora.LoraSpec(rank=2, alpha=4)))
      ...     tree = jlora.checkpoint.load(f"{directory}/adapter", params)
      >>> tree["kernel"].scale, tree["kernel"].base is params["kernel"]
      (2.0, True)
    """
    at = backend.path_of(directory)
    told = _read(at)
    paths, leaves, treedef = flatten(params, is_unit)
    if wrapped := [path for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)]:
        raise TypeError(f"checkpoint.load: {wrapped[0]} is wrapped already; jlora.unwrap the tree first")
    by_path = dict(zip(paths, leaves, strict=True))
    base.check(at, told.at("base").value, by_path, check_base)
    made = _nodes(at, told.at("nodes"), by_path, variants)
    return treedef.unflatten([made.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def load_abstract(directory: str | Path, *, variants: Sequence[type[AdaptedParam]] = ()) -> dict[str, Any]:
    """Loads a saved adapter without its base, to look at it or to read its factors.

    Args:
      directory: as in `load`.
      variants: as in `load`.

    Returns:
      By path: for each leaf that was wrapped its node, with values, beside a base that is a `jax.ShapeDtypeStruct`; for
      each other leaf of the base a `jax.ShapeDtypeStruct`.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if the adapter has a class that neither jlora nor `variants` has, or the files are damaged.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.checkpoint.save(f"{directory}/adapter", jlora.wrap(params, jlora.LoraSpec(rank=2)))
      ...     leaves = jlora.checkpoint.load_abstract(f"{directory}/adapter")
      >>> leaves["dense/kernel"].lora_a.shape, leaves["dense/bias"].shape
      ((4, 2), (3,))
    """
    at = backend.path_of(directory)
    told = _read(at)
    bases = {path: array(x, base.OPTIONAL) for path, x in told.at("base").entries().items()}
    return bases | _nodes(at, told.at("nodes"), bases, variants)


def _nodes(
    directory: Any, told: Told, bases: Mapping[str, Any], variants: Sequence[type[AdaptedParam]]
) -> dict[str, Any]:
    check_stored(directory, ADAPTER, told)
    nodes = told.entries()
    holes = {path: _hole(path, node, bases[path], variants) for path, node in nodes.items()}
    asked = {path: targets(hole, bases[path], nodes[path]) for path, hole in holes.items()}
    values = backend.read_arrays(directory, ADAPTER, asked)
    return {path: filled(hole, bases[path], values[path]) for path, hole in holes.items()}


def _hole(path: str, told: Told, base: Any, variants: Sequence[type[AdaptedParam]]) -> Any:
    """A node without its arrays: one that stands beside the base."""
    hole = empty(path, told, variants)
    check_names(told, hole)
    check_fit(told, hole, base.shape)
    return hole


def describe(directory: str | Path) -> dict[str, Any]:
    """Says what a saved adapter is, without reading its arrays.

    Args:
      directory: as in `load`.

    Returns:
      A dict of plain data: ``format``, a number; ``nodes``, by path the ``class``, ``settings`` and ``arrays`` of each;
      ``base``, by path the shape and type of each leaf, and a hash of some of its values.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if it is damaged, or of another format.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.checkpoint.save(f"{directory}/adapter", jlora.wrap(params, jlora.LoraSpec(rank=2)))
      ...     told = jlora.checkpoint.describe(f"{directory}/adapter")
      >>> told["nodes"]["kernel"]["class"], told["nodes"]["kernel"]["arrays"]["lora_a"]
      ('LoraParam', {'shape': [4, 2], 'dtype': 'float32'})
    """
    return _read(backend.path_of(directory)).value


def _read(at: Any) -> Told:
    """What is said of an adapter, each entry of the kind that it should be."""
    if not backend.is_finished(at) or not (at / ABOUT).is_dir() or not (at / ADAPTER).is_dir():
        steps = sorted(int(x.name) for x in at.iterdir() if x.name.isdecimal()) if at.is_dir() else []
        hint = (
            f": it is a run; load one of its steps, as in {at / str(steps[-1])}, or all by Checkpoints" if steps else ""
        )
        raise FileNotFoundError(f"{at} is no adapter that jlora.checkpoint.save has written{hint}")
    told = backend.read_json(at, ABOUT)
    form = told.at("format")
    if type(form.value) is not int or form.value != FORMAT:
        raise form.refused(f"{FORMAT}, which this version of jlora reads")
    parts = told.parts(("format", "nodes", "base"))
    bases = base.read(parts["base"])
    for path, node in parts["nodes"].entries().items():
        check(node)
        if path not in bases:
            raise node.refused("no node, since base has no such path")
    return told
