"""What jlora costs: one file a claim. ``python -m benchmarks`` runs all."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax


def told(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 2) -> None:
    """Prints a table, with the machine, the versions and the date."""
    show = lambda cell: "" if cell is None else f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)
    cells = [[*header], *([show(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    device = jax.devices()[0].device_kind
    today = datetime.datetime.now(tz=datetime.UTC).date()
    print(f"\n{title}")
    print(f"({device}, {os.cpu_count()} cores; jax {jax.__version__}, Python {platform.python_version()}, {today})")
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
