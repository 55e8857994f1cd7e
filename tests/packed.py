"""``python -m tests.packed DIST``: what was built in DIST holds the library whole, and nothing that is not its own."""

import sys
import tarfile
import zipfile
from pathlib import Path

import jlora

ROOT = Path(__file__).parents[1]


def library() -> set[str]:
    """The files of the package, as they stand in the checkout."""
    files = (path for path in (ROOT / "jlora").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in files}


def check_wheel(path: Path) -> None:
    names = set(zipfile.ZipFile(path).namelist())
    about = f"jlora-{jlora.__version__}.dist-info/"
    strangers = {name for name in names if not name.startswith(("jlora/", about))}
    assert not strangers, f"{path.name} holds what is not the library: {sorted(strangers)}"
    code = {name for name in names if name.startswith("jlora/")}
    assert code == library(), f"{path.name} and the checkout differ: {sorted(code ^ library())}"
    assert f"{about}licenses/LICENSE" in names, f"{path.name} has no licence"


def check_sdist(path: Path) -> None:
    root = f"jlora-{jlora.__version__}/"
    with tarfile.open(path) as archive:
        names = {name.removeprefix(root) for name in archive.getnames()}
    missing = (library() | {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "tests/test_laws.py"}) - names
    assert not missing, f"{path.name} lacks {sorted(missing)}"
    built = {name for name in names if name.startswith(("docs/_build", "runs", ".venv")) or name.endswith(".pyc")}
    assert not built, f"{path.name} holds what was built: {sorted(built)[:5]}"


def main(folder: Path) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
