"""The few routes of a model hub that a download needs, in a process of its own.

`python -m tests.servers.hub` prints its port. How it behaves is in the repository's owner:
good, cut (the line breaks after 300 kB, once a file), slow (1 MB/s), norange (always the whole
file), redirect (as the hub's LFS does), busy (429 and 503 first), wrong (a hash that doesn't fit),
gated, portal (a web page), noblobs (no hashes in the list), pickles, dead (breaks every time).
GET /log lists the requests; each as method, path, Range, whether a token came with it.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import time
from urllib.parse import unquote, urlsplit

from tests.servers import Handler, serve

COMMIT = "c0ffee" + "0" * 34
SIZE = 1_500_000
FILES = {
    "model.safetensors": random.Random(1).randbytes(SIZE),
    "config.json": b'{"model_type": "tiny"}',
    "sub/tokenizer.json": b"{}" * 5000,
    "pytorch_model.bin": b"\x80\x04pickle",
    "modeling_tiny.py": b"raise SystemExit",
    "../../evil.json": b"{}",
}
LARGE = {"model.safetensors", "pytorch_model.bin"}
log: list[tuple[str, str, str, bool]] = []
seen: dict[str, int] = {}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def digest(name: str) -> str:
    data = FILES[name]
    return hashlib.sha256(data).hexdigest() if name in LARGE else git_hash(data)


def listing(owner: str, repo: str) -> dict[str, object]:
    siblings: list[dict[str, object]] = []
    for name, data in FILES.items():
        if owner == "pickles" and name.endswith(".safetensors"):
            continue
        facts: dict[str, object] = {"rfilename": name}
        if owner != "noblobs":
            facts |= {"size": len(data), "blobId": git_hash(data)}
            if name in LARGE:
                sha = "0" * 64 if owner == "wrong" else digest(name)
                facts["lfs"] = {"size": len(data), "sha256": sha, "pointerSize": 130}
        siblings.append(facts)
    return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings,
            "tags": ["license:mit"], "cardData": {"license": "mit"}}


class Hub(Handler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/log":
            return self.raw(200, json.dumps(log).encode())
        log.append((self.command, path, self.headers.get("Range", ""),
                    "Authorization" in self.headers))
        if match := re.fullmatch(r"/api/models/((\w+)/[\w.-]+)/revision/(.+)", path):
            return self.index(*match.groups())
        if match := re.fullmatch(r"/((\w+)/[\w.-]+)/resolve/(\w+)/(.+)", path):
            return self.resolve(match[2], match[4])
        if match := re.fullmatch(r"/cdn/(\w+)/(.+)", path):
            return self.body(match[1], match[2])
        return self.raw(404, b"no")

    def index(self, repo: str, owner: str, revision: str) -> None:
        if owner == "gone":
            return self.raw(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if owner == "portal":
            return self.raw(200, b"<html>log in</html>", {"Content-Type": "text/html"})
        if owner == "sick":
            return self.raw(500, b"{}")
        if owner == "gated":
            return self.raw(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", COMMIT):
            return self.raw(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return self.raw(200, json.dumps(listing(owner, repo)).encode())

    def resolve(self, owner: str, name: str) -> None:
        if name not in FILES:
            return self.raw(404, b"", {"X-Error-Code": "EntryNotFound"})
        if owner == "redirect" and name in LARGE:
            port = self.server.server_address[1]
            return self.raw(302, b"", {"Location": f"http://localhost:{port}/cdn/good/{name}"})
        if owner in ("refused", "secret") and name in LARGE:
            return self.raw(403 if owner == "refused" else 401, b"")
        turn = seen[f"{owner}/{name}"] = seen.get(f"{owner}/{name}", 0) + 1
        if owner == "busy" and turn <= 2:
            return self.raw(429 if turn == 1 else 503, b"", {"Retry-After": "0"})
        return self.body(owner, name)

    def body(self, owner: str, name: str) -> None:
        data, start = FILES[name], 0
        if (asked := self.headers.get("Range")) and owner != "norange":
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(data) > 0:
            return self.raw(416, b"")
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{digest(name)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.send(owner, name, data[start:])
        return None

    def send(self, owner: str, name: str, data: bytes) -> None:
        cuts = owner == "dead" or (owner in ("cut", "norange") and seen[f"{owner}/{name}"] == 1)
        if cuts and name in LARGE:
            self.wfile.write(data[:0 if owner == "dead" else 300_000])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif owner == "slow":
            for at in range(0, len(data), 20_000):
                self.wfile.write(data[at:at + 20_000])
                time.sleep(0.02)
        else:
            self.wfile.write(data)


if __name__ == "__main__":
    serve(Hub)
