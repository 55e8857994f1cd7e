"""Combine adapters into one, without their base: PEFT's add_weighted_adapter.

The adapters may be PEFT's, Orbax's or another tool's. OUT is one of PEFT's, of
plain LoRA at scale 1, with the modules of all of them. Weights may be negative:
1 -1 takes from the one what the other has learnt.

jlora blend one other out --weights 0.7 0.3 --method cat
jlora blend one other out --weights 1 1 --method ties --density 0.2
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console

from jlora.adapters.combine import MAJORITIES, METHODS, Recipe, checked_weights
from jlora.adapters.files import blended
from jlora.cli.sources import adapter_of, add_hub_arguments, check_foreign, check_out, checked_names, local, source_of
from jlora.peft.card import TASKS, checked_task
from jlora.peft.collect import Collected
from jlora.peft.names import HEAD
from jlora.peft.remote import adapter_at
from jlora.peft.settings import CONFIG
from jlora.peft.write import tied_table, write

FOREIGN = ("mlx", "kohya", "diffusers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", help="directory or file, or org/name of the Hub")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to be made")
    text = "one for each adapter"
    parser.add_argument("--weights", type=float, nargs="+", required=True, metavar="WEIGHT", help=text)
    text = "linear (the default), cat, svd, ties, dare_linear, dare_ties, magnitude_prune; these four with _svd too"
    parser.add_argument("--method", choices=METHODS, default="linear", metavar="METHOD", help=text)
    parser.add_argument("--density", type=float, help="share of values that ties, dare and magnitude_prune keep")
    text = "of ties: signs weighed by their values (total, the default), or counted"
    parser.add_argument("--majority-sign-method", choices=MAJORITIES, default="total", help=text)
    text = "of the result of svd (default: the largest of the adapters)"
    parser.add_argument("--svd-rank", type=int, metavar="RANK", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of what dare draws (default: %(default)s)")
    parser.add_argument("--names", help="map of an Orbax adapter's paths to PyTorch's names, such as llama")
    parser.add_argument("--base-model", metavar="NAME", help="name of the base model, for PEFT's settings")
    text = f"what the adapter is for (default: as the adapters say): {', '.join(TASKS)}"
    parser.add_argument("--task-type", choices=TASKS, metavar="TASK", help=text)
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")
    add_hub_arguments(parser, revision="all adapters")


def run(given: argparse.Namespace) -> int:
    """Writes the combined adapter."""
    recipe = Recipe(given.method, given.density, given.majority_sign_method, given.svd_rank)
    recipe.check(f"--method {given.method}", len(given.adapters))
    weights = checked_weights("--weights", given.weights, len(given.adapters))
    check_out(given.out, local(*given.adapters), given.force, (CONFIG,))
    sources = _read(given)
    base_model = given.base_model or _agreed(sources, "base_model_name_or_path", "--base-model")
    task_type = given.task_type or checked_task(_agreed(sources, "task_type", "--task-type"))
    known = _known(sources)
    adapters = {source: collected.adapter for source, collected in sources.items()}
    key = jax.random.key(given.seed) if recipe.is_random else None
    adapter = blended(adapters, weights, recipe, key)
    write(given.out, Collected(adapter, known, {}, is_all_known=_are_alike([*sources.values()])), base_model, task_type)
    ranks = sorted({update.rank for update in adapter.updates.values()})
    text = f"{given.out} has {len(adapters)} adapters in one: {len(adapter.updates)} updates of rank {_span(ranks)}"
    Console(highlight=False, soft_wrap=True).print(text, markup=False)
    return 0


def _read(given: argparse.Namespace) -> dict[str, Collected]:
    """The adapters by where they come from; one that is given twice is there twice."""
    found: dict[str, Collected] = {}
    names = checked_names(given.names)
    for number, source in enumerate(given.adapters, 1):
        path = adapter_at(source, revision=given.revision, cache_dir=given.cache_dir)
        tool = source_of(path, None)
        collected = adapter_of(path, names if tool == "orbax" else None, as_lora=True)
        if tool in FOREIGN:
            check_foreign(path, tool, collected, None)
        found[source if source not in found else f"{source} (adapter {number})"] = collected
    return found


def _agreed(sources: Mapping[str, Collected], setting: str, option: str) -> str | None:
    """What the adapters' settings say; those that say nothing agree with all."""
    said = {source: collected.adapter.config.get(setting) for source, collected in sources.items()}
    values = {value: source for source, value in said.items() if value is not None}
    if len(values) > 1:
        told = " and ".join(f"{value!r} in {source}" for value, source in values.items())
        raise ValueError(f"{setting} is {told}; if the adapters belong together, {option} says which it is")
    return next(iter(values), None)


def _known(sources: Mapping[str, Collected]) -> dict[str, bool]:
    """All modules and parameters that are known; of a file, which has no others, that its model has a head."""
    known = {name: is_kernel for of in sources.values() for name, is_kernel in of.known.items()}
    if any(of.adapter.config for of in sources.values()):
        known[HEAD] = True
    for source, of in sources.items():
        table = tied_table(of.known)
        if HEAD in known and not of.adapter.config and table in of.adapter.updates:
            raise ValueError(
                f"{source} has an update of {table}, which is the head of its model too, where PEFT's files have two. "
                "Make such files of it first: jlora convert ... --to peft"
            )
    return known


def _are_alike(collected: Sequence[Collected]) -> bool:
    """Whether all have the same modules, by settings that name no layers: then short names mean what they meant."""
    modules = {frozenset(of.adapter.updates) for of in collected}
    return len(modules) == 1 and all(
        of.is_all_known and of.adapter.config.get("layers_to_transform") is None for of in collected
    )


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
