"""Print the LoraSpec that a file of another tool's settings means.

The file is PEFT's adapter_config.json (or its directory), or a configuration of
Axolotl's, LLaMA-Factory's or FastChat's, in YAML or JSON. The tool is
recognised by the names in the file. The output is Python. Names that have
nothing to do with the adapter are comments below the spec.

jlora spec qlora.yaml
jlora spec settings.json --tool fastchat
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora.spec import LoraSpec
from jlora.spec.beside import beside
from jlora.spec.files import CONFIG, read_settings
from jlora.spec.reader import TOOLS, readers_of
from jlora.spec.source import source

READERS = {name.rpartition("_")[2]: name for name in TOOLS}  # by what --tool calls them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("file", type=Path, help="settings, in YAML or JSON, or an adapter's directory of PEFT's")
    parser.add_argument("--tool", choices=tuple(READERS), help="whose they are (default: as their names tell)")


def run(given: argparse.Namespace) -> int:
    """Prints the spec."""
    config = read_settings(given.file, CONFIG)
    try:
        reader = READERS[given.tool] if given.tool else reader_of(config)
        spec = getattr(LoraSpec, reader.rpartition(".")[2])(config)
    except ValueError as error:
        raise ValueError(f"{given.file}: {error}") from None
    print(f"# {given.file}: {TOOLS[reader].what}")
    print(source(spec))
    for whose, names in beside(reader, config).items():
        print(textwrap.fill(f"{whose}: {', '.join(names)}", 100, initial_indent="# ", subsequent_indent="#   ",
                            break_long_words=False, break_on_hyphens=False))  # fmt: skip
    return 0


def reader_of(config: Mapping[str, Any]) -> str:
    """The one function that reads some settings, by their names.

    Raises:
      ValueError: if their names tell no tool, or several.
    """
    named = {name: x for name, x in config.items() if isinstance(name, str)}
    found = readers_of(named)
    if len(found) == 1:
        return next(iter(found))
    tools = {tool: found[reader] for tool, reader in READERS.items() if reader in found}
    if not tools:
        raise ValueError(
            f"no name in it tells whose settings they are; say it by --tool, which is one of {', '.join(READERS)}"
        )
    told = ", ".join(f"{tool} (by {name!r})" for tool, name in tools.items())
    raise ValueError(f"its names are those of several tools: {told}; say whose it is, as --tool {next(iter(tools))}")
