"""The part of the Hugging Face hub's HTTP API that pushing and downloading a drafter needs, on 127.0.0.1.

Written after what huggingface_hub 2.4 calls; large files travel by git-lfs, as they do where hf_xet is absent
or switched off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_rightToken"


def talk_to(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process's client talk to a hub, with a cache of its own and the right token."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{message}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class Hub:
    """`with Hub() as hub:` serves at `hub.url`; `hub.repositories` is what it holds."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        self.status, self.code, self.message, self.more = status, code, message, more


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        try:
            for allowed, pattern, name in _ROUTES:
                if method in allowed and (match := re.fullmatch(pattern, path)):
                    given = {key: unquote(value) for key, value in match.groupdict().items()}
                    self._check_token(method, given)
                    found = getattr(self, name)(**given)
                    break
            else:
                raise _Refused(404, "NoRoute", f"{method} {path}")
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            content = {"error": refused.message, **refused.more}
            self._send(refused.status, json.dumps(content).encode(), headers)
            return
        content, headers = found if isinstance(found, tuple) else (json.dumps(found).encode(), {})
        self._send(200, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _check_token(self, method: str, given: dict[str, str]) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        repository = self.hub.repositories.get(given.get("repo", ""))
        if token and token != TOKEN:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        if not token and "repo" in given and (repository is None or repository.private):
            raise _Refused(401, "RepoNotFound", "Repository not found")  # it does not say which
        if "repo" in given and repository is None:
            raise _Refused(404, "RepoNotFound", "Repository not found")
        if not token and method == "POST" and "storage" not in given:
            raise _Refused(401, "", "Invalid username or password.")

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self.hub.repositories[repo]
        sha = repository.resolve(revision)
        if sha is None:
            raise _Refused(404, "RevisionNotFound", "Invalid rev id")
        return sha, repository.commits[sha]

    def create(self) -> Any:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "others":
            raise _Refused(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.hub.repositories:
            raise _Refused(409, "", "You already created this model repo", url=f"{self.hub.url}/{name}")
        repository = Repository(asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.hub.repositories[name] = repository
        return {"url": f"{self.hub.url}/{name}", "name": name, "id": name}

    def info(self, repo: str, revision: str = "main") -> Any:
        sha, files = self._files(repo, revision)
        private = self.hub.repositories[repo].private
        siblings = [{"rfilename": path} for path in files]
        return {"id": repo, "modelId": repo, "sha": sha, "private": private, "tags": [], "siblings": siblings}

    def branch(self, repo: str, branch: str) -> Any:
        repository = self.hub.repositories[repo]
        if branch in repository.branches:
            raise _Refused(409, "", "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def tree(self, repo: str, revision: str) -> Any:
        _, files = self._files(repo, revision)
        return [_entry(path, content) for path, content in files.items()]

    def validate(self) -> Any:
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
        return {"errors": [], "warnings": []}

    def preupload(self, repo: str, revision: str) -> Any:
        asked = json.loads(self.body)["files"]
        mode = {True: "lfs", False: "regular"}
        return {
            "files": [
                {"path": f["path"], "uploadMode": mode[_is_large(f["path"])], "shouldIgnore": False}
                for f in asked
            ]
        }

    def lfs(self, repo: str) -> Any:
        asked = json.loads(self.body)
        assert asked["operation"] == "upload" and "basic" in asked["transfers"]
        objects = []
        for each in asked["objects"]:
            href = f"{self.hub.url}/storage/{each['oid']}"
            missing = each["oid"] not in self.hub.large
            objects.append({**each, **({"actions": {"upload": {"href": href}}} if missing else {})})
        return {"transfer": "basic", "objects": objects}

    def store(self, storage: str) -> Any:
        assert hashlib.sha256(self.body).hexdigest() == storage
        self.hub.large[storage] = self.body
        return {}

    def commit(self, repo: str, revision: str) -> Any:
        _, files = self._files(repo, revision)
        files, message = dict(files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.large[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = self.hub.repositories[repo].commit(revision, files, message)
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha}

    def file(self, repo: str, revision: str, path: str) -> Any:
        sha, files = self._files(repo, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        return files[path], {"ETag": f'"{_entry(path, files[path])["oid"]}"', "X-Repo-Commit": sha}


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".pt", ".bin"))


def _entry(path: str, content: bytes) -> dict[str, Any]:
    size = len(content)
    blob = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    if not _is_large(path):
        return {"type": "file", "path": path, "size": size, "oid": blob}
    oid = hashlib.sha256(content).hexdigest()
    lfs = {"oid": oid, "size": size, "pointerSize": 134}
    return {"type": "file", "path": path, "size": size, "oid": oid, "lfs": lfs}


_REPO = "(?P<repo>[^/]+/[^/]+?)"
_REVISION = "(?P<revision>[^/]+)"
_ROUTES = [
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("GET",), f"/api/models/{_REPO}", "info"),
    (("GET",), f"/api/models/{_REPO}/revision/{_REVISION}", "info"),
    (("GET",), f"/api/models/{_REPO}/tree/{_REVISION}", "tree"),
    (("POST",), f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", "branch"),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    (("POST",), f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs"),
    (("PUT",), "/storage/(?P<storage>[0-9a-f]+)", "store"),
    (("GET", "HEAD"), f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "file"),
]
