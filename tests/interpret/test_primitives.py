"""The table of primitives is that of the rules, for the JAX that runs."""

import re
from pathlib import Path

import jax
import pytest

from tests.interpret.primitives import names, row, table

PAGE = Path(__file__).parents[2] / "docs" / "primitives.md"
TEXT = PAGE.read_text()
WRITTEN_FOR = re.search(r"for jax ([\d.]+)\.", TEXT)[1]
ROWS = {name: facts for name, *facts in re.findall(r"^\| `(\S+)` \| (.+?) \| (.+?) \| (.+?) \|$", TEXT, re.MULTILINE)}
DENSE = re.findall(r"`(\S+)`", TEXT.partition("All others are dense:")[2])


def version(text):
    return tuple(map(int, text.split(".")[:3]))


def test_every_primitive_has_the_class_that_the_page_says():
    """On an older JAX, those that it has; on this one and on later ones, all of them, and no others."""
    known = ROWS | {name: ["dense", "dequantised", "other"] for name in DENSE}
    for name in names():
        if name in known:
            assert list(row(name)) == known[name], name
        else:
            assert version(jax.__version__) < version(WRITTEN_FOR), f"{name} is new: is it a view?"
            assert row(name)[0] == "dense"


@pytest.mark.skipif(jax.__version__ != WRITTEN_FOR, reason="written for another JAX")
def test_the_page_is_the_table():
    assert table() == TEXT
