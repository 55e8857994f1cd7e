"""Convert an adapter: to PEFT's files, portable ones, or an Orbax checkpoint.

It may be one of PEFT, of Orbax, of MLX-LM, of kohya's scripts or of diffusers.

jlora convert peft_adapter out --to portable
jlora convert peft_adapter out --to orbax --base model_directory
jlora convert orbax_adapter out --to peft --names llama
jlora convert mlx_adapter out --to peft
jlora convert kohya.safetensors out --to peft --base unet_directory
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from jlora import checkpoint
from jlora.cli.sources import adapter_of, add_hub_arguments, check_foreign, check_out, checked_names, local, source_of
from jlora.peft.card import TASKS, checked_task
from jlora.peft.collect import Collected
from jlora.peft.diffusion import DIFFUSERS, KOHYA
from jlora.peft.foreign import MLX
from jlora.peft.models import files_of, nested
from jlora.peft.names import HEAD
from jlora.peft.place import place
from jlora.peft.portable import portable
from jlora.peft.remote import adapter_at, model_at
from jlora.peft.settings import CONFIG
from jlora.peft.write import write

IMAGES = (KOHYA, DIFFUSERS)
FOREIGN = (MLX, *IMAGES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("source", help="an adapter: its directory, its file, or org/name of the Hub")
    parser.add_argument("out", type=Path, help="directory to be made")
    parser.add_argument("--to", required=True, choices=("peft", "portable", "orbax"))
    tools = ("peft", "orbax", *FOREIGN)
    parser.add_argument("--from", choices=tools, dest="tool", help="whose it is (default: as its files tell)")
    text = "the base model's safetensors, as a directory, file, or org/name: for --to orbax, and for kohya's names"
    parser.add_argument("--base", help=text)
    text = "which of the adapters in a file of kohya's or diffusers', as unet or text_encoder"
    parser.add_argument("--component", metavar="NAME", help=text)
    parser.add_argument("--names", help="map of an Orbax adapter's paths to PyTorch's names, such as llama")
    parser.add_argument("--base-model", metavar="NAME", help="name of the base model, for PEFT's settings")
    text = f"what the adapter is for (default: its own): {', '.join(TASKS)}"
    parser.add_argument("--task-type", choices=TASKS, metavar="TASK", help=text)
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")
    add_hub_arguments(parser, revision="the adapter", base_revision="the base")


def run(given: argparse.Namespace) -> int:
    """Writes the adapter."""
    marks = (checkpoint.ABOUT,) if given.to == "orbax" else (CONFIG,)
    check_out(given.out, local(given.source), given.force, marks)
    source = adapter_at(given.source, revision=given.revision, cache_dir=given.cache_dir)
    tool = source_of(source, given.tool)
    if given.base is not None and given.to != "orbax" and tool not in FOREIGN:
        raise ValueError(f"--base is for --to orbax, and for adapters of other tools; --to {given.to} needs none")
    if given.names is not None and tool != "orbax":
        raise ValueError("--names is for an Orbax adapter; others have PyTorch's names")
    if given.component is not None and tool not in IMAGES:
        raise ValueError(f"--component is for files of kohya's and diffusers'; {given.source} has a single adapter")
    if given.task_type is not None and given.to == "orbax":
        raise ValueError("--task-type is for PEFT's settings; an Orbax adapter has none")
    base = _base_at(given)
    named = base if tool in FOREIGN and given.to != "orbax" else None
    as_lora = given.to == "portable"
    collected = adapter_of(source, checked_names(given.names), component=given.component, base=named, as_lora=as_lora)
    if tool in FOREIGN and given.to != "orbax":
        check_foreign(source, tool, collected, named)
    if collected.adapter.config:  # a file tells of no other modules: its model may have a head of its own
        collected = dataclasses.replace(collected, known={**collected.known, HEAD: True})
    if given.to == "orbax":
        _to_orbax(given, collected, base)
    else:
        made = portable(collected) if given.to == "portable" else collected
        write(given.out, made, _base_model(given, collected), _task_type(given, collected))
    Console(highlight=False, soft_wrap=True).print(f"{given.out} has the adapter for {given.to}", markup=False)
    return 0


def _base_at(given: argparse.Namespace) -> Path | None:
    if given.base is None:
        return None
    return model_at(given.base, revision=given.base_revision, cache_dir=given.cache_dir)


def _base_model(given: argparse.Namespace, collected: Collected) -> str | None:
    return given.base_model or collected.adapter.config.get("base_model_name_or_path")


def _task_type(given: argparse.Namespace, collected: Collected) -> str | None:
    own = collected.adapter.config.get("task_type")
    try:
        return given.task_type or checked_task(own)
    except ValueError as error:
        raise ValueError(f"{given.source}: {error}; --task-type says it anew") from None


def _to_orbax(given: argparse.Namespace, collected: Collected, directory: Path | None) -> None:
    if directory is None:
        raise ValueError("--to orbax needs --base: an Orbax adapter knows the leaves of the base that it belongs to")
    if not collected.adapter.config:
        raise ValueError(f"{given.source} is an Orbax adapter already")
    base: Any = nested({name: file[name] for file in files_of(directory).values() for name in file})
    checkpoint.save(given.out, place(collected.adapter, base), overwrite=given.force)
