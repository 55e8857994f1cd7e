"""The Hugging Face Hub by its client, `huggingface_hub`, which is imported where it is used.

The client's cache, tokens, endpoint and offline mode (``HF_HUB_OFFLINE``) mean here what they mean there. Its errors
become one of jlora's, which says what was looked for, where, and how to mend it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

_NAME = re.compile(r"\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)
_FORBIDDEN = re.compile(r"--|\.\.|\.git$")
_HTTP = ("httpx2", "httpx", "requests")  # what the client's versions ask with
LOG_IN = "log in with hf auth login, set HF_TOKEN, or give token="


def is_name(text: str) -> bool:
    """Whether a text can be the name of a repository on the Hub, by the Hub's rules.

    Example:
      >>> [is_name(text) for text in ("org/name", "name", "./org/name", "org/name/file", "org/a..b")]
      [True, False, False, False, False]
    """
    return bool(_NAME.fullmatch(text)) and not _FORBIDDEN.search(text)


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of models on the Hub, and how it is asked for.

    Args:
      name: ``"org/name"``.
      revision: a branch, a tag or a commit; None: the main branch.
      token: of an account; None or True: that of the login, or of ``HF_TOKEN``; False: none.
      cache_dir: of downloads; None: that of all of the client's users.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None

    def fetched(self, names: Sequence[str], ignored: Sequence[str] = ()) -> Path:
        """The directory of the cache with those files of the repository that match patterns, of one commit.

        Raises:
          OSError: if the Hub has no such repository or revision, does not give it, or can't be asked.
          ImportError: if the client is not installed.
        """
        hub = client(f"{self.name} is no file or directory here; to look for it on the Hub")
        with self._errors():
            at = hub.snapshot_download(
                self.name,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                allow_patterns=[*names],
                ignore_patterns=[*ignored],
                library_name="jlora",
            )
        return Path(at)

    def files(self) -> list[str] | None:
        """The names of all files in the repository; None where the Hub can't be asked."""
        try:
            with self._errors():
                return client().HfApi(token=self.token).list_repo_files(self.name, revision=self.revision)
        except OSError:
            return None

    def uploaded(self, directory: Path, names: Sequence[str], private: bool | None, message: str) -> str:
        """The address of the repository after an upload of files, in one commit.

        The repository is made if it is not there, and so is a branch that `revision` names.

        Raises:
          OSError: if the Hub does not take it, or can't be asked.
          ImportError: if the client is not installed.
        """
        api = client(f"To upload {directory}").HfApi(token=self.token, library_name="jlora")
        with self._errors(is_upload=True):
            url = str(api.create_repo(self.name, private=private, exist_ok=True))
            if self.revision is not None and not self.revision.startswith("refs/"):
                api.create_branch(self.name, branch=self.revision, exist_ok=True)
            api.upload_folder(
                repo_id=self.name,
                folder_path=directory,
                allow_patterns=[*names],
                revision=self.revision,
                commit_message=message,
            )
        return url if self.revision is None else f"{url}/tree/{self.revision}"

    @contextmanager
    def _errors(self, is_upload: bool = False) -> Iterator[None]:
        """Errors of the client, as jlora's."""
        from huggingface_hub import errors

        try:
            yield
        except Exception as error:
            is_around = isinstance(
                error, (RuntimeError, errors.LocalEntryNotFoundError)
            )  # a RuntimeError: of an upload
            cause = error.__cause__ if is_around and _is_of_hub(error.__cause__) else error
            if not _is_of_hub(cause):
                raise
            raise (self._not_uploaded(cause) if is_upload else self._not_fetched(cause)) from error

    def _not_fetched(self, error: BaseException) -> OSError:
        from huggingface_hub import constants, errors

        url, cache = f"{constants.ENDPOINT}/{self.name}", self.cache_dir or constants.HF_HUB_CACHE
        of = self.name if self.revision is None else f"{self.name} at {self.revision!r}"
        match error:
            case errors.GatedRepoError():
                return PermissionError(
                    f"{self.name} on the Hub is gated: its owners grant access to its files. Ask for it at {url}; then "
                    f"{LOG_IN}"
                )
            case errors.RepositoryNotFoundError():
                return FileNotFoundError(
                    f"{self.name} is no file or directory here, and the Hub has no repository of that name, or a "
                    f"private one, for which it wants another token ({url}). Check the name; for a private one {LOG_IN}"
                )
            case errors.RevisionNotFoundError():
                return FileNotFoundError(
                    f"{self.name} on the Hub has no revision {self.revision!r}; its branches, tags and commits are at "
                    f"{url}/tree/main"
                )
            case errors.LocalTokenNotFoundError():
                return PermissionError(f"{self.name}: token=True is the token of a login, and there is none; {LOG_IN}")
            case errors.HfHubHTTPError() if _status(error) in (401, 403):
                return PermissionError(
                    f"{self.name} on the Hub is not given for this token ({_line(error)}); {LOG_IN} that reads {url}"
                )
        if constants.HF_HUB_OFFLINE:
            return FileNotFoundError(
                f"{self.name} is no file or directory here, and the cache {cache} lacks files of {of}, which "
                "HF_HUB_OFFLINE keeps from being downloaded; unset it, or fetch them before on a machine that may"
            )
        return ConnectionError(
            f"{self.name} is no file or directory here, the Hub at {constants.ENDPOINT} can't be asked for it "
            f"({_line(error)}), and the cache {cache} lacks files of {of}; check the connection, and try again"
        )

    def _not_uploaded(self, error: BaseException) -> OSError:
        from huggingface_hub import constants, errors

        status = _status(error)
        if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
            return PermissionError(
                f"peft.push: the Hub takes nothing into {self.name} with this token ({_line(error)}); {LOG_IN}, of an "
                "account that may write there"
            )
        if status is not None and status < 500:
            return OSError(f"peft.push: the Hub does not take the adapter into {self.name}: {_line(error)}")
        offline = "; HF_HUB_OFFLINE is set: unset it" if constants.HF_HUB_OFFLINE else "; push it again"
        return ConnectionError(
            f"peft.push: the Hub at {constants.ENDPOINT} can't be asked to take {self.name} ({_line(error)}){offline}"
        )


def client(purpose: str = "For the Hub") -> Any:
    """The module `huggingface_hub`.

    Raises:
      ImportError: if it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(f'{purpose}, huggingface_hub is needed: pip install "jlora[hub]"') from None
    return huggingface_hub


def _is_of_hub(error: BaseException | None) -> TypeGuard[BaseException]:
    """Whether an error is of the client, or of the library by which it asks."""
    from huggingface_hub import errors

    asked = (kind for kind in errors.HfHubHTTPError.__mro__ if kind.__module__.partition(".")[0] in _HTTP)
    missed = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.LocalTokenNotFoundError)
    return isinstance(error, (*asked, *missed))


def _status(error: BaseException) -> int | None:
    """The status of the Hub's answer, if it gave one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _line(error: BaseException) -> str:
    """What an error says, as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
