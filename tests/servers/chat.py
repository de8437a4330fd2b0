"""An OpenAI-compatible server in a process of its own, with every bad habit that servers have.

`python -m tests.servers.chat` prints its port. The first part of the path says how it behaves:
/good/v1, /think/v1, /busy/v1 ... GET /log lists what came: path, key, and the request's body with
the picture as "WIDTHxHEIGHT FORMAT"; GET /most tells how many requests were under way at once.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import threading
import time
from collections import Counter
from typing import Any

from PIL import Image

from tests.servers import Handler, serve

ANSWERS: dict[str, str] = {
    "good": "A {colour} picture.",
    "think": "<think>It is\n{colour}.</think>\n\nA {colour} picture.",
    "chatty": 'Sure! Here is a caption for the image:\n\n"A {colour}\npicture."',
    "empty": "  ",
    "thinkonly": "<think>well, it is",
    "huge": " ".join(f"word{n}" for n in range(2000)),
    "html": "<html><body>A page</body></html>",
    "refuses": "I'm sorry, but I can't help with that.",
}
MODELS = {"none": [], "texts": ["nomic-embed-text", "llama3.2:3b"],
          "many": ["nomic-embed-text:latest", "llama3.2:3b", "qwen2.5vl:7b", "llava:13b"]}
log: list[dict[str, Any]] = []
turns: Counter[str] = Counter()
lock = threading.Lock()
under_way, most = 0, 0


def seen(body: dict[str, Any]) -> tuple[str, str]:
    """'WxH FORMAT' and the colour of the middle pixel."""
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        red, _, blue = image.getpixel((image.width // 2, image.height // 2))
        return (f"{image.width}x{image.height} {image.format}",
                "red" if red > 128 else "blue" if blue > 128 else "black")


class Chat(Handler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/log":
            return self.reply(200, log)
        if self.path == "/most":
            return self.reply(200, most)
        mode, _, route = self.path.strip("/").partition("/")
        log.append({"path": self.path, "key": self.headers.get("Authorization", "")})
        if mode == "page":
            return self.raw(200, b"<!DOCTYPE html><html>Welcome</html>")
        if mode == "words":
            return self.raw(200, b"Ollama is running")
        if mode == "list":
            return self.reply(200, ["no", "object"])
        if mode == "secret" and self.headers.get("Authorization") != "Bearer open":
            return self.reply(401, {"error": {"message": "no key"}})
        if mode == "moved":
            return self.reply(307, {}, {"Location": "http://example.com/v1/models"})
        if route != "v1/models":
            return self.raw(404, b"404 page not found")
        names = MODELS.get(mode, ["tiny-vl"])
        return self.reply(200, {"object": "list", "data": [{"id": name} for name in names]})

    def do_POST(self) -> None:
        global under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        try:
            self.answer()
        finally:
            with lock:
                under_way -= 1

    def answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        mode = self.path.strip("/").partition("/")[0]
        picture, colour = seen(body)
        with lock:
            turns[mode] += 1
            turn = turns[mode]
        body["messages"][0]["content"].pop()
        log.append({"path": self.path, "picture": picture, "body": body,
                    "key": self.headers.get("Authorization", "")})
        time.sleep(0.1 if mode == "good" else 0)
        if self.trouble(mode, turn, body["model"]):
            return
        text = ANSWERS.get(mode, ANSWERS["good"]).replace("{colour}", colour)
        content: Any = [{"type": "text", "text": text}] if mode == "parts" else text
        choice = {"index": 0, "finish_reason": "stop", "message": {"content": content}}
        if mode == "cut":
            choice = {"finish_reason": "length",
                      "message": {"content": "A red picture. It shows a"}}
        if mode == "reasoning":
            choice = {"finish_reason": "length",
                      "message": {"content": "", "reasoning_content": "let me see"}}
        self.reply(200, {"choices": [choice]})

    def trouble(self, mode: str, turn: int, model: str) -> bool:
        """True where it has answered, or never will."""
        if mode == "busy" and turn <= 2:
            self.reply(429 if turn == 1 else 503, {"error": "queue is full"},
                       {"Retry-After": "0.05"})
        elif mode == "always429":
            self.reply(429, {"error": {"message": "rate limit"}}, {"Retry-After": "0.01"})
        elif mode == "broken":
            self.reply(500, {"error": {"message": "CUDA out of memory"}})
        elif mode == "many" and model not in MODELS["many"]:
            self.reply(404, {"error": {"message": f"model '{model}' not found"}})
        elif mode == "blind":
            self.reply(400, {"error": {"message": "this model does not support images"}})
        elif mode == "error200":
            self.reply(200, {"error": {"message": "context too small"}})
        elif mode == "other":
            self.reply(200, {"answer": "hello"})
        elif mode == "hangup" and turn == 1:
            self.close_connection = True
        elif mode == "half" and turn == 1:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif mode == "tornpage":                # an error whose page breaks off
            self.send_response(404)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"no such")
            self.close_connection = True
        elif mode == "packed":                  # 20 MB in 90 kB, unasked
            self.raw(200, gzip.compress(b" " * 20_000_000, 1), {"Content-Encoding": "gzip"})
        elif mode == "silent":
            time.sleep(5)
        elif mode == "drip":
            self.drip()
        elif mode == "flood":
            self.raw(200, b"[" + b"1," * 3_000_000)
        else:
            return False
        return True

    def drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.05)

    def reply(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        self.raw(status, json.dumps(answer).encode(), headers)


if __name__ == "__main__":
    serve(Chat)
