"""Sentences from any OpenAI-compatible server: Ollama, LM Studio, llama.cpp, vLLM.

POST {endpoint}/chat/completions with the picture as a JPEG in a data URL. The address is on this
machine unless the user writes another one; then a note tells so. If a server needs a key, it is
read from DARKROOM_ENDPOINT_KEY. Source of the format: the OpenAI API reference, chat completions.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from captioner.base import Description
from captioner.config import CaptionConfig
from captioner.models import sight
from captioner.models.sentences import read, whole_parts
from captioner.models.server import Refused, Server, is_here, joined
from captioner.pipeline import CONTEXT, in_order
from core.errors import UserError
from core.jobs.control import Control
from core.jobs.events import Note

PROMPT = ("Describe this picture in one to three sentences for training an image model: subject, "
          "setting, style, colours, light and composition. Only what can be seen, no "
          "introduction.")
TRIAL = "What colour is this picture? Answer with one word."
MOST_TRIALS = 5                         # models that are tried for whether they see
SIDE = 1024                             # px; longer sides are scaled down to it
QUALITY = 90                            # of the JPEG
# Tokens: thinking models need many before they answer.
LENGTH = 1024
# Characters; a longer text is a model that repeats itself.
LONGEST = 4000
SHOWN = 300                             # characters of an answer that isn't saved
AT_ONCE = 4                             # requests; servers queue those that they can't serve


@dataclass(frozen=True, slots=True)
class PreparedPicture:
    """A picture as a JPEG in base64, and what its prompt may name."""

    jpeg: str
    caption: str = ""
    tags: str = ""


class Endpoint:
    title: ClassVar[str] = "Local server"
    # Faults of one picture: the next one may well succeed.
    of_one_picture: ClassVar[frozenset[str]] = frozenset({
        "endpoint.too_long", "endpoint.refused", "endpoint.html", "endpoint.unclear",
        "endpoint.filtered"})
    # Theirs too, but where several follow one another they are the server's or the model's.
    may_pass: ClassVar[frozenset[str]] = frozenset({
        "endpoint.empty", "endpoint.thinking", "endpoint.context",
        "endpoint.slow", "endpoint.fails", "endpoint.breaks", "endpoint.refuses",
        "endpoint.no_route", "endpoint.web_page", "endpoint.not_json", "endpoint.other_format",
        "endpoint.huge"})

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config
        self.server = Server(config.endpoint, config.timeout_s)
        self.address = self.server.address
        self.model = config.models.get("endpoint") or "auto"
        self.prompt = config.prompt or PROMPT
        # A template that can't work is reported before any picture is read.
        _fill_template(self.prompt, {})
        self.length = config.max_tokens or LENGTH
        # What a server may refuse; what it does refuse is left out for the rest of the job.
        self.options: dict[str, Any] = {
            "max_tokens": self.length, "seed": config.seed, "stream": False,
            **({"temperature": config.temperature, "top_p": config.top_p} if config.sample
               else {"temperature": 0.0})}
        self.lock = threading.Lock()
        self.notes: list[Note] = []             # the runner shows these after `load`
        self.server.tell = self.notes.append

    def listen(self, tell: Callable[[Note], None], control: Control) -> None:
        """From now on notes go to `tell`, from any thread, and a stop ends waiting."""
        self.server.tell = tell
        self.server.given_up = lambda: control.stopping

    def load(self) -> None:
        """Asks the server for its models, and checks or chooses the one to use."""
        if not is_here(self.server.host):
            self.server.tell(Note(key="endpoint.leaves", params={"host": self.server.host}))
        try:
            rows = sight.rows_of(self.server.call("models"))
        except UserError as fault:
            # Some servers have no list. A named model needs none.
            if self.model == "auto" or fault.code == "endpoint.down":
                raise
            return
        if self.model == "auto":
            if not rows:
                raise UserError("endpoint.no_models", address=self.address)
            self.model = self._best_of(rows)
            self.server.tell(Note(key="endpoint.chosen", params={"model": self.model}))
            return
        wanted = {self.model.lower(), f"{self.model}:latest".lower()}
        listed = [name for name in rows if name.lower() in wanted]
        # Proxies know more names than they list.
        if rows and not listed and self._try(self.model) is None:
            raise UserError("endpoint.no_model", model=self.model, known=", ".join([*rows][:8]))
        if not all(sight.seeing(rows, listed, self.server.ask).values()):
            self.server.tell(Note(key="endpoint.may_be_blind", params={"model": self.model}))

    def _best_of(self, rows: dict[str, dict[str, Any]]) -> str:
        """The model that sees: as the server says, as names say, as a trial shows."""
        names = sight.by_name(rows) or [*rows]
        told = sight.seeing(rows, names, self.server.ask)
        if sees := [name for name, said in told.items() if said]:
            return sees[0]
        names = [name for name in names if name not in told]
        if len(names) == 1 or any(map(sight.VISION_MODELS.search, names[:1])):
            return names[0]
        answers = {}
        for name in names[:MOST_TRIALS]:
            if (said := self._try(name)) is not None:
                answers[name] = said
                if re.search(r"\bred\b|红|紅|赤", said, re.IGNORECASE):
                    return name
        if not answers:
            raise UserError("endpoint.blind", address=self.address, models=", ".join([*rows][:8]))
        return next(iter(answers))

    def _try(self, model: str) -> str | None:
        """What a model says of a red picture; None where the server refuses to ask it."""
        try:
            return str(_message(self._ask(model, self.prepare(Image.new("RGB", (64, 64), "red")),
                                          TRIAL))[1])
        except UserError as fault:
            if fault.code not in self.of_one_picture | self.may_pass:
                raise
            return None

    def prepare(self, image: Image.Image) -> PreparedPicture:
        """Scales the picture down. The runner puts what it knows of it into image.info."""
        known = image.info.get(CONTEXT)
        known = known if isinstance(known, dict) else {}
        # JPEG has no transparency.
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=QUALITY)
        return PreparedPicture(base64.b64encode(buffer.getvalue()).decode("ascii"),
                               str(known.get("caption", "")), str(known.get("tags", "")))

    def describe(self, batch: Sequence[PreparedPicture]) -> list[Description]:
        return in_order(self.each(batch))

    def each(self, batch: Sequence[PreparedPicture]
             ) -> Iterator[tuple[int, Description | UserError]]:
        """Sends a few requests at once; each answer comes as soon as the server gives it."""
        todo = deque(enumerate(batch))
        outcomes: queue.SimpleQueue[tuple[int, Description | Exception] | None] = (
            queue.SimpleQueue())

        def work() -> None:
            # IndexError: another thread has taken the last one.
            with contextlib.suppress(IndexError):
                while todo and not self.server.given_up():
                    place, picture = todo.popleft()
                    try:
                        outcomes.put((place, Description(self._describe_one(picture))))
                    except Exception as error:
                        # A fault that ends the job: nothing more is asked.
                        if getattr(error, "code", "") not in self.of_one_picture | self.may_pass:
                            todo.clear()
                        outcomes.put((place, error))
            outcomes.put(None)

        # Not a pool: at its end the program would wait for requests that nobody wants any more.
        working = min(AT_ONCE, len(batch))
        for _ in range(working):
            threading.Thread(target=work, daemon=True).start()
        last: list[tuple[int, UserError]] = []
        try:
            while working:
                if (answer := outcomes.get()) is None:
                    working -= 1
                    continue
                place, outcome = answer
                if not isinstance(outcome, Description | UserError):
                    raise outcome
                # It comes last: what is under way is still told.
                if isinstance(outcome, UserError) and (
                        outcome.code not in self.of_one_picture | self.may_pass):
                    last.append((place, outcome))
                else:
                    yield place, outcome
            yield from last
        finally:
            todo.clear()

    def identity(self) -> str:
        config = self.config
        return f"endpoint|{self.address}|{self.model}|{self.prompt}|{config.trigger_word}|" \
               f"{self.length}|{SIDE}|{config.sample}|{config.temperature}|{config.top_p}|" \
               f"{config.seed}"

    def _describe_one(self, picture: PreparedPicture) -> str:
        text = _fill_template(self.prompt, {"trigger": self.config.trigger_word,
                                            "caption": picture.caption, "tags": picture.tags})
        return caption_of(self._ask(self.model, picture, text), self.length)

    def _ask(self, model: str, picture: PreparedPicture, text: str) -> dict[str, Any]:
        """The server's answer. What it refuses of the options is left out, or named otherwise."""
        content = [{"type": "text", "text": text},
                   {"type": "image_url",
                    "image_url": {"url": f"data:image/jpeg;base64,{picture.jpeg}"}}]
        while True:
            options = dict(self.options)
            try:
                return self.server.call("chat/completions", {
                    "model": model, "messages": [{"role": "user", "content": content}], **options})
            except Refused as fault:
                fault.params["model"] = model
                name = refused_option(fault.answer, options)
                if name is None:
                    raise
                with self.lock:
                    # Another request may have changed it meanwhile.
                    if self.options.get(name) == options[name]:
                        self._change(name, fault.answer)

    def _change(self, name: str, answer: str) -> None:
        options = {key: value for key, value in self.options.items() if key != name}
        if name == "max_tokens":
            options["max_completion_tokens"] = self.length
        elif name == "stream" and not self.options["stream"] and re.search(
                "must|only|require|enable", answer, re.IGNORECASE):
            options["stream"] = True
        elif name != "stream":
            self.server.tell(Note(key="endpoint.left_out", params={"name": name}))
        self.options = options


