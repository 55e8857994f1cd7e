"""The README is one page, its code runs, and its two commands are what they claim to be."""

import re
import warnings
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_it_is_one_page():
    assert len(README.splitlines()) <= 150


def test_code_runs_and_learns():
    (block,) = blocks("python")
    namespace = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(block, "README.md", "exec"), namespace)
    loss, x, y = namespace["loss"], namespace["x"], namespace["y"]
    base = namespace["jlora"].unwrap(namespace["params"])
    assert namespace["value"] < loss(base, x, y) / 2


def test_first_block_is_a_dozen_lines_of_use():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip() and not line.startswith("import")]
    assert len(lines) <= 14


def test_commands():
    run, test = blocks("bash")
    assert "python -m jlora.examples.sentiment" in run and "\n" not in run.strip()
    assert "python -m pytest" in test and "\n" not in test.strip()


def test_public_names_are_documented():
    import jlora

    missing = [name for name in jlora.__all__ if not getattr(jlora, name).__doc__]
    assert not missing
