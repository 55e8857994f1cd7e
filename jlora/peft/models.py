"""Whole models as Hugging Face's safetensors: written part by part, adapters merged; read as a tree."""

from __future__ import annotations

import collections
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.sites import Site
from jlora.nodes.node import is_node, is_unit
from jlora.nodes.qarray import is_qarray
from jlora.peft import layout
from jlora.peft.build import of_leaf
from jlora.peft.experts import found_in
from jlora.peft.files import clear
from jlora.peft.maps import resolved
from jlora.peft.names import Entry, leaf_shapes, slots_of
from jlora.peft.parts import merged_part, parameter_of, shape_of
from jlora.peft.stack import Piece
from jlora.peft.tensors import TensorFile, TensorInfo, read_json, write_json, write_tensors
from jlora.quant.formats import read_as
from jlora.targets.paths import flatten
from jlora.targets.select import sites_of

OTHERS = (".json", ".txt", ".model", ".jinja", ".md", ".py")  # what stands beside a model's weights
CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[\w-][\w.-]*\.safetensors")
_OURS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def to_safetensors(
    tree: Any,
    directory: str | Path,
    *,
    names: str | Sequence[Entry] | None = None,
    sites: Mapping[str, Site] | None = None,
    dtype: Any = None,
    shard_bytes: int = 5 * 1024**3,
    config: Mapping[str, Any] | str | Path | None = None,
) -> None:
    """Writes a model's weights as ``model.safetensors``, or as shards with an index, adapters merged on the way.

    One tensor at a time is taken from the device, merged and written, so that a model may be larger than the memory.
    What is quantised is written as its numbers, in its kernels' type or `dtype`.

    Args:
      tree: parameters, plain or wrapped.
      directory: for the files; each appears whole or not at all, the index last. Over shards of the same names the
        index goes first: killed in between there is no model, and not parts of two.
      names: from PyTorch's names to the tree's, as of `jlora.peft.load`.
      sites: what `jlora.sites` found, for plain kernels of many axes, of which neither map nor node tells the parts.
      dtype: of the floating weights; None keeps each leaf's.
      shard_bytes: the largest size of a file, in bytes, unless one tensor is larger.
      config: what other programs ask for beside the weights: the settings of ``config.json``, or the directory of a
        model, whose settings, tokenizer and texts are copied. `dtype` is told in ``config.json`` where that tells one.

    Raises:
      FileNotFoundError: if `config` is a directory without ``config.json``.
      ValueError: if a leaf has no name of PyTorch's, or its axes are not known.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jlora
      >>> params = {"layers": {"0": {"q_proj": {"kernel": jnp.ones((4, 3))}}}}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.peft.to_safetensors(jlora.wrap(params, jlora.LoraSpec(rank=2)), directory)  # adapters merged
      ...     os.listdir(directory)
      ['model.safetensors']
    """
    paths, leaves, _ = flatten(tree, is_unit)
    by_path = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if hasattr(leaf, "shape")}
    batch = {path: leaf.axes.batch_axis for path, leaf in by_path.items() if is_node(leaf) and hasattr(leaf, "axes")}
    found_axes = {path: site.axes for path, site in (sites_of(sites, by_path) or {}).items() if site.axes is not None}
    batch |= {path: axes.batch_axis for path, axes in found_axes.items() if path not in batch}
    stacked = {path: axes[0] for path, axes in batch.items() if axes}
    slots = slots_of(leaf_shapes(paths, leaves), resolved(names), stacked)
    named = {slot.path for places in slots.values() for slot in places}
    if missing := sorted({*by_path} - named):
        raise ValueError(f"peft.to_safetensors: names has no name for {missing[0]} ({len(missing)} leaves in all)")
    kind = None if dtype is None else np.dtype(dtype)
    infos: dict[str, TensorInfo] = {}
    places = {}
    for name, found in slots.items():
        parameter = parameter_of(name, found[0])
        ordered = sorted(found, key=lambda slot: slot.part or (0, 1))
        if ordered[0].part is not None and len(ordered) != ordered[0].part[1]:
            raise ValueError(f"peft.to_safetensors: of {parameter} the tree has {len(ordered)} of its parts only")
        shapes = [shape_of(name, slot, by_path[slot.path], found_axes.get(slot.path)) for slot in ordered]
        axis, shape = layout.out_axis(len(shapes[0]), ordered[0].layout), list(shapes[0])
        if len(shapes) > 1:
            shape[axis] = sum(each[axis] for each in shapes)
        own = np.dtype(by_path[ordered[0].path].dtype)
        infos[parameter] = TensorInfo(tuple(shape), own if kind is None or own.kind in "iub" else kind)
        places[parameter] = (name, ordered, axis)

    def get(parameter: str) -> np.ndarray:
        name, found, axis = places[parameter]
        arrays = [merged_part(name, slot, by_path[slot.path], found_axes.get(slot.path)) for slot in found]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)
        return array.astype(infos[parameter].dtype)

    if config is not None and not isinstance(config, Mapping) and not (Path(config) / CONFIG).is_file():
        raise FileNotFoundError(f"peft.to_safetensors: config is {config}, which is no directory with a {CONFIG}")
    write_model(Path(directory), infos, get, shard_bytes)
    if isinstance(config, Mapping):
        write_json(Path(directory) / CONFIG, _told_dtype(config, kind))
    elif config is not None:
        copy_beside(Path(config), Path(directory), kind, but=(INDEX,))


