"""A small imitation of the Hugging Face hub on the loopback address, with faults on demand.

It speaks as much of the hub's API as its real clients ask of it: what a repository holds, where a
file is, and ranges of files, which large files serve from another address, as the hub's do.
"""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves folder/{datasets,models}/OWNER/NAME.

    `faults` are dicts: `match` (a pattern of "METHOD path"), `times`, perhaps how many requests to
    `skip` before, and one of `status` (an answer without content, perhaps with `headers`), `drop`
    (the connection breaks after so many bytes), `short` (the file lacks so many bytes), `stall`
    (seconds before an answer). `sent` counts the bytes of files.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.sent, self.requests = folder, [], 0, []
        self.lock, self.digests, self.commit = threading.Lock(), {}, COMMIT
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def sha256(self, path):
        if path not in self.digests:
            self.digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return self.digests[path]

    def handle_error(self, request, client_address):
        pass  # a client that is gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer takes 40 ms

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        fault = {}
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
            for rule in hub.faults:
                if rule["times"] and re.search(rule["match"], f"{self.command} {path}"):
                    if rule.get("skip"):
                        rule["skip"] -= 1
                        continue
                    rule["times"] -= 1
                    fault = rule
                    break
        time.sleep(fault.get("stall", 0))
        if "status" in fault:
            return self.answer(fault["status"], **fault.get("headers", {}))
        if match := re.match(r"/cdn/(.*)", path):
            return self.send_file(hub.folder / match[1], fault)
        if match := re.match(r"/api/(datasets/[^/]+/[^/]+|models/[^/]+/[^/]+)/?(.*)", path):
            return self.describe(hub.folder / match[1], match[2])
        if match := re.match(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.*)", path):
            folder = hub.folder / (match[1] or "models") / match[2]
            return self.resolve(folder, folder / match[3], fault)
        self.answer(404)

    do_HEAD = do_GET

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.answer(404)

    def answer(self, status, content=None, **headers):
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def describe(self, folder, what):
        """What a repository holds: as a whole, or of one of its folders."""
        if not folder.is_dir():
            return self.answer(404, X_Error_Code="RepoNotFound")
        if what.startswith("tree/"):
            sub = folder / what.split("/", 2)[2] if what.count("/") > 1 else folder
            return self.answer(200, [self.entry(folder, path) for path in sorted(sub.glob("*"))])
        files = [self.entry(folder, p) for p in sorted(folder.rglob("*")) if p.is_file()]
        siblings = [dict(file, rfilename=file["path"]) for file in files]
        for file in siblings:
            file["lfs"] = dict(sha256=file["lfs"]["oid"], size=file["size"], pointerSize=134)
        self.answer(200, dict(id="some/texts", sha=self.server.commit, siblings=siblings))

    def entry(self, folder, path):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            return dict(type="directory", oid="0", size=0, path=name)
        size = path.stat().st_size
        lfs = dict(oid=self.server.sha256(path), size=size, pointerSize=134)
        return dict(type="file", oid="0", size=size, path=name, lfs=lfs)

    def resolve(self, folder, path, fault):
        """Small files come from here; of others the hub says where they are."""
        if not path.is_file():
            code = "EntryNotFound" if folder.is_dir() else "RepoNotFound"
            return self.answer(404, X_Error_Code=code, X_Repo_Commit=self.server.commit)
        headers = dict(X_Repo_Commit=self.server.commit, ETag=f'"{self.server.sha256(path)}"')
        if path.suffix in (".md", ".json"):
            return self.send_file(path, fault, **headers)
        place = f"http://localhost:{self.server.server_port}/cdn/"  # another host, as on the hub
        place += path.relative_to(self.server.folder).as_posix()
        headers |= dict(Location=place, X_Linked_Size=str(path.stat().st_size))
        self.answer(302, X_Linked_ETag=headers["ETag"], **headers)

    def send_file(self, path, fault, **headers):
        size = path.stat().st_size - fault.get("short", 0)
        first, last, status = 0, size - 1, 200
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("range") or ""):
            first, last, status = int(match[1]), min(int(match[2] or size), size - 1), 206
            if first >= size:
                return self.answer(416)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status == 206:
            self.send_header("content-range", f"bytes {first}-{last}/{size}")
        self.send_header("content-length", str(last + 1 - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        with open(path, "rb") as file:
            file.seek(first)
            left = min(last + 1 - first, fault.get("drop", size))
            while left and (block := file.read(min(left, 2**16))):
                left -= len(block)
                self.wfile.write(block)
                with self.server.lock:
                    self.server.sent += len(block)
        self.close_connection = "drop" in fault
