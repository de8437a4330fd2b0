"""Taking a LoRA to other programs: which file, which program, which folder."""

from __future__ import annotations

from core.lora_files.export import PROGRAMS
from gui.html import esc
from gui.state import inference_request as wanted
from gui.state.app_state import Context, Snapshot
from gui.state.inference_files import InferenceFiles
from gui.widgets.lora_list import called

LABELS = {"a1111": "A1111", "forge": "Forge", "comfyui": "ComfyUI", "diffusers": "diffusers"}


def lora_export(ctx: Context, snap: Snapshot, desk: InferenceFiles) -> str:
    """Folded; the folder is the one used last, or where the program was found."""
    tr = ctx.tr
    found = wanted.choices(snap, desk)
    loras = wanted.added(snap, found)
    if not loras:
        return ""
    by_file = {choice.file: called(ctx, choice) for choice in found}
    files = "".join(
        f'<option value="{esc(one.file)}">{esc(by_file.get(one.file, one.name))}</option>'
        for one in loras)
    known = {program: folder_for(snap, desk, program) for program in PROGRAMS}
    first = next((program for program in PROGRAMS if known[program]), "a1111")
    programs = "".join(
        f'<option value="{program}" data-folder="{esc(known[program])}"'
        f'{" selected" if program == first else ""}>{LABELS[program]}</option>'
        for program in PROGRAMS)
    places = "".join(f'<option value="{esc(place.folder)}">{LABELS[place.program]}</option>'
                     for place in desk.places or ())
    folder, hint = esc(tr("tab_inference.folder")), esc(tr("tab_inference.folder_hint"))
    said = f'<p class="small" role="status">{esc(desk.said)}</p>' if desk.said else ""
    return (f'<details class="box export" data-key="export"><summary>'
            f'{esc(tr("tab_inference.export"))}</summary><form data-act="export" data-fields>'
            f'<label>LoRA <select name="file">{files}</select></label>'
            f'<label>{esc(tr("tab_inference.program"))} <select name="program" data-folders>'
            f'{programs}</select></label><label class="wide">{folder} '
            f'<input type="text" name="folder" list="lora-places" value="{esc(known[first])}" '
            f'autocomplete="off" spellcheck="false" placeholder="{hint}">'
            f'</label><datalist id="lora-places">{places}</datalist>'
            f'<button class="act">{esc(tr("tab_inference.do_export"))}</button></form>'
            f'<p class="small">{esc(tr("tab_inference.export_help"))}</p>{said}</details>')


def folder_for(snap: Snapshot, desk: InferenceFiles, program: str) -> str:
    """The one used last, else the first that was found."""
    kept = snap.settings.exports.get(program, "")
    return kept or next((str(place.folder) for place in desk.places or ()
                         if place.program == program), "")
