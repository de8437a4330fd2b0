"""What the buttons of the Parameters tab do: each handler by its button's `data-act`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from core import paths
from core.base_models import hub
from core.base_models.catalog import catalogue
from core.errors import UserError
from core.importers import load_train_config
from core.jobs import history, journal
from core.workspace import presets
from core.workspace.project import Project
from gui.state.app_state import AppState, Context
from gui.state.desktop import open_folder
from gui.state.run_files import folder_of

# After these the memory is planned anew.
PLANNED = frozenset({"preset", "advice", "nearest", "demo", "reload", "use_base", "use_repo",
                     "native_file", "native_folder", "native_pictures", "set_pictures",
                     "set_output", "native_output", "remove_preset", "restore_preset"})


def act(ctx: Context, name: str, id: str) -> None:
    """Runs the handler of a button; a name that none has does nothing."""
    if handler := _HANDLERS.get(name):
        handler(ctx, id)
    if name in PLANNED:
        ctx.app_state.replan(ctx.language)


# --- presets and advice ---

def choose_preset(app_state: AppState, slug: str) -> None:
    """A preset that is chosen decides its fields: own edits of them are taken back."""
    def choose(project: Project) -> Project:
        fresh = project.model_copy(update={"preset": slug, "advised": {}, "invalid": {}})
        preset = fresh.chosen()
        return project if preset is None else fresh.model_copy(update={
            "purpose": preset.purpose, "edits": _without(project.edits, preset.set)})
    app_state.projects.update(choose)


def take_advice(app_state: AppState) -> None:
    """The suggestion's values become the project's; own edits of them are taken back."""
    values = (app_state.planning.now.answer.get("suggestion") or {}).get("values", {})
    app_state.projects.update(lambda project: project.model_copy(update={
        "advised": dict(values), "invalid": {}, "edits": _without(project.edits, values)}))


def _without(edits: dict[str, Any], decided: Iterable[str]) -> dict[str, Any]:
    # Presets and advice decide how long is trained, by one of these two keys.
    hidden = {*decided, "epochs", "max_train_steps"}
    return {key: value for key, value in edits.items() if key not in hidden}


def replace_edits(app_state: AppState, edits: dict[str, Any]) -> None:
    """The project's settings become these; its preset and the shown run are put away."""
    app_state.projects.update(lambda project: project.model_copy(update={
        "edits": edits, "preset": "", "advised": {}, "invalid": {}, "run": ""}))


def load_demo(app_state: AppState) -> None:
    """The demo's own config and pictures, with a preview that shows the style coming."""
    config = load_train_config(paths.DEMO / "demo.yaml")
    edits = config.model_dump(exclude_unset=True, exclude={"output_dir", "output_name"}) | {
        "base_model": "demo", "train_data_dir": str(paths.DEMO / "pictures"),
        "trigger_word": "duskprint style", "sample_every": 125, "sample_inference_steps": 16,
        "sample_cfg": 1.5, "sample_prompts": ["a cat, duskprint style", "a house, duskprint style"]}
    replace_edits(app_state, edits)
    app_state.settings.change(welcomed=True)


def save_preset(ctx: Context, title: str) -> None:
    """Saves the settings as a preset of the user's own, with the memory that the plan says."""
    app_state = ctx.app_state
    snap = app_state.snapshot()
    plan = snap.plan_state.answer.get("plan") or {}
    card = (plan.get("machine") or {}).get("kind") == "cuda"
    family = presets.family_of(snap.config.base_model, family=snap.config.family)
    preset = presets.save_user_preset(title, family, snap.project.purpose, snap.config,
                                      presets.needs_of(plan.get("needs_mb", 0), card))
    app_state.projects.change(preset=preset.slug)
    ctx.page.tell(ctx.tr("presets.own_saved", title=title))


def user_preset(app_state: AppState) -> presets.Preset:
    """The chosen preset. Raises UserError where it isn't one of the user's own."""
    chosen = app_state.projects.now.chosen()
    if chosen is None or not presets.is_user_preset(chosen):
        raise UserError("presets.own_gone")
    return chosen


def remove_preset(ctx: Context, id: str) -> None:
    chosen = user_preset(ctx.app_state)
    presets.remove_user_preset(chosen)
    keep(ctx.app_state, "presets", removed=f"{chosen.family}/{chosen.slug}")
    ctx.app_state.projects.change(preset="")


def restore_preset(ctx: Context, id: str) -> None:
    """Brings back a preset that was deleted, and chooses it. `id`: 'family/slug'."""
    family, _, slug = id.partition("/")
    presets.restore_user_preset(Path(family).name, slug)
    keep(ctx.app_state, "presets", removed="")
    choose_preset(ctx.app_state, slug)


# --- the base ---

def use_base(ctx: Context, path: str) -> None:
    ctx.app_state.projects.edit(base_model=path or None)


def use_found(ctx: Context, id: str) -> None:
    """Chooses a model that was found on this machine; `id` is its number."""
    models = ctx.app_state.bases.now.found
    if id.isdigit() and int(id) < len(models):
        use_base(ctx, str(models[int(id)].path))


def fetch(ctx: Context, repo: str) -> None:
    """Downloads a base model, and chooses it once it is complete. Raises UserError for a model that
    the catalogue doesn't have."""
    if repo not in (entry.repo for entry in catalogue()):
        raise UserError("base_model.unknown_model", repo=repo)
    app_state = ctx.app_state

    def then(path: str) -> None:
        use_base(ctx, path)
        app_state.filled()
        app_state.replan(ctx.language)
    app_state.bases.download(repo, app_state.settings.now.mirror, then)


