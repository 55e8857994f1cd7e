"""PyTorch's pickles of a state dict, read without torch and without running them.

A pickle is a program, and may call anything that can be imported. Here its operations are done one by one, by a machine
that knows those of which a state dict is made and a few names: ordered dicts, tensors, parameters, storages. A name
besides these is an error before anything is called, and none of those that are known is imported either.

References:
  https://docs.python.org/3/library/pickletools.html: the operations.
  `_save` and `_legacy_save` in https://github.com/pytorch/pytorch/blob/main/torch/serialization.py: the two formats.
  `_rebuild_tensor_v2` and others in https://github.com/pytorch/pytorch/blob/main/torch/_utils.py: their arguments.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jlora.peft.tensors import TensorFile, TensorInfo

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format of before PyTorch 1.6
LONGEST, MOST = 16 << 20, 2_000_000  # bytes and operations of a pickle: of some ten thousand tensors
SHARED = 4  # times the file's bytes, that its tensors have together at most: some share their numbers
STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
UNTYPED = "torch.storage.UntypedStorage"
TYPES = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}  # without a storage's name
_BROKEN = (ValueError, LookupError, TypeError, OverflowError, OSError, EOFError, RuntimeError, struct.error)


class Global(NamedTuple):
    """A name that a pickle may have; it stands for itself, and is never looked up."""

    name: str


class Storage(NamedTuple):
    """Where tensors have their numbers."""

    key: str
    dtype: np.dtype
    size: int
    is_untyped: bool


class View(NamedTuple):
    """A tensor: elements of a storage from `offset` on, `strides` of them apart along each axis."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class PickledFile(TensorFile):
    """A state dict in a pickle, as a safetensors file: a mapping from names to arrays that are views of it.

    Raises:
      ValueError: if it is something else, is damaged, or its pickle asks for more than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.metadata = path, {}
        try:
            with path.open("rb") as file:
                self._arrays = _arrays_of(file)
        except (*_BROKEN, zipfile.BadZipFile, NotImplementedError) as error:
            if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
                raise
            told = str(error) if isinstance(error, ValueError | zipfile.BadZipFile) else "its pickle, or zip, is broken"
            raise ValueError(f"{path} is no state dict of tensors, as torch.save writes it: {told}") from None
        self.infos = {name: TensorInfo(array.shape, array.dtype) for name, array in self._arrays.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)


def state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a pickled state dict, by their names; errors as of `PickledFile`."""
    file = PickledFile(path)
    return {name: file[name] for name in file}


def _arrays_of(file: BinaryIO) -> dict[str, np.ndarray]:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    views, flat = _of_zip(file, data) if data[:4] == b"PK\x03\x04" else _of_stream(data)
    total = sum(view.nbytes for view in views.values())
    if total > SHARED * len(data) + (1 << 20):
        raise ValueError(f"its tensors would have {total} bytes, and the file has {len(data)}")
    return {name: _array(flat[view.storage.key], view) for name, view in views.items()}


def _array(flat: np.ndarray, view: View) -> np.ndarray:
    if 0 in view.shape:
        return np.empty(view.shape, view.dtype)
    flat = flat.view(view.dtype)[view.offset :]
    return np.lib.stride_tricks.as_strided(flat, view.shape, [n * flat.itemsize for n in view.strides], writeable=False)


# -------------------------------------------------------------------------------- the two formats


def _of_zip(file: BinaryIO, data: mmap.mmap) -> tuple[dict[str, View], dict[str, np.ndarray]]:
    """The format since PyTorch 1.6: a zip, uncompressed, with the pickle and each storage as a record."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    records = {info.filename: info for info in infos}
    roots = [name.removesuffix("/data.pkl") for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(records) < len(infos) or len(roots) != 1:
        raise ValueError("as a zip it has no data.pkl, or has several, or a record twice")
    machine = _Machine()
    views = _checked(machine.run(io.BytesIO(_record(data, records[f"{roots[0]}/data.pkl"], LONGEST))))
    order = records.get(f"{roots[0]}/byteorder")
    is_big = order is not None and bytes(_record(data, order, 16)) == b"big"
    flat = {}
    for key, storage in machine.storages.items():
        name = f"{roots[0]}/data/{key}"
        if name not in records:
            raise ValueError(f"it lacks {name}, the numbers of a tensor")
        flat[key] = _numbers(_record(data, records[name]), storage, is_big)
    return views, flat


def _record(data: mmap.mmap, info: zipfile.ZipInfo, most: int | None = None) -> memoryview:
    """The bytes of a record, as a view of the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise ValueError(f"its record {_short(info.filename)} is compressed or encrypted, which PyTorch's are not")
    if most is not None and info.file_size > most:
        raise ValueError(f"its record {_short(info.filename)} has {info.file_size} bytes, over {most}")
    at = info.header_offset
    head = data[at : at + 30] if at >= 0 else b""
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise ValueError(f"its record {_short(info.filename)} is not where the zip says")
    start = at + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    found = memoryview(data)[start : start + info.file_size]
    if len(found) < info.file_size or zlib.crc32(found) != info.CRC:
        raise ValueError(f"its record {_short(info.filename)} is damaged")
    return found


