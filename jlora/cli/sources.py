"""An adapter's directory, or file: PEFT's, Orbax's, or that of another tool."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from jlora import checkpoint
from jlora.peft import mlx
from jlora.peft.adapter import EMBEDDING, EXPERTS
from jlora.peft.collect import Collected, collect
from jlora.peft.flat import FlatAdapter, dotted
from jlora.peft.foreign import SINGLE, kind_of, read_any
from jlora.peft.maps import NAMES
from jlora.peft.models import files_of
from jlora.peft.names import slots_of
from jlora.peft.read import PICKLE
from jlora.peft.settings import CONFIG, WEIGHTS


def add_hub_arguments(parser: argparse.ArgumentParser, **revisions: str) -> None:
    """The options for what comes from the Hub: its revision, by the option's name what it is of, and the cache."""
    for name, of in revisions.items():
        text = f"branch, tag or commit of {of} on the Hub"
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="REVISION", help=text)
    parser.add_argument("--cache-dir", type=Path, metavar="DIRECTORY", help="for downloads (default: the Hub client's)")


def local(*sources: str | None) -> list[Path]:
    """Those of what is read that are paths, and not names of the Hub."""
    return [Path(source) for source in sources if source is not None and Path(source).exists()]


def is_orbax(directory: Path) -> bool:
    """Whether `jlora.checkpoint` has written a directory.

    Raises:
      FileNotFoundError: if it holds no adapter at all.
    """
    marks = (CONFIG, WEIGHTS, PICKLE, mlx.WEIGHTS, *SINGLE)
    if directory.is_file() or any((directory / name).exists() for name in marks):
        return False
    if (directory / checkpoint.ABOUT).is_dir():
        return True
    there = "is no directory" if not directory.is_dir() else f"has neither {CONFIG} nor an Orbax adapter"
    raise FileNotFoundError(f"{directory} {there}")


def adapter_of(
    path: Path,
    names: str | None = None,
    allow_nonfinite: bool = False,
    component: str | None = None,
    base: Path | None = None,
    allow_edited: bool = False,
    as_lora: bool = False,
) -> Collected:
    """An adapter under PyTorch's names.

    Args:
      path: its directory or file.
      names: of an Orbax adapter, a ready map from its paths; None: these with dots.
      allow_nonfinite: take NaN and infinite values as they are.
      component: which of the adapters in a file of an image model's.
      base: the model's safetensors, for the names that another tool's file does not tell.
      allow_edited: take settings that are not those of the save of the weights.
      as_lora: of an Orbax adapter: low-rank variants as plain LoRA of the same function.
    """
    if is_orbax(path):
        return collect(checkpoint.load_abstract(path), names, as_lora=as_lora)
    adapter = read_any(path, component=component, allow_nonfinite=allow_nonfinite, allow_edited=allow_edited)
    known = dict.fromkeys(adapter.updates, True) | {name: name.endswith(".weight") for name in adapter.full}
    if base is not None:
        shapes = {name: info.shape for file in files_of(base).values() for name, info in file.infos.items()}
        known = {
            name: len(shapes[slots[0].path]) >= 2 and not name.endswith(".bias")
            for name, slots in slots_of(shapes, None).items()
        }
        adapter = dotted("convert", adapter, known)
    return Collected(adapter, known, {}, is_all_known=base is not None or "target_modules" in adapter.config)


def check_foreign(path: Path, kind: str, collected: Collected, base: Path | None) -> None:
    """Refuses another tool's adapter that has not all that PEFT's files say.

    Args:
      path: where it lies.
      kind: whose it is.
      collected: the adapter.
      base: the model that was given to tell its names, if any.
    """
    adapter = collected.adapter
    if isinstance(adapter, FlatAdapter):
        raise ValueError(
            f"{path} is of kohya's scripts, whose names have underscores for dots; give the model's safetensors, which "
            "tell the names: --base DIRECTORY"
        )
    kinds = {update.kind: name for name, update in adapter.updates.items()}
    if kind == "mlx" and EXPERTS in kinds:
        raise ValueError(
            f"{path} has an update of stacked experts, {kinds[EXPERTS]}, which MLX-LM names and stacks otherwise than "
            "Transformers; fuse it into the model in MLX-LM (mlx_lm.fuse)"
        )
    if kind == "mlx" and EMBEDDING in kinds and base is None:
        raise ValueError(
            f"{path} has an update of a table, {kinds[EMBEDDING]}, which is the head too in some models; give the "
            "model's safetensors, which tell: --base DIRECTORY"
        )
    if missing := [name for name in adapter.updates if name not in collected.known]:
        raise ValueError(f"{path} has {missing[0]}, which is no module of the model in {base}")


def source_of(path: Path, wanted: str | None) -> str:
    """Whose adapter lies at a path.

    Raises:
      ValueError: if it is not that of the tool that was named.
    """
    kind = "orbax" if is_orbax(path) else kind_of(path)
    if wanted not in (None, kind):
        raise ValueError(f"{path} is an adapter of {kind}, not of {wanted}, by its files and the names in them")
    return kind


def check_out(out: Path, inputs: Iterable[Path], force: bool, marks: Iterable[str]) -> None:
    """Refuses a place for the result that holds an input, lies in one, or has something else than such a result.

    Args:
      out: the place.
      inputs: what is read.
      force: whether an earlier result may be replaced.
      marks: names of which an earlier result has one.
    """
    for path in inputs:
        ours, theirs = out.resolve(), path.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise ValueError(f"{out} can't hold the result: {path}, which is read, is in the same place")
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise FileExistsError(f"{out} is there already; --force replaces it")
    if out.is_symlink() or not out.is_dir() or not any((out / mark).exists() for mark in marks):
        raise FileExistsError(f"{out} is there and has no earlier result, which --force would replace; move it away")


def checked_names(names: str | None) -> str | None:
    """The name of a ready map, if there is one.

    Raises:
      ValueError: if there is none.
    """
    if names is not None and names not in NAMES:
        raise ValueError(f"--names: there is no map {names!r}; there are {', '.join(NAMES)}")
    return names
