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
from pathlib import Path
from typing import Any

from rich.console import Console

from jlora import checkpoint
from jlora.cli.sources import adapter_of, check_foreign, check_out, checked_names, source_of
from jlora.peft.collect import Collected
from jlora.peft.diffusion import DIFFUSERS, KOHYA
from jlora.peft.foreign import MLX
from jlora.peft.models import files_of, nested
from jlora.peft.place import place
from jlora.peft.portable import portable
from jlora.peft.settings import CONFIG
from jlora.peft.write import write

IMAGES = (KOHYA, DIFFUSERS)
FOREIGN = (MLX, *IMAGES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("source", type=Path, help="an adapter: its directory, or file")
    parser.add_argument("out", type=Path, help="directory to be made")
    parser.add_argument("--to", required=True, choices=("peft", "portable", "orbax"))
    tools = ("peft", "orbax", *FOREIGN)
    parser.add_argument("--from", choices=tools, dest="tool", help="whose it is (default: as its files tell)")
    text = "directory or file of the base model's safetensors: for --to orbax, and for the names in a file of kohya's"
    parser.add_argument("--base", type=Path, help=text)
    text = "which of the adapters in a file of kohya's or diffusers', as unet or text_encoder"
    parser.add_argument("--component", metavar="NAME", help=text)
    parser.add_argument("--names", help="map of an Orbax adapter's paths to PyTorch's names, such as llama")
    parser.add_argument("--base-model", metavar="NAME", help="name of the base model, for PEFT's settings")
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")


def run(given: argparse.Namespace) -> int:
    """Writes the adapter."""
    marks = (checkpoint.ABOUT,) if given.to == "orbax" else (CONFIG,)
    check_out(given.out, (given.source,), given.force, marks)
    tool = source_of(given.source, given.tool)
    if given.base is not None and given.to != "orbax" and tool not in FOREIGN:
        raise ValueError(f"--base is for --to orbax, and for adapters of other tools; --to {given.to} needs none")
    if given.names is not None and tool != "orbax":
        raise ValueError("--names is for an Orbax adapter; others have PyTorch's names")
    if given.component is not None and tool not in IMAGES:
        raise ValueError(f"--component is for files of kohya's and diffusers'; {given.source} has a single adapter")
    base = given.base if tool in FOREIGN and given.to != "orbax" else None
    collected = adapter_of(given.source, checked_names(given.names), component=given.component, base=base)
    if tool in FOREIGN and given.to != "orbax":
        check_foreign(given.source, tool, collected, base)
    if given.to == "orbax":
        _to_orbax(given, collected)
    else:
        write(given.out, portable(collected) if given.to == "portable" else collected, _base_model(given, collected))
    Console(highlight=False, soft_wrap=True).print(f"{given.out} has the adapter for {given.to}", markup=False)
    return 0


def _base_model(given: argparse.Namespace, collected: Collected) -> str | None:
    return given.base_model or collected.adapter.config.get("base_model_name_or_path")


def _to_orbax(given: argparse.Namespace, collected: Collected) -> None:
    if given.base is None:
        raise ValueError("--to orbax needs --base: an Orbax adapter knows the leaves of the base that it belongs to")
    if not collected.adapter.config:
        raise ValueError(f"{given.source} is an Orbax adapter already")
    base: Any = nested({name: file[name] for file in files_of(given.base).values() for name in file})
    checkpoint.save(given.out, place(collected.adapter, base), overwrite=given.force)
