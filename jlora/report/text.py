"""Tables as text of at most eighty columns."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence

WIDTH = 80
MAX_ROWS = 200
INDENT = "    "


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header, and lines that sum them up.

    Text shortens the middle of what does not fit on a line, and makes one row of those that are alike but for numbers
    in their paths; `rows` has all of each.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: tuple[str, ...]

    def __str__(self) -> str:
        return as_text(*self._text(), self.footer)

    __repr__ = __str__

    def _text(self) -> tuple[Sequence[Sequence[str]], Sequence[str]]:
        """The rows as text has them, the header first, and for each what is said below it."""
        return [self.header, *self.rows], [""] * (1 + len(self.rows))


def as_text(rows: Sequence[Sequence[str]], notes: Sequence[str], footer: Sequence[str] = ()) -> str:
    """Rows, the header first, with what is said below each, and the lines below all; nothing for a header alone."""
    shown = [*lines(_columns_that_tell(rows[: MAX_ROWS + 1]), notes[: MAX_ROWS + 1])] if len(rows) > 1 else []
    left = len(rows) - 1 - MAX_ROWS
    more = [f"... {left} more {'row' if left == 1 else 'rows'}"] if left > 0 else []
    return "\n".join([*shown, *more, *(line for total in footer for line in textwrap.wrap(total, WIDTH))])


def _columns_that_tell(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Without the columns after the path that are empty below the header."""
    told = [place == 0 or any(cells) for place, cells in enumerate(zip(*rows[1:], strict=True))]
    return [tuple(itertools.compress(row, told)) for row in rows]


def with_counts(header: Sequence[str], rows: Sequence[Sequence[str]], counts: Sequence[int]) -> list[Sequence[str]]:
    """A header and rows, with how many each row stands for beside its path where it is not one for all."""
    if all(count == 1 for count in counts):
        return [header, *rows]
    cells = ["count", *(f"{count}x" if count > 1 else "" for count in counts)]
    return [(row[0], cell, *row[1:]) for row, cell in zip([header, *rows], cells, strict=True)]


def lines(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> Iterator[str]:
    """Aligned columns of rows whose first cell is a path; one that is too long or not clear has a line of its own."""
    rows = [tuple(map(printable, row)) for row in rows]
    limits = _limits([max(map(columns, column)) for column in zip(*rows, strict=True)])
    paths = [short_path(row[0], limits[0]) for row in rows]
    meant = collections.Counter(path for path, _ in {*zip(paths, (row[0] for row in rows), strict=True)})
    for path, row, note in zip(paths, rows, notes, strict=True):
        if columns(path) > limits[0] or (meant[path] > 1 and path != row[0]):
            yield from _cut(row[0], WIDTH)
            path = ""
        cells = [path, *(shortened(cell, limit) for cell, limit in zip(row[1:], limits[1:], strict=True))]
        yield "  ".join(
            cell + " " * (limit - columns(cell)) for cell, limit in zip(cells, limits, strict=True)
        ).rstrip()
        yield from textwrap.wrap(printable(note), WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)


def _limits(widths: list[int]) -> list[int]:
    """What each column may take: the widest give way."""
    room = WIDTH - 2 * (len(widths) - 1)
    for limit in range(WIDTH, 0, -1):
        if sum(min(width, limit) for width in widths) <= room:
            break
    limits = [min(width, limit) for width in widths]
    limits[0] += min(room - sum(limits), widths[0] - limits[0])
    return limits


def short_path(path: str, limit: int) -> str:
    """A path without modules in its middle, if its first name and its last two fit; if not, as it is."""
    names = path.split("/")
    head, tail = names[:1], names[-2:]
    fits = lambda head, tail: columns("/".join([*head, "…", *tail])) <= limit
    if columns(path) <= limit or len(names) < 4 or not fits(head, tail):
        return path
    while fits(head, longer := names[-len(tail) - 1 :]):
        tail = longer
    while fits(longer := names[: len(head) + 1], tail):
        head = longer
    return "/".join([*head, "…", *tail])


def shortened(text: str, limit: int) -> str:
    """A text, or its two ends."""
    if columns(text) <= limit:
        return text
    start, end = text[:limit], text[-limit:]
    while columns(start) > limit // 2:
        start = start[:-1]
    while columns(end) > (limit - 1) // 2:
        end = end[1:]
    return f"{start}…{end}"


def printable(text: str) -> str:
    """A text on one line: breaks, marks of direction and the like are spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def columns(text: str) -> int:
    """The columns that a text takes on a terminal."""
    wide = lambda c: 1 + (unicodedata.east_asian_width(c) in ("W", "F"))
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else wide(c) for c in text)


def _cut(text: str, width: int) -> Iterator[str]:
    line = ""
    for c in text:
        if columns(line + c) > width:
            yield line
            line = ""
        line += c
    yield line
