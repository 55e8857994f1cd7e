"""The directories of a run's steps: which are whole, and how they go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jlora.checkpoint import adapter, backend
from jlora.checkpoint.adapter import ABOUT, ADAPTER
from jlora.checkpoint.state import STATE
from jlora.checkpoint.told import Told

RUN = "run"
_OURS = {ADAPTER, ABOUT, STATE, RUN, "_CHECKPOINT_METADATA", "commit_success.txt", "orbax.checkpoint"}
_UNFINISHED = ".orbax-checkpoint-tmp"


def whole_steps(directory: Any) -> tuple[dict[int, dict[str, float]], list[str]]:
    """The metrics of each whole step, and what is wrong with the others."""
    found, faults = {}, []
    for path in _step_directories(directory):
        try:
            adapter.describe(path)
            metrics = said(path)["metrics"].entries()
            found[int(path.name)] = {name: float(x.number(is_finite=False)) for name, x in metrics.items()}
        except (OSError, ValueError) as error:
            faults.append(f"{path} is no whole checkpoint: {error}")
    return found, faults


def said(path: Any) -> dict[str, Told]:
    """What is said of a step beside its adapter: its metrics, the extra and the state."""
    parts = backend.read_json(path, RUN).parts(("metrics", "extra", "state"))
    for x in parts["state"].entries().values():
        x.form()
    return parts


def _step_directories(directory: Any) -> Iterator[Any]:
    if directory.is_dir():
        yield from (path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir())


def fault(path: Any, is_whole: bool) -> str | None:
    """Why a step can't be written; None if it can."""
    if is_whole:
        return f"Checkpoints.save: {path} is there already; move it away to write this step anew"
    if path.exists() and not _is_ours(path):
        return f"Checkpoints.save: {path} is there and is no checkpoint of a step; move it away"
    return None


def _is_ours(path: Any) -> bool:
    return path.is_dir() and all(entry.name in _OURS for entry in path.iterdir())


def clean(directory: Any) -> None:
    """Deletes what a killed run was writing, or deleting."""
    for path in [*directory.iterdir()]:
        step, mark, _ = path.name.partition(_UNFINISHED)
        if mark and step.isdecimal():
            path.rmtree()


def delete(path: Any) -> None:
    """Deletes a step, which first gets the name of one that is not there: so it is, killed in between."""
    aside = path.parent / f"{path.name}{_UNFINISHED}-deleted"
    path.rename(aside)
    aside.rmtree()
