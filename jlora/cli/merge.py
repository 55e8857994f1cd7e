"""Merge an adapter of PEFT's into a model's safetensors, file by file.

One tensor at a time is in memory. What is done is kept in OUT.partial, from
which the same command goes on after an interruption; OUT appears when all is
there. Both may be names of the Hugging Face Hub.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jlora.cli.sources import add_hub_arguments, check_out, is_orbax, local
from jlora.nodes.fold import MergePrecisionWarning, told_once
from jlora.nodes.node import is_node
from jlora.peft.adapter import Adapter
from jlora.peft.build import onto
from jlora.peft.files import clear
from jlora.peft.models import INDEX, OTHERS, SINGLE, copy_beside, files_of
from jlora.peft.names import HEAD, TABLES
from jlora.peft.place import place
from jlora.peft.read import PICKLE, read
from jlora.peft.remote import adapter_at, model_at
from jlora.peft.settings import CONFIG, WEIGHTS
from jlora.peft.tensors import TensorFile, TensorInfo, read_json, write_json, write_tensors
from jlora.tree import merge

MARK = "jlora-merge.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    text = "directory with the model's safetensors, or org/name of the Hub"
    parser.add_argument("base", metavar="BASE", help=text)
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter of PEFT's, or org/name of the Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to be made")
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=kinds, help="of the merged weights (default: the base's)")
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")
    parser.add_argument("--allow-nonfinite", action="store_true", help="take NaN and infinite values as they are")
    parser.add_argument("--prefix", metavar="NAME", help="where in the model the adapted one is, as text_model")
    text = "a module whose square weight is (in, out), as those of GPT-2's Conv1D; may be given again"
    parser.add_argument("--fan-in-fan-out", action="append", metavar="MODULE", help=text)
    text = "take an adapter_config.json that was edited since the adapter was saved"
    parser.add_argument("--allow-edited", action="store_true", help=text)
    add_hub_arguments(parser, revision="the adapter", base_revision="the base")


def run(given: argparse.Namespace) -> int:
    """Writes the merged model."""
    if not (given.out / MARK).is_file():  # refused before anything is downloaded
        check_out(given.out, local(given.base, given.adapter), given.force, (SINGLE, INDEX))
    given = _fetched(given)
    if is_orbax(given.adapter):
        raise ValueError(f"{given.adapter} is an Orbax adapter; make PEFT's files of it: jlora convert ... --to peft")
    files = files_of(given.base)
    identity = _identity(given, files)
    if _is_of(given.out, identity):  # a run that was cut off at its very end
        _clear(given.out)
        return _told(given, "is there already, whole")
    check_out(given.out, (given.base, given.adapter), given.force, (SINGLE, INDEX))
    adapter = read(given.adapter, allow_nonfinite=given.allow_nonfinite, allow_edited=given.allow_edited)
    shapes = dict(_leaves(files, adapter))
    placed = place(adapter, shapes, prefix=given.prefix, fan_in_fan_out=given.fan_in_fan_out)
    nodes = {name: leaf for name, leaf in placed.items() if is_node(leaf)}
    partial = given.out.with_name(given.out.name + ".partial")
    _begin(partial, identity)
    dtype = None if given.dtype is None else jnp.dtype(given.dtype)
    merger = Merger(nodes, adapter.start, dtype, given.allow_nonfinite)
    with _progress(files) as advance, _lost_told_once():
        for name, file in files.items():
            if (partial / name).exists():  # of an earlier run: a file appears when it is whole
                advance(file.nbytes)
            else:
                _merge_file(file, merger, partial / name, advance)
    _finish(given, partial)
    return _told(given, f"has the model with {len(nodes)} tensors merged, of {len(shapes)}")


def _fetched(given: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the paths of what is read."""
    adapter = adapter_at(given.adapter, revision=given.revision, cache_dir=given.cache_dir)
    base = model_at(given.base, others=OTHERS, revision=given.base_revision, cache_dir=given.cache_dir)
    return argparse.Namespace(**{**vars(given), "adapter": adapter, "base": base})


def _told(given: argparse.Namespace, text: str) -> int:
    Console(highlight=False, soft_wrap=True).print(f"{given.out} {text}", markup=False)
    return 0


