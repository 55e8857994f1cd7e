"""Every file stands above all that it imports; CONTRIBUTING.md draws the floors as the contract has them.

The contract is in pyproject.toml; ``lint-imports`` checks it, where ruff runs.
"""

import ast
import graphlib
import itertools
import re
import tomllib
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
FILES = {
    ".".join(file.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted((TOP / "jlora").rglob("*.py"))
}
ROOMS = {"jlora", "jlora.nodes", "jlora.targets"}  # packages whose files stand on several floors


def floors():
    """From the top: the files and packages of each floor."""
    settings = tomllib.loads((TOP / "pyproject.toml").read_text())
    (contract,) = settings["tool"]["importlinter"]["contracts"]
    return [[name.removeprefix("jlora.") for name in layer.split(" : ")] for layer in contract["layers"]]


def imported_by(name):
    """The files that a file imports, those for type checking alone included."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= submodules or {node.module}
    return found & FILES.keys() - {name}


def test_no_files_import_each_other_in_a_circle():
    try:
        order = [*graphlib.TopologicalSorter({name: imported_by(name) for name in FILES}).static_order()]
    except graphlib.CycleError as error:
        pytest.fail(f"files import each other in a circle: {' is imported by '.join(error.args[1])}")
    assert len(order) == len(FILES) and order.index("jlora.interpret.factored") < order.index("jlora.wrap")


def test_rooms_that_stand_on_several_floors_import_nothing():
    """Else a file on a low floor would bring in all of them."""
    assert not any(imported_by(name) for name in ROOMS - {"jlora"})


def test_every_file_is_on_one_floor():
    places = [name for floor in floors() for name in floor]
    on = {name: [p for p in places if f"{name}.".startswith(f"jlora.{p}.")] for name in FILES.keys() - ROOMS}
    lost = {name: floors for name, floors in on.items() if len(floors) != 1}
    assert not lost, f"put each of {lost} on one floor, in pyproject.toml and in CONTRIBUTING.md"


def test_the_drawing_is_the_contract():
    text = (TOP / "CONTRIBUTING.md").read_text()
    drawing = re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]
    drawn = [re.split(r"\s{2,}", line)[-1].split(", ") for line in drawing.splitlines()]
    for ours, theirs in itertools.zip_longest(drawn, floors()):
        assert ours == theirs, f"CONTRIBUTING.md draws {ours} where pyproject.toml has {theirs}"
