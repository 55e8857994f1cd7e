"""Reads the collectives of a compiled program, and how often each runs, from its text (``compiled.as_text()``)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
SCATTERED = "all-reduce-scatter"  # a TPU's fusion of an all-reduce and the slice that each chip keeps
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type and the shape of one array of a collective, as one device sees it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * max(int(bits[0]) if bits else 8, 8) // 8

    @property
    def dims(self) -> tuple[int, ...]:
        """The sizes of the axes, smallest first, without those of size 1: layouts and reshapes change nothing."""
        return tuple(sorted(n for n in self.shape if n != 1))


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program; one that the compiler has made of several has several arrays.

    Args:
      kind: one of `KINDS`.
      arrays: what comes out on a device; of a reduce-scatter, what goes in.
      times: how often it runs in one run of the program.
      op_name: the path of the operation that it comes from.
    """

    kind: str
    arrays: tuple[Array, ...]
    times: int
    op_name: str

    @property
    def bytes(self) -> int:
        """Of all its runs."""
        return self.times * sum(array.bytes for array in self.arrays)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    result: str
    op: str
    rest: str  # operands and attributes

    @property
    def called(self) -> list[str]:
        return [name.strip(" %") for group in CALLED.findall(self.rest) for name in group.strip("{}").split(",")]

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, in the order of the text of each computation, those of called ones in place.

    One that runs in pieces (a start and its end, a TPU's fusions that overlap it with other work) counts once. Those in
    the body of a loop run as often as it does: the compiler says how often, or the constant in its condition.

    Raises:
      ValueError: if the text has no entry computation, or a loop with a collective has no known number of rounds.
    """
    program, entry = computations(text)
    return list(_walk(program, entry, 1, set()))


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the entry."""
    program: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            current = program[found[2]] = []
            entry = found[2] if found[1] else entry
        elif found := INSTRUCTION.match(line):
            current.append(Instruction(*found.groups()))
    if not entry:
        raise ValueError("collectives: expected the text of a compiled program, found no ENTRY computation")
    return program, entry


def _walk(program: Mapping[str, list[Instruction]], name: str, times: int, pieces: set[str]) -> Iterator[Collective]:
    for made in program[name]:
        if made.op.endswith(("-done", "-update")):
            continue
        if (kind := made.op.removesuffix("-start")) in KINDS:
            if not _is_later_piece(made, pieces):
                kind = "reduce-scatter" if name.startswith(SCATTERED) else kind
                yield Collective(kind, _arrays(made, kind), times, made.attribute(r'op_name="([^"]*)"') or "")
        elif made.op == "while":
            inside = list(_walk(program, made.attribute(r"body=%?([\w.\-]+)") or "", 1, pieces))
            rounds = _rounds(program, made) if inside else 0
            yield from (dataclasses.replace(c, times=times * rounds * c.times) for c in inside)
        else:
            for called in made.called:
                yield from _walk(program, called, times, pieces)


def _is_later_piece(made: Instruction, pieces: set[str]) -> bool:
    """Whether a TPU's overlapped collective was seen already: its pieces have one channel."""
    channel = made.attribute(r"channel_id=(\d+)") if "async_collective_fusion_config" in made.rest else None
    if channel is None:
        return False
    seen = channel in pieces
    pieces.add(channel)
    return seen


def _arrays(made: Instruction, kind: str) -> tuple[Array, ...]:
    arrays = _read(made.result)
    if kind == "reduce-scatter" and made.op != "all-reduce":
        return _read(made.rest.split("), ")[0]) or arrays
    if made.op in ("all-gather-start", "collective-permute-start"):  # operands, results, then the device's own flags
        arrays = tuple(array for array in arrays if array.shape)
        return arrays[len(arrays) // 2 :]
    return arrays


def _read(text: str) -> tuple[Array, ...]:
    return tuple(Array(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in ARRAY.findall(text))


def _rounds(program: Mapping[str, list[Instruction]], loop: Instruction) -> int:
    known = loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = loop.attribute(r"condition=%?([\w.\-]+)") or ""
    limits = {int(found) for made in _below(program, condition) if (found := _limit(made))}
    if len(limits) != 1:
        raise ValueError(f"collectives: how often {loop.name} runs is not known: its condition has the limits {limits}")
    return limits.pop()


def _below(program: Mapping[str, list[Instruction]], name: str) -> Iterator[Instruction]:
    for made in program[name]:
        yield made
        for called in made.called:
            yield from _below(program, called)


def _limit(made: Instruction) -> str | None:
    """The value of an integer constant other than zero."""
    is_integer = made.op == "constant" and re.match(r"[su]\d+\[\]", made.result)
    found = re.match(r"(\d+)\)", made.rest) if is_integer else None
    return found[1] if found and found[1] != "0" else None


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """How many arrays each kind moves in one run of the program, and their bytes."""
    counts, sizes = Counter(), Counter()
    for collective in found:
        counts[collective.kind] += collective.times * len(collective.arrays)
        sizes[collective.kind] += collective.bytes
    return {kind: (counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def moves(found: Iterable[Collective]) -> Counter[tuple[str, tuple[int, ...]]]:
    """How often an array of each kind and size of axes is moved."""
    moved: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for collective in found:
        for array in collective.arrays:
            moved[collective.kind, array.dims] += collective.times
    return moved
