"""A tree of leaves as HTML that folds, for notebooks: no script, nothing from outside, readable on light and on dark.

Marks are filled with a colour of their own; all other text has the colour of the page around it.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterable, Sequence

from jlora.report.totals import short

OPEN = 60  # leaves of a page on which what is marked lies open
COLOURS = {"adapted": "#1f6fb4", "whole": "#7a4fb5", "factored": "#1b7f3b", "dense": "#b34a00"}
STYLE = (
    """<style>
.jlora{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;max-width:64em;color:inherit}
.jlora details,.jlora .leaf{margin:0;padding:0 0 0 1.1em;border:0;background:none}
.jlora details>details,.jlora details>.leaf{border-left:1px solid rgba(128,128,128,.35);margin-left:.3em}
.jlora summary{cursor:pointer;display:list-item;list-style-position:outside}
.jlora summary:hover{background:rgba(128,128,128,.14)}
.jlora .frozen,.jlora .more{opacity:.68}
.jlora .fact{margin-left:1em;white-space:nowrap}
.jlora .why{display:block;margin-left:1.5em}
.jlora .mark{color:#fff;border-radius:3px;padding:0 .45em;margin-left:.7em;white-space:nowrap}
.jlora .bar{height:5px;max-width:28em;margin:.3em 0 .5em;border-radius:3px;background:rgba(128,128,128,.3)}
.jlora .bar i{display:block;height:100%;min-width:3px;border-radius:3px;background:#1f6fb4}
"""
    + "".join(f".jlora .{name}{{background:{colour}}}\n" for name, colour in COLOURS.items())
    + "</style>"
)


@dataclasses.dataclass(frozen=True)
class Item:
    """A leaf of the page.

    Args:
      path: its names, joined by ``/``.
      mark: one of `COLOURS`, or "" for what is frozen.
      word: what stands on the mark.
      facts: what is said beside it.
      trained: numbers that train, and
      all: numbers in all; both are summed up for each module.
      why: a sentence below it.
    """

    path: str
    mark: str
    word: str
    facts: tuple[str, ...]
    trained: int = 0
    all: int = 0
    why: str = ""


def page(items: Sequence[Item], lines: Iterable[str], percent: float) -> str:
    """The items as a tree under lines that sum them up, with a bar of what trains."""
    head = "".join(f"<div>{html.escape(line)}</div>" for line in lines)
    bar = f'<div class="bar"><i style="width:{min(percent, 100):.2f}%"></i></div>'
    rows = [(item.path.split("/"), item) for item in items]
    tree = _level(rows, 0, opened=True)
    if tree.count('class="leaf') > OPEN:
        tree = _level(rows, 0, opened=False)
    return f'{STYLE}<div class="jlora">{head}{bar}{tree}</div>'


def _level(rows: Sequence[tuple[Sequence[str], Item]], depth: int, opened: bool) -> str:
    """Leaves and modules at this depth in their order, alike ones together."""
    children: dict[tuple[str, bool], list[tuple[Sequence[str], Item]]] = {}
    for names, item in rows:  # a name may be a leaf's and a module's too, as of {"a": x, "a/b": y}
        children.setdefault((names[depth], len(names) == depth + 1), []).append((names, item))
    bodies = [
        (name, _leaf([item for _, item in inside]) if is_leaf else _module(inside, depth, opened))
        for (name, is_leaf), inside in children.items()
    ]
    alike: dict[tuple[str, tuple[str, str]], list[str]] = {}
    for name, body in bodies:
        alike.setdefault((re.sub(r"\d+", "#", name, count=1), body), []).append(name)
    return "".join(f"{before}{_title(names)}{after}" for (_, (before, after)), names in alike.items())


def _module(rows: Sequence[tuple[Sequence[str], Item]], depth: int, opened: bool) -> tuple[str, str]:
    """HTML before the name of a module, and after it."""
    trained, all_ = sum(item.trained for _, item in rows), sum(item.all for _, item in rows)
    share = f"{short(trained)} of {short(all_)} train" if trained else f"{short(all_)} frozen"
    total = f' <span class="fact more">{share}</span>' if all_ else ""
    marked = any(item.mark for _, item in rows) and (opened or depth == 0)
    return f"<details{' open' * marked}><summary>", f"{total}</summary>{_level(rows, depth + 1, opened)}</details>"


def _leaf(items: Sequence[Item]) -> tuple[str, str]:
    """HTML before and after the name of a leaf; of one with several uses each has a line."""
    told = "<br>".join(map(_told, items))
    return f'<div class="leaf{"" if items[0].mark else " frozen"}">', f"{told}</div>"


def _told(item: Item) -> str:
    mark = f' <span class="mark {item.mark}">{html.escape(item.word)}</span>' if item.mark else ""
    facts = "".join(f' <span class="fact">{html.escape(fact)}</span>' for fact in item.facts if fact)
    why = f'<span class="why more">{html.escape(item.why)}</span>' if item.why else ""
    return mark + facts + why


def _title(names: Sequence[str]) -> str:
    """A name, or those of modules that differ in a number alone: ``layer_0-11``, how often."""
    if len(names) == 1:
        return f"<b>{html.escape(names[0])}</b>"
    numbers = sorted(int(re.search(r"\d+", name)[0]) for name in names)  # type: ignore[index]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    spans = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    title = re.sub(r"\d+", lambda _: spans, names[0], count=1)
    return f'<b>{html.escape(title)}</b> <span class="fact more">{len(names)}x</span>'
