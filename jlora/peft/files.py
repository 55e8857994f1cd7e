"""Files that appear whole or not at all.

What is written lies beside its place, locked, until it gets its name. A killed writer's lock goes with it: the next
that writes the same file deletes what is left of it, and nothing of one that is still at work.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows nothing tells what a killed writer has left
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed onto it at the end; gone if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path.parent, path.name)
    handle, aside = _claimed(path)
    try:
        yield aside
        aside.chmod(0o666 & ~_umask())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
        os.close(handle)


def clear(directory: Path, name: str) -> None:
    """Deletes what killed writers have left of files of this name, or of all that match a pattern."""
    for left in directory.glob(f".{name}.*"):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDWR)
            try:
                if _is_locked(handle):
                    left.unlink()
            finally:
                os.close(handle)


def _claimed(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, locked."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        _is_locked(handle)
        if Path(name).exists():  # another may have taken it for left over, before it was locked
            return handle, Path(name)
        os.close(handle)


def _is_locked(handle: int) -> bool:
    """Locks an open file, unless another has; where there are no locks it is as if another had."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def locked(directory: Path, shared: bool = False) -> Iterator[None]:
    """One writer in a directory at a time, and no reader meanwhile: several files are one whole. Leaves no file."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # where directories can't be locked
                handle = os.open(directory, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Writes a text, whole or not at all."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(text)
        flush(file)


def flush(file: Any) -> None:
    """Has the file's bytes on the disk before it is renamed."""
    file.flush()
    os.fsync(file.fileno())