def search_bases(app_state: AppState) -> None:
    app_state.bases.look(tuple(app_state.settings.now.model_folders))


def choose_natively(what: str, ctx: Context, id: str) -> None:
    """Opens the system's dialog and waits for it. `what`: pictures | output | file | folder."""
    if path := ctx.app_state.desktop.choose(folder=what != "file"):
        {"pictures": set_pictures, "output": set_output}.get(what, use_base)(ctx, path)


def set_pictures(ctx: Context, text: str) -> None:
    ctx.app_state.projects.edit(train_data_dir=str(absolute(text)) if text.strip() else None)


def set_output(ctx: Context, text: str) -> None:
    """Sets the output folder of all projects; one of this project's own is removed, since it would
    come first."""
    folder = absolute(text) if text.strip() else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    ctx.app_state.settings.change(output_root=str(folder or ""))
    ctx.app_state.projects.update(lambda project: project.model_copy(update={"edits": {
        key: value for key, value in project.edits.items() if key != "output_dir"}}))


def set_trigger(ctx: Context, word: str | None) -> None:
    """Sets the trigger word. Boxes send their text whenever they are left: only a different word is
    an edit."""
    word = (word or "").strip()
    if word != ctx.app_state.snapshot().config.trigger_word:
        ctx.app_state.projects.edit(trigger_word=word or None)
        ctx.app_state.replan(ctx.language)


def number(id: str) -> int:
    return int(id) if id.isdecimal() else 0


def absolute(text: str) -> Path:
    """The path that was typed. Raises UserError for a relative one: users don't know the working
    folder of the window."""
    path = paths.expanded(text.strip().strip('"'))
    if not path.is_absolute():
        raise UserError("gui.not_absolute", folder=text)
    return path


# --- runs ---

def keep(app_state: AppState, tab: str, **changes: Any) -> None:
    """Saves values of a tab in the project, so that every page shows the same."""
    app_state.projects.update(lambda project: project.model_copy(update={"tabs": {
        **project.tabs, tab: {**project.tabs.get(tab, {}), **changes}}}))


def keep_drawing(app_state: AppState, values: Mapping[str, Any]) -> None:
    """Saves values of the Inference tab in the project."""
    app_state.projects.update(lambda project: project.model_copy(
        update={"inference": {**project.inference, **values}}))


def choose_to_compare(ctx: Context, id: str) -> None:
    """Adds a run to the two that are compared, or takes it away again; "": no run any more."""
    before = list(map(str, ctx.app_state.projects.now.state("runs", compare=[])["compare"]))
    chosen = [run for run in before if run != id] + [id] * (id not in before)
    keep(ctx.app_state, "runs", compare=chosen[-2:] if id else [])


def remove_run(ctx: Context, id: str) -> None:
    app_state = ctx.app_state
    history.remove(app_state.jobs.view(id))
    keep(app_state, "runs", removed=id)
    if app_state.projects.now.run == id:
        app_state.projects.change(run="")


def restore_run(ctx: Context, id: str) -> None:
    history.restore(id)
    keep(ctx.app_state, "runs", removed="")


def reload_run(ctx: Context, id: str) -> None:
    """A run's settings become the project's."""
    config = load_train_config(ctx.app_state.jobs.view(id).folder / journal.CONFIG)
    replace_edits(ctx.app_state, config.model_dump(exclude_defaults=True, exclude={"resume"}))


_HANDLERS: dict[str, Callable[[Context, str], Any]] = {
    "preset": lambda ctx, id: choose_preset(ctx.app_state, id),
    "save_preset": save_preset,
    "rename_preset": lambda ctx, id: presets.rename_user_preset(user_preset(ctx.app_state), id),
    "remove_preset": remove_preset,
    "restore_preset": restore_preset,
    "advice": lambda ctx, id: take_advice(ctx.app_state),
    "nearest": lambda ctx, id: ctx.app_state.projects.edit(
        **(ctx.app_state.planning.now.answer.get("nearest") or {}).get("changes", {})),
    "demo": lambda ctx, id: load_demo(ctx.app_state),
    "welcomed": lambda ctx, id: ctx.app_state.settings.change(welcomed=True),
    "step": lambda ctx, id: ctx.app_state.settings.change(first_step=number(id)),
    "set_pictures": set_pictures,
    "set_output": set_output,
    **{f"native_{what}": functools.partial(choose_natively, what)
       for what in ("pictures", "output", "file", "folder")},
    "look": lambda ctx, id: search_bases(ctx.app_state),
    "use_base": use_found,
    "use_repo": lambda ctx, id: use_base(ctx, str(hub.local(id) or "")),
    "ask": lambda ctx, id: ctx.app_state.bases.ask(id),
    "fetch": fetch,
    "stop_fetch": lambda ctx, id: ctx.app_state.bases.stop(),
    "forget": lambda ctx, id: ctx.app_state.bases.forget(),
    "show": lambda ctx, id: ctx.app_state.projects.change(run=id),
    "compare": choose_to_compare,
    "page": lambda ctx, id: keep(ctx.app_state, "runs", page=number(id)),
    "reload": reload_run,
    "resume": lambda ctx, id: ctx.app_state.projects.change(run=ctx.app_state.jobs.resume(id)),
    "remove": remove_run,
    "restore": restore_run,
    "folder": lambda ctx, id: open_folder(folder_of(ctx.app_state.jobs.view(id))),
    "leave": lambda ctx, id: ctx.app_state.jobs.stop(id),
    "up": lambda ctx, id: ctx.app_state.jobs.move_up(id),
}
