"""Reads the tensors of a `.pth` file, PyTorch's pickle of a state dict, without torch and without running its pickle.

A pickle may call anything that can be imported. This one may name six things, all of them made here or harmless; a name
besides these is an error before anything is called.

References:
  https://docs.python.org/3/library/pickle.html#restricting-globals
  `_legacy_save` in https://github.com/pytorch/pytorch/blob/main/torch/serialization.py: the order of the pickles.
"""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
}


class PthError(ValueError):
    """A file that is no state dict of tensors; the message says what was found."""


class Storage(NamedTuple):
    """Where a tensor's numbers are to be found: they come after all pickles."""

    key: str
    dtype: np.dtype
    size: int


class View(NamedTuple):
    """A tensor: elements of a storage from `offset` on, `strides` of them apart along each axis."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict by their names, from PyTorch's format of before 1.6.

    Raises:
      PthError: if the file is something else, or its pickle asks for more than tensors.
    """
    with path.open("rb") as file:
        try:
            magic, protocol, _ = (_Unpickler(file).load() for _ in range(3))  # and the sizes of C's types
            _expect((magic, protocol) == (MAGIC, PROTOCOL), "PyTorch's magic number", magic)
            views, keys = _Unpickler(file).load(), _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError) as error:
            raise PthError(f"{path.name} is no state dict: {type(error).__name__}: {error}") from error
        _expect(isinstance(views, dict) and all(isinstance(v, View) for v in views.values()), "tensors", type(views))
        storages = {view.storage.key: view.storage for view in views.values()}
        _expect(isinstance(keys, list) and {*keys} == {*storages}, "the storages of the tensors", keys)
        flat = {key: _numbers(file, storages[key]) for key in keys}
    return {name: _array(flat[view.storage.key], view) for name, view in views.items()}


def _view(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> View:
    """Checks that no element of the tensor is outside of its storage."""
    _expect(isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple), "a tensor", shape)
    sizes = (offset, *shape, *strides)
    _expect(all(type(n) is int and 0 <= n < 2**40 for n in sizes) and len(shape) == len(strides), "sizes", sizes)
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    _expect(end <= storage.size and 0 not in shape, f"a tensor inside of {storage.size} numbers", sizes)
    return View(storage, offset, shape, strides)


class _Unpickler(pickle.Unpickler):
    """An unpickler for which nothing exists but tensors in storages, in ordered dicts."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _view,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        _expect((module, name) in self.ALLOWED, "a pickle of tensors", f"{module}.{name}")
        return self.ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        _expect(isinstance(pid, tuple) and len(pid) == 6 and pid[0] == "storage", "a storage", pid)
        _, dtype, key, _, size, _ = pid
        is_storage = isinstance(dtype, np.dtype) and isinstance(key, str) and type(size) is int
        _expect(is_storage, "a storage's type, name and size", pid)
        return Storage(key, dtype, size)


def _numbers(file: BinaryIO, storage: Storage) -> np.ndarray:
    size = int.from_bytes(file.read(8), "little")
    _expect(size == storage.size, f"a storage of {storage.size} numbers", size)
    data = file.read(size * storage.dtype.itemsize)
    _expect(len(data) == size * storage.dtype.itemsize, f"{size} numbers", f"{len(data)} bytes")
    return np.frombuffer(data, storage.dtype)


def _array(flat: np.ndarray, view: View) -> np.ndarray:
    strides = [stride * flat.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides, writeable=False)


def _expect(condition: bool, expected: str, found: Any) -> None:
    if not condition:
        raise PthError(f"expected {expected}, found {found!r}")