def refused_option(answer: str, options: dict[str, Any]) -> str | None:
    """Which of the options an error's text is about: its own field for that, else the first that it
    names."""
    field = re.search(r'"param"\s*:\s*"(\w+)"', answer)
    if field and field[1] in options:
        return field[1]
    places = {name: found.start() for name in options
              if (found := re.search(rf"(?<!\w){name}(?!\w)", answer))}
    return min(places, key=places.__getitem__, default=None)


def _fill_template(template: str, values: dict[str, str]) -> str:
    """Fills {trigger}, {caption} and {tags}. Braces around more than one word stay as they are."""
    for name in re.findall(r"\{(\w+)\}", template):
        if name not in ("trigger", "caption", "tags"):
            raise UserError("endpoint.placeholder", name=name)
    return re.sub(r"\{(trigger|caption|tags)\}", lambda match: values.get(match[1], ""), template)


# --- answers ---

def _message(answer: dict[str, Any]) -> tuple[dict[str, Any], str, str]:
    """-> the message of a chat completion, its text, and why it ended."""
    try:
        choice = answer["choices"][0]
        message = choice.get("message") or {"content": choice["text"]}
        # A filter leaves it out.
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise UserError("endpoint.other_format", answer=json.dumps(answer)[:200]) from None
    return message, joined(content), str(choice.get("finish_reason"))


