"""Orbax: its newest API (V1) where it is installed, the older one (V0) elsewhere. The files are the same.

It is imported when it is used: that takes a fifth of the time of ``import jlora``.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.checkpoint.told import Told, parsed

V1 = ("orbax.checkpoint.v1", "orbax.checkpoint.experimental.v1")
_JSON = ("metadata", "data.json")  # the file of a JSON item: as is written here, and as Orbax V1 itself names it


class DamagedError(ValueError):
    """A checkpoint whose files can't be read."""


@functools.cache
def newest() -> str:
    """The API that is used: the name of its module."""
    for name in V1:
        try:
            if hasattr(importlib.import_module(name), "save_checkpointables_async"):
                return name
        except ImportError:
            continue
    return "orbax.checkpoint"


def path_of(directory: Any) -> Any:
    """A directory as an absolute path, be it local or in a bucket (``gs://``)."""
    from etils import epath

    text = os.fspath(directory)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def write(
    directory: Any, arrays: Mapping[str, Mapping[str, Any]], texts: Mapping[str, Any], overwrite: bool = False
) -> Callable[[], None]:
    """Starts to write a checkpoint, which appears whole or not at all, and returns a function that waits for it.

    The arrays are copied before it returns: they may be donated then.

    Args:
      directory: of `path_of`.
      arrays: the items that are trees of arrays.
      texts: the items that are JSON.
      overwrite: delete first what is there.

    Returns:
      A function that returns when the checkpoint is there, and raises what has gone wrong.
    """
    given = {name: jax.tree.map(_writable, tree) for name, tree in arrays.items()}
    begin = _write_v0 if newest() == "orbax.checkpoint" else _write_v1
    return begin(directory, given, texts, overwrite)


def _writable(x: Any) -> Any:
    """An array that Orbax writes once: one of this process alone is the same in each of them."""
    is_local = isinstance(x, jax.Array) and x.is_fully_addressable and jax.process_count() > 1
    return np.array(x) if is_local else x


def _write_v1(directory: Any, arrays: Mapping[str, Any], texts: Mapping[str, Any], overwrite: bool) -> Any:
    ocp: Any = importlib.import_module(newest())
    items = {**arrays, **{name: _Text(value) for name, value in texts.items()}}
    return ocp.save_checkpointables_async(directory, items, overwrite=overwrite).result


class _Text:
    """A JSON item, for Orbax V1: its own handler has another name for the file than that of V0."""

    def __init__(self, value: Any) -> None:
        self.text = json.dumps(value)

    async def save(self, directory: Any) -> Any:
        async def write() -> None:
            at = await directory.await_creation()
            if jax.process_index() == 0:
                (at / _JSON[0]).write_text(self.text)

        return write()

    async def load(self, directory: Any) -> Any:
        raise NotImplementedError(f"{directory} is read by read_json")


def _write_v0(directory: Any, arrays: Mapping[str, Any], texts: Mapping[str, Any], overwrite: bool) -> Any:
    import orbax.checkpoint as ocp

    args: Any = ocp.args
    items = {name: args.StandardSave(tree) for name, tree in arrays.items()}
    items |= {name: args.JsonSave(value) for name, value in texts.items()}
    checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    checkpointer.save(directory, args=args.Composite(**items), force=overwrite)
    return checkpointer.close  # which waits, and raises


def is_finished(directory: Any) -> bool:
    """Whether a directory is a checkpoint that was written to its end."""
    import orbax.checkpoint as ocp

    return directory.is_dir() and ocp.utils.is_checkpoint_finalized(directory)


def read_json(directory: Any, name: str) -> Told:
    """A JSON item of a checkpoint.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is no JSON.
    """
    for file in _JSON:
        if (path := directory / name / file).exists():
            return parsed(path, path.read_bytes())
    raise FileNotFoundError(f"{directory / name} has no file {_JSON[0]}")


def read_arrays(directory: Any, name: str, targets: Any) -> Any:
    """A tree of arrays of a checkpoint.

    Args:
      directory: of `path_of`.
      name: of the item.
      targets: shapes and types. What has a sharding lies there, what has none on the default device, and what is a
        NumPy array comes back as one.

    Raises:
      DamagedError: if it can't be read.
    """
    asked = jax.tree.map(_asked, targets)
    read = _read_v0 if newest() == "orbax.checkpoint" else _read_v1
    try:
        found = read(directory, name, asked)
    except Exception as error:
        raise _unreadable(directory, name, error) from error
    return jax.tree.map(_given, targets, found)


def _unreadable(directory: Any, name: str, error: Exception) -> DamagedError:
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return DamagedError(
        f"the arrays in {directory / name} can't be read: files are missing or cut. Load another step, or move "
        f"{directory} away ({reason})"
    )


def read_shapes(directory: Any, name: str) -> dict[str, dict[str, tuple[tuple[int, ...], str]]]:
    """The shapes of a tree of arrays of a checkpoint, and the names of their types; no array is read.

    Raises:
      DamagedError: if it can't be read.
    """
    import orbax.checkpoint as ocp

    try:
        found: Any = ocp.StandardCheckpointHandler().metadata(directory / name)
        tree = {path: {**arrays} for path, arrays in found.tree.items()}
        return jax.tree.map(lambda x: (tuple(x.shape), jnp.dtype(x.dtype).name), tree)
    except Exception as error:
        raise _unreadable(directory, name, error) from error


def _asked(target: Any) -> Any:
    """What Orbax is to read: an array without a place as NumPy's, since the place it was saved from may be gone."""
    return target if getattr(target, "sharding", None) is not None else np.empty(target.shape, target.dtype)


def _given(target: Any, found: Any) -> Any:
    return found if isinstance(target, np.ndarray) else jnp.asarray(found)


def _read_v1(directory: Any, name: str, targets: Any) -> Any:
    return importlib.import_module(newest()).load_checkpointables(directory, {name: targets})[name]


def _read_v0(directory: Any, name: str, targets: Any) -> Any:
    import orbax.checkpoint as ocp

    args: Any = ocp.args
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restore = args.Composite(**{name: args.StandardRestore(targets)})
        return checkpointer.restore(directory, args=restore)[name]
