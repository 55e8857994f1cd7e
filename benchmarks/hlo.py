"""Reads the text of a compiled program (``compiled.as_text()``): its collectives, its products, how often each runs."""

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
    pieces: set[str] = set()
    found = []
    for times, name, made in _runs(program, entry):
        kind = made.op.removesuffix("-start")
        if kind in KINDS and not _is_later_piece(made, pieces):
            kind = "reduce-scatter" if name.startswith(SCATTERED) else kind
            found.append(Collective(kind, _arrays(made, kind), times, made.attribute(r'op_name="([^"]*)"') or ""))
    return found


def flops(text: str) -> int:
    """The floating-point operations of a program's products, with every round of its loops.

    ``compiled.cost_analysis()`` counts the body of a loop once, and elementwise operations too.
    """
    program, entry = computations(text)
    results: dict[str, dict[str, Array]] = {}
    total = 0
    for times, name, made in _runs(program, entry):
        if made.op in ("dot", "convolution"):
            if name not in results:
                results[name] = {one.name: arrays[0] for one in program[name] if (arrays := _read(one.result))}
            total += 2 * times * _products(made, results[name])
    return total


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


def _runs(
    program: Mapping[str, list[Instruction]], name: str, times: int = 1
) -> Iterator[tuple[int, str, Instruction]]:
    """Each instruction below a computation: how often it runs, the computation it stands in, and itself."""
    for made in program[name]:
        if made.op.endswith(("-done", "-update")):
            continue
        yield times, name, made
        if made.op == "while":
            body = list(_runs(program, made.attribute(r"body=%?([\w.\-]+)") or ""))
            rounds = _rounds(program, made) if any(_is_counted(one) for _, _, one in body) else 0
            yield from ((times * rounds * inner, inside, one) for inner, inside, one in body)
        else:
            for called in made.called:
                yield from _runs(program, called, times)


def _is_counted(made: Instruction) -> bool:
    return made.op in ("dot", "convolution") or made.op.removesuffix("-start") in KINDS


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
    if made.op in ("all-gather-start", "collective-permute-start") or made.result.startswith("(("):
        arrays = tuple(array for array in arrays if array != Array("u32", ()))  # the device's own flags
        return arrays[len(arrays) // 2 :]  # behind the operands
    return arrays


def _read(text: str) -> tuple[Array, ...]:
    return tuple(Array(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in ARRAY.findall(text))


def _rounds(program: Mapping[str, list[Instruction]], loop: Instruction) -> int:
    known = loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"')
    if known:
        return int(known)
    condition = loop.attribute(r"condition=%?([\w.\-]+)") or ""
    limits = {int(found) for _, _, made in _runs(program, condition) if (found := _limit(made))}
    if len(limits) != 1:
        raise ValueError(f"collectives: how often {loop.name} runs is not known: its condition has the limits {limits}")
    return limits.pop()


def _limit(made: Instruction) -> str | None:
    """The value of an integer constant other than zero."""
    is_integer = made.op == "constant" and re.match(r"[su]\d+\[\]", made.result)
    found = re.match(r"(\d+)\)", made.rest) if is_integer else None
    return found[1] if found and found[1] != "0" else None


def _products(made: Instruction, results: Mapping[str, Array]) -> int:
    """The multiplications of a product of two arrays."""
    (out,) = _read(made.result)
    left, right = (results[name] for name in re.findall(r"%?([\w.\-]+)", made.rest.split(")")[0])[:2])
    if made.op == "dot":
        over = made.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return math.prod(out.shape) * math.prod(left.shape[int(axis)] for axis in over.split(",") if axis)
    ls, rs, _ = re.split(r"_|->", made.attribute(r"dim_labels=(\w+->\w+)") or "")
    lhs, rhs = dict(zip(ls, left.shape, strict=True)), dict(zip(rs, right.shape, strict=True))
    results_of = dict(zip(made.rest.split("->")[1], out.shape, strict=False))
    groups = int(made.attribute(r"batch_group_count=(\d+)") or 1)
    hits = math.prod(_hits(lhs[axis], results_of[axis], _window(made, int(axis))) for axis in rs if axis.isdigit())
    return lhs["b"] // groups * rhs["i"] * rhs["o"] * hits


def _window(made: Instruction, axis: int) -> dict[str, int]:
    """The size, stride, padding before and dilations of a convolution's window on one axis."""
    fields = dict(part.split("=") for part in (made.attribute(r"window=\{([^}]*)\}") or "").split())
    at = {name: values.split("x")[axis] for name, values in fields.items()}
    window = {"stride": 1, "lhs_dilate": 1, "rhs_dilate": 1}
    return window | {name: int(value.split("_")[0]) for name, value in at.items()}


def _hits(size: int, out: int, window: Mapping[str, int]) -> int:
    """How many pairs of a place of the result and one of the window meet an element, neither padding nor a hole."""
    places = (
        place * window["stride"] + step * window["rhs_dilate"] - window.get("pad", 0)
        for place in range(out)
        for step in range(window["size"])
    )
    end = (size - 1) * window["lhs_dilate"]
    return sum(0 <= at <= end and at % window["lhs_dilate"] == 0 for at in places)


def totals(found: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """How many arrays each kind moves in one run of the program, and their bytes."""
    counts, sizes = Counter(), Counter()
    for collective in found:
        counts[collective.kind] += collective.times * len(collective.arrays)
        sizes[collective.kind] += collective.bytes
    return {kind: (counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


Moves = Counter[tuple[str, tuple[int, ...]]]


def moves(found: Iterable[Collective]) -> Moves:
    """How often arrays are moved, by the kind of collective and the sizes of their axes."""
    moved: Moves = Counter()
    for collective in found:
        for array in collective.arrays:
            moved[collective.kind, array.dims] += collective.times
    return moved
