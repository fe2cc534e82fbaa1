"""A small model hub on this machine: folders served as hub repositories, for the libraries behind HF_ENDPOINT.

    with serve({"owner/model": folder, "datasets/owner/stories": other}) as hub:
        subprocess.run(..., env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": temporary})
    hub.requests  # [(method, path, status, bytes sent)]

huggingface_hub reads HF_ENDPOINT when it is imported, so the loading belongs in a process of its own.
"""

import hashlib
import json
import re
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"  # every repository has this one commit, called main
FILE = re.compile(r"/(?P<repo>(datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(
    r"/api/(models/|(?=datasets/))(?P<repo>(datasets/)?[^/]+/[^/]+)"
    r"(/(?P<ask>revision|tree|paths-info)/(?P<revision>[^/]+)(/(?P<path>.+))?)?"
)


@dataclass
class Hub:
    """Where the hub answers and what it was asked: (method, path, status, bytes of the body)."""

    url: str
    requests: list = field(default_factory=list)


@contextmanager
def serve(repos):
    """Serve `repos`, a dict from repository id ("datasets/owner/name" for data) to a folder, inside the block."""
    repos = {repo: Path(folder) for repo, folder in repos.items()}
    hub = Hub("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"repos": repos, "hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        size = int(self.headers.get("Content-Length") or 0)
        asked = json.loads(self.rfile.read(size) or "{}") if self.command == "POST" else None
        if match := FILE.fullmatch(path):
            self._file(**match.groupdict())
        elif match := API.fullmatch(path):
            self._api(asked, **match.groupdict())
        else:
            self._answer(404, b"{}")

    do_HEAD = do_POST = do_GET

    def _file(self, repo, revision, path):
        if not self._known(repo, revision):
            return
        file = self.repos[repo] / path
        if not file.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        size, start, stop, status = file.stat().st_size, 0, file.stat().st_size, 200
        headers = {"ETag": f'"{_entry(file, self.repos[repo])["oid"]}"', "X-Repo-Commit": COMMIT}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop, status = int(match[1]), min(int(match[2] or size), size - 1) + 1, 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with open(file, "rb") as content:
            content.seek(start)
            self._answer(status, content.read(stop - start), headers)

    def _api(self, asked, repo, ask, revision, path):
        if not self._known(repo, revision or "main"):
            return
        folder = self.repos[repo]
        entries = [_entry(file, folder) for file in sorted(folder.rglob("*"))]
        if ask == "tree":
            entries = [entry for entry in entries if entry["path"].startswith(f"{path}/" if path else "")]
            if entries:
                self._answer(200, json.dumps(entries).encode())
            else:
                self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif ask == "paths-info":
            entries = [entry for entry in entries if entry["path"] in asked["paths"]]
            self._answer(200, json.dumps(entries).encode())
        else:
            files = [{"rfilename": entry["path"]} for entry in entries if entry["type"] == "file"]
            about = {"id": repo.removeprefix("datasets/"), "sha": COMMIT, "private": False, "gated": False}
            about |= {"disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": files}
            self._answer(200, json.dumps(about).encode())

    def _known(self, repo, revision):
        """Whether there is such a repository and revision; if not, the answer is sent."""
        if repo in self.repos and revision in ("main", COMMIT):
            return True
        self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound" if repo in self.repos else "RepoNotFound"})
        return False

    def _answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in (*dict(headers).items(), ("Content-Length", len(body))):
            self.send_header(name, str(value))
        sent = b"" if self.command == "HEAD" else body
        self.hub.requests.append((self.command, self.path, status, len(sent)))
        with suppress(ConnectionError):  # a stream may be left before its end
            self.end_headers()
            self.wfile.write(sent)

    def log_message(self, *_):
        pass


def _entry(file, folder):
    """What the hub tells about a file or folder; oid must only change when the content does."""
    path, about = file.relative_to(folder).as_posix(), file.stat()
    if file.is_dir():
        return {"type": "directory", "path": path, "oid": COMMIT, "size": 0}
    oid = hashlib.sha1(f"{file} {about.st_size} {about.st_mtime_ns}".encode()).hexdigest()
    return {"type": "file", "path": path, "oid": oid, "size": about.st_size}
