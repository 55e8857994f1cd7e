"""Pickled state dicts, without torch: what PyTorch writes, and pickles that want more than tensors."""

import io
import os
import pickle
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jlora.peft.pickled import MOST, state_dict
from tests.peft_files.pickles import FORMATS, Tensor, as_stream, as_zip, dumped, written

WEIGHT, STEPS = np.arange(6, dtype="<f4"), np.array([7], "<i8")
TENSORS = {
    "weight": Tensor("0", "FloatStorage", 6, 0, (2, 3), (3, 1)),
    "turned": Tensor("0", "FloatStorage", 6, 0, (3, 2), (1, 3), is_parameter=True),
    "part": Tensor("0", "FloatStorage", 6, 4, (2,), (1,)),
    "steps": Tensor("1", "LongStorage", 1, 0, (), ()),
}
STORAGES = {"0": WEIGHT, "1": STEPS}
both = pytest.mark.parametrize("format", FORMATS)


def read(tmp_path, data):
    (tmp_path / "model.pth").write_bytes(data)
    return state_dict(tmp_path / "model.pth")


def refused(tmp_path, data, match):
    with pytest.raises(ValueError, match=match) as error:
        read(tmp_path, data)
    assert error.type is ValueError and str(error.value).startswith(str(tmp_path / "model.pth"))
    assert len(str(error.value)) < 600


@both
def test_tensors_are_views_of_their_storages(tmp_path, format):
    found = read(tmp_path, FORMATS[format](TENSORS, STORAGES))
    np.testing.assert_array_equal(found["weight"], WEIGHT.reshape(2, 3))
    np.testing.assert_array_equal(found["turned"], WEIGHT.reshape(2, 3).T)
    np.testing.assert_array_equal(found["part"], [4, 5])
    assert found["steps"].shape == () and found["steps"] == 7 and found["weight"].dtype == np.float32
    assert not found["weight"].flags.writeable


@both
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_all_types_of_storages(tmp_path, format, dtype):
    arrays = {f"x{i}": np.arange(6).reshape(2, 3).astype(dtype) + i for i in range(4)}
    found = read(tmp_path, written(arrays, format))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_big_endian_archive(tmp_path):
    found = read(tmp_path, as_zip(TENSORS, {"0": WEIGHT.byteswap(), "1": STEPS.byteswap()}, byteorder=b"big"))
    np.testing.assert_array_equal(found["weight"], WEIGHT.reshape(2, 3))
    assert found["steps"] == 7
    refused(tmp_path, as_stream(TENSORS, STORAGES, little=False), "little-endian")


class Malicious:
    """What a pickle runs when it is loaded: here, a folder that should never come to be."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@both
@pytest.mark.parametrize("call", [os.mkdir, os.system, eval, exec, getattr, __import__], ids=lambda f: f.__name__)
def test_a_pickle_that_calls_anything_else_is_refused_before_the_call(tmp_path, format, call):
    evil = Malicious(call, str(tmp_path / "evil"))
    refused(tmp_path, FORMATS[format](TENSORS | {"evil": evil}, STORAGES), rf"asks for '\w+\.{call.__name__}'.*not run")
    assert not (tmp_path / "evil").exists()


def test_a_malicious_first_pickle(tmp_path):
    evil = Malicious(os.mkdir, str(tmp_path / "evil"))
    refused(tmp_path, as_stream({}, {}, magic=evil), "mkdir")
    assert not (tmp_path / "evil").exists()


@both
@pytest.mark.parametrize(
    "place",
    [
        (0, (2, 4), (4, 1)),  # more numbers than the storage has
        (0, (2, 3), (300, 1)),
        (0, (7,), (0,)),  # the same number again and again
        (5, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 3), (1,)),
        (0, (2**62, 2**62), (0, 0)),
        (0, (2**20, 2**20), (0, 0)),
        (0.0, (2,), (1,)),
        (0, [2], (1,)),
        (0, (1,) * 9, (1,) * 9),
    ],
    ids=str,
)
def test_tensors_outside_of_their_storage_are_refused(tmp_path, format, place):
    tensors = {"weight": Tensor("0", "FloatStorage", 6, *place)}
    refused(tmp_path, FORMATS[format](tensors, {"0": WEIGHT}), "tensor")


WRONG = {
    "empty": b"",
    "a zip of nothing": b"PK\x03\x04 a zip file",
    "a page": b"<html>",
    "no magic number": as_stream(TENSORS, STORAGES, magic=5),
    "a storage missing": as_stream(TENSORS, STORAGES, keys=["0"]),
    "a storage too short": as_stream(TENSORS, {"0": WEIGHT[:3], "1": STEPS}),
    "a list": as_zip([TENSORS["weight"]], STORAGES),
    "a number": as_zip({"weight": 5}, {}),
    "a name that is none": as_zip({5: TENSORS["weight"]}, STORAGES),
    "a record missing": as_zip(TENSORS, {"0": WEIGHT}),
    "a record too short": as_zip(TENSORS, {"0": WEIGHT[:5], "1": STEPS}),
    "a record too long": as_zip(TENSORS, {"0": np.tile(WEIGHT, 2), "1": STEPS}),
    "compressed": as_zip(TENSORS, STORAGES, zipfile.ZIP_DEFLATED),
    "no pickle": as_zip(TENSORS, STORAGES, root="a/b"),
    "two types of a storage": as_zip(
        {"a": TENSORS["weight"], "b": Tensor("0", "HalfStorage", 12, 0, (12,), (1,))}, STORAGES
    ),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_what_is_no_state_dict(tmp_path, data):
    refused(tmp_path, data, "is no state dict of tensors, as torch.save writes it: .")


def test_damaged_numbers_are_told(tmp_path):
    data = bytearray(as_zip(TENSORS, STORAGES))
    data[data.index(WEIGHT.tobytes()) + 5] ^= 1
    refused(tmp_path, bytes(data), "record 'archive/data/0' is damaged")


def archive(pickled, **storages):
    """A zip whose pickle is given as it is."""
    data = as_zip({}, storages)
    real = pickle.dumps({}, 2)
    assert dumped({}) == real
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


BOMBS = {
    "a memo far away": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a text of exabytes": b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "bytes of exabytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a frame of exabytes": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "nests": b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns.",
    "more than its stack": b"\x80\x02\x87.",
    "a mark that is none": b"\x80\x02t.",
    "no end": b"\x80\x02}",
    "an unknown memo": b"\x80\x02h\x05.",
    "an object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "a module's attribute": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "an extension": b"\x80\x02\x82\x01.",
    "many operations": b"\x80\x02" + b"N" * (MOST + 10) + b".",
}


@pytest.mark.parametrize("pickled", BOMBS.values(), ids=BOMBS)
def test_pickles_that_would_take_all_memory(tmp_path, pickled):
    (tmp_path / "model.pth").write_bytes(archive(pickled))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is no state dict of tensors"):
            state_dict(tmp_path / "model.pth")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_tensors_that_share_all_their_numbers_many_times_are_refused(tmp_path):
    weight = np.zeros(100_000, np.float32)
    tensors = {f"x{i}": Tensor("0", "FloatStorage", weight.size, 0, weight.shape, (1,)) for i in range(20)}
    refused(tmp_path, as_zip(tensors, {"0": weight}), "its tensors would have 8000000 bytes")
    assert len(read(tmp_path, as_zip(dict(list(tensors.items())[:3]), {"0": weight}))) == 3
