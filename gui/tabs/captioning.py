"""Captioning: let a captioner describe the pictures, edit by keyboard, change all by rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from captioner.captions import search
from captioner.captions.rule_parser import parse, parse_line
from captioner.captions.rules import Change, MaxTokens, Rule, preview, with_trigger_rule
from captioner.captions.undo import Outcome
from captioner.config import CaptionConfig
from core.base_models import hub
from core.errors import UserError
from core.jobs.runs import JobView
from gui.html import bar, button, card, duration, esc
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.dataset_view import DatasetView, album_of, caption_job
from gui.widgets import caption_rows
from gui.widgets.fault_card import fault_card
from gui.widgets.panel import panel
from gui.widgets.picture_grid import page_of

OWNERS = {"florence-community": "florence", "Salesforce": "blip", "SmilingWolf": "wd",
          "laion": "clip"}      # of core/base_models/models.yaml -> captioner
SENTENCES, TAGS = ("blip", "florence", "endpoint"), ("wd", "clip")
TAB = "captioning"              # in Project.tabs


def build(ctx: Context) -> CaptioningTab:
    return CaptioningTab(ctx)


class CaptioningTab:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.album: DatasetView = album_of(ctx.app_state)
        self._build_job()
        with gr.Row():
            with gr.Column(scale=7, min_width=440):
                self.search = gr.Textbox(
                    label=self._tr("search"), placeholder=self._tr("search_hint"),
                    elem_id="caption-search", max_lines=1)
                self.rows = panel("caption-rows", "caption_editor", dense=True)
                self.texts = panel("captions-texts", "caption_texts")
            with gr.Column(scale=5, min_width=340):
                self._build_rules()
                self.stats = panel("caption-stats", dense=True)
        page = ctx.page
        for event in (self.search.submit, self.search.blur):
            page.on(event, self.look_for, [self.search])
        for one in (self.rows, self.stats):
            page.on_panel(one, self.act)

    def _tr(self, key: str, **params: Any) -> str:
        return self.ctx.tr(f"tab_captioning.{key}", **params)

    def _build_job(self) -> None:
        tr, page = self._tr, self.ctx.page
        with gr.Row():
            self.sentence = gr.Dropdown(offers(self.ctx, "sentence"), label=tr("sentence"),
                                        elem_id="captioner-sentence", scale=3, min_width=220)
            self.tags = gr.Dropdown(offers(self.ctx, "tags"), label=tr("tags"),
                                    elem_id="captioner-tags", scale=3, min_width=220)
            self.existing = gr.Radio([(tr(f"existing_{one}"), one) for one in (
                "keep", "add", "replace")], label=tr("existing"), elem_id="captions-existing",
                scale=4, min_width=330)
            self.trigger = gr.Textbox(label=self.ctx.tr("config_help.trigger_word"),
                                      elem_id="caption-trigger", scale=2, min_width=140)
            self.start = gr.Button(tr("start"), variant="primary", elem_id="caption-start",
                                   scale=2, min_width=160)
        self.endpoint = gr.Textbox(label=tr("endpoint"), elem_id="caption-endpoint",
                                   visible=False)
        self.job = panel("caption-job", dense=True)
        kept: list[Any] = [self.sentence, self.tags, self.existing]
        for one in kept:
            page.on(one.input, self.keep, [*kept, self.endpoint])
        page.on(self.endpoint.blur, self.keep, [*kept, self.endpoint])
        for event in (self.trigger.submit, self.trigger.blur):
            page.on(event, self.name, [self.trigger], fill=True)
        page.on(self.start.click, self.begin)
        page.on_panel(self.job, self.act)

    def _build_rules(self) -> None:
        tr, page = self._tr, self.ctx.page
        with gr.Accordion(tr("rules"), open=False, elem_id="caption-rules-box"):
            self.rules = gr.Textbox(label=tr("rules_label"), placeholder=tr("rules_hint"),
                                    info=tr("rules_help"), lines=3, max_lines=8,
                                    elem_id="caption-rules")
            self.first = gr.Checkbox(label=tr("trigger_first"), elem_id="trigger-first")
            with gr.Row():
                look = gr.Button(tr("preview"), size="sm", elem_id="rules-preview")
                do = gr.Button(tr("apply"), size="sm", elem_id="rules-apply")
            self.would = panel("rules-changes")
        page.on(look.click, self.try_rules, [self.rules, self.first])
        page.on(do.click, self.apply_rules, [self.rules, self.first])
        page.on(self.rules.blur, self.keep_rules, [self.rules, self.first])

    # --- painting ---

    def label(self, snap: Snapshot) -> str:
        state = self.album.now
        count = len(state.training)
        done = f" ✓{state.captioned}/{count}" if count else ""
        return f"2 {self.ctx.tr('tab_captioning')}{done}"

    def paint(self, snap: Snapshot) -> Updates:
        ctx, album = self.ctx, self.album
        job, kept = caption_job(snap), kept_of(snap)
        names = self._found(snap)
        running = job is not None and not job.over
        count = len(album.now.training)
        return {self.job: status(ctx, snap, job, kept),
                self.start: gr.update(interactive=bool(count) and not running, value=self._tr(
                    "start_n", count=count) if count else self._tr("start")),
                self.endpoint: gr.update(visible=kept["sentence"].startswith("endpoint")),
                self.rows: caption_rows.rows(ctx, album, names),
                self.texts: caption_rows.texts(ctx, album, names),
                self.search: album.shown.search, self.trigger: snap.config.trigger_word,
                self.stats: caption_rows.statistics(ctx, album.now)}

    def fill(self, snap: Snapshot) -> Updates:
        kept = kept_of(snap)
        return {self.sentence: kept["sentence"], self.tags: kept["tags"],
                self.existing: kept["existing"], self.endpoint: gr.update(
                    value=kept["endpoint"], visible=kept["sentence"].startswith("endpoint")),
                self.rules: kept["rules"], self.first: kept["first"], self.would: ""}

    def _found(self, snap: Snapshot) -> tuple[str, ...]:
        """A search that can't be read finds nothing; look_for has said why."""
        try:
            return caption_rows.found(self.album, snap.config.trigger_word)
        except UserError:
            return ()

    # --- the job ---

    def keep(self, sentence: str, tagger: str, existing: str, endpoint: str) -> None:
        self._keep(sentence=sentence, tags=tagger, existing=existing, endpoint=endpoint)

    def _keep(self, **values: Any) -> None:
        self.ctx.app_state.projects.update(lambda project: project.model_copy(update={
            "tabs": {**project.tabs, TAB: {**project.tabs.get(TAB, {}), **values}}}))

    def name(self, word: str) -> None:
        app_state = self.ctx.app_state
        if (word or "").strip() != app_state.snapshot().config.trigger_word:
            app_state.projects.edit(trigger_word=(word or "").strip() or None)
            app_state.replan(self.ctx.language)

    def begin(self) -> None:
        """Queues the job. Raises UserError where its weights are not here."""
        app_state = self.ctx.app_state
        snap = app_state.snapshot()
        config = config_of(kept_of(snap), self.album, snap.config.trigger_word,
                           snap.config.metadata_path)
        for model in config.models.values():
            if model not in ("demo", "auto"):
                hub.find(model)
        app_state.jobs.start(config, name=Path(config.folder).name, job="caption")

    # --- the editor ---

    def look_for(self, text: str) -> None:
        text = (text or "").strip()
        if text != self.album.shown.search:
            search.parse(text)        # a fault names the column
            self.album.show(search=text, only=())

    def act(self, act: str, id: str) -> Updates | None:
        """Buttons and keys of the panels."""
        album, app_state = self.album, self.ctx.app_state
        match act:
            case "save":
                key, _, text = id.partition(" ")
                self._say_left(album.write({album.named(key): " ".join(text.split())}))
            case "undo" | "redo":
                outcome = album.step(act)
                self._say_left(outcome)
                self.ctx.page.tell(self._tr(f"{act}_done", count=_pictures(outcome)))
            case "search":
                album.show(search=id, only=())
            case "page" if id.lstrip("-").isdigit():
                album.show(rows=int(id))
            case "next" | "previous" | "next_empty":
                self._turn(act)
            case "remove_tags" | "remove_words":
                rule = {"tags": [id]} if act == "remove_tags" else {"text": id}
                self._apply(list(parse([{"rule": "remove", **rule}])), [f"remove:{id}"])
            case "stop":
                app_state.jobs.stop(id)
        return None

    def _turn(self, act: str) -> None:
        names = self._found(self.ctx.app_state.snapshot())
        page, pages = page_of(len(names), self.album.shown.rows, caption_rows.PER_PAGE)
        if act == "next_empty":
            found = caption_rows.next_empty(names, self.album.now.captions, page)
            if found is None:
                self.ctx.page.tell(self._tr("all_written"))
            self.album.show(rows=page if found is None else found)
        else:
            self.album.show(rows=min(max(page + (1 if act == "next" else -1), 0), pages - 1))

    def _say_left(self, outcome: Outcome) -> None:
        for swap in outcome.left[:3]:
            if swap.picture:
                self.ctx.page.tell(self.ctx.tr("runner.edited", picture=swap.picture),
                                   kind="warning")

    # --- rules ---

    def keep_rules(self, text: str, first: bool) -> None:
        self._keep(rules=text or "", first=bool(first))

    def try_rules(self, text: str, first: bool) -> Updates:
        self.keep_rules(text, first)
        rules, _ = self._rules(text, first)
        captions = self._rulable()
        return {self.would: caption_rows.changes(
            self.ctx, self._preview(captions, rules), len(captions))}

    def apply_rules(self, text: str, first: bool) -> Updates:
        self.keep_rules(text, first)
        rules, lines = self._rules(text, first)
        count = self._apply(rules, lines)
        return {self.would: f'<p class="small">{esc(self._tr("applied", count=count))}</p>'}

    def _rules(self, text: str, first: bool) -> tuple[list[Rule], list[str]]:
        lines = [line.lstrip() for line in (text or "").splitlines() if line.strip()]
        trigger = self.ctx.app_state.snapshot().config.trigger_word if first else ""
        rules = with_trigger_rule(parse([parse_line(line, n) for n, line in enumerate(lines, 1)]),
                                  trigger)
        if not rules:
            raise UserError("tab_captioning.no_rules")
        return list(rules), [*lines, *([f"trigger:{trigger}"] if trigger.strip() else [])]

    def _rulable(self) -> dict[str, str]:
        """The captions that the search leaves; pictures without one stay without."""
        captions = self.album.now.captions
        names = self._found(self.ctx.app_state.snapshot())
        return {name: captions[name] for name in names if captions.get(name)}

    def _preview(self, captions: dict[str, str], rules: list[Rule]) -> list[Change]:
        needs = any(isinstance(rule, MaxTokens) for rule in rules)
        if needs and self.album.count_tokens is None:
            raise UserError("tab_captioning.no_tokenizer")
        return preview(captions, rules, self.album.count_tokens)

    def _apply(self, rules: list[Rule], lines: list[str]) -> int:
        found = self._preview(self._rulable(), rules)
        outcome = self.album.write({one.path: one.after for one in found}, "apply", rules=lines)
        self._say_left(outcome)
        self.ctx.page.tell(self._tr("applied", count=_pictures(outcome)))
        return _pictures(outcome)


