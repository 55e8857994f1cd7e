"""The notebooks: short cells, outputs kept, every cell runs without a warning, every claim is asserted."""

import nbformat
import pytest

from tests.notebooks import FOLDER, run

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
MAX_LINES = 15


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def complaints(notebook):
    """What cells wrote to stderr, and errors."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def pictures(notebook):
    return [o for cell in code(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]


@every_notebook
def test_cells_are_short_and_their_outputs_are_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert max(len(cell.source.splitlines()) for cell in code(notebook)) <= MAX_LINES
    assert [cell.execution_count for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    assert not complaints(notebook)
    assert any("assert" in cell.source for cell in code(notebook))
    assert pictures(notebook)
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
@every_notebook
def test_runs(path):
    notebook = run(path, quick=True)
    assert not complaints(notebook)
    assert pictures(notebook)
