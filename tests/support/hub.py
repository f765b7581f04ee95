"""A stand-in for the hub's HTTP API on 127.0.0.1, as the real client (`huggingface_hub`) speaks it: repositories, large files, commits, listings, downloads.

What it answers was written down from the client's own requests and checks. A repository's name asks for a fault: ``fails-<step>-<status>`` answers that step with the status,
``breaks-<step>`` closes the connection in the middle of it, ``lies-<what>`` does something else than it says. Large files come as clients before Xet send them (HF_HUB_DISABLE_XET), or as
`hf_xet` does, to the store below ``/cas``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

from support import xet

TOKEN = "hf_standinTOKENstandinTOKENstandin"
XET_TOKEN = "xetStandinTokenXetStandinToken"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, dict[str, bytes | str]]] = field(default_factory=list)
    """(sha, name -> bytes, or the SHA-256 of a large file)"""
    messages: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    def commit(self, files: dict[str, bytes | str], message: str) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((sha, files))
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes | str]]:
        return self.commits[-1] if revision == "main" else next(row for row in self.commits if row[0] == revision)


class Hub(ThreadingHTTPServer):
    """``url`` for HF_ENDPOINT. Everything that came in is in ``repositories`` and ``objects`` (SHA-256 -> bytes); ``asked`` are the requests, as ``METHOD path``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.store = xet.Store()
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def create(self, repo: str, private: bool = True, files: dict[str, bytes] | None = None) -> Repository:
        made = Repository(private)
        made.commit({".gitattributes": ATTRIBUTES} | (files or {}), "initial commit")
        self.repositories[repo] = made
        return made

    def content(self, repo: str, name: str, revision: str = "main") -> bytes:
        held = self.repositories[repo].at(revision)[1][name]
        return held if isinstance(held, bytes) else self.objects[held]

    def handle_error(self, *_: Any) -> None:
        """A client that goes away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    # the ways

    def _answer(self, method: str) -> None:
        address = urlparse(self.path)
        self.place, self.read = unquote(address.path), False
        with self.server.lock:
            self.server.asked.append(f"{method} {self.place}")
        for pattern, step, answer in WAYS:
            if found := re.fullmatch(pattern, f"{method} {self.place}"):
                wanted = XET_TOKEN if step in ("xorb", "shard") else TOKEN
                if step != "put" and self.headers.get("Authorization") != f"Bearer {wanted}":
                    return self._json(401, {"error": "Invalid credentials in Authorization header"})
                if self._fault(step, found.groupdict().get("repo") or found.groupdict().get("name") or ""):
                    return None
                return answer(self, **found.groupdict())
        return self._json(404, {"error": f"the stand-in does not know {method} {self.place}"})

    def _fault(self, step: str, repo: str) -> bool:
        name = repo.rpartition("/")[2]
        if name == f"breaks-{step}":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            self.connection.close()
            self.close_connection = True
            return True
        if failing := re.fullmatch(rf"fails-{step}-(\d+)", name):
            self._json(int(failing[1]), {"error": f"no {step} \x1b[31mtoday"})
            return True
        return False

    def whoami(self) -> None:
        self._json(200, {"name": "standin", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def yaml(self) -> None:
        self._body()
        self._json(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self._body())
        repo = f"{asked['organization']}/{asked['name']}"
        if self._fault("create", repo):
            return
        if repo in self.server.repositories:
            return self._json(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.create(repo, private and not repo.endswith("lies-private"))
        self._json(200, {"url": f"{self.server.url}/{repo}", "name": repo, "id": "0"})

    def info(self, repo: str, revision: str = "main") -> None:
        held = self.server.repositories.get(repo)
        if held is None:
            return self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        sha, files = held.at(revision)
        self._json(200, {"id": repo, "modelId": repo, "sha": sha, "private": held.private, "tags": [], "downloads": 0, "siblings": [self._sibling(name, kept) for name, kept in sorted(files.items())]})

    def _sibling(self, name: str, kept: bytes | str) -> dict[str, Any]:
        if isinstance(kept, bytes):
            return {"rfilename": name, "size": len(kept), "blobId": blob(kept)}
        size = len(self.server.objects[kept])
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{kept}\nsize {size}\n".encode()
        return {"rfilename": name, "size": size, "blobId": blob(pointer), "lfs": {"sha256": kept, "size": size, "pointerSize": len(pointer)}}

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self._body())["files"]
        self._json(200, {"files": [{"path": row["path"], "uploadMode": "lfs" if row["path"].endswith(".safetensors") or row["size"] > 10_000_000 else "regular", "shouldIgnore": False, "oid": None} for row in files]})

    def batch(self, repo: str) -> None:
        asked = json.loads(self._body())
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256" and "basic" in asked["transfers"]
        rows = []
        for row in asked["objects"]:
            there = row["oid"] in self.server.objects and not repo.rpartition("/")[2].startswith(("fails-put", "breaks-put"))
            links = {"upload": {"href": f"{self.server.url}/put/{repo}/{row['oid']}"}, "verify": {"href": f"{self.server.url}/there/{repo}/{row['oid']}"}}
            rows.append({"oid": row["oid"], "size": row["size"], "authenticated": True} | ({} if there else {"actions": links}))
        self._json(200, {"transfer": "basic", "objects": rows})

    def xet_token(self, repo: str, revision: str) -> None:
        self._json(200, {"casUrl": f"{self.server.url}/cas/{repo}", "exp": xet.EXPIRES, "accessToken": XET_TOKEN})

    def xorb(self, repo: str, name: str) -> None:
        self.server.store.block(name, self._body())
        self._json(200, {"was_inserted": True})

    def shard(self, repo: str) -> None:
        for oid, content in self.server.store.files(self._body()).items():
            if hashlib.sha256(content).hexdigest() != oid:
                return self._json(400, {"error": "these bytes have another SHA-256"})
            self.server.objects[oid] = content
        self._json(200, {"result": 1})

    def put(self, repo: str, oid: str) -> None:
        body = self._body()
        if hashlib.sha256(body).hexdigest() != oid:
            return self._json(400, {"error": "these bytes have another SHA-256"})
        self.server.objects[oid] = body
        self._json(200, {})

    def there(self, repo: str, oid: str) -> None:
        asked = json.loads(self._body())
        self._json(200 if len(self.server.objects.get(oid, b"")) == asked["size"] else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        rows = [json.loads(line) for line in self._body().splitlines()]
        held = self.server.repositories[repo]
        if repo.endswith("moves-meanwhile"):
            held.commit(dict(held.at("main")[1]), "somebody else's")
        header = rows[0]["value"]
        if header.get("parentCommit") not in (None, held.head):
            return self._json(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(held.at("main")[1])
        for row in rows[1:]:
            path = row["value"]["path"]
            if row["key"] == "file":
                files[path] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "lfsFile":
                if row["value"]["oid"] not in self.server.objects:
                    return self._json(400, {"error": "a large file was not uploaded"})
                files[path] = row["value"]["oid"]
            elif row["key"] == "deletedFile":
                del files[path]
        if repo.endswith("lies-config"):
            files["config.json"] = files["config.json"].replace(b"{", b"{ ", 1)
        sha = held.commit(files, header["summary"])
        self._json(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "hookOutput": "", "pullRequestUrl": None})

    def tree(self, repo: str, revision: str) -> None:
        _, files = self.server.repositories[repo].at(revision)
        rows = []
        for name, kept in sorted(files.items()):
            row = self._sibling(name, kept)
            rows.append({"type": "file", "path": name, "size": row["size"], "oid": row["blobId"]} | ({"lfs": {"oid": kept, "size": row["size"], "pointerSize": row["lfs"]["pointerSize"]}} if "lfs" in row else {}))
        self._json(200, rows)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        sha, files = self.server.repositories[repo].at(revision)
        body = self.server.content(repo, name, revision)
        tag = files[name] if isinstance(files[name], str) else blob(body)
        self._bytes(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"})

    # the wire

    def _body(self) -> bytes:
        self.read = True
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        more = {"X-Error-Message": value["error"].replace("\x1b", "")} if isinstance(value, dict) and "error" in value else {}
        self._bytes(status, json.dumps(value).encode(), {"Content-Type": "application/json", **more, **(headers or {})})

    def _bytes(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if not self.read:  # what is left of a request on a connection that stays open is taken for the next one
            self._body()
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def blob(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = "(?P<repo>[^/]+/[^/]+)"
WAYS = (
    (r"GET /api/whoami-v2", "whoami", _Handler.whoami),
    (r"POST /api/validate-yaml", "yaml", _Handler.yaml),
    (r"POST /api/repos/create", "anything", _Handler.create),
    (rf"GET /api/models/{_REPO}", "info", _Handler.info),
    (rf"GET /api/models/{_REPO}/revision/(?P<revision>\w+)", "listing", _Handler.info),
    (rf"GET /api/models/{_REPO}/tree/(?P<revision>\w+)", "tree", _Handler.tree),
    (rf"POST /api/models/{_REPO}/preupload/(?P<revision>\w+)", "preupload", _Handler.preupload),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", "batch", _Handler.batch),
    (rf"GET /api/models/{_REPO}/xet-write-token/(?P<revision>\w+)", "token", _Handler.xet_token),
    (rf"POST /cas/{_REPO}/v1/xorbs/default/(?P<name>[0-9a-f]+)", "xorb", _Handler.xorb),
    (rf"POST /cas/{_REPO}/v1/shards", "shard", _Handler.shard),
    (rf"PUT /put/{_REPO}/(?P<oid>[0-9a-f]+)", "put", _Handler.put),
    (rf"POST /there/{_REPO}/(?P<oid>[0-9a-f]+)", "there", _Handler.there),
    (rf"POST /api/models/{_REPO}/commit/(?P<revision>\w+)", "commit", _Handler.commit),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<revision>\w+)/(?P<name>.+)", "resolve", _Handler.resolve),
)
