"""Links between the pages of the repository lead somewhere: files are there, and so are the headings in them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SKIPPED = {"_build", "jupyter_execute", ".venv", ".git", "runs", "node_modules"}
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", ".github/**/*.md", "notebooks/*.ipynb")
    for page in ROOT.glob(pattern)
    if not SKIPPED & set(page.relative_to(ROOT).parts)
)


def text_of(page):
    if page.suffix != ".ipynb":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page):
    """Of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def faults(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page))):
        if re.match(r"https://[\w.-]+\.\w+(/|$)", target):
            continue
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        if not to.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(to):
            yield f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    assert not list(faults(page))


def test_what_is_broken_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading, with `code`\n[1](gone.md) [2](page.md#no) [3](#a-heading-with-code) [4](http://x)\n")
    assert list(faults(page)) == [
        "gone.md: no such file",
        "page.md#no: no such heading",
        "http://x: no such file",
    ]
