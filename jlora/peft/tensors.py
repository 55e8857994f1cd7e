"""Safetensors files, read lazily and checked, written as a stream and at once.

The `safetensors` package judges a file (header, sizes, holes, overlaps); its arrays are then read through a memory map,
bfloat16 too, so that no more than one of them is in memory.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jlora.peft.files import flush, replacing, write_text
from jlora.spec.files import parsed as parsed
from jlora.spec.files import read_json as read_json
from jlora.spec.files import unique

DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
MAX_HEADER = 16 << 20  # of some hundred thousand tensors
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """A tensor's shape and type, as a file's header has them."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file: a mapping from names to arrays that are views of it.

    Raises:
      ValueError: if it is no whole safetensors file, or names a tensor twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names, self._map = _opened(path)
        start = 8 + int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8:start], object_pairs_hook=lambda pairs: unique(str(path), pairs))
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.infos = {name: _info(path, name, entry) for name, entry in header.items() if name in names}
        self._places = {name: start + header[name]["data_offsets"][0] for name in self.infos}

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.infos[name]
        count = info.nbytes // info.dtype.itemsize
        return np.frombuffer(self._map, info.dtype, count, self._places[name]).reshape(info.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(info.nbytes for info in self.infos.values())


def _opened(path: Path) -> tuple[set[str], mmap.mmap]:
    """The names in a file, checked, and its bytes; of one file, though it may be replaced meanwhile."""
    while True:
        with path.open("rb") as file:
            _check_header(path)
            try:
                with safe_open(path, framework="numpy") as checked:
                    names = set(checked.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is no whole safetensors file: {error}") from None
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return names, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise ValueError(f"{path} is no whole safetensors file: its header would have {size} bytes, over {MAX_HEADER}")


def _info(path: Path, name: str, entry: Mapping[str, Any]) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{path}: {name!r} has the type {entry['dtype']}; known are {', '.join(DTYPES)}")
    return TensorInfo(tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]]))


def write_tensors(
    path: Path, infos: Mapping[str, TensorInfo], get: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, asking for one array at a time.

    Args:
      path: of the file, which appears whole or not at all.
      infos: the shape and type of each tensor.
      get: a function of a name that returns the array.
      metadata: text for the header.

    Raises:
      ValueError: if an array is not what `infos` says.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, info in infos.items():
        header[name] = {
            "dtype": NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as aside, aside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, info in infos.items():
            array = np.asarray(get(name))
            if TensorInfo(array.shape, array.dtype) != info:
                raise ValueError(f"{name} was announced as {info}, found {array.shape} of {array.dtype}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        flush(file)


def write_json(path: Path, data: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json_of(data))


def json_of(data: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(data, indent=2, sort_keys=True) + "\n"


def are_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite, looked at a part at a time."""
    if array.dtype.kind in "iub":
        return True
    wide = array.dtype if array.dtype.itemsize >= 4 else np.dtype(np.float32)
    return all(bool(np.isfinite(part.astype(wide, copy=False)).all()) for part in parts(array.reshape(-1)))


def parts(flat: np.ndarray, size: int = 1 << 22) -> Iterable[np.ndarray]:
    """A long vector in pieces, so that what is made of them stays small."""
    return (flat[start : start + size] for start in range(0, len(flat), size))
