"""An adapter's directory, of either kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from jlora import checkpoint
from jlora.peft.collect import Collected, collect
from jlora.peft.maps import NAMES
from jlora.peft.read import PICKLE, read
from jlora.peft.settings import CONFIG, WEIGHTS


def is_orbax(directory: Path) -> bool:
    """Whether `jlora.checkpoint` has written a directory.

    Raises:
      FileNotFoundError: if it holds no adapter at all.
    """
    if any((directory / name).exists() for name in (CONFIG, WEIGHTS, PICKLE)):
        return False
    if (directory / checkpoint.ABOUT).is_dir():
        return True
    there = "is no directory" if not directory.is_dir() else f"has neither {CONFIG} nor an Orbax adapter"
    raise FileNotFoundError(f"{directory} {there}")


def adapter_of(directory: Path, names: str | None = None, allow_nonfinite: bool = False) -> Collected:
    """An adapter under PyTorch's names; those of an Orbax one by a ready map, or its paths with dots."""
    if is_orbax(directory):
        return collect(checkpoint.load_abstract(directory), names)
    adapter = read(directory, allow_nonfinite=allow_nonfinite)
    known = dict.fromkeys(adapter.updates, True) | {name: name.endswith(".weight") for name in adapter.full}
    return Collected(adapter, known, {})


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
