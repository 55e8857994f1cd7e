"""Tables as text of at most eighty columns."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence

WIDTH = 80
MAX_ROWS = 200


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a header, and lines that sum them up. What does not fit on a line of text is whole in `rows`."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: tuple[str, ...]

    def __str__(self) -> str:
        header, rows, notes = self._text()
        lines = fitted([header, *rows[:MAX_ROWS]])
        below = [_wrapped(note, "    ") for note in ("", *notes[:MAX_ROWS])]
        body = [line for row, note in zip(lines, below, strict=True) for line in (row, *note)]
        left = len(self.rows) - MAX_ROWS
        more = [f"... {left} more rows"] if left > 0 else []
        return "\n".join([*body, *more, *(line for total in self.footer for line in _wrapped(total))])

    __repr__ = __str__

    def _text(self) -> tuple[tuple[str, ...], Sequence[tuple[str, ...]], Sequence[str]]:
        """Header and rows as text has them, and what it says below each row."""
        return self.header, self.rows, [""] * len(self.rows)


def fitted(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns; the widest columns give way, and the middles of their cells."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for _ in range(sum(widths) + 2 * (len(widths) - 1) - WIDTH):
        widths[widths.index(max(widths))] -= 1
    cut = lambda row: (shortened(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True))
    return ["  ".join(cut(row)).rstrip() for row in rows]


def shortened(text: str, width: int) -> str:
    """The text, or its two ends."""
    end = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent or "  ")
