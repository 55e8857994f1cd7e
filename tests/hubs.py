"""A small Hub on the loopback: what `huggingface_hub` asks for on downloads and uploads, and a log of it."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "x" * 34


@dataclasses.dataclass
class Repository:
    """The files of each commit, and the commit of each branch."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Adds files to a branch; the name of the commit."""
        whole = {**self.files(branch), **files}
        told = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in whole.items()} | {"": branch})
        name = hashlib.sha1(told.encode()).hexdigest()
        self.commits[name], self.branches[branch] = whole, name
        return name

    def files(self, branch: str) -> dict[str, bytes]:
        return self.commits.get(self.branches.get(branch, ""), {})


class Hub:
    """Repositories, and what was asked: the names of files as ``files``, all requests as ``log``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.log: list[str] = []
        self.files: list[str] = []
        self.is_down = False

    def add(self, name: str, files: Mapping[str, bytes], **settings: bool) -> Repository:
        found = self.repositories.setdefault(name, Repository(**settings))
        found.commit(files)
        return found

    def forget(self) -> None:
        self.log.clear()
        self.files.clear()

    @contextlib.contextmanager
    def served(self) -> Iterator[str]:
        """The address at which it answers."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", told: str = "") -> None:
        self.status, self.code, self.told = status, code, told


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answered(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answered(self._post)

    def do_PUT(self) -> None:
        self._answered(self._put)

    def _answered(self, handle: Any) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        split = urlsplit(self.path)
        self.parts, self.query = unquote(split.path).strip("/").split("/"), parse_qs(split.query)
        self.hub.log.append(f"{self.command} {split.path}")
        try:
            if self.hub.is_down:
                raise _Refused(500, told="down")
            handle()
        except _Refused as refused:
            told = {"X-Error-Code": refused.code, "X-Error-Message": refused.told}
            self._send(
                json.dumps({"error": refused.told}).encode(), {n: x for n, x in told.items() if x}, refused.status
            )

    def _send(self, data: bytes, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, data: Any) -> None:
        self._send(json.dumps(data).encode(), {"Content-Type": "application/json"})

    @property
    def _is_known(self) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}"):
            raise _Refused(401, told="Invalid credentials in Authorization header")
        return given is not None

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._is_known):
            raise _Refused(404 if self._is_known else 401, "RepoNotFound", "Repository not found")
        return found

    def _commit(self, repository: Repository, revision: str) -> str:
        name = repository.branches.get(revision, revision)
        if name not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return name

    def _get(self) -> None:
        match self.parts:
            case ["api", "models", owner, name, *rest]:
                repository = self._repository(f"{owner}/{name}")
                what, revision = rest if rest else ("revision", "main")
                commit = self._commit(repository, revision)
                files = repository.commits[commit]
                if what == "tree":
                    self._json([{"type": "file", "path": n, "size": len(x), "oid": _oid(x)} for n, x in files.items()])
                else:
                    self._json(
                        {"id": f"{owner}/{name}", "sha": commit, "siblings": [{"rfilename": n} for n in files],
                         "private": repository.private, "gated": repository.gated, "tags": []}
                    )  # fmt: skip
            case [owner, name, "resolve", revision, *path]:
                repository, file = self._repository(f"{owner}/{name}"), "/".join(path)
                self.hub.files.append(file)
                if repository.gated and not self._is_known:
                    raise _Refused(403, "GatedRepo", "Access to model is restricted")
                commit = self._commit(repository, revision)
                if file not in repository.commits[commit]:
                    raise _Refused(404, "EntryNotFound", "Entry not found")
                data = repository.commits[commit][file]
                self._send(data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "none"})
            case _:
                raise _Refused(404, told=f"no such address: {self.path}")

    def _post(self) -> None:
        given = [json.loads(line) for line in self.body.splitlines()]
        match self.parts:
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case _ if not self._is_known:
                raise _Refused(401, told="Invalid username or password.")
            case ["api", "repos", "create"]:
                name = f"{given[0]['organization']}/{given[0]['name']}"
                if name.startswith("others/"):
                    raise _Refused(403, told="You don't have the rights to create a model under the namespace others")
                told = json.dumps({"url": f"http://{self.headers['Host']}/{name}"}).encode()
                if name in self.hub.repositories:
                    return self._send(told, status=409)
                is_private = given[0].get("private") or given[0].get("visibility") == "private"
                self.hub.add(name, {".gitattributes": b""}, private=bool(is_private))
                self._send(told)
            case ["api", "models", owner, name, "branch", branch]:
                repository = self._repository(f"{owner}/{name}")
                if branch in repository.branches:
                    raise _Refused(409, told="Reference already exists")
                repository.branches[branch] = repository.branches["main"]
                self._json({})
            case ["api", "models", owner, name, "preupload", revision]:
                self._commit(self._repository(f"{owner}/{name}"), revision)
                mode = lambda path: "lfs" if path.endswith(".safetensors") else "regular"
                told = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False}
                        for f in given[0]["files"]]  # fmt: skip
                self._json({"files": told})
            case [_, _, "info", "lfs", "objects", "batch"]:
                at = f"http://{self.headers['Host']}/uploads"
                told = [x | {"actions": {"upload": {"href": f"{at}/{x['oid']}"}}} for x in given[0]["objects"]]
                self._json({"transfer": "basic", "objects": told})
            case ["api", "models", owner, name, "commit", branch]:
                changes = [line["value"] for line in given if line["key"] != "header"]
                files = {x["path"]: base64.b64decode(x["content"]) if "content" in x else self.hub.uploads[x["oid"]]
                         for x in changes}  # fmt: skip
                commit = self._repository(f"{owner}/{name}").commit(files, branch)
                url = f"http://{self.headers['Host']}/{owner}/{name}/commit/{commit}"
                self._json({"commitUrl": url, "commitOid": commit, "hookOutput": "", "success": True})
            case _:
                raise _Refused(404, told=f"no such address: {self.path}")

    def _put(self) -> None:
        match self.parts:
            case ["uploads", oid] if hashlib.sha256(self.body).hexdigest() == oid:
                self.hub.uploads[oid] = self.body
                self._send(b"")
            case _:
                raise _Refused(400, told="not what was announced")


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