def _leaves(files: Mapping[str, TensorFile], adapter: Adapter) -> Iterator[tuple[str, Any]]:
    """The model's tensors by name: abstract, but for those of whose kind the adapter has copies, to be compared."""
    modules = {name.removesuffix(".weight").rpartition(".")[2] for name in adapter.bases}
    modules |= {*TABLES} if HEAD in modules else set()
    for file in files.values():
        for name, info in file.infos.items():
            is_compared = name.removesuffix(".weight").rpartition(".")[2] in modules
            yield name, file[name] if is_compared else jax.ShapeDtypeStruct(info.shape, info.dtype)


def _identity(given: argparse.Namespace, files: Mapping[str, TensorFile]) -> dict[str, Any]:
    """What a begun merge is of; only the same is gone on with."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, PICKLE):
        path = given.adapter / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    sizes = {name: [file.path.stat().st_size, file.path.stat().st_mtime_ns] for name, file in files.items()}
    told = {"prefix": given.prefix, "fan_in_fan_out": given.fan_in_fan_out}
    return {"adapter": digest.hexdigest(), "base": sizes, "dtype": given.dtype, **told}


def _is_of(directory: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a directory has the mark of a merge, of this one."""
    return (directory / MARK).is_file() and read_json(directory / MARK) == identity


def _begin(partial: Path, identity: Mapping[str, Any]) -> None:
    if partial.exists() and not (partial / MARK).is_file() and any(map(_is_foreign, partial.iterdir())):
        raise FileExistsError(f"{partial} is there and is no merge that was begun; move it away")
    if partial.exists() and not _is_of(partial, identity):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / MARK, identity)
    clear(partial, "*")


def _is_foreign(path: Path) -> bool:
    return not path.name.startswith(f".{MARK}.")


def _clear(out: Path) -> None:
    """Removes what a merge needs no more: what was replaced, then the mark."""
    if (old := _replaced(out)).exists():
        shutil.rmtree(old)
    (out / MARK).unlink(missing_ok=True)


def _replaced(out: Path) -> Path:
    """Where the model that a merge replaces lies meanwhile."""
    return out.with_name(f"{out.name}.partial.old")


@contextmanager
def _progress(files: Mapping[str, TensorFile]) -> Iterator[Callable[[int], None]]:
    """A progress bar over all bytes."""
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("merging", total=sum(file.nbytes for file in files.values()))
        yield lambda count: progress.advance(task, count)


@contextmanager
def _lost_told_once() -> Iterator[None]:
    """One warning for what rounding loses of all tensors; of infinite weights there is an error, or leave to write."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="merge: .* are infinite in", category=MergePrecisionWarning)
        with told_once():
            yield


class Merger(NamedTuple):
    """Merges what is adapted, by the name of the tensor."""

    nodes: Mapping[str, Any]
    start: str | None
    dtype: Any
    allow_nonfinite: bool

    def info(self, name: str, info: TensorInfo) -> TensorInfo:
        """What a tensor becomes."""
        is_cast = self.dtype is not None and name in self.nodes
        return info._replace(dtype=np.dtype(self.dtype)) if is_cast else info

    def merged(self, name: str, array: np.ndarray) -> np.ndarray:
        """The tensor with its adapter merged."""
        if name not in self.nodes:
            return array
        node = onto(self.nodes[name], array, self.start)
        made = np.asarray(merge({name: node}, dtype=self.dtype)[name])
        if not self.allow_nonfinite and _count_nonfinite(made) > _count_nonfinite(array):
            raise ValueError(
                f"{name}: {_count_nonfinite(made)} weights are not finite when they are merged into {made.dtype}; "
                "--dtype bfloat16 or float32 holds larger ones, --allow-nonfinite writes them as they are"
            )
        return made


def _count_nonfinite(x: np.ndarray) -> int:
    return x.size - int(np.count_nonzero(np.isfinite(x.astype(np.float32))))


def _merge_file(file: TensorFile, merger: Merger, path: Path, advance: Callable[[int], None]) -> None:
    infos = {name: merger.info(name, info) for name, info in file.infos.items()}

    def get(name: str) -> np.ndarray:
        advance(file.infos[name].nbytes)
        return merger.merged(name, file[name]).astype(infos[name].dtype)

    write_tensors(path, infos, get, file.metadata or {"format": "pt"})


def _finish(given: argparse.Namespace, partial: Path) -> None:
    """Copies what stands beside the weights, and puts the directory in its place."""
    if given.base.is_dir():
        copy_beside(given.base, partial, given.dtype, but=(MARK,))
    if given.out.exists():
        shutil.rmtree(_replaced(given.out), ignore_errors=True)
        os.replace(given.out, _replaced(given.out))
    os.replace(partial, given.out)
    _clear(given.out)
