"""Captioning: let a captioner describe the pictures, edit by keyboard, change all by rules."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gradio as gr

from captioner.captions import search
from captioner.captions.rule_parser import parse, parse_line
from captioner.captions.rules import Change, MaxTokens, Rule, preview, with_trigger_rule
from captioner.captions.undo import Outcome
from captioner.config import CaptionConfig
from core import paths
from core.base_models import hub
from core.base_models.catalog import catalogue
from core.errors import UserError
from core.jobs.runs import JobView
from gui import actions
from gui.html import acts, bar, button, card, duration, esc, small
from gui.state.app_state import Context, Snapshot, Updates
from gui.state.dataset_view import DatasetView, caption_job
from gui.widgets import caption_rows
from gui.widgets.fault_card import fault_card
from gui.widgets.panel import panel
from gui.widgets.picture_grid import page_of

# Owner of a repository in core/base_models/models.yaml -> captioner.
OWNERS = {"florence-community": "florence", "Salesforce": "blip", "SmilingWolf": "wd",
          "laion": "clip"}
SENTENCES, TAGS = ("blip", "florence", "endpoint"), ("wd", "clip")
# The key of this tab in Project.tabs.
TAB = "captioning"
MOST_FAILED = 20                        # pictures whose faults are shown; the log has all


class CaptioningTab:
    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self.dataset: DatasetView = ctx.app_state.shared(DatasetView)
        self._build_job()
        tr, page = self._tr, ctx.page
        with gr.Row():
            with gr.Column(scale=7, min_width=440):
                self.search = gr.Textbox(label=tr("search"), placeholder=tr("search_hint"),
                                         elem_id="caption-search", max_lines=1)
                self.rows = panel("caption-rows", "caption_editor", dense=True)
                self.texts = panel("captions-texts", "caption_texts")
            with gr.Column(scale=5, min_width=340):
                with gr.Accordion(tr("rules"), open=False, elem_id="caption-rules-box"):
                    self.rules = gr.Textbox(
                        label=tr("rules_label"), placeholder=tr("rules_hint"),
                        info=tr("rules_help"), lines=3, max_lines=8, elem_id="caption-rules")
                    self.first = gr.Checkbox(label=tr("trigger_first"), elem_id="trigger-first")
                    with gr.Row():
                        trial = gr.Button(tr("preview"), size="sm", elem_id="rules-preview")
                        apply = gr.Button(tr("apply"), size="sm", elem_id="rules-apply")
                    self.would = panel("rules-changes")
                self.stats = panel("caption-stats", dense=True)
        rules = [self.rules, self.first]
        page.on(self.try_rules, trial.click, inputs=rules)
        page.on(self.apply_rules, apply.click, inputs=rules)
        page.on(self.keep_rules, self.rules.blur, inputs=rules)
        page.on(self.look_for, self.search.submit, self.search.blur, inputs=[self.search])
        page.on(self.act, self.job, self.rows, self.stats)

    def _tr(self, key: str, **params: Any) -> str:
        return self.ctx.tr(f"tab_captioning.{key}", **params)

    def _build_job(self) -> None:
        tr, page = self._tr, self.ctx.page
        with gr.Row():
            self.sentence = gr.Dropdown(offers(self.ctx, "sentence"), label=tr("sentence"),
                                        elem_id="captioner-sentence", scale=3, min_width=220)
            self.tags = gr.Dropdown(offers(self.ctx, "tags"), label=tr("tags"),
                                    elem_id="captioner-tags", scale=3, min_width=220)
            self.existing = gr.Radio([(tr(f"existing_{choice}"), choice) for choice in (
                "keep", "add", "replace")], label=tr("existing"), elem_id="captions-existing",
                scale=4, min_width=330)
            self.trigger = gr.Textbox(label=self.ctx.tr("config_help.trigger_word"),
                                      elem_id="caption-trigger", scale=2, min_width=140)
            self.start = gr.Button(tr("start"), variant="primary", elem_id="caption-start",
                                   scale=2, min_width=160)
        self.endpoint = gr.Textbox(label=tr("endpoint"), elem_id="caption-endpoint", visible=False)
        self.job = panel("caption-job", dense=True)
        # An address is kept once it is complete, a choice at once.
        page.on(self.keep, self.sentence.input, self.tags.input, self.existing.input,
                self.endpoint.blur,
                inputs=[self.sentence, self.tags, self.existing, self.endpoint])
        page.on(functools.partial(actions.set_trigger, self.ctx), self.trigger.submit,
                self.trigger.blur, inputs=[self.trigger], fill=True)
        page.on(self.begin, self.start.click)

    # --- painting ---

    def label(self, snap: Snapshot) -> str:
        state = self.dataset.now
        done = f" ✓{state.captioned}/{len(state.training)}" if state.training else ""
        return f"2 {self.ctx.tr('tab_captioning')}{done}"

    def paint(self, snap: Snapshot) -> Updates:
        ctx, dataset = self.ctx, self.dataset
        job, options, names = caption_job(snap), options_of(snap), self._matching(snap)
        running = job is not None and not job.over
        count = len(dataset.now.training)
        return {self.job: status(ctx, snap, job, options),
                self.start: gr.update(interactive=bool(count) and not running, value=self._tr(
                    "start_n" if count else "start", count=count)),
                self.endpoint: gr.update(visible=options["sentence"].startswith("endpoint")),
                self.rows: caption_rows.rows(ctx, dataset, names),
                self.texts: caption_rows.texts(ctx, dataset, names),
                self.search: dataset.shown.search, self.trigger: snap.config.trigger_word,
                self.stats: caption_rows.statistics(ctx, dataset.now)}

    def fill(self, snap: Snapshot) -> Updates:
        options = options_of(snap)
        return {self.sentence: options["sentence"], self.tags: options["tags"],
                self.existing: options["existing"], self.endpoint: gr.update(
                    value=options["endpoint"],
                    visible=options["sentence"].startswith("endpoint")),
                self.rules: options["rules"], self.first: options["first"], self.would: ""}

    def _matching(self, snap: Snapshot) -> tuple[str, ...]:
        """The pictures of the search; none where it can't be read, which look_for has told."""
        try:
            return caption_rows.matching(self.dataset, snap.config.trigger_word)
        except UserError:
            return ()

    # --- the job ---

    def keep(self, sentence: str, tagger: str, existing: str, endpoint: str) -> None:
        actions.keep(self.ctx.app_state, TAB, sentence=sentence, tags=tagger, existing=existing,
                     endpoint=endpoint)

    def begin(self) -> None:
        """Queues the job. Raises UserError where its weights are not here."""
        app_state = self.ctx.app_state
        snap = app_state.snapshot()
        config = config_of(options_of(snap), self.dataset, snap.config.trigger_word,
                           snap.config.metadata_path)
        for model in config.models.values():
            if model not in ("demo", "auto"):
                hub.find(model)
        app_state.jobs.start(config, name=Path(config.folder).name, job="caption")

    # --- the editor ---

    def look_for(self, text: str) -> None:
        text = (text or "").strip()
        if text != self.dataset.shown.search:
            # Raises UserError, which names the column.
            search.parse(text)
            self.dataset.show(search=text, only=())

    def act(self, act: str, id: str) -> Updates | None:
        """Buttons and keys of the panels."""
        dataset, app_state = self.dataset, self.ctx.app_state
        match act:
            case "save":
                key, _, text = id.partition(" ")
                self._say_left(dataset.write({dataset.named(key): " ".join(text.split())}))
            case "undo" | "redo":
                outcome = dataset.step(act)
                self._say_left(outcome)
                self.ctx.page.tell(self._tr(f"{act}_done", count=_count(outcome)))
            case "search":
                dataset.show(search=id, only=())
            case "page" if id.lstrip("-").isdigit():
                dataset.show(rows=int(id))
            case "next" | "previous" | "next_empty":
                names = self._matching(app_state.snapshot())
                page, pages = page_of(len(names), dataset.shown.rows, caption_rows.PER_PAGE)
                target: int | None = min(max(page + (1 if act == "next" else -1), 0), pages - 1)
                if act == "next_empty":
                    target = caption_rows.next_empty(names, dataset.now.captions, page)
                    if target is None:
                        self.ctx.page.tell(self._tr("all_written"))
                dataset.show(rows=page if target is None else target)
            case "remove_tags" | "remove_words":
                rule = {"tags": [id]} if act == "remove_tags" else {"text": id}
                self._apply(list(parse([{"rule": "remove", **rule}])), [f"remove:{id}"])
            case "stop":
                app_state.jobs.stop(id)
            case "again":
                # The same job: its captioner recalls what it has described.
                job = app_state.jobs.view(id)
                app_state.jobs.start(CaptionConfig(**job.config), name=job.name, job="caption")
        return None

    def _say_left(self, outcome: Outcome) -> None:
        """Names captions that were not written, since another program has changed them."""
        for swap in outcome.left[:3]:
            if swap.picture:
                self.ctx.page.tell(self.ctx.tr("runner.edited", picture=swap.picture),
                                   kind="warning")

    # --- rules ---

    def keep_rules(self, text: str, first: bool) -> None:
        actions.keep(self.ctx.app_state, TAB, rules=text or "", first=bool(first))

    def try_rules(self, text: str, first: bool) -> Updates:
        self.keep_rules(text, first)
        changes, total = self._preview(self._rules(text, first)[0])
        return {self.would: caption_rows.changes(self.ctx, changes, total)}

    def apply_rules(self, text: str, first: bool) -> Updates:
        self.keep_rules(text, first)
        count = self._apply(*self._rules(text, first))
        return {self.would: small(self._tr("applied", count=count))}

    def _rules(self, text: str, first: bool) -> tuple[list[Rule], list[str]]:
        """-> the rules, and how the history names them. Raises UserError where there are none."""
        lines = [line.lstrip() for line in (text or "").splitlines() if line.strip()]
        trigger = self.ctx.app_state.snapshot().config.trigger_word if first else ""
        rules = with_trigger_rule(parse([parse_line(line, n) for n, line in enumerate(lines, 1)]),
                                  trigger)
        if not rules:
            raise UserError("tab_captioning.no_rules")
        return list(rules), [*lines, *([f"trigger:{trigger}"] if trigger.strip() else [])]

    def _preview(self, rules: list[Rule]) -> tuple[list[Change], int]:
        """-> what rules change, and how many captions they are applied to: all that the search
        finds, but empty ones."""
        captions = self.dataset.now.captions
        rulable = {name: captions[name] for name in self._matching(self.ctx.app_state.snapshot())
                   if captions.get(name)}
        needs = any(isinstance(rule, MaxTokens) for rule in rules)
        if needs and self.dataset.count_tokens is None:
            raise UserError("tab_captioning.no_tokenizer")
        return preview(rulable, rules, self.dataset.count_tokens), len(rulable)

    def _apply(self, rules: list[Rule], lines: list[str]) -> int:
        changes, _ = self._preview(rules)
        outcome = self.dataset.write({change.path: change.after for change in changes}, "apply",
                                     rules=lines)
        self._say_left(outcome)
        self.ctx.page.tell(self._tr("applied", count=_count(outcome)))
        return _count(outcome)


