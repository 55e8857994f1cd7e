"""Adapters of MLX-LM: ``adapters.safetensors`` and the settings beside.

A linear layer adds ``scale * (x @ lora_a) @ lora_b``, with lora_a (in, r) and lora_b (r, out); DoRA gives each row of
the sum of the weights the norm that ``m`` has. A table of embeddings has lora_a (tokens, r) and lora_b (r, features).
Stacked experts have lora_b (experts, out, r) and lora_a (experts, r, in), the first two axes of it as one in older
versions.

References:
  ``mlx_lm/tuner/lora.py``, ``dora.py`` and ``utils.py`` in https://github.com/ml-explore/mlx-lm: the layers' ``fuse``.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jlora.peft.adapter import EMBEDDING, EXPERTS, LINEAR, Adapter, Update
from jlora.peft.keys import NAME
from jlora.peft.layout import is_embedding
from jlora.peft.read import check_types
from jlora.peft.settings import CONFIG
from jlora.peft.tensors import TensorFile, read_json

WEIGHTS = "adapters.safetensors"
_FIELDS: dict[str, Any] = {"rank": None, "scale": None, "dropout": 0.0}
_KEY = re.compile(r"(.+)\.(lora_a|lora_b|m)")


def is_mlx(settings: Mapping[str, Any]) -> bool:
    """Whether settings are those of MLX-LM, which has no ``peft_type``."""
    return "peft_type" not in settings and ("lora_parameters" in settings or "fine_tune_type" in settings)


def read_mlx(directory: Path) -> Adapter:
    """Reads the adapter that MLX-LM wrote into a directory.

    Raises:
      ValueError: if a file is not what MLX-LM writes, or has what no low-rank update is.
    """
    settings = read_json(directory / CONFIG)
    given = _settings(directory / CONFIG, settings)
    file = TensorFile(directory / WEIGHTS)
    parts: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for key in file:
        match = _KEY.fullmatch(key[:1000])
        if not match or not NAME.fullmatch(match[1]):
            raise ValueError(
                f"{file.path}: the tensor {key[:200]!r} is no lora_a, lora_b or m of MLX-LM's; whole weights and "
                "quantised factors are not read"
            )
        parts[match[1]][match[2]] = key
    check_types(file, file)
    if not parts:
        raise ValueError(f"{file.path} has no tensors of an adapter")
    updates = {name: _update(file, name, keys, given) for name, keys in parts.items()}
    return Adapter(updates, dropout=given.dropout, config=given.as_peft(settings.get("model")))


class _Settings(NamedTuple):
    rank: int
    scale: float
    dropout: float
    is_dora: bool

    def as_peft(self, base: Any) -> dict[str, Any]:
        """The settings as PEFT's; which modules of the model are adapted the file alone tells."""
        return {
            "peft_type": "LORA", "r": self.rank, "lora_alpha": self.scale * self.rank, "target_modules": "all-linear",
            "lora_dropout": self.dropout, "use_dora": self.is_dora,
            "base_model_name_or_path": base if isinstance(base, str) else None,
        }  # fmt: skip


def _settings(path: Path, data: Mapping[str, Any]) -> _Settings:
    kind, given = data.get("fine_tune_type", "lora"), data.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise ValueError(
            f"{path}: fine_tune_type is {kind!r}; lora and dora are read. Weights that were trained in full are no "
            "adapter: fuse them into the model in MLX-LM (mlx_lm.fuse)"
        )
    if not isinstance(given, Mapping):
        raise ValueError(f"{path}: lora_parameters must be an object with rank and scale, found {str(given)[:100]}")
    rank, scale, dropout = (given.get(name, default) for name, default in _FIELDS.items())
    if type(rank) is not int or not 0 < rank < 2**31:
        raise ValueError(f"{path}: the rank in lora_parameters must be a whole number above 0, found {rank!r:.100}")
    if not _is_number(scale) or not 0 < scale < 1e30:
        raise ValueError(f"{path}: the scale in lora_parameters must be a number above 0, found {scale!r:.100}")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: the dropout in lora_parameters must be in [0, 1), found {dropout!r:.100}")
    if given.get("alpha") not in (None, rank):
        raise ValueError(
            f"{path}: lora_parameters has alpha={given['alpha']!r:.100} and rank={rank}: older versions of MLX-LM "
            f"multiply the scale, {scale}, by alpha / rank, newer ones leave alpha out. Take alpha out of the file, "
            "and let scale be the one that is meant"
        )
    return _Settings(rank, float(scale), float(dropout), kind == "dora")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _update(file: TensorFile, name: str, keys: Mapping[str, str], given: _Settings) -> Update:
    if missing := [role for role in ("lora_a", "lora_b") if role not in keys]:
        raise ValueError(f"{file.path}: {name} has {sorted(keys)}, but not the other factor, {missing[0]}")
    a, b = file[keys["lora_a"]], file[keys["lora_b"]]
    kind = EXPERTS if b.ndim == 3 else EMBEDDING if is_embedding(name) else LINEAR
    if kind == EXPERTS:
        a = a.reshape(len(b), -1, a.shape[-1]) if a.ndim == 2 and len(a) % len(b) == 0 else a
    elif a.ndim == b.ndim == 2:
        a, b = a.T, b.T
    wanted = 3 if kind == EXPERTS else 2
    if (a.ndim, b.ndim) != (wanted, wanted) or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            f"{file.path}: the factors of {name} are {_shape(file, keys, 'lora_a')} and {_shape(file, keys, 'lora_b')}"
            "; expected are (in, r) and (r, out), or (experts, r, in) and (experts, out, r)"
        )
    if (a.shape[-2], b.shape[-1]) != (given.rank, given.rank):
        raise ValueError(
            f"{file.path}: by its settings {name} has rank {given.rank}, but its factors are "
            f"{_shape(file, keys, 'lora_a')} and {_shape(file, keys, 'lora_b')}"
        )
    return Update(kind, a, b, given.scale, _magnitude(file, name, keys, kind, given, b.shape[-2]))


def _magnitude(
    file: TensorFile, name: str, keys: Mapping[str, str], kind: str, given: _Settings, out: int
) -> np.ndarray | None:
    if given.is_dora != ("m" in keys):
        there = "lacks" if given.is_dora else "has"
        raise ValueError(
            f"{file.path}: {name} {there} an m, but fine_tune_type is {'dora' if given.is_dora else 'lora'}"
        )
    if not given.is_dora:
        return None
    if kind != LINEAR:
        raise ValueError(
            f"{file.path}: {name} is a table or experts with DoRA: MLX-LM's m is the norms of a table's rows, and "
            "PEFT's those of its columns. Fuse it in MLX-LM (mlx_lm.fuse)"
        )
    if file.infos[keys["m"]].shape != (out,):
        raise ValueError(f"{file.path}: the m of {name} is {_shape(file, keys, 'm')}; expected are {out} elements")
    return file[keys["m"]]


def _shape(file: TensorFile, keys: Mapping[str, str], role: str) -> tuple[int, ...]:
    return file.infos[keys[role]].shape
