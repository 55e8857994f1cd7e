"""A model's leaves as HTML that folds: no script, nothing from outside, on light and on dark pages.

Every text is escaped; every class stands within `jlora-view`, so that the page around it stays as it is.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jlora.report.groups import Name, grouped, joined, name_of, title
from jlora.report.style import STYLE
from jlora.report.text import printable
from jlora.report.totals import Totals, in_bytes, short

OPEN = 40  # what is marked lies open as far as so many lines are seen
MAX_DEPTH = 12
MAX_ROWS = 1000
DENSE = ("dense", "dense")  # a mark and its word: never folded away


class Row(NamedTuple):
    """A leaf, or a use of one.

    Args:
      mark: of the styles: adapted, full, factored, dense, or nothing.
      word: what the mark says.
      facts: shape, type and the like.
      trained, parameters: how many numbers train, and are there.
      why: of a dense use.
      source: the file and line of a use.
    """

    mark: str
    word: str
    facts: tuple[str, ...]
    trained: int = 0
    parameters: int = 0
    why: str = ""
    source: str = ""


class Gauge(NamedTuple):
    """A bar with its parts, as pairs of a mark and a number, and what is said beside it."""

    name: str
    parts: Sequence[tuple[str, float]]
    strong: str
    told: str


class Branch(NamedTuple):
    """What is below a name: the rows of a leaf, or modules and leaves, each with its name and how many are alike."""

    rows: tuple[Row, ...]
    children: tuple[tuple[Name, int, Branch], ...]

    def sums(self) -> tuple[int, int]:
        """How many numbers train, and are there."""
        inner = [(count, *child.sums()) for _, count, child in self.children]
        own = [(1, row.trained, row.parameters) for row in self.rows]
        return tuple(sum(part[0] * part[i] for part in (*own, *inner)) for i in (1, 2))  # type: ignore[return-value]

    def marks(self) -> dict[tuple[str, str], None]:
        """The marks below, with their words, in order."""
        inner = {mark: None for *_, child in self.children for mark in child.marks()}
        return {(row.mark, row.word): None for row in self.rows if row.mark} | inner

    def lines(self, depth: int) -> int:
        """How many lines are seen where what is marked lies open to a depth."""
        below = (child for *_, child in self.children if depth and child.marks())
        return len(self.rows) + len(self.children) + sum(child.lines(depth - 1) for child in below)


def trained_gauges(sums: Totals) -> list[Gauge]:
    """How much of a tree trains."""
    frozen, rest = sums.parameters - sums.trained, sums.all_bytes - sums.trained_bytes
    part = 100 * sums.trained_bytes / max(sums.all_bytes, 1)
    count = f"{sums.trained:,} of {short(sums.parameters)} train"
    size = f"{in_bytes(sums.trained_bytes)} of {in_bytes(sums.all_bytes)}"
    told = f"{size}; {sums.bases}" if sums.quantised else size
    return [
        Gauge("parameters", [("adapted", sums.trained), ("plain", frozen)], f"{sums.percent:.2f}%", count),
        Gauge("bytes", [("adapted", sums.trained_bytes), ("plain", rest)], f"{part:.2f}%", told),
    ]


def page(rows: Iterable[tuple[str, Row]], gauges: Sequence[Gauge]) -> str:
    """The HTML of a tree.

    Args:
      rows: paths and what is said of each; several rows of one path are uses of it.
      gauges: what stands above.
    """
    tree = _tree([(path.split("/"), row) for path, row in rows], 0)
    depth = next(depth for depth in range(MAX_DEPTH, -1, -1) if depth == 0 or tree.lines(depth) <= OPEN)
    drawn = "".join(_level(tree, depth, iter(range(MAX_ROWS))))
    return f"<div class=jlora-view>{STYLE}<div class=head>{''.join(map(_gauge, gauges))}</div>{drawn}</div>"


def _tree(rows: Sequence[tuple[Sequence[str], Row]], depth: int) -> Branch:
    """Modules that hold one thing share a line with it; modules that hold the same are one."""
    inside: dict[str, list[tuple[Sequence[str], Row]]] = {}
    for names, row in rows:
        if len(names) > depth:
            inside.setdefault(names[depth], []).append((names, row))
    own = tuple(row for names, row in rows if len(names) == depth)
    named = [_short(name_of(name), _tree(part, depth + 1)) for name, part in inside.items()]
    return Branch(own, tuple(grouped(named)))  # type: ignore[arg-type]


def _short(name: Name, branch: Branch) -> tuple[Name, int, Branch]:
    if branch.rows or len(branch.children) != 1:
        return name, 1, branch
    inner, count, child = branch.children[0]
    return joined(name, inner), count, child


def _level(branch: Branch, depth: int, room: Iterator[int]) -> Iterator[str]:
    for place, (name, count, child) in enumerate(branch.children):
        if next(room, None) is None:
            yield f"<div class=each>and {len(branch.children) - place} more, which are not shown</div>"
            return
        yield from _line(name, count, child, depth, room)


def _line(name: Name, count: int, child: Branch, depth: int, room: Iterator[int]) -> Iterator[str]:
    head = f"<b>{_text(title(name))}</b>" + (f" <span class=count>{count}&times;</span>" if count > 1 else "")
    shares = _share(*(count * n for n in child.sums()))
    if not child.children:
        yield _leaf(head, child.rows, shares)
        return
    marks = child.marks()
    words = "".join(f" <i class={mark}>{_text(word)}</i>" for mark, word in marks)
    opened = " open" if marks and (depth or DENSE in marks) else ""
    frozen = "" if marks else " class=frozen"
    yield f"<details{opened}{frozen}><summary><span>{head}{words}</span> {shares}</summary>"
    yield f"<div class=each>each of the {count}:</div>" if count > 1 else ""
    yield from (_leaf("", child.rows, ""),) if child.rows else ()
    yield from _level(child, max(depth - 1, 0), room)
    yield "</details>"


def _leaf(head: str, rows: Sequence[Row], shares: str) -> str:
    frozen = "" if any(row.mark for row in rows) else " frozen"
    told = "".join(f"<div class=told>{_told(head if i == 0 else '', row)}</div>" for i, row in enumerate(rows))
    return f'<div class="leaf{frozen}"><div>{told}</div> {shares}</div>'


def _told(head: str, row: Row) -> str:
    mark = f" <i class={row.mark}>{_text(row.word)}</i>" if row.mark else f" <span>{_text(row.word)}</span>"
    facts = " · ".join(map(_text, row.facts))
    source = f' title="{_text(row.source)}"' if row.source else ""
    why = f" <em>{_text(row.why)}</em>" if row.why else ""
    return f"{head}{mark} <span{source}>{facts}</span>{why}"


def _share(trained: int, parameters: int) -> str:
    if not parameters:
        return ""
    if not trained:
        return f"<span class=share>{short(parameters)} <b></b></span>"
    return f"<span class=share>{trained:,} of {short(parameters)} <b>{_percent(100 * trained / parameters)}</b></span>"


def _percent(part: float) -> str:
    return f"{part:.2f}%" if part < 99.995 else "100%"


def _gauge(gauge: Gauge) -> str:
    whole = sum(n for _, n in gauge.parts) or 1
    bar = "".join(f'<i class={mark} style="width:{100 * n / whole:.3g}%"></i>' for mark, n in gauge.parts if n)
    strong = f"<b>{_text(gauge.strong)}</b> " if gauge.strong else ""
    return (
        f"<div class=gauge><span>{_text(gauge.name)}</span> <div class=bar aria-hidden=true>{bar}</div> "
        f"<span>{strong}{_text(gauge.told)}</span></div>"
    )


def _text(text: Any) -> str:
    return html.escape(printable(str(text)))