# --- what is asked for ---

def options_of(snap: Snapshot) -> dict[str, Any]:
    """What the project keeps of this tab, with defaults for what it lacks."""
    default: dict[str, Any] = {"sentence": "blip=demo", "tags": "clip=demo", "existing": "keep",
                               "endpoint": CaptionConfig.model_fields["endpoint"].default,
                               "rules": "", "first": True}
    # The project's file may have been edited by hand: values of another type don't count.
    saved = snap.project.tabs.get(TAB, {})
    return default | {key: value for key, value in saved.items()
                      if key in default and isinstance(value, type(default[key]))}


def offers(ctx: Context, kind: str) -> list[tuple[str, str]]:
    """(label, captioner=model) of all that write sentences or tags; labels say what isn't here."""
    ids, demo = (SENTENCES, "blip=demo") if kind == "sentence" else (TAGS, "clip=demo")
    choices = [(ctx.tr("tab_captioning.none"), ""), (ctx.tr(f"tab_captioning.demo_{kind}"), demo)]
    for entry in catalogue():
        captioner = OWNERS.get(entry.repo.partition("/")[0], "")
        if entry.purpose in ("caption", "tag", "clip") and captioner in ids:
            here = "" if hub.local(entry.repo) else ctx.tr("tab_captioning.not_here", mb=entry.mb)
            choices.append((entry.about[ctx.language] + here, f"{captioner}={entry.repo}"))
    if kind == "sentence":
        choices.append((ctx.tr("tab_captioning.server"), "endpoint=auto"))
    return choices


