"""Show what is in an adapter: targets, ranks, scales, norms, size, faults.

Exits with 1 if it has values that are NaN or infinite.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from jlora import checkpoint
from jlora.cli.sources import adapter_of, add_hub_arguments, checked_names, is_orbax
from jlora.peft.adapter import EXPERTS, Adapter, Filed, Update
from jlora.peft.portable import portable
from jlora.peft.remote import adapter_at
from jlora.peft.tensors import are_finite
from jlora.peft.write import within


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("directory", help="an adapter, of PEFT's or of Orbax's, or org/name of the Hub")
    parser.add_argument("--names", help="map of an Orbax adapter's paths to PyTorch's names, such as llama")
    parser.add_argument("--json", action="store_true", help="print JSON, with every module")
    add_hub_arguments(parser, revision="the adapter")


def run(given: argparse.Namespace) -> int:
    """Prints the tables."""
    at = adapter_at(given.directory, revision=given.revision, cache_dir=given.cache_dir)
    try:
        collected = adapter_of(at, checked_names(given.names), True, allow_edited=True)
    except ValueError:
        if given.names is not None or not is_orbax(at):
            raise
        return _run_other(given, at)
    adapter = collected.adapter
    modules = [_module(name, update) for name, update in adapter.updates.items()]
    faults = [name for name, array in adapter.arrays() if not are_finite(array)]
    told = _told(given.directory, adapter, modules, faults)
    try:
        portable(adapter_of(at, checked_names(given.names), True, as_lora=True) if is_orbax(at) else collected)
        told["portable"] = "yes"
    except ValueError as error:
        told["portable"] = "no: " + str(error).split("this adapter has ")[-1].split(". ")[0]
    if given.json:
        print(json.dumps(told | {"modules": modules}, indent=2))
    else:
        _print(told, modules)
    return 1 if faults else 0


def _module(name: str, update: Update | Filed) -> dict[str, Any]:
    if isinstance(update, Filed):
        return _other_module(name, update)
    stack = update.kind == EXPERTS
    ins, outs = int(np.prod(update.a.shape[1 + stack :])), update.b.shape[-2]
    return {
        "name": name,
        "kind": update.kind,
        "shape": [*([len(update.a)] if stack else []), ins, outs],
        "rank": update.rank,
        "scale": update.scale,
        "norm": norm(update),
        "parameters": sum(x.size for x in update.arrays.values()),
        "dtype": str(update.a.dtype),
    }


def _other_module(name: str, update: Filed) -> dict[str, Any]:
    """A module of another method than LoRA: what its tensors tell, and its settings."""
    uses = update.node.SETTINGS
    ranks = {what: update.settings[peft] for peft, (what, _) in update.form.settings.items() if peft in update.settings}
    rank, scale = (None, None) if update.spec is None else (update.spec.rank, update.spec.scale)
    return {
        "name": name,
        "kind": update.kind,
        "shape": list(update.form.sizes(update.tensors)),
        "rank": (ranks.get("rank") or rank) if "rank" in uses else None,
        "scale": scale if "alpha" in uses else None,
        "norm": None,
        "parameters": sum(x.size for x in update.arrays.values()),
        "dtype": str(next(iter(update.tensors.values())).dtype),
    }


def norm(update: Update) -> float:
    """The Frobenius norm of s B A, by its factors."""
    a, b = update.a.astype(np.float64), update.b.astype(np.float64)
    a = a if update.kind == EXPERTS else a.reshape(update.rank, -1)
    square = ((b.swapaxes(-1, -2) @ b) * (a @ a.swapaxes(-1, -2))).sum()
    return float(abs(update.scale) * np.sqrt(max(square, 0.0)))


def _told(
    directory: str, adapter: Adapter, modules: Sequence[Mapping[str, Any]], faults: Sequence[str]
) -> dict[str, Any]:
    arrays = [array for _, array in adapter.arrays()]
    config = adapter.config
    method = adapter.form.method if adapter.form is not None else "DoRA" if adapter.is_dora else "LoRA"
    return {
        "adapter": directory,
        "method": f"{method}, rsLoRA" if config.get("use_rslora") else method,
        "base model": config.get("base_model_name_or_path"),
        "parameters": sum(x.size for x in arrays),
        "bytes": sum(x.nbytes for x in arrays),
        "types": sorted({str(x.dtype) for x in arrays}),
        "adapted": len(modules),
        "trained in full": sorted(adapter.full),
        "trained rows": {name: len(ids) for name, (ids, _) in adapter.tokens.items()},
        "dropout": adapter.dropout,
        "not finite": list(faults),
    }


def _print(told: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    shown = {name: value for name, value in told.items() if value not in (None, [], {})}
    shown["bytes"] = size_text(told["bytes"])
    shown["parameters"] = f"{told['parameters']:,}"
    for name, value in shown.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, dict)) else str(value)
        console.print(f"{name:16} {_cut(text)}", markup=False)
    if modules:
        console.print(_table(modules))


def _table(modules: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, justify in (
        ("module", "left"), ("count", "right"), ("in -> out", "right"), ("rank", "right"), ("scale", "right"),
        ("norm of update", "right"),
    ):  # fmt: skip
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    groups: dict[Any, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for module in modules:
        groups[within(module["name"])].append(module)
    for name, group in sorted(groups.items()):
        norms = [module["norm"] for module in group if module["norm"] is not None] or [math.nan]
        norm_text = f"{norms[0]:.3g}" if len(group) == 1 else f"{min(norms):.3g} to {max(norms):.3g}"
        norm_text = "" if math.isnan(norms[0]) else norm_text
        scales = {f"{m['scale']:.4g}" for m in group if m["scale"] is not None}
        shapes = {_arrow(module["shape"]) for module in group}
        table.add_row(
            name, str(len(group)), _some(shapes), _some({m["rank"] for m in group if m["rank"] is not None}),
            _some(scales), norm_text,
        )  # fmt: skip
    return table


def _arrow(shape: Sequence[int]) -> str:
    *stack, ins, outs = shape
    told = lambda n: "any" if n is None else n
    return "".join(f"{n} x " for n in stack) + f"{told(ins)} -> {told(outs)}"


def _some(values: Iterable[Any]) -> str:
    found = sorted(values)
    return ", ".join(map(str, found[:3])) + (", ..." if len(found) > 3 else "")


def _cut(text: str, width: int = 400) -> str:
    return text if len(text) <= width else f"{text[:width]}..."


def size_text(count: float) -> str:
    """A number of bytes, to read."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _run_other(given: argparse.Namespace, at: Path) -> int:
    """An Orbax adapter that is no low-rank one: its nodes, class by class."""
    about = checkpoint.describe(at)
    if given.json:
        print(json.dumps(about["nodes"], indent=2))
        return 0
    count = lambda node: sum(int(np.prod(x["shape"])) for x in node["arrays"].values())
    groups: dict[str, list[int]] = collections.defaultdict(list)
    for node in about["nodes"].values():
        groups[node["class"]].append(count(node))
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{'adapter':16} {given.directory}", markup=False)
    for name, counts in sorted(groups.items()):
        console.print(f"{name:16} {len(counts)} leaves, {sum(counts):,} parameters", markup=False)
    return 0
