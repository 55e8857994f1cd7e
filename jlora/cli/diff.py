"""Compare two adapters: which modules each has, how far updates are apart.

Exits with 1 if they differ by more than the tolerance. The distance of two
updates is ||s B A - s' B' A'|| / max(||s B A||, ||s' B' A'||), whatever their
ranks and scales.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jlora.cli.inspect import norm
from jlora.cli.sources import adapter_of, add_hub_arguments, checked_names
from jlora.peft.adapter import EXPERTS, Adapter, Filed, Update
from jlora.peft.remote import adapter_at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("a", metavar="A", help="an adapter, of PEFT's or of Orbax's, or org/name of the Hub")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--names", help="map of an Orbax adapter's paths to PyTorch's names, such as llama")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="what counts as the same (default: %(default)s)")
    add_hub_arguments(parser, revision_a="A", revision_b="B")


def run(given: argparse.Namespace) -> int:
    """Prints the differences."""
    names = checked_names(given.names)
    sources = ((given.a, given.revision_a), (given.b, given.revision_b))
    paths = [adapter_at(source, revision=revision, cache_dir=given.cache_dir) for source, revision in sources]
    a, b = (adapter_of(path, names).adapter for path in paths)
    rows = [row for row in differences(a, b) if not row[2] <= given.tolerance]
    console = Console(highlight=False, soft_wrap=True)
    if not rows:
        console.print(f"the same: {len(a.updates)} updates, {len(a.full)} tensors in full, within {given.tolerance:g}")
        return 0
    table = Table("what", "difference", "distance", box=None, header_style="bold", pad_edge=False)
    for what, how, distance in rows:
        table.add_row(what, how, f"{distance:.3g}" if np.isfinite(distance) else "")
    console.print(table)
    return 1


def differences(a: Adapter, b: Adapter) -> list[tuple[str, str, float]]:
    """What differs, how, and by how much; infinite where one has it alone."""
    rows: list[tuple[str, str, float]] = []
    parts = (("", a.updates, b.updates), ("in full: ", a.full, b.full), ("rows of ", a.tokens, b.tokens))
    for prefix, ours, theirs in parts:
        for name in sorted({*ours} | {*theirs}):
            if name not in ours or name not in theirs:
                rows.append((prefix + name, f"only in {'A' if name in ours else 'B'}", np.inf))
            else:
                rows.append((prefix + name, *_distance(ours[name], theirs[name])))
    return rows


def _distance(a: Any, b: Any) -> tuple[str, float]:
    if isinstance(a, Filed) or isinstance(b, Filed):
        return _between_filed(a, b)
    if isinstance(a, Update):
        return _between(a, b)
    ids, x = a if isinstance(a, tuple) else ((), a)
    others, y = b if isinstance(b, tuple) else ((), b)
    if ids != others or x.shape != y.shape:
        return "other shapes or rows", np.inf
    return "values", _relative(x, y)


def _between_filed(a: Any, b: Any) -> tuple[str, float]:
    """Of modules of other methods than LoRA: how far their tensors are apart."""
    method = lambda x: x.form.method if isinstance(x, Filed) else "LORA"
    if method(a) != method(b):
        return f"{method(a)} and {method(b)}", np.inf
    shapes = [{name: x.shape for name, x in update.tensors.items()} for update in (a, b)]
    if shapes[0] != shapes[1] or a.spec != b.spec:
        return "other shapes or settings", np.inf
    return "values", max(_relative(x, b.tensors[name]) for name, x in a.tensors.items())


def _between(a: Update, b: Update) -> tuple[str, float]:
    if (a.kind, a.a.shape[-1], a.b.shape[-2]) != (b.kind, b.a.shape[-1], b.b.shape[-2]):
        return f"{a.kind} {a.a.shape} and {b.kind} {b.a.shape}", np.inf
    extra = [(a.magnitude, b.magnitude), (a.bias, b.bias)]
    if any((x is None) != (y is None) for x, y in extra):
        return "a magnitude or bias on one side", np.inf
    axis = 1 if a.kind == EXPERTS else 0
    both = dataclasses.replace(
        a,
        a=np.concatenate([a.a.astype(np.float64), b.a.astype(np.float64)], axis),
        b=np.concatenate([a.scale * a.b.astype(np.float64), -b.scale * b.b.astype(np.float64)], -1),
        scale=1.0,
    )
    largest = max(norm(a), norm(b))
    distance = norm(both) / largest if largest else 0.0
    others = [_relative(x, y) for x, y in extra if x is not None and y is not None]
    told = f"rank {a.rank} and {b.rank}" if a.rank != b.rank else "values"
    return told, max([distance, *others])


def _relative(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    largest = max(np.linalg.norm(x), np.linalg.norm(y))
    return float(np.linalg.norm(x - y) / largest) if largest else 0.0
