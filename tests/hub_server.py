"""A Hugging Face Hub on loopback, in memory, that can be told to fail: what the tests publish to and load from.

It answers what huggingface_hub, transformers and datasets ask when they create a repository, commit files (small ones
inside the commit, large ones by Git LFS before it) and download them again. One branch, no xet, no pull requests.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPO = r"(?:(?P<kind>models|datasets|spaces)/)?(?P<id>[^/]+/[^/]+?)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<digest>\w+)", "lfs_upload"),
    ("POST", r"/lfs/verify", "lfs_verify"),
    ("POST", rf"/api/{REPO}/commit/(?P<revision>.+)", "commit"),
    ("POST", rf"/api/{REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)/?(?P<path>.*)", "tree"),
    ("GET", rf"/api/{REPO}(?:/revision/(?P<revision>.+))?", "info"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".png")


@dataclass
class Repo:
    """A repository: its commits, oldest first."""

    private: bool
    commits: list[dict] = field(default_factory=list)
    """Each with `sha`, `title` and `files`, path to the blob's digest."""


class HubServer(ThreadingHTTPServer):
    """The Hub at `url`. Who does not send `token` is turned away.

    Attributes:
        repos: by kind and id, ("models", "me/tiny"). blobs: content by digest. requests: "POST /api/repos/create", ...
        fault: from "METHOD /path" to what goes wrong with that request:
            None, "refuse" (403), "error" (500), "drop" (no answer), "stall" (none for `stall_s`), "cut" (half a body).
    """

    daemon_threads = True

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.fault: Callable[[str], str | None] = lambda request: None
        self.stall_s = 20.0
        self.released = threading.Event()  # ends every stall
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes a fresh process use this Hub."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}

    def files(self, repo_id: str, kind: str = "models") -> dict[str, bytes]:
        """What a repository's newest commit holds."""
        return {path: self.blobs[digest] for path, digest in self.repos[kind, repo_id].commits[-1]["files"].items()}

    def handle_error(self, request, client_address):
        pass  # clients that are killed, or cut off on purpose


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def answer(self):
        url = urlsplit(self.path)
        path, method = unquote(url.path), "GET" if self.command == "HEAD" else self.command
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if method != "GET" else b""
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        self.fault = self.server.fault(request)
        if self.fault == "stall":
            self.server.released.wait(self.server.stall_s)
        if self.fault in ("stall", "drop"):
            self.close_connection = True
            return
        if self.fault == "error":
            return self.send(500, {"error": "Internal Error"})
        sent = self.headers.get("Authorization", "")
        if self.fault == "refuse" or (sent != f"Bearer {self.server.token}" and not path.startswith("/lfs/")):
            return self.send(403, {"error": f"Forbidden: {sent}"}, **{"X-Error-Message": f"Forbidden: {sent}"})
        for allowed, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if allowed == method and match:
                parts = match.groupdict()
                key = (parts.pop("kind", None) or "models", parts.pop("id", None))
                repo = self.server.repos.get(key)
                if key[1] is not None and repo is None:
                    return self.missing("Repo")
                with self.server.lock:
                    return getattr(self, name)(**({} if key[1] is None else {"key": key, "repo": repo}), **parts)
        self.missing("Entry")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if not isinstance(content, bytes):
            headers["Content-Type"] = "application/json"
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    def missing(self, what: str, **headers):
        self.send(404, {"error": f"{what} not found"}, **{"X-Error-Code": f"{what}NotFound"}, **headers)

    def log_message(self, *arguments):
        pass

    def whoami(self):
        self.send(200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate(self):
        self.send(200, {"errors": [], "warnings": []})

    def create(self):
        wanted = json.loads(self.body)
        kind, repo_id = f"{wanted.get('type') or 'model'}s", f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        address = f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        new = (kind, repo_id) not in self.server.repos
        if new:
            first = {"sha": hashlib.sha1(repo_id.encode()).hexdigest(), "title": "initial commit", "files": {}}
            self.server.repos[kind, repo_id] = Repo(private, [first])
        self.send(200 if new else 409, {"url": address, "name": repo_id, "id": repo_id})

    def preupload(self, key, repo, revision):
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send(200, {"files": modes})

    def lfs_batch(self, key, repo):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.blobs:
                place = f"{self.server.url}/lfs"
                entry["actions"] = {
                    "upload": {"href": f"{place}/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{place}/verify", "header": {}},
                }
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, digest):
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self.send(400, {"error": "not what was announced"})
        self.server.blobs[digest] = self.body
        self.send(200)

    def lfs_verify(self):
        self.send(200, {})

    def commit(self, key, repo, revision):
        files, title = dict(repo.commits[-1]["files"]), ""
        for line in filter(None, self.body.decode().splitlines()):
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                title = value["summary"]
            elif kind == "file":
                content = base64.b64decode(value["content"])
                digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.server.blobs[digest] = content
                files[value["path"]] = digest
            elif kind == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.send(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = value["oid"]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
        sha = hashlib.sha1(json.dumps([repo.commits[-1]["sha"], title, files], sort_keys=True).encode()).hexdigest()
        repo.commits.append({"sha": sha, "title": title, "files": files})
        self.send(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{key[1]}/commit/{sha}"})

    def at(self, repo: Repo, revision: str | None) -> dict | None:
        """The commit of a revision."""
        return next((c for c in reversed(repo.commits) if revision in (None, "main", c["sha"])), None)

    def entry(self, path: str, digest: str) -> dict:
        size = len(self.server.blobs[digest])
        lfs = {"lfs": {"oid": digest, "size": size, "pointerSize": 130}} if len(digest) == 64 else {}
        return {"type": "file", "path": path, "size": size, "oid": digest, **lfs}

    def info(self, key, repo, revision):
        commit = self.at(repo, revision)
        if commit is None:
            return self.missing("Revision")
        siblings = [{"rfilename": path} for path in commit["files"]]
        about = {"id": key[1], "sha": commit["sha"], "private": repo.private, "siblings": siblings}
        self.send(200, about | {"_id": "0", "modelId": key[1], "tags": [], "downloads": 0, "likes": 0, "gated": False})

    def paths_info(self, key, repo, revision):
        text = self.body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        files = self.at(repo, revision)["files"]
        self.send(200, [self.entry(path, files[path]) for path in paths if path in files])

    def tree(self, key, repo, revision, path):
        prefix = f"{path.strip('/')}/" if path.strip("/") else ""
        commit = self.at(repo, revision)
        if commit is None:
            return self.missing("Revision")
        found = [self.entry(name, digest) for name, digest in commit["files"].items() if name.startswith(prefix)]
        if prefix and not found:
            return self.missing("Entry")
        if self.query.get("recursive", "").lower() not in ("1", "true"):
            inside = {entry["path"].removeprefix(prefix).partition("/")[::2]: entry for entry in found}
            folders = sorted({name for name, rest in inside if rest})
            found = [entry for (_, rest), entry in inside.items() if not rest]
            found += [{"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in folders]
        self.send(200, found)

    def resolve(self, key, repo, revision, path):
        commit = self.at(repo, revision)
        if commit is None:
            return self.missing("Revision")
        headers = {"X-Repo-Commit": commit["sha"], "Accept-Ranges": "bytes"}
        digest = commit["files"].get(path)
        if digest is None:
            return self.missing("Entry", **headers)
        data = self.server.blobs[digest]
        headers["ETag"] = f'"{digest}"'
        if len(digest) == 64:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        if self.command == "HEAD":
            return self.send(200, **headers, **{"Content-Length": str(len(data))})
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.send(200, data, **headers)
        first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(206, data[first : last + 1], **headers)
