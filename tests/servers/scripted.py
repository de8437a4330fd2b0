"""An OpenAI-compatible server in a thread, whose answers a test writes itself."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tests.servers import Handler, Quiet

# A text, a whole answer, or status, body (bytes or an object for JSON) and headers.
Reply = str | dict[str, Any] | tuple[int, Any] | tuple[int, Any, dict[str, str]]


@dataclass
class Script:
    """`answer(body, colour of the picture's middle, number of the request)`; `get(path)`."""

    answer: Callable[[dict[str, Any], tuple[int, int, int], int], Reply]
    models: tuple[str, ...] = ("tiny-vl",)
    get: Callable[[str], Reply | None] = lambda path: None
    post: Callable[[str, dict[str, Any]], Reply | None] = lambda path, body: None
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    address: str = ""


def chat(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": finish,
                         "message": {"role": "assistant", "content": text, **message}}]}


@contextlib.contextmanager
def scripted(answer: Callable[..., Reply] = lambda *_: "A picture.",
             **options: Any) -> Iterator[Script]:
    script = Script(answer, **options)

    class Server(Handler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, told: Reply) -> None:
            told = (200, chat(told)) if isinstance(told, str) else told
            status, body, headers = (*(told if isinstance(told, tuple) else (200, told)), {})[:3]
            if status == 0:                         # hangs up
                self.close_connection = True
                return
            self.raw(status, body if isinstance(body, bytes) else json.dumps(body).encode(),
                     headers)

        def do_GET(self) -> None:
            script.paths.append(self.path)
            if (told := script.get(self.path)) is None:
                rows = [{"id": name} for name in script.models]
                told = {"data": rows} if self.path == "/v1/models" else (404, {"error": "no"})
            self.reply(told)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.paths.append(self.path)
            if (told := script.post(self.path, body)) is not None:
                return self.reply(told)
            if "messages" not in body:
                return self.reply((404, {"error": "no"}))
            url = body["messages"][-1]["content"][-1]["image_url"]["url"]
            image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
            script.asked.append(body)
            return self.reply(script.answer(body, image.getpixel((4, 4)), len(script.asked)))

    server = Quiet(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02},
                     daemon=True).start()
    script.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
