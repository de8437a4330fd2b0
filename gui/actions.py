"""What the buttons of the Parameters tab do: each deed by the name that its button bears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import paths
from core.base_models import hub
from core.config import TrainConfig
from core.errors import UserError
from core.importers import load_train_config
from core.jobs import history, journal
from core.workspace import presets
from core.workspace.project import Project
from gui.state.app_state import AppState, Context, Updates
from gui.state.desktop import open_folder
from gui.state.run_files import folder_of

PLANNED = frozenset({"preset", "advice", "nearest", "demo", "reload", "use_base", "use_repo",
                     "native_file", "native_folder", "native_pictures", "set_pictures",
                     "set_output", "native_output"})


def act(ctx: Context, name: str, id: str) -> Updates | None:
    deed = _DEEDS.get(name)
    if deed is not None:
        deed(ctx, id)
    if name in PLANNED:
        ctx.app_state.replan(ctx.language)
    return None


# --- presets and advice ---

def choose_preset(app_state: AppState, slug: str) -> None:
    """A preset that is chosen decides its fields: own edits of them are taken back."""
    def chosen(project: Project) -> Project:
        fresh = project.model_copy(update={"preset": slug, "advised": {}, "invalid": {}})
        preset = fresh.chosen()
        if preset is None:
            return project
        hidden = {*preset.set, "epochs", "max_train_steps"}
        edits = {key: value for key, value in project.edits.items() if key not in hidden}
        return fresh.model_copy(update={"edits": edits, "purpose": preset.purpose})
    app_state.projects.update(chosen)


def take_advice(app_state: AppState) -> None:
    values = (app_state.planning.now.answer.get("suggestion") or {}).get("values", {})
    hidden = {*values, "epochs", "max_train_steps"}
    app_state.projects.update(lambda project: project.model_copy(update={
        "advised": dict(values), "invalid": {}, "edits": {
            key: value for key, value in project.edits.items() if key not in hidden}}))


def load_demo(app_state: AppState) -> None:
    """The demo's own config and pictures, with a preview that shows the style coming."""
    config = load_train_config(paths.DEMO / "demo.yaml")
    edits = config.model_dump(exclude_unset=True, exclude={"output_dir", "output_name"}) | {
        "base_model": "demo", "train_data_dir": str(paths.DEMO / "pictures"),
        "trigger_word": "duskprint style", "sample_every": 125, "sample_inference_steps": 16,
        "sample_cfg": 1.5, "sample_prompts": ["a cat, duskprint style", "a house, duskprint style"]}
    app_state.projects.update(lambda project: project.model_copy(update={
        "edits": edits, "preset": "", "advised": {}, "invalid": {}, "run": ""}))
    app_state.settings.change(welcomed=True)


def save_preset(ctx: Context, title: str) -> None:
    """The settings as they stand; what they need is what the plan says."""
    app_state = ctx.app_state
    snap = app_state.snapshot()
    plan = snap.plan_state.answer.get("plan") or {}
    card = (plan.get("machine") or {}).get("kind") == "cuda"
    family = presets.family_of(snap.config.base_model, family=snap.config.family)
    made = presets.save_own(
        title, family, snap.project.purpose, snap.config,
        presets.needs_of(plan.get("needs_mb", 0), card))
    app_state.projects.change(preset=made.slug)
    ctx.page.tell(ctx.tr("presets.own_saved", title=title))


def own(app_state: AppState) -> presets.Preset:
    """The chosen preset of one's own. Raises UserError."""
    chosen = app_state.projects.now.chosen()
    if chosen is None or not presets.is_own(chosen):
        raise UserError("presets.own_gone")
    return chosen


def remove_preset(ctx: Context, id: str) -> None:
    chosen = own(ctx.app_state)
    presets.remove_own(chosen)
    keep(ctx.app_state, "presets", removed=f"{chosen.family}/{chosen.slug}")
    ctx.app_state.projects.change(preset="")


def restore_preset(ctx: Context, id: str) -> None:
    family, _, slug = id.partition("/")
    presets.restore_own(Path(family).name, slug)
    keep(ctx.app_state, "presets", removed="")
    choose_preset(ctx.app_state, slug)