def config_of(options: dict[str, Any], dataset: DatasetView, trigger: str,
              metadata: str) -> CaptionConfig:
    """The job's config. Raises UserError where nothing was chosen."""
    pairs = [choice.partition("=") for choice in (options["sentence"], options["tags"]) if choice]
    state = dataset.now
    if not pairs:
        raise UserError("tab_captioning.nothing_chosen")
    if state.folder is None or not state.training:
        raise UserError("tab_captioning.no_pictures")
    return CaptionConfig(
        folder=str(state.folder), captioner="+".join(name for name, _, _ in pairs),
        models={name: model for name, _, model in pairs if name != "endpoint"},
        existing=options["existing"], trigger_word=trigger, endpoint=options["endpoint"],
        metadata_path=str(paths.expanded(metadata).absolute()) if metadata else "",
        only=list(state.training) if state.training != state.names else [])


# --- how it goes ---

def status(ctx: Context, snap: Snapshot, job: JobView | None, options: dict[str, Any]) -> str:
    """The job while it runs, else how it ended and what the choice means."""
    if job is not None and not job.over:
        stop = button(ctx.tr("stop"), "stop", job.id, once=True,
                      why_not=ctx.tr("not_while_stopping") if job.state == "stopping" else "")
        text = progress(ctx, snap, job)
        progress_bar = bar(job.phase_done, job.phase_total, text, job.state)
        row = acts(f"<span>{esc(text)}</span>", stop)
        return f'<section class="box">{progress_bar}{row}</section>'
    chosen = [choice.partition("=")[2] for choice in (options["sentence"], options["tags"])
              if choice]
    # The built-in captioner says plainly what it is; one that isn't here, how it is fetched.
    if "demo" in chosen:
        hints = card("warning", ctx.tr("tab_captioning.demo_title"), ctx.tr("captioner.demo_only"))
    else:
        missing = [model for model in chosen if model != "auto" and hub.local(model) is None]
        hints = "".join(card("info", ctx.tr("tab_captioning.to_fetch"), ctx.tr(
            "hub.missing", name=model)) for model in missing)
    return (_ended(ctx, job) if job else "") + hints


