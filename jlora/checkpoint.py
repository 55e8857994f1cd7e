"""Adapters as Orbax checkpoints: what `wrap` and training added to a tree, without the base."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import sharding
from jlora.axes import Axes
from jlora.checks import check_whole
from jlora.fields import leaf_fields
from jlora.nodes import AdaptedParam, TrainableParam, is_node
from jlora.paths import flatten
from jlora.tree import has_nodes
from jlora.variants import VARIANTS
from jlora.variants.bias import LoraBiasParam
from jlora.variants.tokens import TokensParam

ADAPTER, ABOUT, FORMAT = "adapter", "about", 1
SAMPLES = 16  # elements of each leaf that tell one base from another


def save(directory: str | Path, tree: Any, *, overwrite: bool = False) -> None:
    """Writes the adapter of a wrapped tree: its factors and settings and a fingerprint of the base, not the base.

    Args:
      directory: to be made; it appears whole or not at all.
      tree: a wrapped tree.
      overwrite: replace what is there.

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
    directory = Path(directory).absolute()
    if not has_nodes(tree):
        raise TypeError("checkpoint.save takes a tree that jlora.wrap returned; no leaf of this one is wrapped")
    if directory.exists() and not overwrite:
        raise FileExistsError(f"{directory} is there already; give another directory, or overwrite=True")
    if directory.exists() and any(directory.iterdir()) and not (directory / ABOUT).is_dir():
        raise FileExistsError(f"{directory} is there and is no adapter that overwrite=True would replace; move it away")
    paths, leaves, _ = flatten(tree, is_node)
    nodes = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)}
    for path, node in nodes.items():
        check_whole("checkpoint.save", path, node)
    about = {
        "format": FORMAT,
        "nodes": {path: _about(node) for path, node in nodes.items()},
        "base": {path: _told(leaf) for path, leaf in zip(paths, leaves, strict=True) if hasattr(leaf, "shape")},
    }
    arrays = {path: _arrays(node) for path, node in nodes.items()}
    ocp: Any = _orbax()
    with _checkpointer() as checkpointer:
        items = {ADAPTER: ocp.args.StandardSave(arrays), ABOUT: ocp.args.JsonSave(about)}
        checkpointer.save(directory, args=ocp.args.Composite(**items), force=overwrite)