# --- the base ---

def use_base(app_state: AppState, path: str) -> None:
    app_state.projects.edit(base_model=path or None)


def use_found(ctx: Context, id: str) -> None:
    found = ctx.app_state.bases.now.found
    if id.isdigit() and int(id) < len(found):
        use_base(ctx.app_state, str(found[int(id)].path))


def fetch(ctx: Context, repo: str) -> None:
    """On the user's word; the base is chosen when it has come."""
    if repo not in (entry.repo for entry in hub.catalogue()):
        raise UserError("base_model.unknown_model", repo=repo)
    app_state, language = ctx.app_state, ctx.language

    def then(path: str) -> None:
        use_base(app_state, path)
        app_state.filled()
        app_state.replan(language)
    app_state.bases.download(repo, app_state.settings.now.mirror, then)


def search_bases(app_state: AppState) -> None:
    app_state.bases.look(tuple(app_state.settings.now.model_folders))


def choose_natively(ctx: Context, what: str) -> None:
    """`what`: pictures | output | file | folder. The dialog is open meanwhile."""
    found = ctx.app_state.desktop.choose(what != "file")
    if found:
        {"pictures": set_pictures, "output": set_output}.get(
            what, lambda ctx, path: use_base(ctx.app_state, path))(ctx, found)


def set_pictures(ctx: Context, text: str) -> None:
    ctx.app_state.projects.edit(train_data_dir=str(absolute(text)) if text.strip() else None)


def set_output(ctx: Context, text: str) -> None:
    """For all projects: an output folder of this one's own would hide it."""
    folder = absolute(text) if text.strip() else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    ctx.app_state.settings.change(output_root=str(folder or ""))
    ctx.app_state.projects.update(lambda project: project.model_copy(update={"edits": {
        key: value for key, value in project.edits.items() if key != "output_dir"}}))


def number(id: str) -> int:
    return int(id) if id.isdecimal() else 0


def absolute(text: str) -> Path:
    """Raises UserError: the window's working folder means nothing to anyone."""
    path = Path(text.strip().strip('"')).expanduser()
    if not path.is_absolute():
        raise UserError("gui.not_absolute", folder=text)
    return path


# --- runs ---

def keep(app_state: AppState, tab: str, **changes: Any) -> None:
    """What a part of the page keeps in the project, so that every page shows the same."""
    app_state.projects.update(lambda project: project.model_copy(update={"tabs": {
        **project.tabs, tab: {**project.tabs.get(tab, {}), **changes}}}))


def choose_to_compare(ctx: Context, id: str) -> None:
    """The two that were chosen last; "": none."""
    before = [str(one) for one in ctx.app_state.projects.now.tabs.get("runs", {}).get("compare",
                                                                                      [])]
    chosen = [one for one in before if one != id]
    keep(ctx.app_state, "runs", compare=([*chosen, id] if id not in before else chosen)[-2:]
         if id else [])


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
    edits = config_of(ctx.app_state, id).model_dump(exclude_defaults=True, exclude={"resume"})
    ctx.app_state.projects.update(lambda project: project.model_copy(update={
        "edits": edits, "preset": "", "advised": {}, "invalid": {}, "run": ""}))


def config_of(app_state: AppState, run_id: str) -> TrainConfig:
    view = app_state.jobs.view(run_id)
    return load_train_config(view.folder / journal.CONFIG)


_DEEDS: dict[str, Callable[[Context, str], Any]] = {
    "preset": lambda ctx, id: choose_preset(ctx.app_state, id),
    "save_preset": save_preset,
    "rename_preset": lambda ctx, id: presets.rename_own(own(ctx.app_state), id),
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
    "native_pictures": lambda ctx, id: choose_natively(ctx, "pictures"),
    "native_output": lambda ctx, id: choose_natively(ctx, "output"),
    "native_file": lambda ctx, id: choose_natively(ctx, "file"),
    "native_folder": lambda ctx, id: choose_natively(ctx, "folder"),
    "look": lambda ctx, id: search_bases(ctx.app_state),
    "use_base": use_found,
    "use_repo": lambda ctx, id: use_base(ctx.app_state, str(hub.local(id) or "")),
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
