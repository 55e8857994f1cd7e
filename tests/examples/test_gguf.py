"""Tests of the GGUF reader on small files written here: round trips, the blocks' arithmetic, damage of every kind."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlora.examples.gguf import GgufError, read_gguf

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def typed(kind: int, value) -> bytes:
    if kind == 9:
        of, values = value
        return struct.pack("<IQ", of, len(values)) + b"".join(typed(of, x) for x in values)
    return text(value) if kind == 8 else struct.pack(f"<{NUMBERS[kind]}", value)


def gguf(metadata=(), tensors=(), version=3, alignment=32) -> bytes:
    """The bytes of a file; `metadata` are (name, type, value), `tensors` are (name, shape, kind, bytes)."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for name, kind, value in metadata:
        header += text(name) + struct.pack("<I", kind) + typed(kind, value)
    body = b""
    for name, shape, kind, data in tensors:
        body += bytes(-len(body) % alignment)
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", kind, len(body))
        body += data
    return header + bytes(-len(header) % alignment) + body if tensors else header


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"

    def read(data: bytes):
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return read_gguf(path)

    return read


def q8_0(scale, values) -> bytes:
    return struct.pack("<e32b", scale, *values)


def q4_1(scale, low, values) -> bytes:
    """Number i is in the low half of byte i, number i + 16 in its high half."""
    return struct.pack("<ee16B", scale, low, *(values[i] | values[i + 16] << 4 for i in range(16)))


RNG = np.random.default_rng(0)
SIXTEEN = RNG.normal(size=(3, 5)).astype(np.float16)
NIBBLES, BYTES = RNG.integers(0, 16, 64).tolist(), RNG.integers(-128, 128, 64).tolist()
FILE = gguf(
    [
        ("name", 8, "tiny, à la carte"),
        ("count", 4, 7),
        ("flags", 9, (7, [True, False])),
        ("words", 9, (8, ["a", "", "ü"])),
        ("none", 9, (6, [])),
    ],
    [
        ("ones", (2, 3), F32, np.arange(6, dtype="<f4").tobytes()),
        ("half", (3, 5), F16, SIXTEEN.tobytes()),
        ("bytes", (2, 32), Q8_0, q8_0(0.5, BYTES[:32]) + q8_0(-2.0, BYTES[32:])),
        ("nibbles", (1, 64), Q4_1, q4_1(0.25, -1.0, NIBBLES[:32]) + q4_1(3.0, 0.5, NIBBLES[32:])),
    ],
)


def test_a_file_round_trips(read):
    file = read(FILE)
    assert file.metadata == {
        "name": "tiny, à la carte",
        "count": 7,
        "flags": [True, False],
        "words": ["a", "", "ü"],
        "none": [],
    }
    found = {name: tensor.dequantise() for name, tensor in file.tensors.items()}
    assert all(values.dtype == np.float32 for values in found.values())
    assert [tensor.kind for tensor in file.tensors.values()] == ["F32", "F16", "Q8_0", "Q4_1"]
    np.testing.assert_array_equal(found["ones"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(found["half"], SIXTEEN)
    by_hand = [[0.5 * value for value in BYTES[:32]], [-2.0 * value for value in BYTES[32:]]]
    np.testing.assert_array_equal(found["bytes"], by_hand)
    by_hand = [0.25 * value - 1.0 for value in NIBBLES[:32]] + [3.0 * value + 0.5 for value in NIBBLES[32:]]
    np.testing.assert_array_equal(found["nibbles"], [by_hand])


VALUES = {
    0: st.integers(0, 255),
    1: st.integers(-128, 127),
    2: st.integers(0, 2**16 - 1),
    3: st.integers(-(2**15), 2**15 - 1),
    4: st.integers(0, 2**32 - 1),
    5: st.integers(-(2**31), 2**31 - 1),
    6: st.floats(width=32, allow_nan=False),
    7: st.booleans(),
    8: st.text(),
    10: st.integers(0, 2**64 - 1),
    11: st.integers(-(2**63), 2**63 - 1),
    12: st.floats(allow_nan=False),
}
SCALARS = st.sampled_from(list(VALUES)).flatmap(lambda kind: st.tuples(st.just(kind), VALUES[kind]))
ARRAYS = st.sampled_from(list(VALUES)).flatmap(
    lambda kind: st.tuples(st.just(9), st.tuples(st.just(kind), st.lists(VALUES[kind])))
)


NAMES = st.text().filter(lambda name: name != "general.alignment")


@given(st.dictionaries(NAMES, SCALARS | ARRAYS))
def test_metadata_of_every_type(read, entries):
    file = read(gguf([(name, kind, value) for name, (kind, value) in entries.items()]))
    assert file.metadata == {name: value[1] if kind == 9 else value for name, (kind, value) in entries.items()}


@given(st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), max_size=4), st.sampled_from([8, 32, 64]))
def test_tensors_of_every_shape(read, shapes, alignment):
    arrays = {str(i): np.arange(np.prod(shape), dtype="<f4").reshape(shape) for i, shape in enumerate(shapes)}
    tensors = [(name, array.shape, F32, array.tobytes()) for name, array in arrays.items()]
    file = read(gguf([("general.alignment", 4, alignment)], tensors, alignment=alignment))
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.tensors[name].dequantise(), array, strict=True)