# --- what is asked for ---

def kept_of(snap: Snapshot) -> dict[str, Any]:
    """What the project keeps of this tab, with defaults for what it lacks."""
    default: dict[str, Any] = {"sentence": "blip=demo", "tags": "clip=demo", "existing": "keep",
                               "endpoint": CaptionConfig.model_fields["endpoint"].default,
                               "rules": "", "first": True}
    kept = snap.project.tabs.get(TAB, {})
    return default | {key: value for key, value in kept.items()
                      if key in default and isinstance(value, type(default[key]))}


def offers(ctx: Context, kind: str) -> list[tuple[str, str]]:
    """(label, captioner=model) of all that make sentences, or tags; what isn't here says so."""
    ids = SENTENCES if kind == "sentence" else TAGS
    found = [(ctx.tr("tab_captioning.none"), ""),
             (ctx.tr(f"tab_captioning.demo_{kind}"),
              "blip=demo" if kind == "sentence" else "clip=demo")]
    for entry in hub.catalogue():
        captioner = OWNERS.get(entry.repo.partition("/")[0], "")
        if entry.purpose in ("caption", "tag", "clip") and captioner in ids:
            here = "" if hub.local(entry.repo) else ctx.tr("tab_captioning.not_here", mb=entry.mb)
            found.append((entry.about[ctx.language] + here, f"{captioner}={entry.repo}"))
    if kind == "sentence":
        found.append((ctx.tr("tab_captioning.server"), "endpoint=auto"))
    return found