def _of_stream(data: mmap.mmap) -> tuple[dict[str, View], dict[str, np.ndarray]]:
    """The format of before PyTorch 1.6: five pickles, then the storages."""
    stream = io.BytesIO(data[:LONGEST])
    magic, protocol, system = (_Machine().run(stream) for _ in range(3))
    if (magic, protocol) != (MAGIC, PROTOCOL):
        raise ValueError("it does not begin with PyTorch's magic number")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it was not written on a little-endian machine")
    machine = _Machine()
    views, keys = _checked(machine.run(stream)), _Machine().run(stream)
    are_keys = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not are_keys or sorted(keys) != sorted(machine.storages):
        raise ValueError("its list of storages is not that of its tensors")
    flat, at = {}, stream.tell()
    for key in keys:
        storage = machine.storages[key]
        size = storage.size * storage.dtype.itemsize
        if int.from_bytes(data[at : at + 8], "little") != storage.size or at + 8 + size > len(data):
            raise ValueError(f"its storage {_short(key)} has not the {storage.size} numbers that its tensors need")
        flat[key] = _numbers(memoryview(data)[at + 8 : at + 8 + size], storage)
        at += 8 + size
    return views, flat


def _numbers(data: memoryview, storage: Storage, is_big: bool = False) -> np.ndarray:
    if len(data) != storage.size * storage.dtype.itemsize:
        raise ValueError(
            f"its storage {_short(storage.key)} has {len(data)} bytes; expected are {storage.size} numbers"
        )
    flat = np.frombuffer(data, storage.dtype)
    if not is_big:
        return flat
    if storage.is_untyped:
        raise ValueError("it was written on a big-endian machine, with storages of no type")
    return flat.view(f"u{storage.dtype.itemsize}").byteswap().view(storage.dtype)


def _checked(found: Any) -> dict[str, View]:
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}; expected are tensors by their names")
    if other := next((name for name, value in found.items() if not isinstance(value, View)), None):
        raise ValueError(f"{_short(other)} in it is a {type(found[other]).__name__}; expected is a tensor")
    return found


# -------------------------------------------------------------------------------- what a pickle may do


