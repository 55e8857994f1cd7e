"""Convert an adapter: to PEFT's files, portable ones, or an Orbax checkpoint.

jlora convert peft_adapter out --to portable
jlora convert peft_adapter out --to orbax --base model_directory
jlora convert orbax_adapter out --to peft --names llama
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from jlora import checkpoint
from jlora.cli.sources import adapter_of, check_out, checked_names, is_orbax
from jlora.peft.collect import Collected
from jlora.peft.models import files_of, nested
from jlora.peft.place import place
from jlora.peft.portable import portable
from jlora.peft.settings import CONFIG
from jlora.peft.write import write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("source", type=Path, help="an adapter, of PEFT's or of Orbax's")
    parser.add_argument("out", type=Path, help="directory to be made")
    parser.add_argument("--to", required=True, choices=("peft", "portable", "orbax"))
    parser.add_argument("--base", type=Path, help="the base model's safetensors: needed for --to orbax")
    parser.add_argument("--names", help="map of an Orbax adapter's paths to PyTorch's names, such as llama")
    parser.add_argument("--base-model", metavar="NAME", help="name of the base model, for PEFT's settings")
    parser.add_argument("--force", action="store_true", help="replace what is at OUT")


def run(given: argparse.Namespace) -> int:
    """Writes the adapter."""
    marks = (checkpoint.ABOUT,) if given.to == "orbax" else (CONFIG,)
    check_out(given.out, (given.source,), given.force, marks)
    if given.base is not None and given.to != "orbax":
        raise ValueError(f"--base is for --to orbax; --to {given.to} needs none")
    if given.names is not None and not is_orbax(given.source):
        raise ValueError("--names is for an Orbax adapter; PEFT's have PyTorch's names")
    collected = adapter_of(given.source, checked_names(given.names))
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