def progress(ctx: Context, snap: Snapshot, job: JobView) -> str:
    """What a captioning does or waits for, in one sentence."""
    if job.state == "queued":
        active = snap.active
        return ctx.tr("waits_for", name=active.name) if active else ctx.tr("starts_soon")
    if job.phase != "caption" or not job.phase_total:
        return ctx.tr("tab_captioning.loading")
    text = ctx.tr("tab_captioning.doing", done=job.phase_done, total=job.phase_total)
    # One picture tells nothing: the model was loaded before it.
    if job.phase_done < 2 or job.updated <= job.started:
        return text
    each = (job.updated - job.started) / job.phase_done
    left = duration(ctx, each * (job.phase_total - job.phase_done))
    return f"{text} · {ctx.tr('tab_captioning.each', seconds=f'{each:.1f}', left=left)}"


def _ended(ctx: Context, job: JobView) -> str:
    if job.fault is not None:
        return fault_card(ctx, job)
    result, done = job.result, job.state == "done"
    parts = [ctx.tr("tab_captioning.ended", count=result.get("captioned", 0),
                    kept=result.get("kept", 0)),
             *(ctx.tr(f"tab_captioning.ended_{key}", count=len(result[key]))
               for key in ("skipped", "left", "failed") if result.get(key))]
    failed, html = result.get("failed"), ""
    if failed:
        lines = []
        for one in failed[:MOST_FAILED]:
            match one:
                case {"picture": str(picture), "code": str(code), "params": dict(params)}:
                    lines.append(ctx.tr("runner.failed", picture=picture,
                                        reason={**params, "say": code}))
        html = "".join(map(small, lines)) + acts(button(
            ctx.tr("tab_captioning.again"), "again", job.id, kind="primary", once=True))
    return card("good" if done and not failed else "info",
                ctx.tr(f"tab_captioning.state_{'done' if done else 'stopped'}"), " ".join(parts),
                html=html)


def _count(outcome: Outcome) -> int:
    """Of pictures; the sheet of captions is one swap more."""
    return sum(bool(swap.picture) for swap in outcome.done)
