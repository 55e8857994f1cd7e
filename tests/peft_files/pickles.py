"""PyTorch's pickles written without torch: by the pickle module, from stand-ins for what torch has."""

import io
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from contextlib import contextmanager

import ml_dtypes
import numpy as np

from jlora.peft.pickled import MAGIC, PROTOCOL

KINDS = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}  # fmt: skip


@contextmanager
def torch():
    """Modules for the pickler alone, which looks names up before it writes them."""
    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    package, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in KINDS.values():
        setattr(package, name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        setattr(utils, name, _function(name))
    sys.modules |= {"torch": package, "torch._utils": utils}
    try:
        yield package
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def _function(name):
    def rebuild(*_):
        raise AssertionError("called")

    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = "torch._utils", name, name
    return rebuild


class Tensor:
    """A tensor as it is pickled: a view of the storage of this key."""

    def __init__(self, key, kind, size, offset, shape, strides, is_parameter=False):
        self.key, self.kind, self.size = key, kind, size
        self.place, self.is_parameter = (offset, shape, strides), is_parameter

    def __reduce__(self):
        utils = sys.modules["torch._utils"]
        storage = ("storage", getattr(sys.modules["torch"], self.kind), self.key, "cpu", self.size)
        if self.is_parameter:
            plain = Tensor(self.key, self.kind, self.size, *self.place)
            return utils._rebuild_parameter, (plain, True, OrderedDict())
        return utils._rebuild_tensor_v2, (storage, *self.place, False, OrderedDict())


class Pickler(pickle.Pickler):
    """Of one of the two formats, whose references to storages have five parts, or six."""

    def __init__(self, file, more=()):
        super().__init__(file, 2)
        self.more = more

    def persistent_id(self, obj):
        is_storage = isinstance(obj, tuple) and obj[:1] == ("storage",) and len(obj) == 5
        return (*obj, *self.more) if is_storage else None


def dumped(value, more=()):
    file = io.BytesIO()
    with torch():
        Pickler(file, more).dump(value)
    return file.getvalue()


def as_zip(value, storages, compression=zipfile.ZIP_STORED, root="archive", **records):
    """The format since PyTorch 1.6."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", dumped(value))
        for name, data in {"byteorder": b"little", "version": b"3\n", **records}.items():
            archive.writestr(f"{root}/{name}", data)
        for key, array in storages.items():
            archive.writestr(f"{root}/data/{key}", array.tobytes())
    return file.getvalue()


def as_stream(value, storages, magic=MAGIC, keys=None, little=True):
    """The format of before PyTorch 1.6."""
    parts = (magic, PROTOCOL, {"little_endian": little}, value, [*storages] if keys is None else keys)
    data = b"".join(dumped(part, (None,)) for part in parts)
    return data + b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages.values())


FORMATS = {"zip": as_zip, "stream": as_stream}


def state(arrays):
    """Tensors for arrays, with their storages: some are parameters, some transposed, two of a storage."""
    tensors, storages = OrderedDict(), {}
    for i, (name, array) in enumerate(arrays.items()):
        kind = KINDS[str(array.dtype)]
        flat = array.T.reshape(-1) if i % 2 else array.reshape(-1)
        strides = np.array(flat.reshape(array.shape[::-1]).strides[::-1] if i % 2 else array.strides) // flat.itemsize
        padded = np.concatenate([np.ones(i, array.dtype), flat])
        tensors[name] = Tensor(str(i), kind, padded.size, i, array.shape, tuple(map(int, strides)), i % 3 == 0)
        storages[str(i)] = padded
    tensors.__dict__["_metadata"] = {"": {"version": 1}}
    return tensors, storages


def written(arrays, format="zip"):
    """The bytes of a state dict."""
    return FORMATS[format](*state({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
