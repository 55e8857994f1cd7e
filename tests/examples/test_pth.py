"""Tests of the reader of `.pth` files: what PyTorch writes, and pickles that want more than tensors."""

import io
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest

from jlora.examples.pth import MAGIC, PROTOCOL, PthError, read_pth

WEIGHT = np.arange(6, dtype="<f4")
STEPS = np.array([7], "<i8")


def named(module, name):
    """A class that pickles under this name."""
    return type(name, (), {"__module__": module, "__qualname__": name})


@pytest.fixture
def torch(monkeypatch):
    """Modules for the pickler alone, which looks names up before it writes them."""
    package, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage"):
        setattr(package, name, named("torch", name))

    def rebuild(*_):
        raise AssertionError("called")

    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = "torch._utils", *2 * ("_rebuild_tensor_v2",)
    utils._rebuild_tensor_v2 = rebuild
    monkeypatch.setitem(sys.modules, "torch", package)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return package


class Tensor:
    def __init__(self, kind, key, size, offset, shape, strides):
        self.storage, self.place = ("storage", kind, key, "cpu", size, None), (offset, shape, strides)

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (self.storage, *self.place, False, {})


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None


def pth(path, tensors, keys=("0", "1"), storages=(WEIGHT, STEPS), magic=MAGIC):
    file = io.BytesIO()
    for part in (magic, PROTOCOL, {"little_endian": True}, tensors, list(keys)):
        Pickler(file, 2).dump(part)
    for array in storages:
        file.write(struct.pack("<q", array.size) + array.tobytes())
    path.write_bytes(file.getvalue())
    return path


@pytest.fixture
def tensors(torch):
    return {
        "weight": Tensor(torch.FloatStorage, "0", 6, 0, (2, 3), (3, 1)),
        "turned": Tensor(torch.FloatStorage, "0", 6, 0, (3, 2), (1, 3)),
        "part": Tensor(torch.FloatStorage, "0", 6, 4, (2,), (1,)),
        "steps": Tensor(torch.LongStorage, "1", 1, 0, (), ()),
    }


def test_tensors_are_views_of_their_storages(tmp_path, tensors):
    found = read_pth(pth(tmp_path / "model.pth", tensors))
    np.testing.assert_array_equal(found["weight"], WEIGHT.reshape(2, 3))
    np.testing.assert_array_equal(found["turned"], WEIGHT.reshape(2, 3).T)
    np.testing.assert_array_equal(found["part"], [4, 5])
    assert found["steps"].shape == () and found["steps"] == 7 and found["weight"].dtype == np.float32


class Malicious:
    """What a pickle runs when it is loaded: here, a folder that should never come to be."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.mkdir, os.system, eval, exec, getattr, __import__], ids=lambda f: f.__name__)
def test_a_pickle_that_calls_anything_else_is_refused_before_the_call(tmp_path, tensors, call):
    evil = Malicious(call, str(tmp_path / "evil"))
    with pytest.raises(PthError, match=rf"expected a pickle of tensors, found '\w+\.{call.__name__}'"):
        read_pth(pth(tmp_path / "model.pth", tensors | {"evil": evil}))
    assert not (tmp_path / "evil").exists()


def test_a_malicious_first_pickle(tmp_path, torch):
    with pytest.raises(PthError, match="mkdir"):
        read_pth(pth(tmp_path / "model.pth", {}, magic=Malicious(os.mkdir, str(tmp_path / "evil"))))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "place",
    [
        (0, (2, 4), (4, 1)),  # more numbers than the storage has
        (0, (2, 3), (300, 1)),
        (5, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 3), (1,)),
        (0, (2**62, 2**62), (0, 0)),
        (0, (0,), (1,)),
        (0.0, (2,), (1,)),
    ],
    ids=str,
)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, torch, place):
    tensors = {"weight": Tensor(torch.FloatStorage, "0", 6, *place)}
    with pytest.raises(PthError):
        read_pth(pth(tmp_path / "model.pth", tensors, keys=["0"], storages=[WEIGHT]))


def test_what_is_no_state_dict(tmp_path, tensors):
    path = tmp_path / "model.pth"
    for data in (b"", b"PK\x03\x04 a zip file", b"<html>"):
        path.write_bytes(data)
        with pytest.raises(PthError):
            read_pth(path)
    for wrong in ({"magic": 5}, {"keys": ["0"]}, {"storages": [WEIGHT]}, {"storages": [WEIGHT[:3], STEPS]}):
        with pytest.raises(PthError):
            read_pth(pth(path, tensors, **wrong))
    with pytest.raises(PthError, match="expected tensors"):
        read_pth(pth(path, {"weight": 5}, keys=[], storages=[]))
