"""A reader of GGUF, the file format of llama.cpp: metadata and tensors, every length checked against the file's.

The file is mapped into memory, so that opening it costs its header and a tensor is read when it is asked for. Of the
kinds of tensors, those of the example's model are known: F32, F16, Q8_0 and Q4_1.

Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9
# The parts of a block and how many numbers a block holds, by the kind's number in the file.
KINDS = {
    0: ("F32", [("values", "<f4")], 1),
    1: ("F16", [("values", "<f2")], 1),
    3: ("Q4_1", [("scale", "<f2"), ("low", "<f2"), ("nibbles", "u1", 16)], 32),
    8: ("Q8_0", [("scale", "<f2"), ("values", "i1", 32)], 32),
}


class GgufError(ValueError):
    """A file that is no sound GGUF file; the message says what was expected, where, and what was found."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in the file: its kind, its shape in NumPy's order (last axis contiguous) and its mapped blocks."""

    kind: str
    shape: tuple[int, ...]
    blocks: np.ndarray

    def dequantise(self) -> np.ndarray:
        """Returns the numbers in float32, of the tensor's shape."""
        blocks = self.blocks
        if self.kind == "Q8_0":
            values = blocks["values"] * blocks["scale"].astype(np.float32)[:, None]
        elif self.kind == "Q4_1":
            nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)
            values = nibbles * blocks["scale"].astype(np.float32)[:, None] + blocks["low"].astype(np.float32)[:, None]
        else:
            values = blocks["values"].astype(np.float32)
        return values.reshape(self.shape)


@dataclass(frozen=True)
class Gguf:
    """What a file holds: metadata (numbers, strings and lists of them) and tensors, by their names."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: Path) -> Gguf:
    """Returns the metadata and the tensors of a file; the tensors' numbers stay on disk until they are asked for.

    Raises:
      GgufError: if the file is truncated or is not what the format says.
    """
    if not path.stat().st_size:
        raise GgufError(f"{path.name}: expected a GGUF file, found an empty one")
    cursor = _Cursor(path.name, np.memmap(path, np.uint8, "r").view(np.ndarray))  # whose slices cost less
    cursor.expect(cursor.take(4).tobytes() == b"GGUF", "the letters GGUF", cursor.data[:4].tobytes())
    version = cursor.number("<u4")
    cursor.expect(version in (2, 3), "version 2 or 3, little-endian", version)
    tensors, entries = cursor.number("<u8"), cursor.number("<u8")
    metadata = cursor.named(entries, lambda: cursor.value(cursor.number("<u4")))
    infos = cursor.named(tensors, cursor.tensor_info)
    alignment = metadata.get("general.alignment", 32)
    is_power = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
    cursor.expect(is_power, "a power of two as general.alignment", alignment)
    start = -(-cursor.at // alignment) * alignment
    return Gguf(metadata, {name: cursor.tensor(name, start, alignment, *info) for name, info in infos.items()})


class _Cursor:
    """Reads a file from its start, and complains with the place."""

    def __init__(self, name: str, data: np.ndarray):
        self.name, self.data, self.at = name, data, 0

    def expect(self, condition: bool, expected: str, found: Any) -> None:
        if not condition:
            raise GgufError(f"{self.name}, at byte {self.at:,}: expected {expected}, found {found!r}")

    def take(self, size: int) -> np.ndarray:
        left = max(0, len(self.data) - self.at)
        self.expect(self.at + size <= len(self.data), f"{size:,} more bytes", f"{left:,} to the end of the file")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, dtype: str) -> Any:
        return self.take(np.dtype(dtype).itemsize).view(dtype)[0].item()

    def string(self) -> str:
        data = self.take(self.number("<u8")).tobytes()
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise GgufError(f"{self.name}, at byte {self.at:,}: expected UTF-8, found {data[:40]!r}") from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == BOOL:
            return bool(self.number("u1"))
        if kind == ARRAY:
            return self.array(self.number("<u4"), self.number("<u8"))
        self.expect(kind in NUMBERS, "a type of value from 0 to 12", kind)
        return self.number(NUMBERS[kind])

    def array(self, kind: int, count: int) -> list:
        self.expect(kind in {*NUMBERS, BOOL, STRING}, "an array of numbers or strings", f"type {kind}")
        if kind in NUMBERS:
            return self.take(count * np.dtype(NUMBERS[kind]).itemsize).view(NUMBERS[kind]).tolist()
        return [self.value(kind) for _ in range(count)]

    def named(self, count: int, read: Any) -> dict[str, Any]:
        found = {}
        for _ in range(count):
            name = self.string()
            self.expect(name not in found, "each name once", name)
            found[name] = read()
        return found

    def tensor_info(self) -> tuple[tuple[int, ...], int, int]:
        axes = self.number("<u4")
        self.expect(axes <= 4, "at most 4 axes", axes)
        shape = tuple(self.number("<u8") for _ in range(axes))[::-1]  # the file has the contiguous axis first
        return shape, self.number("<u4"), self.number("<u8")

    def tensor(self, name: str, start: int, alignment: int, shape: tuple, kind: int, offset: int) -> Tensor:
        self.expect(kind in KINDS, f"{name} of kind {' or '.join(k[0] for k in KINDS.values())}", f"number {kind}")
        word, fields, length = KINDS[kind]
        self.expect((shape or (1,))[-1] % length == 0, f"{name} in rows of blocks of {length}", shape)
        self.expect(offset % alignment == 0, f"{name} at a multiple of {alignment}", offset)
        block, self.at = np.dtype(fields), start + offset
        data = self.take(math.prod(shape) // length * block.itemsize)
        return Tensor(word, shape, data.view(block))
