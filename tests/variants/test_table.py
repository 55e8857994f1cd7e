"""The tables of docs/reference/variants.md are those that the classes make."""

import re
from pathlib import Path

import pytest

from benchmarks import variants as costs
from jlora.variants import VARIANTS

PAGE = (Path(__file__).parents[2] / "docs/reference/variants.md").read_text()


def rows(heading):
    """Of the table under a heading, or of the first: the first cell, without its quotes, and the others."""
    part = PAGE.split(f"## {heading}\n" if heading else "\n", 1)[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines() if line[:3] == "| `"]
    return {first.strip('`"'): others for first, *others in lines if first != "`variant`"}


def test_all_variants_are_in_the_first_table():
    assert list(rows("")) == list(VARIANTS)


def test_the_second_table_has_the_numbers_files_and_papers_of_the_classes():
    expected = {
        name: [f"{costs.trained(cls):,}", costs.method(cls), costs.paper(cls)] for name, cls in VARIANTS.items()
    }
    assert {name: [trained, *rest] for name, (trained, _, *rest) in rows("What each costs").items()} == expected
    assert all(paper for _, _, paper in expected.values())


@pytest.mark.slow
def test_the_second_table_has_the_flops_that_the_programs_have():
    measured = costs.flops_over_lora()
    for name, (_, flops, *_) in rows("What each costs").items():
        assert float(flops) == pytest.approx(measured[name], abs=0.03), name


def test_the_list_of_what_is_missing_names_no_method_that_is_there():
    missing = {name for line in rows("What PEFT has and jlora has not") for name in re.findall("[A-Z_]{3,}", line)}
    assert len(missing) > 15 and not missing & {cls.FORM.method for cls in VARIANTS.values() if cls.FORM}
