"""The code of each page of the site runs, block after block, as one program; no page is left out of the site.

Blocks marked ``python`` run. ``py`` marks code of other tools, which stands beside for comparison and is not run.
"""

import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"_build", "notebooks"} & set(path.relative_to(DOCS).parts))
LONGEST = 32  # lines of a block: a reader sees it whole
SPACES = "adapters checkpoint init nnx optim peft quant variants".split()


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def name_of(page):
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks(page):
            exec(compile(block, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_short(page):
    assert all(block.count("\n") <= LONGEST for block in blocks(page))


def test_every_public_name_is_in_the_reference():
    import jlora

    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    spaces = {"": jlora, **{name: getattr(jlora, name) for name in SPACES}}
    missing = [
        f"jlora.{space}.{name}".replace("..", ".")
        for space, module in spaces.items()
        for name in module.__all__
        if not re.search(rf"\b{name}\b", text)
    ]
    assert not missing
