"""The command line, ``jlora``: look at adapters, merge, convert, compare and combine them; read other tools' settings.

Exit codes: 0 done, 1 done and found a difference or a fault (`diff`, `inspect`), 2 not done: the message says why, 130
interrupted (Ctrl-C).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from jlora.cli import blend, convert, diff, doctor, inspect, merge, spec

COMMANDS = (inspect, merge, convert, diff, blend, spec, doctor)

ABOUT = "Look at LoRA adapters, merge, convert, compare and combine them; read other tools' settings."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Errors are told on standard error, in one line and without a traceback. Ctrl-C while a command runs is 130.

    Args:
      arguments: the words behind ``jlora``; None: those that the program was started with.

    Returns:
      0, 1, 2 or 130: see the table of exit codes.

    Raises:
      SystemExit: of `argparse`, with 2 where the words are no command, and 0 behind ``--help``.

    Example:
      >>> from jlora.cli import main
      >>> main(["spec", "no-such-file.yaml"])  # says on standard error that there is no such file
      2
    """
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
    except BrokenPipeError:  # as in `jlora inspect adapter | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"jlora {given.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"jlora {given.command}: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser of all commands.

    Returns:
      An `argparse.ArgumentParser`. What it has parsed has the ``command`` by name, and ``run``, its function.

    Example:
      >>> from jlora.cli import parser
      >>> parser().parse_args(["inspect", "adapter"]).command
      'inspect'
    """
    made = argparse.ArgumentParser(prog="jlora", description=ABOUT)
    made.epilog = (
        "An adapter is a directory of PEFT's (adapter_config.json, adapter_model.safetensors) or of Orbax's. Where "
        "there is none, org/name is one of the Hugging Face Hub; its token is that of hf auth login, or HF_TOKEN."
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        about = (command.__doc__ or "").strip()
        added = commands.add_parser(
            name, help=about.splitlines()[0], description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return made
