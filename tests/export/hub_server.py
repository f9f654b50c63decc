"""A local stand-in of the Hugging Face hub, for its real client: create, upload, download.

It stores repositories in a folder and knows one revision, `main`. It answers the requests that the
client sends for small files, and no others.
"""

import base64
import json
import re
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    root: Path
    requests: list[str]

    def do_POST(self):
        path = urlsplit(self.path).path
        self.requests.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            given = json.loads(body)
            name = "/".join(filter(None, (given.get("organization") or "me", given["name"])))
            (self.root / name).mkdir(parents=True, exist_ok=True)
            self.reply({"url": f"{self.address}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self.reply({"files": files})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = self.root / found[1] / entry["value"]["path"]
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            url = f"{self.address}/{found[1]}/commit/{COMMIT}"
            self.reply({"commitUrl": url, "commitOid": COMMIT, "success": True})
        else:
            self.reply({"error": f"no answer to POST {path}"}, 404)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if found and (file := self.root / found[1] / found[2]).is_file():
            data = file.read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data).hexdigest()}"'}
            self.send(200, data, "application/octet-stream", headers)
        elif path == "/api/whoami-v2":
            self.reply({"name": "me", "type": "user", "orgs": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            self.reply({"id": found[1], "sha": COMMIT, "siblings": []})
        else:
            missing = "RepoNotFound" if not found else "EntryNotFound"
            self.send(404, b"", "text/plain", {"X-Error-Code": missing})

    do_HEAD = do_GET  # noqa: N815

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def reply(self, value, status=200):
        self.send(status, json.dumps(value).encode(), "application/json", {})

    def send(self, status, data, kind, headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder: Path):
    """Serve the repositories in a folder; yields the address and the list of requests."""
    handler = type("Handler", (Handler,), {"root": folder, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