@given(st.integers(0, len(FILE) - 1))
def test_a_truncated_file(read, size):
    with pytest.raises(GgufError, match=r"toy\.gguf.*: expected .*, found"):
        read(FILE[:size])


@given(st.integers(0, len(FILE) - 1), st.binary(min_size=1, max_size=8))
def test_a_mangled_file_is_read_or_refused_but_never_trusted(read, at, junk):
    try:
        file = read(FILE[:at] + junk + FILE[at + len(junk) :])
    except GgufError as error:
        assert "expected" in str(error)
    else:
        with np.errstate(all="ignore"):  # a scale may now be no number
            assert all(tensor.dequantise().shape == tensor.shape for tensor in file.tensors.values())


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "expected a GGUF file, found an empty one"),
        (b"PK\x03\x04 a zip file instead of that", r"expected the letters GGUF, found b'PK\\x03\\x04'"),
        (gguf(version=1), "expected version 2 or 3, little-endian, found 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian, found 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "expected 8 more bytes, found '0 to the end of the file'"),
        (gguf([("a", 4, 1), ("a", 4, 2)]), "expected each name once, found 'a'"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 13), "from 0 to 12, found 13"),
        (gguf([("a", 9, (9, [(4, [1])]))]), "an array of numbers or strings, found 'type 9'"),
        (gguf([("a", 9, (4, []))])[:-8] + struct.pack("<Q", 2**62), "expected 18,446,744,073,709,551,616 more bytes"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2) + b"\xff\xfe", "expected UTF-8, found"),
        (gguf([("general.alignment", 4, 24)]), "a power of two as general.alignment, found 24"),
        (gguf([], [("w", (256,), 12, b"")]), "expected w of kind F32 or F16 or Q4_1 or Q8_0, found 'number 12'"),
        (gguf([], [("w", (2, 16), Q8_0, b"")]), r"expected w in rows of blocks of 32, found \(2, 16\)"),
        (gguf([], [("w", (1,) * 5, F32, b"1234")]), "expected at most 4 axes, found 5"),
        (gguf([], [("w", (2**40, 2**40), F32, b"")]), "expected 4,835,703,278,458,516,698,824,704 more bytes"),
    ],
)
def test_what_is_wrong_is_said(read, data, message):
    with pytest.raises(ValueError, match=message):
        read(data)


def test_an_offset_between_two_multiples_of_the_alignment(read):
    data = gguf([], [("w", (1,), F32, b"1234")], alignment=32)
    offset = data.index(text("w")) + len(text("w")) + 4 + 8 + 4
    with pytest.raises(GgufError, match="expected w at a multiple of 32, found 4"):
        read(data[:offset] + struct.pack("<Q", 4) + data[offset + 8 :])