def config_of(kept: dict[str, Any], album: DatasetView, trigger: str,
              metadata: str) -> CaptionConfig:
    """The job's config. Raises UserError where nothing was chosen."""
    pairs = [one.partition("=") for one in (kept["sentence"], kept["tags"]) if one]
    state = album.now
    if not pairs:
        raise UserError("tab_captioning.nothing_chosen")
    if state.folder is None or not state.training:
        raise UserError("tab_captioning.no_pictures")
    some = len(state.training) < len(state.names)
    return CaptionConfig(
        folder=str(state.folder), captioner="+".join(name for name, _, _ in pairs),
        models={name: model for name, _, model in pairs if name != "endpoint"},
        existing=kept["existing"], trigger_word=trigger, endpoint=kept["endpoint"],
        metadata_path=str(Path(metadata).expanduser().absolute()) if metadata else "",
        only=list(state.training) if some else [])


# --- how it goes ---

def status(ctx: Context, snap: Snapshot, job: JobView | None, kept: dict[str, Any]) -> str:
    """The job while it runs, else what the choice means."""
    if job is None or job.over:
        return (_ended(ctx, job) if job else "") + _choice(ctx, kept)
    stop = button(ctx.tr("stop"), "stop", job.id, once=True,
                  why_not=ctx.tr("not_while_stopping") if job.state == "stopping" else "")
    share = job.phase_done / job.phase_total if job.phase_total else 0.0
    text = progress(ctx, snap, job)
    return (f'<section class="box">{bar(share, text, job.state)}<p class="acts">'
            f'<span>{esc(text)}</span>{stop}</p></section>')


