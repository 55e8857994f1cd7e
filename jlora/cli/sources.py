"""An adapter's directory, of either kind."""

from __future__ import annotations

from pathlib import Path

from jlora import checkpoint
from jlora.peft.collect import Collected, collect
from jlora.peft.maps import NAMES
from jlora.peft.read import CONFIG, PICKLE, WEIGHTS, read


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


def checked_names(names: str | None) -> str | None:
    """The name of a ready map, if there is one.

    Raises:
      ValueError: if there is none.
    """
    if names is not None and names not in NAMES:
        raise ValueError(f"--names: there is no map {names!r}; there are {', '.join(NAMES)}")
    return names
