"""Servers for tests, each a process of its own on the loopback."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def raw(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:         # clients that gave up or were killed
        pass


def serve(handler: type[Handler]) -> None:
    """Prints its port, and answers until it is killed."""
    server = Quiet(("127.0.0.1", 0), handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
