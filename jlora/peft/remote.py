"""Adapters and models by path or by name: which files of a repository on the Hub they need, and which are uploaded.

A path that exists is always meant as one; a name of the Hub is ``org/name``. Pickles are never downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jlora.peft import mlx
from jlora.peft.card import CARD
from jlora.peft.files import locked
from jlora.peft.foreign import SINGLE as DIFFUSERS
from jlora.peft.hub import Repository, is_name
from jlora.peft.invocation import ANY
from jlora.peft.models import INDEX, SINGLE, shards_of
from jlora.peft.read import PICKLE, check_there, read
from jlora.peft.settings import CONFIG, WEIGHTS, beside
from jlora.peft.tensors import TensorFile, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TENSORS = tuple(name for name in (WEIGHTS, mlx.WEIGHTS, *DIFFUSERS) if not name.endswith(PICKLES))


def adapter_at(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Where an adapter lies: the path that was given, or the cache's copy of a repository's adapter.

    Args:
      source: a path, or ``"org/name"`` where there is no such path. A `Path` is never a name.
      revision: a branch, a tag or a commit of the repository.
      token: for the Hub.
      cache_dir: for downloads.

    Raises:
      OSError: if it is neither, or the Hub does not give it.
      ValueError: if a path has a revision, or a repository its weights as a pickle only.
      ImportError: if the Hub's client is needed, and not installed.
    """
    repository = _repository(source, revision, token, cache_dir)
    if repository is None:
        return Path(source)
    at = repository.fetched([CONFIG, *TENSORS])
    there = [name for name in (CONFIG, *TENSORS) if (at / name).is_file()]
    if not {*there} & {*TENSORS}:
        raise _lacking(repository, at, WEIGHTS, "hf download {0} --local-dir IT && jlora convert IT OUT --to peft")
    if CONFIG not in there and {*there} & {WEIGHTS, mlx.WEIGHTS}:
        raise _lacking(repository, at, CONFIG, "")
    return at


def model_at(
    source: str | Path,
    *,
    others: Sequence[str] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Where a model's safetensors lie: the path that was given, or the cache's copy of a repository's model.

    Args:
      source: as of `adapter_at`.
      others: ends of the names of files that are wanted beside the weights, such as ``".json"``.
      revision: as of `adapter_at`.
      token: as of `adapter_at`.
      cache_dir: as of `adapter_at`.

    Raises: as `adapter_at` does.
    """
    repository = _repository(source, revision, token, cache_dir)
    if repository is None:
        return Path(source)
    at = repository.fetched([INDEX, *(f"*{end}" for end in others)], ignored=["*/*"])
    names = sorted({*shards_of(at).values()}) if (at / INDEX).is_file() else [SINGLE]
    commit = Repository(repository.name, at.name, token, cache_dir)
    at = commit.fetched(names)
    if gone := [name for name in names if not (at / name).is_file()]:
        out = "open it in Transformers and write safetensors by save_pretrained, or look for a revision that has them"
        raise _lacking(commit, at, gone[0], out)
    return at


def push(
    directory: str | Path,
    name: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a saved adapter to the Hugging Face Hub: its safetensors, its settings and its card, in one commit.

    The repository is made if it is not there. No other file of the directory is uploaded::

        jlora.peft.save("adapter", tree)
        url = jlora.peft.push("adapter", "org/name", private=True)

    Args:
      directory: which `jlora.peft.save`, or PEFT, has written.
      name: of the repository, ``"org/name"``.
      token: of an account that may write there; None: that of the login (``hf auth login``), or of ``HF_TOKEN``.
      revision: a branch, which is made if it is not there; None: the main branch.
      private: whether a repository that is made is private; None: as its owner has it by default.
      commit_message: of the upload; None: one that names jlora.

    Returns:
      The address of the repository, or of the branch in it.

    Raises:
      FileNotFoundError: if the directory holds no adapter.
      ValueError: if its files are none that can be read, or of two saves, or the name is none of the Hub's.
      OSError: if the Hub does not take it, or can't be asked.
      ImportError: if ``huggingface_hub`` is not installed: ``pip install ".[hub]"``.

    Example:
      What can't be uploaded is refused before the Hub is asked:

      >>> import jlora
      >>> jlora.peft.push("adapter", "name")
      Traceback (most recent call last):
      ValueError: peft.push: 'name' is no name of a repository on the Hub; expected is org/name
    """
    directory = Path(directory)
    if not is_name(name):
        raise ValueError(f"peft.push: {name!r} is no name of a repository on the Hub; expected is org/name")
    check_there(directory)
    message = commit_message or "Upload an adapter by jlora"
    with locked(directory, shared=True):
        _check_whole(directory)
        return Repository(name, revision, token).uploaded(directory, [CONFIG, WEIGHTS, CARD], private, message)


def _repository(
    source: str | Path, revision: str | None, token: str | bool | None, cache_dir: str | Path | None
) -> Repository | None:
    """The repository that a name is of; None for a path."""
    if isinstance(source, os.PathLike) or Path(source).exists():
        if revision is not None:
            raise ValueError(f"{source} is a path here, which has no revisions; {revision!r} is one of a repository")
        return None
    if not is_name(source):
        raise FileNotFoundError(
            f"{source} is no directory or file here, and no name of a repository on the Hub, which is org/name; check "
            "the path, or give the whole name"
        )
    return Repository(source, revision, token, cache_dir)


def _lacking(repository: Repository, at: Path, wanted: str, way: str) -> Exception:
    """What is there in place of a file that was not downloaded.

    Args:
      repository: whose.
      at: the directory of the cache, which has the name of a commit.
      wanted: the file.
      way: what to do about a pickle, with the repository's name for ``{0}``.
    """
    commit = Repository(repository.name, at.name, repository.token, repository.cache_dir)
    where = f"{repository.name} on the Hub, at {at.name[:12]},"
    names = commit.files()
    if names is None:
        return FileNotFoundError(
            f"the cache {at} has no {wanted}, and the Hub can't be asked for it now; go online, or fetch it before"
        )
    if wanted in names:
        return FileNotFoundError(f"{where} has {wanted}, but the cache {at} does not; go online, and try again")
    if wanted != CONFIG and (pickles := [name for name in names if name.endswith(PICKLES)]):
        return ValueError(
            f"{where} has {pickles[0]} and no {wanted}: a pickle, which is a program, and is not downloaded. Ask its "
            f"owners for safetensors, or {way.format(repository.name)}"
        )
    within = [name.removesuffix(f"/{wanted}") for name in names if name.endswith(f"/{wanted}")]
    hint = f"; there is one in {', '.join(within[:5])}: download that folder, and give its path" if within else ""
    return FileNotFoundError(f"{where} has no {wanted}; it has {', '.join(names[:8]) or 'no files'}{hint}")


def _check_whole(directory: Path) -> None:
    """Refuses to upload what can't be loaded again."""
    if not (directory / WEIGHTS).is_file() and (directory / PICKLE).is_file():
        raise FileNotFoundError(
            f"peft.push: {directory} has {PICKLE}, a pickle, and no {WEIGHTS}; make safetensors of it: "
            "jlora convert DIRECTORY OUT --to peft"
        )
    read(directory, allow_nonfinite=True, invocation=ANY)
    if beside(TensorFile(directory / WEIGHTS)) != read_json(directory / CONFIG):
        raise ValueError(
            f"peft.push: {directory / CONFIG} is of an earlier save than {WEIGHTS}, which was cut off; save it again"
        )
