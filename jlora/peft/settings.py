"""The settings beside an adapter's weights: two files that belong to one save.

The weights are written first. Their header has the settings too, and a digest of the settings that lay there before: a
save that was cut off between the two is whole already, and is read so. Files of other tools have neither.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jlora.peft.tensors import TensorFile, json_of, parsed, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OWN, _BEFORE = "jlora.settings", "jlora.settings_before"


def header(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """What the weights' header says of the settings that will be written beside."""
    return {"format": "pt", _OWN: json_of(settings), _BEFORE: _digest(directory / CONFIG)}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def of_save(file: TensorFile) -> dict[str, Any] | None:
    """The settings that the weights were saved with; None where they do not say it.

    Raises:
      ValueError: if they are no settings.
    """
    text = file.metadata.get(_OWN)
    return None if text is None else parsed(f"{file.path}, {_OWN!r} of its header", text)


def beside(file: TensorFile, allow_edited: bool = False) -> dict[str, Any]:
    """The settings that belong to weights: those in the file beside, or where a save was cut off those in the header.

    It was cut off where the file beside is the one that lay there before, and older than the weights.

    Raises:
      ValueError: if the file beside is no JSON that can be trusted.
    """
    path, own = file.path.parent / CONFIG, of_save(file)
    is_before = file.metadata.get(_BEFORE) == _digest(path) and not allow_edited
    is_older = path.stat().st_mtime_ns <= file.path.stat().st_mtime_ns
    return own if own is not None and is_before and is_older else read_json(path)