def load(
    directory: str | Path, params: Any, *, variants: Sequence[type[AdaptedParam]] = (), check_base: bool = True
) -> Any:
    """Puts a saved adapter next to the base: placed as it is, on whatever mesh that is.

    Args:
      directory: that `save` has written.
      params: the base, plain: the tree that was wrapped.
      variants: classes of one's own that the adapter has.
      check_base: refuse a base with other values than the adapter was trained on.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
      TypeError: if the tree is wrapped already.
      ValueError: if the base is another: in its leaves, their shapes, or their values.
    """
    directory = Path(directory).absolute()
    about = describe(directory)
    paths, leaves, treedef = flatten(params, is_node)
    if wrapped := [path for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)]:
        raise TypeError(f"checkpoint.load: {wrapped[0]} is wrapped already; jlora.unwrap the tree first")
    by_path = dict(zip(paths, leaves, strict=True))
    _check_base(directory, about["base"], by_path, check_base)
    made = _nodes(directory, about, by_path, variants)
    return treedef.unflatten([made.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def load_abstract(directory: str | Path, *, variants: Sequence[type[AdaptedParam]] = ()) -> dict[str, Any]:
    """A saved adapter without its base: its nodes, and the other leaves' shapes, by path."""
    directory = Path(directory).absolute()
    about = describe(directory)
    base = {path: jax.ShapeDtypeStruct(x["shape"], jnp.dtype(x["dtype"])) for path, x in about["base"].items()}
    return base | _nodes(directory, about, base, variants)


def describe(directory: str | Path) -> dict[str, Any]:
    """What a saved adapter is: its ``nodes``, each with class, settings and arrays, and the leaves of its ``base``.

    Raises:
      FileNotFoundError: if there is no such checkpoint.
    """
    directory = Path(directory).absolute()
    if not (directory / ABOUT).is_dir() or not (directory / ADAPTER).is_dir():
        raise FileNotFoundError(f"{directory} is no adapter that jlora.checkpoint.save has written")
    ocp = _orbax()
    with _checkpointer() as checkpointer:
        about = checkpointer.restore(directory, args=ocp.args.Composite(**{ABOUT: ocp.args.JsonRestore()}))[ABOUT]
    if about.get("format") != FORMAT:
        raise ValueError(f"{directory} has format {about.get('format')}; this version of jlora reads {FORMAT}")
    return about


def _nodes(
    directory: Path, about: Mapping[str, Any], bases: Mapping[str, Any], variants: Sequence[type[AdaptedParam]]
) -> dict[str, Any]:
    classes = {cls.__name__: cls for cls in (*_CLASSES, *variants)}
    empty = {path: _node(path, told, classes) for path, told in about["nodes"].items()}
    targets = {path: _targets(node, bases[path], about["nodes"][path]["arrays"]) for path, node in empty.items()}
    ocp = _orbax()
    with _checkpointer() as checkpointer:
        item = ocp.args.Composite(**{ADAPTER: ocp.args.StandardRestore(targets)})
        arrays = checkpointer.restore(directory, args=item)[ADAPTER]
    return {path: _filled(node, bases[path], arrays[path]) for path, node in empty.items()}


def _told(leaf: Any) -> dict[str, Any]:
    """A base's shape and type, and of some of its elements a hash: none of what trains, or is abstract."""
    base = leaf.base if is_node(leaf) else leaf
    told = {"shape": list(base.shape), "dtype": jnp.dtype(base.dtype).name}
    if isinstance(base, jax.ShapeDtypeStruct) or isinstance(leaf, TrainableParam):
        return told
    return told | {"sample": _sampled(base)}


def _sampled(x: Any) -> str:
    size = math.prod(x.shape)
    flat = np.unique(np.linspace(0, size - 1, min(size, SAMPLES)).astype(np.int64)) if size else np.zeros(0, np.int64)
    picked = _elements(x, np.unravel_index(flat, x.shape)) if len(x.shape) else x
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    host = np.asarray(jax.random.key_data(picked) if is_key else picked)
    return hashlib.sha256(np.ascontiguousarray(host).tobytes()).hexdigest()[:16]


def _elements(x: Any, places: tuple[np.ndarray, ...]) -> Any:
    """Some elements of an array, wherever it lies."""
    at = getattr(x, "sharding", None)
    if not isinstance(at, jax.sharding.NamedSharding) or at.mesh.empty:
        return x[places]
    return x.at[places].get(out_sharding=jax.sharding.NamedSharding(at.mesh, jax.sharding.PartitionSpec()))


def _check_base(directory: Path, theirs: Mapping[str, Any], leaves: Mapping[str, Any], values_too: bool) -> None:
    ours = {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "shape")}
    for path in sorted({*theirs} | {*ours}):
        expected = tuple(theirs[path]["shape"]) if path in theirs else None
        found = tuple(ours[path].shape) if path in ours else None
        if expected != found:
            raise ValueError(
                f"checkpoint.load: the tree is not the one that {directory} was trained on: {path} has shape {found} "
                f"here and {expected} there (None: it is not there). Give the tree that was wrapped, not one around it"
            )
    if not values_too:
        return
    samples = {path: told["sample"] for path, told in theirs.items() if "sample" in told}
    known = {path: x for path, x in ours.items() if path in samples and not isinstance(x, jax.ShapeDtypeStruct)}
    if differing := [path for path, x in known.items() if _sampled(x) != samples[path]]:
        raise ValueError(
            f"checkpoint.load: {differing[0]} has other values, or another type, than in the base that {directory} was "
            f"trained on ({len(differing)} of {len(known)} leaves differ); check_base=False takes it all the same"
        )


_CLASSES = (*VARIANTS.values(), TrainableParam, LoraBiasParam, TokensParam)


def _about(node: AdaptedParam) -> dict[str, Any]:
    static = {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.metadata.get("static")}  # type: ignore[arg-type]
    return {
        "class": type(node).__name__,
        "arrays": {name: {"shape": list(x.shape), "dtype": x.dtype.name} for name, x in _arrays(node).items()},
        "settings": {name: dataclasses.asdict(x) if isinstance(x, Axes) else x for name, x in static.items()},
    }


def _fields(node: AdaptedParam) -> list[str]:
    """The fields that are saved: all but a frozen base."""
    return [f.name for f in leaf_fields(node) if f.name != "base" or f.metadata["trained"]]


def _arrays(node: AdaptedParam) -> dict[str, Any]:
    """The arrays of a node, those of a tuple one by one."""
    found: dict[str, Any] = {}
    for name in _fields(node):
        value = getattr(node, name)
        parts = value if isinstance(value, tuple) else (value,)
        found |= {f"{name}.{i}" if isinstance(value, tuple) else name: x for i, x in enumerate(parts)}
    return found


def _node(path: str, told: Mapping[str, Any], classes: Mapping[str, type]) -> Any:
    """The node without its arrays."""
    cls: Any = classes.get(told["class"])
    if cls is None:
        raise ValueError(
            f"checkpoint.load: {path} is a {told['class']}, which jlora does not have; give the class, as in "
            f"load(directory, params, variants=[{told['class']}])"
        )
    fixed = lambda x: tuple(x) if isinstance(x, list) else Axes(**x) if isinstance(x, dict) else x
    arrays = {f.name: None for f in dataclasses.fields(cls) if not f.metadata.get("static")}
    return cls(**arrays, **{name: fixed(value) for name, value in told["settings"].items()})


def _targets(node: Any, base: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays to be had: each to lie beside the base."""
    shapes = {name: jax.ShapeDtypeStruct(x["shape"], jnp.dtype(x["dtype"])) for name, x in told.items()}
    places = dict.fromkeys(shapes)
    at = getattr(base, "sharding", None)
    if isinstance(at, jax.sharding.NamedSharding):
        filled = _filled(node, None, shapes)
        placed = sharding.of_node(filled, base) if hasattr(node, "axes") else None
        like_base = {name: at if x.shape == base.shape else None for name, x in shapes.items()}
        places = _arrays(placed) if placed is not None else like_base
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name]) for name, x in shapes.items()}


def _filled(node: Any, base: Any, arrays: Mapping[str, Any]) -> Any:
    """The node with its arrays and its base."""
    given: dict[str, Any] = {"base": base}
    for name in _fields(node):
        parts = [arrays[key] for key in sorted(arrays) if key.startswith(f"{name}.")]
        given[name] = arrays[name] if name in arrays else tuple(parts)
    return dataclasses.replace(node, **given)


def _checkpointer() -> Any:
    ocp = _orbax()
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def _orbax() -> Any:
    """Orbax, imported when it is used: it takes a fifth of the time of ``import jlora``."""
    import orbax.checkpoint

    return orbax.checkpoint