def caption_of(answer: dict[str, Any], length: int) -> str:
    """The caption in a chat completion. Raises UserError where the answer holds none, or one that
    shouldn't be saved unseen."""
    message, raw, finish_reason = _message(answer)
    if re.search("filter|safety|prohibited|sensitive", finish_reason, re.IGNORECASE):
        raise UserError("endpoint.filtered", reason=raw[:SHOWN] or finish_reason)
    said = read(raw)
    if refusal := message.get("refusal"):
        raise UserError("endpoint.refused", answer=str(refusal)[:SHOWN])
    if not said.text:
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        # All in the field for thoughts, yet complete: servers mix it up, too.
        if thoughts and finish_reason != "length":
            raise UserError("endpoint.unclear", answer=" ".join(str(thoughts).split())[-SHOWN:])
        # Thoughts used up the tokens: unfinished in the answer, or in a field of their own.
        thinking = raw.strip() or finish_reason == "length"
        raise UserError("endpoint.thinking" if thinking else "endpoint.empty", tokens=length)
    if said.doubt:
        raise UserError(f"endpoint.{said.doubt}", answer=said.text[:SHOWN])
    if len(said.text) > LONGEST:
        raise UserError("endpoint.too_long", count=len(said.text), most=LONGEST)
    return whole_parts(said.text) if finish_reason == "length" else said.text
