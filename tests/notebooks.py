"""Runs the notebooks: `python -m tests.notebooks notebooks/01_*.ipynb` runs them whole and keeps their outputs.

With `--quick`, the shorter run that the tests do, and nothing is kept.
"""

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
QUICK = "JLORA_QUICK"  # the variable that a notebook asks whether to take the shorter way
SETTINGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(FOLDER.parent), "PYTHONHASHSEED": "0"}


def run(path: Path, *, quick: bool) -> nbformat.NotebookNode:
    """Returns the notebook with what its cells print, run in a new process; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    before = dict(os.environ)
    os.environ.update(SETTINGS | ({QUICK: "1"} if quick else {}))
    try:
        NotebookClient(
            notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
        ).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return notebook


def lasting(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what differs from run to run: times, names of the machine's software."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    for path in given.notebooks:
        notebook = run(path.resolve(), quick=given.quick)
        if not given.quick:
            nbformat.write(lasting(notebook), path)
        print(path.name)


if __name__ == "__main__":
    main()