class _Machine:
    """Does the operations of one pickle, and collects the storages that it names."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, data: BinaryIO) -> Any:
        """What the pickle makes; after it the stream stands behind its end."""
        for count, (operation, argument, at) in enumerate(pickletools.genops(data)):
            if count > MOST:
                raise ValueError(f"its pickle has over {MOST} operations")
            if operation.name == "STOP":
                return self.stack.pop()
            if operation.name in _PUSHED:
                self.push(argument)
            elif operation.name in _CONSTANTS:
                self.push(_CONSTANTS[operation.name]())
            elif operation.name in _DONE:
                _DONE[operation.name](self, argument)
            elif operation.name not in ("PROTO", "FRAME"):
                raise ValueError(f"its pickle has the operation {operation.name} at byte {at}, which no tensor needs")
        raise ValueError("its pickle has no end")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """What lies above the last mark, which goes with it."""
        found, self.stack = self.stack, self.marks.pop()
        return found

    def popped(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("its pickle takes more than there is")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def put(self, at: int) -> None:
        self.memo[at] = self.stack[-1]

    def named(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        if full not in _KNOWN:
            raise ValueError(f"its pickle asks for {_short(full)}, which may run any code; it was not run")
        self.push(Global(full))

    def called(self) -> None:
        call, arguments = self.popped(2)
        if not isinstance(call, Global) or call.name not in _CALLS or not isinstance(arguments, tuple):
            raise ValueError("its pickle calls what is no function of a tensor")
        self.push(_CALLS[call.name](*arguments))

    def built(self) -> None:
        """The attributes of a dict, such as ``_metadata``, are left away; nothing else has such."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ValueError(f"its pickle sets attributes of a {type(self.stack[-1]).__name__}")

    def appended(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError(f"its pickle appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def assigned(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ValueError(f"its pickle sets an item of a {type(self.stack[-1]).__name__}")
        for name, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(name, str) or name in self.stack[-1]:
                raise ValueError(f"its pickle has an item whose name is no text, or is there twice: {_short(name)}")
            self.stack[-1][name] = value

    def stored(self) -> None:
        """A storage, by its persistent id."""
        pid = self.stack.pop()
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise ValueError("its pickle has a reference that is no storage")
        _, kind, key, _, size = pid[:5]
        dtype = _DTYPES.get(kind.name) if isinstance(kind, Global) else None
        if dtype is None or not isinstance(key, str) or type(size) is not int or not 0 <= size < 2**50:
            raise ValueError("its pickle has a storage without a type, a name and a size")
        storage = Storage(key, dtype, size, kind.name == UNTYPED)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"its storage {_short(key)} is said to be two different ones")
        self.push(storage)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, more: Any = None) -> View:
    if not isinstance(storage, Storage) or storage.is_untyped or more:
        raise ValueError("its pickle has a tensor without a typed storage, or with more to it than numbers")
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_of_type(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, more: Any = None
) -> View:
    kind = TYPES.get(dtype.name.removeprefix("torch.")) if isinstance(dtype, Global) else None
    if not isinstance(storage, Storage) or not storage.is_untyped or kind is None or more:
        raise ValueError("its pickle has a tensor without a storage and a known type, or with more to it than numbers")
    return _view(storage, np.dtype(kind), offset, shape, strides)


def _view(storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> View:
    """A tensor, of which no element is outside of its storage, and which has no more of them."""
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("its pickle has a tensor without a shape and strides")
    if not all(type(n) is int and 0 <= n < 2**40 for n in (offset, *shape, *strides)):
        raise ValueError("its pickle has a tensor of sizes that are no numbers")
    size = storage.size * storage.dtype.itemsize // dtype.itemsize
    end = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    if 0 not in shape and (end > size or int(np.prod(shape, dtype=object)) > size):
        raise ValueError(f"a tensor of shape {shape} in it is not inside of its storage, of {size} numbers")
    return View(storage, dtype, offset, shape, strides)


def _parameter(data: Any, _grad: Any, _hooks: Any) -> View:
    if not isinstance(data, View):
        raise ValueError("its pickle has a parameter that is no tensor")
    return data


def _short(text: Any) -> str:
    return repr(text[:80] if isinstance(text, str) else type(text).__name__)


_DTYPES = {f"torch.{name}": np.dtype(kind) for name, kind in STORAGES.items()} | {UNTYPED: np.dtype(np.uint8)}
_CALLS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
}
_KNOWN = {*_DTYPES, *_CALLS, *(f"torch.{name}" for name in TYPES)}
_PUSHED = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING",
    "SHORT_BINSTRING",
}  # fmt: skip
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "NONE": lambda: None, "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}  # fmt: skip
_DONE: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.mark(),
    "TUPLE": lambda m, _: m.push(tuple(m.marked())),
    "TUPLE1": lambda m, _: m.push(tuple(m.popped(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.popped(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.popped(3))),
    "APPEND": lambda m, _: m.appended(m.popped(1)),
    "APPENDS": lambda m, _: m.appended(m.marked()),
    "SETITEM": lambda m, _: m.assigned(m.popped(2)),
    "SETITEMS": lambda m, _: m.assigned(m.marked()),
    "BINPUT": lambda m, at: m.put(at),
    "LONG_BINPUT": lambda m, at: m.put(at),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "BINGET": lambda m, at: m.push(m.memo[at]),
    "LONG_BINGET": lambda m, at: m.push(m.memo[at]),
    "GLOBAL": lambda m, names: m.named(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.named(*m.popped(2)),
    "BINPERSID": lambda m, _: m.stored(),
    "REDUCE": lambda m, _: m.called(),
    "BUILD": lambda m, _: m.built(),
}