def copy_beside(source: Path, out: Path, dtype: Any = None, but: Sequence[str] = ()) -> None:
    """Copies what stands beside a model's weights: settings, tokenizer, texts; with the type that the weights have.

    Args:
      source, out: the directories.
      dtype: of the weights, for ``config.json``; None leaves what stands there.
      but: names of files that are left out.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in OTHERS and path.name not in (*but, CONFIG):
            shutil.copyfile(path, out / path.name)
    if dtype is None and (source / CONFIG).is_file():
        shutil.copyfile(source / CONFIG, out / CONFIG)
    elif (source / CONFIG).is_file():
        write_json(out / CONFIG, _told_dtype(read_json(source / CONFIG), dtype))


def _told_dtype(settings: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    names = () if dtype is None else [name for name in ("dtype", "torch_dtype") if name in settings]
    return dict(settings) | {name: jnp.dtype(dtype).name for name in names}


def write_model(
    directory: Path, infos: Mapping[str, TensorInfo], get: Callable[[str], np.ndarray], shard_bytes: int
) -> None:
    """Writes tensors as one file, or as several with an index."""
    shards = list(_shards(infos, shard_bytes))
    if len(shards) == 1:
        write_tensors(directory / SINGLE, infos, get, {"format": "pt"})
        _remove(directory, {SINGLE})
        return
    named = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if any((directory / file).exists() for file in named):  # killed in between there is no model, not parts of two
        (directory / INDEX).unlink(missing_ok=True)
    for file, shard in zip(named, shards, strict=True):
        write_tensors(directory / file, {name: infos[name] for name in shard}, get, {"format": "pt"})
    total = sum(info.nbytes for info in infos.values())
    files = {name: file for file, shard in zip(named, shards, strict=True) for name in shard}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    _remove(directory, {INDEX, *named})


def _remove(directory: Path, kept: set[str]) -> None:
    """Removes the files of another model that was here, or of one that was begun."""
    clear(directory, "model*.safetensors*")
    for path in [directory / INDEX, *sorted(directory.glob("model*.safetensors"))]:
        if path.name not in kept and _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _shards(infos: Mapping[str, TensorInfo], limit: int) -> Iterable[list[str]]:
    shard: list[str] = []
    size = 0
    for name, info in infos.items():
        if shard and size + info.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += info.nbytes
    yield shard


def files_of(directory: str | Path) -> dict[str, TensorFile]:
    """The safetensors files of a model, by their names: those of its index, or the only one.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if the index names what is not there.
    """
    directory = Path(directory)
    if directory.is_file():
        return {directory.name: TensorFile(directory)}
    if not (directory / INDEX).is_file():
        if not (directory / SINGLE).is_file():
            pickled = "; its pickle pytorch_model.bin is not read" if (directory / "pytorch_model.bin").exists() else ""
            others = [path.name for path in sorted(directory.glob("*.safetensors"))][:3]
            hint = f"; it has {', '.join(others)}: give the file's own path" if others else ""
            raise FileNotFoundError(f"{directory} has no {SINGLE} and no {INDEX}{pickled}{hint}")
        return {SINGLE: TensorFile(directory / SINGLE)}
    weights = shards_of(directory)
    if gone := sorted(name for name in {*weights.values()} if not (directory / name).is_file()):
        raise FileNotFoundError(f"{directory / INDEX} names {gone[0]}, which is not there")
    files = {name: TensorFile(directory / name) for name in sorted({*weights.values()})}
    if lost := [name for name, file in weights.items() if name not in files[file].infos]:
        raise ValueError(f"{directory / INDEX} has {lost[0]} in {weights[lost[0]]}, which does not have it")
    return files


def shards_of(directory: Path) -> dict[str, str]:
    """The file of each tensor, by the index in a directory.

    Raises:
      ValueError: if it names no files beside it.
    """
    weights = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(x, str) and _SHARD.fullmatch(x) for x in weights.values()):
        raise ValueError(f"{directory / INDEX} must map names of tensors to names of files beside it")
    return weights


def from_safetensors(
    directory: str | Path,
    *,
    like: Any = None,
    names: str | Sequence[Entry] | None = None,
    dtype: Any = None,
) -> Any:
    """Reads a model: as a tree nested by the dots of PyTorch's names, or as another tree.

    Args:
      directory: with ``model.safetensors``, or an index and its shards; or one such file.
      like: a tree of the shapes, types and shardings to be had, such as ``jax.eval_shape`` gives of ``model.init``;
        None gives PyTorch's own. One leaf at a time is put together and placed; one that `jlora.quant.quantize` has
        made quantised in `like` is quantised so.
      names: from PyTorch's names to those of `like`, as of `jlora.peft.load`.
      dtype: of floating leaves; None keeps that of the file, or of `like`.

    Returns:
      The tree. Tensors of the file that `like` does not have are left out.

    Raises:
      FileNotFoundError: if there are no such files.
      ValueError: if a tensor is missing or does not fit.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"layers": {"0": {"q_proj": {"kernel": jnp.ones((4, 3))}}}}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.peft.to_safetensors(params, directory)
      ...     theirs = jlora.peft.from_safetensors(directory)
      ...     ours = jlora.peft.from_safetensors(directory, like=params)
      >>> theirs["layers"]["0"]["q_proj"]["weight"].shape  # PyTorch's name and (out, in)
      (3, 4)
      >>> ours["layers"]["0"]["q_proj"]["kernel"].shape
      (4, 3)
    """
    files = files_of(directory)
    where = {name: file for file in files.values() for name in file}
    if like is None:
        return nested({name: _cast(file[name], dtype) for name, file in where.items()})
    paths, leaves, treedef = flatten(like, is_qarray)
    slots = slots_of(leaf_shapes(paths, leaves), resolved(names))
    places = collections.defaultdict(list)
    for name, found in slots.items():
        for slot in found:
            places[slot.path].append((name, slot))

    get = lambda name: where[name][name]

    def tensor(name: str) -> np.ndarray | None:
        return get(name) if name in where else found_in(where, get, name)

    def read(path: str, leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):
            return leaf
        if path not in places:
            raise ValueError(f"peft.from_safetensors: names has no name for {path}")
        whole = np.empty(leaf.shape, np.dtype(leaf.dtype if is_qarray(leaf) else dtype or leaf.dtype))
        seen = 0
        for name, slot in places[path]:
            parameter = parameter_of(name, slot)
            array = tensor(parameter)
            if array is None:
                raise ValueError(
                    f"peft.from_safetensors: {directory} has no {parameter}, which {path} is by its name"
                    + ("; a tree with other names than PyTorch's needs names=..." if names is None else " in the map")
                )
            part = of_leaf(Piece(name, slot, None), layout.part_of(array, slot), leaf)
            whole[slot.place] = part.astype(whole.dtype)
            seen += math.prod(part.shape)
        if seen != whole.size:
            raise ValueError(f"peft.from_safetensors: names tells {seen} of the {whole.size} elements of {path} only")
        if is_qarray(leaf):
            return read_as(whole, leaf)
        place = getattr(leaf, "sharding", None)
        return jnp.asarray(whole) if place is None else jax.device_put(whole, place)

    return treedef.unflatten([read(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def _cast(array: np.ndarray, dtype: Any) -> jax.Array:
    is_float = array.dtype.kind not in "iub"
    return jnp.asarray(array if dtype is None or not is_float else array.astype(np.dtype(dtype)))


def nested(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """A tree nested by the dots of the names.

    Raises:
      ValueError: if one name is the beginning of another.
    """
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *modules, leaf = name.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
            if not isinstance(node, dict):
                raise ValueError(f"peft.from_safetensors: {name} lies within another tensor's name")
        if leaf in node:
            raise ValueError(f"peft.from_safetensors: {name} is another tensor's module")
        node[leaf] = array
    return tree