def progress(ctx: Context, snap: Snapshot, job: JobView) -> str:
    if job.state == "queued":
        active = snap.active
        return ctx.tr("waits_for", name=active.name) if active else ctx.tr("starts_soon")
    if job.phase != "caption" or not job.phase_total:
        return ctx.tr("tab_captioning.loading")
    said = ctx.tr("tab_captioning.doing", done=job.phase_done, total=job.phase_total)
    took = job.updated - job.started
    if job.phase_done < 2 or took <= 0:
        return said
    each = took / job.phase_done
    left = duration(ctx, each * (job.phase_total - job.phase_done))
    return f"{said} · {ctx.tr('tab_captioning.each', seconds=f'{each:.1f}', left=left)}"


def _ended(ctx: Context, job: JobView) -> str:
    if job.fault is not None:
        return fault_card(ctx, job)
    told = job.result
    parts = [ctx.tr("tab_captioning.ended", count=told.get("captioned", 0),
                    kept=told.get("kept", 0))]
    for key in ("skipped", "left"):
        if told.get(key):
            parts.append(ctx.tr(f"tab_captioning.ended_{key}", count=len(told[key])))
    return card("good" if job.state == "done" else "info", ctx.tr(
        f"tab_captioning.state_{'done' if job.state == 'done' else 'stopped'}"), " ".join(parts))


def _choice(ctx: Context, kept: dict[str, Any]) -> str:
    """The built-in captioner says plainly what it is; one that isn't here, how it comes."""
    chosen = [one.partition("=")[2] for one in (kept["sentence"], kept["tags"]) if one]
    if "demo" in chosen:
        return card("warning", ctx.tr("tab_captioning.demo_title"),
                    ctx.tr("captioner.demo_only"))
    lacking = [model for model in chosen if model != "auto" and hub.local(model) is None]
    return "".join(card("info", ctx.tr("tab_captioning.to_fetch"),
                        ctx.tr("hub.missing", name=model)) for model in lacking)


def _pictures(outcome: Outcome) -> int:
    return sum(bool(swap.picture) for swap in outcome.done)
