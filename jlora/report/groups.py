"""Things that are alike but for numbers in their names: ``layer_{0..11}/query/kernel`` stands for twelve."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence

NUMBER = re.compile(r"(?<![0-9])([0-9]{1,9})(?![0-9])")
MAX_RUNS = 5

Name = tuple[str | tuple[str, ...], ...]  # text and numbers by turns, of each number all that it stands for


def name_of(text: str) -> Name:
    """A name as text and numbers by turns."""
    return tuple((piece,) if place % 2 else piece for place, piece in enumerate(NUMBER.split(text)))


def joined(outer: Name, inner: Name) -> Name:
    """The name of something within a module, after the module's."""
    return (*outer[:-1], f"{outer[-1]}/{inner[0]}", *inner[1:])


def grouped(named: Iterable[tuple[Name, int, Hashable]]) -> list[tuple[Name, int, Hashable]]:
    """Makes one of those that have the same value and differ in one number, then in another; adds up their counts.

    Args:
      named: the name, the count and the value of each.

    Example:
      >>> rows = [(name_of(f"layer_{i}/kernel"), 1, "lora") for i in range(12)]
      >>> [(name, count, value)] = grouped(rows)
      >>> title(name), count, value
      ('layer_{0..11}/kernel', 12, 'lora')
    """
    found = list(named)
    for place in range(1, max((len(name) for name, *_ in found), default=0), 2):
        alike: dict[Hashable, list[tuple[Name, int, Hashable]]] = {}
        for name, count, value in found:
            rest = (*name[:place], None, *name[place + 1 :]) if place < len(name) else name
            alike.setdefault((rest, count, value), []).append((name, count, value))
        found = [_one(place, group) for group in alike.values()]
    return found


def _one(place: int, group: Sequence[tuple[Name, int, Hashable]]) -> tuple[Name, int, Hashable]:
    name, _, value = group[0]
    if place < len(name):
        numbers = sorted({number for other, *_ in group for number in other[place]}, key=lambda n: (int(n), n))
        name = (*name[:place], tuple(numbers), *name[place + 1 :])
    return name, sum(count for _, count, _ in group), value


def title(name: Name) -> str:
    """The name as text."""
    return "".join(piece if isinstance(piece, str) else _numbers(piece) for piece in name)


def some_of(numbers: Iterable[int]) -> str:
    """Numbers as text: runs of them, not each."""
    return _numbers(tuple(map(str, sorted(numbers))))


def _numbers(numbers: tuple[str, ...]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [text for run in runs for text in ([f"{run[0]}..{run[-1]}"] if len(run) > 2 else run)]
    if len(texts) > MAX_RUNS:
        texts = [*texts[: MAX_RUNS - 2], "…", texts[-1]]
    return f"{{{','.join(texts)}}}"
